"""Times on the command line.

Options (`--since`, `--until`) take an instant (`2026-01-31T08:00:00Z`), or an age (`90s`, `15m`,
`2h`, `7d`, `1w`, `1d12h`), counted back from the start of the command. Text for people shows ages
(`2 min ago`), durations (`310 ms`), and instants in the zone of this machine ($TZ), which is named.
JSON always has UTC.
"""

import re
from datetime import UTC, datetime, timedelta
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


# --------------------------------------------------------------------------- for people


def now() -> datetime:
    return to_datetime(SystemClock().now())


def zone_name() -> str:
    """The zone of instants in text: `UTC`, `CET`."""
    return now().astimezone().tzname() or "local time"


def instant_text(instant: str) -> str:
    """`2026-01-31 09:00:00 CET, 2 min ago`."""
    return f"{moment_text(instant)}, {age_text(instant)}"


def moment_text(instant: str) -> str:
    """`2026-01-31 09:00:00 CET`."""
    moment = datetime.fromisoformat(instant).astimezone()
    return f"{moment:%Y-%m-%d %H:%M:%S} {moment.tzname()}"


def seconds_since(instant: str) -> float:
    return max(0.0, (now() - datetime.fromisoformat(instant)).total_seconds())


def age_text(instant: str | None) -> str | None:
    """`2 min ago`, or `in 2 min`; None for None."""
    if instant is None:
        return None
    age = (now() - datetime.fromisoformat(instant)).total_seconds()
    if -1 < age < 1:
        return "now"
    text = _coarse(abs(age))
    return f"{text} ago" if age > 0 else f"in {text}"


def _coarse(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def _parse_age(text: str) -> timedelta | None:
    found = _AGE.fullmatch(text)
    if found is None or not text:
        return None
    return timedelta(**{unit: int(number) for unit, number in found.groupdict(default="0").items()})
