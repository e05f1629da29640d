"""Schedules at work: every trigger's contract, and real apps whose time a test moves: stops, steps,
edits, pauses, jitter.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import LogCapture

from eventflow import App, Event, flow
from eventflow.core.clock import SECOND, SystemClock, to_datetime, to_us
from eventflow.events.event import HasGauges, Scheduled, Trigger, gauge_totals, parse_time
from eventflow.testing import VirtualClock, drain, running
from eventflow.testing.clock import START
from eventflow.testing.trigger_contract import (
    CONTRACT,
    ContractLedger,
    Item,
    Promise,
    TriggerHarness,
    listening,
)
from eventflow.web import actions
from tests.conftest import eventually
from triggers import At, Cron, Every
from triggers._schedule.times import format_instant
from triggers.schedule import ScheduleOptions

HOUR = timedelta(hours=1)
MIDNIGHT = datetime(2026, 5, 1, tzinfo=UTC)

REAL_STEP = 0.01
"""Seconds of the real clock between two steps of the virtual one."""


# --------------------------------------------------------------------------- the contract


class ScheduleHarness(TriggerHarness):
    """A schedule of whole hours. The keys "a", "b" … are the hours after START; to offer one is to
    let its hour come.
    """

    def __init__(self) -> None:
        self.clock = VirtualClock(START)
        self.options: ScheduleOptions = {
            "name": "hours",
            "misfire": "all",
            "start": START + timedelta(minutes=1),
            "clock": self.clock,
        }

    @asynccontextmanager
    async def source(self) -> AsyncIterator[None]:
        """Time also passes slowly by itself, for schedules that wait."""

        async def pass_by() -> None:
            while True:
                await asyncio.sleep(REAL_STEP)
                await self.clock.advance(0.05)

        passing = asyncio.create_task(pass_by())
        try:
            yield
        finally:
            passing.cancel()
            await asyncio.gather(passing, return_exceptions=True)

    async def offer(self, keys: Sequence[str]) -> None:
        due = START + max(map(self._hour, keys)) * HOUR
        await self.clock.advance(due - to_datetime(self.clock.now()))

    async def redeliver(self, keys: Sequence[str], ledger: ContractLedger) -> None:
        ledger.cursors["last"] = format_instant(to_us(START))

    def key(self, item: Item) -> str:
        assert isinstance(item, Event)
        return chr(ord("a") - 1 + (parse_time(item.data["scheduled_at"]) - START) // HOUR)

    async def acknowledged(self, ledger: ContractLedger) -> set[str]:
        last = ledger.cursors.get("last")
        return {
            key
            for key in "abcdef"
            if isinstance(last, str) and START + self._hour(key) * HOUR <= parse_time(last)
        }

    @staticmethod
    def _hour(key: str) -> int:
        return ord(key) - ord("a") + 1


class EveryHarness(ScheduleHarness):
    def trigger(self) -> Every:
        return Every(hours=1, **self.options)


class CronHarness(ScheduleHarness):
    def trigger(self) -> Cron:
        return Cron("0 * * * *", **self.options)


class AtHarness(ScheduleHarness):
    def trigger(self) -> At:
        return At(*(START + hour * HOUR for hour in range(1, 7)), **self.options)


@pytest.mark.parametrize("promise", CONTRACT)
@pytest.mark.parametrize("harness", [EveryHarness, CronHarness, AtHarness])
def test_contract(promise: Promise, harness: type[ScheduleHarness]):
    """A schedule keeps what every trigger promises."""
    asyncio.run(promise(harness()))


def test_every_option_is_documented():
    """The guide names each option that the schedules take."""
    guide = (Path(__file__).parents[2] / "docs/guides/schedules.md").read_text()
    assert [name for name in ScheduleOptions.__annotations__ if f"{name}=" not in guide] == []


def test_names_are_stable():
    """A schedule made the same way has the same name; other rules and zones have others."""
    assert Cron("0 6  * * *", tz="Europe/Berlin").name == Cron("0 6 * * *", tz="Europe/Berlin").name
    assert Cron("0 6 * * *", tz="Europe/Berlin").name == "cron:0 6 * * * Europe/Berlin"
    assert Every(minutes=15).name == "every:900s"
    assert At(MIDNIGHT, MIDNIGHT + HOUR).name == "at:2026-05-01T00:00:00Z"
    assert Cron("@daily", name="nightly").name == "nightly"


# --------------------------------------------------------------------------- an app whose time a
# test moves


class Kept:
    """An app with schedules, opened again and again on one store; `fired` is what it recorded."""

    def __init__(self, folder: Path, clock: VirtualClock) -> None:
        self.store = folder / "kept.db"
        self.clock = clock

    @asynccontextmanager
    async def open(self, *schedules: Trigger) -> AsyncIterator[App]:
        app = App("kept")
        for schedule in schedules:
            app.on(schedule, take)
        async with running(app, clock=self.clock, store=self.store):
            await eventually(
                lambda: all(
                    each.state == "listening" for each in app.runtime.reactor.health.values()
                ),
                "they listen",
            )
            await self.clock.advance(0)
            yield app

    async def fired(self, app: App) -> list[Event]:
        await drain(app, advance=False)
        rows = await app.store.events(limit=1000)
        return [
            Event.from_recorded((await app.store.event(row["id"]))["body"])
            for row in reversed(rows)
        ]


@flow
async def take(event: Event, schedule: str, scheduled_at: datetime) -> str:
    return f"{schedule} {scheduled_at:%H:%M}"


def nominal(events: Sequence[Event]) -> list[str]:
    return [event.data["scheduled_at"][11:16] for event in events]


def at(hour: int, minute: int = 0, *, day: int = 1) -> datetime:
    return datetime(2026, 5, day, hour, minute, tzinfo=UTC)


async def go_to(clock: VirtualClock, moment: datetime) -> None:
    await clock.advance(moment - to_datetime(clock.now()))


def test_the_data_of_an_occurrence(tmp_path: Path):
    """An event has its nominal time, the same on the schedule's wall clock, when it really fired,
    and starts its run.
    """

    async def main() -> None:
        kept = Kept(tmp_path, VirtualClock(datetime(2026, 3, 28, tzinfo=UTC)))
        async with kept.open(
            Cron("0 6 * * *", tz="Europe/Berlin", name="report", jitter=60)
        ) as app:
            await kept.clock.advance(timedelta(days=2))
            first, second = await kept.fired(app)
            assert (
                first.id == "report@2026-03-28T05:00:00Z"
                and second.id == "report@2026-03-29T04:00:00Z"
            )
            assert (first.source, first.type) == (
                "/schedules/report",
                "io.eventflow.schedule.fired",
            )
            assert second.data == {
                "schedule": "report",
                "scheduled_at": "2026-03-29T04:00:00Z",
                "local_time": "2026-03-29T06:00:00+02:00",
            }
            assert second.time is not None
            assert (
                timedelta(0)
                <= second.time - datetime(2026, 3, 29, 4, tzinfo=UTC)
                <= timedelta(seconds=60)
            )
            assert second.extensions == {}
            assert (await app.store.counts())["completed"] == 2

    asyncio.run(main())


def test_t2_the_hour_that_comes_twice_fires_four_times(tmp_path: Path):
    """T2: `*/30 * * * *` in the night with two 02:00s fires 02:00, 02:30, 02:00, 02:30, four
    occurrences with four ids.
    """

    async def main() -> None:
        kept = Kept(tmp_path, VirtualClock(datetime(2026, 10, 24, 23, 59, tzinfo=UTC)))
        async with kept.open(Cron("*/30 * * * *", tz="Europe/Berlin")) as app:
            await kept.clock.advance(2 * HOUR)
            events = await kept.fired(app)
            assert [event.data["local_time"][11:] for event in events] == [
                "02:00:00+02:00",
                "02:30:00+02:00",
                "02:00:00+01:00",
                "02:30:00+01:00",
            ]
            assert len({event.id for event in events}) == 4

    asyncio.run(main())


@pytest.mark.parametrize("month", [3, 10])
def test_t3_an_interval_fires_each_real_hour(month: int, tmp_path: Path):
    """T3: Every(hours=1) fires 24 times in 24 real hours, whichever way the clocks change
    meanwhile.
    """

    async def main() -> None:
        kept = Kept(
            tmp_path, VirtualClock(datetime(2026, month, 24 if month == 10 else 28, 12, tzinfo=UTC))
        )
        async with kept.open(Every(hours=1)) as app:
            await kept.clock.advance(24 * HOUR)
            assert len(await kept.fired(app)) == 24

    asyncio.run(main())


def test_a_month_of_cron_passes_in_a_test(tmp_path: Path):
    """A month of working days is one `advance`: every occurrence fires at its own time, none is
    late.
    """

    async def main() -> None:
        kept = Kept(tmp_path, VirtualClock(datetime(2026, 3, 1, tzinfo=UTC)))
        async with kept.open(Cron("0 6 * * MON-FRI", tz="Europe/Berlin")) as app:
            await kept.clock.advance(timedelta(days=31))
            events = await kept.fired(app)
            assert len(events) == 22
            assert all(event.time == parse_time(event.data["scheduled_at"]) for event in events)

    asyncio.run(main())


def test_schedules_of_an_app_under_test_follow_its_clock(tmp_path: Path):
    """`running` lends its clock to schedules that were made without one, and gives back
    their own.
    """

    async def main() -> None:
        schedule = Every(hours=1)
        before, clock = schedule.clock, VirtualClock(MIDNIGHT)
        app = App("mine")
        app.on(schedule, take)
        async with running(app, clock=clock):
            await clock.advance(3 * HOUR)
            assert (await drain(app))["completed"] == 3
        assert schedule.clock is before

    asyncio.run(main())


# --------------------------------------------------------------------------- missed


NIGHTS = {
    "spring": (datetime(2026, 3, 29, 0, 10, tzinfo=UTC), ["01:30", "03:30", "04:30"], ["03:00"]),
    "autumn": (datetime(2026, 10, 24, 23, 10, tzinfo=UTC), ["01:30", "02:30", "02:30"], ["02:15"]),
}
"""When a process goes down for three hours, and what `30 * * * *` and `15 2 * * *` have in that
time on Berlin's clocks.
"""


@pytest.mark.parametrize("misfire", ["skip", "last", "all"])
@pytest.mark.parametrize("night", NIGHTS)
def test_e_down_for_three_hours_over_a_change_of_clocks(misfire: Any, night: str, tmp_path: Path):
    """Down for the three real hours around either change of clocks, an hourly and a daily schedule
    do what their policy says with the occurrences of that time: a fixed time has one, whichever way
    the clocks went, the hourly one each real hour's.
    """

    async def main() -> None:
        down, hours, daily = NIGHTS[night]
        kept = Kept(tmp_path, VirtualClock(down))

        def schedules() -> list[Trigger]:
            return [
                Cron("30 * * * *", tz="Europe/Berlin", name="hourly", misfire=misfire),
                Cron("15 2 * * *", tz="Europe/Berlin", name="daily", misfire=misfire),
            ]

        async with kept.open(*schedules()):
            pass
        await kept.clock.advance(3 * HOUR)
        async with kept.open(*schedules()) as app:
            events = await kept.fired(app)
            fired: dict[str, list[str]] = {"hourly": [], "daily": []}
            for event in events:
                fired[event.data["schedule"]].append(event.data["local_time"][11:16])
            assert fired["hourly"] == {"skip": [], "last": hours[-1:], "all": hours}[misfire]
            assert fired["daily"] == {"skip": [], "last": daily, "all": daily}[misfire]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("options", "expected", "skipped"),
    [
        ({"misfire": "skip"}, [], 10),
        ({"misfire": "skip", "grace": 3600}, ["10:00"], 9),
        ({"misfire": "last"}, ["10:00"], 9),
        ({}, ["10:00"], 9),
        ({"misfire": "all"}, [f"{hour:02}:00" for hour in range(1, 11)], 0),
        ({"misfire": "all", "limit": 5}, [f"{hour:02}:00" for hour in range(6, 11)], 5),
    ],
)
def test_t6_down_for_ten_hours(
    options: dict[str, Any], expected: list[str], skipped: int, tmp_path: Path
):
    """T6: hourly, down for ten hours: skip fires none, or one inside the grace; last one; all ten;
    all with a limit of five the newest five. What is skipped is counted on the first that fires,
    and in the gauge. Then it continues.
    """

    async def main() -> None:
        kept = Kept(tmp_path, VirtualClock(at(0, 30)))
        async with kept.open(Cron("@hourly", **options)):
            pass
        await kept.clock.advance(10 * HOUR)
        schedule = Cron("@hourly", **options)
        async with kept.open(schedule) as app:
            await drain(app, advance=False)
            events = await kept.fired(app)
            assert nominal(events) == expected
            assert [event.extensions.get("skipped", 0) for event in events] == [
                skipped,
                *[0] * (len(events) - 1),
            ][: len(events)]
            assert all(event.time == at(10, 30) for event in events)
            late = "grace" not in options
            assert all(event.extensions.get("catchup", False) is late for event in events)
            assert (
                isinstance(schedule, HasGauges)
                and gauge_totals(schedule.gauges())["skipped_occurrences"] == skipped
            )
            await go_to(kept.clock, at(11, 30))
            events = await kept.fired(app)
            assert (
                nominal(events) == [*expected, "11:00"] and "catchup" not in events[-1].extensions
            )

    asyncio.run(main())


def test_p6_a_missed_occurrence_fires_at_once_on_restart_and_once(tmp_path: Path):
    """P6: an occurrence whose time passed while the process was down fires at the next start, once,
    however often it starts.
    """

    async def main() -> None:
        kept = Kept(tmp_path, VirtualClock(at(5)))
        async with kept.open(Cron("0 6 * * *", name="report")):
            pass
        await kept.clock.advance(3 * HOUR)
        for _ in range(3):
            async with kept.open(Cron("0 6 * * *", name="report")) as app:
                (event,) = await kept.fired(app)
                assert event.id == "report@2026-05-01T06:00:00Z" and event.time == at(8)
                assert event.extensions == {"catchup": True}

    asyncio.run(main())


def test_a_year_down_starts_quickly(tmp_path: Path):
    """Fault 15: a schedule of seconds that was down for a year is up within moments, fires as its
    policy says; `skippedmore` says that the count is not complete.
    """

    async def main() -> None:
        kept = Kept(tmp_path, VirtualClock(MIDNIGHT))
        every = "* * * * * *"
        async with kept.open(Cron(every, tz="Europe/Berlin", name="s", misfire="all", limit=20)):
            pass
        await kept.clock.advance(timedelta(days=365))
        clock = SystemClock()
        began = clock.monotonic()
        async with kept.open(
            Cron(every, tz="Europe/Berlin", name="s", misfire="all", limit=20)
        ) as app:
            events = await kept.fired(app)
            assert len(events) == 20
            assert (
                events[0].extensions["skipped"] == 10_000
                and events[0].extensions["skippedmore"] is True
            )
        assert clock.monotonic() - began < 15  # 31 million steps would take minutes

    asyncio.run(main())


def test_a_long_catch_up_is_recorded_in_pieces(tmp_path: Path):
    """A catch-up of more events than one transaction takes arrives whole and in order."""

    async def main() -> None:
        kept = Kept(tmp_path, VirtualClock(MIDNIGHT))
        async with kept.open(Every(minutes=1, misfire="all", limit=700)):
            pass
        await kept.clock.advance(timedelta(minutes=800))
        async with kept.open(Every(minutes=1, misfire="all", limit=700)) as app:
            events = await kept.fired(app)
            due = [MIDNIGHT + timedelta(minutes=101 + k) for k in range(700)]
            assert [parse_time(event.data["scheduled_at"]) for event in events] == due
            assert events[0].extensions["skipped"] == 100

    asyncio.run(main())


# --------------------------------------------------------------------------- clocks that are set


class SettableClock(SystemClock):
    """The machine's clock with an offset that a test changes, as an operator sets the time; waits
    look at it often.
    """

    STEP_SECONDS = 0.02

    def __init__(self, start: datetime) -> None:
        self._offset = 0
        self.set(start)

    def set(self, moment: datetime) -> None:
        self._offset = to_us(moment) - super().now()

    def now(self) -> int:
        return super().now() + self._offset


def test_t8_a_clock_set_back_fires_nothing_again():
    """T8: after the clock is set back by an hour its nominal time passes again, and nothing fires;
    the next one does.
    """

    async def main() -> None:
        clock, ledger = SettableClock(at(10, 59) + timedelta(seconds=59)), ContractLedger()
        async with listening(Every(hours=1, clock=clock), ledger):
            await eventually(lambda: len(ledger.offered) == 1, "eleven o'clock has come")
            clock.set(at(10, 59) + timedelta(seconds=59.8))
            await eventually(
                lambda: clock.now() > to_us(at(11)) + SECOND // 2, "it is eleven o'clock again"
            )
            assert len(ledger.offered) == 1
            clock.set(at(11, 59) + timedelta(seconds=59.8))
            await eventually(lambda: len(ledger.offered) == 2, "twelve o'clock has come")
        assert nominal([item for item in ledger.offered if isinstance(item, Event)]) == [
            "11:00",
            "12:00",
        ]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("misfire", "expected"),
    [("last", ["13:00"]), ("all", ["11:00", "12:00", "13:00"]), ("skip", [])],
)
def test_t8_a_clock_set_forward_is_a_misfire(misfire: Any, expected: list[str]):
    """T8: a step of the clock over three occurrences is treated as the misfire policy says."""

    async def main() -> None:
        clock, ledger = SettableClock(at(10, 10)), ContractLedger()
        async with listening(Every(hours=1, misfire=misfire, clock=clock), ledger):
            await eventually(lambda: "last" in ledger.cursors, "it has begun")
            clock.set(at(13, 10))
            await eventually(
                lambda: ledger.cursors["last"] == "2026-05-01T13:00:00Z", "13:00 is settled"
            )
        assert nominal([item for item in ledger.offered if isinstance(item, Event)]) == expected

    asyncio.run(main())


def test_t8_a_restart_with_an_earlier_clock_fires_nothing_again(tmp_path: Path):
    """T8: restarted with a clock that is an hour behind, a schedule fires nothing until it passes
    its cursor, and logs it.
    """

    async def main() -> None:
        kept = Kept(tmp_path, VirtualClock(at(9, 30)))
        async with kept.open(Every(hours=1)) as app:
            await kept.clock.advance(2 * HOUR)
            assert nominal(await kept.fired(app)) == ["10:00", "11:00"]
        kept.clock = VirtualClock(at(10, 30))
        hours = Every(hours=1)
        async with kept.open(hours) as app:
            assert "until it passes 2026-05-01T11:00:00Z" in str(hours.condition)
            await go_to(kept.clock, at(12, 30))
            assert hours.condition is None
            assert nominal(await kept.fired(app)) == ["10:00", "11:00", "12:00"]
            assert (await app.store.counts())["duplicates"] == 0

    asyncio.run(main())


def test_a_cursor_ahead_of_the_clock_is_logged():
    """A schedule whose cursor is in the future logs it at the start, since it fires nothing until
    then.
    """

    async def main() -> None:
        capture, ledger = LogCapture(), ContractLedger()
        ledger.log = structlog.wrap_logger(structlog.ReturnLogger(), processors=[capture])
        schedule = Every(hours=1, clock=VirtualClock(at(10)))
        ledger.cursors.update(
            last="2038-01-19T00:00:00Z", schedule="every 3600 s from 1970-01-01T00:00:00Z"
        )
        async with listening(schedule, ledger):
            await eventually(
                lambda: [e for e in capture.entries if e["event"] == "schedule.opened"],
                "it is open",
            )
        (line,) = [
            entry for entry in capture.entries if entry["event"] == "schedule.cursor_in_future"
        ]
        assert line["last"] == "2038-01-19T00:00:00Z" and ledger.offered == []

    asyncio.run(main())


# --------------------------------------------------------------------------- once


def test_p6_any_number_of_processes_fire_an_occurrence_once():
    """Three listeners of one schedule on one ledger offer the same identities with the same
    content: each is recorded once, and none is a conflict.
    """

    async def main() -> None:
        clock, ledger = VirtualClock(at(0, 30)), ContractLedger()

        def replica() -> Trigger:
            return Every(hours=1, name="one", misfire="all", clock=clock)

        async with (
            listening(replica(), ledger),
            listening(replica(), ledger),
            listening(replica(), ledger),
        ):
            await eventually(lambda: clock.next_due is not None, "they wait")
            for hour in (1, 2, 3):
                await go_to(clock, at(hour, 1))
                await eventually(lambda: len(ledger.offered) == 3 * hour, "each has offered it")  # noqa: B023
        assert len(ledger.recorded) == 3
        assert (
            len({item.data["scheduled_at"] for item in ledger.offered if isinstance(item, Event)})
            == 3
        )

    asyncio.run(main())


def test_t12_jitter_spreads_and_stays(tmp_path: Path):
    """T12: a hundred schedules at 00:00 with a jitter of 60 s fire spread over the minute, each at
    the same instant after a restart, with the ids of 00:00.
    """

    async def main(folder: Path) -> dict[str, datetime | None]:
        folder.mkdir()
        kept = Kept(folder, VirtualClock(at(23, 59)))
        hundred = [Cron("@daily", name=f"s{number}", jitter=60) for number in range(100)]
        async with kept.open(*hundred) as app:
            await kept.clock.advance(timedelta(minutes=2, seconds=1))
            return {event.id: event.time for event in await kept.fired(app)}

    first, again = asyncio.run(main(tmp_path / "first")), asyncio.run(main(tmp_path / "again"))
    assert first == again
    assert first.keys() == {f"s{number}@2026-05-02T00:00:00Z" for number in range(100)}
    late = sorted((time - at(0, day=2)).total_seconds() for time in first.values() if time)
    assert 0 <= late[0] < 5 and 55 < late[-1] <= 60 and len({int(seconds) for seconds in late}) > 40


def test_jitter_does_not_reorder(tmp_path: Path):
    """With jitter just shorter than the period, occurrences still fire in order, each once and none
    early.
    """

    async def main() -> None:
        kept = Kept(tmp_path, VirtualClock(at(0)))
        async with kept.open(Every(seconds=60, jitter=59)) as app:
            await kept.clock.advance(timedelta(minutes=60))
            events = await kept.fired(app)
            found = [parse_time(event.data["scheduled_at"]) for event in events]
            assert (
                found == [at(0) + timedelta(minutes=k + 1) for k in range(len(found))]
                and len(found) >= 59
            )
            assert all(
                event.time is not None and timedelta(0) <= event.time - due
                for event, due in zip(events, found, strict=True)
            )

    asyncio.run(main())


# --------------------------------------------------------------------------- begun, edited, paused,
# over


def test_the_past_is_past_at_the_first_start(tmp_path: Path):
    """At its very first start a schedule fires nothing that is past; with `start=`, what passed
    since counts as missed.
    """

    async def main() -> None:
        kept = Kept(tmp_path, VirtualClock(at(10, 30)))
        old = Every(hours=1, name="old", misfire="all", start=at(8))
        to_come = Every(hours=1, name="to come", start=at(12))
        async with kept.open(Every(hours=1, name="new", misfire="all"), old, to_come) as app:
            assert (
                to_come.condition is None
                and gauge_totals(to_come.gauges())["next_timestamp_seconds"] == at(12).timestamp()
            )
            assert [event.id for event in await kept.fired(app)] == [
                f"old@2026-05-01T{hour:02}:00:00Z" for hour in (8, 9, 10)
            ]

    asyncio.run(main())


def test_an_edit_is_not_back_filled(tmp_path: Path):
    """A schedule whose rule was edited while it was down fires nothing of the time before, and from
    then on by the new rule.
    """

    async def main() -> None:
        kept = Kept(tmp_path, VirtualClock(at(0, 30)))
        async with kept.open(Cron("0 * * * *", name="job", misfire="all")):
            pass
        await kept.clock.advance(5 * HOUR)
        for _ in range(2):
            async with kept.open(Cron("15 * * * *", name="job", misfire="all")) as app:
                assert nominal(await kept.fired(app)) == []
        await kept.clock.advance(HOUR)
        async with kept.open(Cron("15 * * * *", name="job", misfire="all")) as app:
            assert nominal(await kept.fired(app)) == ["06:15"]

    asyncio.run(main())


def test_a_paused_schedule_records_and_holds(tmp_path: Path):
    """While a schedule is paused its occurrences are recorded at their times and their runs held;
    resumed, all of them run.
    """

    async def main() -> None:
        kept = Kept(tmp_path, VirtualClock(at(0, 30)))
        async with kept.open(Every(hours=1, name="hours")) as app:
            await actions.pause(app, "hours", True, by="a test")
            await kept.clock.advance(3 * HOUR)
            assert nominal(await kept.fired(app)) == ["01:00", "02:00", "03:00"]
            assert [row["state"] for row in await app.store.runs()] == ["paused"] * 3
            await actions.pause(app, "hours", False, by="a test")
            assert (await drain(app))["completed"] == 3

    asyncio.run(main())


def test_at_fires_each_moment_once_and_is_over(tmp_path: Path):
    """At fires each of its moments, wall times of its zone too, then waits for nothing; moments
    that are past do not fire.
    """

    async def main() -> None:
        kept = Kept(tmp_path, VirtualClock(at(0)))
        moments = [datetime(2026, 5, 1, hour) for hour in (1, 12, 18)]  # noqa: DTZ001
        once = At(*moments, tz="Europe/Berlin")
        async with kept.open(once) as app:
            await kept.clock.advance(timedelta(days=400))
            assert nominal(await kept.fired(app)) == ["10:00", "16:00"]
            assert "next_timestamp_seconds" not in gauge_totals(once.gauges())
            assert app.runtime.reactor.health[once.name].state == "listening"

    asyncio.run(main())


def test_health_and_gauges():
    """A schedule shows when it fires next, jitter included, and its occurrences; it is
    what a backfill asks.
    """

    async def main() -> None:
        schedule = Cron("0 6 * * *", tz="Europe/Berlin", clock=VirtualClock(at(0)))
        assert isinstance(schedule, Scheduled)
        ledger = ContractLedger()
        async with listening(schedule, ledger):
            await eventually(lambda: schedule.is_open, "it has begun")
            assert gauge_totals(schedule.gauges())["next_timestamp_seconds"] == at(4).timestamp()
            assert schedule.settled(ledger.cursors) == at(0)
        naive = datetime(2026, 5, 1)  # noqa: DTZ001
        assert list(schedule.occurrences(naive, naive + timedelta(days=2))) == [at(4), at(4, day=2)]
        assert schedule.occurrence(at(4)).id == "cron:0 6 * * * Europe/Berlin@2026-05-01T04:00:00Z"
        with pytest.raises(ValueError, match="no occurrence"):
            schedule.occurrence(at(5))

    asyncio.run(main())
