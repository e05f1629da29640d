"""Runs several loops of one trigger as one: for `listen` of a source that reads in more than one
place (`S3`, drift monitors).

Unlike a TaskGroup, it raises the error of the loop itself and not a group around it.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any


async def run_until_first_ends(*loops: Coroutine[Any, Any, None]) -> None:
    """Runs the loops until one ends; then cancels the others, waits for them, and raises the first
    one's error.

    A cancel is passed on to every loop, and each may finish its current work.
    """
    tasks = [asyncio.create_task(loop) for loop in loops]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
