"""The limits of one worker: runs at work and the queues before them, runs in memory, bodies of one
task, suspects of a crash.

`Worker` makes one `WorkerLimits`; executions and attempts acquire from it. Everything here is used
on the worker's loop, except `RunCapacity`, which the store's writer thread uses too.
"""

import asyncio
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from eventflow.runs.run import Run
from eventflow.sdk.task import Task

CLAIM_BATCH_SIZE = 500
"""Runs asked for in one claim: enough to share a commit, few enough to stay fair."""

MAX_SUSPECTS = 4
"""Attempts of crash suspects that run at once."""

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

    `in_memory` counts the runs of each flow: `FlowSlots.taken`.
    """

    def __init__(self, in_memory: Counter[str]) -> None:
        self._queues: dict[str, deque[Run]] = {}
        self.turns: deque[str] = deque()
        """The flows that have queued runs, in the order of their turns."""
        self.in_memory = in_memory

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


class FlowSlots:
    """`@flow(concurrency=)`: how many runs of a flow work at once.

    A run in memory has a slot of its flow, unless every branch of it waits: so a parent releases
    its slot to its child of the same flow. A run that works again gets a slot before new runs do.
    `taken` is the count by flow, also of flows without a limit.
    """

    __slots__ = ("_claimed", "_returning", "on_free", "taken")

    def __init__(self, taken: Counter[str]) -> None:
        self.taken = taken
        self.on_free: Callable[[], None] = lambda: None
        self._claimed: Mapping[str, int] = {}
        self._returning: dict[str, deque[Callable[[], None]]] = {}

    def free(self, flow: str, limit: int | None) -> int:
        """How many runs may be claimed."""
        if limit is None:
            return UNBOUNDED
        return max(0, limit - self.taken[flow] - len(self._returning.get(flow, ())))

    def begin_claim(self, counts: Mapping[str, int]) -> None:
        """Reserves so many slots of each flow for a claim under way, until `end_claim`."""
        self._claimed = counts

    def end_claim(self, limits: Callable[[str], int | None]) -> None:
        """Called when the claimed runs have taken their slots."""
        self._claimed = {}
        for flow in list(self._returning):
            self._admit(flow, limits(flow))

    def release(self, flow: str, limit: int | None) -> None:
        """A run ended, or waits from now on."""
        self.taken[flow] -= 1
        if limit is not None:
            self._admit(flow, limit)
            self.on_free()

    def take(self, flow: str, limit: int, on_free: Callable[[], None]) -> bool:
        """A run that waited works again. False: no slot is free; `on_free` is called when the run
        has been given one.
        """
        if self.taken[flow] + self._claimed.get(flow, 0) < limit:
            self.taken[flow] += 1
            return True
        self._returning.setdefault(flow, deque()).append(on_free)
        return False

    def _admit(self, flow: str, limit: int | None) -> None:
        while (waiting := self._returning.get(flow)) and (
            limit is None or self.taken[flow] + self._claimed.get(flow, 0) < limit
        ):
            self.taken[flow] += 1
            on_free = waiting.popleft()
            if not waiting:
                del self._returning[flow]
            on_free()  # a run that has ended meanwhile releases the slot: back here


class RunCapacity:
    """How many more runs may be held in memory. Thread-safe."""

    __slots__ = ("_lock", "free")

    def __init__(self, limit: int) -> None:
        self._lock = threading.Lock()
        self.free = limit

    def reserve(self, count: int) -> bool:
        """Takes room for `count` runs if there is that much."""
        with self._lock:
            if self.free < count:
                return False
            self.free -= count
        return True

    def reserve_some(self, count: int) -> int:
        """Takes room for up to `count` runs. Returns for how many."""
        with self._lock:
            taken = max(0, min(count, self.free))
            self.free -= taken
        return taken

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
        """Acquires every permit, so that a crash during this body cannot be attributed to another
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

    __slots__ = ("_tasks", "capacity", "flow_slots", "slots", "suspects")

    def __init__(self, concurrency: int = 1000, max_in_memory: int = 20_000) -> None:
        self.slots = RunSlots(concurrency)
        self.capacity = RunCapacity(max_in_memory)
        self.suspects = CrashSuspectGate()
        self.flow_slots = FlowSlots(Counter())
        self._tasks: dict[tuple[str, str, str], asyncio.Semaphore] = {}

    def for_task(self, task: Task[..., Any]) -> asyncio.Semaphore | None:
        """The limit `@task(concurrency=)`, shared by all calls of the task in this process; by
        tasks of another name or module it is not.
        """
        limit = task.options.concurrency
        if limit is None:
            return None
        return self._tasks.setdefault(task.identity, asyncio.Semaphore(limit))
