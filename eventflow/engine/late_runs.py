"""The monitor of late runs: records an event for each run that has not ended in time, once.

timer ─► Store.late_runs (a reader) ─► Store.record_late_runs ─► events and their runs, like any
other

`RunState(flow, "late", after=)` subscribes to these events (event.LateSpec); without a subscription
the monitor does nothing. It sleeps until the first live run may be late. While there is no live run
it has no timer, and the store's writer calls it when there is one: a run that is recorded after a
scan, or a window that is full before its time, is late no sooner than the shortest `after` from
that scan. After a retry, and at start, it scans at once. It runs on the intake loop; the queries
are in store/late_runs.py.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress

from eventflow.core.clock import (
    SECOND,
    Clock,
    Moment,
    Timer,
    in_seconds,
    microseconds,
    read_moment,
    timer_at,
)
from eventflow.core.errors import StoreError, StoreFailed
from eventflow.events.event import LateSpec
from eventflow.logs.log import get_logger
from eventflow.routing.filters import wildcard
from eventflow.store.protocol import Store
from eventflow.store.run_events import LateRuns

RECORD_BATCH_SIZE = 256
"""Late runs recorded in one transaction."""

SCAN_INTERVAL = 1.0
"""Seconds between two scans while runs become late one by one; a sixtieth of the shortest `after`
if that is less.
"""

MIN_REST_FACTOR = 20
"""After a scan that took long, because very many runs are live, the next one waits so many times as
long.
"""

RETRY_AFTER_SECONDS = 5.0
"""The delay after a failed scan."""

log = get_logger("eventflow.late_runs")
LOG_EVENTS = {
    "late_runs.recorded": (
        "Events were recorded for `runs` runs that had not ended `after` seconds after they "
        "were due."
    ),
    "late_runs.scan_failed": (
        "The scan for late runs failed or the ledger is full; it is tried again."
    ),
}


class LateRunMonitor:
    """Scans for the runs that `specs` name. Call `start` and `stop` on the intake loop."""

    def __init__(self, store: Store, clock: Clock, specs: Sequence[LateSpec]) -> None:
        self._store = store
        self._clock = clock
        self._specs = [(spec, wildcard(spec.flow, "RunState")) for spec in dict.fromkeys(specs)]
        self._shortest_after = min((spec.after for spec in specs), default=0)
        self._min_interval = min(microseconds(SCAN_INTERVAL), self._shortest_after // 60)
        self._interval = self._min_interval  # longer where a scan takes long
        self.is_idle = True
        """Whether it does nothing before its timer fires or there are new runs."""
        self._scanned = Moment(0, 0.0)
        self._wants_new_runs = False
        self._due: float | None = None
        """By the monotonic clock."""
        self._timer: Timer | None = None
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._specs:
            self._loop = asyncio.get_running_loop()
            self.is_idle = False
            self._store.on_new_runs(self._on_new_runs)
            self._task = asyncio.create_task(self._run(), name="late-runs")

    @property
    def tasks(self) -> Sequence[asyncio.Task[None]]:
        return () if self._task is None else (self._task,)

    async def stop(self) -> None:
        """A transaction under way is still recorded; no further one begins."""
        if self._task is None:
            return
        self._store.on_new_runs(None)
        self._task.cancel()
        await asyncio.wait([self._task])
        self._cancel_timer()
        self.is_idle = True

    # ----------------------------------------------------------------- when to scan

    async def _run(self) -> None:
        while True:
            self._cancel_timer()
            # Before the scan: runs recorded during it are new.
            since = self._scanned = read_moment(self._clock)
            self._wants_new_runs = True
            try:
                next_scan = await self._scan()
            except StoreFailed:
                self.is_idle = True
                return  # the server stops the process and logs the reason once
            except StoreError as error:
                log.warning("late_runs.scan_failed", error=str(error), retry_in=RETRY_AFTER_SECONDS)
                since = read_moment(self._clock)
                next_scan = since.wall + microseconds(RETRY_AFTER_SECONDS)
            if next_scan is not None:
                self._set_timer(max(next_scan, since.wall + self._interval), since)
            self.is_idle = not self._wake.is_set()
            await self._wake.wait()
            self._wake.clear()

    def _on_new_runs(self, is_retry: bool) -> None:
        """A run is new, due earlier, or (`is_retry`) live again. From any thread.

        Only the first call after each scan matters: that run may be the next to be late.
        """
        if self._wants_new_runs or is_retry:
            self._wants_new_runs = False
            with suppress(RuntimeError):  # the loop is closed, and the app with it
                self._loop.call_soon_threadsafe(self._set_timer_for_new, is_retry)

    def _set_timer_for_new(self, is_retry: bool) -> None:
        if self._task is not None and not self._task.done():
            since = read_moment(self._clock) if is_retry else self._scanned
            self._set_timer(since.wall + (0 if is_retry else self._shortest_after), since)

    def _set_timer(self, due_us: int, since: Moment) -> None:
        """Wakes the scan as long after `since` as `due_us` is, or at the time already set if that
        is earlier.
        """
        due = since.monotonic + (due_us - since.wall) / SECOND
        if self._due is None or due < self._due:
            self._cancel_timer()
            self._due = due
            self._timer = timer_at(self._clock, self._loop, due_us, since, self._on_timer)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._due = None

    def _on_timer(self) -> None:
        self.is_idle = False
        self._wake.set()

    # ----------------------------------------------------------------- a scan

    async def _scan(self) -> int | None:
        """Records events of the runs that are late. Returns when to scan next; None: once there are
        new runs.
        """
        began = self._clock.monotonic()
        found: LateRuns = await self._store.late_runs(self._wanted, self._scanned.wall)
        took = self._clock.monotonic() - began
        self._interval = max(self._min_interval, microseconds(took * MIN_REST_FACTOR))
        for after, runs in found.runs.items():
            for first in range(0, len(runs), RECORD_BATCH_SIZE):
                if (full := self._store.capacity()) is not None:
                    raise full.copy()
                batch = runs[first : first + RECORD_BATCH_SIZE]
                recorded = await self._store.record_late_runs(batch, after)
                log.info("late_runs.recorded", runs=recorded, after=in_seconds(after))
        return found.next_scan_at

    def _wanted(self, flow: str) -> Mapping[int, bool]:
        """The `after` of each spec that covers this flow, in microseconds, and whether one of them
        names it.
        """
        wanted: dict[int, bool] = {}
        for spec, covers in self._specs:
            if covers(flow):
                wanted[spec.after] = wanted.get(spec.after, False) or spec.flow == flow
        return wanted
