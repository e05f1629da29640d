"""A value that is alone in its commit is delivered before it: what that must not change, and what
it saves.
"""

import asyncio
from typing import Any

import orjson
import pytest

from eventflow.engine.execution import Execution
from eventflow.runs.journal import CANCEL_KEY, Kind
from eventflow.runs.run import Cancelled, Interrupted, State
from eventflow.sdk.flow import current_run, emit, flow, timeout
from eventflow.sdk.task import task
from eventflow.store.protocol import Append, Fenced, Settle
from tests.engine.replay_check.simulation import SECOND, Row, Simulation, crash_after_every_commit

DRAWN: list[int] = []
TAKEN: list[int] = []


@pytest.fixture(autouse=True)
def fresh() -> None:
    DRAWN.clear()
    TAKEN.clear()


@task
async def draw() -> int:
    """Returns another value each time its body runs."""
    DRAWN.append(len(DRAWN) + 1)
    return DRAWN[-1]


@task
async def take(value: int) -> int:
    TAKEN.append(value)
    return value


@flow
async def one() -> int:
    return await draw()


@flow
async def chain() -> int:
    return await take(await draw()) + await take(await draw())


def test_a_value_and_the_outcome_that_follows_are_one_commit() -> None:
    """A run of one task commits once, its value still in the journal; a chain of n tasks commits n
    times.
    """
    sim = Simulation()
    row = sim.done(one)
    assert (sim.commits, row.value, row.claims()) == (1, 1, ["draw#0"])
    sim = Simulation()
    row = sim.done(chain)
    assert (sim.commits, row.state, len(row.claims())) == (4, State.COMPLETED, 4)


def test_p4_nothing_is_started_with_a_value_that_is_not_durable() -> None:
    """After a crash at any commit: a body only ever gets values that the journal holds."""
    for cut in range(6):
        sim = Simulation()
        row = sim.add(chain)
        sim.run_process(crash_after=cut)
        recorded = [
            int(entry.value or b"0") for entry in row.journal if entry.call_key.startswith("draw")
        ]
        assert set(TAKEN) <= set(recorded), (cut, TAKEN, recorded)
        sim.run_process()
        values = [
            int(entry.value or b"0") for entry in row.journal if entry.call_key.startswith("draw")
        ]
        assert set(TAKEN) == set(values) and row.value == sum(values), cut
        DRAWN.clear()
        TAKEN.clear()


