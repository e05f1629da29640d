"""Patterns in an app: which runs they start, with which events, and the verdicts of the others; no
crash changes them.
"""

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from eventflow import (
    App,
    Batch,
    Event,
    Singleflight,
    UsageError,
    absent,
    all_of,
    any_of,
    count,
    current_run,
    flow,
    part,
    sequence,
    sleep,
)
from eventflow.core.clock import to_datetime
from eventflow.routing.pattern_machine import PatternItem
from eventflow.routing.patterns import Pattern, compile_pattern
from eventflow.routing.router import Router
from eventflow.runs.run import Ids
from eventflow.store.audit import audit
from eventflow.store.protocol import PatternEvent
from eventflow.testing import MemoryTrigger, VirtualClock, drain, running
from tests.routing.test_patterns import PATTERNS, S, SimulatedLife
from triggers import RunState

pytestmark = pytest.mark.anyio


class Bench:
    """An app on one clock and file, opened repeatedly, with a flow that notes the events of each
    run and when it started.
    """

    def __init__(self, pattern: Pattern, path: Path | None = None, **more: Any) -> None:
        self.clock = VirtualClock()
        self.path = path
        self.pattern = pattern
        self.more = more
        self.began = self.clock.now()
        self.given: list[tuple[float, list[str]]] = []
        self.lasts = 0.0

    def app(self) -> App:
        @flow
        async def act(events: list[Event]) -> int:
            self.given.append((self.passed, [event.id for event in events]))
            if self.lasts:
                await sleep(self.lasts)
            return len(events)

        app = App("patterns")
        app.on(self.pattern, act, name="watch", **self.more)
        return app

    @property
    def passed(self) -> float:
        return (self.clock.now() - self.began) / 1e6

    def running(self) -> Any:
        return running(self.app(), clock=self.clock, store=self.path)

    async def send(self, app: App, *ids: str, key: str = "k", ago: float = 0.0) -> None:
        """Send events whose type is the first letter of their id."""
        for ident in ids:
            time = to_datetime(self.clock.now()) - timedelta(seconds=ago)
            await app.accept(
                Event(id=ident, source="/test", type=ident[0], data={"k": key}, time=time)
            )

    @property
    def groups(self) -> list[list[str]]:
        return [ids for _, ids in self.given]


async def consistent_counts(app: App) -> dict[str, int]:
    """The ledger's counts, after checking that its rows agree with them."""
    assert await app.store._read(audit) == []
    return await app.store.counts()


async def verdict(app: App, event: str) -> tuple[str, Any]:
    """The verdict of the pattern for this event, as `explain` shows it."""
    ((_, outcome, detail),) = (await app.store.event(event))["verdicts"]
    return outcome, detail


async def test_all_of_starts_one_run_with_all_events() -> None:
    """One event of each part, in any order and with the same key, make one run; each event names
    it; the others expire.
    """
    bench = Bench(all_of("a", "b", within=60, by="k"))
    async with bench.running() as app:
        await bench.send(app, "b1", key="x")
        await bench.send(app, "a1", "a2", key="y")
        assert (await verdict(app, "b1"))[0] == "waiting"
        assert (await consistent_counts(app))["pending"] == 3
        await bench.clock.advance(10)
        await bench.send(app, "a3", key="x")
        await drain(app)
        assert bench.given == [(10.0, ["b1", "a3"])]
        (run,) = await app.store.runs()
        assert (run["mode"], run["deliveries"], run["state"]) == ("pattern", 2, "completed")
        assert await verdict(app, "b1") == ("run", run["id"]) or await verdict(app, "b1") == (
            "batched",
            run["id"],
        )
        assert (await verdict(app, "a3")) == ("batched", run["id"])
        await bench.clock.advance(51)
        assert await verdict(app, "a1") == ("expired", "all_of: not each of a, b within 60 s")
        counts = await consistent_counts(app)
        assert (
            counts["accepted"],
            counts["completed"],
            counts["suppressed"],
            counts["pending"],
        ) == (4, 2, 2, 0)


async def test_a_duplicate_counts_once() -> None:
    """P2: a known event is not passed to a pattern again."""
    bench = Bench(count("a", 3, within=60))
    async with bench.running() as app:
        await bench.send(app, "a1", "a1", "a2", "a1")
        assert bench.groups == []
        await bench.send(app, "a3")
        await drain(app)
        await consistent_counts(app)
    assert bench.groups == [["a1", "a2", "a3"]]


