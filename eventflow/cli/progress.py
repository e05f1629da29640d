"""Progress of commands that print no log lines: a bar on stderr, nothing where that is no terminal.

backfill, replay, redrive, retry of many and doctor use it; `run` has its bar below the log lines
(logs/progress.py).
"""

import asyncio
import shutil
import sys
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from eventflow.core.columns import clip
from eventflow.logs.progress import Progress, can_redraw

T = TypeVar("T")


def stderr_progress(label: str, total: int | None, unit: str = "") -> Progress:
    """A bar on stderr. Without a total it counts."""
    return Progress(label, total, unit, show=_draw if can_redraw(sys.stderr) else None)


def _draw(text: str) -> None:
    width = shutil.get_terminal_size().columns - 3  # … is three characters in ASCII
    sys.stderr.write(f"\r{clip(text, width)}\x1b[K")
    sys.stderr.flush()


def with_progress(label: str, items: Sequence[T]) -> Iterator[T]:
    """The items, with a bar that counts those that are done."""
    with stderr_progress(label, len(items)) as progress:
        for item in items:
            yield item
            progress.step()


async def count_seconds(label: str, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; meanwhile a bar counts seconds."""
    with stderr_progress(label, None, " s") as progress:
        task = asyncio.ensure_future(work)
        while not (await asyncio.wait([task], timeout=1.0))[0]:
            progress.move_to(progress.seconds)
        return await task
