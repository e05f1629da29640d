"""Objects that arrive in a bucket, each version as one event: `app.on(S3("lake", prefix="in/", queue="arrivals"), handle)`.

Two ways in, alone or together, and one shape of event. From an SQS queue of notifications (plain, through SNS or EventBridge),
whose messages are deleted only after their events are durable; or by sweeping the listing, whose cursor commits with the
events. With `reconcile=` a sweep finds what the notifications missed, and both start one run per version between them. MinIO's
webhook is a `Webhook` with this file's `minio_id` and `minio_object`.

This file is the public face; `_s3/queue.py` and `_s3/sweep.py` are the loops and show the way of an object through the rooms.
"""

import asyncio
import os
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Literal

from eventflow.core.clock import Clock, SystemClock
from eventflow.core.errors import UsageError
from eventflow.events.event import Event, Gauge, Intake
from triggers._s3.clients import Caller, Place
from triggers._s3.intake import Desk, Options
from triggers._s3.key_filter import Selection
from triggers._s3.known_objects import Seen
from triggers._s3.listing import Sweep
from triggers._s3.notifications import Notice, identity, read_notices, shape
from triggers._s3.prefixes import Folders
from triggers._s3.queue import Queue, Tally
from triggers.concurrency import together

__all__ = ["S3", "minio_id", "minio_object"]


class S3:
    """A bucket whose objects are events.

    Types are `io.eventflow.s3.object.created` (any new version, overwrites too), with `deleted=True` `.removed`, and with a
    folder marker `io.eventflow.s3.folder.completed`. `data`: `bucket`, `key` (decoded), `size`, `etag`, `version`, `sequencer`;
    None is what the way in does not tell. The subject is the key, the time is the store's. Extensions: `s3reason` (`Put`,
    `CompleteMultipartUpload`, `Listed`…), and `superseded` on a notice that a later one of its key overtook.

    Args:
        bucket: its name; None takes whatever buckets the queue tells of.
        queue: the SQS queue (URL, ARN or name) that the bucket's notifications go to. Without one the bucket is polled.
        prefix, suffix, pattern: which keys. Globs are over the key without the prefix, as in `Directory`; `[]`-lists mean any.
        poll: seconds between sweeps of the listing, when there is no queue.
        reconcile: seconds between sweeps beside the queue; None for none.
        settle: seconds that a listed object must stay the same. S3's writes are atomic: for stores and mounts that append.
        existing: objects present at the very first sweep `"fire"`, or are `"skip"`ped (their later versions fire).
        marker: `"{name}.done"` or `"{stem}.ok"`: an object fires once this key is there (sweeps only). `"_SUCCESS"`: the folder
            fires when this key lands, with `folder`, `objects` and `truncated` in the data.
        touch: `"skip"`: the same content listed with another time is no event. `"fire"`: it is.
        deleted: removals are events too.
        endpoint_url, region: of any S3-compatible store; by default those of the environment. `session`: an aiobotocore or
            aioboto3 session; `client_options`: handed to the clients as they are. Credentials come from the usual AWS places.
        wait: seconds of one long poll. `visibility`: seconds for which a received message is kept from others, extended while
            recording takes longer. `pollers`: loops on the queue.
        page: keys asked for at a time.
        name: the trigger's name, by which its cursor is kept; by default made of bucket, prefix and queue.
    """

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
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        _check(bucket, queue, poll, reconcile, settle, wait, visibility, pollers, page)
        selection = Selection(prefix, suffix, pattern, marker)
        if queue is not None and selection.per_object:
            raise UsageError(
                f'S3(queue=, marker={marker!r}): expected a folder marker such as "_SUCCESS", or no queue'
            )
        self.name = name or _name(bucket, prefix, queue)
        self._place = Place(endpoint_url, region, session, client_options or {})
        self._options = Options(
            bucket=bucket, queue=queue, selection=selection, every=reconcile if queue is not None else poll, settle=settle,
            skip_existing=existing == "skip", touch=touch == "fire", deleted=deleted, wait=wait, visibility=visibility,
            pollers=pollers, page=page, clock=clock or SystemClock(),
        )  # fmt: skip
        self._draw = random.Random(entropy(8))
        self._tally = Tally()
        self._caller: Caller | None = None
        self._desk: Desk | None = None
        self._sweep: Sweep | None = None

    def __repr__(self) -> str:
        return f"S3({self._options.bucket!r}, name={self.name!r})"

    async def listen(self, intake: Intake) -> None:
        """Takes in until cancelled. Everything known comes from the cursor, so it may be opened again at any time."""
        options = self._options
        caller = self._caller = Caller(options.clock, self._draw, intake.log)
        desk = self._desk = Desk(intake, caller)
        async with AsyncExitStack() as stack:
            client = await self._place.open(stack, "s3")
            folders = Folders(client, options.selection, caller)
            seen, loops = None, list[Coroutine[Any, Any, None]]()
            if options.every is not None:
                assert options.bucket is not None
                cursor = await intake.cursor()
                seen = await asyncio.to_thread(
                    Seen, options.bucket, cursor, touch=options.touch
                )  # a million keys take a second
                self._sweep = Sweep(client, options.bucket, options, desk, caller, seen, folders)
                loops.append(self._sweep.run())
            if options.queue is not None:
                sqs = await self._place.open(stack, "sqs")
                url = await _url(sqs, options.queue, caller)
                queue = Queue(sqs, url, options, desk, caller, seen, folders, self._tally)
                loops += [queue.run() for _ in range(options.pollers)] + [queue.look()]
            intake.log.info(
                "bucket.opened", bucket=options.bucket, queue=options.queue, known=len(seen or ())
            )
            await together(*loops)

    # ------------------------------------------------------------------------- how it fares

    @property
    def condition(self) -> str | None:
        """What keeps the source from its work; None while nothing does."""
        failing = self._caller.failing if self._caller is not None else {}
        return next(iter(failing.values()), self._desk.full if self._desk is not None else None)

    @property
    def last_test_event(self) -> str | None:
        """The bucket whose notification settings S3 last told of with a test message, since the start."""
        return self._tally.tested

    def gauges(self) -> Sequence[Gauge]:
        found = self._tally.gauges() if self._options.queue is not None else []
        return [*found, *(self._sweep.gauges() if self._sweep is not None else [])]