async def test_any_of_runs_at_once() -> None:
    """Each event of any part is a run."""
    bench = Bench(any_of("a", "b"))
    async with bench.running() as app:
        await bench.send(app, "a1", "b1", "c1")
        await drain(app)
        counts = await consistent_counts(app)
        assert (counts["completed"], counts["suppressed"]) == (2, 1)
    assert sorted(bench.groups) == [["a1"], ["b1"]]  # runs without a key begin in any order


async def test_a_sequence_is_evaluated_in_order_of_event_time() -> None:
    """With a lateness, an ending event that arrives late but happened in between still ends the
    sequence.
    """
    bench = Bench(sequence("a", then="b", unless="c", within=60, lateness=5))
    async with bench.running() as app:
        await bench.send(app, "a1")
        await bench.clock.advance(2)
        await bench.send(app, "b1")
        await bench.send(app, "c1", ago=1)
        await bench.clock.advance(10)
        assert bench.groups == []
        assert (await verdict(app, "a1")) == ("expired", "sequence: c came 1 s after it")
        assert (await verdict(app, "b1")) == ("expired", "sequence: no a within 60 s before it")
        await bench.send(app, "a2")
        await bench.clock.advance(1)
        await bench.send(app, "b2")
        await bench.clock.advance(4.9)
        assert bench.groups == []
        await bench.clock.advance(0.2)
        assert bench.groups == [["a2", "b2"]] and bench.given[0][0] == 18.0
        assert (await consistent_counts(app))["pending"] == 0


async def test_p6_absence_fires_when_it_is_due() -> None:
    """No b within 30 s of an a: one run with the a, then and not before; with a b in time, no
    run.
    """
    bench = Bench(absent("b", 30, after="a", by="k"))
    async with bench.running() as app:
        await bench.send(app, "a1", key="x")
        await bench.send(app, "a2", key="y")
        await bench.clock.advance(20)
        await bench.send(app, "b1", key="y")
        await bench.clock.advance(9.9)
        assert bench.groups == []
        await bench.clock.advance(0.2)
        assert bench.groups == [["a1"]]
        await bench.clock.advance(100)
        assert bench.groups == [["a1"]] and (await verdict(app, "a2")) == (
            "expired",
            "absent: b came 20 s after it",
        )
        counts = await consistent_counts(app)
        assert (counts["completed"], counts["suppressed"], counts["pending"]) == (1, 2, 0)


async def test_p6_patterns_survive_the_process(tmp_path: Path) -> None:
    """A process ends in the middle of each window: the next one continues it; what became due
    meanwhile is evaluated at once.
    """
    bench = Bench(
        any_of(
            all_of("a", "b", within=60),
            count("c", 3, within=60),
            sequence("d", then="e", within=60),
            absent("f", 30),
        ),
        tmp_path / "patterns.db",
    )
    for step in (["a1", "c1", "d1", "f1"], ["c2", "f2"], ["b1", "c3", "e1"]):
        async with bench.running() as app:
            await bench.send(app, *step)
            await bench.clock.advance(5)
            await consistent_counts(app)
    assert sorted(bench.groups) == [["a1", "b1"], ["c1", "c2", "c3"], ["d1", "e1"]]
    bench.clock._now += 1_000_000 * 600
    async with bench.running() as app:
        await drain(app)
        counts = await consistent_counts(app)
    assert bench.groups[3:] == [["f2"]]
    assert (counts["completed"], counts["suppressed"], counts["pending"]) == (8, 1, 0)


async def test_many_keys_that_are_due_at_once_are_all_evaluated() -> None:
    """A thousand keys expire at the same moment, and later a thousand absences match at once; none
    is left.
    """
    bench = Bench(any_of(absent("a", 60), all_of("b", "c", within=30), by="k"))
    async with bench.running() as app:
        await app.accept(
            *(Event(id=f"b{n}", source="/test", type="b", data={"k": str(n)}) for n in range(1000))
        )
        assert (await consistent_counts(app))["pending"] == 1000
        await bench.clock.advance(31)
        assert (await consistent_counts(app))["suppressed"] == 1000
        await app.accept(
            *(Event(id=f"a{n}", source="/test", type="a", data={"k": str(n)}) for n in range(1000))
        )
        await bench.clock.advance(61)
        await drain(app)
        counts = await consistent_counts(app)
        assert (counts["completed"], counts["suppressed"], counts["pending"]) == (1000, 1000, 0)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("seed", range(2))
