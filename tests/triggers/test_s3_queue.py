"""Notifications from SQS, as real servers send and keep them: every wrapping, duplicates, order,
failures, slow recording.
"""

import asyncio
import json
import time
from typing import Any

import pytest

from eventflow.core.errors import SourceError, StoreFailed, StoreFull
from eventflow.testing.trigger_contract import ContractLedger, listening, restarting
from tests.aws import Aws, Bucket, Queue, ministack, moto
from tests.conftest import eventually, stays
from tests.faults import EXPIRED, HANG_UP, SLOW_DOWN, THROTTLED, action, proxied
from tests.triggers.buckets import Landing, landing

__all__ = ["ministack", "moto"]

ODD = "in/a b+c é 漢 %2B=&#?;'\"😀\u202e.csv"
"""A key with what encodings get wrong: spaces, plus, percent, quotes, four bytes of UTF-8, a
right-to-left override.
"""


@pytest.fixture(params=["ministack", "moto"])
def aws(request: pytest.FixtureRequest) -> Aws:
    """Each of the servers."""
    return request.getfixturevalue(request.param)


def envelope(*records: dict[str, Any]) -> dict[str, Any]:
    return {"Records": list(records)}


# ------------------------------------------------------------------ wrappings


@pytest.mark.parametrize("through", ["", "sns", "eventbridge"])
def test_s9_every_wrapping_is_one_shape(aws: Aws, through: str):
    """Directly, through SNS and through EventBridge (either spelling of the ETag): the same six
    fields, the key decoded.
    """

    async def main() -> None:
        bucket = Bucket(aws)
        queue = bucket.queue(through=through)
        async with landing(aws, bucket.name, queue=queue.url) as here:
            bucket.put(ODD, b"hello")
            await here.has(ODD)
            (event,) = here.events
            assert (
                event.type == "io.eventflow.s3.object.created"
                and event.source == f"s3://{bucket.name}"
            )
            assert event.subject == ODD and event.time is not None
            assert list(event.data) == ["bucket", "key", "size", "etag", "version", "sequencer"]
            assert event.data["bucket"] == bucket.name and event.data["size"] == 5
            assert (
                event.data["etag"] == "5d41402abc4b2a76b9719d911017c592"
                and event.data["version"] is None
            )
            await here.emptied(queue)

    asyncio.run(main())


@pytest.mark.parametrize("through", ["", "sns"])
def test_s3_the_test_event_is_deleted_and_shown(aws: Aws, through: str):
    """S3's test message, straight and inside SNS, is no event; it is deleted and logged."""

    async def main() -> None:
        bucket = Bucket(aws)
        queue = bucket.queue(through=through)
        assert queue.remaining == 1
        async with landing(aws, bucket.name, queue=queue.url) as here:
            await here.emptied(queue)
            assert here.trigger.last_test_event == bucket.name
            assert here.logged("bucket.test_notification_received") and not here.ledger.recorded

    asyncio.run(main())


def test_several_records_in_one_message(ministack: Aws):
    """A message with several records is as many events, and is deleted once all are recorded."""

    async def main() -> None:
        bucket, queue = Bucket(ministack), Queue(ministack)
        records = [bucket.record("ObjectCreated:Put", f"k{n}", sequencer=f"0{n}") for n in range(3)]
        queue.send(envelope(*records))
        async with landing(ministack, bucket.name, queue=queue.name) as here:
            await here.has("k0", "k1", "k2")
            await here.emptied(queue)

    asyncio.run(main())


def test_what_is_no_notification_is_a_dead_letter(ministack: Aws):
    """Bytes that are no notification are kept as dead letters with the reason, and deleted; later
    messages are not delayed.
    """
    bodies = [
        "not json",
        '"text"',
        "[1]",
        "{}",
        '{"Records": [{"eventName": 3}]}',
        '{"Records": [null]}',
        '{"TopicArn": "a", "Message": "x"}',
        '{"source": "aws.ec2", "detail": {}}',
        json.dumps({"x": "\ud800"}),
    ]

    async def main() -> None:
        bucket, queue = Bucket(ministack), Queue(ministack)
        for body in bodies:
            queue.send(body)
        queue.send(envelope(bucket.record("ObjectCreated:Put", "good")))
        async with landing(ministack, bucket.name, queue=queue.url) as here:
            await here.has("good")
            await here.emptied(queue)
            assert sorted(item.body.decode() for item in here.dead_letters) == sorted(bodies)
            assert all("expected" in item.error for item in here.dead_letters)

    asyncio.run(main())


