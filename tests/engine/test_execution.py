"""One run over several processes: crashes after every commit, suspensions, children, cancels,
retries (P4, P5, P6).
"""

import asyncio
import contextlib
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from eventflow.core.errors import RunCancelled, RunTimedOut
from eventflow.core.retry import Permanent, Retry
from eventflow.runs.journal import Kind
from eventflow.runs.run import Cancelled, Interrupted, NeedsAttention, State, Suspended, format_id
from eventflow.sdk.flow import current_run, emit, flow, restart_with, sleep, timeout
from eventflow.sdk.task import current_task, task
from tests.engine.replay_check.simulation import (
    DAY,
    SECOND,
    START_TIME,
    Row,
    Simulation,
    crash_after_every_commit,
)

BODIES: Counter[str] = Counter()
HERE: list[Simulation] = []


@pytest.fixture(autouse=True)
def fresh() -> None:
    BODIES.clear()
    HERE.clear()


@task
async def step(number: int) -> int:
    BODIES[f"step {number}"] += 1
    await asyncio.sleep(0)
    return number * 2


@task(retries=[0, timedelta(days=1)])
async def stubborn(number: int) -> int:
    BODIES["stubborn"] += 1
    if current_task().attempt < 3:
        raise ValueError(f"not yet {number}")
    return current_task().attempt


# --------------------------------------------------------------------------- crashes


@flow
async def several(first: int) -> list[Any]:
    seen: list[Any] = [await step(first)]
    seen += await asyncio.gather(step(first + 1), step(first + 2))
    await sleep(5)
    seen.append((current_run().now - current_run().now).total_seconds())
    try:
        async with timeout(3):
            await sleep(10)
    except TimeoutError:
        seen.append("late")
    seen.append(await emit("noted", {"n": first}))
    seen.append(await small(first + 5))
    seen += await step.map([7, 8, 9], limit=2)
    seen.append(current_run().random.random())
    return seen


@flow
async def small(number: int) -> int:
    return await step(number) + await step(number)


def test_p5_a_crash_after_any_commit_twice_over_comes_to_the_same_result() -> None:
    """After a crash at any commit, and another at the next, the flow returns the uncrashed value
    and emits once.
    """

    def check(sim: Simulation, row: Row) -> None:
        assert sim.published == [(f"{run_name(row)}/emit:noted#0", "noted")]
        assert [r.state for r in sim.rows.values()] == [State.COMPLETED] * 2

    assert crash_after_every_commit(lambda sim: sim.add(several, first=1), check) >= 10


def run_name(row: Row) -> str:
    return format_id(row.run.id)


def test_p4_a_recorded_value_is_never_computed_again() -> None:
    """A body whose value was committed does not run in any later process."""
    sim = Simulation()
    row = sim.add(several, first=1)
    done: set[str] = set()
    while row.state is not State.COMPLETED:
        before = Counter(BODIES)
        sim.run_process(
            crash_after=2
        )  # one would never do: it is spent on the mark of a suspect's start
        ran = {name for name in BODIES if BODIES[name] > before[name]}
        assert not ran & done, ran & done
        values = [
            int(e.value or b"0") // 2
            for r in sim.rows.values()
            for e in r.journal
            if e.call_key.startswith("step#0")
        ]
        done = {f"step {number}" for number in values if number == 1}
        assert sim.commits < 100


# --------------------------------------------------------------------------- time


@flow
async def sleeper() -> float:
    begun = current_run().now
    await sleep(timedelta(days=1))
    return (current_run().now - begun).total_seconds()


@flow
async def retrier() -> int:
    return await stubborn(1)


@flow
async def bounded() -> str:
    try:
        async with timeout(timedelta(days=1)):
            await asyncio.Event().wait()
    except TimeoutError:
        return "late"
    return "never"


