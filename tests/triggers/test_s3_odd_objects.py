"""One odd object in a listing robs and stops no other."""

import asyncio
from typing import Any

import pytest

from tests.aws import Aws, Bucket, Queue, ministack
from tests.conftest import eventually
from tests.faults import listing, proxied
from tests.triggers.buckets import landing
from tests.triggers.test_s3_listing import KEYS, page_of

__all__ = ["ministack"]


@pytest.mark.parametrize(
    "time",
    ["30828-09-14T02:48:05.477Z", "0000-00-00T00:00:00Z", "9999-12-31T23:59:59-05:00", ""],
)
@pytest.mark.parametrize("with_queue", [False, True], ids=["alone", "beside a queue"])
def test_a_time_that_no_calendar_has_costs_no_page(ministack: Aws, time: str, with_queue: bool):
    """An object with any LastModified is an event, without the time if it cannot be read, and so
    are the others of its page; a second scan brings none again.
    """

    async def main() -> None:
        bucket = Bucket(ministack)
        page = page_of(bucket.name, *KEYS, truncated=False)
        odd = page.replace("2026-11-22T10:00:00.000Z", time, 1)
        options: dict[str, Any] = {"prefix": "in/"}
        if with_queue:
            options |= {"queue": Queue(ministack).url, "reconcile": 0.2}
        with proxied(ministack.url) as proxy:
            proxy.fail(listing, (200, odd))
            async with landing(ministack, bucket.name, endpoint_url=proxy.url, **options) as here:
                await here.has(*KEYS)
                await here.scanned()
                await here.scanned()
                times = {event.data["key"]: event.time for event in here.events}
                assert [key for key, at in times.items() if at is None] == ["in/0"]
            assert len(here.ledger.offered) == len(KEYS)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("<Size>4</Size>", "<Size></Size>"),
        ("<Size>4</Size>", "<Size>4 bytes</Size>"),
        ("<Size>4</Size>", "<Size>-1</Size>"),
        ("<Size>4</Size>", "<Size>1</Size><Size>2</Size>"),
        ("<Key>in/0</Key>", ""),
        ("<Key>in/0</Key>", "<Key></Key>"),
        ("<KeyCount>5</KeyCount>", "<KeyCount>?</KeyCount>"),
    ],
    ids=["no size", "no number", "negative", "two sizes", "no key", "empty key", "no count"],
)
@pytest.mark.parametrize("encoded", ["", "<EncodingType>url</EncodingType>"], ids=["", "encoded"])
def test_an_entry_that_cannot_be_read_costs_no_other(
    ministack: Aws, good: str, bad: str, encoded: str
):
    """A listed entry without a key, or with a size that is none, is no event, and one log line for
    all scans; the others of its page are events. An object that was an event before counts as
    listed.
    """

    async def main() -> None:
        bucket = Bucket(ministack)
        page = page_of(bucket.name, *KEYS, truncated=False).replace("</Name>", f"</Name>{encoded}")
        odd = page.replace(good, bad, 1)
        events = KEYS if "KeyCount" in good else KEYS[1:]
        with proxied(ministack.url) as proxy:
            proxy.fail(listing, (200, odd))
            async with landing(
                ministack, bucket.name, endpoint_url=proxy.url, prefix="in/", deleted=True
            ) as here:
                await here.has(*events)
                await here.scanned()
                await here.scanned()
                assert len(here.logged("bucket.entries_unreadable")) == len(KEYS) - len(events)
                if "Size" in good:
                    proxy.mend()
                    rule = proxy.fail(listing, (200, page))
                    await here.has(*KEYS)
                    rule.answer = (200, odd)
                    await here.scanned()
                    await here.scanned()
                    await here.has(*KEYS)

    asyncio.run(main())


def test_an_entry_that_cannot_be_read_leaves_its_folder_truncated(ministack: Aws):
    """The event of a folder has the other objects, and `truncated` says that some are not in it."""

    async def main() -> None:
        bucket = Bucket(ministack)
        page = page_of(bucket.name, *KEYS, "in/_SUCCESS", truncated=False)
        with proxied(ministack.url) as proxy:
            proxy.fail(listing, (200, page.replace("<Size>4</Size>", "<Size></Size>", 1)))
            async with landing(
                ministack, bucket.name, endpoint_url=proxy.url, prefix="in/", marker="_SUCCESS"
            ) as here:
                await eventually(lambda: here.events, "the folder is an event")
                data = here.events[0].data
                assert [each["key"] for each in data["objects"]] == KEYS[1:]
                assert data["truncated"] is True

    asyncio.run(main())
