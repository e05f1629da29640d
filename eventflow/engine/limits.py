"""The limits of one worker: runs at work, runs in memory, bodies of one task, suspects of a crash.

`Worker` makes one `WorkerLimits`; executions and attempts acquire from it. Everything here is used
on the worker's loop, except `RunCapacity`, which the store's writer thread uses too.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

from eventflow.sdk.task import Task

CLAIM_BATCH_SIZE = 500
"""Runs asked for in one claim: enough to share a commit, few enough to stay fair."""

MAX_SUSPECTS = 4
"""Suspects of a crash whose attempts run at once."""

UNBOUNDED = 1 << 30


class RunSlots:
    """Bounds the runs that work at once.

    A run holds a slot from its start until every branch of it waits, or until its flow has ended.
    As many runs again may wait for the commit of their outcome, so that memory stays bounded on a
    disk that hangs.
    """

    __slots__ = ("_limit", "committing", "on_release", "working")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.working = 0
        self.committing = 0
        """Runs whose outcome is posted and not yet durable."""
        self.on_release: Callable[[], None] = lambda: None

    @property
    def is_free(self) -> bool:
        return self.working < min(self._limit, 2 * self._limit - self.committing)

    def acquire(self) -> None:
        """Takes a slot, also beyond the limit: a run that was idle works again."""
        self.working += 1

    def release(self) -> None:
        self.working -= 1
        self.on_release()

    def begin_commit(self, *, holds_slot: bool) -> None:
        """The run's flow has ended; its outcome is posted. Others need not wait for the commit."""
        self.committing += 1
        if holds_slot:
            self.release()


class RunCapacity:
    """How many more runs may be held in memory. Thread-safe."""

    __slots__ = ("_lock", "free")

    def __init__(self, limit: int) -> None:
        self._lock = threading.Lock()
        self.free = limit

    def reserve(self, count: int = 1) -> bool:
        """Takes `count` places if there are that many."""
        with self._lock:
            if self.free < count:
                return False
            self.free -= count
        return True

    def release(self, count: int = 1) -> None:
        with self._lock:
            self.free += count

    def set_blocked(self, blocked: bool) -> None:
        """Makes every `reserve` fail until unblocked. Call it once for each change."""
        self.release(-UNBOUNDED if blocked else UNBOUNDED)

    @property
    def is_tight(self) -> bool:
        """Whether memory is nearly full: runs that only wait should leave it."""
        return self.free < CLAIM_BATCH_SIZE


class CrashSuspectGate(asyncio.Semaphore):
    """Bounds the bodies of runs that a crash left in flight: `async with gate`, or
    `gate.exclusive()`.

    `exclusive` is for runs that one more crash puts into quarantine. It opens at `exclusive_from`
    (the loop's time): repeated kills from outside must not quarantine a healthy run, and the other
    runs proceed meanwhile.
    """

    def __init__(self, limit: int = MAX_SUSPECTS, exclusive_from: float = 0.0) -> None:
        super().__init__(limit)
        self.exclusive_from = exclusive_from
        self._limit = limit
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def exclusive(self) -> AsyncGenerator[None]:
        """Acquires every place, so that a crash during this body cannot be attributed to another
        suspect.
        """
        await asyncio.sleep(max(0.0, self.exclusive_from - asyncio.get_running_loop().time()))
        acquired = 0
        async with self._turn:  # two that each hold half would wait for ever
            try:
                while acquired < self._limit:
                    await self.acquire()
                    acquired += 1
                yield
            finally:
                for _ in range(acquired):
                    self.release()


class WorkerLimits:
    """All limits of one worker."""

    __slots__ = ("_tasks", "capacity", "slots", "suspects")

    def __init__(self, concurrency: int = 1000, max_in_memory: int = 20_000) -> None:
        self.slots = RunSlots(concurrency)
        self.capacity = RunCapacity(max_in_memory)
        self.suspects = CrashSuspectGate()
        self._tasks: dict[str, asyncio.Semaphore] = {}

    def for_task(self, task: Task[..., Any]) -> asyncio.Semaphore | None:
        """The limit `@task(concurrency=)`, shared by all calls of the task's name in this
        process.
        """
        limit = task.options.concurrency
        if limit is None:
            return None
        return self._tasks.setdefault(task.name, asyncio.Semaphore(limit))