@pytest.mark.parametrize(("made", "value"), [(sleeper, 86400), (retrier, 3), (bounded, "late")])
def test_p6_a_day_long_wait_survives_crashes_and_fires_at_its_due_time(
    made: Any, value: Any
) -> None:
    """A sleep, a retry's delay and a timeout of a day hold no memory, survive crashes, and fire a
    day later: neither earlier, nor a day after the crash.
    """
    sim = Simulation()
    row = sim.add(made)
    for hour in range(1, 24, 4):
        sim.run_process(until=START_TIME + hour * 3600 * SECOND)
        assert row.state is State.WAITING
        assert not sim.in_memory_at_end
        row.state = State.RUNNING
        row.due = None
    sim.run_process(until=START_TIME + DAY - 5 * SECOND)
    assert row.state is State.WAITING
    sim.run_process(until=START_TIME + DAY + 5 * SECOND)
    assert row.value == pytest.approx(value, abs=1)


def test_p6_a_wait_that_fell_due_while_the_process_was_down_fires_at_once() -> None:
    """A wait that ended while the process was down ends at the restart."""
    sim = Simulation()
    row = sim.add(sleeper)
    sim.run_process(until=START_TIME + SECOND)
    sim.time = START_TIME + 10 * DAY
    sim.run_process(until=sim.time + SECOND)
    assert row.value == pytest.approx(10 * 86400, abs=1)


def test_short_waits_stay_in_memory_and_long_ones_leave() -> None:
    """A run leaves memory only when every branch waits for a minute or more; a timeout that is over
    does not keep it there.
    """

    @flow
    async def mixed() -> str:
        async with timeout(5):
            await step(1)
        await asyncio.gather(sleep(59), sleep(600))
        await sleep(61)
        return "done"

    sim = Simulation()
    row = sim.done(mixed)
    assert row.value == "done"
    first, second = [(until or 0) - START_TIME for until in row.suspensions]
    assert first == pytest.approx(600 * SECOND, abs=SECOND)
    assert second == pytest.approx(661 * SECOND, abs=SECOND)
    assert "timeout#0" not in row.claims(Kind.TIMER)  # nor is its firing recorded


def test_a_wide_flow_of_sleepers_leaves_memory_too() -> None:
    """With more branches than are examined at each park, all waiting long, the run is suspended a
    second later.
    """

    @flow
    async def wide() -> int:
        return len(await asyncio.gather(*(sleep(3600 + n) for n in range(100))))

    row = Simulation().done(wide)
    assert row.value == 100
    assert row.suspensions and row.suspensions[0] == pytest.approx(
        START_TIME + 3600 * SECOND, abs=SECOND
    )


def test_a_suspended_run_is_not_woken_by_entries_it_knew() -> None:
    """Entries that no branch waits for (a failure, a value whose call was given up) do not end a
    suspension at once.
    """

    @flow
    async def gives_up() -> str:
        async with asyncio.TaskGroup() as group:
            given_up = group.create_task(step(1))
            await step(2)
            given_up.cancel()
        await sleep(3600)
        return "done"

    row = Simulation().done(gives_up)
    assert row.value == "done"
    assert len(row.suspensions) == 1


# --------------------------------------------------------------------------- the run's own timeout


def test_a_runs_timeout_counts_from_its_first_start_waits_and_crashes_included() -> None:
    """A flow with a timeout of two hours fails two hours after its first start, although it slept
    and crashed meanwhile.
    """

    @flow(timeout=7200)
    async def slow() -> None:
        await sleep(3 * 3600)

    sim = Simulation()
    row = sim.add(slow)
    sim.run_process(until=START_TIME + 3600 * SECOND)
    assert not sim.run_process(until=START_TIME + 7300 * SECOND, crash_after=0)
    sim.run_process()
    assert isinstance(row.error, RunTimedOut)
    assert sim.time - START_TIME == pytest.approx(7200 * SECOND, abs=SECOND)


def test_a_timeout_that_counts_running_time_leaves_out_suspensions() -> None:
    """With timeout_counts="running" a day of sleep is free; time in memory adds up over processes
    until the timeout is used up.
    """

    @flow(timeout=100, timeout_counts="running")
    async def works(hours: int) -> str:
        for _ in range(hours):
            await sleep(40)
            await sleep(3600)
        return "done"

    sim = Simulation()
    assert sim.done(works, hours=2).value == "done"
    row = sim.done(works, hours=4)
    assert isinstance(row.error, RunTimedOut)
    ran = [entry for entry in row.journal if entry.call_key == "@ran"]
    assert [entry.attempt for entry in ran] == [1, 2]


