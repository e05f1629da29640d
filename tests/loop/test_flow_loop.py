"""Identity, order and time of plain asyncio inside a run, and the places where identity is lost
(P5).
"""

import asyncio
import contextvars
import os
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest

from eventflow.core.errors import OutsideFlowError, UsageError
from eventflow.loop.flow_loop import FlowLoop
from eventflow.runs.run import NeedsAttention
from eventflow.sdk.flow import current_run, flow, sleep, timeout
from eventflow.sdk.task import current_task, task
from tests.engine.replay_check.simulation import START_TIME, Simulation

MAX_POLLS = 1_000_000
"""After so many looks a flow that polls has seen that its loop stands still."""


@task
async def double(number: int) -> int:
    return number * 2


# --------------------------------------------------------------------------- identity


def test_call_keys_follow_lineage_not_the_order_of_calls() -> None:
    """A call is named by the branch that makes it: two branches that call one task have separate
    call keys.
    """

    async def branch(name: str) -> int:
        return await double(1) + await double(2)

    @flow
    async def forks() -> list[int]:
        return await asyncio.gather(branch("a"), branch("b"), branch("b"), double(3))  # pyright: ignore

    claims = Simulation().done(forks).claims()
    assert len(claims) == len(set(claims)) == 7
    scopes = {claim.rpartition("/")[0] for claim in claims}
    a, b, b2 = sorted(
        (scope for scope in scopes if "branch" in scope),
        key=lambda scope: (scope.endswith(".1"), scope),
    )
    assert b2 in (f"{a}.1", f"{b}.1")
    assert {f"{scope}/double#{n}" for scope in (a, b, b2) for n in (0, 1)} < set(claims)
    assert "double#0" in claims  # claimed where it was called, though gather made a task of it


def test_a_label_does_not_depend_on_arguments_without_a_json_form() -> None:
    """Arguments without a JSON form do not count, those with one do, closures do not; a growing
    closure costs nothing.
    """
    results: list[int] = []

    async def one(number: int, tool: object) -> None:
        results.append(await double(number))

    @flow
    async def forks() -> int:
        await asyncio.gather(*(one(n, object()) for n in range(3)))
        return len(results)

    first = Simulation().done(forks).claims()
    second = Simulation().done(forks).claims()
    assert len(results) == 6
    assert first == second and len({claim.rpartition("/")[0] for claim in first}) == 3


def test_sets_of_tasks_and_futures_iterate_alike_in_every_process() -> None:
    """Flow-made tasks and futures hash by lineage; two runs do not share their hashes."""
    seen: list[list[int]] = []

    @flow
    async def hashes() -> None:
        tasks = [asyncio.create_task(double(n)) for n in range(3)]
        future = asyncio.get_running_loop().create_future()
        seen.append([*map(hash, tasks), hash(future)])
        await asyncio.gather(*tasks)

    sim = Simulation()
    sim.done(hashes)
    sim.done(hashes)
    Simulation().done(hashes)
    assert seen[0] == seen[2] and seen[0][:3] != seen[1][:3]
    assert len(set(seen[0])) == 4


def test_a_flow_reads_the_same_time_and_draws_the_same_numbers_in_every_process() -> None:
    """`current_run().now` and `.random`, the loop's time, and what bodies do with either of them,
    replay alike.
    """

    @task
    async def draws() -> bool:
        current_run().random.random()  # does not move the flow's generator
        return current_run().now is not None

    processes: list[list[Any]] = []

    @flow
    async def reads(early: bool) -> None:
        processes.append(seen := [])
        if early:
            seen += [current_run().now, current_run().random.random()]
        await draws()
        seen += [
            current_run().now,
            current_run().random.random(),
            asyncio.get_running_loop().time(),
        ]
        await sleep(2)
        seen += [current_run().now, current_run().random.random()]
        await double(1)
        seen += [current_run().now]

    for early in (True, False):
        for cut in range(3):
            sim = Simulation()
            row = sim.add(reads, early=early)
            processes.clear()
            assert not sim.run_process(crash_after=cut)
            answers = sum(entry.kind.is_final for entry in row.journal)
            durable = sum((2 * early, 3, 2, 1)[: answers + 1])
            sim.advance(3600_000_000)
            sim.run_process()
            first, second = processes
            assert early or "@start" not in [entry.call_key for entry in row.journal]
            # What follows an answer that was not durable may differ, and so may the start.
            assert cut == 0 or first[:durable] == second[:durable], (early, cut)