def without(record: dict[str, Any], *path: str) -> dict[str, Any]:
    """The record without one of its fields."""
    name, *rest = path
    if rest:
        return {**record, name: without(record[name], *rest)}
    return {key: value for key, value in record.items() if key != name}


def with_value(record: dict[str, Any], value: Any, *path: str) -> dict[str, Any]:
    name, *rest = path
    return {**record, name: with_value(record[name], value, *rest) if rest else value}


MALFORMED: dict[str, Any] = {
    "null": lambda record: None,
    "text": lambda record: "a record",
    "list": lambda record: [record],
    "empty": lambda record: {},
    "no event name": lambda record: without(record, "eventName"),
    "no bucket": lambda record: without(record, "s3", "bucket"),
    "no key": lambda record: without(record, "s3", "object", "key"),
    "empty key": lambda record: with_value(record, "", "s3", "object", "key"),
    "key that is a number": lambda record: with_value(record, 7, "s3", "object", "key"),
    "bucket that is a number": lambda record: with_value(record, 7, "s3", "bucket", "name"),
    "lone surrogate in the key": lambda record: with_value(
        record, "a\ud800", "s3", "object", "key"
    ),
    "lone surrogate in the etag": lambda record: with_value(
        record, "a\ud800", "s3", "object", "eTag"
    ),
    "lone surrogate and no key": lambda record: {"x": "a\ud800"},
    "300 levels": lambda record: json.loads("[" * 300 + "]" * 300),
    "object that is a list": lambda record: with_value(record, ["k"], "s3", "object"),
}


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("through_sns", [False, True], ids=["straight", "sns"])
def test_a_malformed_record_robs_no_other(ministack: Aws, kind: str, through_sns: bool):
    """Of the records in one message each is recorded by itself: those that are whole as events, the
    malformed one as a dead letter of its own bytes; then the message is deleted.
    """

    async def main() -> None:
        bucket, queue = Bucket(ministack), Queue(ministack)
        first, bad, last = (
            bucket.record("ObjectCreated:Put", f"k{n}", sequencer=f"0{n}") for n in range(3)
        )
        message: Any = envelope(first, MALFORMED[kind](bad), last)
        if through_sns:
            message = {"TopicArn": "topic", "Message": json.dumps(message)}
        queue.send(message)
        queue.send(envelope(bucket.record("ObjectCreated:Put", "other message")))
        async with landing(ministack, bucket.name, queue=queue.url) as here:
            await here.has("k0", "k2", "other message")
            await here.emptied(queue)
            (dead_letter,) = here.dead_letters
            assert json.loads(dead_letter.body) == MALFORMED[kind](bad)
            assert dead_letter.id.endswith("/1") and "expected" in dead_letter.error

    asyncio.run(main())


@pytest.mark.parametrize("fifo", [False, True], ids=["standard", "fifo"])
def test_a_folder_that_cannot_be_listed_delays_no_other(ministack: Aws, fifo: bool):
    """A marker in a bucket that cannot be listed leaves its message in the queue, with a line; the
    other buckets' folders are events, and their messages are deleted.
    """

    async def main() -> None:
        bucket, queue = Bucket(ministack), Queue(ministack, fifo=fifo)
        bucket.put("day/part-0")
        bucket.put("day/_SUCCESS")
        denied = bucket.record("ObjectCreated:Put", "day/_SUCCESS")
        denied["s3"]["bucket"]["name"] = "no-such-bucket"
        fine = bucket.record("ObjectCreated:Put", "day/_SUCCESS")
        for number, record in enumerate((denied, fine)):
            group = {"MessageGroupId": str(number), "MessageDeduplicationId": str(number)}
            queue.send(envelope(record), **(group if fifo else {}))
        async with landing(ministack, None, queue=queue.url, marker="_SUCCESS") as here:
            await eventually(lambda: len(here.events) == 1, "the other folder is an event")
            await eventually(lambda: queue.remaining == 1, "its message is deleted")
            assert here.events[0].data["bucket"] == bucket.name
            await eventually(
                lambda: len(here.logged("message.postponed")) > 1, "the message is tried again"
            )
            assert "no-such-bucket" in here.logged("message.postponed")[0]["error"]

    asyncio.run(main())