def test_a_retry_by_hand_restarts_the_timeout() -> None:
    """A run that timed out and is retried has its whole timeout again."""

    @flow(timeout=100)
    async def once_slow() -> int:
        return await late(1)

    @task
    async def late(number: int) -> int:
        BODIES["late"] += 1
        await HERE[0].spend(1000 if BODIES["late"] == 1 else 50)
        return number

    sim = Simulation()
    HERE.append(sim)
    row = sim.done(once_slow)
    assert isinstance(row.error, RunTimedOut)
    sim.advance(DAY)
    sim.retry(row)
    sim.run_process()
    assert row.value == 1


# --------------------------------------------------------------------------- cancel


@flow(grace=20)
async def tidy() -> str:
    try:
        await sleep(50)
    finally:
        await step(99)
    return "never"


def test_a_cancelled_flow_may_clean_up_with_journaled_calls() -> None:
    """A cancel reaches the flow as CancelledError; tasks in `finally` work and are recorded, also
    over a crash.
    """
    for crash in (False, True):
        sim = Simulation()
        row = sim.add(tidy)
        sim.run_process(
            until=START_TIME + SECOND,
            then=lambda w, r=row: asyncio.ensure_future(w.cancel(r.run.id, "enough")) and None,
        )
        assert row.outcome == Cancelled("enough")
        assert "step#0" in row.claims()
        if not crash:
            continue
    assert BODIES["step 99"] == 2


def test_a_cancel_survives_a_crash() -> None:
    """A cancel that was recorded before a crash is delivered after it."""
    sim = Simulation()
    row = sim.add(tidy)
    sim.run_process(
        until=START_TIME + SECOND,
        crash_after=2,
        then=lambda w: asyncio.ensure_future(w.cancel(row.run.id, "enough")) and None,
    )
    assert row.claims(Kind.CANCEL) == ["@cancel"] and row.outcome is None
    row.run.cancel_requested = False
    sim.run_process()
    assert row.outcome == Cancelled("enough")


def test_a_flow_that_ignores_its_cancel_ends_when_grace_is_over() -> None:
    """Neither swallowing the cancel and sleeping for a day, nor waiting for nothing, lasts longer
    than the grace.
    """

    @flow(grace=20)
    async def deaf(forever: bool) -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await (asyncio.Event().wait() if forever else sleep(86400))

    for forever in (False, True):
        sim = Simulation()
        row = sim.add(deaf, forever=forever)
        sim.add(sleeper)  # keeps the process running
        row.run.cancel_requested = True
        sim.run_process()
        assert isinstance(row.outcome, Cancelled)
        settled = next(entry for entry in row.journal if entry.kind is Kind.CANCEL).at
        assert not row.suspensions and settled < START_TIME + SECOND


def test_a_cancelled_run_can_be_retried() -> None:
    """After a cancel, `retry` continues after the recorded values."""
    sim = Simulation()
    row = sim.add(several, first=1)
    sim.run_process(
        until=START_TIME + SECOND,
        then=lambda w: asyncio.ensure_future(w.cancel(row.run.id, "oops")) and None,
    )
    assert isinstance(row.outcome, Cancelled)
    before = Counter(BODIES)
    sim.retry(row)
    sim.run_process()
    assert row.value[:3] == [2, 4, 6]
    assert BODIES["step 1"] == before["step 1"]


# --------------------------------------------------------------------------- retry by hand


