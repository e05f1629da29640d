"""What a run leaves in memory when it has ended: nothing that needs the garbage collector."""

import asyncio
import contextlib
import gc
from typing import Any

import pytest

from eventflow import App, Permanent, Retry, emit, flow, task, timeout
from eventflow.core.clock import SystemClock
from eventflow.core.errors import RunCancelled
from eventflow.testing import running
from tests.conftest import eventually
from tests.garbage import leaving_no_error_cycles

pytestmark = pytest.mark.anyio

BEGUN: list[str] = []

LEFT = {"Execution", "FlowLoop", "TaskCall", "ConnectionError", "KeyError", "ValueError"}
"""Types of what a run with a failed attempt is made of."""


@task
async def no_failure() -> None:
    pass


@task(retries=[0.0] * 2)
async def refuses() -> int:
    raise ConnectionError("refused")


@task
async def raises_from_another() -> int:
    try:
        raise KeyError("a")
    except KeyError as error:
        raise ValueError("b") from error


@flow
async def catches_a_failure() -> str:
    try:
        await refuses()
    except ConnectionError as error:
        return str(error)
    return ""


@flow
async def fails() -> None:
    await raises_from_another()


@flow
async def gathers_failures() -> int:
    found = await asyncio.gather(refuses(), raises_from_another(), return_exceptions=True)
    return len(found)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise KeyError("text")


NOT_JSON: Any = object()

LONG_SECONDS = 60


@task
async def has_no_text() -> None:
    raise Unprintable


@task
async def unstorable() -> object:
    return object()


@task
def in_a_thread() -> None:
    raise ValueError("in a thread")


@task(timeout=0.01)
async def too_slow() -> None:
    await asyncio.sleep(LONG_SECONDS)


def retries_never(attempt: int, error: BaseException) -> bool:
    raise KeyError(attempt)


async def hook(*args: Any) -> None:
    raise ValueError("in a hook")


@task(retries=Retry(attempts=2, on=lambda error: 1 / 0))  # pyright: ignore
async def with_a_broken_retry() -> None:
    raise ValueError


@task(on_failure=hook, on_success=hook)
async def with_a_hook(fails: bool) -> None:
    if fails:
        raise Permanent("no")


@task
async def emits_an_object() -> None:
    await emit("order.done", {"n": NOT_JSON})


@flow
async def has_no_text_in_a_task() -> None:
    await has_no_text()


@flow
async def has_no_text_in_a_flow() -> None:
    raise Unprintable


@flow
async def result_of_a_task() -> None:
    await unstorable()


@flow
async def own_result() -> object:
    return object()


@flow
async def own_call() -> Any:
    return refuses()


@flow
async def thread() -> None:
    await in_a_thread()


@flow
async def attempt_timeout() -> None:
    await too_slow()


@flow(timeout=0.01)
async def flow_timeout() -> None:
    await asyncio.sleep(LONG_SECONDS)


@flow
async def block_timeout() -> None:
    async with timeout(0.01):
        await asyncio.sleep(LONG_SECONDS)


@flow
async def broken_retry() -> None:
    await with_a_broken_retry()


@flow(on_failure=hook, on_success=hook)
async def hooks() -> None:
    await with_a_hook(False)
    await with_a_hook(True)


@flow
async def emission() -> None:
    await emit("order.done", {"n": NOT_JSON})


@flow
async def emission_of_a_task() -> None:
    await emits_an_object()


@flow
async def child() -> None:
    await fails()


@flow
async def needs_a_number(n: int) -> None:
    await fails()


@flow
async def argument_of_a_child() -> None:
    await needs_a_number("x")  # type: ignore


@flow
async def mapped() -> None:
    await raises_for.map([1, 2, 3])


@task
async def raises_for(n: int) -> None:
    raise ValueError(n)


FAILING = [
    has_no_text_in_a_task,
    has_no_text_in_a_flow,
    result_of_a_task,
    own_result,
    own_call,
    thread,
    attempt_timeout,
    flow_timeout,
    block_timeout,
    broken_retry,
    hooks,
    emission,
    emission_of_a_task,
    child,
    argument_of_a_child,
    mapped,
]


@pytest.mark.parametrize("tested", FAILING, ids=lambda each: each.name)
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
async def test_a_failing_run_leaves_no_error_cycle(tested: Any):
    """However a run fails, its error is freed at once."""
    app = App("fails")
    app.add(fails, needs_a_number)
    async with running(app, clock=SystemClock()):
        for _ in range(2):
            with leaving_no_error_cycles():
                run = await app.start(tested)
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(5):
                        await run.result()
                del run


@task
async def waits(begun: str) -> None:
    BEGUN.append(begun)
    await asyncio.Event().wait()


@flow
async def waits_in_its_first_call() -> None:
    await waits("first")


@flow
async def waits_in_its_second_call() -> None:
    await no_failure()
    await waits("second")


@pytest.mark.parametrize("tested", [waits_in_its_first_call, waits_in_its_second_call], ids=str)
async def test_a_cancelled_body_leaves_no_error_cycle(tested: Any):
    """A body that waits and is cancelled is freed at once, with its asyncio task and its error."""
    async with running(App("cancels"), clock=SystemClock()) as app:
        for _ in range(2):
            with leaving_no_error_cycles():
                BEGUN.clear()
                run = await app.start(tested)
                await eventually(lambda: BEGUN, "the body waits")
                await run.cancel()
                with contextlib.suppress(RunCancelled):
                    await run.result()
                del run


@pytest.mark.parametrize("tested", [catches_a_failure, fails, gathers_failures], ids=str)
async def test_a_failing_attempt_leaves_no_reference_cycle(tested: Any):
    """What a failed attempt leaves is freed at once: the garbage collector, which walks over every
    run in memory, finds nothing of it.
    """
    async with running(App("fails")) as app:
        for _ in range(2):  # the first run fills caches
            gc.collect()
            gc.disable()
            try:
                run = await app.start(tested)
                with contextlib.suppress(Exception):
                    await run.result()
                del run
                gc.set_debug(gc.DEBUG_SAVEALL)
                gc.collect()
                found = [type(each).__name__ for each in gc.garbage]
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
                gc.enable()
    assert not LEFT.intersection(found), found
