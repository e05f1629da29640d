"""Progress of long commands: a bar with a rate and the time left on a terminal, nothing in a pipe.

backfill, replay, redrive, retry of many, doctor, and `run --watch` use it.
"""

import shutil
import sys

from eventflow.cli.streams import is_terminal
from eventflow.cli.times import duration_text
from eventflow.core.clock import SystemClock
from eventflow.core.columns import clip

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
        if rate:
            parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s")
            if self._total:
                left = duration_text((self._total - self.done) / rate)
                parts.append(f"{left} left")
        return "  ".join([*parts, note] if note else parts)
