"""The dry run against the ledger: same code, same runs; changed code, the runs it would have
started.
"""

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


async def simulate(app: App, by: App | None = None, **query: Any) -> dict[str, Any]:
    """The dry run of this app's code, or another app's, on the first one's ledger."""
    other = by or app
    until = query.pop("until", app.clock.now() + 1)
    return await dry_run(
        app.store, other.subscriptions, other.triggers, DryRunQuery(until=until, **query)
    )


async def recorded_runs(app: App) -> list[tuple[str, str, list[str]]]:
    """The runs of the ledger: subscription, time, events."""
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


def simulated_runs(answer: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """The runs of a dry run, in the form of `recorded_runs`."""
    return sorted(
        (run["subscription"], parse_time(run["at"]).isoformat(), run["events"])
        for run in answer["runs"]
    )


@pytest.mark.parametrize("seed", range(3))
async def test_the_same_code_gives_the_recorded_runs(seed: int) -> None:
    """Every pattern, nested, keyed and late: the dry run returns the runs of the ledger, with their
    events and times.
    """
    draw, clock, app = random.Random(seed), VirtualClock(), App("all")
    for number, (name, make) in enumerate(PATTERNS.items()):
        app.on(make(3 + number % 5, draw.choice([0, 2])), act, name=name)
    app.on(count("a", 2, within=4, by="k"), act, name="keyed")
    app.on(
        sequence("a", then="b", within=9, by="k"), act, name="batched", deliver=Batch(4, within=6)
    )
    async with running(app, clock=clock):
        start = clock.now()
        for number in range(80):
            time = to_datetime(clock.now()) - timedelta(seconds=draw.choice([0, 0, 0, 1, 4]))
            kind, key = draw.choice("aabbccd"), draw.choice("xy")
            await app.accept(
                Event(id=f"{kind}{number}", source="/t", type=kind, data={"k": key}, time=time)
            )
            await clock.advance(draw.choice([0, 0.5, 1, 3]))
        await clock.advance(60)
        await drain(app)
        real, result = await recorded_runs(app), await simulate(app, since=start)
        instant = [run for run in real if run[0] != "batched"]
        assert [run for run in simulated_runs(result) if run[0] != "batched"] == instant and len(
            instant
        ) > 50
        assert sorted(run[2] for run in simulated_runs(result) if run[0] == "batched") == sorted(
            run[2] for run in real if run[0] == "batched"
        )
        counts = await app.store.counts()
        subscriptions = result["subscriptions"]
        assert (
            sum(each["expired"] + each["filtered"] for each in subscriptions)
            == counts["suppressed"]
        )
        assert sum(each["events"] for each in subscriptions) == counts["completed"]
        assert all(
            each["received"] == each["events"] + each["expired"] + each["waiting"]
            for each in subscriptions
        )


@pytest.mark.parametrize("mode", [Each(), Batch(3, within=5), Debounce(2, max_wait=6)], ids=repr)
async def test_windows_are_those_of_the_ledger(mode: Any) -> None:
    """Batches by size and time, debounces up to their limit, separate keys: the same runs with the
    same events.
    """
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
        result, real = await simulate(app), await recorded_runs(app)
        assert sorted(run[2] for run in simulated_runs(result)) == sorted(run[2] for run in real)
        (subscription,) = result["subscriptions"]
        assert (
            subscription["received"] == 60 == subscription["events"] + subscription["filtered"]
            and subscription["runs"] == len(real) == result["would_start"]
        )


async def test_a_changed_pattern_gives_other_runs_and_starts_none() -> None:
    """Two failures within ten seconds instead of three, on the same events: each run with its key
    and events.
    """
    clock, app = VirtualClock(), App("logins")
    app.on(count("login.failed", 3, within=10, by="user"), act, name="brute")
    changed = App("changed")
    changed.on(count("login.failed", 2, within=10, by="user"), act, name="brute")
    async with running(app, clock=clock):
        for user in ("ada", "bob", "ada", "bob", "eve"):
            await app.emit("login.failed", {"user": user}, id=f"{user}-{clock.now()}")
            await clock.advance(1)
        ids = [format_id(row["id"]) for row in reversed(await app.store.events())]
        assert await recorded_runs(app) == []
        result = await simulate(app, changed)
        runs = [(run["mode"], run["key"], run["events"]) for run in result["runs"]]
        assert runs == [("pattern", "ada", [ids[0], ids[2]]), ("pattern", "bob", [ids[1], ids[3]])]
        assert result["subscriptions"][0]["waiting"] == 1 and result["events"] == 5
        assert (await simulate(app))["would_start"] == 0 and await recorded_runs(app) == []


async def test_deadlines_within_the_period_are_simulated() -> None:
    """`absent(for_=)` and `absent(by=)` are evaluated up to the end of the period; what is due
    later still waits.
    """
    clock, app = VirtualClock(), App("absences")
    app.on(absent("order.shipped", 3600, after="order.paid", by="id"), act, name="unshipped")
    app.on(absent("prices.landed", by="06:00", tz="Europe/Berlin"), act, name="daily")
    async with running(app, clock=clock):
        start = clock.now()
        for ident in ("1", "2"):
            await app.emit("order.paid", {"id": ident}, id=f"paid-{ident}")
        await clock.advance(600)
        await app.emit("order.shipped", {"id": "1"}, id="shipped-1")
        await clock.advance(timedelta(days=2))
        result = await simulate(app, since=start)
        assert simulated_runs(result)[-1][:2] == (
            "unshipped",
            to_datetime(start + 3600_000_001).isoformat(),
        )
        daily = [each for each in result["simulated"] if each["trigger"] == "daily"]
        assert [each["event"]["type"] for each in daily] == ["eventflow.absent"] * 2
        assert {parse_time(each["at"]).hour for each in daily} <= {4, 5}
        assert sorted(run[:2] for run in simulated_runs(result)) == sorted(
            run[:2] for run in await recorded_runs(app)
        )
        early = await simulate(app, since=start, until=start + 1800_000_000)
        assert early["would_start"] == 0 and [
            each["waiting"] for each in early["subscriptions"]
        ] == [1, 0]


async def test_events_that_start_nothing_have_a_reason() -> None:
    """Filtered and invalid events are counted by reason, each with an example; too many reasons are
    combined.
    """
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
        (subscription,) = (await simulate(app))["subscriptions"]
        assert (subscription["runs"], subscription["filtered"], subscription["invalid"]) == (
            1,
            2,
            1,
        )
        filtered, invalid = subscription["reasons"]
        assert (filtered["outcome"], filtered["events"]) == ("filtered", 2) and "total" in filtered[
            "reason"
        ]
        assert (
            filtered["first"] == format_id((await app.store.event("a"))["id"])
            and "total" in invalid["reason"]
        )
        for number in range(2 * MAX_REASONS):
            await orders.send(data={"total": f"much {number}"}, id=f"m{number}")
        (subscription,) = (await simulate(app))["subscriptions"]
        assert (
            len(subscription["reasons"]) <= MAX_REASONS + 2
            and sum(each["events"] for each in subscription["reasons"]) == 3 + 2 * MAX_REASONS
        )


async def test_one_run_at_a_time_is_a_lower_bound() -> None:
    """How long runs take is unknown: the count of a `Singleflight` is a lower bound, and is marked
    as one.
    """
    app, orders = App("orders"), MemoryTrigger("orders")
    app.on(orders, act, deliver=Singleflight())
    async with running(app):
        for number in range(4):
            await orders.send(data={}, id=f"e{number}")
        result = await simulate(app)
        assert (
            result["at_least"]
            and result["would_start"] == 1
            and result["runs"][0]["is_least"]
            and result["runs"][0]["size"] == 4
        )


async def test_the_query_selects(monkeypatch: pytest.MonkeyPatch) -> None:
    """A period, a type, a flow: only these events are read, in pages, and only those of the
    triggers concerned.
    """
    monkeypatch.setattr("eventflow.dry_run.replay.PAGE_EVENTS", 3)
    monkeypatch.setattr("eventflow.store.queries.MAX_SCANNED_EVENTS", 4)
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
        start = clock.now()
        for number in range(10):
            await left.send(data={}, id=f"l{number}", type="even" if number % 2 == 0 else "odd")
            await right.send(data={}, id=f"r{number}")
            await clock.advance(1)
        assert (await simulate(app))["would_start"] == 20
        only = await simulate(app, to="other")
        assert (only["events"], only["would_start"], {run["flow"] for run in only["runs"]}) == (
            10,
            10,
            {"other"},
        )
        assert (await simulate(app, to="left/act", type="even"))["would_start"] == 5
        assert (await simulate(app, since=start + 2_000_000, until=start + 4_000_000))[
            "events"
        ] == 4
        listed = await simulate(app, limit=2)
        assert len(listed["runs"]) == 2 and listed["would_start"] == 20


async def test_dead_letters_and_events_past_retention_are_counted() -> None:
    """Dead letters of no subscription start nothing, and an event past its retention is unknown;
    both are counted.
    """
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
        result = await simulate(app)
        assert (
            result["events"],
            result["past_retention"],
            result["dead"],
            result["would_start"],
        ) == (
            3,
            1,
            1,
            1,
        )


async def test_over_http() -> None:
    """One request for a whole period; a malformed time or an unknown name is rejected with what was
    expected.
    """
    app, orders = App("orders"), MemoryTrigger("orders")
    app.on(orders, act)
    async with running(app):
        await orders.send(data={}, id="a")
        transport = httpx2.ASGITransport(make_asgi(app, auth=False, manage=False))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            result = (await client.get("/api/dry-run", params={"to": "act"})).json()
            assert (
                result["would_start"] == 1
                and to_us(parse_time(result["until"])) == app.clock.now() + 1
            )
            assert (
                await client.get("/api/dry-run", params={"since": "yesterday"})
            ).status_code == 400
            wrong = await client.get("/api/dry-run", params={"to": "nobody"})
            assert wrong.status_code == 409 and "orders/act" in wrong.json()["detail"]


async def test_memory_holds_only_what_is_open() -> None:
    """Finished patterns, closed windows and runs beyond the limit take no memory."""
    app = App("many")
    app.on(count("a", 2, within=5, by="k"), act, deliver=Batch(2, within=1))
    simulator = DryRunSimulator(app.subscriptions, limit=10)
    for number in range(5000):
        for _ in range(2):
            simulator.receive(
                "events",
                Event(id=str(number), source="/", type="a", data={"k": str(number)}),
                number * 20_000_000,
            )
    assert len(simulator.runs) == 10 and simulator.started == 5000
    assert (
        max(len(simulator._patterns), len(simulator._queue)) < 10 and len(simulator._windows) < 3000
    )


def test_ordinary_triggers_are_not_simulatable() -> None:
    """An ordinary trigger does not implement `Simulatable`; its recorded events count."""
    triggers: Sequence[Trigger] = [MemoryTrigger("plain")]
    assert not any(isinstance(each, Simulatable) for each in triggers)