def test_as_completed_starts_its_coroutines_in_the_same_order_in_every_process() -> None:
    """Although `as_completed` iterates a set of coroutines, their first steps come in the order of
    their names.
    """
    orders: set[tuple[str, ...]] = set()
    bodies: list[str] = []

    @task
    async def named(name: str) -> None:
        bodies.append(name)

    @flow
    async def walks() -> None:
        begun: list[str] = []

        async def one(name: str) -> int:
            begun.append(name)
            return await double(1)

        for each in asyncio.as_completed([one(name) for name in "abcdefgh"]):
            await each
        begun.append("|")
        for each in asyncio.as_completed([named(name) for name in "abcdefgh"]):
            await each
        orders.add((*begun, *bodies))
        bodies.clear()

    keep: list[Any] = []
    for n in range(20):
        keep.append([object() for _ in range(n * 7)])  # other addresses, other set orders
        Simulation().done(walks)
    assert len(orders) == 1


def test_timers_are_named_by_their_purpose() -> None:
    """A timeout put before a sleep by a later deployment does not get the sleep's
    recorded firing.
    """
    guarded = [False]

    @flow
    async def waits() -> str:
        if guarded[0]:
            async with timeout(3600):
                await double(1)
        await sleep(10)
        await double(2)
        return "in time"

    sim = Simulation()
    row = sim.add(waits)
    sim.run_process(until=START_TIME + 11_000_000, crash_after=2)
    assert "sleep#0" in [entry.call_key for entry in row.journal]
    guarded[0] = True
    sim.run_process()
    assert row.value == "in time"


# --------------------------------------------------------------------------- asyncio as it is


def test_p5_a_commit_is_delivered_whole() -> None:
    """All entries of one commit reach the flow before it takes its next step, live and
    replaying.
    """

    @flow
    async def waits() -> list[int]:
        calls = [asyncio.create_task(double(n)) for n in (1, 2, 3)]
        done, left = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        return [len(done), len(left), await double(4)]

    assert Simulation().done(waits).value == [3, 0, 8]
    sim = Simulation()
    row = sim.add(waits)
    sim.run_process(crash_after=1)
    sim.run_process()
    assert row.value == [3, 0, 8]


def test_a_wide_gather_is_neither_a_busy_loop_nor_held(caplog: pytest.LogCaptureFixture) -> None:
    """20,000 branches at once take more steps than one `run_ready`; they park like any
    other flow.
    """

    @flow
    async def wide() -> int:
        return sum(await asyncio.gather(*(double(1) for _ in range(20_000))))

    assert Simulation().done(wide).value == 40_000
    assert "flow.busy_loop" not in caplog.text


def test_a_flow_that_computes_for_long_is_not_held() -> None:
    """A flow that yields thousands of times between its calls completes."""

    @flow
    async def computes() -> int:
        for _ in range(30_000):
            await asyncio.sleep(0)
        return await double(1)

    assert Simulation().done(computes).value == 2


