"""Delivery modes: which events make a run, when it starts, what it gets; a crash changes none of
it.
"""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from eventflow import (
    App,
    Batch,
    Debounce,
    Each,
    Event,
    Latest,
    Singleflight,
    UsageError,
    current_run,
    flow,
    task,
)
from eventflow.store.audit import audit
from eventflow.testing import MemoryTrigger, VirtualClock, drain, running

pytestmark = pytest.mark.anyio


class Order(msgspec.Struct):
    n: int


class Bench:
    """An app with one trigger and a flow that notes the events of each run and when it started."""

    def __init__(self, deliver: Any, *, key: str | None = None, lasts: float = 0.0) -> None:
        self.given: list[tuple[float, list[int]]] = []
        self.clock = clock = VirtualClock()
        self.began = clock.now()
        self.app = App("modes")
        self.trigger = MemoryTrigger("orders")

        @task
        async def work(seconds: float) -> None:
            if seconds:
                await asyncio.sleep(0)
                await clock_sleep(clock, seconds)

        @flow
        async def handle(events: list[Event]) -> int:
            self.given.append(
                ((clock.now() - self.began) / 1e6, [event.data["n"] for event in events])
            )
            await work(lasts)
            return len(events)

        self.app.on(self.trigger, handle, deliver=deliver, key=key)

    async def send(self, *numbers: int, **more: Any) -> None:
        for n in numbers:
            await self.trigger.send(data={"n": n, **more}, id=f"e-{n}-{more.get('k', '')}")

    @property
    def groups(self) -> list[list[int]]:
        return [numbers for _, numbers in self.given]