def test_other_keys_are_counted_not_lost_silently(ministack: Aws):
    """Notifications of other buckets, prefixes and folders are deleted, start nothing, and are
    counted.
    """

    async def main() -> None:
        bucket, other, queue = Bucket(ministack), Bucket(ministack), Queue(ministack)
        for record in (
            bucket.record("ObjectCreated:Put", "out/a.csv"),
            bucket.record("ObjectCreated:Put", "in/a.txt"),
            bucket.record("ObjectCreated:Put", "in/folder.csv/"),
            other.record("ObjectCreated:Put", "in/a.csv"),
            bucket.record("ObjectRestore:Completed", "in/a.csv"),
            bucket.record("ObjectRemoved:Delete", "in/a.csv"),
        ):
            queue.send(envelope(record))
        queue.send(envelope(bucket.record("ObjectCreated:Put", "in/a.csv")))
        async with landing(
            ministack, bucket.name, queue=queue.url, prefix="in/", suffix=".csv"
        ) as here:
            await here.emptied(queue)
            assert here.keys == ["in/a.csv"]
            assert {gauge.name: gauge.value for gauge in here.trigger.gauges()}[
                "filtered_notifications"
            ] == 6

    asyncio.run(main())


def test_a_queue_by_its_arn_for_any_bucket(ministack: Aws):
    """A queue is found by URL, name or ARN, and without a bucket it serves every bucket in its
    notifications.
    """

    async def main() -> None:
        one, two, queue = Bucket(ministack), Bucket(ministack), Queue(ministack)
        queue.send(
            envelope(one.record("ObjectCreated:Put", "a"), two.record("ObjectCreated:Put", "b"))
        )
        async with landing(ministack, None, queue=queue.arn) as here:
            await here.has("a", "b")
            assert [event.source for event in here.events] == [
                f"s3://{one.name}",
                f"s3://{two.name}",
            ]

    asyncio.run(main())


# ------------------------------------------------------------------ versions, duplicates, order


def test_s5_one_notification_in_two_messages_is_one_event(ministack: Aws):
    """The same notification in two messages is recorded once; both are deleted."""

    async def main() -> None:
        bucket, queue = Bucket(ministack), Queue(ministack)
        record = bucket.record("ObjectCreated:Put", "a", sequencer="0055AED6DCD90281E5")
        for wrapped in (
            envelope(record),
            {"TopicArn": "t", "Message": json.dumps(envelope(record))},
        ):
            queue.send(wrapped)
        async with landing(ministack, bucket.name, queue=queue.url) as here:
            await here.emptied(queue)
            assert here.keys == ["a"] and len(here.ledger.offered) == 2

    asyncio.run(main())


def test_s8_versions_with_equal_content_are_two_events(ministack: Aws):
    """In a versioned bucket, two uploads with equal content are two events; their versions
    differ.
    """

    async def main() -> None:
        bucket = Bucket(ministack, versioned=True)
        queue = bucket.queue()
        async with landing(ministack, bucket.name, queue=queue.url) as here:
            bucket.put("a")
            bucket.put("a")
            await here.has("a", "a")
            assert len({event.data["version"] for event in here.events}) == 2
            assert len({event.data["etag"] for event in here.events}) == 1

    asyncio.run(main())


