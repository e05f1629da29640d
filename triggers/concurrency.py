"""Several loops of one trigger, as one: for `listen` of a source that reads in more than one place.

A TaskGroup would do, but for the group that it wraps around the error: a listener fails with the error of its source.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any


async def together(*loops: Coroutine[Any, Any, None]) -> None:
    """Runs them until one ends, or this is cancelled. When all have ended it returns, or raises what that one raised; a cancel
    lets each end in its own way."""
    tasks = [asyncio.create_task(loop) for loop in loops]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
