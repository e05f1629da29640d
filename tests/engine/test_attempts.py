"""Attempts: retries, timeouts, slots, threads and hooks of the bodies that a run calls."""

import asyncio
import inspect
import threading
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from eventflow import App
from eventflow.core.errors import NotStorable, TaskFailed, TaskTimedOut, UsageError
from eventflow.core.retry import Permanent, Retry, RetryAfter
from eventflow.logs.log import LogLine
from eventflow.runs.journal import Kind
from eventflow.sdk.flow import current_run, flow, sleep
from eventflow.sdk.task import current_task, task
from eventflow.testing import result_of, running
from tests.engine.replay_check.simulation import SECOND, START_TIME, Simulation

HERE: list[Simulation] = []


@pytest.fixture(autouse=True)
def sim() -> Iterator[Simulation]:
    HERE[:] = [Simulation()]
    yield HERE[0]


async def spend(seconds: float) -> None:
    await HERE[0].spend(seconds)


def test_retries_wait_as_configured_and_count_from_one(sim: Simulation) -> None:
    """Each failure and its next due time are journaled; RetryAfter sets its own delay; the value
    carries its attempt.
    """
    begun: list[tuple[int, float]] = []

    @task(retries=[10, 20, 30])
    async def flaky() -> int:
        begun.append((current_task().attempt, round((sim.now() - START_TIME) / SECOND)))
        if len(begun) == 1:
            raise ValueError("first")
        if len(begun) == 2:
            raise RetryAfter(5)
        return len(begun)

    @flow
    async def runs() -> int:
        return await flaky()

    row = sim.done(runs)
    assert row.value == 3
    assert begun == [(1, 0), (2, 10), (3, 15)]
    failed = [entry for entry in row.journal if entry.kind is Kind.FAILED]
    assert [
        (entry.attempt, round(((entry.due_at or 0) - START_TIME) / SECOND)) for entry in failed
    ] == [
        (1, 10),
        (2, 15),
    ]
    assert row.journal[-1].attempt == 3


def test_a_retry_without_delay_does_not_wait_for_the_commit(sim: Simulation) -> None:
    """With delay 0 the failure and the next attempt's value share a commit."""

    @task(retries=[0, 0])
    async def flaky() -> int:
        if current_task().attempt < 3:
            raise ValueError
        return 1

    @flow
    async def runs() -> int:
        return await flaky()

    row = sim.done(runs)
    assert [entry.kind for entry in row.journal] == [Kind.FAILED, Kind.FAILED, Kind.VALUE]
    assert len({entry.batch for entry in row.journal}) == 1


def test_permanent_and_unstorable_are_not_retried_and_errors_come_rebuilt(sim: Simulation) -> None:
    """The flow receives the error of its class and arguments where that can be rebuilt, TaskFailed
    where not.
    """
    tries: list[str] = []

    @task(retries=5)
    async def gives_up() -> None:
        tries.append("permanent")
        raise Permanent("no use")

    @task(retries=5)
    async def unstorable() -> Any:
        tries.append("unstorable")
        return object()

    class Local(Exception):
        pass

    @task
    async def local() -> None:
        raise Local("mine")

    class Unprintable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    @task
    async def unprintable() -> None:
        raise Unprintable

    @task
    async def beyond() -> None:
        raise asyncio.CancelledError("by itself")

    @flow
    async def runs() -> list[str]:
        seen: list[str] = []
        for call in (gives_up, unstorable, local, unprintable, beyond):
            try:
                await call()
            except Exception as error:
                seen.append(type(error).__name__)
                if call is local:
                    assert isinstance(error, TaskFailed) and error.message == "mine"
        return seen

    assert sim.done(runs).value == [
        "Permanent",
        NotStorable.__name__,
        "TaskFailed",
        "TaskFailed",
        "TaskFailed",
    ]
    assert tries == ["permanent", "unstorable"]


def test_a_base_exception_fails_the_attempt(sim: Simulation) -> None:
    """A BaseException of a library, or sys.exit() in a body, is a failed attempt."""

    class Stop(BaseException):
        pass

    @task
    async def stops() -> None:
        raise Stop("now")

    @task
    async def exits() -> None:
        raise SystemExit(3)

    @flow
    async def runs() -> list[str]:
        seen: list[str] = []
        for call in (stops, exits):
            try:
                await call()
            except TaskFailed as error:
                seen.append(error.error_type.rpartition(".")[2])
        return seen

    value = sim.done(runs).value
    assert value[0] == "Stop" and value[1].endswith("SystemExit")


