"""Scans of a bucket's listing, alone and beside a queue: new and known versions, pages, markers,
and faults.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from eventflow.core.errors import SourceError, UsageError
from eventflow.testing.trigger_contract import ContractLedger, listening
from tests.aws import Aws, Bucket, Queue, ministack, moto
from tests.conftest import eventually
from tests.faults import DENIED, HANG_UP, SLOW_DOWN, Proxy, action, listing, proxied
from tests.triggers.buckets import Landing, landing
from triggers._s3.known_objects import PENDING_EXPIRY_US, KnownObjects
from triggers.s3 import S3

__all__ = ["ministack", "moto"]


@pytest.fixture(params=["ministack", "moto"])
def aws(request: pytest.FixtureRequest) -> Aws:
    """Each of the servers."""
    return request.getfixturevalue(request.param)


def pages(proxy: Proxy) -> int:
    """How many pages were asked for."""
    return sum(listing(*asked) for asked in proxy.seen)


# ------------------------------------------------------------------ what is found


def test_event_of_a_listed_object(aws: Aws):
    """A listed object has the shape of a notified one; what a listing does not contain is null."""

    async def main() -> None:
        bucket = Bucket(aws)
        bucket.put("in/a b+c é.csv", b"hello")
        async with landing(aws, bucket.name, prefix="in/") as here:
            await here.has("in/a b+c é.csv")
            (event,) = here.events
            assert event.type == "io.eventflow.s3.object.created" and event.extensions == {
                "s3reason": "Listed"
            }
            etag = "5d41402abc4b2a76b9719d911017c592"
            assert event.data == {
                "bucket": bucket.name,
                "key": "in/a b+c é.csv",
                "size": 5,
                "etag": etag,
                "version": None,
                "sequencer": None,
            }
            assert event.time is not None and event.time.tzinfo is not None

    asyncio.run(main())


def test_s26_keys_with_control_characters(ministack: Aws):
    """Keys that XML cannot hold are listed and decoded: a newline, U+0001, a tab."""
    odd = ["line\nbreak", "one\x01", "tab\there", "100%25+ +"]

    async def main() -> None:
        bucket = Bucket(ministack)
        for key in odd:
            bucket.put(key)
        async with landing(ministack, bucket.name) as here:
            await here.has(*odd)

    asyncio.run(main())


def test_selection_by_prefix_suffix_and_globs(aws: Aws):
    """Prefix, suffix and globs select; globs are over the key without the prefix; folders that
    consoles draw never count.
    """
    there = [
        "in/a.csv",
        "in/b.txt",
        "in/sub/c.csv",
        "in/sub/d.parquet",
        "out/e.csv",
        "in/folder/",
        "in.csv",
    ]

    async def found(*expected: str, **options: Any) -> None:
        async with landing(aws, bucket.name, **options) as here:
            await here.has(*expected)
            await eventually(
                lambda: here.logged("bucket.initial_scan_completed"), "a whole scan is over"
            )
            assert sorted(here.keys) == sorted(expected)

    async def main() -> None:
        for key in there:
            bucket.put(key)
        await found("in/a.csv", "in/sub/c.csv", prefix="in/", suffix=".csv")
        await found("in/a.csv", prefix="in/", pattern="/*.csv")
        await found("in/sub/c.csv", "in/sub/d.parquet", pattern=["in/*/*.csv", "in/**/*.parquet"])
        await found("in/a.csv", "in.csv", "in/sub/c.csv", "out/e.csv", pattern="*.csv")

    bucket = Bucket(aws)
    asyncio.run(main())


def test_s21_pages_are_walked_and_a_second_scan_finds_nothing(aws: Aws):
    """A prefix of 250 keys in pages of 100 is three pages a scan; every key is one event, and later
    scans bring none.
    """
    keys = [f"in/{n:04d}" for n in range(250)]

    async def main() -> None:
        bucket = Bucket(aws)
        for key in keys:
            bucket.put(key)
        with proxied(aws.url) as proxy:
            async with landing(
                aws, bucket.name, endpoint_url=proxy.url, page=100, poll=600
            ) as here:
                await eventually(
                    lambda: here.logged("bucket.initial_scan_completed"), "a whole scan is over"
                )
                assert pages(proxy) == 3
                assert here.keys == keys
            async with landing(
                aws, bucket.name, here.ledger, page=100, endpoint_url=proxy.url, poll=600
            ) as again:
                await eventually(
                    lambda: again.logged("bucket.initial_scan_completed"), "a whole scan is over"
                )
                assert pages(proxy) == 6
        assert len(here.ledger.offered) == 250

    asyncio.run(main())


def page_of(bucket: str, *keys: str, token: str | None = None, truncated: bool = True) -> str:
    """A page of a listing as a store writes it."""
    contents = "".join(
        f"<Contents><Key>{key}</Key><Size>4</Size><ETag>e</ETag>"
        "<LastModified>2026-11-22T10:00:00.000Z</LastModified></Contents>"
        for key in keys
    )
    end = f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    return (
        f"<ListBucketResult><Name>{bucket}</Name><KeyCount>{len(keys)}</KeyCount>{contents}"
        f"<IsTruncated>{str(truncated).lower()}</IsTruncated>{end}</ListBucketResult>"
    )


def first_page(method: str, path: str, headers: Mapping[str, str]) -> bool:
    return (
        listing(method, path, headers)
        and "continuation-token=" not in path
        and "start-after=" not in path
    )


def next_page(method: str, path: str, headers: Mapping[str, str]) -> bool:
    """Pages that are asked for by a token."""
    return listing(method, path, headers) and "continuation-token=" in path


KEYS = [f"in/{n}" for n in range(5)]


def test_an_empty_page_that_is_not_the_last(aws: Aws):
    """A page without keys that says it is not the last ends no scan: the keys behind it are found,
    and those that are known are not told as removed.
    """

    async def main() -> None:
        bucket = Bucket(aws)
        bucket.fill(["in/!", *KEYS])
        asked = {"Bucket": bucket.name, "Prefix": "in/", "MaxKeys": 1}
        token = aws.s3.list_objects_v2(**asked)["NextContinuationToken"]  # behind in/!
        bucket.delete("in/!")
        options: dict[str, Any] = {"prefix": "in/", "page": 2, "deleted": True}
        with proxied(aws.url) as proxy:
            proxy.fail(first_page, (200, page_of(bucket.name, token=token)))
            async with landing(aws, bucket.name, endpoint_url=proxy.url, **options) as here:
                await here.has(*KEYS)
                bucket.put("in/9")
                await here.has(*KEYS, "in/9")
                await here.scanned()
                await here.scanned()
            assert {event.type for event in here.events} == {"io.eventflow.s3.object.created"}
            assert not here.logged("bucket.scan_unfinished")

    asyncio.run(main())


LAST_WORDS: dict[str, tuple[int, str]] = {
    "the token is refused": (
        400,
        "<Error><Code>InvalidArgument</Code><Message>The continuation token provided is "
        "incorrect</Message></Error>",
    ),
    "the token does not move": (200, page_of("b", token="same")),
    "no keys and no token": (200, page_of("b")),
    "no page at all": (200, "<ListBucketResult/>"),
}
"""How a store answers when it is asked for the second page."""


@pytest.mark.parametrize("words", LAST_WORDS)
@pytest.mark.parametrize("with_queue", [False, True], ids=["alone", "beside a queue"])
def test_a_scan_that_does_not_reach_the_last_page(ministack: Aws, words: str, with_queue: bool):
    """A scan whose next page cannot be had ends unfinished, with a line: known keys behind it are
    not told as removed, and the next scans page by key and find what is new there.
    """

    async def main() -> None:
        bucket = Bucket(ministack)
        bucket.fill(KEYS)
        options: dict[str, Any] = {"prefix": "in/", "page": 2, "deleted": True}
        if with_queue:
            options |= {"queue": Queue(ministack).url, "reconcile": 0.2}
        with proxied(ministack.url) as proxy:
            async with landing(ministack, bucket.name, endpoint_url=proxy.url, **options) as here:
                await here.has(*KEYS)
                await here.scanned()
                proxy.fail(next_page, LAST_WORDS[words])
                await eventually(lambda: here.logged("bucket.scan_unfinished"), "it is told")
                bucket.put("in/9")
                await here.has(*KEYS, "in/9")
                await here.scanned()
                await here.scanned()
                assert {event.type for event in here.events} == {"io.eventflow.s3.object.created"}
                bucket.delete("in/4")
                await eventually(
                    lambda: (
                        [e.data["key"] for e in here.events if e.type.endswith("removed")]
                        == ["in/4"]
                    ),
                    "what is really removed is told",
                )

    asyncio.run(main())


@pytest.mark.parametrize("how", ["new tokens", "keys out of order"])
def test_a_listing_that_cannot_be_trusted_reports_no_removals(ministack: Aws, how: str):
    """A store that gives a new token for the same page for ever, and one that is paged by key and
    lists out of order, end the scan with a line; nothing is told as removed.
    """

    async def main() -> None:
        bucket = Bucket(ministack)
        bucket.fill(KEYS)
        options: dict[str, Any] = {"prefix": "in/", "page": 2, "deleted": True}
        with proxied(ministack.url) as proxy:
            async with landing(ministack, bucket.name, endpoint_url=proxy.url, **options) as here:
                await here.has(*KEYS)
                await here.scanned()
                if how == "new tokens":
                    for token in ("t1", "t2", "t3"):
                        again = page_of(bucket.name, "in/0", "in/1", token=token)
                        proxy.fail(next_page, (200, again), times=1)
                else:
                    unordered = page_of(bucket.name, "in/4", "in/0")
                    proxy.fail(first_page, (200, unordered), times=1)
                await eventually(lambda: here.logged("bucket.scan_unfinished"), "it is told")
                await here.scanned()
                await here.scanned()
                assert {event.type for event in here.events} == {"io.eventflow.s3.object.created"}
            (line, *_) = here.logged("bucket.scan_unfinished")
            expected = "in their order" if how == "keys out of order" else "does not move on"
            assert expected in line["reason"]

    asyncio.run(main())


def test_a_folder_behind_an_empty_page(ministack: Aws):
    """The objects of a folder's event are those behind an empty page, too."""

    async def main() -> None:
        bucket = Bucket(ministack)
        bucket.fill(["in/!", "in/a", "in/b"])
        asked = {"Bucket": bucket.name, "Prefix": "in/", "MaxKeys": 1}
        token = ministack.s3.list_objects_v2(**asked)["NextContinuationToken"]
        bucket.delete("in/!")
        with proxied(ministack.url) as proxy:
            proxy.fail(first_page, (200, page_of(bucket.name, token=token)))
            async with landing(
                ministack, bucket.name, endpoint_url=proxy.url, prefix="in/", marker="_SUCCESS"
            ) as here:
                bucket.put("in/_SUCCESS")
                await eventually(lambda: here.events, "the folder is an event")
                data = here.events[0].data
                assert [each["key"] for each in data["objects"]] == ["in/a", "in/b"]
                assert data["truncated"] is False

    asyncio.run(main())


