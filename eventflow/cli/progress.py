"""Progress of long commands: a bar with a rate and the time left on a terminal, nothing in a pipe.

backfill, replay, redrive, retry of many, doctor, and `run --watch` use it.
"""

import asyncio
import shutil
import sys
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from eventflow.cli.streams import is_terminal
from eventflow.cli.times import duration_text
from eventflow.core.clock import SystemClock
from eventflow.core.columns import clip

T = TypeVar("T")

BAR_WIDTH = 20
REDRAW_SECONDS = 0.1


class Progress:
    """A bar on stderr with the rate and the time left; nothing where stderr is no terminal.

    `with Progress("replaying", total) as progress: progress.step()`. Without a total it counts.
    """

    def __init__(self, label: str, total: int | None, unit: str = "") -> None:
        self._label = label
        self._total = total
        self._unit = unit
        self._clock = SystemClock()
        self._began = self._clock.monotonic()
        self._drawn_at = self._began
        self._is_shown = is_terminal(sys.stderr)
        self._has_line = False
        self.done = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._has_line:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._has_line = False

    def step(self, count: int = 1, note: str = "") -> None:
        self.move_to(self.done + count, note)

    def move_to(self, done: int, note: str = "") -> None:
        """`note` is shown behind the bar."""
        self.done = done
        now = self._clock.monotonic()
        if self._is_shown and now - self._drawn_at >= REDRAW_SECONDS:
            self._drawn_at = now
            self._has_line = True
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r{clip(self.line(now - self._began, note), width)}\x1b[K")
            sys.stderr.flush()

    async def while_waiting(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; meanwhile the bar counts seconds."""
        task = asyncio.ensure_future(work)
        while not (await asyncio.wait([task], timeout=1.0))[0]:
            self.move_to(int(self._clock.monotonic() - self._began))
        return await task

    def line(self, seconds: float, note: str = "") -> str:
        """`replaying  [#######---]  70%  700/1,000  350/s  1 s left`."""
        rate = self.done / seconds if seconds > 0 else 0.0
        parts = [self._label]
        if self._total:
            share = min(1.0, self.done / self._total)
            filled = int(share * BAR_WIDTH)
            parts.append(f"[{'#' * filled}{'-' * (BAR_WIDTH - filled)}]")
            parts.append(f"{share:4.0%}  {self.done:,}/{self._total:,}{self._unit}")
        else:
            parts.append(f"{self.done:,}{self._unit}")
        if rate and self._unit != " s":
            parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s")
            if self._total:
                left = duration_text((self._total - self.done) / rate)
                parts.append(f"{left} left")
        return "  ".join([*parts, note] if note else parts)


def with_progress(label: str, items: Sequence[T]) -> Iterator[T]:
    """The items, with a bar that counts those that are done."""
    with Progress(label, len(items)) as progress:
        for item in items:
            yield item
            progress.step()
