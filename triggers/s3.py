"""Objects that arrive in a bucket, each version as one event.

    app.on(S3("lake", prefix="in/", queue="arrivals"), handle)

Two sources, alone or together, and one shape of event: an SQS queue of notifications (S3's own,
through SNS or through EventBridge), whose messages are deleted only after their events are durable;
and scans of the listing, whose cursor commits with the events. With `reconcile=` a scan finds what
the notifications missed, and both start one run per version between them. For MinIO's webhook, use
a `Webhook` with `minio_id` and `minio_object`.

This file is the public class. See `_s3/queue.py` and `_s3/listing.py`, the two loops.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Literal

from eventflow.core.clock import Clock, SystemClock
from eventflow.core.declarations import declaration, duration, number, whole_number
from eventflow.core.errors import UsageError
from eventflow.events.event import Event, Gauge, Intake
from triggers._s3.clients import RetryingCaller, S3Endpoint
from triggers._s3.intake import LedgerIntake, S3Options
from triggers._s3.key_filter import KeyFilter
from triggers._s3.known_objects import KnownObjects
from triggers._s3.listing import ListingScan
from triggers._s3.notifications import (
    Notification,
    event_data,
    event_id,
    read_notifications,
    stable_id,
)
from triggers._s3.prefixes import FolderEvents
from triggers._s3.queue import QueueStats, SqsPoller
from triggers.concurrency import run_until_first_ends

LOG_EVENTS = {
    "bucket.opened": (
        "An S3 trigger listens; `queue` names its queue, `known` counts the objects in its cursor."
    ),
}

__all__ = ["S3", "minio_id", "minio_object"]


class S3:
    """A bucket whose objects are events.

    Types are `io.eventflow.s3.object.created` (any new version, overwrites too), with
    `deleted=True` `.removed`, and with a folder marker `io.eventflow.s3.folder.completed`. `data`:
    `bucket`, `key` (decoded), `size`, `etag`, `version`, `sequencer`; None for what its source does
    not report. The subject is the key, the time is the store's. Extensions: `s3reason` (`Put`,
    `CompleteMultipartUpload`, `Listed`…), and `superseded` if a later notification of the key
    arrived before.

    Args:
        bucket: its name; None takes all buckets in the queue's notifications.
        queue: the SQS queue (URL, ARN or name) that the bucket's notifications go to. Without one
            the bucket is polled.
        prefix, suffix, pattern: which keys. Globs are over the key without the prefix, as in
            `Directory`; `[]`-lists mean any.
        poll: seconds between scans of the listing when there is no queue.
        reconcile: seconds between scans in addition to the queue; None for no scans.
        settle: seconds that a listed object must not change. S3's writes are atomic: for stores and
            mounts that append.
        existing: whether objects present at the first scan `"fire"`, or `"skip"` them (their later
            versions fire).
        marker: `"{name}.done"` or `"{stem}.ok"`: an object fires once this key exists (scans only).
            `"_SUCCESS"`: the folder fires when this key arrives, with `folder`, `objects` and
            `truncated` in the data.
        touch: `"skip"`: the same content listed with another time is no event. `"fire"`: it is.
        deleted: whether removals are events too.
        endpoint_url, region: of any S3-compatible store; by default those of the environment.
            `session`: an aiobotocore or aioboto3 session; `client_options`: passed to the clients.
            Credentials come from the usual AWS sources.
        wait: seconds of one long poll. `visibility`: the visibility timeout in seconds, extended
            while recording takes longer. `pollers`: loops on the queue.
        page: keys per request of the listing.
        name: the trigger's name, the key of its cursor; by default made of bucket, prefix and
            queue.
    """

    @declaration
    def __init__(
        self,
        bucket: str | None = None,
        *,
        queue: str | None = None,
        prefix: str = "",
        suffix: str = "",
        pattern: str | Sequence[str] = "**/*",
        poll: float = 30.0,
        reconcile: float | None = None,
        settle: float = 0.0,
        existing: Literal["fire", "skip"] = "fire",
        marker: str | None = None,
        touch: Literal["skip", "fire"] = "skip",
        deleted: bool = False,
        endpoint_url: str | None = None,
        region: str | None = None,
        session: Any = None,
        client_options: Mapping[str, Any] | None = None,
        wait: float = 5.0,
        visibility: float = 30.0,
        pollers: int = 2,
        page: int = 1000,
        name: str | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        _check_source(bucket, queue, reconcile)
        _check_numbers(poll, reconcile, settle, wait, visibility, pollers, page)
        key_filter = KeyFilter(prefix, suffix, pattern, marker)
        if queue is not None and key_filter.marker_per_object:
            raise UsageError(
                f"S3(queue=, marker={marker!r}): "
                'expected a folder marker such as "_SUCCESS", or no queue'
            )
        self.name = name or _default_name(bucket, prefix, queue)
        self._endpoint = S3Endpoint(endpoint_url, region, session, client_options or {})
        self._options = S3Options(
            bucket=bucket,
            queue=queue,
            key_filter=key_filter,
            scan_interval=reconcile if queue is not None else poll,
            settle=settle,
            skip_existing=existing == "skip",
            touch=touch == "fire",
            deleted=deleted,
            wait=wait,
            visibility=visibility,
            pollers=pollers,
            page=page,
            clock=clock or SystemClock(),
        )
        self._rng = rng or random.Random()
        self._queue_stats = QueueStats()
        self._caller: RetryingCaller | None = None
        self._scan: ListingScan | None = None

    def __repr__(self) -> str:
        return f"S3({self._options.bucket!r}, name={self.name!r})"

    async def listen(self, intake: Intake) -> None:
        """Until cancelled. May be restarted at any time: all it knows comes from the cursor."""
        options = self._options
        caller = RetryingCaller(options.clock, self._rng, intake.log)
        self._caller = caller
        ledger = LedgerIntake(intake, caller)
        async with AsyncExitStack() as stack:
            client = await self._endpoint.open_client(stack, "s3")
            folders = FolderEvents(client, options.key_filter, caller)
            known: KnownObjects | None = None
            loops: list[Coroutine[Any, Any, None]] = []
            if options.scan_interval is not None:
                assert options.bucket is not None
                cursor = await intake.cursor()
                known = await asyncio.to_thread(
                    KnownObjects, options.bucket, cursor, touch=options.touch
                )  # a million keys take a second
                self._scan = ListingScan(client, options, ledger, caller, known, folders)
                loops.append(self._scan.run())
            if options.queue is not None:
                sqs = await self._endpoint.open_client(stack, "sqs")
                url = await _queue_url(sqs, options.queue, caller)
                queue = SqsPoller(
                    sqs, url, options, ledger, caller, known, folders, self._queue_stats
                )
                loops += [queue.run() for _ in range(options.pollers)] + [queue.watch_depth()]
            intake.log.info(
                "bucket.opened", bucket=options.bucket, queue=options.queue, known=len(known or ())
            )
            await run_until_first_ends(*loops)

    # ------------------------------------------------------------------------- health

    @property
    def condition(self) -> str | None:
        """The error that is being retried; None while the source works."""
        failing = self._caller.failing if self._caller is not None else {}
        return next(iter(failing.values()), None)

    @property
    def last_test_event(self) -> str | None:
        """The bucket of the last test message from S3 since the start; None without one."""
        return self._queue_stats.last_tested_bucket

    def gauges(self) -> Sequence[Gauge]:
        gauges: list[Gauge] = []
        if self._options.queue is not None:
            gauges += self._queue_stats.gauges()
        if self._scan is not None:
            gauges += self._scan.gauges()
        return gauges


async def _queue_url(sqs: Any, queue: str, caller: RetryingCaller) -> str:
    """The queue's URL, from its URL, ARN or name."""
    if "://" in queue:
        return queue
    parts = queue.split(":")
    request = {"QueueName": parts[-1]} | (
        {"QueueOwnerAWSAccountId": parts[4]} if queue.startswith("arn:") else {}
    )
    answer = await caller.call(
        f"looking up the queue {queue}", lambda: sqs.get_queue_url(**request)
    )
    return (answer or {"QueueUrl": queue})["QueueUrl"]