def test_late_keys_are_found(aws: Aws):
    """A key that sorts before others, or is put after a later one, is found: nothing is a
    watermark.
    """

    async def main() -> None:
        bucket = Bucket(aws)
        bucket.put("part-0004")
        async with landing(aws, bucket.name) as here:
            await here.has("part-0004")
            bucket.put("part-0003")
            await here.has("part-0004", "part-0003")

    asyncio.run(main())


def test_s23_another_content_is_an_event_and_the_same_only_when_asked(aws: Aws):
    """An overwrite with other content is an event, also back to an earlier one; the same again only
    with touch="fire".
    """

    async def main() -> None:
        bucket = Bucket(aws)
        bucket.put("a", "A")
        async with (
            landing(aws, bucket.name) as here,
            landing(aws, bucket.name, touch="fire") as eager,
        ):
            for n, body in enumerate(("A", "B", "A"), 1):
                bucket.put("a", body)
                await eventually(
                    lambda n=n: len(here.keys) == n and len(eager.keys) >= n, f"{n} events"
                )
                await eventually(lambda: bucket.is_past("a"), "another second has begun")
            seen = len(eager.keys)
            bucket.put("a", "A")
            await eventually(lambda: len(eager.keys) > seen, "the eager one takes it for new")
            await here.scanned()
            assert here.keys.count("a") == 3 and len({event.id for event in here.events}) == len(
                here.events
            )

    asyncio.run(main())


