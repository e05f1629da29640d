"""Pending calls and their journal entries: changed arguments, changed code, keys, maps, faults (P4,
fault 43).
"""

import asyncio
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from eventflow.core.errors import NotStorable, UsageError
from eventflow.core.retry import Permanent
from eventflow.runs.journal import Kind
from eventflow.runs.run import Completed, Interrupted, NeedsAttention, State
from eventflow.sdk.flow import flow, sleep
from eventflow.sdk.task import Task, task
from eventflow.store.protocol import Append, Appended
from tests.engine.replay_check.simulation import (
    START_TIME,
    Row,
    Simulation,
    crash_after_every_commit,
)

RAN: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def fresh() -> None:
    RAN.clear()


@task
async def step(name: str, number: int = 0) -> str:
    RAN[name] += 1
    return f"{name}{number}"


@task
async def ask(name: str) -> str:
    """The end of the first process: a test crashes here."""
    RAN[name] += 1
    return name


def upgrade(before: Any, after: Any, commits: int, **params: Any) -> tuple[Simulation, Row]:
    """Executes the old code for `commits` commits, then the new code to the end."""
    sim = Simulation()
    row = sim.add(before, **params)
    sim.run_process(crash_after=commits)
    assert row.state is State.RUNNING
    row.flow = after
    RAN.clear()
    sim.run_process()
    return sim, row


# --------------------------------------------------------------------------- arguments


def changed(policy: Any) -> tuple[Row, list[Any]]:
    argument = [1]
    bodies: list[int] = []

    @task(on_changed=policy)
    async def takes(number: int) -> int:
        bodies.append(number)
        return number * 10

    @flow
    async def calls() -> list[Any]:
        first = await takes(argument[0])
        return [first, await step("after")]

    sim = Simulation()
    row = sim.add(calls)
    sim.run_process(crash_after=1)
    RAN.clear()
    argument[0] = 2
    sim.run_process()
    return row, bodies


def test_a_recorded_call_that_comes_back_with_other_arguments_holds_the_run_with_a_diff() -> None:
    """Policy "error": the run is held, the reason names the field and both values, nothing runs."""
    row, bodies = changed("error")
    assert isinstance(row.outcome, NeedsAttention)
    assert "takes#0" in row.reason and "number: 1 -> 2" in row.reason
    assert bodies == [1] and RAN["after"] == 0


def test_accept_takes_the_recorded_value_and_rerun_computes_it_again() -> None:
    """Policies "accept" and "rerun"; the new value has another attempt number and replays from then
    on.
    """
    row, bodies = changed("accept")
    assert row.value[0] == 10 and bodies == [1]
    row, bodies = changed("rerun")
    assert row.value[0] == 20 and bodies == [1, 2]
    assert [(e.attempt, e.value) for e in row.journal if e.call_key == "takes#0"] == [
        (1, b"10"),
        (2, b"20"),
    ]


def test_a_rerun_value_replays() -> None:
    """After a rerun, later processes take the newer of the two values."""
    argument = [1]
    bodies: list[int] = []

    @task(on_changed="rerun")
    async def takes(number: int) -> int:
        bodies.append(number)
        return number * 10

    @flow
    async def calls() -> list[Any]:
        first = await takes(argument[0])
        return [first, await step("a"), await step("b")]

    sim = Simulation()
    row = sim.add(calls)
    sim.run_process(crash_after=2)
    argument[0] = 2
    sim.run_process(crash_after=2)
    sim.run_process()
    assert row.value == [20, "a0", "b0"]
    assert bodies == [1, 2] and RAN["a"] == 1


def test_equal_arguments_however_written_are_equal() -> None:
    """`f(1)`, `f(number=1)` and a default that is spelled out are the same call; values that cannot
    be compared are not.
    """
    spelled = [False]

    @task
    async def takes(tool: object, number: int = 1) -> int:
        return number

    @flow
    async def calls() -> int:
        return await (takes(object(), number=1) if spelled[0] else takes(object())) + len(
            await step("end")
        )

    sim = Simulation()
    row = sim.add(calls)
    sim.run_process(crash_after=1)
    spelled[0] = True
    sim.run_process()
    assert row.value == 5


