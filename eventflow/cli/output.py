"""How the command line speaks: JSON or aligned tables on stdout, one line of trouble on stderr;
colour only on a terminal.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click
import orjson

from eventflow.logs.redaction import clean

F = TypeVar("F", bound=Callable[..., Any])

_COLOURS = {
    "completed": "green", "running": "cyan", "waiting": "cyan", "pending": "yellow", "paused": "yellow", "held": "magenta", "failed": "red",
    "dead": "red", "cancelled": "bright_black", "filtered": "bright_black", "invalid": "red", "listening": "green",
    "paused": "magenta", "reopening": "yellow", "retrying": "yellow", "fired": "green", "published": "green",
    "ok": "green",
}  # fmt: skip


def json_option(command: F) -> F:
    return click.option(
        "--json", "as_json", is_flag=True, help="JSON on stdout, errors as JSON on stderr."
    )(command)


def write_result(data: Any, as_json: bool, text: str) -> None:
    """The answer of a command."""
    click.echo(
        orjson.dumps(data, default=str, option=orjson.OPT_INDENT_2).decode() if as_json else text
    )


def note(text: str) -> None:
    """Something a person should know, on stderr."""
    click.echo(f"eventflow: {clean(text)}", err=True)


def fail(error: str, detail: str, as_json: bool) -> None:
    if as_json:
        sys.stderr.write(orjson.dumps({"error": _snake(error), "detail": detail}).decode() + "\n")
    else:
        click.echo(f"{click.style('error:', fg='red')} {clean(detail)}", err=True)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def plural(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], empty: str) -> str:
    """Rows as aligned columns under their names; long cells are cut but in the last column."""
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
        return short_time(value) if _INSTANT.fullmatch(value) else clean(value)
    return clean(value if isinstance(value, str) else orjson.dumps(value, default=str).decode())


def _line(cells: Sequence[str], widths: Sequence[int], *, colour: bool = False) -> str:
    parts: list[str] = []
    for at, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        last = at == len(cells) - 1
        cut = cell if last or len(cell) <= width else f"{cell[: width - 1]}…"
        padded = cut if last else cut.ljust(width)
        parts.append(coloured(padded) if colour else padded)
    return "  ".join(parts).rstrip()


def coloured(text: str) -> str:
    """A state's word in its colour."""
    fg = _COLOURS.get(text.strip())
    return click.style(text, fg=fg) if fg else text


_INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


def short_time(instant: str | None) -> str:
    """`2026-01-31T08:00:00.123456Z` → `2026-01-31 08:00:00`."""
    return "-" if instant is None else f"{instant[:10]} {instant[11:19]}"


def fields_text(pairs: Sequence[tuple[str, Any]]) -> str:
    """`name  value` lines, aligned; those without a value are left out."""
    given = [(name, value) for name, value in pairs if value not in (None, "", [])]
    width = max((len(name) for name, _ in given), default=0)
    return "\n".join(
        f"{click.style(name.ljust(width), bold=True)}  {coloured(_cell(value))}"
        for name, value in given
    )