def test_existing_objects_can_be_skipped(aws: Aws):
    """existing="skip": what is there at the very first start starts nothing, its later versions and
    what lands then do.
    """

    async def main() -> None:
        bucket = Bucket(aws)
        bucket.put("old", "1")
        await eventually(lambda: bucket.is_past("old"), "another second has begun")
        async with landing(aws, bucket.name, existing="skip") as here:
            await eventually(
                lambda: here.logged("bucket.initial_scan_completed"), "the first scan is over"
            )
            assert here.keys == []
            bucket.put("new")
            bucket.put("old", "2")
            await here.has("new", "old")
        bucket.put("later")
        async with landing(aws, bucket.name, here.ledger, existing="skip") as again:
            await again.has("new", "old", "later")

    asyncio.run(main())


def test_removals_need_two_scans(aws: Aws):
    """deleted=True: a key that two scans did not show is a removal, once; put again, it is created
    again.
    """

    async def main() -> None:
        bucket = Bucket(aws)
        bucket.put("a")
        async with landing(aws, bucket.name, deleted=True) as here:
            await here.has("a")
            await eventually(lambda: bucket.is_past("a"), "another second has begun")
            bucket.delete("a")
            await here.has("a", "a")
            assert here.events[-1].type == "io.eventflow.s3.object.removed"
            bucket.put("a")
            await here.has("a", "a", "a")
            assert "o:a" in here.ledger.cursors

    asyncio.run(main())


