"""When schedules come round: cron against a brute-force oracle, both changes of clocks, what was
missed, what is refused.
"""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eventflow.core.clock import SECOND, to_datetime, to_us
from eventflow.core.errors import UsageError
from triggers import At, Cron, Every
from triggers._schedule.cron import CronTimes
from triggers._schedule.misfire import MAX_COUNTED, MisfirePolicy, due_occurrences
from triggers._schedule.times import EveryTimes, newest
from triggers._schedule.zones import time_zone

BERLIN = "Europe/Berlin"
SPRING, AUTUMN = datetime(2026, 3, 29, tzinfo=UTC), datetime(2026, 10, 25, tzinfo=UTC)
CHANGES = {
    BERLIN: (SPRING, AUTUMN),
    "Australia/Lord_Howe": (
        datetime(2026, 4, 4, tzinfo=UTC),
        datetime(2026, 10, 3, tzinfo=UTC),
    ),  # by half an hour
    "Africa/Cairo": (
        datetime(2026, 4, 23, 12, tzinfo=UTC),
        datetime(2026, 10, 29, 12, tzinfo=UTC),
    ),  # skips a midnight
    "America/Havana": (
        datetime(2026, 3, 8, tzinfo=UTC),
        datetime(2026, 11, 1, tzinfo=UTC),
    ),  # shows a midnight twice
    "America/New_York": (datetime(2026, 3, 8, tzinfo=UTC), datetime(2026, 11, 1, tzinfo=UTC)),
    "UTC": (SPRING, AUTUMN),
}
"""Zones with a day on which each changes its clocks."""


def times(expression: str, tz: str = "UTC") -> CronTimes:
    return CronTimes(expression, time_zone(tz, "here"), tz)


def local(expression: str, tz: str, since: datetime, many: int) -> list[str]:
    """The first occurrences after an instant, as the zone's clocks show them."""
    found = islice(times(expression, tz).after(to_us(since)), many)
    return [to_datetime(at).astimezone(ZoneInfo(tz)).isoformat(timespec="minutes") for at in found]


# --------------------------------------------------------------------------- clocks that change


def test_t1_a_fixed_time_in_the_gap_fires_once_after_it():
    """T1: 02:30 on the day that skips it fires at 03:00, the first instant there is, and
    only then.
    """
    for expression in ("30 2 * * *", "0 30 2 * * *", "0,30 2 * * *", "15-45/15 2 * * *"):
        first, second = local(expression, BERLIN, SPRING - timedelta(hours=2), 2)
        assert first == "2026-03-29T03:00+02:00" and second.startswith("2026-03-30T02:"), expression


def test_t1_a_fixed_time_in_the_fold_fires_once():
    """T1: 02:30 on the day that has it twice fires the first time, and not the second."""
    for expression in ("30 2 * * *", "0 30 2 * * *"):
        found = local(expression, BERLIN, AUTUMN - timedelta(hours=2), 2)
        assert found == ["2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"], expression
        between = AUTUMN + timedelta(minutes=45)  # 02:45, the first time round
        assert local(expression, BERLIN, between, 1) == ["2026-10-26T02:30+01:00"]


def test_t2_wildcard_minutes_over_the_fold_follow_real_time():
    """T2: `*/30 * * * *` fires at 02:00, 02:30, 02:00, 02:30, in this order, as four
    occurrences.
    """
    since = AUTUMN - timedelta(seconds=1)
    shown = [
        "2026-10-25T02:00+02:00",
        "2026-10-25T02:30+02:00",
        "2026-10-25T02:00+01:00",
        "2026-10-25T02:30+01:00",
    ]
    assert local("*/30 * * * *", BERLIN, since, 4) == shown
    assert len(set(islice(times("*/30 * * * *", BERLIN).after(to_us(since)), 4))) == 4


def test_t2_wildcard_minutes_over_the_gap_follow_real_time():
    """T2: in spring `*/30 * * * *` goes from 01:30 to 03:00, half an hour of real time."""
    since = SPRING + timedelta(minutes=29)
    assert local("*/30 * * * *", BERLIN, since, 2) == [
        "2026-03-29T01:30+01:00",
        "2026-03-29T03:00+02:00",
    ]