def test_overwrites_are_events(ministack: Aws):
    """Each overwrite is an event, also back to an earlier content; a multi-part upload is one."""

    async def main() -> None:
        bucket = Bucket(ministack)
        queue = bucket.queue()
        async with landing(ministack, bucket.name, queue=queue.url) as here:
            for body in ("A", "B", "A"):
                bucket.put("a", body)
            bucket.put_in_parts("big", [b"x" * 5_242_880, b"tail"])
            await here.has("a", "a", "a", "big")
            assert here.events[-1].extensions["s3reason"] == "CompleteMultipartUpload"
            assert here.events[-1].data["size"] == 5_242_884

    asyncio.run(main())


def test_s6_a_removal_that_overtakes_is_another_event(ministack: Aws):
    """A notification that comes after a later one of its key is an event too, marked; sequencers of
    other lengths are padded.
    """

    async def main() -> None:
        bucket, queue = Bucket(ministack), Queue(ministack)
        queue.send(
            envelope(bucket.record("ObjectRemoved:Delete", "a", sequencer="0055AED6DCD90281E6"))
        )
        async with landing(ministack, bucket.name, queue=queue.url, deleted=True) as here:
            await here.has("a")
            queue.send(
                envelope(bucket.record("ObjectCreated:Put", "a", sequencer="0055AED6DCD90281E5FF"))
            )
            await here.has("a", "a")
            queue.send(
                envelope(bucket.record("ObjectCreated:Put", "a", sequencer="0055AED6DCD90281E601"))
            )
            await here.has("a", "a", "a")
            assert [event.type.rpartition(".")[2] for event in here.events] == [
                "removed",
                "created",
                "created",
            ]
            assert [event.extensions.get("superseded", False) for event in here.events] == [
                False,
                True,
                False,
            ]

    asyncio.run(main())


def test_an_object_deleted_before_it_is_processed_is_an_event(ministack: Aws):
    """An object that is gone when its notification comes is an event all the same: the flow decides
    what to do.
    """

    async def main() -> None:
        bucket = Bucket(ministack)
        queue = bucket.queue(events=("s3:ObjectCreated:*", "s3:ObjectRemoved:*"))
        bucket.put("a")
        bucket.delete("a")
        async with landing(ministack, bucket.name, queue=queue.url, deleted=True) as here:
            await here.has("a", "a")
            assert {event.type.rpartition(".")[2] for event in here.events} == {
                "created",
                "removed",
            }

    asyncio.run(main())


def test_fifo_queues_keep_their_order(aws: Aws):
    """The notifications of a group arrive in the order they were sent, although two loops
    receive.
    """

    async def main() -> None:
        bucket, queue = Bucket(aws), Queue(aws, fifo=True)
        for n in range(25):
            record = bucket.record("ObjectCreated:Put", f"k{n}", sequencer=f"{n:04d}")
            queue.send(envelope(record), MessageGroupId="g", MessageDeduplicationId=str(n))
        async with landing(aws, bucket.name, queue=queue.url) as here:
            await here.has(*(f"k{n}" for n in range(25)))
            assert here.keys == [f"k{n}" for n in range(25)]
            await here.emptied(queue)

    asyncio.run(main())


# ------------------------------------------------------------------ slow, failing, stopping


def test_a_slow_record_keeps_the_message(ministack: Aws):
    """While recording takes longer than the visibility, the message is kept: it is received once,
    and then deleted.
    """

    async def main() -> None:
        bucket, queue, ledger = Bucket(ministack), Queue(ministack), ContractLedger()
        queue.send(envelope(bucket.record("ObjectCreated:Put", "a")))
        ledger.block()
        async with landing(ministack, bucket.name, ledger, queue=queue.url, visibility=1.0) as here:
            await eventually(lambda: ledger.offered, "it is offered")
            await stays(lambda: queue.visible == 0, "the message is kept", during=3.5)
            ledger.unblock()
            await here.emptied(queue)
            assert len(ledger.offered) == 1

    asyncio.run(main())


