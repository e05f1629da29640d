"""Events at certain times: `app.on(Cron("0 6 * * MON-FRI", tz="Europe/Berlin"), report)`, `Every(minutes=15)`, `At(moment)`.

Each nominal time is one event, its id made of the schedule's name and that time: however many processes and restarts there
are, it is recorded once. The cursor holds the last nominal time that is settled (fired or skipped); nothing at or before it
fires again, whatever becomes of the clock. Times that passed while nothing listened are treated as `misfire` says, and those
that are skipped are counted.

    _schedule/cron.py, times.py (when) ─► missed.py (what is due, what is skipped) ─► the loop here ─► Intake.accept

This file is the public face and the loop; `Schedule` is what the three kinds share. zones.py reads wall clocks.
"""

import asyncio
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import islice, pairwise
from typing import Any, TypedDict, Unpack, cast
from urllib.parse import quote

from eventflow.core.clock import (
    SECOND,
    Clock,
    Duration,
    SystemClock,
    microseconds,
    to_datetime,
    to_us,
)
from eventflow.core.errors import StoreFull, UsageError
from eventflow.events.event import Event, Gauge, Intake, Json, parse_time
from triggers._schedule.cron import CronTimes
from triggers._schedule.misfire import Due, Misfire, Policy, due
from triggers._schedule.times import AtTimes, EveryTimes, Times, newest, shown
from triggers._schedule.zones import instant, zone

FIRED = "io.eventflow.schedule.fired"
BATCH = 500
"""Events in one `accept`, so that a long catch-up never fills the commit queue (4,096)."""
MOST = 10_000
"""The largest `limit=`."""
SAMPLE = 200
"""Gaps between occurrences that jitter is compared with."""


class Options(TypedDict, total=False):
    """What every schedule takes; see `Schedule`."""

    name: str
    jitter: Duration
    misfire: Misfire
    grace: Duration
    limit: int
    start: datetime
    clock: Clock


