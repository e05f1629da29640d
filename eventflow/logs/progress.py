"""Progress of long work: a bar with a rate and the time left on a terminal, nothing elsewhere.

Commands that print no log lines draw it themselves (cli/progress.py). In `run`, `serve` and `dev`
the bar stands below the log lines: `log_progress` hands it to the `LogOutput` (output.py).
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from eventflow.core.clock import SystemClock, duration_text
from eventflow.core.columns import clip
from eventflow.logs.log import direct_handler

BAR_WIDTH = 20
MAX_LABEL_WIDTH = 28
"""Columns, so that the time left fits a terminal of 80."""
REDRAW_SECONDS = 0.1
FIRST_DRAWN_SECONDS = 0.5
"""Before a bar appears below log lines: most moves of files are over by then."""


class Progress:
    """A bar with the rate and the time left. `show` draws a text, and removes it for an empty one;
    None draws nothing.

    `with Progress("replaying", total, show=show) as progress: progress.step()`. Without a total, or
    beyond it, it counts. `after`: seconds before it appears. Any thread may call it, one at a time.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str = "",
        *,
        show: Callable[[str], None] | None,
        after: float = REDRAW_SECONDS,
    ) -> None:
        self._label = clip(label, MAX_LABEL_WIDTH)
        self.total = total
        self._unit = unit
        self._show = show
        self._clock = SystemClock()
        self._began = self._clock.monotonic()
        self._next_at = self._began + after
        self._is_drawn = False
        self.done: float = 0

    @property
    def is_shown(self) -> bool:
        return self._show is not None

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return self._clock.monotonic() - self._began

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._is_drawn and self._show is not None:
            self._show("")
            self._is_drawn = False

    def step(self, count: float = 1, note: str = "") -> None:
        """`count`: also a part of one, of a large file."""
        self.move_to(self.done + count, note)

    def move_to(self, done: float, note: str = "") -> None:
        """`note` is shown behind the bar."""
        self.done = done
        if self._show is None or (now := self._clock.monotonic()) < self._next_at:
            return
        self._next_at = now + REDRAW_SECONDS
        self._is_drawn = True
        self._show(self.line(now - self._began, note))

    def line(self, seconds: float, note: str = "") -> str:
        """`replaying  [#######---]  70%  700/1,000  350/s  1 s left`."""
        rate = self.done / seconds if seconds > 0 else 0.0
        total = self.total if self.total and self.done <= self.total else None
        parts = [self._label]
        if total:
            share = self.done / total
            filled = int(share * BAR_WIDTH)
            parts.append(f"[{'#' * filled}{'-' * (BAR_WIDTH - filled)}]")
            parts.append(f"{share:4.0%}  {int(self.done):,}/{total:,}{self._unit}")
        else:
            parts.append(f"{int(self.done):,}{self._unit}")
        if rate and self._unit != " s":
            if rate >= 0.05:
                parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s")
            if total:
                parts.append(f"{duration_text((total - self.done) / rate)} left")
        return "  ".join([*parts, note] if note else parts)


def log_progress(label: str, total: int | None, unit: str = "") -> Progress:
    """A bar below the log lines, if this process writes them for people to a terminal."""
    handler = direct_handler()
    show = None if handler is None else handler.progress_display
    key = object()
    return Progress(
        label,
        total,
        unit,
        show=None if show is None else partial(show, key),
        after=FIRST_DRAWN_SECONDS,
    )


def can_redraw(stream: Any) -> bool:
    """Whether it is a terminal that can erase a line (TERM is not "dumb")."""
    if stream is None or getattr(stream, "closed", False):
        return False
    return stream.isatty() and os.environ.get("TERM") != "dumb"
