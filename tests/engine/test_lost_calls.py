"""Calls that a flow loses: never awaited, or cut off when it returns."""

import asyncio
import io
import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from eventflow import App, emit, flow, sleep, task
from eventflow.core.errors import NotAwaited
from eventflow.logs.capture import configure
from eventflow.logs.log import LogLine
from eventflow.testing import VirtualClock, result_of, running

pytestmark = pytest.mark.anyio
HERE = Path(__file__).name


@task
async def notify(order: int = 1) -> int:
    return order


@flow
async def child() -> int:
    return 1


async def helper() -> int:
    return await notify()


@flow
async def forgets_a_task() -> None:
    notify(1)  # type: ignore[unused-coroutine]
    await notify(2)


@flow
async def forgets_an_assigned_task() -> int:
    value = notify(1)
    return 1 if isinstance(value, Coroutine) else await notify(2)


@flow
async def forgets_a_child() -> None:
    child()  # type: ignore[unused-coroutine]


@flow
async def forgets_an_emit() -> None:
    emit("order.paid")  # type: ignore[unused-coroutine]


@flow
async def forgets_a_sleep() -> None:
    sleep(3600)  # type: ignore[unused-coroutine]


@flow
async def forgets_a_helper() -> None:
    helper()  # type: ignore[unused-coroutine]


@flow
async def forgets_in_a_branch() -> None:
    async def branch() -> None:
        notify(1)  # type: ignore[unused-coroutine]

    await asyncio.gather(branch(), notify(2))


FORGETTING = {
    forgets_a_task: "task 'notify'",
    forgets_an_assigned_task: "task 'notify'",
    forgets_a_child: "flow 'child'",
    forgets_an_emit: "emit()",
    forgets_a_sleep: "sleep()",
    forgets_a_helper: "helper()",
    forgets_in_a_branch: "task 'notify'",
}


async def _lines(app: App, tested: Any, event: str) -> list[dict[str, Any]]:
    """The log lines of this event while the flow runs to its end."""
    stream = io.BytesIO()
    with configure(stream=stream, pretty=False) as logs:
        async with running(app) as app:
            try:
                await result_of(app, tested)
            finally:
                logs.flush()
    lines = map(json.loads, stream.getvalue().splitlines())
    return [line for line in lines if line["event"] == event]


def _line_of(tested: Any) -> int:
    """The line below the definition of a flow, where its call is; its branch's for the last one."""
    first = tested.fn.__code__.co_firstlineno
    return first + (3 if tested is forgets_in_a_branch else 2)


@pytest.mark.parametrize("tested", FORGETTING, ids=lambda each: each.name)
async def test_a_forgotten_await_is_a_warning_with_the_line(tested: Any) -> None:
    """A call that a flow never awaits is a warning naming what was called and where."""
    (line,) = await _lines(App("forgets"), tested, "call.not_awaited")
    assert line["level"] == "warning"
    assert line["call"].split(".")[-1] == FORGETTING[tested]
    assert line["at"].endswith(f"{HERE}:{_line_of(tested)}")
    assert line["flow"] == tested.name


@pytest.mark.parametrize("tested", FORGETTING, ids=lambda each: each.name)
async def test_strict_fails_the_run(tested: Any) -> None:
    """With `App(strict=True)` the run fails with the call and its line."""
    async with running(App("strict", strict=True)) as app:
        with pytest.raises(NotAwaited, match=f"{HERE}:{_line_of(tested)}"):
            await result_of(app, tested)


@flow
async def keeps_everything() -> int:
    later = notify(1)
    timer = asyncio.create_task(sleep(5))
    await sleep(3600)
    timer.cancel()
    done = asyncio.create_task(notify(2))
    await asyncio.sleep(0)
    done.cancel()
    return await later + sum(await asyncio.gather(notify(3), notify(4)))


async def test_calls_that_are_awaited_later_or_cancelled_are_no_mistake() -> None:
    """A call awaited after a suspension, or cancelled by the flow, is neither warned of nor a
    failure.
    """
    async with running(App("keeps", strict=True)) as app:
        assert await result_of(app, keeps_everything) == 8
    assert await _lines(App("keeps"), keeps_everything, "call.not_awaited") == []
    assert await _lines(App("keeps"), keeps_everything, "call.cut_off") == []


@task
async def slow() -> None:
    await asyncio.get_running_loop().create_future()


@flow
async def returns_too_early() -> None:
    asyncio.create_task(slow())  # noqa: RUF006 (cut off on purpose)
    asyncio.create_task(child())  # noqa: RUF006 (cut off on purpose)
    await notify()


async def test_calls_that_the_return_cuts_off_are_a_warning() -> None:
    """A flow that returns while calls run logs which calls it abandons, at warning."""
    app = App("early", clock=VirtualClock())
    (line,) = await _lines(app, returns_too_early, "call.cut_off")
    assert line["level"] == "warning"
    assert line["count"] == 1 + any("child" in call for call in line["calls"])
    assert any("slow" in call for call in line["calls"])


async def test_the_warning_is_a_line_of_its_run_and_of_no_other() -> None:
    """Of runs that end together, `eventflow logs RUN` shows each its own warning."""
    lines: list[LogLine] = []
    async with running(App("early"), lines=lines) as app:
        runs = [await app.start(returns_too_early) for _ in range(5)]
        await asyncio.gather(*(run.result() for run in runs))
    cut_off = [(line.run, line.task) for line in lines if line.event == "call.cut_off"]
    assert sorted(cut_off) == sorted((run.number, "") for run in runs)


@flow
async def is_cancelled() -> None:
    asyncio.create_task(slow())  # noqa: RUF006 (cut off on purpose)
    await slow()


async def test_what_a_cancel_cuts_off_is_no_warning() -> None:
    """A cancelled run abandons its calls without a warning: that is what was asked for."""
    stream = io.BytesIO()
    with configure(stream=stream, pretty=False) as logs:
        async with running(App("cancelled")) as app:
            run = await app.start(is_cancelled)
            await run.cancel()
            with pytest.raises(Exception, match="cancelled"):
                await run.result()
        logs.flush()
    assert b"call." not in stream.getvalue()