def test_a_polling_flow_gets_its_values_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A flow that polls instead of waiting still gets its values; it is logged once."""

    @flow
    async def polls() -> int:
        calls = [asyncio.create_task(double(n)) for n in (1, 2)]
        for call in calls:
            for _ in range(MAX_POLLS):
                if call.done():
                    break
                await asyncio.sleep(0)
        return sum(call.result() for call in calls)

    assert Simulation().done(polls).value == 6
    assert caplog.text.count("flow.busy_loop") == 1


def test_a_dropped_async_generator_is_closed_inside_the_run() -> None:
    """`break` out of an `async for`: the generator's `finally` runs on the run's own loop, and may
    call tasks.
    """
    closed: list[int] = []

    async def pages() -> AsyncIterator[int]:
        try:
            yield await double(1)
            yield await double(2)
        finally:
            closed.append(await double(3))

    @flow
    async def reads() -> list[int]:
        first: list[int] = []
        async for page in pages():
            first.append(page)
            break
        await sleep(1)
        return [*first, *closed]

    def clean(sim: Simulation) -> Any:
        closed.clear()
        return sim.add(reads)

    assert Simulation().done(reads).value == [2, 6]
    closed.clear()
    row = clean(sim := Simulation())
    sim.run_process(crash_after=2)
    closed.clear()
    sim.run_process()
    assert row.value == [2, 6]


def test_sys_exit_in_a_flow_fails_the_run_not_the_worker() -> None:
    """SystemExit is the run's failure."""

    @flow
    async def leaves(deep: bool) -> None:
        async def exits() -> None:
            sys.exit(3)

        if deep:
            await asyncio.gather(exits(), double(1))
        sys.exit(3)

    for deep in (False, True):
        sim = Simulation()
        other = sim.add(gathers_later)
        row = sim.done(leaves, deep=deep)
        assert "SystemExit" in str(row.error)
        assert other.value == 2


@flow
async def gathers_later() -> int:
    await sleep(1)
    return await double(1)


def test_work_left_behind_is_cancelled_when_the_flow_returns() -> None:
    """As in asyncio.run: background tasks are cancelled, may ignore that, and nothing of them is
    recorded.
    """
    ends: list[str] = []

    @flow
    async def leaves() -> str:
        async def background() -> None:
            try:
                await sleep(3600)
            except asyncio.CancelledError:
                ends.append("cancelled")
                await double(5)
                ends.append("recorded")

        await asyncio.gather(double(1))
        keep = asyncio.create_task(background())
        await asyncio.sleep(0)
        return "left" if not keep.done() else ""

    row = Simulation().done(leaves)
    assert row.value == "left" and ends == ["cancelled"]
    assert row.claims() == ["double#0"]


def test_infinite_and_zero_waits() -> None:
    """`sleep(inf)` waits for ever (suspended), `timeout(0)` at once, `sleep(0)` only yields."""

    @flow
    async def waits() -> str:
        await asyncio.sleep(0)
        try:
            async with timeout(0):
                await asyncio.sleep(float("inf"))
        except TimeoutError:
            pass
        with anyio.move_on_after(float("inf")):
            await double(1)
        await asyncio.sleep(float("inf"))
        return "never"

    sim = Simulation()
    row = sim.add(waits)
    sim.run_process(until=START_TIME + 1_000_000)
    assert row.suspensions


def test_io_on_the_runs_loop_is_refused_with_advice() -> None:
    """Sockets in a flow body raise a UsageError that names the place for them."""

    @flow
    async def connects() -> None:
        await asyncio.open_connection("localhost", 1)

    error = Simulation().done(connects).error
    assert isinstance(error, UsageError) and "@task" in str(error)