def test_settle_waits_until_an_object_stays_the_same(ministack: Aws):
    """With settle, an object that changes from look to look is no event until it stays the same."""

    async def main() -> None:
        bucket = Bucket(ministack)
        async with landing(ministack, bucket.name, settle=1.0) as here:
            for n in range(8):
                bucket.put("growing", "x" * n)
                await here.scanned()
                assert here.keys == []
            await here.has("growing")
            assert here.events[0].data["size"] == 7

    asyncio.run(main())


# ------------------------------------------------------------------ markers


def test_a_marker_per_object(aws: Aws):
    """marker="{name}.done": an object is an event once its marker is there, whichever came first;
    markers are none.
    """

    async def main() -> None:
        bucket = Bucket(aws)
        bucket.put("in/a.csv")
        bucket.put("in/b.csv.done")
        async with landing(aws, bucket.name, marker="{name}.done") as here:
            bucket.put("in/b.csv")
            await here.has("in/b.csv")
            bucket.put("in/a.csv.done")
            await here.has("in/b.csv", "in/a.csv")

    asyncio.run(main())


@pytest.mark.parametrize("way", ["scan", "queue"])
def test_s27_a_folder_is_complete_when_its_marker_lands(aws: Aws, way: str):
    """marker="_SUCCESS": the folder is one event with the objects that are there; a marker written
    again is a new one.
    """

    async def main() -> None:
        bucket = Bucket(aws)
        options: dict[str, Any] = {"queue": bucket.queue().url} if way == "queue" else {}
        async with landing(
            aws, bucket.name, marker="_SUCCESS", pattern="*.parquet", **options
        ) as here:
            for name in ("part-0.parquet", "part-1.parquet", "notes.txt", "_SUCCESS"):
                bucket.put(f"t/day=1/{name}", "" if name == "_SUCCESS" else "data")
            await here.has("t/day=1/_SUCCESS")
            (event,) = here.events
            assert event.type == "io.eventflow.s3.folder.completed" and event.subject == "t/day=1/"
            assert event.data["folder"] == "t/day=1/" and event.data["truncated"] is False
            assert [each["key"] for each in event.data["objects"]] == [
                "t/day=1/part-0.parquet",
                "t/day=1/part-1.parquet",
            ]
            bucket.put("t/day=1/part-2.parquet")
            await eventually(lambda: bucket.is_past("t/day=1/_SUCCESS"), "another second has begun")
            bucket.put("t/day=1/_SUCCESS", "")
            await here.has("t/day=1/_SUCCESS", "t/day=1/_SUCCESS")
            assert len(here.events[-1].data["objects"]) == 3

    asyncio.run(main())


