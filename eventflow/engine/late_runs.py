"""The lookout: tells of runs that are late, once each, when their time has come.

    timer ─► Store.late (a reader) ─► Store.tell_late ─► events and their runs, like any other

`RunState(flow, "late", after=)` asks for it (event.Late); without one it does nothing and nothing is done for it. It sleeps
until the first live run may be late. While there is none it has no timer, and the writer says when there is one again: a run
that comes after a look, or a window that is full before its time, is late no sooner than the shortest `after` from that look.
After a retry, and at start for what became late while nothing ran, it looks at once. Runs on the loop of the way in; the room
below is the store's own late.py.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress

from eventflow.core.clock import Clock, Timer, in_seconds, microseconds
from eventflow.core.errors import StoreError, StoreFailed
from eventflow.events.event import LateSpec
from eventflow.logs.log import get_logger
from eventflow.routing.filters import wildcard
from eventflow.store.protocol import Store
from eventflow.store.run_events import Lateness

AT_ONCE = 256
"""Runs that one transaction tells of."""

PAUSE = 1.0
"""Seconds between two looks where many runs become late one by one; a sixtieth of the shortest `after` if that is less."""

SHARE = 20
"""A look that takes long, because very many runs are live, is not repeated before so many times its length."""

AGAIN = 5.0
"""Seconds after which a look that failed is tried again."""

log = get_logger("eventflow.late")


class LateRunMonitor:
    """Looks for the runs that `lates` name. `start` and `stop` it on the loop of the way in."""

    def __init__(self, store: Store, clock: Clock, lates: Sequence[LateSpec]) -> None:
        self._store, self._clock = store, clock
        self._lates = [(each, wildcard(each.flow, "RunState")) for each in dict.fromkeys(lates)]
        self._shortest = min((each.after for each in lates), default=0)
        self._pause = self._rest = min(microseconds(PAUSE), self._shortest // 60)
        self.is_idle = True
        """Whether it does nothing before its timer fires or there are new runs."""
        self._looked_at = 0
        self._listens = False
        self._due: int | None = None
        self._timer: Timer | None = None
        self._rung = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._lates:
            self._loop = asyncio.get_running_loop()
            self.is_idle = False
            self._store.attach_lookout(self._heard)
            self._task = asyncio.create_task(self._look_out(), name="lookout")

    async def stop(self) -> None:
        """What is being recorded is recorded; nothing more is."""
        if self._task is None:
            return
        self._store.attach_lookout(None)
        self._task.cancel()
        await asyncio.wait([self._task])
        self._disarm()
        self.is_idle = True

    # ----------------------------------------------------------------- when to look

    async def _look_out(self) -> None:
        while True:
            self._disarm()
            self._looked_at, self._listens = (
                self._clock.now(),
                True,
            )  # first: what is recorded while it looks is new
            try:
                again = await self._look()
            except StoreFailed:
                self.is_idle = True
                return  # the root stops the process, and says why once
            except StoreError as error:
                log.warning("lookout.failed", error=str(error), again_in=AGAIN)
                again = self._clock.now() + microseconds(AGAIN)
            if again is not None:
                self._arm(max(again, self._looked_at + self._rest))
            self.is_idle = not self._rung.is_set()
            await self._rung.wait()
            self._rung.clear()

    def _heard(self, lives_again: bool) -> None:
        """There is something new (any thread). Once after each look that matters: it may be the next to be late."""
        if self._listens or lives_again:
            self._listens = False
            with suppress(RuntimeError):  # the loop is closed, and the app with it
                self._loop.call_soon_threadsafe(self._arm_for_new, lives_again)

    def _arm_for_new(self, lives_again: bool) -> None:
        if self._task is not None and not self._task.done():
            self._arm(self._clock.now() if lives_again else self._looked_at + self._shortest)

    def _arm(self, due: int) -> None:
        """Rings at `due`, or when it would have rung anyway if that is earlier."""
        if self._due is None or due < self._due:
            self._disarm()
            self._due = due
            self._timer = self._clock.timer(self._loop, due, self._ring)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._due = None

    def _ring(self) -> None:
        self.is_idle = False
        self._rung.set()

    # ----------------------------------------------------------------- a look

    async def _look(self) -> int | None:
        """Tells of what is late. Returns when to look again; None: once there are new runs."""
        began = self._clock.monotonic()
        found: Lateness = await self._store.late(self._wanted, self._looked_at)
        self._rest = max(self._pause, microseconds((self._clock.monotonic() - began) * SHARE))
        for after, runs in found.runs.items():
            for first in range(0, len(runs), AT_ONCE):
                if (full := self._store.room()) is not None:
                    raise full
                told = await self._store.tell_late(runs[first : first + AT_ONCE], after)
                log.info("lookout.told", runs=told, after=in_seconds(after))
        return found.again

    def _wanted(self, flow: str) -> Mapping[int, bool]:
        """After how long somebody wants to hear of runs of this flow; whether he named it."""
        wanted: dict[int, bool] = {}
        for late, stands_for in self._lates:
            if stands_for(flow):
                wanted[late.after] = wanted.get(late.after, False) or late.flow == flow
        return wanted
