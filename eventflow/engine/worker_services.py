"""What the executions of one worker share: its loop, clock, store, threads, and what only it can decide.

The worker is it; the executor, the claims and the attempts of each run ask it. `execution` is the Execution
that asks.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Protocol

from eventflow.core.clock import Clock
from eventflow.core.errors import StoreError
from eventflow.logs.log import Sink
from eventflow.runs.run import Outcome, Run
from eventflow.sdk.checkpoint import CheckpointStore
from eventflow.sdk.flow import Flow
from eventflow.sdk.task import TaskCall
from eventflow.serialization.blobs import Blobs
from eventflow.store.protocol import Arrival, Refused, Settled, Store


class CrashSuspectGate(asyncio.Semaphore):
    """The gate before the bodies of runs that a crash left in flight: `async with` it, few at a time, or `alone()`.

    `alone` is for those that one more death puts into quarantine. It opens at `calm_at` (the loop's time): whoever kills this
    process again and again from outside must not condemn a healthy run, and the others get on meanwhile.
    """

    def __init__(self, places: int = 4, calm_at: float = 0.0) -> None:
        super().__init__(places)
        self._places, self._calm_at = places, calm_at
        self._next = asyncio.Lock()

    @asynccontextmanager
    async def exclusive(self) -> AsyncGenerator[None]:
        """All places at once: no other suspect's crash can be laid at this one's door."""
        await asyncio.sleep(max(0.0, self._calm_at - asyncio.get_running_loop().time()))
        taken = 0
        async with self._next:  # two that each held half would wait for ever
            try:
                while taken < self._places:
                    await self.acquire()
                    taken += 1
                yield
            finally:
                for _ in range(taken):
                    self.release()


class Pool(Protocol):
    """What the executions of one worker share; the worker is it."""

    loop: asyncio.AbstractEventLoop
    store: Store
    clock: Clock
    draw: random.Random
    threads: ThreadPoolExecutor
    blobs: Blobs
    checkpoints: CheckpointStore
    state: Any
    flows: Mapping[str, Flow[..., Any]]
    suspects: CrashSuspectGate
    draining: bool
    sink: Sink | None
    secret: bytes
    """Signs what tasks pickle; never in the store."""

    def emitted(self, run: Run, ident: str, event_type: str, fields: dict[str, Any]) -> Arrival:
        """An event that a run emits, matched and ready to record."""
        ...

    def child(self, run: Run, claim: str, flow: Flow[..., Any], params: bytes) -> Run: ...

    def slots(self, call: TaskCall) -> asyncio.Semaphore | None:
        """The task's concurrency limit."""
        ...

    def soon(self, execution: Any) -> None:
        """Pump this execution once the replies of the batch under way have all been given."""
        ...

    def idle(self, execution: Any, idle: bool) -> None:
        """Every branch waits (idle), or works again: an idle run holds no slot."""
        ...

    def ending(self, execution: Any) -> None:
        """Its flow has ended; what is left is the commit of its outcome, for which others need not wait: its slot is free."""
        ...

    def settled(
        self, execution: Any, outcome: Outcome, reply: Settled | Refused | StoreError
    ) -> None: ...

    def forget(self, run: str, claim: str | None = None) -> None:
        """A call's value is durable, or its run completed: its checkpoints go."""
        ...

    @property
    def is_crowded(self) -> bool:
        """Memory is nearly full: who only waits should leave it."""
        ...

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs `work` as a task that the worker owns."""
        ...