def _default_name(bucket: str | None, prefix: str, queue: str | None) -> str:
    source = (
        f"{bucket}/{prefix}"
        if bucket is not None
        else (queue or "").rstrip("/").replace("/", ":").rpartition(":")[2]
    )
    return f"s3:{source.rstrip('/')}"


def _check_source(bucket: str | None, queue: str | None, reconcile: float | None) -> None:
    if bucket is None and (queue is None or reconcile is not None):
        raise UsageError(
            "S3: expected a bucket; only a queue without reconcile= may go without one"
        )
    if bucket is not None and "/" in bucket:
        raise UsageError(
            f"S3({bucket!r}): expected the bucket's name alone; give the rest as prefix="
        )
    if queue is None and reconcile is not None:
        raise UsageError(
            "S3(reconcile=): expected queue= too; without a queue, poll= sets the scan interval"
        )


def _check_numbers(
    poll: float,
    reconcile: float | None,
    settle: float,
    wait: float,
    visibility: float,
    pollers: int,
    page: int,
) -> None:
    duration(poll, "S3: poll=", positive=True)
    if reconcile is not None:
        duration(reconcile, "S3: reconcile=", positive=True)
    duration(settle, "S3: settle=")
    whole_number(page, "S3: page=", maximum=1000)
    whole_number(pollers, "S3: pollers=")
    number(wait, "S3: wait=", minimum=0, maximum=20)
    number(visibility, "S3: visibility=", minimum=1, maximum=43_200)


# ----------------------------------------------------------------------------- MinIO's webhook


def minio_id(headers: Mapping[str, str], body: bytes) -> str | None:
    """For `Webhook(id=minio_id)`: the id of the object's version, so that MinIO's retry is a
    duplicate; of several objects in one message, an id of all.
    """
    ids = [event_id(each) for each in _notifications(body)]
    return stable_id(*ids) if len(ids) > 1 else next(iter(ids), None)


def minio_object(*fields: str) -> Callable[[Event], dict[str, Any]]:
    """For `app.on(Webhook(...), flow, params=minio_object("bucket", "key"))`: the data of an `S3`
    event, from MinIO's message.

    `fields`: those that the flow takes, of `bucket`, `key`, `size`, `etag`, `version`, `sequencer`;
    none means all six.
    """
    if unknown := set(fields) - set(event_data(Notification(action="created", bucket="", key=""))):
        raise UsageError(
            f"minio_object: expected fields of an S3 event, found {', '.join(sorted(unknown))}"
        )

    def params(event: Event) -> dict[str, Any]:
        found = _notifications(event.data)
        if len(found) != 1:
            raise ValueError(
                f"expected the record of one object, found {len(found) or 'none'}; "
                "for several, take the event whole"
            )
        return {
            name: value
            for name, value in event_data(found[0]).items()
            if not fields or name in fields
        }

    return params


def _notifications(found: Any) -> list[Notification]:
    read = read_notifications(found)
    found_records = read if isinstance(read, list) else []
    return [each for each in found_records if isinstance(each, Notification)]
