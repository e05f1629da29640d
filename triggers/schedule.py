"""`Cron`, `Every` and `At`: events at given times.

    app.on(Cron("0 6 * * MON-FRI", tz="Europe/Berlin"), report)

Each nominal time is one event. Its id is made of the schedule's name and that time, so it is
recorded once, however many processes and restarts there are. The cursor holds the last settled
nominal time (fired or skipped); nothing at or before it fires again, even if the clock is set back.
Times that passed while nothing listened are treated by the `misfire` policy; skipped ones are
counted.

    _schedule/cron.py, times.py (times) ─► misfire.py (due, skipped) ─► Schedule.listen ─► accept

`Schedule` is the common base. _schedule/zones.py converts wall clock times.
"""

import asyncio
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from itertools import islice, pairwise
from typing import Any, TypedDict, Unpack, cast
from urllib.parse import quote

from eventflow.core.clock import (
    SECOND,
    Clock,
    Duration,
    SystemClock,
    microseconds,
    sleep_until,
    to_datetime,
    to_us,
)
from eventflow.core.declarations import declaration, duration, number, one_of, whole_number
from eventflow.core.errors import UsageError
from eventflow.events.event import Event, Gauge, Intake, Json, parse_time
from triggers._schedule.cron import CronTimes
from triggers._schedule.misfire import DueOccurrences, Misfire, MisfirePolicy, due_occurrences
from triggers._schedule.times import AtTimes, EveryTimes, Times, format_instant, newest
from triggers._schedule.zones import instant_at, time_zone

LOG_EVENTS = {
    "schedule.changed": (
        "The rule of a schedule changed; missed occurrences of the old rule do not fire."
    ),
    "schedule.cursor_in_future": (
        "The cursor of a schedule is ahead of the clock; nothing fires until `last` is past. "
        "Check the clock."
    ),
    "schedule.ended": "A schedule has no further occurrence.",
    "schedule.opened": "A schedule waits; `next` is its next occurrence.",
    "schedule.skipped": (
        "Missed occurrences do not fire (misfire policy); without `exact` there were more."
    ),
}

FIRED_TYPE = "io.eventflow.schedule.fired"
BATCH_SIZE = 500
"""Events in one `accept`: a long catch-up never fills the commit queue (4,096)."""
MAX_LIMIT = 10_000
"""The largest `limit=`."""
JITTER_SAMPLE = 200
"""Gaps between occurrences that jitter is compared with."""


class ScheduleOptions(TypedDict, total=False):
    """What every schedule takes; see `Schedule`."""

    name: str
    jitter: Duration
    misfire: Misfire
    grace: Duration
    limit: int
    start: datetime
    clock: Clock


