"""What a run leaves in memory when it has ended: nothing that needs the garbage collector."""

import asyncio
import contextlib
import gc
from typing import Any

import pytest

from eventflow import App, flow, task
from eventflow.testing import running

pytestmark = pytest.mark.anyio

LEFT = {"Execution", "FlowLoop", "TaskCall", "ConnectionError", "KeyError", "ValueError"}
"""Types of what a run with a failed attempt is made of."""


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
