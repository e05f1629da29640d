"""Work that a cancel of the caller must not stop half-way: closing."""

import asyncio
import sys
from collections.abc import Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from eventflow.core.errors import ANY_FAILURE


async def uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Awaits `work` to its end, also when the caller is cancelled meanwhile or was before: that is
    raised afterwards.
    """
    task = asyncio.ensure_future(error_of(work))
    was_cancelled = False
    with _shield():
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError:
                was_cancelled = True
    if was_cancelled:
        raise asyncio.CancelledError
    if (error := task.result()) is not None:
        del task
        try:
            raise error
        finally:  # breaks a cycle: the error refers to this frame
            del error


def _shield() -> AbstractContextManager[object]:
    """A shielded cancel scope of anyio. A process that has not imported anyio has no scopes to
    shield from, and importing anyio takes as long as importing eventflow.
    """
    anyio = sys.modules.get("anyio")
    return nullcontext() if anyio is None else anyio.CancelScope(shield=True)


async def error_of(work: Coroutine[Any, Any, None]) -> BaseException | None:
    """What `work` raised: a value, because a task that raises SystemExit would end its loop."""
    try:
        await work
    except ANY_FAILURE as error:
        return error
    return None