async def test_the_ledger_does_what_the_machine_does(name: str, seed: int, tmp_path: Path) -> None:
    """Random events, late and repeated, of two keys, in several processes: the runs are those of
    the machine, and the counts agree throughout.
    """
    draw = random.Random(seed)
    pattern = msgspec.structs.replace(
        PATTERNS[name](draw.randint(2, 9), draw.choice([0, 2])), by="k"
    )
    bench = Bench(pattern, tmp_path / "story.db")
    plain = {key: SimulatedLife(compile_pattern(pattern).machine) for key in "xy"}
    kinds = [part.label for part in pattern.flat_parts]
    sent: list[tuple[str, str, float]] = []
    for _ in range(3):
        async with bench.running() as app:
            for _ in range(draw.randint(4, 12)):
                await bench.clock.advance(draw.choice([0, 0, 1, 2, 4]))
                if sent and draw.random() < 0.2:
                    await bench.send(app, draw.choice(sent)[0])
                    continue
                ident = f"{draw.choice(kinds)}{len(sent) + 1}"
                key = draw.choice("xy")
                ago = draw.choice([0, 0, 1, 3, 8])
                await bench.send(app, ident, key=key, ago=ago)
                now = bench.clock.now()
                plain[key].receive(
                    kinds.index(ident[0]),
                    PatternItem(now - ago * S, now, (len(sent) + 1,)),
                    twice=False,
                )
                sent.append((ident, key, ago))
            await drain(app, advance=False)
            await consistent_counts(app)
    async with bench.running() as app:
        await bench.clock.advance(100)
        counts = await consistent_counts(app)
        assert counts["pending"] == 0 and counts["accepted"] - counts["dead"] == len(sent)
        assert counts["dead"] <= counts["conflicts"]  # repetitions with another key or time
    for life in plain.values():
        life.advance(bench.clock.now())
    expected = sorted(
        [sent[event - 1][0] for event in match.events]
        for life in plain.values()
        for match in life.matches
    )
    assert sorted(bench.groups) == expected


async def test_a_missed_deadline_is_an_event(tmp_path: Path) -> None:
    """absent(by=): when no event comes, the absence is recorded as an event, once, also across
    restarts.
    """
    bench = Bench(absent("a", by="06:00"), tmp_path / "patterns.db")
    midnight = datetime(2030, 1, 1, tzinfo=UTC)
    async with bench.running() as app:
        await bench.send(app, "a1")
        await bench.clock.advance(7 * 3600)
        assert bench.groups == [] and (await verdict(app, "a1"))[1] == "absent: a came in time"
    async with bench.running() as app:
        await bench.clock.advance(24 * 3600)
        (event,) = await app.store.events(type="eventflow.absent")
        assert bench.groups == [[event["event_id"]]]
        assert event["event_id"] == f"watch//{(midnight + timedelta(hours=30)).isoformat()}"
    async with bench.running() as app:
        await drain(app)
        counts = await consistent_counts(app)
    assert len(bench.groups) == 1 and (counts["completed"], counts["suppressed"]) == (1, 1)


async def test_parts_are_triggers_run_states_and_filters() -> None:
    """A trigger with a filter and a run state are joined by a key that each part has at its own
    path.
    """
    given: list[list[str]] = []

    @flow
    async def ship(order: str) -> str:
        return order

    @flow
    async def both(events: list[Event]) -> None:
        given.append([event.type for event in events])
        assert current_run().event is not None

    app = App("patterns")
    orders = MemoryTrigger("orders")
    app.on("shipment", ship)
    paid = part(orders, where={"paid": [True]})
    app.on(
        all_of(
            paid,
            RunState(ship, "completed"),
            within=60,
            by={"orders": "order", "eventflow.run.completed": "result"},
        ),
        both,
    )
    async with running(app):
        await orders.send(data={"order": "o-1", "paid": False}, id="1")
        await orders.send(data={"order": "o-2", "paid": True}, id="2")
        await orders.send(data={"paid": True}, id="3")
        await app.emit("shipment", {"order": "o-1"})
        await drain(app)
        assert given == []
        await app.emit("shipment", {"order": "o-2"})
        await drain(app)
        assert given == [["memory", "eventflow.run.completed"]]
        assert (await verdict(app, "1"))[0] == "filtered"
        outcome, reason = await verdict(app, "3")
        assert outcome == "filtered" and reason.startswith("it has no join key: no field that by=")
        await consistent_counts(app)