# ------------------------------------------------------------------ beside a queue


def test_a_scan_finds_what_no_notification_reported(aws: Aws):
    """reconcile: an object whose notification was lost is found, and a notified one is not found
    again.
    """

    async def main() -> None:
        bucket = Bucket(aws)
        bucket.put("silent")  # before there is a queue
        queue = bucket.queue()
        async with landing(aws, bucket.name, queue=queue.url, reconcile=0.3) as here:
            await here.has("silent")
            bucket.put("notified")
            await here.has("silent", "notified")
            await here.emptied(queue)
            queue.aws.s3.put_bucket_notification_configuration(
                Bucket=bucket.name, NotificationConfiguration={}
            )
            bucket.put("silent-2")
            await here.has("silent", "notified", "silent-2")

    asyncio.run(main())


def test_versions_that_a_scan_found_first_run_once(ministack: Aws):
    """Scans find A, B and A again before any notification comes; then all notifications come,
    twice: each version is one event.
    """

    async def main() -> None:
        bucket, ledger = Bucket(ministack), ContractLedger()
        queue = bucket.queue()
        with proxied(ministack.url) as proxy:
            proxy.fail(action("ReceiveMessage"), SLOW_DOWN)
            options: dict[str, Any] = {
                "queue": queue.url,
                "reconcile": 0.2,
                "endpoint_url": proxy.url,
                "pollers": 1,
            }
            async with landing(ministack, bucket.name, ledger, **options) as here:
                for n, body in enumerate(("A", "B", "A"), 1):
                    bucket.put("a", body)
                    await eventually(lambda n=n: len(here.keys) == n, f"{n} versions are found")
                bodies = [
                    message["Body"]
                    for message in queue.aws.sqs.receive_message(
                        QueueUrl=queue.url, MaxNumberOfMessages=10, VisibilityTimeout=0
                    )["Messages"]
                ]
                for body in bodies:
                    queue.send(body)
                proxy.mend()
                await here.emptied(queue)
                await here.scanned()
                await here.emptied(queue)
                assert here.keys.count("a") == 3
                bucket.put("a", "C")
                await eventually(lambda: here.keys.count("a") == 4, "what comes later is an event")
                assert sum(item.data["key"] == "a" for item in ledger.offered) >= 3 + 6  # type: ignore[union-attr]

    asyncio.run(main())


def test_a_removal_that_a_scan_found_first_is_one_event(ministack: Aws):
    """Scans find a key removed before its notification comes: when it comes, twice, the removal is
    still one event.
    """

    async def main() -> None:
        bucket = Bucket(ministack)
        queue = bucket.queue(events=("s3:ObjectCreated:*", "s3:ObjectRemoved:*"))
        with proxied(ministack.url) as proxy:
            options: dict[str, Any] = {
                "queue": queue.url,
                "reconcile": 0.2,
                "endpoint_url": proxy.url,
                "deleted": True,
                "pollers": 1,
            }
            async with landing(ministack, bucket.name, **options) as here:
                bucket.put("a")
                await here.has("a")
                await here.emptied(queue)
                proxy.fail(action("ReceiveMessage"), SLOW_DOWN)
                await eventually(
                    lambda: here.logged("bucket.unreachable"), "the queue does not answer"
                )
                bucket.delete("a")
                await here.has("a", "a")
                for message in queue.aws.sqs.receive_message(
                    QueueUrl=queue.url, VisibilityTimeout=0
                )["Messages"]:
                    queue.send(message["Body"])
                proxy.mend()
                await here.emptied(queue)
                await here.scanned()
                assert [event.type.rpartition(".")[2] for event in here.events] == [
                    "created",
                    "removed",
                ]
                bucket.put("a")
                await here.has("a", "a", "a")

    asyncio.run(main())


