"""The log store: the lines of runs, in a separate file, so that no flood of lines touches a
journal.

log.py posts lines from any thread; one thread here writes them, some thousand per transaction, and
only that thread writes the file (file.py). The API and the CLI use `read` and `follow`. Each run
may store `per_second` lines a second and `per_run` lines, and all runs together `quota_bytes` (the
lines of the oldest runs are removed first). What was not stored is counted, and the count is a line
of the run. If the disk is full or the file fails, lines are dropped, counted, and a warning is
logged.
"""

import asyncio
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from logging import WARNING
from pathlib import Path
from typing import Any, Final

import msgspec
import orjson

from eventflow.core.clock import Clock
from eventflow.core.forks import call_in_forked_children
from eventflow.logs.file import LogFile, is_damage, read_lines
from eventflow.logs.log import LogLine, get_logger

LOG_EVENTS = {
    "log.dropped": (
        "Log lines were dropped (`lines`): a quota was exceeded, or the disk or log file failed."
    ),
    "log.failed": "The log store cannot write; lines are dropped and counted, runs continue.",
}

WRITE_DELAY_SECONDS: Final = 0.05
"""How long the writer collects lines: at most twenty transactions a second."""

MAX_QUEUED_LINES: Final = 20_000
MAX_QUEUED_BYTES: Final = 16 << 20
"""What may wait for the writer."""

MAX_RUN_QUOTAS: Final = 20_000
"""Quotas in memory. The run that was silent longest is forgotten first, and then starts with a full
one.
"""

WARNING_INTERVAL_SECONDS: Final = 60.0
"""Between two `log.failed` lines."""


class LogQuota(msgspec.Struct):
    """What one run may still log. `lines` and `size` belong to the writer thread; -1: not yet read
    from the file.
    """

    tokens: float  # lines that may come at once
    refilled_at: float
    dropped: int = 0  # since the last note
    noted_at: float = float("-inf")
    lines: int = -1
    size: int = 0