def test_p4_a_recorded_error_is_replayed_until_a_retry_which_keeps_values_and_counts_on() -> None:
    """An exhausted call fails the run again in any later process; `retry` drops the error, keeps
    values, continues the numbers, and gives the call its whole budget again.
    """
    attempts: list[int] = []

    @task(retries=Retry(attempts=2, delay=1, jitter=False))
    async def fails() -> int:
        attempts.append(current_task().attempt)
        if len(attempts) < 4:
            raise ValueError(len(attempts))
        return 4

    @flow
    async def pays() -> int:
        return await step(3) + await fails()

    sim = Simulation()
    row = sim.done(pays)
    assert isinstance(row.error, ValueError) and attempts == [1, 2]
    row.state = State.PENDING
    row.outcome = None
    sim.run_process()
    assert isinstance(row.error, ValueError) and attempts == [1, 2]
    sim.retry(row)
    sim.run_process()
    assert attempts == [1, 2, 3, 4]
    assert row.value == 10
    assert BODIES["step 3"] == 1


# --------------------------------------------------------------------------- children


@flow
async def parent(number: int) -> list[Any]:
    return [await step(number), *await asyncio.gather(small(number + 10), small(number + 20))]


def test_a_parent_waits_without_memory_and_gets_its_childrens_values() -> None:
    """A child is a separate run; its answer wakes the parent, in any order and after any crash."""
    assert crash_after_every_commit(lambda sim: sim.add(parent, number=1)) >= 5
    sim = Simulation()

    @flow
    async def nap(number: int) -> int:
        await sleep(3600)
        return number

    @flow
    async def waits() -> int:
        return await nap(4)

    row = sim.done(waits)
    assert row.value == 4
    assert row.suspensions == [None]


def test_a_childs_error_is_the_parents_and_both_are_retried() -> None:
    """The child's exception reaches the parent's await; a retry of the parent retries the child,
    once.
    """
    broken = [True]

    @task
    async def pay() -> str:
        BODIES["pay"] += 1
        if broken[0]:
            raise Permanent("no")
        return "paid"

    @flow
    async def child() -> str:
        return await pay()

    @flow
    async def asks() -> str:
        return await child()

    sim = Simulation()
    row = sim.done(asks)
    assert isinstance(row.error, Permanent)
    broken[0] = False
    sim.retry(row)
    sim.run_process()
    assert row.value == "paid"
    assert BODIES["pay"] == 2 and len(sim.rows) == 2


def test_cancel_reaches_the_child_also_one_whose_start_is_being_recorded() -> None:
    """A flow that gives up a child call cancels the child run; a flow that only leaves memory does
    not.
    """

    @flow
    async def long_child() -> None:
        await sleep(3600)

    @flow
    async def impatient(limit: float) -> str:
        try:
            async with timeout(limit):
                await long_child()
        except TimeoutError:
            return "gave up"
        return "waited"

    @flow
    async def at_once() -> str:
        given_up = asyncio.create_task(long_child())
        await asyncio.to_thread(int)  # over before the start of the child is recorded
        given_up.cancel()
        await step(1)
        return "gave up"

    for made in (impatient, at_once):
        sim = Simulation()
        row = sim.done(made, **({"limit": 10} if made is impatient else {}))
        assert row.value == "gave up"
        assert [r.state for r in sim.rows.values()] == [State.COMPLETED, State.CANCELLED]
    sim = Simulation()
    row = sim.done(impatient, limit=7200)
    assert row.value == "waited"
    assert [r.state for r in sim.rows.values()] == [State.COMPLETED, State.COMPLETED]


def test_a_cancelled_parent_cancels_its_children_when_grace_ends_it() -> None:
    """A parent that does not unwind by itself still cancels its children."""

    @flow
    async def long_child() -> None:
        await sleep(3600)

    @flow(grace=5)
    async def stubborn_parent() -> None:
        call = asyncio.create_task(long_child())
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([call], timeout=50)

    sim = Simulation()
    row = sim.add(stubborn_parent)
    sim.run_process(
        until=START_TIME + 100 * SECOND,
        then=lambda w: asyncio.ensure_future(w.cancel(row.run.id, "stop")) and None,
    )
    sim.run_process()
    assert [r.state for r in sim.rows.values()] == [State.CANCELLED, State.CANCELLED]


