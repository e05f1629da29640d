"""A coroutine whose first step is taken before its task begins behaves as a task's coroutine does
(loop/started.py).
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import ContextVar, copy_context
from typing import Any

import pytest

from eventflow.loop.started import StartedCoroutine, run_as_task
from tests.garbage import leaving_no_error_cycles

A_MOMENT = 0.001
"""Seconds that a coroutine waits."""
A_WHILE = 0.02
"""Seconds in which it is cancelled, if it is."""

SEEN: list[Any] = []
NAME: ContextVar[str] = ContextVar("name", default="")


@pytest.fixture(autouse=True)
def fresh() -> None:
    SEEN.clear()


async def returns() -> str:
    SEEN.append(asyncio.current_task())
    NAME.set("set")
    return "value"


async def waits() -> str:
    async with asyncio.timeout(40):  # needs a current task
        await asyncio.sleep(0)
        await asyncio.sleep(A_MOMENT)
    SEEN.append(asyncio.current_task())
    return "value"


async def fails() -> str:
    raise OSError("at once")


async def fails_later() -> str:
    await asyncio.sleep(0)
    raise OSError("later")


async def awaits_an_error() -> str:
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_exception, OSError("of a future"))
    try:
        return await future
    except OSError as error:
        return f"caught {error}"


async def cleans_up() -> str:
    try:
        await asyncio.sleep(A_WHILE)
    except asyncio.CancelledError:
        SEEN.append("cancelled")
        await asyncio.sleep(0)
        SEEN.append("cleaned up")
        raise
    return "value"


async def swallows() -> str:
    try:
        await asyncio.sleep(A_WHILE)
    except asyncio.CancelledError:
        return "swallowed"
    return "value"


async def cancels_itself() -> str:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(A_MOMENT)
    return "value"


async def cancels_itself_with_a_message() -> str:
    task = asyncio.current_task()
    assert task is not None
    task.cancel("the reason")
    try:
        await asyncio.sleep(A_MOMENT)
    except asyncio.CancelledError as error:
        return repr(error.args)
    return "value"


async def cancels_what_it_gathers() -> str:
    task = asyncio.current_task()
    assert task is not None
    task.cancel("the reason")
    try:
        await asyncio.gather(asyncio.sleep(A_MOMENT), asyncio.sleep(A_MOMENT))
    except asyncio.CancelledError as error:
        return repr(error.args)
    return "value"


Program = Callable[[], Coroutine[Any, Any, str]]
PROGRAMS = (
    returns,
    waits,
    fails,
    fails_later,
    awaits_an_error,
    cleans_up,
    swallows,
    cancels_itself,
)


def begun(program: Program) -> "asyncio.Task[str]":
    """A task whose coroutine takes its first step here."""
    started = StartedCoroutine(copy_context())
    task: asyncio.Task[str] = asyncio.Task(started, context=started.context)
    loop = asyncio.get_running_loop()
    run_as_task(task, loop, started.context, started.take_first_step, program())
    return task


async def outcome(task: "asyncio.Task[str]", *, cancelled: bool) -> Any:
    if cancelled:
        task.cancel()
    (result,) = await asyncio.gather(task, return_exceptions=True)
    seen = [each if isinstance(each, str) else each is task for each in SEEN]
    SEEN.clear()
    return repr(result), task.cancelled(), seen


async def both(program: Program, *, cancelled: bool) -> tuple[Any, Any]:
    """The outcomes with a first step that is taken at once, and with `create_task`."""
    mine = await outcome(in_callback(lambda: begun(program)), cancelled=cancelled)
    task = asyncio.create_task(program())
    if cancelled:
        await asyncio.sleep(0)  # it takes its first step, too
    return mine, await outcome(task, cancelled=cancelled)


def in_callback(call: Callable[[], "asyncio.Task[str]"]) -> "asyncio.Task[str]":
    """`run_as_task` must not be called in a step of another task."""
    me = asyncio.current_task()
    assert me is not None
    loop = asyncio.get_running_loop()
    asyncio.tasks._leave_task(loop, me)  # pyright: ignore
    try:
        return call()
    finally:
        asyncio.tasks._enter_task(loop, me)  # pyright: ignore


@pytest.mark.parametrize("cancelled", [False, True], ids=["", "cancelled"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_it_ends_as_a_task_ends(program: Program, *, cancelled: bool) -> None:
    """Value, error, cancellation and what the coroutine saw are those of `create_task`; a cancel in
    the same turn reaches it where it waits.
    """

    mine, theirs = asyncio.run(both(program, cancelled=cancelled))
    if program is returns and cancelled:
        assert theirs[0] == mine[0] == "'value'"
    else:
        assert mine == theirs


@pytest.mark.parametrize("program", [cancels_itself_with_a_message, cancels_what_it_gathers])
def test_the_message_of_a_cancel_reaches_the_coroutine(program: Program) -> None:
    """The coroutine receives the message of a cancel: libraries recognize their cancels by it."""
    mine, theirs = asyncio.run(both(program, cancelled=False))
    assert mine == theirs
    assert "the reason" in mine[0]


def test_the_first_step_is_taken_at_once_and_in_the_context_of_the_task() -> None:
    """A body that does not wait has ended before its task begins; what it sets stays in its own
    context.
    """

    async def main() -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[list[Any]] = loop.create_future()

        def call() -> None:
            task = begun(returns)
            done.set_result([list(SEEN) == [task], NAME.get()])

        loop.call_soon(call)
        assert await done == [True, ""]

    asyncio.run(main())


def test_a_loop_that_closes_closes_the_coroutine() -> None:
    """A task that never continues closes its coroutine, whose `finally` blocks run."""
    ended: list[str] = []

    async def body() -> None:
        try:
            await asyncio.sleep(A_WHILE)
        finally:
            ended.append("closed")

    started = StartedCoroutine(copy_context())
    with asyncio.Runner() as runner:

        async def begin() -> None:
            started.take_first_step(body())

        runner.run(begin())
    started.close()
    assert ended == ["closed"]


def test_a_failure_that_nobody_takes_is_freed_at_once() -> None:
    """The error of a first step is in no reference cycle, also if no task goes on with it."""

    async def begin() -> None:
        StartedCoroutine(copy_context()).take_first_step(fails())

    with asyncio.Runner() as runner, leaving_no_error_cycles():
        runner.run(begin())
