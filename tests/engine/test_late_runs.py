"""Late runs as events: recorded once for each run and `after`, never early, in any live state, also
after a restart.
"""

import asyncio
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import eventflow
from eventflow import (
    App,
    Batch,
    Debounce,
    Event,
    Permanent,
    UsageError,
    any_of,
    current_run,
    flow,
    task,
)
from eventflow.core.clock import to_us
from eventflow.store.audit import audit
from eventflow.testing import MemoryTrigger, VirtualClock, drain, running
from tests.conftest import eventually
from triggers import RunState

pytestmark = pytest.mark.anyio

HOUR = 3600.0


@flow
async def train(seconds: float, fail: bool = False) -> float:
    await eventflow.sleep(seconds)
    if fail:
        raise Permanent("as asked")
    return seconds


class Received:
    """A flow that notes which events started it, and when."""

    def __init__(self, clock: VirtualClock, name: str = "alert") -> None:
        self.events: list[Event] = []
        self.at: list[float] = []
        began = clock.now()

        @flow(name=name)
        async def alert(events: list[Event]) -> None:
            self.events += events
            self.at += [(clock.now() - began) / 1e6] * len(events)

        self.flow = alert

    @property
    def runs(self) -> list[str | None]:
        return [event.subject for event in self.events]


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def received(clock: VirtualClock) -> Received:
    return Received(clock)


def app_with_alerts(received: Received, *states: Any, after: Any = HOUR) -> App:
    app = App("late")
    app.add(train)
    app.on(RunState("train", *(states or ("late",)), after=after), received.flow)
    return app


# --------------------------------------------------------------------------- time and content


async def test_p6_recorded_at_its_time_and_not_before(
    clock: VirtualClock, received: Received
) -> None:
    """A run that has not ended an hour after it was recorded causes an event at that moment; one
    that ended in time does not.
    """
    async with running(app_with_alerts(received), clock=clock) as app:
        await app.start(train, seconds=HOUR - 1)
        slow = await app.start(train, seconds=3 * HOUR)
        await clock.advance(HOUR - 0.001)
        assert received.events == []
        await clock.advance(0.001)
        assert received.runs == [slow.id] and received.at == [HOUR]
        await clock.advance(24 * HOUR)
        assert received.runs == [slow.id]


async def test_the_event_of_a_late_run(clock: VirtualClock, received: Received) -> None:
    """The event names the run, how late it is, when it was due and its state; its time is that at
    which the run became late.
    """
    began = clock.now()
    async with running(app_with_alerts(received, after=timedelta(minutes=90)), clock=clock) as app:
        run = await app.start(train, seconds=6 * HOUR)
        await clock.advance(5400)
    (event,) = received.events
    assert (event.type, event.subject, event.source) == (
        "eventflow.run.late",
        run.id,
        "/flows/train",
    )
    assert event.time is not None and to_us(event.time) == began + 5400 * 1_000_000
    assert event.extensions["eventflowcause"] == run.id and event.depth == 1
    assert to_us(datetime.fromisoformat(event.data.pop("due"))) == began
    assert event.data == {
        "run": run.id,
        "flow": "train",
        "state": "late",
        "claims": 1,
        "seconds": 5400.0,
        "reason": None,
        "result": None,
        "error": None,
        "after": 5400,
        "run_state": "waiting",
    }


async def test_late_in_any_live_state(clock: VirtualClock, received: Received) -> None:
    """A running, queued, blocked, waiting or paused run is late alike."""
    go_on = asyncio.Event()
    trigger, paused = MemoryTrigger("work"), MemoryTrigger("paused")

    @task
    async def work() -> None:
        await go_on.wait()

    @flow(concurrency=1)
    async def busy() -> None:
        await work()

    app = app_with_alerts(received)
    app.on(trigger, train, key="lane")
    app.on(paused, train, name="paused")
    for each in (busy, train):
        app.on(RunState(each, "late", after=60), received.flow)
    async with running(app, clock=clock):
        app.runtime.reactor.pause("paused", True)
        await paused.send(data={"seconds": 1})
        for _ in range(2):
            await app.start(busy)
            await trigger.send(data={"seconds": HOUR / 2, "lane": "one"})
        await clock.advance(60)
        assert sorted(
            (event.data["flow"], event.data["run_state"]) for event in received.events
        ) == [
            ("busy", "pending"),
            ("busy", "running"),
            ("train", "paused"),
            ("train", "pending"),
            ("train", "waiting"),
        ]
        go_on.set()
        await drain(app, advance=False)


