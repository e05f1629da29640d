"""A store that an earlier version wrote opens, audits clean, and goes on as if nothing had changed.

`kept/` has the store, the app that filled it, and the facts that are expected (`kept/README.md`).
"""

import json
import sqlite3
import tarfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from eventflow import Permanent, UsageError
from eventflow.logs.store import LogStore
from eventflow.runs.run import format_id
from eventflow.testing import VirtualClock
from eventflow.web import actions
from tests.store.kept.kept_app import DAY, HOUR, LARGE, TAGGED, Kept, Point, stage

pytestmark = pytest.mark.anyio

KEPT = Path(__file__).parent / "kept"
EXPECTED: dict[str, Any] = json.loads((KEPT / "expected.json").read_text())
NOW = datetime.fromisoformat(EXPECTED["now"])

PAUSED = "paused"  # the name of today; `state` in expected.json has that of then


def state_today(run: dict[str, Any]) -> str:
    """The state that a run has once the code of today has opened the store."""
    return PAUSED if run["after"] == "paused" else run["after"]


# --------------------------------------------------------------------------- the API of today


class Living:
    """The app on a kept store. Everything that is no public name of eventflow is asked here."""

    def __init__(self, kept: Kept, clock: VirtualClock) -> None:
        self.kept = kept
        self.app = kept.app
        self.clock = clock

    async def runs(self) -> dict[str, dict[str, Any]]:
        """The runs by their ids as shown."""
        rows = await self.app.store.runs(limit=10_000)
        return {format_id(row["id"]): row for row in rows}

    async def states(self) -> dict[str, str]:
        return {ident: row["state"] for ident, row in (await self.runs()).items()}

    async def events(self, type: str | None = None) -> list[dict[str, Any]]:
        """The events with their verdicts."""
        rows = await self.app.store.events(type=type, limit=10_000)
        return [await self.app.store.event(row["id"]) for row in rows]

    async def counts(self) -> dict[str, int]:
        return await self.app.store.counts()

    async def faults(self) -> list[str]:
        """What the audit finds."""
        return await self.app.store.check()

    async def dead_letter(self, number: int) -> dict[str, Any]:
        return await self.app.store.dead_letter(number)

    async def retry(self, ident: str) -> None:
        await self.app.store.retry((await self.app.store.run(ident))["id"])

    async def resume(self, trigger: str) -> None:
        await actions.pause(self.app, trigger, False, by="test")

    async def redrive(self, number: int, mended: dict[str, Any]) -> None:
        await actions.redrive(self.app, str(number), mended, by="test")

    async def outbox(self) -> dict[str, int]:
        """How many letters wait, by outlet."""
        return {name: n for name, (n, _) in (await self.app.store.outbox_depths()).items()}

    async def result(self, ident: str) -> Any:
        return await (await self.app.run_handle(ident)).result()

    async def order(self, type: str, id: str, data: Any) -> Any:
        (receipt,) = await self.kept.orders.send(type=type, id=id, data=data)
        return receipt

    async def results(self, subscription: str) -> list[Any]:
        """What the completed runs of a subscription returned, oldest first."""
        rows = sorted((await self.runs()).items())
        mine = [(ident, row) for ident, row in rows if row["subscription"] == subscription]
        return [await self.result(ident) for ident, row in mine if row["state"] == "completed"]

    async def rest(self, seconds: float = 0) -> None:
        """Moves time on, in steps of an hour, and lets everything come to rest."""
        while seconds > HOUR:
            await self.clock.advance(HOUR)
            seconds -= HOUR
        await self.clock.advance(seconds)