def test_a_timeout_counts_from_the_bodys_start_and_is_a_failed_attempt(sim: Simulation) -> None:
    """A body that exceeds its timeout is cancelled and retried; waiting for a slot does
    not count.
    """

    @task(timeout=5, concurrency=1, retries=Retry(attempts=2, delay=0))
    async def works(seconds: float) -> int:
        await spend(seconds if current_task().attempt == 1 else 1)
        return current_task().attempt

    @flow
    async def runs() -> list[int]:
        return await asyncio.gather(works(4), works(4), works(4), works(9))  # pyright: ignore

    assert sim.done(runs).value == [1, 1, 1, 2]


def test_a_body_that_ignores_its_timeout_is_left_behind_and_its_late_result_refused(
    sim: Simulation,
) -> None:
    """After three ignored cancellations the attempt is recorded as timed out; what the body returns
    later is not.
    """
    ended: list[str] = []

    @task(timeout=5)
    async def deaf() -> str:
        for _ in range(3):
            try:
                await spend(1000)
            except asyncio.CancelledError:
                continue
        await spend(20)
        ended.append("late")
        return "late"

    @flow
    async def runs() -> str:
        try:
            return await deaf()
        except TaskTimedOut as error:
            await sleep(50)
            return str(error)

    row = sim.done(runs)
    assert "timeout of 5 s" in row.value
    assert ended == ["late"] and row.claims() == []


def test_a_call_that_the_flow_gives_up_is_cancelled_and_records_nothing(sim: Simulation) -> None:
    """A call whose awaiting task is cancelled leaves no entry, whether its body runs, waits for a
    retry or has not begun.
    """
    stopped: list[str] = []

    @task(retries=[10])
    async def works(name: str) -> None:
        if name == "retries":
            raise ValueError
        try:
            await spend(100)
        finally:
            stopped.append(name)

    @task
    async def quick() -> None:
        await spend(2)

    @flow
    async def runs() -> str:
        calls = [asyncio.create_task(works(name)) for name in ("runs", "retries")]
        await quick()
        for call in calls:
            call.cancel()
        never = asyncio.create_task(works("never"))
        await asyncio.sleep(0)
        never.cancel()
        await asyncio.wait([*calls, never])
        await sleep(300)
        return "done"

    row = sim.done(runs)
    assert row.value == "done"
    assert stopped == ["runs"]
    assert row.claims() == ["quick#0"] and len(row.suspensions) == 1


def test_concurrency_bounds_the_bodies_and_a_thread_keeps_its_slot_until_it_ends(
    sim: Simulation,
) -> None:
    """`concurrency=n` bounds running bodies; a thread that was given up still counts, since it
    cannot be stopped.
    """
    at_once: list[int] = []
    working = [0]

    @task(concurrency=2)
    async def works() -> None:
        working[0] += 1
        at_once.append(working[0])
        await spend(1)
        working[0] -= 1

    release, second_begun = threading.Event(), threading.Event()
    order: list[str] = []

    @task(concurrency=1)
    def blocks(name: str) -> str:
        order.append(f"{name} begins")
        if name == "first":
            release.wait(10)
        else:
            second_begun.set()
        order.append(f"{name} ends")
        return name

    @task
    async def lets_go() -> None:
        assert not await asyncio.to_thread(second_begun.wait, 0.2)
        release.set()

    @flow
    async def runs() -> str:
        await asyncio.gather(*(works() for _ in range(6)))
        first = asyncio.create_task(blocks("first"))
        await works()
        first.cancel()
        second = asyncio.create_task(blocks("second"))
        await asyncio.sleep(0)
        await lets_go()
        return await second

    sim.threads_may_block = True
    assert sim.done(runs).value == "second"
    assert max(at_once) == 2
    assert order.index("first ends") < order.index("second begins")


def test_plain_functions_run_in_threads_where_current_task_works(sim: Simulation) -> None:
    """A plain `def` body runs in a thread, sees its task and run, may emit, and its errors are like
    any other's.
    """
    threads: list[bool] = []

    @task(retries=1, timeout=60)
    def works() -> list[Any]:
        threads.append(threading.current_thread() is threading.main_thread())
        if current_task().attempt == 1:
            raise ValueError("once")
        assert current_run().now is not None
        return [current_task().attempt, current_task().idempotency_key.partition("/")[2]]

    @task
    def stops() -> None:
        raise StopIteration

    @flow
    async def runs() -> list[Any]:
        first = await works.options_with(retries=[0])()
        try:
            await stops()
        except RuntimeError as error:
            return [*first, str(error)]
        return []

    assert sim.done(runs).value == [2, "works#0", "task 'stops' raised StopIteration"]
    assert not any(threads)


