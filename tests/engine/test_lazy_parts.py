"""A run whose parts are made when the first of them is used behaves as one with all its parts."""

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from datetime import timedelta
from operator import attrgetter
from typing import Any

import orjson
import pytest

from eventflow import App
from eventflow.engine import calls, run_parts
from eventflow.engine.suspension import Suspension
from eventflow.runs.journal import Entry
from eventflow.runs.run import Completed, Failed
from eventflow.sdk.flow import Flow, current_run, emit, flow, sleep, timeout
from eventflow.sdk.task import current_task, task
from eventflow.testing import journal_of, result_of, running
from tests.engine.replay_check.simulation import Row, Simulation

NAME: ContextVar[str] = ContextVar("name", default="unset")


class Odd:
    """Has no stored form."""


@task
async def double(n: int) -> int:
    return 2 * n


@task
async def late(n: int) -> int:
    await asyncio.sleep(0)
    return 2 * n


@task
def plain(n: int) -> int:
    return 2 * n


@task(timeout=30)
async def timed(n: int) -> int:
    return 2 * n


@task(concurrency=1)
async def limited(n: int) -> int:
    return 2 * n


@task
async def doomed(n: int) -> int:
    raise ValueError(f"no {n}")


@task(retries=[0, 0.5])
async def flaky(n: int) -> int:
    if current_task().attempt < 3:
        raise ValueError(f"not yet {n}")
    return n


@task
async def odd() -> Any:
    return Odd()


@task
async def cancels_itself() -> int:
    me = asyncio.current_task()
    assert me is not None
    me.cancel()
    await asyncio.sleep(0)
    return 1


@task
async def exits() -> int:
    sys.exit(3)


@task
async def names(name: str) -> str:
    before = NAME.get()
    NAME.set(name)
    return before


@task
async def announces(n: int) -> int:
    await emit("body.ran", {"n": n})
    return n


@task
async def reads_now() -> str:
    return current_run().now.isoformat()


@task
async def handled() -> str:
    return repr(sys.exception())


@flow
async def child(n: int) -> int:
    return await double(n)


async def no_call() -> int:
    return 1


async def one_call() -> int:
    return await double(1)


async def a_call_that_waits() -> int:
    return await late(1)


async def a_thread() -> int:
    return await plain(1)


async def with_options() -> list[int]:
    return [await timed(1), await limited(2)]


async def in_sequence() -> int:
    return await double(await double(await late(await double(1))))


async def fails() -> int:
    return await doomed(1)


async def fails_after_a_call() -> int:
    raise ValueError(await double(1))


async def catches() -> list[Any]:
    try:
        return [await doomed(1)]
    except ValueError as error:
        return [str(error), await handled(), await double(2)]


async def retries() -> int:
    return await double(1) + await flaky(1)


async def first_is_retried() -> int:
    return await flaky(1)


async def result_without_form() -> Any:
    await double(1)
    return Odd()


async def value_without_form() -> Any:
    return await odd()


async def wrong_arguments() -> Any:
    return await double()  # type: ignore[call-arg]


async def body_cancels_itself() -> int:
    try:
        return await cancels_itself()
    except asyncio.CancelledError:
        return await double(4)


async def body_exits() -> int:
    try:
        return await exits()
    except SystemExit as error:
        return await double(error.code)  # type: ignore[arg-type]


async def sleeps() -> float:
    value = await double(1)
    await sleep(2)
    return value + (await double(2))


async def reads_the_time() -> list[str]:
    first = current_run().now
    await double(1)
    return [first.isoformat(), current_run().now.isoformat()]


async def body_reads_the_time() -> list[str]:
    return [await reads_now(), current_run().now.isoformat(), await reads_now()]


async def reads_the_time_later() -> str:
    await double(1)
    return current_run().now.isoformat()


async def gathers() -> list[int]:
    first = await double(1)
    return [first, *await asyncio.gather(double(1), late(2), double(3))]


async def gathers_first() -> list[int]:
    return [*await asyncio.gather(double(1), late(2)), await double(3)]


async def in_a_group() -> list[int]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(double(n)) for n in range(3)]
    return [each.result() for each in tasks]


async def leaves_a_task() -> int:
    left = asyncio.create_task(double(1))
    return await double(2) + (0 if left.done() else 1)


async def within_a_timeout() -> list[Any]:
    async with timeout(timedelta(seconds=5)):
        found = [await double(1)]
    try:
        async with timeout(1):
            await sleep(5)
    except TimeoutError:
        found.append(await double(2))
    return found


async def calls_a_child() -> int:
    return await double(await child(1))


async def maps() -> list[int]:
    return [await double(1), *await double.map(range(4))]


async def contexts() -> list[str]:
    NAME.set("flow")
    return [await names("first"), await names("second"), NAME.get()]


async def forgets_to_await() -> int:
    double(1)  # type: ignore[unused-coroutine]
    return await double(2)


async def draws() -> list[float]:
    first = current_run().random.random()
    await double(1)
    return [first, current_run().random.random()]


async def body_emits() -> int:
    return await announces(1)


async def flow_emits() -> str:
    return await emit("flow.ran", {"n": await double(1)})


PROGRAMS = (
    body_emits,
    flow_emits,
    no_call,
    one_call,
    a_call_that_waits,
    a_thread,
    with_options,
    in_sequence,
    fails,
    fails_after_a_call,
    catches,
    retries,
    first_is_retried,
    result_without_form,
    value_without_form,
    wrong_arguments,
    body_cancels_itself,
    body_exits,
    sleeps,
    reads_the_time,
    reads_the_time_later,
    body_reads_the_time,
    gathers,
    gathers_first,
    in_a_group,
    leaves_a_task,
    within_a_timeout,
    calls_a_child,
    maps,
    contexts,
    forgets_to_await,
    draws,
)


