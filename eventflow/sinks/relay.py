"""The outbox relay: sends emitted events and dead letters to the sinks that subscribe to them.

    commit of the event ─► outbox row ─► SinkSender ─► EventSink.send ─► returns ─► row deleted

A sink subscription (routing/subscriptions.py) says which events a sink wants. The outbox row is
written in the transaction that records the event, so neither exists without the other. One
`SinkSender` per subscription sends in the order of recording, SEND_BATCH_SIZE messages at a time.
When the sink fails, it backs off and sends the same messages again: at least once, in order, each
with its event's own id. A message that the sink rejects for good (`Permanent`) becomes a dead
letter of the subscription, and the next ones are sent. No run waits for any of this. Runs on the
intake loop; the rows are read and deleted by store/outbox.py.
"""

import asyncio
import random
from collections.abc import Sequence

import msgspec

from eventflow.core.errors import ANY_FAILURE, StoreError, error_line
from eventflow.core.retry import Backoff, Permanent
from eventflow.events.event import EventSink, OutboxMessage
from eventflow.logs.log import get_logger
from eventflow.loop.left_behind import leave_behind
from eventflow.routing.subscriptions import SinkSubscription
from eventflow.store.protocol import Store

SEND_BATCH_SIZE = 500
"""Messages in one call of `EventSink.send`."""
RETRY_DELAY_SECONDS = 0.5
MAX_RETRY_DELAY_SECONDS = 60.0
"""Before a sink that failed is tried again: first and longest, doubling; jitter over the upper
half.
"""
STORE_RETRY_SECONDS = 1.0
"""Before the outbox is read again after a query that took too long."""
CLOSE_TIMEOUT_SECONDS = 5.0
"""For `EventSink.close`."""

log = get_logger("eventflow.outbox")
LOG_EVENTS = {
    "sink.close_failed": "A sink did not close in time, or closing it failed.",
    "sink.message_rejected": "A sink rejected a message permanently; it became a dead letter.",
    "sink.recovered": "A sink that had failed accepts messages again.",
    "sink.send_failed": (
        "Messages could not be sent to a sink; they stay in the outbox and are sent again."
    ),
}


class SinkHealth(msgspec.Struct):
    """The state of one sink subscription, counted since the start.

    `state`: sending, waiting (nothing to send), failing, stopped. `name` is the subscription's,
    `sink` the sink's own name, `kind` its class.
    """

    name: str
    sink: str
    kind: str
    state: str = "waiting"
    sent: int = 0
    rejected: int = 0
    failures: int = 0
    last_error: str | None = None


class SinkSender:
    """Sends the outbox of one sink subscription."""

    def __init__(self, subscription: SinkSubscription, store: Store, rng: random.Random) -> None:
        sink = subscription.sink
        self.health = SinkHealth(subscription.name, sink.name, type(sink).__name__)
        self._sink = sink
        self._store = store
        self._rng = rng
        self._wake_up = asyncio.Event()

    def wake(self) -> None:
        """There are new messages."""
        self._wake_up.set()

    async def run(self) -> None:
        """Sends until cancelled. Raises StoreError when the store fails."""
        backoff = Backoff(
            RETRY_DELAY_SECONDS, max_delay=MAX_RETRY_DELAY_SECONDS, jitter=0.5, rng=self._rng
        )
        while True:
            self._wake_up.clear()
            messages = await self._store.unsent_messages(self.health.name, SEND_BATCH_SIZE)
            if not messages:
                self.health.state = "waiting"
                await self._wake_up.wait()
                continue
            self.health.state = "sending"
            try:
                rejected = await self._send(messages)
            except ANY_FAILURE as error:  # around a sink: it may fail in any way; nothing is lost
                retry_in = next(backoff)
                self.note_failure(error, len(messages), retry_in)
                await asyncio.sleep(retry_in)
                continue
            backoff.reset()
            await self._store.remove_sent([message.number for message in messages], rejected)
            self._note_sent(len(messages), rejected)

    async def _send(self, messages: Sequence[OutboxMessage]) -> dict[int, str]:
        """Sends them. Returns those that the sink rejects for good, by number, with the reason."""
        try:
            await self._sink.send(*messages)
        except Permanent as error:
            if len(messages) == 1:
                return {messages[0].number: str(error)}
        else:
            return {}
        # One by one, to find the rejected ones; those that the sink has already are sent again.
        rejected: dict[int, str] = {}
        for message in messages:
            rejected |= await self._send([message])
        return rejected

    def note_failure(self, error: BaseException, count: int, retry_in: float) -> None:
        health = self.health
        health.state = "failing"
        health.failures += 1
        health.last_error = error_line(error)
        log.warning(
            "sink.send_failed",
            sink=health.name,
            error=health.last_error,
            messages=count,
            retry_in=round(retry_in, 3),
        )

    def _note_sent(self, count: int, rejected: dict[int, str]) -> None:
        health = self.health
        if health.last_error is not None:
            health.last_error = None
            log.info("sink.recovered", sink=health.name)
        health.sent += count - len(rejected)
        health.rejected += len(rejected)
        for reason in rejected.values():
            log.warning("sink.message_rejected", sink=health.name, error=reason)


class OutboxRelay:
    """The senders of all sink subscriptions. `start` and `stop` are called on the intake loop."""

    loop: asyncio.AbstractEventLoop

    def __init__(
        self, store: Store, subscriptions: Sequence[SinkSubscription], rng: random.Random
    ) -> None:
        self._store = store
        self._senders: dict[str, SinkSender] = {
            each.name: SinkSender(each, store, rng) for each in subscriptions
        }
        self._sinks: list[EventSink] = list(
            {id(each.sink): each.sink for each in subscriptions}.values()
        )
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def health(self) -> dict[str, SinkHealth]:
        """By the subscription's name."""
        return {name: sender.health for name, sender in self._senders.items()}

    def start(self) -> None:
        """Starts the senders; messages that the last process left in the outbox are sent first."""
        self.loop = asyncio.get_running_loop()
        if not self._senders:
            return
        self._store.attach_outbox_listener(self)
        for name, sender in self._senders.items():
            self._tasks.append(asyncio.create_task(self._run_sender(sender), name=f"send {name}"))

    @property
    def tasks(self) -> Sequence[asyncio.Task[None]]:
        return tuple(self._tasks)

    def notify(self, names: Sequence[str]) -> None:
        """New messages for these subscriptions are durable (store.protocol.OutboxListener)."""
        for name in names:
            if (sender := self._senders.get(name)) is not None:
                sender.wake()

    async def stop(self) -> None:
        """Cancels the senders and closes the sinks. A send that it interrupts is repeated by the
        next process.
        """
        if not self._senders:
            return
        self._store.attach_outbox_listener(None)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT_SECONDS)
            self._tasks.clear()
            for task in left:  # a sink ignores its cancel
                leave_behind(task)
        for sink in self._sinks:
            await self._close(sink)

    async def _run_sender(self, sender: SinkSender) -> None:
        try:
            while True:
                try:
                    await sender.run()
                except StoreError as error:
                    if self._store.failed is not None:
                        return  # the server stops the process and logs the reason once
                    sender.note_failure(error, 0, STORE_RETRY_SECONDS)
                await asyncio.sleep(STORE_RETRY_SECONDS)
        finally:
            sender.health.state = "stopped"

    async def _close(self, sink: EventSink) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
                await sink.close()
        except ANY_FAILURE as error:  # around a sink: a failing close must not stop the shutdown
            log.warning("sink.close_failed", sink=sink.name, error=error_line(error))