async def clock_sleep(clock: VirtualClock, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    clock.timer(loop, clock.now() + int(seconds * 1e6), lambda: done.set_result(None))
    await done


async def assert_consistent(app: App) -> None:
    """The ledger's counts and rows agree."""
    assert await app.store._read(audit) == []


async def test_batch_closes_when_full_or_when_its_time_is_over() -> None:
    """A run for every three events at once; the rest run `within` after the first of them, not
    before.
    """
    bench = Bench(Batch(3, within=10))
    async with running(bench.app, clock=bench.clock):
        await bench.send(1, 2, 3, 4)
        await bench.clock.advance(9.9)
        assert bench.given == [(0.0, [1, 2, 3])]
        await bench.send(5)
        await bench.clock.advance(0.2)
        assert bench.given[1] == (10.0, [4, 5])
        counts = await drain(bench.app)
        assert (counts["completed"], counts["accepted"], counts["runs"]) == (5, 5, 2)
        await assert_consistent(bench.app)


async def test_debounce_waits_for_quiet_but_not_for_ever() -> None:
    """Under constant traffic a run starts `max_wait` after the first event with all of them, else
    `quiet` after the last.
    """
    bench = Bench(Debounce(5, max_wait=30))
    async with running(bench.app, clock=bench.clock):
        for n in range(35):
            await bench.send(n)
            await bench.clock.advance(1)
        await bench.clock.advance(5)
    assert [at for at, _ in bench.given] == [30.0, 39.0]
    assert bench.groups == [list(range(30)), list(range(30, 35))]


async def test_windows_are_per_key() -> None:
    """With `key=`, each key's window opens and closes independently."""
    bench = Bench(Batch(2, within=60), key="k")
    async with running(bench.app, clock=bench.clock):
        await bench.send(1, k="a")
        await bench.send(2, k="b")
        await bench.send(3, k="a")
        await bench.clock.advance(60)
    assert sorted(bench.groups) == [[1, 3], [2]]


@pytest.mark.parametrize("mode", [Singleflight(), Latest()])
async def test_one_run_at_a_time_collects_events_for_a_successor(mode: Any) -> None:
    """All events that come during a run make one successor; each event is counted."""
    bench = Bench(mode, lasts=100)
    async with running(bench.app, clock=bench.clock):
        await bench.send(1)
        await bench.clock.advance(1)
        await bench.send(2, 3, 4)
        await bench.clock.advance(50)
        assert bench.groups == [[1]]
        await bench.clock.advance(50)
        assert bench.groups == [[1], [2, 3, 4]]
        await bench.clock.advance(200)
        assert (await bench.app.store.counts())["completed"] == 4
        await assert_consistent(bench.app)


async def test_the_newest_event_is_bound_by_name() -> None:
    """A flow with named parameters gets the newest event's fields; one with a list gets the data of
    every event, converted.
    """
    seen: list[Any] = []

    @flow
    async def newest(n: int, event: Event) -> None:
        seen.append((n, event.id, [each.id for each in current_run().events], current_run().event))

    @flow
    async def every(orders: list[Order]) -> None:
        seen.append(orders)

    app = App("modes")
    trigger = MemoryTrigger("orders")
    app.on(trigger, newest, deliver=Batch(2, within=5))
    app.on(trigger, every, deliver=Batch(2, within=5))
    async with running(app):
        (first,) = await trigger.send(data={"n": 1}, id="a")
        await trigger.send(data={"n": "wrong"}, id="bad")
        await trigger.send(data={"n": 2}, id="b")
        await drain(app)
        assert [dead_letter["event_id"] for dead_letter in await app.store.dead_letters()] == [
            "bad",
            "bad",
        ]
        verdicts = (await app.store.event("b"))["verdicts"]
        runs = {run["id"]: run for run in (await app.store.event("b"))["runs"]}
        assert {outcome for _, outcome, _ in verdicts} == {"batched"} and {
            run for _, _, run in verdicts
        } == set(runs)
        assert {run["event"] for run in runs.values()} == {first.ledger_id}
    assert [Order(1), Order(2)] in seen
    ((n, ident, all_of, event),) = [each for each in seen if isinstance(each, tuple)]
    assert (n, ident, all_of, event.id) == (2, "b", ["a", "b"], "b")


async def test_a_duplicate_is_not_added() -> None:
    """P2: a known event is not in a window twice."""
    bench = Bench(Batch(3, within=5))
    async with running(bench.app, clock=bench.clock):
        await bench.send(1, 1, 1, 2)
        await bench.clock.advance(5)
    assert bench.groups == [[1, 2]]


async def test_p6_windows_survive_the_process(tmp_path: Path) -> None:
    """A process ends with an open window: the next one continues it, and it closes at its time."""
    clock = VirtualClock()
    store = tmp_path / "modes.db"
    given: list[tuple[float, list[int]]] = []
    began = clock.now()

    def app() -> tuple[App, MemoryTrigger]:
        @flow
        async def handle(events: list[Event]) -> None:
            given.append(((clock.now() - began) / 1e6, [event.data["n"] for event in events]))

        made = App("modes")
        trigger = MemoryTrigger("orders")
        made.on(trigger, handle, deliver=Debounce(5, max_wait=30))
        return made, trigger

    for life in range(3):
        made, trigger = app()
        async with running(made, clock=clock, store=store):
            for n in range(5):
                await trigger.send(data={"n": life * 5 + n}, id=f"e-{life * 5 + n}")
                await clock.advance(0.5)
        assert given == []
    made, _ = app()
    async with running(made, clock=clock, store=store):
        await clock.advance(6)
        await drain(made)
    assert [numbers for _, numbers in given] == [list(range(15))] and given[0][0] == 12.0


async def test_after_a_cancelled_window_the_next_event_opens_a_new_one() -> None:
    """Cancelling a run whose window is open closes it; its events count as cancelled."""
    bench = Bench(Batch(10, within=60))
    async with running(bench.app, clock=bench.clock):
        await bench.send(1, 2)
        (run,) = await bench.app.store.runs()
        assert (run["mode"], run["deliveries"], run["state"]) == ("batch", 2, "pending")
        await bench.app.store.cancel(run["id"], "not wanted")
        await bench.send(3)
        await bench.clock.advance(60)
        counts = await bench.app.store.counts()
        assert (counts["cancelled"], counts["completed"]) == (2, 1)
        await assert_consistent(bench.app)
    assert bench.groups == [[3]]


async def test_retention_removes_a_run_with_all_its_events() -> None:
    """The events of a batched run keep their bodies while it exists, and are removed after it; the
    counts agree throughout.
    """
    bench = Bench(Batch(3, within=5))
    async with running(bench.app, clock=bench.clock):
        await bench.send(1, 2, 3)
        await drain(bench.app)
        later = bench.clock.now() + 10**9
        removed: list[int] = []
        while step := await bench.app.store.prune(payloads_before=later, identities_before=0):
            removed.append(step)
        assert removed == [4]  # the run and its three events
        await assert_consistent(bench.app)


async def test_a_paused_trigger_opens_windows_too() -> None:
    """While paused, events are added to a paused run; after the resume it starts with all of
    them.
    """
    bench = Bench(Singleflight())
    async with running(bench.app, clock=bench.clock):
        bench.app.runtime.reactor.pause("orders", True)
        await bench.app.store.set_paused("orders", True)
        await bench.send(1, 2, 3)
        assert bench.groups == []
        bench.app.runtime.reactor.pause("orders", False)
        await bench.app.store.set_paused("orders", False)
        await drain(bench.app)
    assert bench.groups == [[1, 2, 3]]


def test_invalid_modes_are_rejected_at_once() -> None:
    """Invalid sizes and durations, `params=` together with a mode, and what is no mode raise."""
    app = App("modes")
    trigger = MemoryTrigger("orders")

    @flow
    async def handle(events: list[Event]) -> None: ...

    for make, message in (
        (lambda: Batch(0, within=5), "size expected from 1"),
        (lambda: Batch(5, within=0), "within expected a positive duration"),
        (lambda: Debounce(5, max_wait=1), "max_wait expected at least quiet"),
        (lambda: app.on(trigger, handle, deliver="batch"), "deliver= expected"),  # type: ignore[arg-type]
        (
            lambda: app.on(trigger, handle, deliver=Batch(5, within=1), params=lambda event: {}),
            "params= makes one event's",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            make()
    app.on(trigger, handle, deliver=Each())
    assert app.subscriptions[-1].batch_policy is None