async def test_several_afters_each_get_their_own_event(
    clock: VirtualClock, received: Received
) -> None:
    """Subscriptions with different `after`s each get their own event; ends are reported
    as before.
    """
    patient = Received(clock, "patient")
    app = app_with_alerts(received, "late", "completed", after=60)
    app.on(RunState(train, "late", after=HOUR), patient.flow)
    async with running(app, clock=clock):
        run = await app.start(train, seconds=2 * HOUR)
        await clock.advance(3 * HOUR)
        assert [event.type for event in received.events] == [
            "eventflow.run.late",
            "eventflow.run.completed",
        ]
        assert received.at == [60, 2 * HOUR] and received.events[0].data["after"] == 60
        assert patient.runs == [run.id] and patient.at == [HOUR]
        assert (await app.store.counts())["events"] == 1 + 3


async def test_runs_that_become_late_one_by_one_are_recorded_one_by_one(
    clock: VirtualClock, received: Received
) -> None:
    """Each of many runs is recorded at its own time: the monitor sleeps until then, and misses no
    run that arrives meanwhile.
    """
    async with running(app_with_alerts(received, after=600), clock=clock) as app:
        for _ in range(8):
            await app.start(train, seconds=HOUR)
            await clock.advance(97)
        await clock.advance(HOUR)
    assert received.at == [600 + 97 * n for n in range(8)]


# --------------------------------------------------------------------------- windows


async def test_an_open_window_is_not_late(clock: VirtualClock, received: Received) -> None:
    """A run that gathers events counts from the close of its window; other runs are recorded in the
    meantime.
    """
    app, trigger = app_with_alerts(received), MemoryTrigger("work")

    @flow
    async def nightly(events: list[Event]) -> None:
        await eventflow.sleep(24 * HOUR)

    app.on(trigger, nightly, deliver=Debounce(10 * HOUR, max_wait=12 * HOUR))
    app.on(RunState("nightly", "late", after=HOUR), received.flow)
    async with running(app, clock=clock):
        await trigger.send(data={})
        await clock.advance(1)
        other = await app.start(train, seconds=2 * HOUR)
        await clock.advance(9 * HOUR - 1)
        assert received.runs == [other.id] and received.at == [HOUR + 1]
        await trigger.send(data={})  # puts its close off to 12 h, its longest
        await clock.advance(4 * HOUR - 1)
        assert len(received.events) == 1
        await clock.advance(1)
        assert received.at[1:] == [13 * HOUR] and received.events[1].data["run_state"] == "waiting"


async def test_a_window_that_is_full_is_due_at_once(
    clock: VirtualClock, received: Received
) -> None:
    """A batch counts from the event that filled it, also if the monitor had seen it open."""
    app, trigger = app_with_alerts(received), MemoryTrigger("work")

    @flow(concurrency=1)
    async def load(events: list[Event]) -> None:
        await eventflow.sleep(24 * HOUR)

    app.on(trigger, load, deliver=Batch(2, within=10 * HOUR))
    app.on(RunState("load", "late", after=600), received.flow)
    async with running(app, clock=clock):
        for _ in range(2):  # the second batch waits until the first has ended: full, and not begun
            await trigger.send(data={})
            await clock.advance(1000)
            await trigger.send(data={})
            await clock.advance(599)
            assert len(received.events) in (0, 1)
            await clock.advance(1)
        assert received.at == [1600, 3200]


# --------------------------------------------------------------------------- once