@pytest.mark.parametrize("change", [SPRING, AUTUMN])
def test_t3_an_interval_knows_no_change_of_clocks(change: datetime):
    """T3: Every(hours=1) has exactly 24 occurrences in the 24 real hours around either change."""
    hours = Every(hours=1)
    found = list(hours.occurrences(change - timedelta(hours=12), change + timedelta(hours=12)))
    assert len(found) == 24
    assert {later - sooner for sooner, later in pairwise(found)} == {timedelta(hours=1)}


def test_t4_a_local_midnight_that_does_not_exist_fires_once():
    """T4: @daily in Cairo fires at 01:00 on the day whose midnight is skipped, once a day before
    and after.
    """
    found = local("@daily", "Africa/Cairo", datetime(2026, 4, 22, 12, tzinfo=UTC), 3)
    assert found == ["2026-04-23T00:00+02:00", "2026-04-24T01:00+03:00", "2026-04-25T00:00+03:00"]


# --------------------------------------------------------------------------- an oracle

MINUTES = st.one_of(
    st.just("*"),
    st.sampled_from(["*/7", "*/15", "*/30"]),
    st.lists(st.integers(0, 59), min_size=1, max_size=3, unique=True),
)
HOURS = st.one_of(
    st.just("*"), st.just("*/3"), st.lists(st.integers(0, 23), min_size=1, max_size=4, unique=True)
)
DAYS = st.sampled_from(["*", "MON-FRI", "SUN", "SAT,SUN,THU"])
WEEK = ["MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN"]


def text(field: str | list[int]) -> str:
    return field if isinstance(field, str) else ",".join(map(str, field))


def matching(field: str, size: int) -> set[int]:
    """The values of a minute or hour field of the kinds above."""
    return (
        set(range(0, size, int(field[2:] or 1) if "/" in field else 1))
        if "*" in field
        else set(map(int, field.split(",")))
    )


def weekdays(field: str) -> set[int]:
    if field == "*":
        return set(range(7))
    return set(range(5)) if field == "MON-FRI" else {WEEK.index(name) for name in field.split(",")}


def oracle(
    minute: str, hour: str, day: str, tz: str, since: datetime, until: datetime
) -> list[datetime]:
    """Every occurrence in (since, until], by looking at each minute there is."""
    where = ZoneInfo(tz)
    minutes, hours, days = matching(minute, 60), matching(hour, 24), weekdays(day)

    def wanted(wall: datetime) -> bool:
        return wall.minute in minutes and wall.hour in hours and wall.weekday() in days

    shown: dict[datetime, datetime] = {}  # wall time → the first instant that shows it
    real: list[datetime] = []
    at = since - timedelta(days=2)
    while at <= until:
        wall = at.astimezone(where).replace(tzinfo=None, fold=0)
        shown.setdefault(wall, at)
        if wanted(wall):
            real.append(at)
        at += timedelta(minutes=1)
    if minute.startswith("*") or hour.startswith("*"):
        return [at for at in real if since < at <= until]
    fixed: set[datetime] = set()
    wall, last = min(shown), max(shown)
    while wall <= last:
        if wanted(wall):
            fixed.add(
                shown[
                    next(
                        later
                        for k in range(1500)
                        if (later := wall + timedelta(minutes=k)) in shown
                    )
                ]
            )
        wall += timedelta(minutes=1)
    return sorted(at for at in fixed if since < at <= until)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    minute=MINUTES,
    hour=HOURS,
    day=DAYS,
    tz=st.sampled_from(sorted(CHANGES)),
    spring=st.booleans(),
    data=st.data(),
)
def test_occurrences_agree_with_looking_at_every_minute(
    minute: str | list[int],
    hour: str | list[int],
    day: str,
    tz: str,
    spring: bool,
    data: st.DataObject,
):
    """Around either change of clocks, in six zones, cron has the occurrences that a walk through
    all minutes finds.
    """
    around = CHANGES[tz][0 if spring else 1]
    since = around + timedelta(
        minutes=data.draw(st.integers(-600, 1200)), seconds=data.draw(st.sampled_from([0, 1, 59]))
    )
    until = around + timedelta(days=2)
    expected = oracle(text(minute), text(hour), day, tz, around - timedelta(days=1), until)
    found = times(f"{text(minute)} {text(hour)} * * {day}", tz)
    after = [to_us(at) for at in expected if at > since]
    assert list(islice(found.after(to_us(since)), len(after))) == after
    for many in (1, 3, 50):
        assert newest(found, to_us(since), to_us(until), many) == after[-many:]
    assert found.count(to_us(since), to_us(until), 10_000) == (len(after), True)