async def _url(sqs: Any, queue: str, caller: Caller) -> str:
    """The queue's URL, from any of its names."""
    if "://" in queue:
        return queue
    parts = queue.split(":")
    asked = {"QueueName": parts[-1]} | (
        {"QueueOwnerAWSAccountId": parts[4]} if queue.startswith("arn:") else {}
    )
    answer = await caller.ask(f"looking up the queue {queue}", lambda: sqs.get_queue_url(**asked))
    return (answer or {"QueueUrl": queue})["QueueUrl"]


def _name(bucket: str | None, prefix: str, queue: str | None) -> str:
    place = (
        f"{bucket}/{prefix}"
        if bucket is not None
        else (queue or "").rstrip("/").replace("/", ":").rpartition(":")[2]
    )
    return f"s3:{place.rstrip('/')}"


def _check(
    bucket: str | None, queue: str | None, poll: float, reconcile: float | None, settle: float, wait: float,
    visibility: float, pollers: int, page: int,
) -> None:  # fmt: skip
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
            "S3(reconcile=): expected a queue beside it; without one, poll= says how often the bucket is swept"
        )
    if min(poll, reconcile or 1.0) <= 0 or settle < 0 or not 1 <= page <= 1000 or pollers < 1:
        raise UsageError(
            "S3: poll, reconcile and pollers must be positive, settle not negative, page from 1 to 1,000"
        )
    if not 0 <= wait <= 20 or not 1 <= visibility <= 43_200:
        raise UsageError("S3: wait must be from 0 to 20 seconds, visibility from 1 to 43,200")


# ----------------------------------------------------------------------------- MinIO's webhook


def minio_id(headers: Mapping[str, str], body: bytes) -> str | None:
    """For `Webhook(id=minio_id)`: the identity of the object's version, so that MinIO's second try starts nothing."""
    found = _notices(body)
    return identity(found[0]) if found else None


def minio_object(*fields: str) -> Callable[[Event], dict[str, Any]]:
    """For `app.on(Webhook(...), flow, params=minio_object("bucket", "key"))`: what an `S3` event has, from MinIO's message.

    `fields` are those that the flow takes, of `bucket`, `key`, `size`, `etag`, `version`, `sequencer`; none means all six.
    """
    if unknown := set(fields) - set(shape(Notice(action="created", bucket="", key=""))):
        raise UsageError(
            f"minio_object: expected fields of an S3 event, found {', '.join(sorted(unknown))}"
        )

    def params(event: Event) -> dict[str, Any]:
        found = _notices(event.data)
        if not found:
            raise ValueError("expected a record of an object, found none")
        return {
            name: value for name, value in shape(found[0]).items() if not fields or name in fields
        }

    return params


def _notices(found: Any) -> list[Notice]:
    read = read_notices(found)
    return read if isinstance(read, list) else []