def test_a_cancelled_childs_parent_gets_run_cancelled() -> None:
    """The parent's await raises RunCancelled with the child's reason."""

    @flow
    async def cancels_itself() -> None:
        current = asyncio.current_task()
        assert current is not None
        current.cancel()
        await asyncio.sleep(0)

    @flow
    async def asks() -> None:
        await cancels_itself()

    row = Simulation().done(asks)
    assert isinstance(row.error, RunCancelled)
    assert "cancelled itself" in str(row.error)


def test_an_answer_received_twice_is_one_answer() -> None:
    """The worker may hand a parent an answer that its journal holds already."""

    @flow
    async def busy_parent() -> list[Any]:
        return await asyncio.gather(small(1), sleep(30))  # pyright: ignore

    sim = Simulation()
    row = sim.add(busy_parent)
    known: list[int] = []

    def again(w: Simulation) -> None:
        execution = w.executions[row.run.id]
        known.append(execution.pending.journal.count)
        for entry in row.journal:
            if entry.kind is Kind.VALUE:
                execution.guarded(execution.on_durable, entry)
        known.append(execution.pending.journal.count)

    sim.run_process(then=again)
    assert row.value == [4, None]
    assert row.claims() == ["small#0"]
    assert known[0] == known[1] > 0


# --------------------------------------------------------------------------- emit


def test_an_emit_is_published_once_by_the_commit_that_records_it_and_a_bodys_with_its_success() -> (
    None
):
    """Ids are run + lineage; an attempt that fails publishes nothing; data without a JSON form
    raises in the flow.
    """

    @task(retries=1)
    async def emits() -> None:
        await emit("from.body", 1)
        await emit("from.body", 2)
        if current_task().attempt == 1:
            raise ValueError("not yet")

    @flow
    async def speaks() -> str:
        await emit("from.flow")
        await emits()
        try:
            await emit("bad", {1, 2})  # type: ignore[arg-type]
        except Exception as error:
            return type(error).__name__
        return "published"

    def check(sim: Simulation, row: Row) -> None:
        name = run_name(row)
        assert sim.published == [
            (f"{name}/emit:from.flow#0", "from.flow"),
            (f"{name}/emits#0/emit#0", "from.body"),
            (f"{name}/emits#0/emit#1", "from.body"),
        ]
        assert row.value == "NotStorable"

    assert crash_after_every_commit(lambda sim: sim.add(speaks), check) >= 4


# --------------------------------------------------------------------------- restart_with


def test_restart_with_restarts_the_same_run_without_its_journal() -> None:
    """The journal is dropped, the parameters are new, call keys and idempotency keys are of another
    generation.
    """
    keys: list[str] = []

    @task
    async def note(number: int) -> int:
        keys.append(current_task().idempotency_key)
        return number

    @flow
    async def forever(cursor: int) -> int:
        await note(cursor)
        await emit("page", cursor)
        if cursor < 3:
            await restart_with(cursor=cursor + 1)
        return cursor

    sim = Simulation()
    row = sim.done(forever, cursor=1)
    name = run_name(row)
    assert row.value == 3
    assert keys == [f"{name}/note#0", f"{name}/~1/note#0", f"{name}/~2/note#0"]
    assert len({ident for ident, _ in sim.published}) == 3
    assert [entry.call_key for entry in row.journal] == ["@afresh", "~2/note#0", "~2/emit:page#0"]
    crash_after_every_commit(lambda w: w.add(forever, cursor=1))


def test_restart_with_refuses_parameters_that_the_flow_does_not_have() -> None:
    """A wrong parameter raises in the flow, at the call, and nothing is dropped."""

    @flow
    async def picky(cursor: int) -> str:
        try:
            await restart_with(nonsense=1)
        except TypeError as error:
            return str(error)

    assert "nonsense" in Simulation().done(picky, cursor=1).value


# --------------------------------------------------------------------------- drain, lost claim