@asynccontextmanager
async def living(store: Path, *, passive: bool = False) -> AsyncIterator[Living]:
    """The app as it is today, mended, at the time at which the store was left. Audited at last."""
    stage.gate = True
    stage.mended = True
    stage.is_new = False
    stage.is_early = False
    stage.bodies.clear()
    clock = VirtualClock(NOW)
    kept = Kept(clock, sinks=True)
    await kept.app.open(store=f"sqlite:///{store}", passive=passive)
    clock.attach(kept.app)
    life = Living(kept, clock)
    try:
        if not passive:
            await life.rest()
        yield life
        assert await life.faults() == []
    finally:
        await kept.app.close(grace=1.0)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A fresh copy of the kept store."""
    with tarfile.open(KEPT / "0.1.0-before-names.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "kept.db"


def one(flow: str, **fields: Any) -> str:
    """The id of the one run of this flow that is as these fields say."""
    (found,) = [
        ident
        for ident, run in EXPECTED["runs"].items()
        if run["flow"] == flow and all(run[name] == value for name, value in fields.items())
    ]
    return found


def computed_again() -> set[str]:
    """The calls whose values are recorded in the kept store, and whose bodies ran all the same."""
    known = {
        f"{ident}/{claim}" for ident, claims in EXPECTED["recorded"].items() for claim in claims
    }
    return known.intersection(stage.bodies)


# --------------------------------------------------------------------------- what is there


async def test_it_opens_and_audits_clean(store: Path):
    """A store that the earlier version wrote opens, and the audit finds nothing in it."""
    async with living(store, passive=True) as life:
        assert await life.faults() == []


async def test_a_second_opening_migrates_nothing(store: Path):
    """What the first opening has brought up to date is not touched by the second one."""

    def schema() -> tuple[Any, ...]:
        connection = sqlite3.connect(f"file:{store}?mode=ro", uri=True)
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        made = connection.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchall()
        connection.close()
        backups = {path.name: path.stat().st_mtime_ns for path in store.parent.glob("*.bak")}
        return version, made, backups

    async with living(store, passive=True):
        pass
    first = schema()
    async with living(store, passive=True) as life:
        assert await life.faults() == []
        states = await life.states()
    assert schema() == first
    assert states == {ident: state_today(run) for ident, run in EXPECTED["runs"].items()}


async def test_the_counts_are_as_they_were(store: Path):
    """Every count of the ledger is the one that was written."""
    async with living(store, passive=True) as life:
        counts = await life.counts()
    assert counts == {name: EXPECTED["counts"][name] for name in counts}


async def test_every_run_has_its_state(store: Path):
    """Each run is in the state that it was left in; a paused one differs from a held one."""
    async with living(store, passive=True) as life:
        runs = await life.runs()
    assert {ident: row["state"] for ident, row in runs.items()} == {
        ident: state_today(run) for ident, run in EXPECTED["runs"].items()
    }
    for name in ("flow", "subscription", "reason", "deliveries"):
        kept = {ident: run[name] for ident, run in EXPECTED["runs"].items()}
        assert {ident: row[name] for ident, row in runs.items()} == kept


async def test_every_event_has_its_verdicts(store: Path):
    """The verdicts of all events are the ones that were written."""
    async with living(store, passive=True) as life:
        found = await life.events()
    verdicts = Counter(verdict for row in found for _, verdict, *_ in row["verdicts"])
    renamed = {"held": PAUSED, "joined": "batched", "lapsed": "expired", "waits": "waiting"}
    kept = {renamed.get(name, name): n for name, n in EXPECTED["verdicts"].items()}
    assert verdicts == kept


async def test_every_dead_letter_is_there(store: Path):
    """Each dead letter has its subscription and its reason, and is open or was redriven."""
    async with living(store, passive=True) as life:
        for kept in EXPECTED["dead"]:
            letter = await life.dead_letter(kept["id"])
            assert (letter["event_id"], letter["subscription"], letter["reason"]) == (
                kept["event"],
                kept["subscription"],
                kept["reason"],
            )
            assert (letter["redriven_at"] is not None) is kept["is_redriven"]


async def test_results_read_as_they_were_returned(store: Path):
    """Results of each codec, also one in a file, are equal to what the flows returned."""
    async with living(store, passive=True) as life:
        shown = await life.results("shows")
        (point,) = await life.results("shows_point")
    assert shown == [{"kind": "json"}, TAGGED, b"\x00 bytes", "r" * LARGE, None]
    assert point == Point(3, 4.5)


async def test_events_are_known_again(store: Path):
    """A recorded event is a duplicate, also when its body is gone; other content is a conflict."""
    async with living(store) as life:
        assert (await life.order("order", "small", {"n": 1})).duplicate
        assert (await life.order("order", "small", {"n": 2})).conflict
        assert (await life.app.emit("kept.nobody", {"n": 1}, id="older")).duplicate
        assert not (await life.app.emit("kept.nobody", {"n": 1}, id="early")).duplicate
        again = await life.app.start("work", idempotency_key="known", n=3)
        assert again.duplicate and again.id in EXPECTED["runs"]


async def test_log_lines_can_be_read(store: Path):
    """The lines that a run logged are there."""
    sleeper = one("sleeper", state="waiting")
    logs = LogStore(f"{store}.logs.db", clock=VirtualClock(NOW))
    async with living(store, passive=True) as life:
        number = (await life.runs())[sleeper]["id"]
    lines = await logs.read(number)
    assert [line["event"] for line in lines[:2]] == ["value.made", "sleeper.sleeps"]


# --------------------------------------------------------------------------- what goes on


GO_ON: dict[str, Any] = {
    "codecs": "wrong: [], nan",
    "retrying": "went on after {'step': 2, 'at': ('a', 1)}",
    "mapped": [10, 20, 10, 20, 30, 40],
    "timers": [True, True],
    "counted": "done",
    "walled": "done",
    "afresh": "done",
}
"""By flow: what its waiting run returns."""


async def test_waiting_runs_go_on_from_their_journals(store: Path):
    """Runs that slept, or waited for an attempt, complete; no recorded value is computed again."""
    async with living(store) as life:
        await life.rest(4 * HOUR)
        found = {flow: await life.result(one(flow, state="waiting")) for flow in GO_ON}
        assert found == GO_ON
        assert await life.result(one("sleeper", state="waiting")) == "before, after"
        (lane, *_) = [ident for ident, run in EXPECTED["runs"].items() if run["flow"] == "ordered"]
        assert await life.result(lane) == "sleep"
        waiting = [ident for ident, run in EXPECTED["runs"].items() if run["state"] == "waiting"]
        left = {ident for ident in waiting if (await life.states())[ident] == "waiting"}
    assert left == {one("guardian")}
    assert computed_again() == set()


async def test_recorded_errors_are_caught_by_their_class(store: Path):
    """A flow that caught an error of eventflow's own catches the recorded one as well."""
    async with living(store) as life:
        await life.rest(4 * HOUR)
        caught = await life.result(one("catcher"))
        found = await life.result(one("parent"))
    assert caught == ["Permanent: caught", "timed out"]
    assert found[:2] == [1, "Permanent: kid"] and "a person cancels the child" in found[2]
    assert found[3:] == ["slept"]
    assert computed_again() == set()