class Schedule:
    """What `Cron`, `Every` and `At` share: their options, their events, and the loop that waits.

    Events have the type `io.eventflow.schedule.fired`. `data`: `schedule` (the name), `scheduled_at` (the nominal time, UTC),
    `local_time` (the same on the schedule's wall clock). The event's `time` is when it really fired. Extensions: `catchup`
    (true) when it was later than the grace; `skipped`, how many occurrences before it were given up, and `skippedmore` (true)
    when there were more than are counted; `backfill` (true) when `eventflow backfill` made it.

    Options:
        name: the schedule's name, by which its cursor is kept and its occurrences are known; by default made of its rule. With
            a name of its own, a schedule's rule can be edited: occurrences before the edit are not made up for.
        jitter: puts each firing off by 0 up to this much, the same for an occurrence each time; its id stays as it is.
        misfire: what becomes of occurrences that passed while nothing fired them. `"last"` (the default): the newest one fires.
            `"all"`: the newest `limit` (100) fire, in order. `"skip"`: the newest one, if it is not later than the grace.
        grace: seconds after which an occurrence counts as missed, 300 by default.
        start: at the very first start, occurrences from then on count as passed; without it, the past is past.
    """

    def __init__(self, times: Times, where: tzinfo, name: str, options: Options) -> None:
        self.name = options.get("name") or name
        self.clock: Clock = options.get("clock") or SystemClock()
        self._times, self._zone = times, where
        self._jitter = microseconds(options.get("jitter", 0))
        self._policy = self._checked(options)
        start = options.get("start")
        self._start = None if start is None else _moment(start, where)
        self._skipped = 0
        self._last: int | None = None

    def _checked(self, options: Options) -> Policy:
        misfire, limit = options.get("misfire", "last"), options.get("limit", 100)
        grace = microseconds(options.get("grace", 300))
        kind = type(self).__name__
        if misfire not in ("skip", "last", "all"):
            raise UsageError(
                f'{kind}: misfire= expected "skip", "last" or "all", found {misfire!r}'
            )
        if not 1 <= limit <= MOST:
            raise UsageError(f"{kind}: limit= expected 1 to {MOST:,}, found {limit}")
        if grace < 0 or self._jitter < 0:
            raise UsageError(f"{kind}: grace= and jitter= must not be negative")
        known = list(islice(self._times.after(0), SAMPLE if self._jitter else 0))
        gap = min((later - sooner for sooner, later in pairwise(known)), default=self._jitter + 1)
        if self._jitter >= gap:
            raise UsageError(
                f"{kind}: jitter= must be shorter than the {gap / SECOND:g} s between two occurrences"
            )
        return Policy(misfire, grace, limit, self._delay)

    # ----------------------------------------------------------------- what it is about to do

    def occurrences(self, since: datetime, until: datetime) -> Iterator[datetime]:
        """The nominal times in [since, until), in order, with no regard to what fired. Naive: on the schedule's wall clock."""
        end = _moment(until, self._zone)
        for at in self._times.after(_moment(since, self._zone) - 1):
            if at >= end:
                return
            yield to_datetime(at)

    def occurrence(self, at: datetime) -> Event:
        """The event of a nominal time, marked as made by a backfill. ValueError when the schedule has none then."""
        if newest(self._times, to_us(at) - 1, to_us(at), 1) != [to_us(at)]:
            raise ValueError(
                f"{self.name} has no occurrence at {shown(to_us(at))}; it is: {self._times.text}"
            )
        return self._event(to_us(at), backfill=True)

    def settled(self, cursor: Mapping[str, Json]) -> datetime | None:
        """The last nominal time that the schedule is through with; later ones are still its own to fire."""
        last = _instant(cursor.get("last"))
        return None if last is None else to_datetime(last)

    @property
    def is_open(self) -> bool:
        """Whether it has read its cursor, and waits."""
        return self._last is not None

    @property
    def condition(self) -> str | None:
        """That the clock was set back behind the cursor, while it is."""
        begins = None if self._start is None else self._start - 1
        if self._last is None or self._last <= self.clock.now() or self._last == begins:
            return None
        return f"the clock is behind the last occurrence; nothing fires until it passes {shown(self._last)}"

    def gauges(self) -> Sequence[Gauge]:
        """When it fires next, and how many occurrences were given up since the start."""
        coming = None if self._last is None else next(self._times.after(self._last), None)
        due_at = (
            []
            if coming is None
            else [Gauge("next_timestamp_seconds", (coming + self._delay(coming)) / SECOND)]
        )
        return [*due_at, Gauge("skipped_occurrences", self._skipped)]

    # ----------------------------------------------------------------- the loop

    async def listen(self, intake: Intake) -> None:
        """Waits for one occurrence after the other until cancelled. All it knows comes from the cursor."""
        try:
            self._last = await self._open(intake)
            while True:
                self._last = await self._step(intake, self._last)
        finally:
            self._last = None

    async def _step(self, intake: Intake, last: int) -> int:
        """Fires what is due, or waits for what comes. The last nominal time that is settled then."""
        now = self.clock.now()
        found = due(self._times, last, now, self._policy)
        if found is not None:
            await self._fire(intake, found, now)
            return found.through
        coming = next(self._times.after(last), None)
        if coming is None:
            intake.log.info("schedule.ended", schedule=self._times.text, last=shown(last))
            await asyncio.get_running_loop().create_future()
        else:
            await self._until(coming + self._delay(coming))
        return last

    async def _open(self, intake: Intake) -> int:
        """The last nominal time that is settled. Without a cursor, and after an edit, that is now, and is noted at once."""
        cursor, now = await intake.cursor(), self.clock.now()
        last, before = _instant(cursor.get("last")), cursor.get("schedule")
        if last is None and self._start is not None:
            last = self._start - 1
        elif last is None or before != self._times.text:
            if last is not None:
                intake.log.warning(
                    "schedule.changed", schedule=self._times.text, before=before, last=shown(last)
                )
            last = now
            await self._accept(intake, [], last)
        elif last > now:
            intake.log.warning("schedule.ahead", last=shown(last), now=shown(now))
        coming = next(self._times.after(last), None)
        intake.log.info(
            "schedule.opened",
            schedule=self._times.text,
            next=None if coming is None else shown(coming),
        )
        return last

    async def _fire(self, intake: Intake, found: Due, now: int) -> None:
        """Records what is to fire, and the cursor with it; a long catch-up in several transactions, each with its own."""
        events = [self._event(at, now, catchup=late) for at, late in found.fire]
        if found.skipped:
            self._skipped += found.skipped
            intake.log.warning(
                "schedule.skipped",
                count=found.skipped,
                exact=found.exact,
                through=shown(found.through),
                fired=len(events),
            )
            if events:
                events[0] = self._event(
                    found.fire[0][0], now, catchup=found.fire[0][1], skipped=found
                )
        ends = [at for at, _ in found.fire]
        for start in range(0, len(events), BATCH):
            await self._accept(
                intake, events[start : start + BATCH], ends[min(start + BATCH, len(ends)) - 1]
            )
        if not events:
            await self._accept(intake, [], found.through)

    async def _accept(self, intake: Intake, events: Sequence[Event], last: int) -> None:
        """Durable when it returns. While the ledger is full it waits: a schedule is no reason to drop anything."""
        while True:
            try:
                await intake.accept(
                    *events, cursor={"last": shown(last), "schedule": self._times.text}
                )
            except StoreFull as full:
                intake.log.warning("schedule.slowed", reason=str(full), wait=full.retry_after)
                await self._until(self.clock.now() + microseconds(full.retry_after))
            else:
                return

    async def _until(self, due_us: int) -> None:
        """Until the wall clock says so: the clock reads it anew at least every 30 s, so a step or a suspend is noticed."""
        come = asyncio.Event()
        timer = self.clock.timer(asyncio.get_running_loop(), due_us, come.set)
        try:
            await come.wait()
        finally:
            timer.cancel()

    # ----------------------------------------------------------------- its events

    def _event(
        self,
        at: int,
        now: int | None = None,
        *,
        catchup: bool = False,
        skipped: Due | None = None,
        backfill: bool = False,
    ) -> Event:
        """The data is the same whoever makes it, so that a second one is a duplicate and no conflict."""
        extensions: dict[str, str | int | bool] = {"catchup": True} if catchup else {}
        if skipped is not None:
            extensions["skipped"] = min(
                skipped.skipped, (1 << 31) - 1
            )  # a CloudEvents integer has 32 bits
            if not skipped.exact:
                extensions["skippedmore"] = True
        if backfill:
            extensions["backfill"] = True
        return Event(
            id=self._id(at),
            source=f"/schedules/{quote(self.name, safe='')}",
            type=FIRED,
            time=to_datetime(self.clock.now() if now is None else now),
            data={
                "schedule": self.name,
                "scheduled_at": shown(at),
                "local_time": to_datetime(at).astimezone(self._zone).isoformat(),
            },
            extensions=extensions,
        )

    def _id(self, at: int) -> str:
        return f"{self.name}@{shown(at)}"

    def _delay(self, at: int) -> int:
        """0 ≤ delay ≤ jitter, drawn from the occurrence's id."""
        if not self._jitter:
            return 0
        drawn = int.from_bytes(hashlib.blake2b(self._id(at).encode(), digest_size=8).digest())
        return drawn % (self._jitter + 1)