async def test_p6_recorded_at_once_after_a_restart_and_only_once(
    clock: VirtualClock, received: Received, tmp_path: Path
) -> None:
    """A run that became late while no process ran is recorded at the next start, and by no later
    process again.
    """
    async with running(app_with_alerts(received), clock=clock, store=tmp_path / "late.db") as app:
        run = await app.start(train, seconds=100 * HOUR)
        ended = await app.start(train, seconds=10)
        await clock.advance(HOUR / 2)
    await clock.advance(HOUR)
    assert received.events == []
    for life in range(2):
        async with running(
            app_with_alerts(received), clock=clock, store=tmp_path / "late.db"
        ) as app:
            await clock.advance(life)
            assert received.runs == [run.id] and ended.id not in received.runs
            await clock.advance(HOUR)
            assert len(await app.store.events(type="eventflow.run.late")) == 1


async def test_a_run_that_was_retried_is_not_recorded_again(
    clock: VirtualClock, received: Received
) -> None:
    """A run is recorded once, however often it is retried; a run that had ended in time is not late
    once it is retried.
    """
    async with running(app_with_alerts(received), clock=clock) as app:
        slow = await app.start(train, seconds=2 * HOUR, fail=True)
        quick = await app.start(train, seconds=50 * HOUR)
        await clock.advance(60)
        await quick.cancel()
        await clock.advance(3 * HOUR)
        assert received.runs == [slow.id]
        for run in (slow, quick):
            await app.store.retry(run.number, discard_journal=True)
        await clock.advance(10)
        assert (await quick.row())["state"] == "waiting"
        await clock.advance(10 * HOUR)
        assert received.runs == [slow.id]


async def test_a_run_retried_in_time_may_still_be_late(
    clock: VirtualClock, received: Received
) -> None:
    """A run that ended, was retried, and has not ended at its time, is late like any other, and
    recorded in time.
    """
    async with running(app_with_alerts(received), clock=clock) as app:
        other = await app.start(train, seconds=10 * HOUR)
        await clock.advance(HOUR / 2)
        run = await app.start(train, seconds=10 * HOUR)
        await run.cancel()
        await clock.advance(HOUR / 2)
        assert received.runs == [other.id]
        await app.store.retry(run.number)
        await clock.advance(HOUR / 2)
        assert received.runs == [other.id, run.id] and received.at == [HOUR, 1.5 * HOUR]


async def test_retention_removes_its_rows(clock: VirtualClock, received: Received) -> None:
    """Retention of a run removes the rows of its lateness too."""
    async with running(app_with_alerts(received), clock=clock) as app:
        await app.start(train, seconds=2 * HOUR)
        await clock.advance(3 * HOUR)
        assert await _kept(app) == [(HOUR * 1e6,)]
        later = clock.now() + 1
        while await app.store.prune(payloads_before=later, identities_before=0):
            pass
        assert await _kept(app) == []


async def _kept(app: App) -> list[Any]:
    return await app.store._read(
        lambda connection: connection.execute("SELECT after FROM late_runs").fetchall()
    )  # pyright: ignore[reportPrivateUsage]


# --------------------------------------------------------------------------- who asks


async def test_a_wildcard_covers_all_flows_but_its_own_alerts(clock: VirtualClock) -> None:
    """`*` means every flow, but not the runs that a late event started, which would be late in
    turn; a name means those too.
    """
    asked: list[str] = []

    @flow(name="alert")
    async def alert(run: str) -> None:
        asked.append(run)
        await eventflow.sleep(10 * HOUR)

    about, app = Received(clock, "about"), App("late")
    app.add(train)
    app.on(RunState("*", "late", after=60), alert)
    async with running(app, clock=clock):
        run = await app.start(train, seconds=HOUR)
        await clock.advance(2 * HOUR)
        assert asked == [run.id]
    app.on(RunState("alert", "late", after=60), about.flow)
    async with running(app, clock=clock):
        await app.start(train, seconds=HOUR)
        await clock.advance(2 * HOUR)
        assert {event.data["flow"] for event in about.events} == {"alert"}