async def test_failures_are_raised_as_they_were(store: Path):
    """Whoever asks for the result of a failed run gets the error of then, of the same class."""
    async with living(store, passive=True) as life:
        (failed, *_) = [i for i, run in EXPECTED["runs"].items() if run["flow"] == "failing"]
        with pytest.raises(Permanent, match="broken"):
            await life.result(failed)
        with pytest.raises(TimeoutError):
            await life.result(one("timed_out"))
        with pytest.raises(ExceptionGroup) as group:
            await life.result(one("grouped"))
    assert [type(error) for error in group.value.exceptions] == [Permanent, Permanent]


async def test_runs_that_a_kill_left_go_on(store: Path):
    """Runs in flight complete from their journals; one that was being cancelled is cancelled."""
    async with living(store) as life:
        await life.rest(1)
        states = await life.states()
        in_flight = [i for i, run in EXPECTED["runs"].items() if run["state"] == "running"]
        assert {EXPECTED["runs"][ident]["flow"]: states[ident] for ident in in_flight} == {
            "at_gate": "completed",
            "narrow": "completed",
            "one_at_gate": "completed",
            "cancelling": "cancelled",
        }
        assert states[one("narrow", state="pending")] == "completed"
        assert await life.results("latest") == [["latest-0"], ["latest-1", "latest-2"]]
    assert computed_again() == set()