async def test_a_match_with_an_event_of_a_paused_trigger_is_paused() -> None:
    """A match with an event that came while its trigger was paused is a paused run, until the
    trigger is resumed.
    """
    app = App("patterns")
    one = MemoryTrigger("one")
    two = MemoryTrigger("two")
    given: list[int] = []

    @flow
    async def act(events: list[Event]) -> None:
        given.append(len(events))

    app.on(all_of(one, two, within=60), act)
    async with running(app):
        app.runtime.reactor.pause("two", True)
        await app.store.set_paused("two", True)
        await one.send(data=1)
        await two.send(data=2)
        assert given == [] and [run["state"] for run in await app.store.runs()] == ["paused"]
        await app.store.set_paused("two", False)
        await drain(app)
        assert given == [2]
        await consistent_counts(app)


async def test_a_match_after_the_resume_is_not_paused() -> None:
    """An event arrives while its trigger is paused, and matches once the trigger is resumed: its
    run starts.
    """
    app = App("patterns")
    one = MemoryTrigger("one")
    two = MemoryTrigger("two")
    given: list[int] = []

    @flow
    async def act(events: list[Event]) -> None:
        given.append(len(events))

    app.on(all_of(one, two, within=60), act)
    async with running(app):
        app.runtime.reactor.pause("two", True)
        await app.store.set_paused("two", True)
        await two.send(data=2)
        app.runtime.reactor.pause("two", False)
        await app.store.set_paused("two", False)
        await one.send(data=1)
        await drain(app)
        assert given == [2]
        await consistent_counts(app)


async def test_a_match_is_paused_while_one_of_its_triggers_is() -> None:
    """Of two triggers that were paused one is resumed: the run waits for the other."""
    app = App("patterns")
    one = MemoryTrigger("one")
    two = MemoryTrigger("two")

    @flow
    async def act(events: list[Event]) -> None:
        pass

    async def pause(trigger: str, paused: bool) -> None:
        app.runtime.reactor.pause(trigger, paused)
        await app.store.set_paused(trigger, paused)

    app.on(all_of(one, two, "three", within=60), act)
    async with running(app):
        for trigger, source in (("one", one), ("two", two)):
            await pause(trigger, True)
            await source.send(data=1)
        await pause("two", False)
        await app.emit("three", {})
        assert [run["state"] for run in await app.store.runs()] == ["paused"]
        await pause("one", False)
        await drain(app)
        assert [run["state"] for run in await app.store.runs()] == ["completed"]
        await consistent_counts(app)


async def test_a_changed_pattern_discards_its_open_state(tmp_path: Path) -> None:
    """Its open events expire with that reason; while the code is missing, they wait until it is
    back.
    """
    bench = Bench(all_of("a", "b", within=60), tmp_path / "patterns.db")
    async with bench.running() as app:
        await bench.send(app, "a1")
    async with running(App("patterns"), clock=bench.clock, store=bench.path) as app:
        await bench.clock.advance(100)
        assert (await consistent_counts(app))["pending"] == 1
    async with bench.running() as app:
        await bench.clock.advance(1)
        assert (await verdict(app, "a1"))[0] == "expired"
        await bench.send(app, "a2")
    bench.pattern = all_of("a", "b", within=90)
    async with bench.running() as app:
        await bench.send(app, "b2")
        assert await verdict(app, "a2") == ("expired", "its pattern was changed")
        counts = await consistent_counts(app)
        assert (counts["suppressed"], counts["pending"]) == (2, 1)
    assert bench.groups == []


async def test_retention_keeps_waiting_events() -> None:
    """The bodies of events that wait in a pattern stay; those of expired events are removed."""
    bench = Bench(all_of("a", "b", within=10**7))
    async with bench.running() as app:
        await bench.send(app, "a1", "c1")
        later = bench.clock.now() + 10**9
        while await app.store.prune(payloads_before=later, identities_before=later):
            pass
        await bench.send(app, "b1")
        await drain(app)
        await consistent_counts(app)
    assert bench.groups == [["a1", "b1"]]