class Schedule:
    """The common base of `Cron`, `Every` and `At`: options, events, and the loop that waits.

    Events have the type `io.eventflow.schedule.fired`. `data`: `schedule` (the name),
    `scheduled_at` (the nominal time, UTC), `local_time` (the same on the schedule's wall clock).
    The event's `time` is when it fired. Extensions: `catchup` (true) if it fired later than the
    grace; `skipped`, the number of skipped occurrences before it, and `skippedmore` (true) if there
    were more than are counted; `backfill` (true) if `eventflow backfill` made it.

    Options:
        name: the key of the cursor and the ids; by default made of the rule. With a name, the rule
            can be edited; occurrences before the edit are not made up for.
        jitter: delays each firing by 0 up to this much, an occurrence always by the same; its id
            does not change.
        misfire: which of the occurrences fire that passed while nothing listened. `"last"` (the
            default): the newest one. `"all"`: the newest `limit` (100), in order. `"skip"`: the
            newest one, if it is not later than the grace.
        grace: seconds after which an occurrence counts as missed, 300 by default.
        start: at the very first start, occurrences from this time on count as passed; without it
            only those after the start fire.
    """

    def __init__(self, times: Times, zone: tzinfo, name: str, options: ScheduleOptions) -> None:
        self.name: str = options.get("name") or name
        self.clock: Clock = options.get("clock") or SystemClock()
        self._times: Times = times
        self._zone: tzinfo = zone
        kind = type(self).__name__
        jitter = duration(options.get("jitter", 0), f"{kind}: jitter=")
        self._jitter: int = microseconds(jitter)
        self._policy: MisfirePolicy = self._checked_policy(options)
        start = options.get("start")
        self._start: int | None = None if start is None else _to_instant(start, zone)
        self._skipped: int = 0  # occurrences, since the start of this process
        self._last: int | None = None  # the last settled nominal time, while it listens

    def _checked_policy(self, options: ScheduleOptions) -> MisfirePolicy:
        misfire = options.get("misfire", "last")
        limit = options.get("limit", 100)
        kind = type(self).__name__
        grace = microseconds(duration(options.get("grace", 300), f"{kind}: grace="))
        one_of(misfire, f"{kind}: misfire=", ("skip", "last", "all"))
        whole_number(limit, f"{kind}: limit=", maximum=MAX_LIMIT)
        sample = list(islice(self._times.after(0), JITTER_SAMPLE if self._jitter else 0))
        gap = min((later - sooner for sooner, later in pairwise(sample)), default=self._jitter + 1)
        if self._jitter >= gap:
            raise UsageError(
                f"{kind}: jitter= must be shorter than the {gap / SECOND:g} s "
                "between two occurrences"
            )
        return MisfirePolicy(misfire, grace, limit, self._delay)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._times.text!r}, name={self.name!r})"

    # ----------------------------------------------------------------- nominal times

    def occurrences(self, since: datetime, until: datetime) -> Iterator[datetime]:
        """The nominal times in [since, until), in order, fired or not. A naive bound is a time on
        the schedule's wall clock.
        """
        end = _to_instant(until, self._zone)
        for at in self._times.after(_to_instant(since, self._zone) - 1):
            if at >= end:
                return
            yield to_datetime(at)

    def occurrence(self, at: datetime) -> Event:
        """The event of a nominal time, marked as a backfill. ValueError if it is no
        nominal time.
        """
        if newest(self._times, to_us(at) - 1, to_us(at), 1) != [to_us(at)]:
            raise ValueError(
                f"{self.name} has no occurrence at {format_instant(to_us(at))}; "
                f"it is: {self._times.text}"
            )
        return self._event(to_us(at), backfill=True)

    def settled(self, cursor: Mapping[str, Json]) -> datetime | None:
        """The last settled nominal time, by a cursor; later ones may still fire."""
        last = _cursor_instant(cursor.get("last"))
        return None if last is None else to_datetime(last)

    @property
    def is_open(self) -> bool:
        """Whether it has read its cursor and waits."""
        return self._last is not None

    @property
    def condition(self) -> str | None:
        """Whether the clock was set back to before the cursor."""
        begins = None if self._start is None else self._start - 1
        if self._last is None or self._last <= self.clock.now() or self._last == begins:
            return None
        return (
            "the clock is behind the last occurrence; "
            f"nothing fires until it passes {format_instant(self._last)}"
        )

    def gauges(self) -> Sequence[Gauge]:
        """The next time it fires, and the number of skipped occurrences since the start."""
        gauges = [Gauge("skipped_occurrences", self._skipped)]
        following = None if self._last is None else next(self._times.after(self._last), None)
        if following is not None:
            due = (following + self._delay(following)) / SECOND
            gauges.insert(0, Gauge("next_timestamp_seconds", due))
        return gauges

    # ----------------------------------------------------------------- the loop

    async def listen(self, intake: Intake) -> None:
        """Waits for one occurrence after the other until cancelled. All its state is in
        the cursor.
        """
        try:
            self._last = await self._read_cursor(intake)
            while True:
                self._last = await self._step(intake, self._last)
        finally:
            self._last = None

    async def _step(self, intake: Intake, last: int) -> int:
        """Fires what is due, or waits for the next occurrence. Returns the last settled time."""
        now = self.clock.now()
        found = due_occurrences(self._times, last, now, self._policy)
        if found is not None:
            await self._fire(intake, found, now)
            return found.through
        following = next(self._times.after(last), None)
        if following is None:
            intake.log.info("schedule.ended", schedule=self._times.text, last=format_instant(last))
            await asyncio.get_running_loop().create_future()
        else:
            await sleep_until(self.clock, following + self._delay(following))
        return last

    async def _read_cursor(self, intake: Intake) -> int:
        """The last settled nominal time. Without a cursor, and after an edit, now; recorded at
        once.
        """
        cursor = await intake.cursor()
        now = self.clock.now()
        last = _cursor_instant(cursor.get("last"))
        before = cursor.get("schedule")
        if last is None and self._start is not None:
            last = self._start - 1
        elif last is None or before != self._times.text:
            if last is not None:
                intake.log.warning(
                    "schedule.changed",
                    schedule=self._times.text,
                    before=before,
                    last=format_instant(last),
                )
            last = now
            await self._accept(intake, [], last)
        elif last > now:
            intake.log.warning(
                "schedule.cursor_in_future", last=format_instant(last), now=format_instant(now)
            )
        following = next(self._times.after(last), None)
        intake.log.info(
            "schedule.opened",
            schedule=self._times.text,
            next=None if following is None else format_instant(following),
        )
        return last

    async def _fire(self, intake: Intake, found: DueOccurrences, now: int) -> None:
        """Records the events and the cursor; a long catch-up in several transactions."""
        events = [self._event(at, now, catchup=late) for at, late in found.fire]
        if found.skipped:
            self._skipped += found.skipped
            intake.log.warning(
                "schedule.skipped",
                count=found.skipped,
                exact=found.exact,
                through=format_instant(found.through),
                fired=len(events),
            )
            if events:
                events[0] = self._event(
                    found.fire[0][0], now, catchup=found.fire[0][1], skipped=found
                )
        ends = [at for at, _ in found.fire]
        for start in range(0, len(events), BATCH_SIZE):
            batch = events[start : start + BATCH_SIZE]
            await self._accept(intake, batch, ends[start + len(batch) - 1])
        if not events:
            await self._accept(intake, [], found.through)

    async def _accept(self, intake: Intake, events: Sequence[Event], last: int) -> None:
        cursor = {"last": format_instant(last), "schedule": self._times.text}
        await intake.accept(*events, cursor=cursor)

    # ----------------------------------------------------------------- events

    def _event(
        self,
        at: int,
        now: int | None = None,
        *,
        catchup: bool = False,
        skipped: DueOccurrences | None = None,
        backfill: bool = False,
    ) -> Event:
        """The data depends on `at` only, so that a second event is a duplicate and no conflict."""
        extensions: dict[str, str | int | bool] = {"catchup": True} if catchup else {}
        if skipped is not None:
            # A CloudEvents integer has 32 bits.
            extensions["skipped"] = min(skipped.skipped, (1 << 31) - 1)
            if not skipped.exact:
                extensions["skippedmore"] = True
        if backfill:
            extensions["backfill"] = True
        return Event(
            id=self._event_id(at),
            source=f"/schedules/{quote(self.name, safe='')}",
            type=FIRED_TYPE,
            time=to_datetime(self.clock.now() if now is None else now),
            data={
                "schedule": self.name,
                "scheduled_at": format_instant(at),
                "local_time": to_datetime(at).astimezone(self._zone).isoformat(),
            },
            extensions=extensions,
        )

    def _event_id(self, at: int) -> str:
        return f"{self.name}@{format_instant(at)}"

    def _delay(self, at: int) -> int:
        """0 ≤ delay ≤ jitter, a hash of the event's id."""
        if not self._jitter:
            return 0
        digest = hashlib.blake2b(self._event_id(at).encode(), digest_size=8).digest()
        return int.from_bytes(digest) % (self._jitter + 1)


