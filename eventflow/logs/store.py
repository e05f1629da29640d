"""What runs logged, in a file beside the store, so that no flood, full quota or damaged page of it ever touches a journal.

`log.py` posts lines from any thread; one thread here writes them, some thousand per transaction, and alone may write the file
(logfile.py). The doors read with `read` and `follow`. Kept are at most `per_second` lines a second and `per_run` lines of a
run, and `quota_bytes` in all (the oldest runs' lines go first); what was not kept is counted, and the count is a line of the
run. When the disk is short or the file fails, lines are dropped, counted and warned about.
"""

import asyncio
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from logging import WARNING
from pathlib import Path
from typing import Any, Final

import anyio.to_thread
import msgspec
import orjson

from eventflow.core.clock import Clock
from eventflow.logs.file import LogFile, damaged, read_lines
from eventflow.logs.log import Line, get_logger

LOG_EVENTS = {
    "log.dropped": (
        "`lines` log lines were dropped: a quota was exceeded, or the disk or log file failed."
    ),
    "log.failed": "The log store cannot write; lines are dropped and counted, runs continue.",
}

LINGER: Final = 0.05
"""Seconds the writer waits for company: at most twenty transactions a second."""

QUEUE: Final = 20_000
QUEUE_BYTES: Final = 16 << 20
"""Lines and bytes that may wait for the writer."""

RUNS: Final = 20_000
"""Runs whose budgets are in memory; the one that was silent longest is forgotten first, and then begins with a full one."""


class Budget(msgspec.Struct):
    """What one run may still log. `lines` and `size` are the writer thread's; -1 until it asked the file."""

    credit: float
    seen: float
    dropped: int = 0
    noted: float = float("-inf")
    lines: int = -1
    size: int = 0