# --------------------------------------------------------------------------- the words of cron


def test_t11_day_of_month_or_day_of_week():
    """T11: `0 0 13 * 5` is the 13th or a Friday."""
    found = [at[:10] for at in local("0 0 13 * 5", "UTC", datetime(2026, 9, 30, tzinfo=UTC), 6)]
    assert found == [
        "2026-10-02",
        "2026-10-09",
        "2026-10-13",
        "2026-10-16",
        "2026-10-23",
        "2026-10-30",
    ]


def test_t11_the_words_of_cron():
    """T11: `MON#1`, `L`, `LW`, `5L`, the aliases and lower-case names have their documented
    meaning.
    """
    since = datetime(2026, 1, 1, tzinfo=UTC)
    firsts = {
        "0 9 * * MON#1": ["2026-01-05T09:00+00:00", "2026-02-02T09:00+00:00"],
        "0 0 L * *": ["2026-01-31T00:00+00:00", "2026-02-28T00:00+00:00"],
        "0 0 LW * *": ["2026-01-30T00:00+00:00", "2026-02-27T00:00+00:00"],
        "0 0 * * 5L": ["2026-01-30T00:00+00:00", "2026-02-27T00:00+00:00"],
        "@hourly": ["2026-01-01T01:00+00:00", "2026-01-01T02:00+00:00"],
        "@daily": ["2026-01-02T00:00+00:00", "2026-01-03T00:00+00:00"],
        "@midnight": ["2026-01-02T00:00+00:00", "2026-01-03T00:00+00:00"],
        "@weekly": ["2026-01-04T00:00+00:00", "2026-01-11T00:00+00:00"],
        "@Monthly": ["2026-02-01T00:00+00:00", "2026-03-01T00:00+00:00"],
        "@yearly": ["2027-01-01T00:00+00:00", "2028-01-01T00:00+00:00"],
        "0 6 * mar mon-fri": ["2026-03-02T06:00+00:00", "2026-03-03T06:00+00:00"],
    }
    assert {expression: local(expression, "UTC", since, 2) for expression in firsts} == firsts


def test_t11_six_fields_have_seconds_first():
    """T11: `30 0 6 * * *` is 06:00:30, not 00:30."""
    (found,) = islice(times("30 0 6 * * *").after(0), 1)
    assert to_datetime(found) == datetime(1970, 1, 1, 6, 0, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("61 * * * *", "field 1 (minute): expected 0-59"),
        ("* * * *", "found 4"),
        ("* * * * * * *", "found 7"),
        ("0 0 ? * MON", "field 3 (day of month)"),
        ("0 0 1,32 * *", "found '32'"),
        ("0 0 * FOO *", "field 4 (month): expected 1-12"),
        ("0 0 * * MON-FOO", "field 5 (day of week)"),
        ("60 * * * * *", "field 1 (second)"),
        ("*/0 * * * *", "found '*/0'"),
        ("", "found 0"),
        ("@reboot", "expected one of @hourly"),
        ("0 0 31 2 *", "no such day exists"),
    ],
)
def test_an_error_names_the_wrong_field(expression: str, message: str):
    """A cron expression that cannot be is refused when it is made; the message names the field,
    what it takes, and what stood there.
    """
    with pytest.raises(UsageError) as refused:
        Cron(expression)
    assert message in str(refused.value) and repr(expression) in str(refused.value)


@pytest.mark.parametrize(
    "tz", ["Europe/Berln", "europe", "Europe", "/etc/passwd", "../etc", "+01:00", ""]
)
def test_a_wrong_zone_is_refused(tz: str):
    """What is no IANA zone is refused when the schedule is made."""
    with pytest.raises(UsageError, match="expected an IANA zone"):
        Cron("@daily", tz=tz)


