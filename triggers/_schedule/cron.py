"""Cron expressions as instants. Reading them is cronsim's work; aliases, messages and what a clock change does are here.

A *fixed* expression (its minute and its hour do not begin with `*`) is a time on the wall: one that the zone skips fires once,
at the first instant after the gap, and one that it shows twice fires once, the first time. Any other follows real time: every
instant whose wall clock matches, so `*/30 * * * *` fires four times in the hour that comes twice. Debian's cron does the same;
here it holds for six fields too, which cronsim leaves to real time.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import islice, takewhile

from cronsim import CronSim, CronSimError

from eventflow.core.clock import SECOND, microseconds, to_datetime, to_us
from eventflow.core.errors import UsageError
from triggers._schedule.zones import instant

ALIASES = {
    "@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *",
}  # fmt: skip

FIELDS = ("second", "minute", "hour", "day of month", "month", "day of week")
TAKES = ("0-59", "0-59", "0-23", "1-31, L or LW", "1-12 or JAN-DEC", "0-7, SUN-SAT, MON#2 or 5L")
DAY = 86_400 * SECOND
SOME_DAY = datetime(2024, 1, 1, tzinfo=UTC)


class CronTimes:
    """When a cron expression comes round in a zone. `text` says which schedule it is."""

    def __init__(self, expression: str, where: tzinfo, zone: str) -> None:
        self._expression, self._zone = parse(expression), where
        parts = self._expression.split()
        self._fixed = where is UTC or not any(part.startswith("*") for part in parts[-5:-3])
        self.text = f"cron {self._expression} {zone}"

    def after(self, us: int) -> Iterator[int]:
        """Every instant after `us`, in order."""
        last = us
        for found in self._walk(to_datetime(us).astimezone(self._zone)):
            if found > last:  # a wall clock that was set back shows times again that were
                last = found
                yield found

    def _walk(self, moment: datetime) -> Iterator[int]:
        if self._fixed:
            wall = moment.replace(tzinfo=None, fold=0)
            return (instant(each, self._zone) for each in CronSim(self._expression, wall))
        return self._real(to_us(moment))

    def _real(self, at: int) -> Iterator[int]:
        """Wall times under one offset from UTC after the other. (cronsim's own way with zones steps over the first half hour
        after a change of half an hour, as Lord Howe Island has it.)"""
        start = at
        while True:
            offset = self._offset(at)
            changed: int | None = None
            for wall in CronSim(self._expression, to_datetime(start + offset).replace(tzinfo=None)):
                found = to_us(wall.replace(tzinfo=UTC)) - offset
                changed = self._change(at, found)
                if changed is not None:
                    break
                yield found
                at = found
            if changed is None:
                return
            at, start = changed, changed - SECOND  # the instant of the change may itself be one

    def _offset(self, us: int) -> int:
        offset = to_datetime(us).astimezone(self._zone).utcoffset() or timedelta()
        return microseconds(offset)

    def _change(self, after: int, until: int) -> int | None:
        """The first instant in (after, until] with another offset than `after` has. No zone changes twice in a day."""
        offset, low = self._offset(after), after
        while low < until:
            high = min(low + DAY, until)
            if self._offset(high) != offset:
                while high - low > SECOND:
                    middle = (low + high) // 2
                    low, high = (middle, high) if self._offset(middle) == offset else (low, middle)
                return high // SECOND * SECOND  # zones change on whole seconds
            low = high
        return None

    def count(self, after: int, until: int, most: int) -> tuple[int, bool]:
        """How many in (after, until], counted one by one, and whether that is all of them: it ends at `most`."""
        found = sum(
            1 for _ in islice(takewhile(lambda at: at <= until, self.after(after)), most + 1)
        )
        return min(found, most), found <= most


def parse(expression: str) -> str:
    """The expression in capitals, aliases written out. UsageError says which field is wrong, and what it takes."""
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
            f"Cron({expression!r}): expected 5 fields ({five}), or 6 with seconds first; found {len(parts)}"
        )
    for place, part in enumerate(parts, 1):
        _check_field(expression, part, place, place + 5 - len(parts))
    try:
        never = next(CronSim(" ".join(parts), SOME_DAY), None) is None
    except CronSimError:
        never = True
    if never:
        raise UsageError(
            f"Cron({expression!r}): no such day ever comes: day of month {parts[-3]}, month {parts[-2]}"
        )
    return " ".join(parts)


def _check_field(expression: str, part: str, place: int, field: int) -> None:
    """Tries each item of a field alone, so that the message can say which."""
    for item in part.split(","):
        alone = ["*"] * 6
        alone[field] = item
        if not _parses(" ".join(alone)):
            takes = f"{TAKES[field]}, *, a range 1-5, a step */5, or a list of these"
            raise UsageError(
                f"Cron({expression!r}): field {place} ({FIELDS[field]}): expected {takes}; found {item!r}"
            )


def _parses(expression: str) -> bool:
    try:
        CronSim(expression, SOME_DAY)
    except (
        CronSimError,
        AssertionError,
    ):  # cronsim asserts that what stands before a step is a number
        return False
    return True
