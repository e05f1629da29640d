"""An SQS queue of notifications: receive, record, delete, in this order (P1).

    receive (long poll) ─► read_notifications ─► KnownObjects ─► LedgerIntake.accept ─► delete
                           the visibility timeout is extended meanwhile ─┘

`S3.listen` runs `pollers` loops of one `SqsPoller`. A message is deleted only after everything in
it is durable; after a crash in between SQS delivers it again, and the ledger finds the duplicate. A
batch is recorded in one transaction and in the queue's order, which suffices for FIFO queues: SQS
delivers no more of a message group while one of its messages is in flight. A message that is not a
notification becomes a dead letter, and of several records in one message only those that are none.
A message whose folder cannot be listed stays in the queue and delays no other.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from eventflow.core.clock import SECOND
from eventflow.core.errors import SourceError
from eventflow.events.event import Event, Gauge, Undecodable
from triggers._s3.clients import CLIENT_ERRORS, RetryingCaller
from triggers._s3.intake import LedgerIntake, S3Options
from triggers._s3.known_objects import (
    KnownObjects,
    ObjectMark,
    PendingNotification,
    find_pending,
    mark_notified,
    to_cursor,
)
from triggers._s3.notifications import (
    MalformedRecord,
    Notification,
    S3TestEvent,
    is_older,
    read_notifications,
    to_event,
)
from triggers._s3.prefixes import FolderEvents

LOG_EVENTS = {
    "bucket.test_notification_received": (
        "S3 sent its test message: the notification settings of a bucket were saved."
    ),
    "message.delete_failed": (
        "A recorded message could not be deleted from its queue; it arrives again, as a duplicate."
    ),
    "message.postponed": (
        "A message could not be recorded (the folder of its marker cannot be listed): it stays in "
        "the queue, and is received again after its visibility timeout."
    ),
    "message.visibility_extension_failed": (
        "The visibility timeout of a message was not extended; a second delivery is a duplicate."
    ),
    "notification.filtered": (
        "Notifications of objects excluded by the trigger's prefix, suffix or pattern (debug)."
    ),
}

SQS_BATCH_SIZE = 10
"""Messages that SQS accepts in one call."""

STOP_TIMEOUT_SECONDS = 10.0
"""For the current poll or transaction after a cancel."""

MAX_TRACKED_KEYS = 10_000
"""Keys whose latest sequencer is kept, to mark superseded notifications."""

DEPTH_CHECK_INTERVAL_SECONDS = 15.0
"""Between two requests for the number of queued messages."""

DELETE_ATTEMPTS = 3
"""After these, the message is delivered again, as a duplicate."""


class QueueStats:
    """The counts of one trigger; kept when its listener restarts."""

    def __init__(self) -> None:
        self.queued_messages: int | None = None  # None: unknown
        self.delay_seconds: float | None = None  # of the last message
        self.in_flight: int = 0
        self.filtered: int = 0
        self.last_tested_bucket: str | None = None

    def gauges(self) -> list[Gauge]:
        found = [
            Gauge("in_flight_messages", self.in_flight),
            Gauge("filtered_notifications", self.filtered),
        ]
        if self.queued_messages is not None:
            found.append(Gauge("lag_messages", self.queued_messages))
        if self.delay_seconds is not None:
            found.append(Gauge("lag_seconds", self.delay_seconds, total="max"))
        return found


class SqsPoller:
    """Receives from one queue. `run` is one loop; several may run at the same time."""

    def __init__(
        self,
        client: Any,
        url: str,
        options: S3Options,
        ledger: LedgerIntake,
        caller: RetryingCaller,
        known: KnownObjects | None,
        folders: FolderEvents,
        stats: QueueStats,
    ) -> None:
        self._client: Any = client
        self._url: str = url
        self._options: S3Options = options
        self._ledger: LedgerIntake = ledger
        self._caller: RetryingCaller = caller
        self._known: KnownObjects | None = known  # None: nothing scans the listing
        self._folders: FolderEvents = folders
        self._stats: QueueStats = stats
        self._log: Any = ledger.log
        self._latest_sequencers: OrderedDict[tuple[str, str], str] = OrderedDict()

    async def run(self) -> None:
        """Until cancelled. The current step then ends: recorded messages are deleted, the others
        become visible.
        """
        step = asyncio.create_task(self._step())
        try:
            while True:
                await asyncio.shield(step)
                step = asyncio.create_task(self._step())
        except asyncio.CancelledError:  # raised again once the current step has ended
            self._caller.stop()
            await asyncio.wait({step}, timeout=STOP_TIMEOUT_SECONDS)
            raise
        finally:
            step.cancel()
            await asyncio.gather(step, return_exceptions=True)

    async def _step(self) -> None:
        started_at = self._options.clock.monotonic()
        messages = await self._caller.call(f"receiving from {self._url}", self._receive)
        if not messages:
            if self._options.clock.monotonic() - started_at < 0.2:
                await self._caller.sleep(0.5)  # a queue without long polling
            return
        self._stats.in_flight += len(messages)
        try:
            await self._handle(messages)
        finally:
            self._stats.in_flight -= len(messages)

    async def _receive(self) -> list[dict[str, Any]]:
        answer = await self._client.receive_message(
            QueueUrl=self._url,
            MaxNumberOfMessages=SQS_BATCH_SIZE,
            WaitTimeSeconds=round(self._options.wait),
            VisibilityTimeout=round(self._options.visibility),
            AttributeNames=["All"],
            MessageAttributeNames=["All"],
        )
        return answer.get("Messages") or []

    # ------------------------------------------------------------------------- one batch

    async def _handle(self, messages: Sequence[dict[str, Any]]) -> None:
        if self._caller.stopping:
            await self._set_visibility(messages, 0)
            return
        visibility_extender = asyncio.create_task(self._extend_visibility(messages))
        try:
            recorded = await self._record(messages)
        finally:
            visibility_extender.cancel()
            await asyncio.gather(visibility_extender, return_exceptions=True)
        if recorded is None:
            await self._set_visibility(messages, 0)
        elif recorded:
            await self._delete(recorded)

    async def _record(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
        """The messages in which everything is durable; None: nothing was recorded, the listener is
        stopping. With a scan, it reads and records under one lock.
        """
        read = [(message, self._read(message)) for message in messages]
        if self._known is None:
            return await self._accept(read, None)
        async with self._ledger.lock:
            return await self._accept(read, self._known)

    async def _accept(
        self,
        read: Sequence[tuple[dict[str, Any], Sequence[Undecodable | Notification]]],
        known: KnownObjects | None,
    ) -> list[dict[str, Any]] | None:
        accepted: list[dict[str, Any]] = []
        postponed_groups: set[str] = set()  # of a FIFO queue: they keep their order
        items: list[Event | Undecodable] = []
        marks: dict[str, ObjectMark] = {}
        for message, found in read:
            group = message.get("Attributes", {}).get("MessageGroupId")
            if group in postponed_groups:
                continue
            own_marks = dict(marks)
            try:
                own_items = await self._to_items(found, known, own_marks)
            except SourceError as error:  # of this message: SQS delivers it again
                if self._caller.stopping:
                    return None
                self._log.warning(
                    "message.postponed", message=message["MessageId"], error=str(error)
                )
                postponed_groups.update([group] if group else [])
                continue
            accepted.append(message)
            items += own_items
            marks = own_marks
        if (items or marks) and not await self._ledger.accept(items, to_cursor(marks)):
            return None
        if known is not None:
            known.update_notified(marks)
        return accepted

    async def _to_items(
        self,
        found: Sequence[Undecodable | Notification],
        known: KnownObjects | None,
        marks: dict[str, ObjectMark],
    ) -> list[Event | Undecodable]:
        """The items of one message; adds to `marks`. Raises SourceError when a folder cannot be
        listed.
        """
        items: list[Event | Undecodable] = []
        for each in found:
            if isinstance(each, Undecodable):
                items.append(each)
                continue
            pending = self._mark(each, known, marks)
            if each.action == "created" or self._options.deleted:
                items.append(await self._to_event(each, pending))
        return items

    def _mark(
        self, notification: Notification, known: KnownObjects | None, marks: dict[str, ObjectMark]
    ) -> PendingNotification | None:
        """Adds the key's new mark. Returns the pending notification of a version that a scan
        recorded first.
        """
        if known is None:
            return None
        mark = marks.get(notification.key) or known.mark(notification.key)
        pending = find_pending(mark, notification)
        marks[notification.key] = mark_notified(mark, notification, pending)
        return pending

    def _read(self, message: dict[str, Any]) -> list[Undecodable | Notification]:
        body: str = message["Body"]
        self._measure_delay(message)
        try:
            found = read_notifications(body)
        except ValueError as error:
            raw = body.encode("utf-8", "surrogatepass")
            return [
                Undecodable(id=message["MessageId"], source=self._url, body=raw, error=str(error))
            ]
        if isinstance(found, S3TestEvent):
            self._stats.last_tested_bucket = found.bucket
            self._log.info(
                "bucket.test_notification_received", bucket=found.bucket, queue=self._url
            )
            return []
        wanted = [
            self._dead_letter(message, each) if isinstance(each, MalformedRecord) else each
            for each in found
            if isinstance(each, MalformedRecord) or self._matches(each)
        ]
        self._stats.filtered += len(found) - len(wanted)
        if len(found) > len(wanted):
            self._log.debug(
                "notification.filtered",
                count=len(found) - len(wanted),
                message=message["MessageId"],
            )
        return wanted

    def _dead_letter(self, message: dict[str, Any], record: MalformedRecord) -> Undecodable:
        return Undecodable(
            id=f"{message['MessageId']}/{record.index}",
            source=self._url,
            body=record.body or message["Body"].encode("utf-8", "surrogatepass"),
            error=record.error,
        )

    def _matches(self, notification: Notification) -> bool:
        options = self._options
        if notification.action == "other" or (
            notification.action == "removed" and not options.deleted and self._known is None
        ):
            return False
        return options.bucket in (None, notification.bucket) and options.key_filter.matches(
            notification.key
        )

    async def _to_event(
        self, notification: Notification, pending: PendingNotification | None
    ) -> Event:
        """The notification's event; or the event of the scan that found the version first, which is
        then a duplicate.
        """
        superseded = self._is_superseded(notification)
        if pending is None:
            return await self._folders.expand(to_event(notification, superseded=superseded))
        known = Notification(
            action=notification.action,
            bucket=notification.bucket,
            key=notification.key,
            time=notification.time,
        )
        if notification.action == "created":
            known = msgspec.structs.replace(known, size=pending.size, etag=pending.etag or None)
        return await self._folders.expand(to_event(known, ident=pending.event_id))

    def _is_superseded(self, notification: Notification) -> bool:
        object_key = (notification.bucket, notification.key)
        if is_older(notification.sequencer, self._latest_sequencers.get(object_key)):
            return True
        if notification.sequencer:
            self._latest_sequencers[object_key] = notification.sequencer
            self._latest_sequencers.move_to_end(object_key)
            if len(self._latest_sequencers) > MAX_TRACKED_KEYS:
                self._latest_sequencers.popitem(last=False)
        return False

    def _measure_delay(self, message: dict[str, Any]) -> None:
        sent = str(message.get("Attributes", {}).get("SentTimestamp", ""))
        if sent.isdecimal():
            self._stats.delay_seconds = max(
                0.0, (self._options.clock.now() - int(sent) * 1000) / SECOND
            )

    # ------------------------------------------------------------------ visibility and deletion

    async def _extend_visibility(self, messages: Sequence[dict[str, Any]]) -> None:
        """Extends the visibility timeout while the messages are recorded. After SQS's limit of 12
        hours a copy is a duplicate.
        """
        while True:
            await self._caller.sleep(self._options.visibility / 2)
            if self._caller.stopping:
                return
            await self._set_visibility(messages, self._options.visibility)

    async def _set_visibility(self, messages: Sequence[dict[str, Any]], seconds: float) -> None:
        """0 makes them visible at once. A failure loses nothing: SQS delivers them again."""
        entries = [
            {
                "Id": str(n),
                "ReceiptHandle": message["ReceiptHandle"],
                "VisibilityTimeout": round(seconds),
            }
            for n, message in enumerate(messages)
        ]
        try:
            answer = await self._client.change_message_visibility_batch(
                QueueUrl=self._url, Entries=entries
            )
        except CLIENT_ERRORS as error:  # SQS delivers the messages again
            self._log.warning(
                "message.visibility_extension_failed", count=len(messages), error=str(error)
            )
            return
        if failed := answer.get("Failed"):
            self._log.warning(
                "message.visibility_extension_failed",
                count=len(failed),
                error=failed[0].get("Message") or failed[0].get("Code"),
            )

    async def _delete(self, messages: Sequence[dict[str, Any]]) -> None:
        """Deletes the messages, with retries for those that failed; the rest is delivered again, as
        duplicates.
        """
        left = [
            {"Id": str(n), "ReceiptHandle": message["ReceiptHandle"]}
            for n, message in enumerate(messages)
        ]
        for _ in range(DELETE_ATTEMPTS):
            answer = await self._caller.call(
                f"deleting from {self._url}", partial(self._delete_batch, left)
            )
            failed = {each["Id"]: each for each in (answer or {}).get("Failed") or ()}
            left = [
                entry
                for entry in left
                if entry["Id"] in failed and not failed[entry["Id"]].get("SenderFault")
            ]
            for ident, each in failed.items():
                if each.get("SenderFault"):
                    self._log.warning(
                        "message.delete_failed",
                        message=messages[int(ident)]["MessageId"],
                        error=each.get("Code"),
                    )
            if not left:
                return
        self._log.warning(
            "message.delete_failed", count=len(left), error="the queue does not delete them now"
        )

    async def _delete_batch(self, entries: list[dict[str, str]]) -> dict[str, Any]:
        return await self._client.delete_message_batch(QueueUrl=self._url, Entries=entries)

    # ------------------------------------------------------------------------- queue depth

    async def watch_depth(self) -> None:
        """Reads the number of queued messages periodically; unknown without the permission."""
        while not self._caller.stopping:
            try:
                names = ["ApproximateNumberOfMessages"]
                answer = await self._client.get_queue_attributes(
                    QueueUrl=self._url, AttributeNames=names
                )
                self._stats.queued_messages = int(
                    answer["Attributes"]["ApproximateNumberOfMessages"]
                )
            except CLIENT_ERRORS:  # no permission, or the queue is not reachable
                self._stats.queued_messages = None
            await self._caller.sleep(DEPTH_CHECK_INTERVAL_SECONDS)