def test_s14_an_extension_that_is_refused_loses_nothing(ministack: Aws):
    """When a message cannot be kept any longer, that is a warning; its event is recorded all the
    same.
    """

    async def main() -> None:
        bucket, queue, ledger = Bucket(ministack), Queue(ministack), ContractLedger()
        queue.send(envelope(bucket.record("ObjectCreated:Put", "a")))
        ledger.block()
        with proxied(ministack.url) as proxy:
            proxy.fail(action("ChangeMessageVisibilityBatch"), EXPIRED)
            async with landing(
                ministack,
                bucket.name,
                ledger,
                queue=queue.url,
                visibility=1.0,
                endpoint_url=proxy.url,
            ) as here:
                await eventually(
                    lambda: here.logged("message.visibility_extension_failed"), "it is logged"
                )
                ledger.unblock()
                await here.has("a")
                await here.emptied(queue)

    asyncio.run(main())


def test_s15_a_store_that_fails_leaves_messages_to_the_redrive_policy(ministack: Aws):
    """With maxReceiveCount 2 and a store that is down, the message is in the queue's own
    dead-letter queue, not lost.
    """

    async def main() -> None:
        bucket, dead, ledger = Bucket(ministack), Queue(ministack), ContractLedger()
        policy = json.dumps({"deadLetterTargetArn": dead.arn, "maxReceiveCount": 2})
        queue = Queue(ministack, RedrivePolicy=policy)
        queue.send(envelope(bucket.record("ObjectCreated:Put", "a")))
        ledger.error = StoreFailed("the disk is gone")
        trigger = Landing(ministack, bucket.name, ledger, queue=queue.url, visibility=1.0).trigger
        async with restarting(trigger, ledger):
            await eventually(lambda: dead.remaining == 1, "the message is in the dead-letter queue")
        assert ledger.recorded == {}

    asyncio.run(main())


@pytest.mark.parametrize(
    "fault", [THROTTLED, SLOW_DOWN, HANG_UP], ids=["throttled", "503", "hang up"]
)
def test_s17_a_queue_that_throttles_is_asked_again_slowly(ministack: Aws, fault: tuple[int, str]):
    """While receiving fails, the listener backs off, reports it, and resumes when the queue answers
    again.
    """

    async def main() -> None:
        bucket, queue = Bucket(ministack), Queue(ministack)
        queue.send(envelope(bucket.record("ObjectCreated:Put", "a")))
        with proxied(ministack.url) as proxy:
            rule = proxy.fail(action("ReceiveMessage"), fault)
            async with landing(
                ministack, bucket.name, queue=queue.url, endpoint_url=proxy.url, pollers=1
            ) as here:
                await eventually(
                    lambda: len(here.logged("bucket.unreachable")) >= 2, "it was asked again"
                )
                assert here.trigger.condition is not None and queue.url in here.trigger.condition
                assert rule.hits <= 3 * (
                    len(here.logged("bucket.unreachable")) + 1
                )  # the client's own tries, no busy loop
                proxy.mend()
                await here.has("a")
                await here.emptied(queue)
                assert here.trigger.condition is None

    asyncio.run(main())


def test_deleting_is_tried_again(ministack: Aws):
    """A recorded message whose deletion fails at first is deleted in the end, and is one event."""

    async def main() -> None:
        bucket, queue = Bucket(ministack), Queue(ministack)
        queue.send(envelope(bucket.record("ObjectCreated:Put", "a")))
        with proxied(ministack.url) as proxy:
            proxy.fail(action("DeleteMessageBatch"), HANG_UP, times=4)
            async with landing(
                ministack, bucket.name, queue=queue.url, endpoint_url=proxy.url
            ) as here:
                await here.has("a")
                await here.emptied(queue)
                assert len(here.ledger.recorded) == 1

    asyncio.run(main())


def test_a_batch_that_is_deleted_in_part_is_deleted_in_the_end(ministack: Aws):
    """When the queue deletes only some of a batch, the others are deleted by the next try; each is
    one event.
    """
    partly = {
        "Successful": [{"Id": "1"}],
        "Failed": [{"Id": "0", "SenderFault": False, "Code": "InternalError"}],
    }

    async def main() -> None:
        bucket, queue = Bucket(ministack), Queue(ministack)
        queue.send(envelope(bucket.record("ObjectCreated:Put", "a")))
        with proxied(ministack.url) as proxy:
            rule = proxy.fail(action("DeleteMessageBatch"), (200, json.dumps(partly)), times=2)
            options: dict[str, Any] = {
                "queue": queue.url,
                "endpoint_url": proxy.url,
                "visibility": 600.0,
            }
            async with landing(ministack, bucket.name, **options) as here:
                await here.emptied(queue)
                assert rule.hits == 2 and here.keys == ["a"] and len(here.ledger.offered) == 1

    asyncio.run(main())


