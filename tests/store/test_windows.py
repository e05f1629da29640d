"""Windows in the store: whatever comes, is claimed, cancelled or lost to a crash, events and runs
agree with a plain model.
"""

import random
from collections.abc import Sequence

import msgspec
import orjson
import pytest

from eventflow.runs.run import Run
from eventflow.store.protocol import Arrival, BatchPolicy
from tests.store.ledger import SECOND, Ledger, Reopen

pytestmark = pytest.mark.anyio

MODES = {
    "batch": BatchPolicy("batch", size=3, wait=10 * SECOND, max_wait=10 * SECOND),
    "debounce": BatchPolicy(
        "debounce", size=50, wait=4 * SECOND, max_wait=9 * SECOND, is_extended=True
    ),
    "singleflight": BatchPolicy("singleflight", size=50),
}


class Window(msgspec.Struct):
    """The model's run: which events are in it, and when it is due."""

    events: list[int]
    opened: int
    due: int
    begun: bool = False
    ended: bool = False


class Model:
    """What the store should do with the events of one mode, as a simple model."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.policy = MODES[mode]
        self.runs: dict[int, Window] = {}
        self.last: dict[str, int] = {}

    def arrive(self, key: str, event: int, run: int, now: int) -> int:
        """The run that this event is in."""
        policy, known = self.policy, self.last.get(key)
        window = self.runs[known] if known is not None else None
        if (
            known is None
            or window is None
            or window.begun
            or window.ended
            or len(window.events) >= policy.size
        ):
            self.last[key] = run
            self.runs[run] = Window([event], now, now + policy.wait)
            return run
        window.events.append(event)
        if len(window.events) >= policy.size:
            window.due = now
        elif policy.is_extended:
            window.due = min(now + policy.wait, window.opened + policy.max_wait)
        return known

    def due(self, now: int) -> set[int]:
        return {
            run
            for run, window in self.runs.items()
            if not window.begun and not window.ended and window.due <= now
        }


class Story:
    """One seed's events, claims, ends and crashes, on the store and on the model."""

    def __init__(self, ledger: Ledger, reopen: Reopen, mode: str, seed: int) -> None:
        self.ledger = ledger
        self.reopen = reopen
        self.draw = random.Random(seed)
        self.model = Model(mode)
        self.count = 0
        self.running: list[Run] = []

    def arrival(self, key: str) -> Arrival:
        self.count += 1
        now, policy = self.ledger.clock.now(), self.model.policy
        due = now + policy.wait if policy.size > 1 else now
        run = self.ledger.run(due_at=due, subscription="s", ordering_key=key)
        run.mode = policy.mode
        made = self.ledger.arrival(f"e{self.count}", run)
        return msgspec.structs.replace(
            made,
            batch_policies={run.id: policy},
            verdicts=orjson.dumps([["s", "run", run.id]]),
            body=b'{"n":%d}' % self.count,
        )

    async def come(self) -> None:
        """Some events in one transaction, some keys more than once."""
        arrivals = [self.arrival(self.draw.choice("abc")) for _ in range(self.draw.randint(1, 5))]
        await self.ledger.record(*arrivals)
        for arrival in arrivals:
            (run,) = arrival.runs
            expected = self.model.arrive(
                run.ordering_key or "", arrival.id, run.id, self.ledger.clock.now()
            )
            ((_, verdict, found),) = (await self.ledger.store.event(arrival.id))["verdicts"]
            assert (found, verdict) == (expected, "run" if expected == run.id else "batched")

    async def claim(self) -> None:
        claimed = await self.ledger.claimed()
        due = self.model.due(self.ledger.clock.now())
        for run in claimed:
            window = self.model.runs[run.id]
            assert run.id in due or window.begun
            assert run.deliveries == len(window.events)
            bodies = await self.ledger.store.payloads(run.id)
            assert (
                len(bodies) == len(window.events)
                and (await self.ledger.store.run(run.id))["joined"] == window.events[1:]
            )
            window.begun = True
        self.running += claimed

    async def end(self) -> None:
        if self.running:
            run = self.running.pop(self.draw.randrange(len(self.running)))
            await self.ledger.settle(run)
            self.model.runs[run.id].ended = True

    async def cancel(self) -> None:
        waiting = [
            run for run, window in self.model.runs.items() if not window.begun and not window.ended
        ]
        if waiting:
            run = self.draw.choice(waiting)
            await self.ledger.store.cancel(run, "not wanted")
            self.model.runs[run].ended = True

    async def crash(self) -> None:
        """Another process: runs that ran are pending again, open windows stay open."""
        self.ledger = self.reopen()
        self.running.clear()

    async def play(self, steps: int) -> None:
        for _ in range(steps):
            self.ledger.clock.forward(self.draw.choice([0, 0.5, 1, 2, 5, 20]))
            step = self.draw.choices(
                [self.come, self.claim, self.end, self.cancel, self.crash], [8, 4, 4, 1, 1]
            )[0]
            await step()
            assert await self.ledger.store.check() == []
        await self.finish()

    async def finish(self) -> None:
        """With time, every run gets its turn, and every event was in exactly one."""
        for _ in range(10 * self.count):
            self.ledger.clock.forward(60)
            await self.claim()
            while self.running:
                await self.end()
            if all(window.ended for window in self.model.runs.values()):
                break
        listed: Sequence[int] = sorted(
            event for window in self.model.runs.values() for event in window.events
        )
        assert len(listed) == len(set(listed)) == self.count
        counts = await self.ledger.store.counts()
        assert (
            counts["pending"] == 0
            and counts["completed"] + counts["cancelled"] == counts["accepted"] == self.count
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(6))
async def test_p2_p9_windows_agree_with_a_plain_model(
    ledger: Ledger, reopen: Reopen, mode: str, seed: int
) -> None:
    """Any order of events, claims, ends, cancels and crashes: each event is in the run that the
    model says, counted once.
    """
    await Story(ledger, reopen, mode, seed).play(40)
