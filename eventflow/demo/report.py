"""The demo's output: a timeline while it runs, then the results of the checks, one per line.

Colours appear on a terminal only, unless NO_COLOR is set. A failed check is printed in red and
makes the demo's exit code 1.
"""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import TextIO

import click

from eventflow.core.clock import SECOND, Clock
from eventflow.core.columns import display_width, wrap

MIN_WIDTH = 20
"""Columns of text on a terminal that is too narrow for anything."""
MAX_LINES = 20

COLOURS = {
    "ready": "green",
    "recovered": "green",
    "retrained": "green",
    "resumed": "green",
    "settled": "green",
    "failed": "yellow",
    "kill -9": "red",
}


class Report:
    """Writes to `stream`; times are seconds since the construction."""

    def __init__(self, stream: TextIO, clock: Clock) -> None:
        self._stream = stream
        self._clock = clock
        self._colour = stream.isatty() and "NO_COLOR" not in os.environ
        self._started_us = clock.now()
        self.failed_checks = 0

    @property
    def seconds(self) -> float:
        return (self._clock.now() - self._started_us) / SECOND

    def write(self, text: str = "", *, lead: str = "") -> None:
        """Write a line. On a terminal, a long text is wrapped behind its `lead`."""
        indent = " " * display_width(click.unstyle(lead))
        room = None
        if self._stream.isatty():
            room = max(MIN_WIDTH, shutil.get_terminal_size().columns - len(indent))
        first, *rest = wrap(text, room, MAX_LINES)
        lines = "\n".join([lead + first, *(indent + line for line in rest)])
        click.echo(lines, file=self._stream, color=self._colour)

    def timeline(self, kind: str, text: str, at_us: int | None = None) -> None:
        """Write one line of the timeline, with the time `at_us` or now."""
        seconds = self.seconds if at_us is None else (at_us - self._started_us) / SECOND
        label = click.style(f"{kind:<10}", fg=COLOURS.get(kind, "cyan"), bold=kind == "kill -9")
        self.write(text, lead=f"{click.style(f'{seconds:6.2f} s', dim=True)}  {label} ")

    def row(self, label: str, text: str) -> None:
        self.write(text, lead=f"  {label:<10} ")

    def heading(self, text: str) -> None:
        self.write()
        self.write(click.style(text, bold=True))

    def indented(self, text: str) -> None:
        """Write the output of another program."""
        for line in text.strip().splitlines():
            self.write(f"    {line}".rstrip())

    def check(self, holds: bool, stated: str, found: str = "") -> None:
        """Write the result of a check; `found` only when it failed."""
        if holds:
            self.write(stated, lead=f"  {click.style('ok', fg='green')}      ")
        else:
            self.failed_checks += 1
            broken = click.style("BROKEN", fg="red", bold=True)
            self.write(f"{stated}{f'; found {found}' if found else ''}", lead=f"  {broken}  ")


def statuses_text(statuses: Sequence[int]) -> str:
    """`202 ×8, 200`, in the order of first appearance."""
    times = Counter(statuses)
    return ", ".join(
        f"{status} ×{count}" if count > 1 else f"{status}" for status, count in times.items()
    )
