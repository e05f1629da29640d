"""The output of all commands: JSON or aligned tables on stdout, notes and errors on stderr.

Colours and progress bars appear on a terminal only; tables fit its width. Text from outside is
cleaned of control characters.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click
import orjson

from eventflow.cli.streams import is_terminal
from eventflow.core.columns import clip, display_width, wrap
from eventflow.events.storable import storable_text
from eventflow.logs.redaction import escape_controls

F = TypeVar("F", bound=Callable[..., Any])

_COLOURS = {
    "cancelled": "bright_black",
    "completed": "green",
    "dead": "red",
    "failed": "red",
    "filtered": "bright_black",
    "fired": "green",
    "held": "magenta",
    "invalid": "red",
    "listening": "green",
    "ok": "green",
    "paused": "magenta",
    "pending": "yellow",
    "published": "green",
    "restarting": "yellow",
    "retrying": "yellow",
    "queued": "cyan",
    "running": "cyan",
    "waiting": "cyan",
    "warning": "yellow",
}
"""By the state of a run, a call, a trigger or a check, and by verdict."""


def json_option(command: F) -> F:
    return click.option(
        "--json", "as_json", is_flag=True, help="Write JSON to stdout, errors as JSON to stderr."
    )(command)


def write_result(data: Any, as_json: bool, text: str) -> None:
    """Print the result of a command: `data` as JSON, or `text`."""
    if as_json:
        click.echo(orjson.dumps(data, default=str, option=orjson.OPT_INDENT_2).decode())
    else:
        write_text(text)


def write_text(text: str) -> None:
    """Print text for people. Without `file=` click writes UTF-8 to an ASCII stdout: right for JSON,
    which nothing may be replaced in, and unreadable for people.
    """
    click.echo(text, file=sys.stdout)


def note(text: str) -> None:
    """Print a line for a person to stderr."""
    _echo_wrapped("eventflow:", escape_controls(text))


def _echo_wrapped(label: str, text: str, **style: Any) -> None:
    """To stderr; on a terminal, lines break between words. `style`: of the label."""
    width = shutil.get_terminal_size().columns if is_terminal(sys.stderr) else None
    lines = "\n".join(wrap(f"{label} {text}", width, MAX_LINES_OF_ERROR))
    click.echo(f"{click.style(label, **style)}{lines.removeprefix(label)}", file=sys.stderr)


MAX_LINES_OF_ERROR = 40


def fail(error: str, detail: str, as_json: bool) -> None:
    """Print an error to stderr; the caller exits. `error`: its code or class name."""
    if as_json:
        line = orjson.dumps({"error": _snake(error), "detail": storable_text(detail)})
        sys.stderr.write(line.decode() + "\n")
    else:
        _echo_wrapped("error:", escape_controls(detail), fg="red")


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def plural(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    empty: str,
    *,
    width: int | None = None,
    reason_lines: int = 1,
) -> str:
    """Rows as aligned columns under their names, `empty` for none; columns without a value are left
    out.

    `width` is that of a terminal (`terminal_width`): columns of text are shortened to it, and a
    reason or error in the last one that does not fit goes to `reason_lines` of its own. Without a
    width, cells are cut at 48 characters, except those of the last column.
    """
    if not rows:
        return empty
    columns = [name for name in columns if any(row.get(name) is not None for row in rows)]
    cells = [[_cell(row.get(name)) for name in columns] for row in rows]
    heads = [name.upper().replace("_", " ") for name in columns]
    natural = [
        max(display_width(head), *(display_width(line[at]) for line in cells))
        for at, head in enumerate(heads)
    ]
    if width is None:
        widths = [*(min(48, each) for each in natural[:-1]), natural[-1]]
        return "\n".join(
            [
                click.style(_line(heads, widths), bold=True),
                *(_line(line, widths, colour=True) for line in cells),
            ]
        )
    widths = _fit(natural, columns, width)
    below = columns[-1] in _LONG and widths[-1] < natural[-1]
    if below:
        widths = _fit(natural[:-1], columns[:-1], width)
        room = width - sum(widths) - 2 * len(widths)
        widths = [*widths, room] if room >= display_width(heads[-1]) else widths
    lines = [click.style(clip(_line(heads[: len(widths)], widths, width), width), bold=True)]
    for line in cells:
        inline = len(widths) == len(line) and (not below or display_width(line[-1]) <= widths[-1])
        shown = line if inline else line[:-1]
        lines.append(_line(shown, widths[: len(shown)], width, colour=True))
        if not inline and line[-1] != "-":
            lines += [f"    {part}" for part in wrap(line[-1], width - 4, reason_lines)]
    return "\n".join(lines)


_FIXED = frozenset("id run event state started took waited attempts received at ok kind".split())
"""Columns that are never shortened."""

_LONG = frozenset("detail error why reason last_error result".split())


def _fit(natural: Sequence[int], columns: Sequence[str], width: int) -> list[int]:
    """The widths of columns in a line of `width`: the widest of text are shortened first."""
    widths = list(natural)
    flexible = [at for at, name in enumerate(columns) if name not in _FIXED]
    excess = sum(widths) + 2 * (len(widths) - 1) - width
    while excess > 0 and flexible:
        widest = max(flexible, key=lambda at: (widths[at], at))
        if widths[widest] <= 8:
            break
        widths[widest] -= 1
        excess -= 1
    return widths


def terminal_width() -> int | None:
    """The columns of the terminal that stdout is, or $COLUMNS; None in a pipe."""
    if os.environ.get("COLUMNS", "").isdigit():
        return int(os.environ["COLUMNS"]) or None
    return shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return escape_controls(value)
    return escape_controls(orjson.dumps(value, default=str).decode())


def _line(
    cells: Sequence[str], widths: Sequence[int], width: int | None = None, *, colour: bool = False
) -> str:
    parts: list[str] = []
    left = width
    for at, (cell, size) in enumerate(zip(cells, widths, strict=True)):
        last = at == len(cells) - 1
        text = cell if last and width is None else clip(cell, size)
        padded = text if last else text + " " * (size - display_width(text))
        if left is not None:
            padded = clip(padded, max(0, left))
            left -= display_width(padded) + 2
        parts.append(coloured(padded) if colour else padded)
    return "  ".join(parts).rstrip()


def coloured(text: str) -> str:
    """A state in its colour; other text unchanged."""
    fg = _COLOURS.get(text.strip())
    return click.style(text, fg=fg) if fg else text


def fields_text(pairs: Sequence[tuple[str, Any]], width: int | None = None) -> str:
    """Aligned lines `name  value`; pairs without a value are omitted. `width`: that of a terminal;
    values are cut to three lines of it.
    """
    given = [(name, value) for name, value in pairs if value not in (None, "", [])]
    size = max((len(name) for name, _ in given), default=0)
    lines: list[str] = []
    for name, value in given:
        room = None if width is None else width - size - 2
        first, *rest = wrap(_cell(value), room, MAX_LINES_OF_VALUE)
        lines.append(f"{click.style(name.ljust(size), bold=True)}  {coloured(first)}")
        lines += [" " * (size + 2) + line for line in rest]
    return "\n".join(lines)


MAX_LINES_OF_VALUE = 3