class Cron(Schedule):
    """A cron expression in a time zone: `Cron("0 6 * * MON-FRI", tz="Europe/Berlin")`.

    Five fields (minute, hour, day of month, month, day of week), or six with **seconds first**
    (Quartz and croniter differ), or `@hourly`, `@daily`, `@midnight`, `@weekly`, `@monthly`,
    `@yearly`. `*`, `1-5`, `*/15`, `1,3`, names, `L` (the month's last day), `LW` (its last
    weekday), `MON#1`, `5L`. Where day of month and day of week are both restricted, either matches
    (as in Debian).

    `tz` is an IANA name. When clocks change, a fixed time (minute and hour without `*`) fires once:
    after the gap that skips it, and the first time of two. Anything else follows real time. Further
    options: see `Schedule`.
    """

    @declaration
    def __init__(
        self, expression: str, *, tz: str = "UTC", **options: Unpack[ScheduleOptions]
    ) -> None:
        zone = time_zone(tz, f"Cron({expression!r})")
        name = f"cron:{' '.join(expression.split())}"
        times = CronTimes(expression, zone, tz)
        super().__init__(times, zone, name if zone is UTC else f"{name} {tz}", options)


class Every(Schedule):
    """A fixed interval: `Every(minutes=15)`, `Every(timedelta(days=1),
    anchor=three_in_the_morning)`.

    Its times are `anchor + k * period`, absolute: no restart, slow run or change of clocks moves
    them. The anchor is midnight UTC of 1970-01-01 unless given, so `minutes=15` means the quarters
    of each hour. Further options: see `Schedule`.
    """

    @declaration
    def __init__(
        self,
        period: Duration | None = None,
        *,
        seconds: float = 0,
        minutes: float = 0,
        hours: float = 0,
        days: float = 0,
        anchor: datetime | None = None,
        **options: Unpack[ScheduleOptions],
    ) -> None:
        whole = 0.0
        for given, unit in ((seconds, 1), (minutes, 60), (hours, 3600), (days, 86_400)):
            whole += unit * number(given, "Every: the period", minimum=0)
        whole += 0.0 if period is None else duration(period, "Every: the period")
        us = microseconds(duration(whole, "Every: the period"))
        if us < SECOND:
            raise UsageError(
                "Every: expected a period of at least one second, such as minutes=15; "
                f"found {us / SECOND:g} s"
            )
        from_us = 0 if anchor is None else _to_instant(anchor, None)
        super().__init__(EveryTimes(us, from_us), UTC, f"every:{us / SECOND:g}s", options)