async def test_open_windows_take_further_events(store: Path):
    """An event joins the window that is open; the run that was recorded then gets all of them."""
    batch, debounce = (
        one("gathered", state="pending", subscription=s) for s in ("batch", "debounce")
    )
    single = one("one_sleeps", state="pending")
    async with living(store) as life:
        for type in ("batch", "debounce", "single"):
            await life.order(type, f"next-{type}", {})
        await life.rest()
        assert await life.result(batch) == ["open-batch-0", "open-batch-1", "next-batch"]
        await life.rest(7 * HOUR)
        assert await life.result(debounce) == [
            "open-debounce-0",
            "open-debounce-1",
            "next-debounce",
        ]
        assert await life.result(single) == ["single-2", "single-3", "next-single"]


MISSING: list[tuple[str, Any]] = [
    ("p.b", {}),
    ("p.e", {}),
    ("p.s2", {"k": 1}),
    ("p.l2", {}),
    ("p.n", {}),
    ("p.m", {"k": 2}),
    ("p.ack", {}),
    *[("p.changed", {})] * 4,
]
"""The events that the open patterns lack."""


async def test_patterns_match_with_what_waits_in_them(store: Path):
    """A pattern of each kind takes the event that it lacks; its run gets the ones that waited."""
    names = ("all", "nested", "sequence", "late", "count", "keyed", "acknowledged", "rewritten")
    async with living(store) as life:
        before = {name: len(await life.results(name)) for name in names}
        for n, (type, data) in enumerate(MISSING):
            await life.app.emit(type, data, id=f"missing-{n}")
        await life.rest(7 * HOUR)
        found = {name: (await life.results(name))[before[name] :] for name in names}
    (acknowledged,) = found.pop("acknowledged")
    assert acknowledged[0].split("/")[1:] == ["failed", "1"] and acknowledged[1] == "missing-6"
    assert found == {
        "all": [["p.a-1", "missing-0"]],
        "nested": [["p.c-3", "missing-1"]],
        "sequence": [["p.s1-5", "missing-2"]],
        "late": [["p.l1-11", "missing-3"]],
        "count": [["p.n-15", "p.n-16", "missing-4"]],
        "keyed": [["p.m-19", "missing-5"]],
        "rewritten": [["p.changed-anew", *(f"missing-{n}" for n in range(7, 11))]],
    }


async def test_silences_are_noticed(store: Path):
    """An absence matches when its time is up, but not of a day that was met; the overdue lapses."""
    async with living(store) as life:
        before = len(await life.results("daily"))
        assert await life.results("absent") == await life.results("silence") == []
        await life.rest(1.5 * DAY)
        assert await life.results("absent") == [["p.y-20"]]
        assert await life.results("silence") == [["p.z-24"]]
        assert len(await life.results("daily")) == before
        await life.rest(DAY)
        assert len(await life.results("daily")) == before + 1
        await life.app.emit("p.gone", {}, id="gone-again")
        assert await life.results("lost") == []


async def test_paused_runs_go_on_after_resume(store: Path):
    """Runs of a paused trigger begin once it is resumed, in their order, and others do not."""
    paused = [ident for ident, run in EXPECTED["runs"].items() if run["after"] == "paused"]
    held = [ident for ident, run in EXPECTED["runs"].items() if run["after"] == "held"]
    assert len(paused) > 5 and len(held) > 5
    async with living(store) as life:
        await life.app.emit("p.q", {"k": 2}, id="paused-missing")
        assert {(await life.states())[ident] for ident in paused} == {PAUSED}
        await life.resume("paused")
        await life.rest(7 * HOUR)
        states = await life.states()
        assert {states[ident] for ident in paused} == {"completed"}
        assert {states[ident] for ident in held} == {"held"}
        assert await life.results("paused/work") == [0, 1]
        assert await life.results("paused/ordered") == ["paused"] * 3
        assert await life.results("paused/batch") == [[f"paused-batch-{n}" for n in range(3)]]
        assert await life.results("paused/all") == [
            ["paused-part-1", "paused-matched"],
            ["paused-part-2", "paused-missing"],
        ]