async def test_a_replay_passes_the_event_again() -> None:
    """An event in a run of the pattern may be replayed into it; one that still waits there is not
    added twice.
    """
    bench = Bench(count("a", 2, within=600))
    async with bench.running() as app:
        await bench.send(app, "a1")

        async def replay(ident: str) -> None:
            row = await app.store.event(ident)
            event = Event.from_json(row["body"])
            await app.store.replay(
                row["id"], app.runtime.router.route("events", event, ledger_id=row["id"])
            )

        await replay("a1")
        assert (await consistent_counts(app))["pending"] == 1
        await bench.send(app, "a2")
        await drain(app)
        await replay("a1")
        assert (await consistent_counts(app))["pending"] == 1
        await replay("a2")
        await drain(app)
        counts = await consistent_counts(app)
        assert (counts["completed"], counts["pending"], counts["suppressed"]) == (4, 0, 1)
    assert bench.groups == [["a1", "a2"], ["a1", "a2"]]


async def test_p6_matches_make_one_run_at_a_time(tmp_path: Path) -> None:
    """With Singleflight, matches during a run make one successor with the events of all, also
    across restarts.
    """
    bench = Bench(count("a", 2, within=600), tmp_path / "patterns.db", deliver=Singleflight())
    bench.lasts = 100
    async with bench.running() as app:
        await bench.send(app, "a1", "a2")
        await bench.clock.advance(1)
        await bench.send(app, "a3", "a4", "a5", "a6", "a7")
        await bench.clock.advance(1)
        assert bench.groups == [["a1", "a2"]]
        first, second = sorted(run["id"] for run in await app.store.runs())
        assert [await verdict(app, f"a{n}") for n in (1, 4, 5, 6)] == [
            ("batched", first),
            ("batched", second),
            ("batched", second),
            ("batched", second),
        ]
        assert (await consistent_counts(app))["pending"] == 7
    async with bench.running() as app:
        await bench.send(app, "a8")
        await drain(app)
        counts = await consistent_counts(app)
        assert (counts["completed"], counts["pending"], counts["runs"]) == (8, 0, 2)
    assert bench.groups[-1] == ["a3", "a4", "a5", "a6", "a7", "a8"]


async def test_windows_of_matches_are_per_key() -> None:
    """With Batch and by=, each key has its own window; a match of another key is not in it."""
    bench = Bench(all_of("a", "b", within=5, by="k"), deliver=Batch(4, within=60))
    async with bench.running() as app:
        await bench.send(app, "a1", "b1", key="x")
        await bench.send(app, "a2", "b2", key="y")
        await bench.send(app, "a3", key="x")
        await bench.clock.advance(10)
        assert bench.groups == []
        await bench.send(app, "a4", "b4", key="x")
        await bench.clock.advance(1)
        assert bench.given == [(10.0, ["a1", "b1", "a4", "b4"])]
        await bench.clock.advance(60)
        assert bench.given[1] == (60.0, ["a2", "b2"])
        counts = await consistent_counts(app)
        assert (counts["completed"], counts["suppressed"], counts["pending"]) == (6, 1, 0)


def test_p2_a_state_of_a_failed_transaction_is_not_used() -> None:
    """A state that a failed transaction changed is discarded: the stored state counts, also right
    after it was stored.
    """
    router = Router(Bench(count("a", 3, within=60)).app().subscriptions, Ids(), VirtualClock())

    def advance(state: Any, event: int) -> Any:
        return router.patterns.advance(
            "watch", "", state, event, PatternEvent("watch", "", 0, event), event, 1
        )

    first = advance(None, 1)
    kept = router.patterns.encode_state("watch", "", first.state)
    for _ in range(3):
        failed = advance(kept, 2)
        assert failed.matches == [] and advance(failed.state, 3).matches != []
    again = advance(kept, 2)
    assert router.patterns.encode_state("watch", "", again.state) != kept
    assert [
        match.events
        for match in advance(router.patterns.encode_state("watch", "", again.state), 4).matches
    ] == [(1, 2, 4)]


def test_options_that_a_pattern_rejects() -> None:
    """Options that belong to one event raise."""

    @flow
    async def act(events: list[Event]) -> None: ...

    for options in (
        {"where": {"x": [1]}},
        {"key": "k"},
        {"types": ["t"]},
        {"params": dict},
        {"on_failure": "block"},
    ):
        with pytest.raises(UsageError, match="its parts"):
            App("patterns").on(any_of("a", "b"), act, **cast(Any, options))
