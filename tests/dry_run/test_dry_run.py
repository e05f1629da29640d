"""The dry run of a time against the ledger: with the same code it tells what happened, with other code what would have."""

import random
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import httpx2
import pytest

from eventflow import App, Batch, Debounce, Each, Event, Singleflight, absent, count, flow, sequence
from eventflow.core.clock import to_datetime, to_us
from eventflow.dry_run.replay import DryRunQuery, dry_run
from eventflow.dry_run.simulator import MAX_REASONS, DryRunSimulator
from eventflow.events.event import Simulatable, Trigger, Undecodable, parse_time
from eventflow.runs.run import format_id
from eventflow.testing import MemoryTrigger, VirtualClock, drain, running
from eventflow.web.api import make_asgi
from tests.routing.test_patterns import PATTERNS

pytestmark = pytest.mark.anyio


@flow
async def act(events: list[Event]) -> int:
    return len(events)


async def asked(app: App, by: App | None = None, **question: Any) -> dict[str, Any]:
    """What would have started, by this app's code or another's, on the first one's ledger."""
    other = by or app
    until = question.pop("until", app.clock.now() + 1)
    return await dry_run(
        app.store, other.subscriptions, other.triggers, DryRunQuery(until=until, **question)
    )


async def made(app: App) -> list[tuple[str, str, list[str]]]:
    """The runs of the ledger: subscription, when, the events."""
    found: list[tuple[str, str, list[str]]] = []
    for row in await app.store.runs(limit=1000):
        run = await app.store.run(row["id"])
        events = sorted([run["event"], *run["joined"]])
        found.append(
            (
                run["subscription"],
                to_datetime(run["created_at"]).isoformat(),
                [format_id(each) for each in events],
            )
        )
    return sorted(found)


