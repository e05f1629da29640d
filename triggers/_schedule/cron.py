"""`CronTimes`: cron expressions as instants. cronsim parses them; aliases, error messages and the
treatment of clock changes are here.

A *fixed* expression (minute and hour do not begin with `*`) is a wall clock time: one that the zone
skips fires once, at the first instant after the gap; one that it shows twice fires once, the first
time. Any other follows real time: every instant whose wall clock matches, so `*/30 * * * *` fires
four times in the repeated hour. Debian's cron does the same; here it holds for six fields as well,
which cronsim leaves to real time.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import islice, takewhile

from cronsim import CronSim, CronSimError

from eventflow.core.clock import SECOND, microseconds, to_datetime, to_us
from eventflow.core.errors import UsageError
from triggers._schedule.zones import instant_at

ALIASES = {
    "@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *",
}  # fmt: skip

FIELD_NAMES = ("second", "minute", "hour", "day of month", "month", "day of week")
FIELD_VALUES = (
    "0-59",
    "0-59",
    "0-23",
    "1-31, L or LW",
    "1-12 or JAN-DEC",
    "0-7, SUN-SAT, MON#2 or 5L",
)
DAY_US = 86_400 * SECOND
PROBE_DAY = datetime(2024, 1, 1, tzinfo=UTC)


class CronTimes:
    """The instants of a cron expression in a zone (see `times.Times`)."""

    def __init__(self, expression: str, zone: tzinfo, zone_name: str) -> None:
        self._expression: str = parse(expression)
        self._zone: tzinfo = zone
        minute_and_hour = self._expression.split()[-5:-3]
        self._fixed: bool = zone is UTC or not any(
            field.startswith("*") for field in minute_and_hour
        )
        self.text: str = f"cron {self._expression} {zone_name}"

    def after(self, us: int) -> Iterator[int]:
        """Every instant after `us`, in order."""
        last = us
        for found in self._candidates(to_datetime(us).astimezone(self._zone)):
            if found > last:  # a wall clock that was set back shows the same times again
                last = found
                yield found

    def _candidates(self, moment: datetime) -> Iterator[int]:
        if self._fixed:
            wall = moment.replace(tzinfo=None, fold=0)
            return (instant_at(each, self._zone) for each in CronSim(self._expression, wall))
        return self._by_real_time(to_us(moment))

    def _by_real_time(self, at: int) -> Iterator[int]:
        """Wall clock times under one UTC offset after the other. (cronsim's own treatment of zones
        skips the first half hour after a change of half an hour, as on Lord Howe Island.)
        """
        start = at
        while True:
            offset = self._offset(at)
            changed: int | None = None
            for wall in CronSim(self._expression, to_datetime(start + offset).replace(tzinfo=None)):
                found = to_us(wall.replace(tzinfo=UTC)) - offset
                changed = self._next_offset_change(at, found)
                if changed is not None:
                    break
                yield found
                at = found
            if changed is None:
                return
            at = changed
            start = changed - SECOND  # the instant of the change may itself match

    def _offset(self, us: int) -> int:
        offset = to_datetime(us).astimezone(self._zone).utcoffset() or timedelta()
        return microseconds(offset)

    def _next_offset_change(self, after: int, until: int) -> int | None:
        """The first instant in (after, until] with another offset than `after`. No zone changes
        twice in a day.
        """
        offset = self._offset(after)
        low = after
        while low < until:
            high = min(low + DAY_US, until)
            if self._offset(high) != offset:
                while high - low > SECOND:
                    middle = (low + high) // 2
                    low, high = (middle, high) if self._offset(middle) == offset else (low, middle)
                return high // SECOND * SECOND  # zones change on whole seconds
            low = high
        return None

    def count(self, after: int, until: int, limit: int) -> tuple[int, bool]:
        """The number of instants in (after, until], counted one by one up to `limit`, and whether
        it is exact.
        """
        found = sum(
            1 for _ in islice(takewhile(lambda at: at <= until, self.after(after)), limit + 1)
        )
        return min(found, limit), found <= limit


def parse(expression: str) -> str:
    """The expression in capitals, aliases expanded. UsageError names the wrong field and its
    values.
    """
    given = expression.strip()
    if given.startswith("@"):
        if given.lower() not in ALIASES:
            raise UsageError(
                f"Cron({expression!r}): expected one of {', '.join(ALIASES)}, found {given!r}"
            )
        given = ALIASES[given.lower()]
    parts = given.upper().split()
    if len(parts) not in (5, 6):
        five = "minute, hour, day of month, month, day of week"
        raise UsageError(
            f"Cron({expression!r}): expected 5 fields ({five}), or 6 with seconds first; "
            f"found {len(parts)}"
        )
    for position, part in enumerate(parts, 1):
        _check_field(expression, part, position, position + 5 - len(parts))
    try:
        never = next(CronSim(" ".join(parts), PROBE_DAY), None) is None
    except CronSimError:
        never = True
    if never:
        raise UsageError(
            f"Cron({expression!r}): no such day exists: day of month {parts[-3]}, month {parts[-2]}"
        )
    return " ".join(parts)


def _check_field(expression: str, part: str, position: int, field: int) -> None:
    """Parses each item of a field alone, so that the message can name it."""
    for item in part.split(","):
        alone = ["*"] * 6
        alone[field] = item
        if not _parses(" ".join(alone)):
            raise UsageError(
                f"Cron({expression!r}): field {position} ({FIELD_NAMES[field]}): "
                f"expected {FIELD_VALUES[field]}, *, a range 1-5, a step */5, or a list of these; "
                f"found {item!r}"
            )


def _parses(expression: str) -> bool:
    try:
        CronSim(expression, PROBE_DAY)
    except (CronSimError, AssertionError):  # cronsim asserts that a step follows a number
        return False
    return True