def test_a_drain_records_nothing_and_loses_nothing() -> None:
    """Interrupted in the middle of a body, a run continues in the next process; no new body starts
    while draining; journaled calls in `finally` re-raise and record nothing.
    """
    sim = Simulation()
    HERE.append(sim)

    @task
    async def long(number: int) -> int:
        BODIES["long"] += 1
        await HERE[0].spend(100)
        return number

    @flow
    async def works() -> int:
        try:
            first = await long(1)
            return first + await long(2)
        finally:
            for _ in range(5):
                try:
                    await step(5)
                except asyncio.CancelledError:
                    BODIES["refused"] += 1

    def drain(w: Simulation) -> None:
        w.draining = True
        for execution in list(w.executions.values()):
            execution.end_run(Interrupted())

    row = sim.add(works)
    sim.run_process(until=START_TIME + SECOND, then=drain)
    assert row.state is State.PENDING and row.journal == []
    assert BODIES["refused"] == 5 and BODIES["step 5"] == 0

    def drain_softly(w: Simulation) -> None:
        w.draining = True

    sim.run_process(until=START_TIME + 150 * SECOND, then=drain_softly)
    assert row.claims() == ["long#0"] and row.state is State.PENDING and BODIES["long"] == 2
    sim.run_process()
    assert row.value == 3 and BODIES["long"] == 3


def test_p7_a_worker_that_lost_its_lease_writes_nothing() -> None:
    """When the store refuses an entry the run leaves memory, its bodies are cancelled, and its
    outcome is refused too.
    """
    stopped: list[str] = []
    sim = Simulation()
    HERE.append(sim)

    @task
    async def quick() -> int:
        return 1

    @task
    async def long() -> int:
        try:
            await HERE[0].spend(100)
        except asyncio.CancelledError:
            stopped.append("long")
            raise
        return 1

    @flow
    async def both() -> Any:
        return await asyncio.gather(quick(), long())

    row = sim.add(both)

    def steal(op: Any) -> None:
        row.run.token = 7

    sim.refuse = steal
    sim.run_process()
    assert row.state is State.RUNNING and row.journal == []
    assert stopped == ["long"] and not sim.in_memory_at_end


def test_p10_when_the_store_fails_everything_stops_and_nothing_runs_unrecorded() -> None:
    """Bodies are cancelled, the flow is closed on its own loop: a task called in its `finally` is
    refused, not run plainly.
    """
    from eventflow.core.errors import StoreFailed

    @flow
    async def works() -> None:
        try:
            await step(1)
        finally:
            await step(2)

    sim = Simulation()
    row = sim.add(works)

    def fail(op: Any) -> StoreFailed:
        sim.failed = StoreFailed("the disk is gone")
        return sim.failed

    sim.refuse = fail
    sim.run_process()
    assert row.state is State.RUNNING and not sim.in_memory_at_end
    assert BODIES == {"step 1": 1}


def test_an_entry_that_cannot_be_written_holds_the_run() -> None:
    """When the store refuses one entry although the claim is ours, the run is held, and nothing
    hangs.
    """
    from eventflow.core.errors import StoreError
    from eventflow.store.protocol import Append

    sim = Simulation()
    sim.refuse = lambda op: StoreError("no such thing") if isinstance(op, Append) else None
    row = sim.done(several, first=1)
    assert isinstance(row.outcome, NeedsAttention) and "no such thing" in row.reason


def test_a_crash_suspect_marks_its_start_until_something_of_it_is_recorded() -> None:
    """A suspect's attempts are journaled as started before their bodies; after its first entry they
    no longer are.
    """
    sim = Simulation()
    row = sim.add(several, first=1)
    assert not sim.run_process(crash_after=0)
    sim.run_process()
    assert row.state is State.COMPLETED
    assert sim.marks == [row.run.id]


def test_a_suspension_names_what_the_run_knows() -> None:
    """`Suspended` names the last batch and the number of entries the run knows of."""
    sim = Simulation()
    row = sim.add(sleeper)
    sim.run_process(until=START_TIME + SECOND)
    assert isinstance(row.outcome, Suspended)
    assert row.outcome.seen_batch == row.journal[-1].batch
    assert row.outcome.entries == len(row.journal)
