"""What newcomers write in flows and tasks that runs, but not as it reads, and what is logged."""

import asyncio
import gc
import io
import json
import time
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from eventflow import App, flow, task
from eventflow.core.clock import SystemClock
from eventflow.core.errors import ArgumentsChanged, NotAwaited
from eventflow.logs.capture import configure
from eventflow.testing import result_of, running

pytestmark = pytest.mark.anyio
HERE = Path(__file__).name


async def lines_of(act: Callable[[App], Awaitable[Any]], *flows: Any) -> list[dict[str, Any]]:
    """The log lines while `act` uses an open app with these flows."""
    app = App("mistaken")
    app.add(*flows)
    stream = io.BytesIO()
    with configure(stream=stream, pretty=False) as logs:
        async with running(app) as opened:
            await act(opened)
        logs.flush()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


# --------------------------------------------------------------------------- called like a function


@flow
async def doubled(x: int) -> int:
    return 2 * x


@task
async def awaits_a_flow(x: int) -> int:
    return await doubled(x)


@flow
async def has_a_task_that_does(x: int) -> int:
    return await awaits_a_flow(x)


async def test_a_flow_called_like_a_function_is_a_warning() -> None:
    """`await my_flow(x)` while its app is open runs the function, and warns once for each place
    with the call that starts a run.
    """

    async def act(_: App) -> None:
        for x in (3, 4):
            assert await doubled(x) == 2 * x
        await doubled(4)

    found = [line for line in await lines_of(act, doubled) if "called_directly" in line["event"]]
    assert len(found) == 2 and found[0]["level"] == "warning"
    assert HERE in found[0]["at"] and found[0]["hint"].endswith("app.start(doubled, x=...)")


async def test_a_flow_called_in_a_task_is_a_warning() -> None:
    """A task body that awaits a flow starts no run, and a warning names where that is possible."""

    async def act(app: App) -> None:
        assert await result_of(app, has_a_task_that_does, x=3) == 6

    found = await lines_of(act, doubled)
    (line,) = [line for line in found if line["event"] == "flow.called_directly"]
    assert "a task starts no runs" in line["hint"]


async def test_a_flow_is_a_function_where_no_app_is_open() -> None:
    """Without an open app, such as in unit tests, a flow is its function, without a warning."""

    stream = io.BytesIO()
    with configure(stream=stream, pretty=False) as logs:
        async with running(App("closed")):
            pass
        assert await doubled(3) == 6
        logs.flush()
    assert b"called_directly" not in stream.getvalue()


async def test_a_flow_that_no_open_app_has_is_a_warning() -> None:
    """A flow that was not added starts no run either: the hint says how to add it."""

    async def act(_: App) -> None:
        assert await doubled(3) == 6

    (line,) = [line for line in await lines_of(act) if "called_directly" in line["event"]]
    assert HERE in line["at"] and "app.add(doubled) before the App opens" in line["hint"]


# --------------------------------------------------------------------------- timeouts


BLOCKED_SECONDS = 0.2


@task(timeout=0.05)
async def blocks() -> int:
    time.sleep(BLOCKED_SECONDS)
    return 1


@flow
async def waits_for_it() -> int:
    return await blocks()


async def test_a_body_that_blocks_past_its_timeout_is_a_warning() -> None:
    """An async body that blocks the loop past its timeout is a warning with the seconds and the
    task, and its value counts.
    """

    stream = io.BytesIO()
    with configure(stream=stream, pretty=False) as logs:
        async with running(App("mistaken"), clock=SystemClock()) as app:
            assert await result_of(app, waits_for_it) == 1
        logs.flush()
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    (line,) = [line for line in found if line["event"] == "task.timeout_missed"]
    assert line["task"] == "blocks" and line["seconds"] >= 0.2 and line["timeout"] == 0.05
    assert "`def` instead of `async def`" in line["hint"]


# --------------------------------------------------------------------------- forgotten awaits


@task
async def load(rows: int = 10) -> list[int]:
    return list(range(rows))


@flow
async def returns_a_call() -> Any:
    return load()


@task
def plain_returns_a_call() -> Any:
    return load()


@flow
async def calls_it() -> Any:
    return await plain_returns_a_call()


@task
async def returns_the_call_of_its_body() -> Any:
    return load()


@flow
async def awaits_it() -> Any:
    return await returns_the_call_of_its_body()


@flow
async def measures_a_call() -> int:
    return len(load())  # type: ignore[arg-type]


def test_the_way_out_of_changed_arguments() -> None:
    """A run held because a call's arguments changed names the command that discards its record."""
    assert "`eventflow retry RUN --from-scratch`" in str(ArgumentsChanged("f#0", "x: 1 -> 2"))


@flow
async def forgets_a_map() -> None:
    load.map(range(3))  # type: ignore[unused-coroutine]


@pytest.mark.parametrize("tested", [returns_a_call, calls_it], ids=lambda each: each.name)
async def test_a_returned_call_fails_with_await(tested: Any) -> None:
    """A flow or a task that returns a call instead of its value fails with what was called and
    `await`.
    """
    async with running(App("mistaken")) as app:
        with pytest.raises(NotAwaited, match=r"never awaited task 'load'.*write `await` before"):
            await result_of(app, tested)


async def test_a_call_that_a_body_returns_names_no_line_of_the_flow() -> None:
    """The error names no line of the flow, because the flow did not make the call."""
    async with running(App("mistaken")) as app:
        with pytest.raises(NotAwaited, match="never awaited task 'load'; the call did not run"):
            await result_of(app, awaits_it)


async def test_a_call_used_as_a_value_has_a_note() -> None:
    """An error of Python about a coroutine has a note that says where its value comes from."""
    async with running(App("mistaken")) as app:
        with pytest.raises(TypeError, match="coroutine") as failed:
            await result_of(app, measures_a_call)
    assert "write `await` before the call" in "".join(failed.value.__notes__)


async def test_a_forgotten_map_is_named_as_written() -> None:
    """A map that is not awaited is named by its task."""

    async def act(app: App) -> None:
        await result_of(app, forgets_a_map)

    found = await lines_of(act, forgets_a_map)
    (line,) = [line for line in found if line["event"] == "call.not_awaited"]
    assert line["call"] == "load.map()" and HERE in line["at"]


async def test_pythons_own_warning_names_the_users_line() -> None:
    """A call that is dropped outside of a run is Python's warning with the user's line and the
    name of the task, also while an app is open.
    """
    async with running(App("mistaken")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load()  # type: ignore[unused-coroutine]
            gc.collect()
            await asyncio.sleep(0)
    (warning,) = [each for each in caught if each.category is RuntimeWarning]
    assert str(warning.message) == "coroutine 'task load' was never awaited"
    assert warning.filename == __file__