# --------------------------------------------------------------------------- code


def test_a_call_inserted_between_recorded_ones_runs_and_the_rest_replays() -> None:
    """New code with one more call in the middle: only that one runs."""

    @flow
    async def old() -> list[str]:
        return [await step("a"), await step("b"), await ask("end")]

    @flow
    async def new() -> list[str]:
        return [await step("a"), await ask("new"), await step("b"), await ask("end")]

    _world, row = upgrade(old, new, 2)
    assert row.value == ["a0", "new", "b0", "end"]
    assert RAN == {"new": 1, "end": 1}


def test_a_call_removed_leaves_an_unclaimed_entry_that_is_counted() -> None:
    """New code without a recorded call completes; the entry is kept and counted."""

    @flow
    async def old() -> list[str]:
        return [await step("a"), await ask("gone"), await step("b")]

    @flow
    async def new() -> list[str]:
        return [await step("a"), await step("b")]

    _world, row = upgrade(old, new, 2)
    assert row.value == ["a0", "b0"]
    assert isinstance(row.outcome, Completed) and row.outcome.unclaimed_entries == 1
    assert "ask#0" in row.claims()


def test_reordered_calls_of_one_task_hold_the_run() -> None:
    """Two calls of one task that changed places come back with each other's arguments: held, not
    silently swapped.
    """

    @flow
    async def old() -> list[str]:
        return [await step("a"), await step("b"), await ask("end")]

    @flow
    async def new() -> list[str]:
        return [await step("b"), await step("a"), await ask("end")]

    _world, row = upgrade(old, new, 2)
    assert isinstance(row.outcome, NeedsAttention) and '"a" -> "b"' in row.reason


def test_reordered_calls_with_keys_find_their_values() -> None:
    """`key=` names a call by its arguments: the order does not matter then."""
    keyed = step.options_with(key=lambda name, number=0: name)

    @flow
    async def old() -> list[str]:
        return [await keyed("a"), await keyed("b"), await ask("end")]

    @flow
    async def new() -> list[str]:
        return [await keyed("b"), await keyed("a"), await ask("end")]

    _world, row = upgrade(old, new, 2)
    assert row.value == ["b0", "a0", "end"]
    assert RAN == {"end": 1}
    assert "step[a]" in row.claims()


def test_a_key_names_one_call() -> None:
    """The same key twice in one part of a flow is refused; in another part it is another call."""
    keyed = step.options_with(key=lambda name, number=0: name)

    async def part(number: int) -> str:
        return await keyed("a", number)

    @flow
    async def twice() -> list[str]:
        return [await keyed("a"), *await asyncio.gather(part(1), part(2)), await keyed("a")]

    error = Simulation().done(twice).error
    assert isinstance(error, UsageError) and "step[a]" in str(error)
    assert RAN["a"] == 3


def test_a_flow_that_waits_while_recorded_calls_are_never_made_is_held_as_diverged() -> None:
    """Parked with nothing to come and entries unclaimed: the reason names them; the old code and a
    retry complete it.
    """
    diverged = [False]

    @flow(timeout=7200)
    async def calls() -> list[str]:
        if diverged[0]:
            await asyncio.Event().wait()
        return [await step("a"), await step("b"), await ask("end")]

    sim = Simulation()
    row = sim.add(calls)
    sim.run_process(crash_after=2)
    diverged[0] = True
    sim.run_process()
    assert isinstance(row.outcome, NeedsAttention)
    assert "diverged" in row.reason and "step#0, step#1" in row.reason
    diverged[0] = False
    sim.retry(row)
    sim.run_process()
    assert row.value == ["a0", "b0", "end"] and RAN["a"] == 1


def test_a_value_that_cannot_be_read_back_holds_the_run_and_stays() -> None:
    """A recorded value that the new return annotation cannot read: held with the reason; the entry
    is untouched.
    """
    from dataclasses import dataclass

    @dataclass
    class Point:
        x: int

    @dataclass
    class Other:
        y: str

    def made(kind: Any) -> Any:
        async def point() -> Any:
            RAN["point"] += 1
            return kind(1)

        point.__annotations__["return"] = kind
        made_task: Task[..., Any] = task(point)

        @flow
        async def calls() -> Any:
            found = await made_task()
            return [type(found).__name__, await ask("end")]

        return calls

    sim, row = upgrade(made(Point), made(Other), 1)
    assert isinstance(row.outcome, NeedsAttention) and "cannot be read back" in row.reason
    row.flow = made(Point)
    sim.retry(row)
    sim.run_process()
    assert row.value == ["Point", "end"] and RAN["point"] == 0