async def test_a_late_run_as_part_of_a_pattern(clock: VirtualClock, received: Received) -> None:
    """A late run can be part of a pattern like other run states; `deliver=` gathers alerts."""
    app = App("late")
    app.add(train)
    app.on(
        any_of(RunState("train", "late", after=60), "drift.detected"),
        received.flow,
        deliver=Batch(2, within=10),
    )
    async with running(app, clock=clock):
        runs = [await app.start(train, seconds=HOUR) for _ in range(2)]
        await clock.advance(60)
        assert sorted(map(str, received.runs)) == sorted(run.id for run in runs)
        assert len(await app.store.runs(flow="alert")) == 1


async def test_where_narrows_the_subscription(clock: VirtualClock, received: Received) -> None:
    """With `where=` only matching events start a run; the others are not examined again and leave
    no event.
    """
    app = App("late")
    app.add(train)
    app.on(RunState("train", "late", after=60), received.flow, where={"run_state": ["paused"]})
    async with running(app, clock=clock):
        await app.start(train, seconds=HOUR)
        await clock.advance(61)
        assert received.events == [] and await app.store.events(type="eventflow.run.late") == []
        assert clock.next_due is not None and to_us(clock.next_due) > clock.now() + 1_000_000


async def test_without_a_subscription_nothing_scans(
    clock: VirtualClock, received: Received
) -> None:
    """Without a subscription to `late` there is no scan, no timer, no row and no event, also not
    with a subscription to the event type alone.
    """
    app = App("late")
    app.add(train)
    app.on("eventflow.run.late", received.flow)
    trigger = MemoryTrigger("work")
    app.on(trigger, train, where={"seconds": [1]})
    async with running(app, clock=clock):
        app.runtime.reactor.pause("work", True)
        await trigger.send(data={"seconds": 1})
        assert clock.next_due is None
        await clock.advance(100 * HOUR)
        assert received.events == [] and await _kept(app) == []


async def test_without_a_live_run_no_timer_is_set(clock: VirtualClock, received: Received) -> None:
    """The monitor sleeps without a timer until there is a run; so an app whose runs wait for events
    comes to rest.
    """
    async with running(app_with_alerts(received), clock=clock) as app:
        await clock.advance(0)
        assert clock.next_due is None
        await app.start(train, seconds=1)
        await drain(app)
        while await clock.jump():
            pass
        assert clock.next_due is None


@pytest.mark.parametrize(
    ("states", "after", "message"),
    [
        (["late"], None, "from the due time"),
        (["failed"], 60, 'goes with the state "late"'),
        ([], 60, 'goes with the state "late"'),
        (["late"], 0, "positive"),
        (["overdue"], None, "expected states among"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    states: list[str], after: float | None, message: str
) -> None:
    """`late` without `after`, `after` without `late`, and an `after` of zero are refused
    at once.
    """
    with pytest.raises(UsageError, match=message):
        RunState("train", *states, after=after)


# --------------------------------------------------------------------------- a full ledger


async def test_p8_a_full_ledger_delays_it(clock: VirtualClock, received: Received) -> None:
    """While the ledger is full, late runs are not recorded; once it has room they are, and the sum
    of P9 holds.
    """
    app = App("late", max_pending=2)
    app.add(train)
    app.on(RunState("train", "late", after=60), received.flow)
    async with running(app, clock=clock):
        runs = [await app.start(train, seconds=HOUR) for _ in range(2)]
        await clock.advance(120)
        assert received.events == []
        await runs[0].cancel()
        await clock.advance(5)
        assert received.runs == [runs[1].id]
        assert await app.store._read(audit) == []  # pyright: ignore[reportPrivateUsage]


# --------------------------------------------------------------------------- on the real clock


async def test_with_the_system_clock(tmp_path: Path) -> None:
    """It works with real time too, for an app whose flows have a separate loop."""
    subjects: list[str | None] = []

    @flow(name="alert")
    async def alert() -> None:
        event = current_run().event
        subjects.append(event.subject if event else None)

    app = App("late", store=f"sqlite:///{tmp_path}/late.db", ballast=0, free_floor=0)
    app.add(train)
    app.on(RunState("train", "late", after=0.3), alert)
    await app.open(own_loop=True)
    try:
        run = await app.start(train, seconds=HOUR)
        await eventually(lambda: subjects == [run.id], "the event of the run is received")
    finally:
        await app.close(grace=1.0)