TIMED = (reads_the_time, reads_the_time_later, body_reads_the_time)
"""Their values differ after a crash before anything was recorded."""

NAME_OF = attrgetter("__name__")


def played(program: Flow[..., Any], monkeypatch: pytest.MonkeyPatch, *, all_parts: bool) -> Any:
    """The outcome, the journal, the time and the commits of one run."""
    monkeypatch.setattr(run_parts, "MAKES_ALL_PARTS", all_parts)
    sim = Simulation()
    row = sim.done(program)
    journal = [recorded(entry) for entry in row.journal]
    return ended(row), journal, sim.published, sim.time, sim.commits


def ended(row: Row) -> Any:
    outcome = row.outcome
    if isinstance(outcome, Failed):
        return without_traceback(outcome.error)
    assert isinstance(outcome, Completed), outcome
    return outcome.value, outcome.codec, outcome.unclaimed_entries


def recorded(entry: Entry) -> Any:
    error = None if entry.error is None else without_traceback(entry.error)
    took = (entry.after, entry.waited, entry.took)
    where = (entry.call_key, entry.kind, entry.attempt, entry.batch, entry.position, entry.at)
    return (*where, entry.fingerprint, entry.codec, entry.value, error, entry.due_at, *took)


def without_traceback(error: bytes) -> Any:
    found = orjson.loads(error)
    return found.get("type"), found.get("message")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_the_parts_do_not_change_what_is_recorded(
    program: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outcome, journal, times and number of commits are the same with and without parts."""
    wrapped = flow(program)
    lazy = played(wrapped, monkeypatch, all_parts=False)
    full = played(wrapped, monkeypatch, all_parts=True)
    assert lazy == full


@pytest.mark.parametrize("recorded_with_all", [False, True])
@pytest.mark.parametrize(
    "program", sorted({*PROGRAMS} - {*TIMED}, key=NAME_OF), ids=lambda program: program.__name__
)
def test_either_replays_the_journal_of_the_other(
    program: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, *, recorded_with_all: bool
) -> None:
    """After a crash behind any commit, the outcome is that of the uncrashed run."""
    wrapped = flow(program)
    monkeypatch.setattr(run_parts, "MAKES_ALL_PARTS", recorded_with_all)
    whole = Simulation()
    expected = ended(whole.done(wrapped))
    for cut in range(whole.commits):
        sim = Simulation()
        row = sim.add(wrapped)
        monkeypatch.setattr(run_parts, "MAKES_ALL_PARTS", recorded_with_all)
        assert not sim.run_process(crash_after=cut)
        monkeypatch.setattr(run_parts, "MAKES_ALL_PARTS", not recorded_with_all)
        sim.run_process()
        assert ended(row) == expected


def test_a_plain_run_makes_no_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one task whose body does not wait ends without parts: the tests above compare two
    kinds of runs.
    """
    monkeypatch.setattr(run_parts, "MAKES_ALL_PARTS", False)
    begun: list[Entry | None] = []
    begin = calls.begin_first_body

    def counted(*args: Any) -> Entry | None:
        begun.append(begin(*args))
        return begun[-1]

    monkeypatch.setattr(calls, "begin_first_body", counted)
    made: list[int] = []
    make = run_parts.RunParts.make_parts

    def noted(run: run_parts.RunParts, *args: Any) -> None:
        made.append(run.run.id)
        make(run, *args)

    monkeypatch.setattr(run_parts.RunParts, "make_parts", noted)
    assert Simulation().done(flow(one_call)).value == 2
    assert (len(begun), made) == (1, [])
    assert Simulation().done(flow(a_call_that_waits)).value == 2
    assert (begun[1], len(made)) == (None, 1)
    assert Simulation().done(flow(in_sequence)).value == 16
    assert (begun[2] is not None, len(made)) == (True, 2)


@pytest.mark.anyio
async def test_a_look_from_another_thread_makes_no_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """`eventflow show` and the progress of `eventflow run` see a run's calls at any time: while its
    first body runs, behind it, and while the parts are made.
    """
    seen: list[Any] = []

    def look() -> None:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(look_here).result()

    def look_here() -> None:
        for run in app.runtime.worker.executions.values():
            keys = [call.call_key for call in run.running_calls()]
            seen.append((keys, run.ended_calls, run.has_parts))

    def looks_while_made(*args: Any) -> Suspension:
        look()
        return Suspension(*args)

    @task
    async def looks() -> None:
        look()

    @flow
    async def runs() -> None:
        await looks()
        look()
        await double(1)

    monkeypatch.setattr(run_parts, "MAKES_ALL_PARTS", False)
    monkeypatch.setattr(run_parts, "Suspension", looks_while_made)
    async with running(App("looks")) as app:
        await result_of(app, runs)
    assert seen == [(["looks#0"], 0, False), ([], 1, False), ([], 1, False)]


FORGOTTEN: list[Any] = []


@pytest.mark.anyio
async def test_parts_that_are_made_during_the_first_body_have_its_value() -> None:
    """A body that frees a call which the flow forgot is listed while it runs, and recorded."""
    listed: list[Any] = []

    @task
    async def frees() -> int:
        FORGOTTEN.clear()
        for run in app.runtime.worker.executions.values():
            listed.append((run.has_parts, [call.call_key for call in run.running_calls()]))
        return 7

    @flow
    async def forgets() -> int:
        FORGOTTEN.append(double(1))
        return await frees() + await double(2)

    async with running(App("forgets")) as app:
        run = await app.start(forgets)
        assert await run.result() == 11
        recorded = [(each.call_key, each.value) for each in await journal_of(app, run)]
    assert listed == [(True, ["frees#0"])]
    assert recorded == [("frees#0", 7), ("double#1", 4)]