def test_a_machine_without_time_zones_needs_tzdata():
    """Without a time zone database a named zone is an error at load that names the package; UTC
    needs none.
    """
    code = """
import sys, zoneinfo
zoneinfo.reset_tzpath(to=[])
sys.modules["tzdata"] = None
from triggers import Cron
Cron("@daily", tz="UTC")
Cron("@daily", tz="Europe/Berlin")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 1
    assert (
        "UsageError" in done.stderr.splitlines()[-1]
        and "pip install tzdata" in done.stderr.splitlines()[-1]
    )


def test_options_that_cannot_be_are_refused():
    """Periods, policies, limits and jitter that make no sense are errors where they are written."""
    naive = datetime(2026, 1, 1)  # noqa: DTZ001
    for make, message in (
        (lambda: Every(seconds=0.5), "at least one second"),
        (Every, "at least one second"),
        (At, "at least one datetime"),
        (lambda: At(naive), "add tzinfo=UTC"),
        (lambda: Every(hours=1, anchor=naive), "add tzinfo=UTC"),
        (lambda: Cron("@daily", misfire="none"), "misfire= expected"),  # pyright: ignore[reportArgumentType]
        (lambda: Cron("@daily", limit=0), "limit= expected"),
        (lambda: Cron("@daily", grace=-1), "must not be negative"),
        (lambda: Every(seconds=60, jitter=60), "jitter= must be shorter than the 60 s"),
    ):
        with pytest.raises(UsageError, match=message):
            make()


# --------------------------------------------------------------------------- intervals, and what
# was missed


def test_an_interval_is_anchored():
    """Every's times are anchor + k * period for whole k, before the anchor too."""
    anchor = datetime(2026, 1, 1, 3, 20, tzinfo=UTC)
    found = list(
        Every(timedelta(hours=6), anchor=anchor).occurrences(
            anchor - timedelta(hours=7), anchor + timedelta(hours=7)
        )
    )
    assert found == [anchor - timedelta(hours=6), anchor, anchor + timedelta(hours=6)]
    quarters = list(Every(minutes=15).occurrences(SPRING, SPRING + timedelta(minutes=31)))
    assert [at.minute for at in quarters] == [0, 15, 30]


def test_what_is_due_is_bounded_however_long_the_stop():
    """Fault 15: a schedule of seconds after a year's stop looks at thousands of its 31 million
    occurrences, not at all.
    """
    year = 365 * 86_400 * SECOND
    now = to_us(SPRING)
    looked = 0

    class Counting(CronTimes):
        def after(self, us: int):
            nonlocal looked
            for at in super().after(us):
                looked += 1
                yield at

    schedule = Counting("* * * * * *", time_zone(BERLIN, "here"), BERLIN)
    found = due_occurrences(schedule, now - year, now, MisfirePolicy("all", 0, 100, lambda at: 0))
    assert found is not None
    assert [at for at, _ in found.fire] == [now - k * SECOND for k in reversed(range(100))]
    assert (found.skipped, found.exact, found.through) == (MAX_COUNTED, False, now)
    assert looked < 2 * MAX_COUNTED
    exact = due_occurrences(
        EveryTimes(SECOND, 0), now - year, now, MisfirePolicy("last", 0, 100, lambda at: 0)
    )
    assert exact is not None and (exact.skipped, exact.exact) == (365 * 86_400 - 1, True)


@settings(max_examples=100, deadline=None)
@given(
    misfire=st.sampled_from(["skip", "last", "all"]),
    stop=st.integers(0, 400),
    grace=st.integers(0, 120),
    limit=st.integers(1, 50),
    jitter=st.integers(0, 59),
)
def test_every_occurrence_is_fired_or_counted(
    misfire, stop: int, grace: int, limit: int, jitter: int
):
    """Whatever the policy, the stop, the grace and the jitter: what is settled is fired or counted
    as skipped, each once.
    """
    minute = EveryTimes(60 * SECOND, 0)
    last, now = to_us(SPRING), to_us(SPRING) + stop * 10 * SECOND

    def delay(at: int) -> int:
        return at // (60 * SECOND) * 7919 % (jitter + 1) * SECOND

    found = due_occurrences(minute, last, now, MisfirePolicy(misfire, grace * SECOND, limit, delay))
    come = [at for at in range(last + 60 * SECOND, now + 1, 60 * SECOND) if at + delay(at) <= now]
    assert (found is None) == (not come)
    if found is not None:
        assert found.through == come[-1]
        assert len(found.fire) + found.skipped == len(come)
        assert [at for at, _ in found.fire] == come[len(come) - len(found.fire) :]
        assert all(late == (now - at - delay(at) > grace * SECOND) for at, late in found.fire)
        if misfire == "all":
            assert len(found.fire) == min(limit, len(come))
        if misfire == "skip":
            assert not any(late for _, late in found.fire)
