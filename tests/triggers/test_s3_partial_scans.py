"""Conclusions from a scan of a bucket that has not ended, and from a single listing."""

import asyncio
from typing import Any

from tests.aws import Aws, Bucket, ministack
from tests.conftest import eventually
from tests.faults import SLOW_DOWN, listing, proxied
from tests.triggers.buckets import landing

__all__ = ["ministack"]


def test_what_lands_during_the_first_scan_is_not_skipped(ministack: Aws):
    """existing="skip": an object that lands behind the position of the first scan during that scan
    is an event, although no scan has ended before.
    """

    async def main() -> None:
        bucket = Bucket(ministack)
        bucket.fill(["a", "b", "c"])
        await eventually(lambda: bucket.is_past("c"), "another second has begun")
        with proxied(ministack.url) as proxy:
            rule = proxy.fail(
                lambda *asked: listing(*asked) and "continuation-token" in asked[1], SLOW_DOWN
            )
            options: dict[str, Any] = {"existing": "skip", "page": 2, "endpoint_url": proxy.url}
            async with landing(ministack, bucket.name, **options) as here:
                await eventually(lambda: rule.hits, "the first scan is at its second page")
                bucket.put("late")
                proxy.mend()
                await here.has("late")
                await here.scanned()
                assert here.keys == ["late"]

    asyncio.run(main())


EMPTY_PAGE = (
    200,
    '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><KeyCount>0</KeyCount>'
    "<IsTruncated>false</IsTruncated></ListBucketResult>",
)


def test_one_listing_without_a_key_is_no_removal(ministack: Aws):
    """deleted=True: a single listing that is stale or incomplete removes nothing."""

    async def main() -> None:
        bucket = Bucket(ministack)
        bucket.put("a")
        with proxied(ministack.url) as proxy:
            async with landing(
                ministack, bucket.name, deleted=True, endpoint_url=proxy.url
            ) as here:
                await here.has("a")
                rule = proxy.fail(listing, EMPTY_PAGE, times=1)
                await eventually(lambda: rule.hits, "a listing is empty")
                await here.scanned()
                assert here.keys == ["a"]

    asyncio.run(main())