class RunQuotas:
    """The quotas of all runs. Every method is called with the lock of the `LogStore`."""

    def __init__(self, clock: Clock, *, per_second: int, per_run: int, per_run_bytes: int) -> None:
        self.dropped = 0  # lines of all runs
        self.dropping: set[int] = set()  # runs with dropped lines that are not noted yet
        self._clock = clock
        self._per_second = per_second
        self._per_run = per_run
        self._per_run_bytes = per_run_bytes
        self._quotas: OrderedDict[int, LogQuota] = OrderedDict()

    def of(self, run: int) -> LogQuota:
        quota = self._quotas.get(run)
        if quota is not None:
            self._quotas.move_to_end(run)
            return quota
        quota = self._quotas[run] = LogQuota(self._per_second, self._clock.monotonic())
        if len(self._quotas) > MAX_RUN_QUOTAS:
            oldest, _ = self._quotas.popitem(last=False)
            self.dropping.discard(oldest)
        return quota

    def take_token(self, run: int) -> bool:
        """Whether the rate of the run permits a line now."""
        now = self._clock.monotonic()
        quota = self._quotas.get(run)
        if quota is None:
            quota = self.of(run)
        else:
            self._quotas.move_to_end(run)
            refill = (now - quota.refilled_at) * self._per_second
            quota.tokens = min(self._per_second, quota.tokens + refill)
            quota.refilled_at = now
        if quota.tokens < 1:
            return False
        quota.tokens -= 1
        return True

    def is_full(self, quota: LogQuota, level: int) -> bool:
        """Whether the run has stored all it may. Warnings may take a tenth more: the last lines of
        a noisy run show why it failed.
        """
        tenths = 11 if level >= WARNING else 10
        return (
            10 * quota.lines >= self._per_run * tenths
            or 10 * quota.size >= self._per_run_bytes * tenths
        )

    def drop(self, run: int) -> None:
        self.of(run).dropped += 1
        self.dropped += 1
        self.dropping.add(run)

    def notes_due(self, *, now: float | None) -> list[tuple[int, int]]:
        """(run, dropped lines) of each run whose last note is a second old; of all runs for
        None.
        """
        return [
            (run, quota.dropped)
            for run in self.dropping
            if (quota := self._quotas.get(run)) and (now is None or now - quota.noted_at >= 1.0)
        ]

    def noted(self, run: int, dropped: int) -> None:
        quota = self.of(run)
        quota.noted_at = self._clock.monotonic()
        quota.dropped = max(0, quota.dropped - dropped)
        if not quota.dropped:
            self.dropping.discard(run)


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
        self.file = LogFile(
            Path(path), clock, quota=quota_bytes, keep_seconds=keep_seconds, floor=floor_bytes
        )
        self._clock = clock
        self._quotas = RunQuotas(
            clock, per_second=per_second, per_run=per_run, per_run_bytes=per_run_bytes
        )
        self._lock = threading.Lock()  # of all that follows
        self._written = threading.Condition(self._lock)
        self._queue: list[LogLine] = []
        self._queued_bytes = 0
        self._posted = 0  # lines ever queued
        self._done = 0  # of these, written or dropped
        self._has_work = threading.Event()
        self._write_now = threading.Event()
        self._closing = threading.Event()
        self._followers: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._next_warning_at = float("-inf")
        self._thread: threading.Thread | None = None
        call_in_forked_children(self._after_fork)

    @property
    def dropped(self) -> int:
        """How many lines were not stored since the start."""
        return self._quotas.dropped

    def open(self) -> None:
        """Start the writer. It creates the file with the first line; errors of the file are never
        raised.
        """
        self._thread = threading.Thread(target=self._run, name="eventflow-log-store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what was posted. Idempotent."""
        self._closing.set()
        self._wake()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # ----------------------------------------------------------------------- writing

    @property
    def is_alive(self) -> bool:
        """Whether lines are written, or the store is closed."""
        return self._thread is None or self._thread.is_alive()

    def post(self, line: LogLine) -> None:
        """Queue a line; it is dropped if its run is over its rate or the queue is full. Never
        blocks or raises.
        """
        size = _size(line) + 100
        with self._lock:
            if (
                not self._quotas.take_token(line.run)
                or len(self._queue) >= MAX_QUEUED_LINES
                or self._queued_bytes + size > MAX_QUEUED_BYTES
                or self._closing.is_set()
            ):
                self._quotas.drop(line.run)
            else:
                self._queue.append(line)
                self._queued_bytes += size
                self._posted += 1
        if not self._has_work.is_set():
            self._has_work.set()

    def _after_fork(self) -> None:
        """A forked child stores no lines: the file is its parent's."""
        self._lock = threading.Lock()
        self._written = threading.Condition(self._lock)
        self._has_work = threading.Event()
        self._write_now = threading.Event()
        self._closing = threading.Event()
        self._closing.set()
        self._queue = []
        self._thread = None

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until everything posted before is written or dropped. False after `timeout`
        seconds.
        """
        with self._lock:
            posted = self._posted
            self._wake()
            return self._thread is None or self._written.wait_for(
                lambda: self._done >= posted, timeout
            )

    def _wake(self) -> None:
        self._write_now.set()
        self._has_work.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._has_work.wait(1.0 if self._quotas.dropping else 60.0)
            self._write_now.wait(WRITE_DELAY_SECONDS)
            self._write_now.clear()
            self._has_work.clear()
            self._write_queued()
        self._write_queued()
        self.file.close()

    def _write_queued(self) -> None:
        """Write the queued lines and notes of dropped ones in one transaction, then apply the quota
        of the file.
        """
        with self._lock:
            lines = self._queue
            self._queue = []
            self._queued_bytes = 0
        try:
            self._write(lines)
            if not self.file.tidy():
                self._has_work.set()
        except (sqlite3.Error, OSError) as error:
            self._warn(error)
        with self._lock:
            self._done += len(lines)
            self._written.notify_all()
            followers = list(self._followers)
        for loop, event in followers:
            with suppress(RuntimeError):  # that loop is closed, and with it its follower
                loop.call_soon_threadsafe(event.set)

    def _write(self, lines: Sequence[LogLine]) -> None:
        accepted: list[LogLine] = []
        try:
            if lines:
                self.file.check_free_space()
            accepted = self._within_quotas(lines)
            now = None if self._closing.is_set() else self._clock.monotonic()
            with self._lock:
                notes = self._quotas.notes_due(now=now)
            if accepted or notes:
                self.file.write([*accepted, *(self._note(run, count) for run, count in notes)])
            with self._lock:
                for run, count in notes:
                    self._quotas.noted(run, count)
        except (sqlite3.Error, OSError):
            with self._lock:
                for line in accepted or lines:
                    self._quotas.drop(line.run)
            raise

    def _within_quotas(self, lines: Sequence[LogLine]) -> list[LogLine]:
        """Counts each line in the quota of its run. Those of a run whose quota is full are
        dropped, the others returned.
        """
        with self._lock:
            quotas = [self._quotas.of(line.run) for line in lines]
        unread = {line.run for line, quota in zip(lines, quotas, strict=True) if quota.lines < 0}
        stored = self.file.stored_sizes(unread) if unread else {}
        accepted: list[LogLine] = []
        for line, quota in zip(lines, quotas, strict=True):
            if quota.lines < 0:
                stored_lines, stored_size = stored.get(line.run, (0, 0))
                quota.lines = stored_lines
                quota.size = stored_size
            if self._quotas.is_full(quota, line.level):
                with self._lock:
                    self._quotas.drop(line.run)
            else:
                quota.lines += 1
                quota.size += _size(line)
                accepted.append(line)
        return accepted

    def _note(self, run: int, dropped: int) -> LogLine:
        fields = orjson.dumps({"lines": dropped})
        at = self._clock.now()
        return LogLine(run, at, WARNING, "eventflow.store.logs", "log.dropped", fields)

    def _warn(self, error: Exception) -> None:
        now = self._clock.monotonic()
        if now >= self._next_warning_at:
            self._next_warning_at = now + WARNING_INTERVAL_SECONDS
            get_logger("eventflow.store.logs").warning(
                "log.failed", path=str(self.file.path), error=str(error), dropped=self.dropped
            )

    # ----------------------------------------------------------------------- reading

    async def read(self, run: int, after: int = 0, limit: int = 1000) -> list[dict[str, Any]]:
        """The lines of a run with `seq > after`, oldest first, at most `limit`, including those
        just posted.

        Each has `seq`, `at` (microseconds), `level`, `logger`, `event`, `fields`, `task`,
        `attempt`.
        """
        return await asyncio.to_thread(self._read, run, after, limit)

    def _read(self, run: int, after: int, limit: int) -> list[dict[str, Any]]:
        self.flush(1.0)
        try:
            return read_lines(self.file.path, run, after, limit)
        except sqlite3.DatabaseError as error:
            if is_damage(error):
                self.file.damage_reported = True
                self._wake()
            self._warn(error)
            return []

    async def follow(
        self, run: int, after: int = 0, *, settled: Callable[[], Awaitable[bool]]
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the lines of `read`, then each new line, until the run is `settled` and its last
        line was yielded.
        """
        wake = asyncio.Event()
        follower = (asyncio.get_running_loop(), wake)
        with self._lock:
            self._followers.add(follower)
        try:
            while True:
                wake.clear()
                is_last = await settled()
                lines = await self.read(run, after)
                for line in lines:
                    after = line["seq"]
                    yield line
                if is_last and not lines:
                    return
                if not lines:
                    # Nothing wakes this when the run settles without a line.
                    with suppress(TimeoutError):
                        async with asyncio.timeout(1.0):
                            await wake.wait()
        finally:
            with self._lock:
                self._followers.discard(follower)


def _size(line: LogLine) -> int:
    return len(line.event) + (len(line.fields) if line.fields else 0)
