"""A value that came alone is delivered before its commit: what that must not change, and what it saves."""

import asyncio
from typing import Any

import orjson
import pytest

from eventflow.engine.execution import Execution
from eventflow.runs.journal import CANCEL_KEY, Kind
from eventflow.runs.run import Cancelled, Interrupted, State
from eventflow.sdk.flow import current_run, flow, timeout
from eventflow.sdk.task import task
from eventflow.store.protocol import Append, Fenced, Settle
from tests.engine.replay_check.world import SECOND, Row, World

DRAWN: list[int] = []
TAKEN: list[int] = []


@pytest.fixture(autouse=True)
def fresh() -> None:
    DRAWN.clear()
    TAKEN.clear()


@task
async def draw() -> int:
    """Another value each time its body runs."""
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
    """A run of one task commits once, its value still in the journal; a chain of n tasks commits n times."""
    world = World()
    row = world.done(one)
    assert (world.commits, row.value, row.claims()) == (1, 1, ["draw#0"])
    world = World()
    row = world.done(chain)
    assert (world.commits, row.state, len(row.claims())) == (4, State.COMPLETED, 4)


def test_p4_nothing_is_started_with_a_value_that_is_not_durable() -> None:
    """Whatever commit a crash follows: a body is only ever given what the journal holds."""
    for cut in range(6):
        world = World()
        row = world.add(chain)
        world.live(crash_after=cut)
        recorded = [
            int(entry.value or b"0") for entry in row.journal if entry.call_key.startswith("draw")
        ]
        assert set(TAKEN) <= set(recorded), (cut, TAKEN, recorded)
        world.live()
        values = [
            int(entry.value or b"0") for entry in row.journal if entry.call_key.startswith("draw")
        ]
        assert set(TAKEN) == set(values) and row.value == sum(values), cut
        DRAWN.clear()
        TAKEN.clear()


class Ordered(World):
    """Looks at what is posted, in order; may do something the moment a value's commit is asked for."""

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
    world = Ordered()
    row = world.add(chain)
    world.then = lambda world: next(iter(world.executions.values())).cancel("enough")
    world.live()
    return world, row


def test_what_comes_from_outside_waits_for_the_value_that_is_ahead() -> None:
    """A cancel that arrives between a value's delivery and its commit is recorded in a later batch: a replay that found both in
    one would give the flow both at once."""
    world, row = cancelled_while_it_commits()
    assert world.seen[:2] == ["Append draw#0", f"Append {CANCEL_KEY}"]
    batches = {entry.call_key: entry.batch for entry in row.journal}
    assert batches["draw#0"] < batches[CANCEL_KEY]
    assert row.outcome == Cancelled("enough")
    assert (
        orjson.loads(next(entry.value for entry in row.journal if entry.kind is Kind.CANCEL) or b"")
        == "enough"
    )


def test_a_timeout_of_the_run_does_not_stand_in_the_way() -> None:
    """A run with a timeout commits as often as one without: the order to stop is not a thing the flow waits for."""

    @flow(timeout=60)
    async def bounded() -> int:
        return await draw()

    world = World()
    assert world.done(bounded).value == 1
    assert world.commits == 1


def test_a_timer_of_the_flow_stands_in_the_way() -> None:
    """A value that races a timer is recorded first, then delivered: both may fall into one batch."""

    @flow
    async def raced() -> int:
        async with timeout(60):
            return await draw()

    world = Ordered()
    row = world.done(raced)
    assert world.seen == ["Append @start", "Append draw#0", "Settle"] and row.value == 1


def test_a_flow_that_awaits_something_foreign_has_its_value_recorded_meanwhile() -> None:
    """What the flow had ahead is made durable as soon as the flow waits for anything, also for what no journal knows."""

    @flow
    async def foreign() -> int:
        value = await draw()
        return value + await asyncio.to_thread(lambda: 1)

    world = Ordered()
    row = world.done(foreign)
    assert world.seen == ["Append draw#0", "Settle"] and row.value == 2


def test_a_drain_records_the_value_with_the_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the value and its commit the worker drains: the value is not computed again in the next life."""
    world = World()
    row = world.add(chain)
    original = Execution.wake

    def wake(execution: Execution) -> None:
        original(execution)
        if DRAWN and not world.draining:
            world.draining = True
            execution.end_run(Interrupted())

    with monkeypatch.context() as patch:
        patch.setattr(Execution, "wake", wake)
        world.live()
    assert row.state is State.PENDING and row.claims() == ["draw#0"]
    world.live()
    assert row.state is State.COMPLETED and DRAWN == [1, 2]


def test_p7_a_refused_settlement_records_nothing() -> None:
    """A worker that lost its lease had the flow go on; neither value nor outcome is written."""
    world = World()
    row = world.add(one)
    world.refuse = lambda op: Fenced("stale") if isinstance(op, Settle | Append) else None
    world.live()
    assert row.journal == [] and row.state is State.RUNNING


def test_the_flows_time_is_that_of_the_value_in_every_life() -> None:
    """`now` after a value that was ahead is what its entry says, live and replaying."""
    times: list[Any] = []

    @flow
    async def timed() -> None:
        await draw()
        times.append(current_run().now)
        await take(1)

    world = World()
    row = world.add(timed)
    world.live(crash_after=1)
    world.advance(SECOND)
    world.live()
    assert row.state is State.COMPLETED and len(times) == 2 and times[0] == times[1]
