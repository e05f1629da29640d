"""Times on the command line: an instant (`2026-01-31T08:00:00Z`), or an age (`90s`, `15m`, `2h`,
`7d`, `1w`, `1d12h`), counted back from the start of the command.

`--since` and `--until` of every command take either.
"""

import re
from datetime import UTC, timedelta
from typing import Final

import click

from eventflow.core.clock import SystemClock, to_datetime
from eventflow.core.errors import UsageError
from eventflow.events.event import parse_time

_UNITS: Final = {"w": "weeks", "d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
_AGE: Final = re.compile(
    "".join(rf"(?:(?P<{unit}>\d+){letter})?" for letter, unit in _UNITS.items())
)


EXPECTED: Final = (
    "expected an instant such as 2026-01-31T08:00:00Z, or an age: 90s, 15m, 2h, 7d or 1w"
)


def parse_moment(_: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """The callback of such an option: its value as RFC 3339 in UTC."""
    if value is None:
        return None
    try:
        age = _parse_age(value)
        found = parse_time(value) if age is None else to_datetime(SystemClock().now()) - age
        return found.astimezone(UTC).isoformat().replace("+00:00", "Z")
    except (ValueError, OverflowError):
        raise click.BadParameter(f"{EXPECTED}; found {value!r}", param=option) from None


def check_order(since: str | None, until: str | None) -> None:
    """Raise UsageError unless `since` is before `until`."""
    if since is not None and until is not None and parse_time(since) >= parse_time(until):
        raise UsageError(f"expected --since before --until, found {since} and {until}")


def _parse_age(text: str) -> timedelta | None:
    found = _AGE.fullmatch(text)
    if found is None or not text:
        return None
    return timedelta(**{unit: int(number) for unit, number in found.groupdict(default="0").items()})