def test_a_late_notification_of_an_older_version_does_not_repeat_the_newer(ministack: Aws):
    """The notification of an overwritten version comes after a scan took the newer one: one more
    event, and no other.
    """

    async def main() -> None:
        bucket = Bucket(ministack)
        queue = bucket.queue()
        with proxied(ministack.url) as proxy:
            proxy.fail(action("ReceiveMessage"), SLOW_DOWN)
            bucket.put("a", "old")
            bucket.put("a", "new")
            options: dict[str, Any] = {
                "queue": queue.url,
                "reconcile": 0.2,
                "endpoint_url": proxy.url,
                "pollers": 1,
            }
            async with landing(ministack, bucket.name, **options) as here:
                await here.has("a")
                proxy.mend()
                await here.has("a", "a")
                await here.emptied(queue)
                await here.scanned()
                assert here.keys.count("a") == 2

    asyncio.run(main())


def test_a_page_that_a_notification_overtook_starts_nothing(ministack: Aws):
    """A page is on its way while its object is overwritten and the notification of that recorded:
    the page changes nothing.
    """

    async def main() -> None:
        bucket = Bucket(ministack)
        queue = bucket.queue()
        with proxied(ministack.url) as proxy:
            proxy.fail(
                listing, SLOW_DOWN
            )  # so that the queue reports the first version, not a scan
            options: dict[str, Any] = {
                "queue": queue.url,
                "reconcile": 0.2,
                "endpoint_url": proxy.url,
            }
            async with landing(ministack, bucket.name, **options) as here:
                bucket.put("a", "A")
                await here.emptied(queue)
                proxy.mend()
                rule = proxy.fail(listing, after=3.0, times=1)
                await eventually(lambda: rule.answered, "a page is on its way")
                bucket.put("a", "B")
                await here.emptied(queue)
                await here.scanned()
                assert here.keys.count("a") == 2

    asyncio.run(main())


# ------------------------------------------------------------------ faults


@pytest.mark.parametrize("fault", [SLOW_DOWN, HANG_UP], ids=["503", "hang up"])
def test_fault_23_a_listing_resumes_where_it_failed(ministack: Aws, fault: tuple[int, str]):
    """A page that fails in the middle of a scan is requested again from the same position: no page
    is repeated or skipped.
    """
    keys = [f"{n:04d}" for n in range(50)]

    async def main() -> None:
        bucket = Bucket(ministack)
        for key in keys:
            bucket.put(key)
        with proxied(ministack.url) as proxy:
            rule = proxy.fail(
                lambda *asked: listing(*asked) and "continuation-token" in asked[1], fault, times=6
            )
            async with landing(
                ministack, bucket.name, endpoint_url=proxy.url, page=10, poll=600
            ) as here:
                await eventually(
                    lambda: here.logged("bucket.initial_scan_completed"), "the scan is over"
                )
                assert here.keys == keys and rule.hits == 6
                assert pages(proxy) == 5 + 6 and here.logged("bucket.unreachable")

    asyncio.run(main())


def test_s30_errors_of_refused_and_missing_buckets_have_the_remedy(aws: Aws):
    """A missing bucket, and refused access, end the listener with the reason and what to grant."""

    async def main() -> None:
        with pytest.raises(SourceError, match=r"NoSuchBucket.*create the bucket"):
            await Landing(aws, "no-such-bucket-here").trigger.listen(ContractLedger())
        bucket = Bucket(aws)
        with proxied(aws.url) as proxy:
            proxy.fail(listing, DENIED)
            with pytest.raises(SourceError, match=r"AccessDenied.*grant s3:ListBucket"):
                await Landing(aws, bucket.name, endpoint_url=proxy.url).trigger.listen(
                    ContractLedger()
                )

    asyncio.run(main())


