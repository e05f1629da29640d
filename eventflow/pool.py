"""What the executions of one worker share: its loop, clock, store, threads, and what only it can decide.

The worker is it; the executor, the claims and the attempts of each run ask it. `execution` is the Execution
that asks.
"""

import asyncio
import random
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from eventflow.blobs import Blobs
from eventflow.clock import Clock
from eventflow.errors import StoreError
from eventflow.flow import Flow
from eventflow.log import Sink
from eventflow.run import Outcome, Run
from eventflow.store.base import Arrival, Refused, Settled, Store
from eventflow.task import Call


class Pool(Protocol):
    """What the executions of one worker share; the worker is it."""

    loop: asyncio.AbstractEventLoop
    store: Store
    clock: Clock
    draw: random.Random
    threads: ThreadPoolExecutor
    blobs: Blobs
    state: Any
    flows: Mapping[str, Flow[..., Any]]
    suspects: asyncio.Semaphore
    draining: bool
    sink: Sink | None
    secret: bytes
    """Signs what tasks pickle; never in the store."""

    def emitted(self, run: Run, ident: str, event_type: str, fields: dict[str, Any]) -> Arrival:
        """An event that a run emits, matched and ready to record."""
        ...

    def child(self, run: Run, claim: str, flow: Flow[..., Any], params: bytes) -> Run: ...

    def slots(self, call: Call) -> asyncio.Semaphore | None:
        """The task's concurrency limit."""
        ...

    def soon(self, execution: Any) -> None:
        """Pump this execution once the replies of the batch under way have all been given."""
        ...

    def idle(self, execution: Any, idle: bool) -> None:
        """Every branch waits (idle), or works again: an idle run holds no slot."""
        ...

    def settled(self, execution: Any, outcome: Outcome, reply: Settled | Refused | StoreError) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs `work` as a task that the worker owns."""
        ...
