"""The way out: what flows emitted, and what became a dead letter, to the sinks that want it.

    the commit that records it ─► outbox row ─► Courier ─► EventSink.send ─► (returns) ─► the row is deleted

An outlet (routing.py) says which events a sink wants; its row is written in the very transaction that records the event, so
that neither can be there without the other. One courier per outlet sends in the order of recording, a few hundred at a time;
when the sink fails it backs off and sends the same again: at least once, in order, each letter with its event's own id. What
the sink says it can never take (`Permanent`) becomes a dead letter of the outlet, and the next ones go on. No run ever waits
for any of this. Runs on the loop of the way in; the room below is the store's own outbox.py.
"""

import asyncio
import random
from collections.abc import Sequence

import msgspec

from eventflow.core.errors import StoreError
from eventflow.core.retry import Permanent
from eventflow.events.event import EventSink, Letter
from eventflow.logs.log import get_logger
from eventflow.routing.subscriptions import Outlet
from eventflow.store.protocol import Store

BATCH = 500
"""Letters given to a sink at once."""
BACKOFF = (0.5, 60.0)
"""Seconds before a sink that failed is tried again: first and longest; jitter between the half and the whole."""
FAREWELL = 5.0
"""Seconds a sink has to close."""

log = get_logger("eventflow.outbox")


class OutletHealth(msgspec.Struct):
    """How an outlet fares since the start. `state`: sending, waiting (nothing to send), failing, stopped."""

    name: str
    sink: str
    kind: str
    state: str = "waiting"
    sent: int = 0
    refused: int = 0
    failures: int = 0
    last_error: str | None = None


class Courier:
    """Empties one outlet's part of the outbox into its sink."""

    def __init__(self, outlet: Outlet, sink: EventSink, store: Store, draw: random.Random) -> None:
        self.health = OutletHealth(outlet.name, sink.name, type(sink).__name__)
        self._sink, self._store, self._draw = sink, store, draw
        self._news = asyncio.Event()

    def wake(self) -> None:
        """There is more to send."""
        self._news.set()

    async def run(self) -> None:
        """Until cancelled, or until the store fails."""
        wait = BACKOFF[0]
        while True:
            self._news.clear()
            letters = await self._store.outbox(self.health.name, BATCH)
            if not letters:
                self.health.state = "waiting"
                await self._news.wait()
                continue
            self.health.state = "sending"
            try:
                refused = await self._send(letters)
            except Exception as error:  # around a sink: another system may fail in any way; its letters stay in the outbox
                self._note_failure(error, len(letters), wait)
                await asyncio.sleep(self._draw.uniform(wait / 2, wait))
                wait = min(wait * 2, BACKOFF[1])
                continue
            wait = BACKOFF[0]
            await self._store.sent([letter.number for letter in letters], refused)
            self._note_sent(len(letters), refused)

    async def _send(self, letters: Sequence[Letter]) -> dict[int, str]:
        """Gives the sink all of them; returns those it will never take, each with its reason."""
        try:
            await self._sink.send(*letters)
        except Permanent as error:
            if len(letters) == 1:
                return {letters[0].number: str(error)}
        else:
            return {}
        refused: dict[int, str] = {}
        for letter in (
            letters
        ):  # one by one, to learn whose fault it is; what went out already goes out again
            refused |= await self._send([letter])
        return refused

    def _note_failure(self, error: Exception, letters: int, wait: float) -> None:
        health = self.health
        health.state = "failing"
        health.failures += 1
        health.last_error = f"{type(error).__name__}: {error}"
        log.warning(
            "outlet.failed",
            outlet=health.name,
            error=health.last_error,
            letters=letters,
            retry_within=wait,
        )

    def _note_sent(self, letters: int, refused: dict[int, str]) -> None:
        health = self.health
        if health.last_error is not None:
            health.last_error = None
            log.info("outlet.recovered", outlet=health.name)
        health.sent += letters - len(refused)
        health.refused += len(refused)
        for reason in refused.values():
            log.warning("outlet.refused", outlet=health.name, error=reason)


class Relay:
    """The couriers of all outlets. `start` and `stop` it on the loop of the way in."""

    def __init__(self, store: Store, outlets: Sequence[Outlet], draw: random.Random) -> None:
        self._store = store
        self._couriers = {
            outlet.name: Courier(outlet, outlet.sink, store, draw) for outlet in outlets
        }
        self._sinks = list({id(outlet.sink): outlet.sink for outlet in outlets}.values())
        self._rounds: list[asyncio.Task[None]] = []

    @property
    def health(self) -> dict[str, OutletHealth]:
        """By outlet's name."""
        return {name: courier.health for name, courier in self._couriers.items()}

    def start(self) -> None:
        """What an earlier life left in the outbox goes first."""
        self.loop = asyncio.get_running_loop()
        if not self._couriers:
            return
        self._store.attach_relay(self)
        for name, courier in self._couriers.items():
            self._rounds.append(
                asyncio.create_task(self._keep_sending(courier), name=f"send {name}")
            )

    def news(self, outlets: Sequence[str]) -> None:
        """Letters for these outlets are durable (store.base.Outbound)."""
        for name in outlets:
            if (courier := self._couriers.get(name)) is not None:
                courier.wake()

    async def stop(self) -> None:
        """Sends nothing more; what is under way may have arrived and will be sent again."""
        if not self._couriers:
            return
        self._store.attach_relay(None)
        for task in self._rounds:
            task.cancel()
        if self._rounds:
            await asyncio.wait(self._rounds)
            self._rounds.clear()
        for sink in self._sinks:
            await self._close(sink)

    async def _keep_sending(self, courier: Courier) -> None:
        try:
            await courier.run()
        except StoreError:
            pass  # the root stops the process, and says why once
        finally:
            courier.health.state = "stopped"

    async def _close(self, sink: EventSink) -> None:
        try:
            async with asyncio.timeout(FAREWELL):
                await sink.close()
        except Exception as error:  # around a sink: its end must not stand in the way of ours
            log.warning(
                "outlet.not_closed", sink=sink.name, error=f"{type(error).__name__}: {error}"
            )