def test_a_refused_listing_does_not_stop_the_queue(ministack: Aws):
    """Without permission to list, reconcile reports it and tries again; the queue works."""

    async def main() -> None:
        bucket = Bucket(ministack)
        queue = bucket.queue()
        with proxied(ministack.url) as proxy:
            proxy.fail(listing, DENIED)
            options: dict[str, Any] = {
                "queue": queue.url,
                "reconcile": 0.2,
                "endpoint_url": proxy.url,
            }
            async with landing(ministack, bucket.name, **options) as here:
                await eventually(lambda: here.logged("bucket.unreachable"), "it is logged")
                bucket.put("a")
                await here.has("a")
                assert "AccessDenied" in (here.trigger.condition or "")

    asyncio.run(main())


def test_s24_a_listener_that_ends_before_the_cursor_moved_repeats_nothing(ministack: Aws):
    """Ended between listing and record, the next scan offers the same identities; each object is
    recorded once.
    """

    async def main() -> None:
        bucket, ledger = Bucket(ministack), ContractLedger()
        for n in range(5):
            bucket.put(f"k{n}")
        ledger.block()
        async with landing(ministack, bucket.name, ledger):
            await eventually(lambda: ledger.offered, "they are offered")
        ledger.unblock()
        async with landing(ministack, bucket.name, ledger) as here:
            await here.has(*(f"k{n}" for n in range(5)))
        assert len({(item.source, item.id) for item in ledger.offered}) == 5

    asyncio.run(main())


def test_a_session_of_ones_own(ministack: Aws):
    """aioboto3's session, and aiobotocore's, are used as they are given."""
    aioboto3 = pytest.importorskip("aioboto3")
    from aiobotocore.session import AioSession

    async def main() -> None:
        bucket = Bucket(ministack)
        bucket.put("a")
        for session in (aioboto3.Session(), AioSession()):
            async with landing(ministack, bucket.name, session=session) as here:
                await here.has("a")

    asyncio.run(main())


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bucket": "b", "reconcile": 5},
        {"bucket": "b/in"},
        {"bucket": "b", "poll": 0},
        {"bucket": "b", "page": 1001},
        {"queue": "q", "reconcile": 5},
        {"queue": "q", "wait": 21},
        {"queue": "q", "visibility": 0},
        {"bucket": "b", "queue": "q", "marker": "{name}.done"},
        {"queue": "q", "pollers": 0},
        {"bucket": "b", "settle": -1},
    ],
)
def test_mistakes_are_found_when_it_is_made(options: dict[str, Any]):
    """Options that cannot work are refused at once, with what was expected."""
    with pytest.raises(UsageError, match="S3"):
        S3(**options)


def test_the_listener_can_be_opened_again(ministack: Aws):
    """One trigger, opened twice one after the other, takes up where it stood."""

    async def main() -> None:
        bucket = Bucket(ministack)
        bucket.put("a")
        here = Landing(ministack, bucket.name)
        async with listening(here.trigger, here.ledger):
            await here.has("a")
        bucket.put("b")
        async with listening(here.trigger, here.ledger):
            await here.has("a", "b")
        assert len(here.ledger.offered) == 2

    asyncio.run(main())


def test_a_removed_key_is_known_while_its_notification_is_pending():
    """Also when the object came by a notification, so that none is pending for the key."""
    seen = KnownObjects("b", {"o:a": ["etag", 1, None, "01", []]}, touch=False)
    mark = seen.mark_removed("a", "removed-1", now=1_000, expect_notification=True)
    assert not seen.can_forget("a", mark, 1_000)
    assert seen.can_forget("a", mark, 1_000 + PENDING_EXPIRY_US)
    assert seen.can_forget(
        "a", seen.mark_removed("a", "removed-1", now=1_000, expect_notification=False), 1_000
    )