class At(Schedule):
    """Given moments, each once: `At(datetime(2026, 12, 31, 18, tzinfo=UTC))`.

    With `tz` the moments may be naive: wall clock times of that zone. One that is past at the very
    first start does not fire, unless `start=` is before it. Further options: see `Schedule`.
    """

    @declaration
    def __init__(
        self, *moments: datetime, tz: str | None = None, **options: Unpack[ScheduleOptions]
    ) -> None:
        if not moments:
            raise UsageError("At: expected at least one datetime, found none")
        zone = None if tz is None else time_zone(tz, "At")
        instants = [_to_instant(moment, zone) for moment in moments]
        name = f"at:{format_instant(min(instants))}"
        super().__init__(AtTimes(instants), zone or UTC, name, options)


def _to_instant(moment: datetime, zone: tzinfo | None) -> int:
    """Microseconds. A naive `moment` is a time on the wall clock of `zone`."""
    if moment.tzinfo is not None:
        return to_us(moment)
    if zone is None:
        raise UsageError(
            f"expected a datetime with a time zone, found the naive {moment.isoformat()}; "
            "add tzinfo=UTC"
        )
    return instant_at(moment, zone)


def _cursor_instant(text: Json) -> int | None:
    return to_us(parse_time(cast(Any, text))) if isinstance(text, str) else None
