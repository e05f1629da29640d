"""Time zones by their IANA names, and the instant that a wall clock's reading means in one.

The schedules ask at load time, so that a missing zone or a missing time zone database is an error before anything runs. A
reading that a zone skips (spring) means the first instant after the gap; one that it shows twice (autumn) the first of the two.
"""

import zoneinfo
from datetime import UTC, datetime, timedelta, tzinfo
from difflib import get_close_matches

from eventflow.core.clock import to_us
from eventflow.core.errors import UsageError

MINUTE = timedelta(minutes=1)


def zone(name: str, where: str) -> tzinfo:
    """The zone of this name; UsageError says what is missing. UTC needs no database."""
    if name.upper() == "UTC":
        return UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (
        zoneinfo.ZoneInfoNotFoundError,
        ValueError,
        OSError,
    ):  # what a name may run into: absent, a path, a directory
        pass
    known = zoneinfo.available_timezones()
    if not known:
        raise UsageError(
            f"{where}: tz={name!r} needs the time zone database, and this machine has none; run: pip install tzdata"
        )
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(
        f"{where}: tz= expected an IANA zone such as 'Europe/Berlin', found {name!r}{hint}"
    )


def instant(wall: datetime, where: tzinfo) -> int:
    """The instant, in microseconds, at which clocks of a zone show `wall` (naive)."""
    moment = wall.replace(tzinfo=where, fold=0)
    if _shown(moment) != wall:
        wall = wall.replace(second=0, microsecond=0)
        while _shown(moment) != wall:  # a gap is an hour as a rule, a day at most (Samoa, 2011)
            wall += MINUTE
            moment = wall.replace(tzinfo=where, fold=0)
    return to_us(moment.astimezone(UTC))


def _shown(moment: datetime) -> datetime:
    return moment.astimezone(UTC).astimezone(moment.tzinfo).replace(tzinfo=None, fold=0)