class Ordered(Simulation):
    """Notes what is posted, in order; may call `then` the moment a value's commit is posted."""

    def __init__(self) -> None:
        super().__init__()
        self.then: Any = None
        self.seen: list[str] = []

    def post(self, op: Any, reply: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.seen.append(type(op).__name__ + "".join(f" {entry.call_key}" for entry in op.entries))
        super().post(op, reply, loop)
        if self.then is not None:
            then, self.then = self.then, None
            then(self)


def cancelled_while_it_commits() -> tuple[Ordered, Row]:
    sim = Ordered()
    row = sim.add(chain)
    sim.then = lambda sim: next(iter(sim.executions.values())).cancel("enough")
    sim.run_process()
    return sim, row


def test_a_cancel_waits_for_the_uncommitted_value() -> None:
    """A cancel that arrives between a value's delivery and its commit is recorded in a later batch:
    a replay that found both in one would give the flow both at once.
    """
    sim, row = cancelled_while_it_commits()
    assert sim.seen[:2] == ["Append draw#0", f"Append {CANCEL_KEY}"]
    batches = {entry.call_key: entry.batch for entry in row.journal}
    assert batches["draw#0"] < batches[CANCEL_KEY]
    assert row.outcome == Cancelled("enough")
    assert (
        orjson.loads(next(entry.value for entry in row.journal if entry.kind is Kind.CANCEL) or b"")
        == "enough"
    )


def test_a_timeout_of_the_run_does_not_prevent_it() -> None:
    """A run with a timeout commits as often as one without: the flow does not wait for
    its timeout.
    """

    @flow(timeout=60)
    async def bounded() -> int:
        return await draw()

    sim = Simulation()
    assert sim.done(bounded).value == 1
    assert sim.commits == 1


def test_a_timer_of_the_flow_prevents_it() -> None:
    """A value that races a timer is recorded first, then delivered: both may fall into
    one batch.
    """

    @flow
    async def raced() -> int:
        async with timeout(60):
            return await draw()

    sim = Ordered()
    row = sim.done(raced)
    assert sim.seen == ["Append @start", "Append draw#0", "Settle"] and row.value == 1


def test_a_flow_that_awaits_a_thread_has_its_value_recorded_meanwhile() -> None:
    """The uncommitted value is made durable as soon as the flow waits for anything, also for
    something not journaled.
    """

    @flow
    async def foreign() -> int:
        value = await draw()
        return value + await asyncio.to_thread(lambda: 1)

    sim = Ordered()
    row = sim.done(foreign)
    assert sim.seen == ["Append draw#0", "Settle"] and row.value == 2


def test_emissions_that_follow_a_value_share_its_commit() -> None:
    """The value first, then the events that the flow emits after it; a crash at any commit
    publishes the same events, once.
    """

    @flow
    async def announces() -> int:
        value = await take(7)
        await asyncio.gather(emit("drawn", {"n": value}), emit("noted", {}))
        return await take(value)

    sim = Ordered()
    row = sim.done(announces)
    names = [name.rpartition("/")[2] for name in sim.seen[0].split()]
    assert names == ["Append", "take#0", "emit:drawn#0", "emit:noted#0"]
    assert sim.seen[1:] == ["Settle take#1"]
    assert row.value == 7 and [kind for _, kind in sim.published] == ["drawn", "noted"]

    def check(sim: Simulation, row: Row) -> None:
        assert sorted(kind for _, kind in sim.published) == ["drawn", "noted"]

    assert crash_after_every_commit(lambda sim: sim.add(announces), check) == 2


def test_an_emission_together_with_a_new_call_has_a_later_commit() -> None:
    """A body must not start with a value that is not durable: then the value is committed alone."""

    @flow
    async def mixed() -> int:
        value = await draw()
        await asyncio.gather(emit("drawn", {"n": value}), take(value))
        return value

    sim = Ordered()
    row = sim.done(mixed)
    assert sim.seen[0] == "Append draw#0" and row.value == 1
    assert [kind for _, kind in sim.published] == ["drawn"]


def test_a_drain_records_the_value_with_the_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the value and its commit the worker drains: the value is not computed again in the
    next process.
    """
    sim = Simulation()
    row = sim.add(chain)
    original = Execution.wake

    def wake(execution: Execution) -> None:
        original(execution)
        if DRAWN and not sim.draining:
            sim.draining = True
            execution.end_run(Interrupted())

    with monkeypatch.context() as patch:
        patch.setattr(Execution, "wake", wake)
        sim.run_process()
    assert row.state is State.PENDING and row.claims() == ["draw#0"]
    sim.run_process()
    assert row.state is State.COMPLETED and DRAWN == [1, 2]


def test_p7_a_refused_settlement_records_nothing() -> None:
    """A worker that lost its claim let the flow continue; neither value nor outcome is written."""
    sim = Simulation()
    row = sim.add(one)
    sim.refuse = lambda op: Fenced("stale") if isinstance(op, Settle | Append) else None
    sim.run_process()
    assert row.journal == [] and row.state is State.RUNNING


def test_the_flows_time_is_that_of_the_value_in_every_process() -> None:
    """`now` after an uncommitted value is the time of its entry, live and replaying."""
    times: list[Any] = []

    @flow
    async def timed() -> None:
        await draw()
        times.append(current_run().now)
        await take(1)

    sim = Simulation()
    row = sim.add(timed)
    sim.run_process(crash_after=1)
    sim.advance(SECOND)
    sim.run_process()
    assert row.state is State.COMPLETED and len(times) == 2 and times[0] == times[1]
