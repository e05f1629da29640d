"""Time zones by their IANA names, and conversion of wall clock times to instants.

Schedules look up their zone when they are made: a missing zone or database is an error before
anything runs. A wall clock time that a zone skips (spring) means the first instant after the gap;
one that it shows twice (autumn) means the first of the two.
"""

import zoneinfo
from datetime import UTC, datetime, timedelta, tzinfo
from difflib import get_close_matches

from eventflow.core.clock import to_us
from eventflow.core.errors import UsageError

MINUTE = timedelta(minutes=1)


def time_zone(name: str, caller: str) -> tzinfo:
    """The zone of this name; UTC needs no database. UsageError names `caller` and the problem."""
    if name.upper() == "UTC":
        return UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        pass  # no such zone; the name is a path; it is a directory
    known = zoneinfo.available_timezones()
    if not known:
        raise UsageError(
            f"{caller}: tz={name!r} needs the time zone database, and this machine has none; "
            "run: pip install tzdata"
        )
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(
        f"{caller}: tz= expected an IANA zone such as 'Europe/Berlin', found {name!r}{hint}"
    )


def instant_at(wall: datetime, zone: tzinfo) -> int:
    """The instant, in microseconds, at which clocks of a zone show `wall` (naive)."""
    moment = wall.replace(tzinfo=zone, fold=0)
    if _wall_clock(moment) != wall:
        wall = wall.replace(second=0, microsecond=0)
        # A gap is an hour as a rule, a day at most (Samoa, 2011).
        while _wall_clock(moment) != wall:
            wall += MINUTE
            moment = wall.replace(tzinfo=zone, fold=0)
    return to_us(moment.astimezone(UTC))


def _wall_clock(moment: datetime) -> datetime:
    return moment.astimezone(UTC).astimezone(moment.tzinfo).replace(tzinfo=None, fold=0)
