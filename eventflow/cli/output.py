"""The output of all commands: JSON or aligned tables on stdout, notes and errors on stderr.

Colours appear on a terminal only. Text from outside is cleaned of control characters.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click
import orjson

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
    "running": "cyan",
    "waiting": "cyan",
}
"""By the state of a run, a call, a trigger or a check, and by verdict."""


def json_option(command: F) -> F:
    return click.option(
        "--json", "as_json", is_flag=True, help="Write JSON to stdout, errors as JSON to stderr."
    )(command)


def write_result(data: Any, as_json: bool, text: str) -> None:
    """Print the result of a command: `data` as JSON, or `text`."""
    click.echo(
        orjson.dumps(data, default=str, option=orjson.OPT_INDENT_2).decode() if as_json else text
    )


def note(text: str) -> None:
    """Print a line for a person to stderr."""
    click.echo(f"eventflow: {escape_controls(text)}", err=True)


def fail(error: str, detail: str, as_json: bool) -> None:
    """Print an error to stderr; the caller exits. `error`: its code or class name."""
    if as_json:
        sys.stderr.write(orjson.dumps({"error": _snake(error), "detail": detail}).decode() + "\n")
    else:
        click.echo(f"{click.style('error:', fg='red')} {escape_controls(detail)}", err=True)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def plural(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], empty: str) -> str:
    """Rows as aligned columns under their names, `empty` for none. Cells are cut at 48 characters,
    except those of the last column.
    """
    if not rows:
        return empty
    cells = [[_cell(row.get(name)) for name in columns] for row in rows]
    widths = [
        min(48, max(len(name), *(len(line[at]) for line in cells)))
        for at, name in enumerate(columns)
    ]
    head = _line([name.upper().replace("_", " ") for name in columns], widths)
    return "\n".join(
        [click.style(head, bold=True), *(_line(line, widths, colour=True) for line in cells)]
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return short_time(value) if _INSTANT.fullmatch(value) else escape_controls(value)
    return escape_controls(orjson.dumps(value, default=str).decode())


def _line(cells: Sequence[str], widths: Sequence[int], *, colour: bool = False) -> str:
    parts: list[str] = []
    for at, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        last = at == len(cells) - 1
        cut = cell if last or len(cell) <= width else f"{cell[: width - 1]}…"
        padded = cut if last else cut.ljust(width)
        parts.append(coloured(padded) if colour else padded)
    return "  ".join(parts).rstrip()


def coloured(text: str) -> str:
    """A state in its colour; other text unchanged."""
    fg = _COLOURS.get(text.strip())
    return click.style(text, fg=fg) if fg else text


_INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


def short_time(instant: str | None) -> str:
    """`2026-01-31T08:00:00.123456Z` → `2026-01-31 08:00:00`."""
    return "-" if instant is None else f"{instant[:10]} {instant[11:19]}"


def fields_text(pairs: Sequence[tuple[str, Any]]) -> str:
    """Aligned lines `name  value`; pairs without a value are omitted."""
    given = [(name, value) for name, value in pairs if value not in (None, "", [])]
    width = max((len(name) for name, _ in given), default=0)
    return "\n".join(
        f"{click.style(name.ljust(width), bold=True)}  {coloured(_cell(value))}"
        for name, value in given
    )
