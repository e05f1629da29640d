"""Late runs as events: told once for each run and `after`, never early, whatever the run does, in this life or the next."""

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


class Heard:
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
def heard(clock: VirtualClock) -> Heard:
    return Heard(clock)


def watching(heard: Heard, *states: Any, after: Any = HOUR) -> App:
    app = App("late")
    app.add(train)
    app.on(RunState("train", *(states or ("late",)), after=after), heard.flow)
    return app


# --------------------------------------------------------------------------- when, and what it tells


async def test_p6_told_when_the_time_has_come_and_not_before(
    clock: VirtualClock, heard: Heard
) -> None:
    """A run that has not ended an hour after it was recorded is an event at that very moment; one that has ended is none."""
    async with running(watching(heard), clock=clock) as app:
        await app.start(train, seconds=HOUR - 1)
        slow = await app.start(train, seconds=3 * HOUR)
        await clock.advance(HOUR - 0.001)
        assert heard.events == []
        await clock.advance(0.001)
        assert heard.runs == [slow.id] and heard.at == [HOUR]
        await clock.advance(24 * HOUR)
        assert heard.runs == [slow.id]


async def test_what_a_late_run_tells(clock: VirtualClock, heard: Heard) -> None:
    """The event names the run, how late it is, when it was due and what it does; it has the time at which the run was late."""
    began = clock.now()
    async with running(watching(heard, after=timedelta(minutes=90)), clock=clock) as app:
        run = await app.start(train, seconds=6 * HOUR)
        await clock.advance(5400)
    (event,) = heard.events
    assert (event.type, event.subject, event.source) == (
        "eventflow.run.late",
        run.id,
        "/flows/train",
    )
    assert event.time is not None and to_us(event.time) == began + 5400 * 1_000_000
    assert event.extensions["eventflowcause"] == run.id and event.depth == 1
    assert to_us(datetime.fromisoformat(event.data.pop("due"))) == began
    assert event.data == {
        "run": run.id, "flow": "train", "state": "late", "attempts": 1, "seconds": 5400.0, "reason": None, "result": None,
        "error": None, "after": 5400, "run_state": "waiting",
    }  # fmt: skip


async def test_whatever_the_run_does(clock: VirtualClock, heard: Heard) -> None:
    """Running, pending in a queue, behind another in its lane, waiting, paused: late is late."""
    go_on = asyncio.Event()
    trigger, paused = MemoryTrigger("work"), MemoryTrigger("paused")

    @task
    async def work() -> None:
        await go_on.wait()

    @flow(concurrency=1)
    async def busy() -> None:
        await work()

    app = watching(heard)
    app.on(trigger, train, key="lane")
    app.on(paused, train, name="paused")
    for each in (busy, train):
        app.on(RunState(each, "late", after=60), heard.flow)
    async with running(app, clock=clock):
        app.runtime.reactor.pause("paused", True)
        await paused.send(data={"seconds": 1})
        for _ in range(2):
            await app.start(busy)
            await trigger.send(data={"seconds": HOUR / 2, "lane": "one"})
        await clock.advance(60)
        assert sorted((event.data["flow"], event.data["run_state"]) for event in heard.events) == [
            ("busy", "pending"), ("busy", "running"), ("train", "paused"), ("train", "pending"), ("train", "waiting"),
        ]  # fmt: skip
        go_on.set()
        await drain(app, advance=False)


async def test_several_afters_each_hear_their_own(clock: VirtualClock, heard: Heard) -> None:
    """Subscriptions with different `after`s hear each its own, whatever others were told; ends reach who asked for them."""
    patient = Heard(clock, "patient")
    app = watching(heard, "late", "completed", after=60)
    app.on(RunState(train, "late", after=HOUR), patient.flow)
    async with running(app, clock=clock):
        run = await app.start(train, seconds=2 * HOUR)
        await clock.advance(3 * HOUR)
        assert [event.type for event in heard.events] == [
            "eventflow.run.late",
            "eventflow.run.completed",
        ]
        assert heard.at == [60, 2 * HOUR] and heard.events[0].data["after"] == 60
        assert patient.runs == [run.id] and patient.at == [HOUR]
        assert (await app.store.counts())["events"] == 1 + 3


async def test_runs_one_by_one_are_told_one_by_one(clock: VirtualClock, heard: Heard) -> None:
    """Each of many runs is told at its own time: the lookout sleeps until then, and misses none that come meanwhile."""
    async with running(watching(heard, after=600), clock=clock) as app:
        for _ in range(8):
            await app.start(train, seconds=HOUR)
            await clock.advance(97)
        await clock.advance(HOUR)
    assert heard.at == [600 + 97 * n for n in range(8)]


# --------------------------------------------------------------------------- windows