def test_a_child_called_with_other_parameters_holds_the_parent() -> None:
    """A child's parameters are its fingerprint."""
    number = [1]

    @flow
    async def child(number: int) -> str:
        await sleep(3600)
        return await step("child", number)

    @flow
    async def parent() -> str:
        return await child(number[0])

    sim = Simulation()
    row = sim.add(parent)
    sim.run_process(until=START_TIME + 1_000_000)
    number[0] = 2
    sim.run_process()
    assert isinstance(row.outcome, NeedsAttention) and "child#0" in row.reason


# --------------------------------------------------------------------------- map


def test_map_returns_in_input_order_within_its_limit() -> None:
    """At most `limit` bodies at once; values in the order of the items, after any crash."""
    sim = Simulation()
    here = [sim]
    working = [0, 0]

    @task
    async def works(number: int) -> int:
        working[0] += 1
        working[1] = max(working)
        await here[0].spend(1 + (7 * number) % 5)
        working[0] -= 1
        return number * 2

    @flow
    async def maps() -> list[int]:
        return await works.map(range(20), limit=4)

    def make(other: Simulation) -> Row:
        here[0] = other
        working[:] = [0, 0]
        return other.add(maps)

    row = make(sim)
    sim.run_process()
    assert row.value == [n * 2 for n in range(20)] and working[1] == 4
    assert crash_after_every_commit(make) > 10


def test_the_first_exhausted_item_stops_new_ones_and_running_ones_end() -> None:
    """Then an ExceptionGroup named by the task; with return_exceptions all run, and errors are in
    the list.
    """
    sim = Simulation()
    begun: list[int] = []
    ended: list[int] = []

    @task
    async def works(number: int) -> int:
        begun.append(number)
        await sim.spend(1 if number == 1 else 5)
        ended.append(number)
        if number in (1, 2):
            raise Permanent(f"no {number}")
        return number

    @flow
    async def maps(patient: bool) -> Any:
        try:
            values = await works.map(range(10), limit=3, return_exceptions=patient)
            return [str(value) for value in values]
        except ExceptionGroup as group:
            return [str(group), *(str(error) for error in group.exceptions)]

    row = sim.done(maps, patient=False)
    assert row.value == ["2 items of works.map failed (2 sub-exceptions)", "no 1", "no 2"]
    assert begun == [0, 1, 2] and sorted(ended) == [0, 1, 2]
    row = sim.done(maps, patient=True)
    assert row.value == ["0", "no 1", "no 2", *map(str, range(3, 10))]


def test_map_by_key_finds_values_when_the_list_has_changed() -> None:
    """With `key=` (of the map, or of the task) a recorded item is found at any position; equal keys
    are refused, and what was running then is given up.
    """
    items = ["a", "b"]
    by_task = step.options_with(key=lambda name, number=0: name)

    @flow
    async def maps() -> list[str]:
        first = await step.map(items, key=str)
        return [*first, *await by_task.map(items), await ask("end")]

    sim = Simulation()
    row = sim.add(maps)
    sim.run_process(crash_after=2)
    items[:] = ["c", "b", "a"]
    RAN.clear()
    sim.run_process()
    assert row.value == ["c0", "b0", "a0"] * 2 + ["end"]
    assert RAN == {"c": 2, "end": 1}

    @flow
    async def doubles() -> None:
        await step.map(["x", "x"], key=str)

    row = sim.done(doubles)
    assert isinstance(row.error, UsageError) and "two items" in str(row.error)
    assert row.claims() == [] and not sim.in_memory_at_end


def test_map_refuses_a_limit_of_zero() -> None:
    """limit=0 is an error, not an empty list."""
    with pytest.raises(UsageError, match="limit"):
        step.map(["a"], limit=0)  # pyright: ignore[reportUnusedCoroutine]


