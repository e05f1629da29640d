"""One run under a discrete-event simulation: seeded delays, commits at seeded times, a crash after
any of them.

A `SeededRun` is clock and store of the run's Execution. Bodies and commits take virtual time drawn
from a seed, so that each seed is another interleaving. `recorded` is the journal of an earlier
play: then only what that journal holds is committed, batch by batch in its order, and a resumed run
must return the same result as the uncrashed one.
"""

import asyncio
import heapq
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, cast

from eventflow.core.threads import DaemonThreads
from eventflow.engine.execution import Execution
from eventflow.engine.limits import WorkerLimits
from eventflow.engine.worker_services import WorkerServices
from eventflow.runs.journal import Entry, Journal
from eventflow.runs.run import Outcome, Run
from eventflow.sdk.checkpoint import CheckpointStore
from eventflow.sdk.flow import Flow
from eventflow.serialization.blobs import Blobs
from eventflow.store.protocol import Append, Appended, Settle

START_TIME = 1_700_000_000_000_000

MAX_TURNS = 100_000
"""Of a loop with nothing but its own callbacks to wait for."""


class Crash(Exception):
    """The simulated process crashed."""


class _Timer:
    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class SeededRun:
    """Clock and store of one run. `play` runs it to its outcome, or to a crash after `crash_after`
    commits.

    `kept` is the journal so far; it grows with each commit.
    """

    failed = None
    blobs = Blobs(Path("/nonexistent"))  # nothing here is large
    checkpoints = CheckpointStore(Path("/nonexistent"))  # no checkpoints either

    def __init__(
        self,
        seed: int,
        kept: Sequence[Entry] = (),
        recorded: Sequence[Entry] = (),
        crash_after: int | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.kept = list(kept)
        self.batch = max((entry.batch for entry in kept), default=0)
        self.time = max((entry.at for entry in kept), default=START_TIME)
        self.recorded = _by_batch(recorded, after=self.batch)
        self.crash_after = crash_after
        self.bodies: Counter[str] = Counter()
        self.outcome: Outcome | None = None
        self._events: list[tuple[int, int, _Timer]] = []
        self._order = count()
        self._posted: list[tuple[Any, Callable[[Any], None]]] = []

    def play(self, flow: Flow[..., Any]) -> Outcome | None:
        """The run's outcome; None after a crash."""
        return asyncio.run(self._play(flow))

    async def _play(self, flow: Flow[..., Any]) -> Outcome | None:
        self.loop = asyncio.get_running_loop()
        services = WorkerServices(
            store=cast(Any, self),
            clock=self,
            derived=cast(Any, None),  # nothing is emitted here, and no child runs
            blobs=self.blobs,
            checkpoints=self.checkpoints,
            limits=WorkerLimits(),
            threads=DaemonThreads(1, "replay"),
            rng=self.rng,
            secret=b"",
        )
        services.start(self.loop)
        run = Run(
            id=7,
            flow=flow.name,
            created_at=START_TIME,
            due_at=START_TIME,
            started_at=START_TIME,
            token=1,
        )
        journal = Journal(self.kept) if self.kept else None
        self.execution = Execution(services, run, flow, journal, self._on_settled)
        self.loop.call_soon(self.execution.begin)
        try:
            while self.outcome is None:
                await self._settle_loop()
                if self.outcome is None and not self._step():
                    waiting = list(self.execution.pending.waiting)
                    raise AssertionError(
                        f"stuck: {self.recorded[:1]} wanted, posted {self._posted}, waiting "
                        f"{waiting}"
                    )
        except Crash:
            pass
        finally:
            self.execution.run_end.is_closed = True
            self.execution.loop.close()
        for task in asyncio.all_tasks(self.loop):
            if task is not asyncio.current_task():
                task.cancel()
        return self.outcome

    async def _settle_loop(self) -> None:
        """Runs the loop until nothing is ready."""
        for _ in range(MAX_TURNS):
            await asyncio.sleep(0)
            if not self.loop._ready:  # type: ignore[attr-defined]
                return
        raise AssertionError(f"the flow still spins after {MAX_TURNS} turns of its loop")

    def _step(self) -> bool:
        while self._events:
            due, _, timer = heapq.heappop(self._events)
            if timer.call is not None:
                self.time = max(self.time, due)
                timer.call()
                return True
        return self._commit() if self._posted else False

    # ----------------------------------------------------------------- clock

    def now(self) -> int:
        return self.time

    def monotonic(self) -> float:
        return self.time / 1e6

    def timer(
        self, loop: asyncio.AbstractEventLoop, due_us: int, call: Callable[[], None]
    ) -> _Timer:
        timer = _Timer(call)
        heapq.heappush(self._events, (due_us, next(self._order), timer))
        return timer

    async def spend(self, longest: float = 3.0) -> None:
        """Takes some virtual time, as the work of a task body."""
        done = self.loop.create_future()
        due = self.time + int(self.rng.random() * longest * 1e6)
        self.timer(self.loop, due, lambda: None if done.done() else done.set_result(None))
        await done

    # ----------------------------------------------------------------- store

    def post(self, op: Any, reply: Callable[[Any], None], loop: asyncio.AbstractEventLoop) -> None:
        if isinstance(op, Settle):
            self.kept.extend(op.entries)
            self.outcome = op.outcome
            return
        self._posted.append((op, reply))
        self.timer(self.loop, self.time + int(self.rng.expovariate(1.0) * 4e5), self._commit)  # pyright: ignore

    def _commit(self) -> bool:
        """One group commit of everything posted, or of the next recorded batch once all of it is
        posted.
        """
        chosen = self._next_recorded() if self.recorded else self._posted
        if not chosen:
            return False
        self._posted = [pair for pair in self._posted if pair not in chosen]
        self.batch = self.recorded.pop(0)[0] if self.recorded else self.batch + 1
        entries = [entry for op, _ in chosen for entry in op.entries]
        if self.crash_after is not None:
            self.crash_after -= 1
            if self.crash_after < 0:
                raise Crash
        for pos, entry in enumerate(entries):
            entry.batch = self.batch
            entry.position = pos
            entry.at = entry.at or self.time
            self.kept.append(entry)
        for op, reply in chosen:
            reply(Appended(self.batch, self.time, op.entries))
        return True

    def _next_recorded(self) -> list[tuple[Append, Callable[[Any], None]]]:
        _, at, wanted = self.recorded[0]
        posted = {
            (entry.call_key, entry.kind, entry.attempt): pair
            for pair in self._posted
            for entry in pair[0].entries
        }
        if not all(identity in posted for identity in wanted):
            return []
        self.time = max(self.time, at)
        chosen: list[tuple[Append, Callable[[Any], None]]] = []
        for identity in wanted:
            if posted[identity] not in chosen:
                chosen.append(posted[identity])
        return chosen

    def _on_settled(self, execution: Execution, outcome: Outcome, reply: Any) -> None:
        raise AssertionError(f"expected no reply to a Settle here, found one to {outcome}")


def _by_batch(
    entries: Sequence[Entry], after: int
) -> list[tuple[int, int, list[tuple[str, int, int]]]]:
    """`(batch, time, identities)` of what is left to commit, in order."""
    batches: dict[int, tuple[int, int, list[tuple[str, int, int]]]] = {}
    for entry in entries:
        if entry.batch > after:
            row = batches.setdefault(entry.batch, (entry.batch, entry.at, []))
            row[2].append((entry.call_key, entry.kind, entry.attempt))
    return [batches[batch] for batch in sorted(batches)]
