"""Helpers of the store's tests: arrivals, runs, a clock that is set by the test, and a worker
that takes by hand.

All on a real SqliteStore in a real file. `Ledger` posts ops and awaits them; the fixture in
conftest.py audits the ledger after every test.
"""

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eventflow.core.clock import SystemClock
from eventflow.events.event import Json
from eventflow.runs.journal import Entry, Kind
from eventflow.runs.run import Completed, Ids, Outcome, Run
from eventflow.store.protocol import (
    Append,
    Arrival,
    Claim,
    Claimed,
    MarkStarted,
    Op,
    RecordEvents,
    Settle,
)
from eventflow.store.sqlite import SqliteStore

SECOND = 1_000_000


class ManualClock(SystemClock):
    """Stands where the test puts it; monotonic time runs on, but no wait goes by it."""

    monotonic_timer: Any = None

    def __init__(self, now: int = 1_800_000_000 * SECOND) -> None:
        self.time = now

    def now(self) -> int:
        return self.time

    def forward(self, seconds: float) -> None:
        self.time += int(seconds * SECOND)


class RecordingWorker:
    """A worker that reserves at most `capacity` runs and keeps what it receives."""

    def __init__(self, loop: asyncio.AbstractEventLoop, capacity: int = 1_000_000) -> None:
        self.loop = loop
        self.capacity = capacity
        self.runs: list[Run] = []
        self.returned: list[Run] = []
        self.cancels: list[int] = []
        self.due_reports = 0
        self.answers: list[tuple[int, Entry]] = []

    def reserve(self, runs: Sequence[Run]) -> Sequence[Run]:
        reserved = runs[: max(0, self.capacity)]
        self.capacity -= len(runs)
        return reserved

    def receive_answers(self, answers: Sequence[tuple[int, Entry]]) -> None:
        self.answers.extend(answers)

    def receive_runs(self, runs: Sequence[Run], has_due: bool, cancels: Mapping[int, str]) -> None:
        self.runs += runs
        self.cancels += cancels
        self.due_reports += has_due

    def release(self, runs: Sequence[Run]) -> None:
        self.returned += runs


class Ledger:
    """A store, and short words for what the tests do with it."""

    def __init__(self, store: SqliteStore, clock: ManualClock) -> None:
        self.store = store
        self.clock = clock
        self.ids = Ids(store.last_id)

    def run(self, flow: str = "f", **fields: Any) -> Run:
        now = self.clock.now()
        given: dict[str, Any] = {"subscription": "s", "created_at": now, "due_at": now, **fields}
        return Run(id=self.ids.next(now), flow=flow, **given)

    def arrival(
        self,
        name: str,
        *runs: Run,
        body: bytes = b'{"n":1}',
        dead: Sequence[tuple[str, str]] = (),
        suppressed: int = 0,
        trigger: str = "t",
        type: str = "x",
    ) -> Arrival:
        counts = {"pending": len(runs), "dead": len(dead), "suppressed": suppressed}
        return Arrival(
            id=self.ids.next(self.clock.now()),
            trigger=trigger,
            key=hashlib.sha256(f"{trigger}/{name}".encode()).digest()[:16],
            digest=hashlib.sha256(body).digest()[:8],
            event_id=name,
            source="/s",
            type=type,
            body=body,
            verdicts=b"[]",
            received_at=self.clock.now(),
            counts={column: n for column, n in counts.items() if n},
            runs=runs,
            dead_letters=dead,
        )

    async def do(self, op: Op) -> Any:
        """One posted op, awaited."""
        (reply,) = await self.together(op)
        return reply

    async def together(self, *ops: Op) -> list[Any]:
        """Ops posted in one go; their replies in order."""
        loop = asyncio.get_running_loop()
        waits: list[asyncio.Future[Any]] = [loop.create_future() for _ in ops]
        for op, wait in zip(ops, waits, strict=True):
            self.store.post(op, wait.set_result, loop)
        return await asyncio.gather(*waits)

    async def recorded(self, *runs: Run, name: str | None = None) -> Sequence[Run]:
        """Runs of one fresh event, recorded."""
        await self.store.record([self.arrival(name or f"e{self.ids.next(0)}", *runs)], trigger="t")
        return runs

    async def claimed(
        self, limit: int = 100, caps: Mapping[str, int] | None = None
    ) -> Sequence[Run]:
        reply: Claimed = await self.do(Claim(limit, caps or {}))
        return reply.runs

    async def running(self, flow: str = "f", **fields: Any) -> Run:
        """One run, recorded and claimed."""
        await self.recorded(self.run(flow, **fields))
        (run,) = await self.claimed()
        return run

    async def append(self, run: Run, *entries: Entry, **fields: Any) -> Any:
        return await self.do(Append(run.id, run.token, entries, **fields))

    async def mark(self, run: Run) -> Any:
        return await self.do(MarkStarted(run.id, run.token))

    async def settle(self, run: Run, outcome: Outcome | None = None, **fields: Any) -> Any:
        return await self.do(Settle(run.id, run.token, outcome or Completed(b"1"), **fields))

    async def state(self, run: Run) -> str:
        return (await self.store.run(run.id))["state"]

    async def record(self, *arrivals: Arrival, cursor: Mapping[str, Json] | None = None) -> Any:
        return await self.do(RecordEvents(arrivals, "t", cursor))


def value(claim: str = "a#1", data: bytes = b"1", attempt: int = 1) -> Entry:
    return Entry(call_key=claim, kind=Kind.VALUE, attempt=attempt, codec="json", value=data)


def error(claim: str = "a#1", attempt: int = 1) -> Entry:
    return Entry(call_key=claim, kind=Kind.ERROR, attempt=attempt, error=b'{"type":"ValueError"}')


Reopen = Callable[[], Ledger]