def test_a_map_that_is_cancelled_gives_up_its_calls() -> None:
    """A timeout around a map stops it: nothing more is recorded of its items, and the run can leave
    memory.
    """
    sim = Simulation()

    @task
    async def works(number: int) -> int:
        await sim.spend(100)
        return number

    @flow
    async def maps() -> str:
        try:
            async with asyncio.timeout(5):
                await works.map(range(50), limit=10)
        except TimeoutError:
            await sleep(3600)
        return "late"

    row = sim.done(maps)
    assert row.value == "late" and row.claims() == [] and len(row.suspensions) == 1


def test_memory_per_item_does_not_grow_with_the_items() -> None:
    """A map of ten times the items takes about ten times the memory."""

    @task
    async def works(number: int) -> int:
        return number

    @flow
    async def maps(count: int) -> int:
        return sum(await works.map(range(count), limit=100))

    peaks: list[float] = []
    for count in (500, 5_000):
        sim = Simulation()
        tracemalloc.start()
        assert sim.done(maps, count=count).value == sum(range(count))
        peaks.append(tracemalloc.get_traced_memory()[1] / count)
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.5


# --------------------------------------------------------------------------- results and faults


def test_the_result_of_a_flow_must_be_storable() -> None:
    """A result without a lossless form fails the run, naming the type; so does an encoder that
    raises.
    """

    @flow
    async def returns() -> Any:
        await step("a")
        return {"tool": object()}

    error = Simulation().done(returns).error
    assert isinstance(error, NotStorable) and "object" in str(error)


def test_an_internal_error_holds_that_run_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """An exception in the engine's own callbacks is logged and holds the run; every other run is
    not affected.
    """

    @flow
    async def calls(how: str) -> list[str]:
        if how == "start":
            await broken_child()
        return [await step(how), await step(how)]

    @flow
    async def broken_child() -> None: ...

    for how in ("start", "record"):
        sim = Simulation()
        other, row = sim.add(calls, how="well"), sim.add(calls, how=how)
        if how == "start":
            sim.child_run = None  # type: ignore[method-assign, assignment]
        else:  # the store's reply names an entry that cannot be taken in
            sim.refuse = lambda op, row=row: Appended(1, 1, [None]) if _of(op, row) else None  # type: ignore
        caplog.clear()
        sim.run_process()
        assert other.value == ["well0", "well0"], how
        assert isinstance(row.outcome, NeedsAttention) and "a defect in" in row.reason, how
        assert "run.internal_error" in caplog.text
        assert not sim.in_memory_at_end


def _of(op: Any, row: Row) -> bool:
    return isinstance(op, Append) and op.run == row.run.id


def test_arguments_that_do_not_bind_fail_the_run_with_the_field() -> None:
    """A run whose parameters do not fit the flow's signature fails and says which."""

    @flow
    async def takes(number: int) -> None: ...

    row = Simulation().done(takes, number="many")
    assert "number" in str(row.error)


def test_interrupted_before_it_began_is_interrupted() -> None:
    """A drain right after a claim returns the run to pending."""

    @flow
    async def calls() -> str:
        return await step("a")

    sim = Simulation()
    row = sim.add(calls)

    def drain(w: Simulation) -> None:
        w.draining = True
        for execution in list(w.executions.values()):
            execution.end_run(Interrupted())

    sim.refuse = lambda op: drain(sim) if not sim.draining else None
    sim.run_process()
    assert isinstance(row.outcome, Interrupted | Completed)
    sim.refuse = None
    sim.run_process()
    assert row.value == "a0"


def test_many_runs_of_one_flow_do_not_slow_each_other() -> None:
    """Hundreds of runs in memory at once: each completes, none is left."""

    @flow
    async def calls(number: int) -> str:
        await sleep(5)
        return await step("a", number)

    sim = Simulation()
    rows = [sim.add(calls, number=n) for n in range(300)]
    sim.run_process()
    assert [row.value for row in rows] == [f"a{n}" for n in range(300)]
    assert not sim.in_memory_at_end
    assert Kind.TIMER in {entry.kind for entry in rows[0].journal}
