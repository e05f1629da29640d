"""A queue of notices: receive, record, delete, in this order (P1). `S3.listen` runs a few loops of one `Queue`.

    receive (long poll) ─► notices.py ─► seen.py (has a sweep been here?) ─► Desk.offer ─► delete
                                    messages are kept from others meanwhile ─┘

A message is deleted only after everything in it is durable; a kill in between makes it visible again, and the ledger knows it.
A batch is recorded in one transaction and in the queue's order, which is all that FIFO queues need: SQS itself gives out no
more of a group while one of its messages is in hand. A message that is no notice becomes a dead letter with its bytes.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from eventflow.core.clock import SECOND
from eventflow.events.event import Event, Gauge, Undecodable
from triggers._s3.clients import FAILURES, Caller
from triggers._s3.intake import Desk, Options
from triggers._s3.known_objects import Mark, Owed, Seen, marked_by, owed_to, to_cursor
from triggers._s3.notifications import Notice, SettingsSaved, is_older, read_notices, to_event
from triggers._s3.prefixes import Folders

BATCH = 10
"""Messages that SQS gives out, takes back or deletes in one call."""

PATIENCE = 10.0
"""Seconds that a poll or a record under way may take after a cancel."""

ORDERED = 10_000
"""Keys whose latest sequencer is remembered, to tell a notice that was overtaken."""

LOOK = 15.0
"""Seconds between looks at how many messages wait."""

TRIES = 3
"""Times a message is deleted before it is left to come again, which the ledger will call a duplicate."""


class Tally:
    """What the loops of one trigger counted; kept over reopenings."""

    def __init__(self) -> None:
        self.waiting: int | None = None
        self.delay: float | None = None
        self.in_hand = 0
        self.filtered = 0
        self.tested: str | None = None

    def gauges(self) -> list[Gauge]:
        found = [Gauge("in_hand_messages", self.in_hand), Gauge("filtered_notices", self.filtered)]
        if self.waiting is not None:
            found.append(Gauge("lag_messages", self.waiting))
        if self.delay is not None:
            found.append(Gauge("lag_seconds", self.delay, total="max"))
        return found


class Queue:
    """One queue. `run` is one loop on it; several may run at the same time."""

    def __init__(
        self,
        client: Any,
        url: str,
        options: Options,
        desk: Desk,
        caller: Caller,
        seen: Seen | None,
        folders: Folders,
        tally: Tally,
    ) -> None:
        self._client, self._url, self._options = client, url, options
        self._desk, self._caller, self._seen, self._folders, self._tally = (
            desk,
            caller,
            seen,
            folders,
            tally,
        )
        self._clock, self._log = options.clock, desk.log
        self._latest: OrderedDict[tuple[str, str], str] = OrderedDict()

    async def run(self) -> None:
        """Until cancelled. A step under way then ends: what it records it deletes, what it only received it gives back."""
        step = asyncio.create_task(self._step())
        try:
            while True:
                await asyncio.shield(step)
                step = asyncio.create_task(self._step())
        except asyncio.CancelledError:
            self._caller.stop()
            await asyncio.wait({step}, timeout=PATIENCE)
            raise
        finally:
            step.cancel()
            await asyncio.gather(step, return_exceptions=True)

    async def _step(self) -> None:
        began = self._clock.monotonic()
        messages = await self._caller.ask(f"receiving from {self._url}", self._receive)
        if not messages:
            if self._clock.monotonic() - began < 0.2:
                await self._caller.rest(0.5)  # it was not asked to wait, or does not
            return
        self._tally.in_hand += len(messages)
        try:
            await self._handle(messages)
        finally:
            self._tally.in_hand -= len(messages)

    async def _receive(self) -> list[dict[str, Any]]:
        answer = await self._client.receive_message(
            QueueUrl=self._url, MaxNumberOfMessages=BATCH, WaitTimeSeconds=round(self._options.wait),
            VisibilityTimeout=round(self._options.visibility), AttributeNames=["All"], MessageAttributeNames=["All"],
        )  # fmt: skip
        return answer.get("Messages") or []

    # ------------------------------------------------------------------------- one batch

    async def _handle(self, messages: Sequence[dict[str, Any]]) -> None:
        if self._caller.stopping:
            await self._set_visibility(messages, 0)
            return
        keeper = asyncio.create_task(self._keep(messages))
        try:
            recorded = await self._record(messages)
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        if recorded:
            await self._delete(messages)
        else:
            await self._set_visibility(messages, 0)

    async def _record(self, messages: Sequence[dict[str, Any]]) -> bool:
        """Whether everything in the messages is durable. Whoever also sweeps decides and records under one lock."""
        read = [self._read(message) for message in messages]
        if self._seen is None:
            return await self._offer(read, None)
        async with self._desk.lock:
            return await self._offer(read, self._seen)

    async def _offer(self, read: Sequence[Undecodable | list[Notice]], seen: Seen | None) -> bool:
        items: list[Event | Undecodable] = []
        marks: dict[str, Mark] = {}
        for found in read:
            if isinstance(found, Undecodable):
                items.append(found)
                continue
            for notice in found:
                owed = self._mark(notice, seen, marks)
                if notice.action == "created" or self._options.deleted:
                    items.append(await self._to_event(notice, owed))
        if not items and not marks:
            return True
        recorded = await self._desk.offer(items, to_cursor(marks))
        if recorded and seen is not None:
            seen.note(marks)
        return recorded

    def _mark(self, notice: Notice, seen: Seen | None, marks: dict[str, Mark]) -> Owed | None:
        """Notes what the cursor will say of the key. Returns what a sweep recorded before this notice came."""
        if seen is None:
            return None
        mark = marks.get(notice.key) or seen.mark(notice.key)
        owed = owed_to(mark, notice)
        marks[notice.key] = marked_by(mark, notice, owed)
        return owed

    def _read(self, message: dict[str, Any]) -> Undecodable | list[Notice]:
        body: str = message["Body"]
        self._note_delay(message)
        try:
            found = read_notices(body)
        except ValueError as error:
            raw = body.encode("utf-8", "surrogatepass")
            return Undecodable(
                id=message["MessageId"], source=self._url, body=raw, error=str(error)
            )
        if isinstance(found, SettingsSaved):
            self._tally.tested = found.bucket
            self._log.info("bucket.tested", bucket=found.bucket, queue=self._url)
            return []
        wanted = [notice for notice in found if self._wants(notice)]
        self._tally.filtered += len(found) - len(wanted)
        if len(found) > len(wanted):
            self._log.debug("notice.filtered", count=len(found) - len(wanted), key=found[0].key)
        return wanted

    def _wants(self, notice: Notice) -> bool:
        options = self._options
        if notice.action == "other" or (
            notice.action == "removed" and not options.deleted and self._seen is None
        ):
            return False
        return options.bucket in (None, notice.bucket) and options.selection.wants(notice.key)

    async def _to_event(self, notice: Notice, owed: Owed | None) -> Event:
        """The notice's event; or, when a sweep was here first, that sweep's once more: a duplicate."""
        superseded = self._is_superseded(notice)
        if owed is None:
            return await self._folders.complete(to_event(notice, superseded=superseded))
        known = Notice(action=notice.action, bucket=notice.bucket, key=notice.key, time=notice.time)
        if notice.action == "created":
            known = msgspec.structs.replace(known, size=owed.size, etag=owed.etag or None)
        return await self._folders.complete(to_event(known, ident=owed.ident))

    def _is_superseded(self, notice: Notice) -> bool:
        place, latest = (notice.bucket, notice.key), self._latest.get((notice.bucket, notice.key))
        if is_older(notice.sequencer, latest):
            return True
        if notice.sequencer:
            self._latest[place] = notice.sequencer
            self._latest.move_to_end(place)
            if len(self._latest) > ORDERED:
                self._latest.popitem(last=False)
        return False

    def _note_delay(self, message: dict[str, Any]) -> None:
        sent = str(message.get("Attributes", {}).get("SentTimestamp", ""))
        if sent.isdecimal():
            self._tally.delay = max(0.0, (self._clock.now() - int(sent) * 1000) / SECOND)

    # ------------------------------------------------------------------------- what becomes of the messages

    async def _keep(self, messages: Sequence[dict[str, Any]]) -> None:
        """Keeps messages from others for as long as recording takes. SQS allows 12 hours; after them a copy is a duplicate."""
        while True:
            await self._caller.rest(self._options.visibility / 2)
            if self._caller.stopping:
                return
            await self._set_visibility(messages, self._options.visibility)

    async def _set_visibility(self, messages: Sequence[dict[str, Any]], seconds: float) -> None:
        """At 0, others may have them at once. A failure loses nothing: the messages come again by themselves."""
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
        except FAILURES as error:
            self._log.warning("message.not_extended", count=len(messages), error=str(error))
            return
        if failed := answer.get("Failed"):
            self._log.warning(
                "message.not_extended",
                count=len(failed),
                error=failed[0].get("Message") or failed[0].get("Code"),
            )

    async def _delete(self, messages: Sequence[dict[str, Any]]) -> None:
        """A partial success is tried again for the rest; what stays is received again, and is a duplicate."""
        left = [
            {"Id": str(n), "ReceiptHandle": message["ReceiptHandle"]}
            for n, message in enumerate(messages)
        ]
        for _ in range(TRIES):
            answer = await self._caller.ask(
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
                        "message.not_deleted",
                        message=messages[int(ident)]["MessageId"],
                        error=each.get("Code"),
                    )
            if not left:
                return
        self._log.warning("message.not_deleted", count=len(left), error="the queue refuses for now")

    async def _delete_batch(self, entries: list[dict[str, str]]) -> dict[str, Any]:
        return await self._client.delete_message_batch(QueueUrl=self._url, Entries=entries)

    # ------------------------------------------------------------------------- how it fares

    async def look(self) -> None:
        """Asks now and then how many messages wait. Without the right to ask, nothing is known of it."""
        while not self._caller.stopping:
            try:
                names = ["ApproximateNumberOfMessages"]
                answer = await self._client.get_queue_attributes(
                    QueueUrl=self._url, AttributeNames=names
                )
                self._tally.waiting = int(answer["Attributes"]["ApproximateNumberOfMessages"])
            except FAILURES:
                self._tally.waiting = None
            await self._caller.rest(LOOK)