def test_hooks_are_called_after_the_fact_and_change_nothing(
    sim: Simulation, caplog: pytest.LogCaptureFixture
) -> None:
    """on_retry, on_failure and on_success are called, plain or async; one that raises is logged."""
    hooks: list[tuple[str, Any]] = []

    async def succeeded(value: int) -> None:
        hooks.append(("success", value))
        raise RuntimeError("hook")

    @task(
        retries=[0],
        on_success=succeeded,
        on_failure=lambda error: hooks.append(("failure", str(error))),
        on_retry=lambda error, delay: hooks.append(("retry", delay)),
    )
    async def works(fails: int) -> int:
        if current_task().attempt <= fails:
            raise ValueError(f"no {current_task().attempt}")
        return 5

    @flow
    async def runs() -> int:
        value = await works(1)
        try:
            await works(2)
        except ValueError:
            return value
        return 0

    assert sim.done(runs).value == 5
    assert hooks == [("retry", 0.0), ("success", 5), ("retry", 0.0), ("failure", "no 2")]
    assert "task.hook_failed" in caplog.text


def test_outside_a_run_current_task_has_no_run_and_emit_is_refused() -> None:
    """A plain call has an attempt number, and no run id."""

    @task
    async def plain() -> list[Any]:
        return [current_task().run_id, current_task().attempt, current_task().idempotency_key]

    @task
    def plain_thread() -> str:
        return current_task().task

    assert asyncio.run(plain()) == ["", 1, ""]  # type: ignore[arg-type]
    assert asyncio.run(plain_thread()) == "plain_thread"  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        current_task()


def test_a_loop_that_is_closed_interrupts_and_fails_nothing(sim: Simulation) -> None:
    """When every task of the loop is cancelled from outside, attempts are not failures: the run
    goes back to pending.
    """

    @task
    async def works() -> int:
        await spend(50)
        return 1

    @flow
    async def runs() -> int:
        return await works()

    row = sim.add(runs)

    def take_down(w: Simulation) -> None:
        for other in asyncio.all_tasks(w.loop):
            if other is not asyncio.current_task(w.loop):
                other.cancel()

    sim.run_process(then=take_down)
    assert row.value == 1
    assert [entry.kind for entry in row.journal] == [Kind.VALUE]


@pytest.mark.parametrize("eager", [False, True])
def test_an_eager_task_factory_on_the_workers_loop_changes_nothing(
    sim: Simulation, eager: bool
) -> None:
    """Bodies and store calls see the worker's loop and never the flow's, whatever factory the host
    program has set.
    """
    if eager and not hasattr(asyncio, "eager_task_factory"):
        pytest.skip("eager tasks came with Python 3.12")

    @flow
    async def child() -> int:
        await sleep(3600)
        return 1

    @task
    async def works(number: int) -> int:
        return number

    @flow
    async def runs() -> Any:
        asyncio.get_running_loop()
        call = asyncio.create_task(child())
        first = await works(1)
        call.cancel()
        return [first, *await works.map([2, 3])]

    sim.eager = eager
    assert sim.done(runs).value == [1, 2, 3]
    assert [row.state.label for row in sim.rows.values()] == ["completed", "cancelled"]


@pytest.mark.skipif(
    not hasattr(inspect, "markcoroutinefunction"), reason="it came with Python 3.12"
)
def test_a_function_that_is_marked_as_a_coroutine_function_may_return_any_awaitable(
    sim: Simulation,
) -> None:
    """The value of the call is that of the awaitable, which need not be a coroutine."""

    class Ready:
        def __await__(self) -> Generator[Any, Any, int]:
            yield from asyncio.sleep(0).__await__()
            return 5

    def works() -> Any:
        return Ready()

    getattr(inspect, "markcoroutinefunction")(works)  # noqa: B009 (unknown to Python 3.11)
    made: Any = task(works)

    @flow
    async def runs() -> int:
        return await made()

    assert sim.done(runs).value == 5


@pytest.mark.anyio
@pytest.mark.parametrize("waits", [False, True])
async def test_what_a_body_prints_without_a_newline_is_a_line(*, waits: bool) -> None:
    """The text is logged when the body ends, with its task and attempt, whether or not it waits."""

    @task
    async def prints() -> None:
        print("50 %\r100 %", end="")
        if waits:
            await asyncio.sleep(0)

    @flow
    async def runs() -> None:
        await prints()

    lines: list[LogLine] = []
    async with running(App("prints"), lines=lines) as app:
        await result_of(app, runs)
    assert [(line.event, line.task, line.attempt) for line in lines] == [("100 %", "prints", 1)]