async def test_an_open_window_is_not_late(clock: VirtualClock, heard: Heard) -> None:
    """A run that gathers events counts from the close of its window; meanwhile others are told in their time."""
    app, trigger = watching(heard), MemoryTrigger("work")

    @flow
    async def nightly(events: list[Event]) -> None:
        await eventflow.sleep(24 * HOUR)

    app.on(trigger, nightly, deliver=Debounce(10 * HOUR, max_wait=12 * HOUR))
    app.on(RunState("nightly", "late", after=HOUR), heard.flow)
    async with running(app, clock=clock):
        await trigger.send(data={})
        await clock.advance(1)
        other = await app.start(train, seconds=2 * HOUR)
        await clock.advance(9 * HOUR - 1)
        assert heard.runs == [other.id] and heard.at == [HOUR + 1]
        await trigger.send(data={})  # puts its close off to 12 h, its longest
        await clock.advance(4 * HOUR - 1)
        assert len(heard.events) == 1
        await clock.advance(1)
        assert heard.at[1:] == [13 * HOUR] and heard.events[1].data["run_state"] == "waiting"


async def test_a_window_that_is_full_is_due_at_once(clock: VirtualClock, heard: Heard) -> None:
    """A batch counts from the event that filled it, also if the lookout had seen it open."""
    app, trigger = watching(heard), MemoryTrigger("work")

    @flow(concurrency=1)
    async def load(events: list[Event]) -> None:
        await eventflow.sleep(24 * HOUR)

    app.on(trigger, load, deliver=Batch(2, within=10 * HOUR))
    app.on(RunState("load", "late", after=600), heard.flow)
    async with running(app, clock=clock):
        for _ in range(2):  # the second batch waits until the first has ended: full, and not begun
            await trigger.send(data={})
            await clock.advance(1000)
            await trigger.send(data={})
            await clock.advance(599)
            assert len(heard.events) in (0, 1)
            await clock.advance(1)
        assert heard.at == [1600, 3200]


# --------------------------------------------------------------------------- once


async def test_p6_told_at_once_after_a_restart_and_once(
    clock: VirtualClock, heard: Heard, tmp_path: Path
) -> None:
    """What became late while nothing ran is told when it runs again, and in no later life a second time."""
    async with running(watching(heard), clock=clock, store=tmp_path / "late.db") as app:
        run = await app.start(train, seconds=100 * HOUR)
        ended = await app.start(train, seconds=10)
        await clock.advance(HOUR / 2)
    await clock.advance(HOUR)
    assert heard.events == []
    for life in range(2):
        async with running(watching(heard), clock=clock, store=tmp_path / "late.db") as app:
            await clock.advance(life)
            assert heard.runs == [run.id] and ended.id not in heard.runs
            await clock.advance(HOUR)
            assert len(await app.store.events(type="eventflow.run.late")) == 1


async def test_a_run_that_was_retried_is_not_told_again(clock: VirtualClock, heard: Heard) -> None:
    """Told once, however often it is retried; and what had ended in time is not late when it lives again later."""
    async with running(watching(heard), clock=clock) as app:
        slow = await app.start(train, seconds=2 * HOUR, fail=True)
        quick = await app.start(train, seconds=50 * HOUR)
        await clock.advance(60)
        await quick.cancel()
        await clock.advance(3 * HOUR)
        assert heard.runs == [slow.id]
        for run in (slow, quick):
            await app.store.retry(run.number, discard_journal=True)
        await clock.advance(10)
        assert (await quick.row())["state"] == "waiting"
        await clock.advance(10 * HOUR)
        assert heard.runs == [slow.id]


async def test_a_run_retried_in_time_may_still_be_late(clock: VirtualClock, heard: Heard) -> None:
    """A run that ended, was retried, and has not ended when its time comes, is late like any other, and told in time."""
    async with running(watching(heard), clock=clock) as app:
        other = await app.start(train, seconds=10 * HOUR)
        await clock.advance(HOUR / 2)
        run = await app.start(train, seconds=10 * HOUR)
        await run.cancel()
        await clock.advance(HOUR / 2)
        assert heard.runs == [other.id]
        await app.store.retry(run.number)
        await clock.advance(HOUR / 2)
        assert heard.runs == [other.id, run.id] and heard.at == [HOUR, 1.5 * HOUR]


async def test_retention_takes_what_was_kept_of_it(clock: VirtualClock, heard: Heard) -> None:
    """A run that retention takes leaves nothing behind of its lateness."""
    async with running(watching(heard), clock=clock) as app:
        await app.start(train, seconds=2 * HOUR)
        await clock.advance(3 * HOUR)
        assert await _kept(app) == [(HOUR * 1e6,)]
        later = clock.now() + 1
        while await app.store.prune(payloads_before=later, identities_before=0):
            pass
        assert await _kept(app) == []


async def _kept(app: App) -> list[Any]:
    return await app.store._look(
        lambda connection: connection.execute("SELECT after FROM late_runs").fetchall()
    )  # pyright: ignore[reportPrivateUsage]