class LogStore:
    """The lines of every run. `post` from any thread; `open` and `close` once."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        clock: Clock,
        quota_bytes: int = 256 << 20,
        per_run: int = 10_000,
        per_run_bytes: int = 8 << 20,
        per_second: int = 1_000,
        keep_seconds: float = 30 * 86_400,
        floor_bytes: int = 64 << 20,
    ) -> None:
        self.file = LogFile(Path(path), quota_bytes, floor_bytes)
        self.dropped = 0
        self._clock, self._keep = clock, keep_seconds
        self._per_run, self._per_run_bytes, self._per_second = per_run, per_run_bytes, per_second
        self._written = threading.Condition()
        self._queue: list[Line] = []
        self._size = self._posted = self._done = 0
        self._budgets: OrderedDict[int, Budget] = OrderedDict()
        self._dropping: set[int] = set()
        self._some, self._hurry, self._closing = (
            threading.Event(),
            threading.Event(),
            threading.Event(),
        )
        self._followers: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._tidy_at = self._warn_at = float("-inf")
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Starts the writer. The file is opened, or made, with the first line; trouble with it is never raised."""
        self._thread = threading.Thread(target=self._run, name="eventflow-log-store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Writes what was posted. Idempotent."""
        self._closing.set()
        self._wake()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # ----------------------------------------------------------------------- writing

    def post(self, line: Line) -> None:
        """Queues a line, or counts it as dropped when its run is over its rate or the queue is full. Never blocks or raises."""
        size = len(line.event) + (len(line.fields) if line.fields else 0) + 100
        with self._written:
            budget = self._budget(line.run)
            now = self._clock.monotonic()
            budget.credit = min(
                self._per_second, budget.credit + (now - budget.seen) * self._per_second
            )
            budget.seen = now
            if (
                budget.credit < 1
                or len(self._queue) >= QUEUE
                or self._size + size > QUEUE_BYTES
                or self._closing.is_set()
            ):
                self._drop(line.run, budget)
            else:
                budget.credit -= 1
                self._queue.append(line)
                self._size += size
                self._posted += 1
        if not self._some.is_set():
            self._some.set()

    def _budget(self, run: int) -> Budget:
        budget = self._budgets.get(run)
        if budget is None:
            budget = self._budgets[run] = Budget(self._per_second, self._clock.monotonic())
            if len(self._budgets) > RUNS:
                oldest, _ = self._budgets.popitem(last=False)
                self._dropping.discard(oldest)
        else:
            self._budgets.move_to_end(run)
        return budget

    def _drop(self, run: int, budget: Budget) -> None:
        budget.dropped += 1
        self.dropped += 1
        self._dropping.add(run)

    def flush(self, within: float = 5.0) -> bool:
        """Waits until everything posted before is in the file, or dropped; False when that took longer."""
        with self._written:
            posted = self._posted
            self._wake()
            return self._thread is None or self._written.wait_for(
                lambda: self._done >= posted, within
            )

    def _wake(self) -> None:
        self._hurry.set()
        self._some.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._some.wait(1.0 if self._dropping else 60.0)
            self._hurry.wait(LINGER)
            self._hurry.clear()
            self._some.clear()
            self._pass()
        self._pass()
        self.file.close()

    def _pass(self) -> None:
        """One turn of the writer: lines and notes of what was dropped in one transaction, then the quota."""
        with self._written:
            lines, self._queue, self._size = self._queue, [], 0
        try:
            self._write(lines)
            self._tidy()
        except (sqlite3.Error, OSError) as error:
            self._warn(error)
        with self._written:
            self._done += len(lines)
            self._written.notify_all()
            followers = list(self._followers)
        for loop, event in followers:
            with suppress(RuntimeError):  # that loop is closed, and nobody follows any more
                loop.call_soon_threadsafe(event.set)

    def _write(self, lines: Sequence[Line]) -> None:
        kept: list[Line] = []
        try:
            if lines:
                self.file.check_room()
            kept = [line for line in lines if self._within(line)]
            notes = self._notes()
            if kept or notes:
                self.file.write([*kept, *(note for note, _ in notes)])
                self._noted(notes)
        except (sqlite3.Error, OSError):
            with self._written:
                for line in kept or lines:
                    self._drop(line.run, self._budget(line.run))
            raise

    def _within(self, line: Line) -> bool:
        """Whether the run may keep another line. Warnings may take a tenth more: the end of a noisy run tells why it failed."""
        with self._written:
            budget = self._budget(line.run)
        if budget.lines < 0:
            budget.lines, budget.size = self.file.weight(line.run)
        tenths = 11 if line.level >= WARNING else 10
        if (
            10 * budget.lines >= self._per_run * tenths
            or 10 * budget.size >= self._per_run_bytes * tenths
        ):
            with self._written:
                self._drop(line.run, budget)
            return False
        budget.lines += 1
        budget.size += len(line.event) + (len(line.fields) if line.fields else 0)
        return True

    def _notes(self) -> list[tuple[Line, int]]:
        """A line for each run that lost some, at most one a second: how many since the last one."""
        now, at = self._clock.monotonic(), self._clock.now()
        with self._written:
            lost = [(run, budget) for run in self._dropping if (budget := self._budgets.get(run))]
            due = [
                (run, budget.dropped)
                for run, budget in lost
                if self._closing.is_set() or now - budget.noted >= 1.0
            ]
        return [
            (
                Line(
                    run,
                    at,
                    WARNING,
                    "eventflow.store.logs",
                    "log.dropped",
                    orjson.dumps({"lines": count}),
                ),
                count,
            )
            for run, count in due
        ]

    def _noted(self, notes: Iterable[tuple[Line, int]]) -> None:
        now = self._clock.monotonic()
        with self._written:
            for note, count in notes:
                budget = self._budget(note.run)
                budget.noted = now
                budget.dropped = max(0, budget.dropped - count)
                if not budget.dropped:
                    self._dropping.discard(note.run)

    def _tidy(self) -> None:
        """Removes what is over the quota, and once a minute what is too old, in small steps; the rest waits its turn."""
        now = self._clock.monotonic()
        if now >= self._tidy_at:
            old = (
                max(0, int(self._clock.now() / 1000 - self._keep * 1000)) << 20
            )  # run ids begin with their milliseconds
            if not self.file.remove(old):
                self._tidy_at = now + 60.0
        if not self.file.shrink():
            self._some.set()

    def _warn(self, error: Exception) -> None:
        now = self._clock.monotonic()
        if now >= self._warn_at:
            self._warn_at = now + 60.0
            get_logger("eventflow.store.logs").warning(
                "log.failed", path=str(self.file.path), error=str(error), dropped=self.dropped
            )

    # ----------------------------------------------------------------------- reading

    async def read(self, run: int, after: int = 0, limit: int = 1000) -> list[dict[str, Any]]:
        """The run's lines with `seq > after`, oldest first, at most `limit`; what was posted before is among them. Each has
        `seq`, `at` (microseconds), `level`, `logger`, `event`, `fields`, `task`, `attempt`."""
        return await anyio.to_thread.run_sync(self._read, run, after, limit)

    def _read(self, run: int, after: int, limit: int) -> list[dict[str, Any]]:
        self.flush(1.0)
        try:
            return read_lines(self.file.path, run, after, limit)
        except sqlite3.DatabaseError as error:
            if damaged(error):
                self.file.suspect = True
                self._wake()
            self._warn(error)
            return []

    async def follow(
        self, run: int, after: int = 0, *, settled: Callable[[], Awaitable[bool]]
    ) -> AsyncIterator[dict[str, Any]]:
        """`read`, and then each line as it comes, until the run is `settled` and its last line was given."""
        wake = asyncio.Event()
        follower = (asyncio.get_running_loop(), wake)
        with self._written:
            self._followers.add(follower)
        try:
            while True:
                wake.clear()
                last = await settled()
                lines = await self.read(run, after)
                for line in lines:
                    after = line["seq"]
                    yield line
                if last and not lines:
                    return
                if not lines:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(
                            1.0
                        ):  # nobody wakes us when the run settles without a word
                            await wake.wait()
        finally:
            with self._written:
                self._followers.discard(follower)