def foreseen(answer: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    return sorted(
        (run["subscription"], parse_time(run["at"]).isoformat(), run["events"])
        for run in answer["runs"]
    )


@pytest.mark.parametrize("seed", range(3))
async def test_the_same_code_tells_what_happened(seed: int) -> None:
    """Every pattern, nested, keyed and late: the dry run tells the runs of the ledger, with their events and at their times."""
    draw, clock, app = random.Random(seed), VirtualClock(), App("all")
    for number, (name, make) in enumerate(PATTERNS.items()):
        app.on(make(3 + number % 5, draw.choice([0, 2])), act, name=name)
    app.on(count("a", 2, within=4, by="k"), act, name="keyed")
    app.on(
        sequence("a", then="b", within=9, by="k"), act, name="gathered", deliver=Batch(4, within=6)
    )
    async with running(app, clock=clock):
        began = clock.now()
        for number in range(80):
            time = to_datetime(clock.now()) - timedelta(seconds=draw.choice([0, 0, 0, 1, 4]))
            kind, key = draw.choice("aabbccd"), draw.choice("xy")
            await app.accept(
                Event(id=f"{kind}{number}", source="/t", type=kind, data={"k": key}, time=time)
            )
            await clock.advance(draw.choice([0, 0.5, 1, 3]))
        await clock.advance(60)
        await drain(app)
        real, told = await made(app), await asked(app, since=began)
        instant = [run for run in real if run[0] != "gathered"]
        assert [run for run in foreseen(told) if run[0] != "gathered"] == instant and len(
            instant
        ) > 50
        assert sorted(run[2] for run in foreseen(told) if run[0] == "gathered") == sorted(
            run[2] for run in real if run[0] == "gathered"
        )
        counts = await app.store.counts()
        tallies = told["subscriptions"]
        assert sum(each["expired"] + each["filtered"] for each in tallies) == counts["suppressed"]
        assert sum(each["events"] for each in tallies) == counts["completed"]
        assert all(
            each["received"] == each["events"] + each["expired"] + each["waiting"] for each in tallies
        )


@pytest.mark.parametrize("mode", [Each(), Batch(3, within=5), Debounce(2, max_wait=6)], ids=repr)
async def test_windows_are_those_of_the_ledger(mode: Any) -> None:
    """Batches by size and time, debounces put off to their bound, keys apart: the same runs with the same events."""
    draw, clock, app, clicks = (
        random.Random(4),
        VirtualClock(),
        App("windows"),
        MemoryTrigger("clicks"),
    )
    app.on(clicks, act, deliver=mode, key="k", where={"n": [{"numeric": [">", 1]}]})
    async with running(app, clock=clock):
        for number in range(60):
            await clicks.send(
                data={"k": draw.choice("xy"), "n": draw.randrange(5)}, id=f"e{number}"
            )
            await clock.advance(draw.choice([0, 0.4, 1, 2.5, 6]))
        await clock.advance(10)
        await drain(app)
        told, real = await asked(app), await made(app)
        assert sorted(run[2] for run in foreseen(told)) == sorted(run[2] for run in real)
        (tally,) = told["subscriptions"]
        assert (
            tally["received"] == 60 == tally["events"] + tally["filtered"]
            and tally["runs"] == len(real) == told["would_start"]
        )


async def test_a_changed_pattern_tells_other_runs_and_starts_none() -> None:
    """Of the same events two failures within ten seconds where three were asked for: each run with its key and its events."""
    clock, app = VirtualClock(), App("logins")
    app.on(count("login.failed", 3, within=10, by="user"), act, name="brute")
    changed = App("changed")
    changed.on(count("login.failed", 2, within=10, by="user"), act, name="brute")
    async with running(app, clock=clock):
        for user in ("ada", "bob", "ada", "bob", "eve"):
            await app.emit("login.failed", {"user": user}, id=f"{user}-{clock.now()}")
            await clock.advance(1)
        ids = [format_id(row["id"]) for row in reversed(await app.store.events())]
        assert await made(app) == []
        told = await asked(app, changed)
        runs = [(run["mode"], run["key"], run["events"]) for run in told["runs"]]
        assert runs == [("pattern", "ada", [ids[0], ids[2]]), ("pattern", "bob", [ids[1], ids[3]])]
        assert told["subscriptions"][0]["waiting"] == 1 and told["events"] == 5
        assert (await asked(app))["would_start"] == 0 and await made(app) == []


async def test_deadlines_inside_the_time_are_told_and_later_ones_not() -> None:
    """`absent(for_=)` and `absent(by=)` count as far as the range goes: what is due after its end still waits."""
    clock, app = VirtualClock(), App("silence")
    app.on(absent("order.shipped", 3600, after="order.paid", by="id"), act, name="unshipped")
    app.on(absent("prices.landed", by="06:00", tz="Europe/Berlin"), act, name="daily")
    async with running(app, clock=clock):
        began = clock.now()
        for ident in ("1", "2"):
            await app.emit("order.paid", {"id": ident}, id=f"paid-{ident}")
        await clock.advance(600)
        await app.emit("order.shipped", {"id": "1"}, id="shipped-1")
        await clock.advance(timedelta(days=2))
        told = await asked(app, since=began)
        assert foreseen(told)[-1][:2] == (
            "unshipped",
            to_datetime(began + 3600_000_001).isoformat(),
        )
        daily = [each for each in told["simulated"] if each["trigger"] == "daily"]
        assert [each["event"]["type"] for each in daily] == ["eventflow.absent"] * 2
        assert {parse_time(each["at"]).hour for each in daily} <= {4, 5}
        assert sorted(run[:2] for run in foreseen(told)) == sorted(
            run[:2] for run in await made(app)
        )
        early = await asked(app, since=began, until=began + 1800_000_000)
        assert early["would_start"] == 0 and [
            each["waiting"] for each in early["subscriptions"]
        ] == [1, 0]


async def test_what_starts_nothing_says_why() -> None:
    """Filtered and invalid events count by their reasons, each with an example; many different reasons are cut to some."""
    app, orders = App("orders"), MemoryTrigger("orders")

    @flow
    async def handle(total: int) -> int:
        return total

    app.on(orders, handle, where={"total": [{"exists": True}]})
    async with running(app):
        await orders.send(data={}, id="a")
        await orders.send(data={}, id="b")
        await orders.send(data={"total": "much"}, id="c")
        await orders.send(data={"total": 3}, id="d")
        (tally,) = (await asked(app))["subscriptions"]
        assert (tally["runs"], tally["filtered"], tally["invalid"]) == (1, 2, 1)
        filtered, invalid = tally["reasons"]
        assert (filtered["outcome"], filtered["events"]) == ("filtered", 2) and "total" in filtered[
            "reason"
        ]
        assert (
            filtered["first"] == format_id((await app.store.event("a"))["id"])
            and "total" in invalid["reason"]
        )
        for number in range(2 * MAX_REASONS):
            await orders.send(data={"total": f"much {number}"}, id=f"m{number}")
        (tally,) = (await asked(app))["subscriptions"]
        assert (
            len(tally["reasons"]) <= MAX_REASONS + 2
            and sum(each["events"] for each in tally["reasons"]) == 3 + 2 * MAX_REASONS
        )


async def test_one_at_a_time_is_a_least() -> None:
    """How long runs would take nobody knows: the count of a `Singleflight` is a lower bound, and says so."""
    app, orders = App("orders"), MemoryTrigger("orders")
    app.on(orders, act, deliver=Singleflight())
    async with running(app):
        for number in range(4):
            await orders.send(data={}, id=f"e{number}")
        told = await asked(app)
        assert (
            told["at_least"]
            and told["would_start"] == 1
            and told["runs"][0]["is_least"]
            and told["runs"][0]["size"] == 4
        )


async def test_the_question_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time, a type, a flow: only these events are read, in pages, and only for subscriptions on their own trigger."""
    monkeypatch.setattr("eventflow.dry_run.replay.PAGE_EVENTS", 3)
    monkeypatch.setattr("eventflow.store.queries.SLICE", 4)
    clock, app, left, right = (
        VirtualClock(),
        App("two"),
        MemoryTrigger("left"),
        MemoryTrigger("right"),
    )

    @flow
    async def other(event: Event) -> None: ...

    app.on(left, act)
    app.on(right, other)
    async with running(app, clock=clock):
        began = clock.now()
        for number in range(10):
            await left.send(data={}, id=f"l{number}", type="even" if number % 2 == 0 else "odd")
            await right.send(data={}, id=f"r{number}")
            await clock.advance(1)
        assert (await asked(app))["would_start"] == 20
        only = await asked(app, to="other")
        assert (only["events"], only["would_start"], {run["flow"] for run in only["runs"]}) == (
            10,
            10,
            {"other"},
        )
        assert (await asked(app, to="left/act", type="even"))["would_start"] == 5
        assert (await asked(app, since=began + 2_000_000, until=began + 4_000_000))["events"] == 4
        listed = await asked(app, limit=2)
        assert len(listed["runs"]) == 2 and listed["would_start"] == 20


async def test_what_is_no_event_and_what_is_gone_is_counted() -> None:
    """Dead letters that nobody was asked about start nothing, and an event past its retention is not known: both are said."""
    clock, app, orders = VirtualClock(), App("old"), MemoryTrigger("orders")
    app.on(orders, act)
    async with running(app, clock=clock):
        await orders.send(data={}, id="old")
        await drain(app)
        await clock.advance(timedelta(days=40))
        month = 30 * 86_400 * 1_000_000
        while await app.store.prune(
            payloads_before=clock.now() - month, identities_before=clock.now() - 3 * month
        ):
            pass
        await orders.send(Undecodable(id="u", source="/o", body=b"{", error="cut off"))
        await orders.send(data={}, id="new")
        told = await asked(app)
        assert (told["events"], told["past_retention"], told["dead"], told["would_start"]) == (
            3,
            1,
            1,
            1,
        )


async def test_over_http() -> None:
    """One request for a whole time; a time or a name that is none is refused with what was expected."""
    app, orders = App("orders"), MemoryTrigger("orders")
    app.on(orders, act)
    async with running(app):
        await orders.send(data={}, id="a")
        transport = httpx2.ASGITransport(make_asgi(app, auth=False, manage=False))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            told = (await client.get("/api/dry-run", params={"to": "act"})).json()
            assert (
                told["would_start"] == 1 and to_us(parse_time(told["until"])) == app.clock.now() + 1
            )
            assert (
                await client.get("/api/dry-run", params={"since": "yesterday"})
            ).status_code == 400
            wrong = await client.get("/api/dry-run", params={"to": "nobody"})
            assert wrong.status_code == 409 and "orders/act" in wrong.json()["detail"]


async def test_memory_holds_what_is_open() -> None:
    """Of patterns that are through, windows that are over and runs beyond the limit nothing is kept."""
    app = App("many")
    app.on(count("a", 2, within=5, by="k"), act, deliver=Batch(2, within=1))
    rehearsal = DryRunSimulator(app.subscriptions, limit=10)
    for number in range(5000):
        for _ in range(2):
            rehearsal.receive(
                "events",
                Event(id=str(number), source="/", type="a", data={"k": str(number)}),
                number * 20_000_000,
            )
    assert len(rehearsal.runs) == 10 and rehearsal.started == 5000
    assert (
        max(len(rehearsal._patterns), len(rehearsal._queue)) < 10 and len(rehearsal._windows) < 3000
    )


def test_triggers_are_asked_by_protocol() -> None:
    """An ordinary trigger foresees nothing; its events are those on record."""
    triggers: Sequence[Trigger] = [MemoryTrigger("plain")]
    assert not any(isinstance(each, Simulatable) for each in triggers)