def test_a_callback_that_raises_is_logged_and_harms_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on any loop: `call_soon(broken)` is reported, the run continues."""

    @flow
    async def schedules() -> int:
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        return await double(1)

    assert Simulation().done(schedules).value == 2
    assert "flow.callback_failed" in caplog.text


# --------------------------------------------------------------------------- out of the flow


def test_to_thread_in_a_flow_body_works_and_keeps_the_run_in_memory() -> None:
    """A result that is not journaled is awaited: the run is neither held nor suspended
    meanwhile.
    """

    @flow
    async def threads() -> list[Any]:
        first = await asyncio.to_thread(sum, [1, 2])
        try:
            await asyncio.to_thread(lambda: 1 / 0)
        except ZeroDivisionError:
            return [first, await double(2)]
        return []

    assert Simulation().done(threads).value == [3, 4]


@pytest.mark.parametrize("how", ["to_thread", "executor", "own loop"])
def test_a_task_called_outside_the_flow_raises_outside_flow_error(how: str) -> None:
    """From a thread with the flow's context, or from another loop in it, the error of a task call
    names the remedy.
    """

    def plain_thread() -> None:
        double(1)  # pyright: ignore[reportUnusedCoroutine]

    async def elsewhere() -> None:
        await double(1)

    @flow
    async def strays() -> str:
        try:
            if how == "to_thread":
                await asyncio.to_thread(plain_thread)
            elif how == "executor":
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(contextvars.copy_context().run, plain_thread).result()
            else:
                await asyncio.to_thread(asyncio.run, elsewhere())
        except OutsideFlowError as lost:
            return str(lost)
        return "called"

    message = Simulation().done(strays).value
    assert ("another event loop" if how == "own loop" else "a thread") in message
    assert "double.fn(...)" in message


def test_a_process_that_a_flow_forks_cannot_call_tasks() -> None:
    """The copy of a flow's step in a forked child records nothing in the parent's run."""

    @flow
    async def forks() -> int:
        child = os.fork()
        if not child:
            try:
                double(1)  # pyright: ignore[reportUnusedCoroutine]
            except OutsideFlowError:
                os._exit(7)
            os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert Simulation().done(forks).value == 7


def test_a_task_called_for_a_settled_run_raises_outside_flow_error() -> None:
    """A context that is used after its run has settled cannot call tasks."""
    kept: list[contextvars.Context] = []

    @flow
    async def leaks() -> None:
        kept.append(contextvars.copy_context())

    Simulation().done(leaks)
    with pytest.raises(OutsideFlowError, match="already settled"):
        kept[0].run(double, 1)  # pyright: ignore[reportUnusedCoroutine]


def test_in_a_task_body_and_outside_of_runs_a_task_is_a_plain_call() -> None:
    """Calls in a body are not journaled; outside a run a task is its function with its retries and
    timeout.
    """
    tries: list[int] = []

    @task(retries=2, timeout=5)
    async def flaky() -> int:
        tries.append(current_task().attempt)
        if len(tries) < 3:
            raise ValueError
        return 7

    @task
    async def outer() -> int:
        return await double(4) + len(await double.map([1, 2]))

    @flow
    async def runs() -> int:
        return await outer()

    row = Simulation().done(runs)
    assert row.value == 10 and row.claims() == ["outer#0"]
    quick = flaky.options_with(retries=[0, 0])
    assert asyncio.run(quick()) == 7  # type: ignore[arg-type]
    assert tries == [1, 2, 3]
    with pytest.raises(UsageError):
        current_task()


def test_a_flow_that_waits_for_nothing_is_held() -> None:
    """A run that nothing can wake is held with a reason, not kept in memory for ever."""

    @flow
    async def waits() -> None:
        await double(1)
        await asyncio.Event().wait()

    row = Simulation().done(waits)
    assert isinstance(row.outcome, NeedsAttention) and "waits for a result" in row.reason


def test_flow_code_that_runs_while_its_loop_closes_runs_on_that_loop() -> None:
    """A flow that ignores every cancel is closed at last: a task it calls then is refused, never
    run as a plain function.
    """
    calls: list[str] = []

    @task
    async def effect() -> None:
        calls.append("effect")

    @flow
    async def clings() -> str:
        async def limpet() -> None:
            while True:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    continue
                finally:
                    if len(calls) < 10:
                        calls.append(type(asyncio.get_running_loop()).__name__)
                        await effect()

        keep = asyncio.create_task(limpet())
        await asyncio.sleep(0)
        return "left" if keep else ""

    assert Simulation().done(clings).value == "left"
    assert calls and set(calls) == {FlowLoop.__name__}