# --------------------------------------------------------------------------- who asks


async def test_a_wildcard_hears_of_all_flows_but_its_own_alerts(clock: VirtualClock) -> None:
    """`*` means every flow, but not the runs that a late event started, which would be late in turn; a name means those too."""
    asked: list[str] = []

    @flow(name="alert")
    async def alert(run: str) -> None:
        asked.append(run)
        await eventflow.sleep(10 * HOUR)

    about, app = Heard(clock, "about"), App("late")
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


async def test_a_part_of_a_pattern(clock: VirtualClock, heard: Heard) -> None:
    """A late run stands in a pattern as other run states do; a deliver= gathers alerts."""
    app = App("late")
    app.add(train)
    app.on(
        any_of(RunState("train", "late", after=60), "drift.detected"),
        heard.flow,
        deliver=Batch(2, within=10),
    )
    async with running(app, clock=clock):
        runs = [await app.start(train, seconds=HOUR) for _ in range(2)]
        await clock.advance(60)
        assert sorted(map(str, heard.runs)) == sorted(run.id for run in runs)
        assert len(await app.store.runs(flow="alert")) == 1


async def test_where_narrows_it(clock: VirtualClock, heard: Heard) -> None:
    """With `where=` only what it wants starts a run; the others are not asked about again and again."""
    app = App("late")
    app.add(train)
    app.on(RunState("train", "late", after=60), heard.flow, where={"run_state": ["paused"]})
    async with running(app, clock=clock):
        await app.start(train, seconds=HOUR)
        await clock.advance(61)
        assert heard.events == [] and await app.store.events(type="eventflow.run.late") == []
        assert clock.next_due is not None and to_us(clock.next_due) > clock.now() + 1_000_000


async def test_nobody_asks_and_nothing_looks(clock: VirtualClock, heard: Heard) -> None:
    """Without a subscription that says `late` nobody looks: no timer, no row, no event, also not for the type alone."""
    app = App("late")
    app.add(train)
    app.on("eventflow.run.late", heard.flow)
    trigger = MemoryTrigger("work")
    app.on(trigger, train, where={"seconds": [1]})
    async with running(app, clock=clock):
        app.runtime.reactor.pause("work", True)
        await trigger.send(data={"seconds": 1})
        assert clock.next_due is None
        await clock.advance(100 * HOUR)
        assert heard.events == [] and await _kept(app) == []


async def test_with_no_run_alive_no_timer_is_armed(clock: VirtualClock, heard: Heard) -> None:
    """The lookout sleeps without a timer until there is a run; so an app whose runs wait for the outside comes to rest."""
    async with running(watching(heard), clock=clock) as app:
        await clock.advance(0)
        assert clock.next_due is None
        await app.start(train, seconds=1)
        await drain(app)
        while await clock.jump():
            pass
        assert clock.next_due is None


@pytest.mark.parametrize(
    ("states", "after", "says"),
    [
        (["late"], None, "how late is late"),
        (["failed"], 60, 'goes with the state "late"'),
        ([], 60, 'goes with the state "late"'),
        (["late"], 0, "positive"),
        (["overdue"], None, "expected states among"),
    ],
)
def test_what_does_not_fit_is_said(states: list[str], after: float | None, says: str) -> None:
    """`late` without `after`, `after` without `late`, and an `after` of nothing are mistakes that are said at once."""
    with pytest.raises(UsageError, match=says):
        RunState("train", *states, after=after)


# --------------------------------------------------------------------------- a full ledger


async def test_p8_a_full_ledger_puts_it_off(clock: VirtualClock, heard: Heard) -> None:
    """While the ledger has no room, late runs are not told of; once it has, they are, and the sum holds."""
    app = App("late", max_pending=2)
    app.add(train)
    app.on(RunState("train", "late", after=60), heard.flow)
    async with running(app, clock=clock):
        runs = [await app.start(train, seconds=HOUR) for _ in range(2)]
        await clock.advance(120)
        assert heard.events == []
        await runs[0].cancel()
        await clock.advance(5)
        assert heard.runs == [runs[1].id]
        assert await app.store._look(audit) == []  # pyright: ignore[reportPrivateUsage]


# --------------------------------------------------------------------------- on the real clock


async def test_on_the_machines_own_clock(tmp_path: Path) -> None:
    """With real time it is told too, of an app whose flows have a loop of their own."""
    told: list[str | None] = []

    @flow(name="alert")
    async def alert() -> None:
        event = current_run().event
        told.append(event.subject if event else None)

    app = App("late", store=f"sqlite:///{tmp_path}/late.db", ballast=0, free_floor=0)
    app.add(train)
    app.on(RunState("train", "late", after=0.3), alert)
    await app.open(own_loop=True)
    try:
        run = await app.start(train, seconds=HOUR)
        await eventually(lambda: told == [run.id], "the run is told of")
    finally:
        await app.close(grace=1.0)