async def test_a_retry_goes_on_from_the_journal(store: Path):
    """Failed, cancelled, dead and held runs complete after a retry; nothing recorded runs again."""
    retried = [
        ident
        for ident, run in EXPECTED["runs"].items()
        if run["after"] in ("failed", "cancelled", "dead", "held")
        and (not run["is_child"] or run["flow"] == "stuck")
        and run["flow"] != "timed_out"
    ]
    async with living(store) as life:
        for ident in retried:
            await life.retry(ident)
        await life.rest(4 * HOUR)
        states = await life.states()
        left = {EXPECTED["runs"][i]["flow"]: states[i] for i in retried if states[i] != "completed"}
        assert left == {}
        assert await life.result(one("poison", is_child=False)) == "before, survived"
        assert await life.result(one("poisoned")) == "kid: before, survived"
        assert await life.result(one("guardian")) == "kid: before, unstuck"
        assert await life.result(one("changed")) == await life.result(one("gone")) == "old"
        assert await life.result(one("unreadable")) == str(Point(1, 2.5))
        ordered = [
            i for i, run in EXPECTED["runs"].items() if run["subscription"] == "orders/ordered"
        ]
        assert {states[ident] for ident in ordered} == {"completed"}
    assert computed_again() == set()


async def test_a_dead_letter_is_redriven_once(store: Path):
    """An open dead letter starts its run after a redrive; one that was redriven is refused."""
    letters = {(kept["event"], kept["is_redriven"]): kept["id"] for kept in EXPECTED["dead"]}
    async with living(store) as life:
        before = await life.counts()
        await life.redrive(letters["torn-2", False], {"data": {"n": 8}, "type": "order"})
        await life.redrive(letters["invalid-2", False], {"data": {"n": 9}})
        await life.redrive(letters["out-3", False], {})
        await life.rest()
        assert (await life.results("orders/work"))[-2:] == [8, 9]
        assert (await life.counts())["dead"] == before["dead"] - 3
        assert [letter.event.id for letter in life.kept.picky.taken] == ["out-3"]
        with pytest.raises(UsageError, match="redriven already"):
            await life.redrive(letters["torn-0", True], {"data": {"n": 1}})


async def test_letters_in_the_outbox_are_sent(store: Path):
    """What waited for a sink is sent, in its order, with what a dead letter has to say."""
    async with living(store, passive=True) as life:
        assert await life.outbox() == EXPECTED["outbox"]
    async with living(store) as life:
        await life.rest(1)
        assert await life.outbox() == {}
        assert [letter.event.id for letter in life.kept.bad.taken] == ["out-1"]
        graves = life.kept.graves.taken
        assert len(graves) == EXPECTED["outbox"]["dead/graves"]
        known = {(kept["subscription"], kept["reason"]) for kept in EXPECTED["dead"]}
        assert {(letter.subscription, letter.reason) for letter in graves} <= known


async def test_cursors_go_on(store: Path):
    """Triggers find their cursors: a schedule fires what is next, a monitor ends its episode."""
    async with living(store) as life:
        assert await life.kept.orders.cursor() == {"last": "latest-2"}
        fired = len(await life.results("daily/ticks"))
        await life.rest(HOUR)
        assert len(await life.results("daily/ticks")) == fired + 1
        rows = [{"amount": float(n)} for n in range(20)]
        for n in range(3):
            await life.kept.scores.send(
                type="scores", id=f"clean-{n}", data=rows, cursor={"last": n}
            )
        found = await life.events("drift.resolved")
    assert len(found) == 1


async def test_a_late_run_is_recorded_once(store: Path):
    """A run that was recorded as late is not recorded again, whatever it did then."""
    async with living(store) as life:
        await life.rest(2 * HOUR)
        found = Counter(row["subject"] for row in await life.events("eventflow.run.late"))
    assert set(found.values()) == {1}