def test_s18_expired_credentials_end_the_listener_with_the_reason(ministack: Aws):
    """Expired credentials raise a clear error; restarted with valid ones, the same trigger
    works.
    """

    async def main() -> None:
        bucket, queue = Bucket(ministack), Queue(ministack)
        queue.send(envelope(bucket.record("ObjectCreated:Put", "a")))
        with proxied(ministack.url) as proxy:
            proxy.fail(action("ReceiveMessage"), EXPIRED)
            here = Landing(ministack, bucket.name, queue=queue.url, endpoint_url=proxy.url)
            with pytest.raises(SourceError, match=r"ExpiredToken.*renew the credentials"):
                await here.trigger.listen(here.ledger)
            proxy.mend()
            async with listening(here.trigger, here.ledger):
                await here.has("a")

    asyncio.run(main())


@pytest.mark.parametrize("offered", [False, True])
def test_s20_a_stop_during_a_long_poll_is_quick_and_hides_nothing(ministack: Aws, offered: bool):
    """A stop lets the current poll end, and returns its messages: they are visible at once."""

    async def main() -> None:
        bucket, queue = Bucket(ministack), Queue(ministack)
        with proxied(ministack.url) as proxy:
            poll = proxy.fail(action("ReceiveMessage"))  # it goes through, and is counted
            options: dict[str, Any] = {"queue": queue.url, "endpoint_url": proxy.url}
            async with landing(
                ministack, bucket.name, wait=3.0, visibility=600.0, **options
            ) as here:
                await eventually(lambda: poll.hits > poll.answered, "a poll is in progress")
                began = time.monotonic()
                listen = next(
                    task for task in asyncio.all_tasks() if "listen" in repr(task.get_coro())
                )
                listen.cancel()
                await asyncio.sleep(0)
                if offered:
                    await asyncio.to_thread(
                        queue.send, envelope(bucket.record("ObjectCreated:Put", "a"))
                    )
                await asyncio.gather(listen, return_exceptions=True)
                # The poll, what may follow it, and a slow machine.
                assert time.monotonic() - began < 3.0 + 2.0 + 3.0
            if offered:
                await eventually(lambda: queue.visible == 1, "the message is visible")
                assert here.ledger.recorded == {}

    asyncio.run(main())


def test_a_full_ledger_is_waited_out_and_a_stop_gives_the_messages_back(ministack: Aws):
    """While the ledger is full the messages stay in hand; a stop then gives them back at once, and
    nothing was recorded.
    """

    async def main() -> None:
        bucket, queue, ledger = Bucket(ministack), Queue(ministack), ContractLedger()
        queue.send(envelope(bucket.record("ObjectCreated:Put", "a")))
        ledger.error = StoreFull("1,000,000 events are pending", 0.05)
        async with landing(ministack, bucket.name, ledger, queue=queue.url, visibility=600.0):
            await eventually(lambda: ledger.refused_calls >= 2, "it is offered again")
        await eventually(lambda: queue.visible == 1, "the message is visible")
        assert ledger.recorded == {}

    asyncio.run(main())


def test_lag_gauges(ministack: Aws):
    """Gauges show how many messages wait, and the age of the last one."""

    async def main() -> None:
        bucket, queue = Bucket(ministack), Queue(ministack)
        queue.send(envelope(bucket.record("ObjectCreated:Put", "a")))
        async with landing(ministack, bucket.name, queue=queue.url) as here:
            await here.has("a")
            await eventually(
                lambda: "lag_messages" in {each.name for each in here.trigger.gauges()},
                "the lag is known",
            )
            found = {each.name: each.value for each in here.trigger.gauges()}
            assert found["lag_messages"] in (0, 1) and 0 <= found["lag_seconds"] < 60

    asyncio.run(main())
