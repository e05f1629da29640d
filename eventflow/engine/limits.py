"""The limits of one worker: runs at work and the queues before them, runs in memory, bodies of one
task, suspects of a crash.

`Worker` makes one `WorkerLimits`; executions and attempts acquire from it. Everything here is used
on the worker's loop, except `RunCapacity`, which the store's writer thread uses too.
"""

import asyncio
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

from eventflow.runs.run import Run
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
        """Runs with a slot; may exceed the limit when idle runs work again."""
        self.committing = 0
        """Runs whose outcome is posted and not yet durable."""
        self.on_release: Callable[[], None] = lambda: None

    @property
    def is_free(self) -> bool:
        return self.working < min(self._limit, 2 * self._limit - self.committing)

    def release(self) -> None:
        self.working -= 1
        self.on_release()

    def begin_commit(self, *, holds_slot: bool) -> None:
        """The run's flow has ended; its outcome is posted. Others need not wait for the commit."""
        self.committing += 1
        if holds_slot:
            self.working -= 1
            self.on_release()


class RunQueues:
    """Runs in memory that wait for a slot, one queue per flow; flows take turns.

    `in_memory` counts the runs of each flow, queued or executing; `Worker` subtracts those that
    leave.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Run]] = {}
        self.turns: deque[str] = deque()
        """The flows that have queued runs, in the order of their turns."""
        self.in_memory: Counter[str] = Counter()

    def add(self, run: Run) -> None:
        queue = self._queues.get(run.flow)
        if queue is None:
            queue = self._queues[run.flow] = deque()
        if not queue:
            self.turns.append(run.flow)
        queue.append(run)
        self.in_memory[run.flow] += 1

    def pop(self) -> Run | None:
        """The oldest run of the flow whose turn it is."""
        if not self.turns:
            return None
        flow = self.turns.popleft()
        queue = self._queues[flow]
        run = queue.popleft()
        if queue:
            self.turns.append(flow)
        return run

    def clear(self) -> list[Run]:
        """Removes all queued runs and returns them."""
        runs = [run for queue in self._queues.values() for run in queue]
        self._queues.clear()
        self.turns.clear()
        return runs

    def find(self, ident: int) -> Run | None:
        for queue in self._queues.values():
            for run in queue:
                if run.id == ident:
                    return run
        return None

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())


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
