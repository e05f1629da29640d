"""Whether flow code cleans up after a cancel, or has swallowed it and goes on.

Clean-up is what runs in an `except` or `finally` block that the cancel has entered, and every
asyncio task that is made there. A broad `except`, or `asyncio.wait_for` before Python 3.12, takes
the cancel and returns to the flow's normal course: that is none. engine/flow_calls.py asks.
"""

import asyncio
import sys
from typing import Any, cast


class Cleanup:
    """Of one flow, since its cancel was delivered: `tasks` were made to clean up; those of
    `waits_as_before` have begun to wait for something else.
    """

    __slots__ = ("tasks", "waits_as_before")

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any] | None] = set()
        self.waits_as_before: set[asyncio.Task[Any] | None] = set()


def handles_cancel() -> bool:
    """Whether the caller is inside of a block that handles a cancel, or an error raised there."""
    return _stems_from_cancel(sys.exception())


def _stems_from_cancel(error: BaseException | None) -> bool:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            return True
        if isinstance(error, BaseExceptionGroup):
            group = cast("BaseExceptionGroup[BaseException]", error)
            if any(map(_stems_from_cancel, group.exceptions)):
                return True
        error = error.__context__
    return False