class Cron(Schedule):
    """A cron expression in a time zone: `Cron("0 6 * * MON-FRI", tz="Europe/Berlin", name="report")`.

    Five fields (minute, hour, day of month, month, day of week), or six with **seconds first** (Quartz and croniter differ), or
    `@hourly`, `@daily`, `@midnight`, `@weekly`, `@monthly`, `@yearly`. `*`, `1-5`, `*/15`, `1,3`, names, `L` (the month's last
    day), `LW` (its last weekday), `MON#1`, `5L`. Day of month and day of week, both restricted, mean either (as in Debian).

    `tz` is an IANA name. When clocks change, a fixed time (minute and hour without `*`) fires once: after the gap that swallows
    it, and the first time of two. Anything else follows real time. Further options: see `Schedule`.
    """

    def __init__(self, expression: str, *, tz: str = "UTC", **options: Unpack[Options]) -> None:
        where = zone(tz, f"Cron({expression!r})")
        name = f"cron:{' '.join(expression.split())}"
        times = CronTimes(expression, where, tz)
        super().__init__(times, where, name if where is UTC else f"{name} {tz}", options)


class Every(Schedule):
    """A fixed interval: `Every(minutes=15)`, `Every(timedelta(days=1), anchor=datetime(2026, 1, 1, 3, tzinfo=UTC))`.

    Its times are `anchor + k * period`, absolute: no restart, slow run or change of clocks moves them. The anchor is midnight
    UTC of 1970-01-01 unless given, so `minutes=15` means the quarters of each hour. Further options: see `Schedule`.
    """

    def __init__(
        self, period: Duration | None = None, *, seconds: float = 0, minutes: float = 0, hours: float = 0, days: float = 0,
        anchor: datetime | None = None, **options: Unpack[Options],
    ) -> None:  # fmt: skip
        whole = microseconds(timedelta(seconds=seconds, minutes=minutes, hours=hours, days=days))
        us = microseconds(period or 0) + whole
        if us < SECOND:
            raise UsageError(
                f"Every: expected a period of at least one second, such as minutes=15; found {us / SECOND:g} s"
            )
        from_us = 0 if anchor is None else _moment(anchor, None)
        super().__init__(EveryTimes(us, from_us), UTC, f"every:{us / SECOND:g}s", options)


class At(Schedule):
    """Given moments, each once: `At(datetime(2026, 12, 31, 18, tzinfo=UTC))`.

    With `tz` the moments may be naive: wall clock times of that zone. One that is past at the very first start does not fire,
    unless `start=` is before it. Further options: see `Schedule`.
    """

    def __init__(
        self, *moments: datetime, tz: str | None = None, **options: Unpack[Options]
    ) -> None:
        if not moments:
            raise UsageError("At: expected at least one datetime, found none")
        where = None if tz is None else zone(tz, "At")
        instants = [_moment(moment, where) for moment in moments]
        super().__init__(AtTimes(instants), where or UTC, f"at:{shown(min(instants))}", options)


def _moment(given: datetime, where: tzinfo | None) -> int:
    if given.tzinfo is not None:
        return to_us(given)
    if where is None:
        raise UsageError(
            f"expected a datetime with a time zone, found the naive {given.isoformat()}; add tzinfo=UTC"
        )
    return instant(given, where)


def _instant(text: Json) -> int | None:
    return to_us(parse_time(cast(Any, text))) if isinstance(text, str) else None
