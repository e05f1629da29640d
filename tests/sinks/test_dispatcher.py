"""The way out: letters recorded with their events, sent at least once in order, whatever the sink does and whenever we die."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from eventflow import App, Event, Permanent, emit, flow, task
from eventflow.core.errors import UsageError
from eventflow.events.event import Letter, Undecodable
from eventflow.web.api import make_asgi
from tests.conftest import eventually

pytestmark = pytest.mark.anyio


class Shelf:
    """A sink in this process: keeps what it takes, and fails as told."""

    def __init__(self, name: str = "shelf") -> None:
        self.name = name
        self.taken: list[Letter] = []
        self.failures: list[Exception] = []
        self.refuses: set[str] = set()
        self.calls = 0
        self.closed = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def send(self, *letters: Letter) -> None:
        self.calls += 1
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        for letter in letters:
            if letter.event.id in self.refuses:
                raise Permanent(f"too large: {letter.event.id}")
            self.taken.append(letter)

    async def close(self) -> None:
        self.closed = True

    @property
    def ids(self) -> list[str]:
        return [letter.event.id for letter in self.taken]


@task
async def announce(n: int) -> int:
    await emit("order.scored", {"n": n})
    return n


@flow
async def orders(n: int) -> None:
    await announce(n)
    await emit("order.done", {"n": n}, subject=f"order/{n}")


@asynccontextmanager
async def opened(
    folder: Path, *sends: tuple[str, Shelf], dead: Shelf | None = None, where: Any = None
) -> AsyncIterator[App]:
    app = App("out", store=f"sqlite:///{folder / 'out.db'}", ballast=0, free_floor=0)
    app.on("order.placed", orders)
    for types, sink in sends:
        app.send(types, sink, where=where)
    if dead is not None:
        app.send_dead_letters(dead)
    async with app:
        yield app


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eventflow.sinks.dispatcher.BACKOFF", (0.02, 0.1))


async def is_empty(app: App) -> bool:
    return not await app.store.outbox_depths()


async def test_p2_what_flows_and_tasks_emit_reaches_its_sinks_once_in_order(tmp_path: Path) -> None:
    """Each emitted event goes to every outlet whose types it fits, in the order of recording, and then is out of the outbox."""
    scored, everything = Shelf("scored"), Shelf("everything")
    async with opened(tmp_path, ("order.scored", scored), ("order.*", everything)) as app:
        for n in range(20):
            await app.emit("order.placed", {"n": n}, id=f"o-{n}")
        await eventually(
            lambda: len(scored.taken) == 20 and len(everything.taken) == 60, "all letters arrive"
        )
        await eventually(lambda: is_empty(app), "the outbox is empty")
    assert {letter.event.type for letter in scored.taken} == {"order.scored"}
    assert len(set(everything.ids)) == 60
    ledger = [letter.number for letter in everything.taken]
    assert ledger == sorted(ledger)
    (done,) = [letter.event for letter in everything.taken if letter.event.subject == "order/7"]
    assert (
        done.type == "order.done"
        and done.data == {"n": 7}
        and done.source == "/flows/orders"
        and done.depth == 1
    )
    assert scored.closed and everything.closed


async def test_p3_the_event_tells_which_outlets_it_went_to(tmp_path: Path) -> None:
    """An outlet that an event fits has a verdict, also when its filter does not want it; while it waits, the event says so."""
    shelf = Shelf()
    shelf.gate.clear()
    async with opened(
        tmp_path, ("order.placed", shelf), where={"n": [{"numeric": [">", 5]}]}
    ) as app:
        wanted, unwanted = (
            await app.emit("order.placed", {"n": 6}),
            await app.emit("order.placed", {"n": 1}),
        )
        row = await app.store.event(wanted.ledger_id)
        assert ["events/shelf", "outbox", "for sink shelf"] in row["verdicts"]
        assert [letter["outlet"] for letter in row["outbox"]] == ["events/shelf"]
        verdicts = (await app.store.event(unwanted.ledger_id))["verdicts"]
        assert [said[:2] for said in verdicts if said[0] == "events/shelf"] == [
            ["events/shelf", "filtered"]
        ]
        shelf.gate.set()
        await eventually(lambda: len(shelf.taken) == 1, "the wanted one arrives")


@pytest.mark.usefixtures("quick")
async def test_row_41_a_sink_that_is_down_delays_nobody_and_loses_nothing(tmp_path: Path) -> None:
    """While a sink fails, runs complete and another sink gets its letters; when it is back, it gets all, in order."""
    down, up = Shelf("down"), Shelf("up")
    down.failures = [OSError("no route to host")] * 5
    async with opened(tmp_path, ("order.done", down), ("order.done", up)) as app:
        for n in range(10):
            await app.emit("order.placed", {"n": n})
        await eventually(lambda: len(up.taken) == 10, "the other sink has its letters")
        health = app.house.relay.health["events/down"]
        await eventually(lambda: health.state == "failing" or down.taken, "the failure shows")
        await eventually(lambda: health.sent == 10, "the sink that was down has them too")
        assert (
            down.ids == up.ids
            and health.failures == 5
            and health.last_error is None
            and health.sent == 10
        )
        assert (await app.store.counts())["completed"] == 10


async def test_p2_letters_survive_the_process_and_go_first_in_the_next_life(tmp_path: Path) -> None:
    """What was recorded and not sent is sent by the next life; what a sink took before its row was deleted comes again."""
    stuck = Shelf()
    stuck.gate.clear()
    async with opened(tmp_path, ("order.placed", stuck)) as app:
        for n in range(5):
            await app.emit("order.placed", {"n": n}, id=f"o-{n}")
        await eventually(lambda: stuck.calls == 1, "the sink is asked")
    shelf = Shelf()
    async with opened(tmp_path, ("order.placed", shelf)) as app:
        await app.emit("order.placed", {"n": 5}, id="o-5")
        await eventually(lambda: len(shelf.taken) >= 6, "all six arrive")
    assert list(dict.fromkeys(shelf.ids)) == [f"o-{n}" for n in range(6)]


async def test_p9_what_a_sink_can_never_take_is_a_dead_letter_and_can_be_redriven(
    tmp_path: Path,
) -> None:
    """`Permanent` for one letter among many: that one is dead, with its reason; the others arrive; a redrive sends it again."""
    shelf = Shelf()
    shelf.refuses = {"o-3"}
    async with opened(tmp_path, ("order.placed", shelf)) as app:
        await app.accept(
            *[
                Event(id=f"o-{n}", source="/test", type="order.placed", data={"n": n})
                for n in range(6)
            ]
        )

        async def dead() -> list[dict[str, Any]]:
            return await app.store.dead()

        await eventually(dead, "the refused one is a dead letter")
        (letter,) = await dead()
        assert (letter["subscription"], letter["reason"], letter["event_id"]) == (
            "events/shelf",
            "too large: o-3",
            "o-3",
        )
        await eventually(lambda: {"o-4", "o-5"} <= set(shelf.ids), "the ones behind it arrive")
        counts = await app.store.counts()
        parts = ("completed", "failed", "dead", "cancelled", "suppressed", "pending")
        assert counts["accepted"] == sum(counts[name] for name in parts) and counts["dead"] == 1
        shelf.refuses.clear()
        event = Event.from_json((await app.store.dead_letter(letter["id"]))["body"])
        arrival = app.house.router.arrive(
            letter["trigger"], event, ledger_id=letter["event"], only=letter["subscription"]
        )
        await app.store.redrive(letter["id"], arrival)
        await eventually(lambda: "o-3" in shelf.ids, "the redriven one arrives")
        assert await dead() == [] and (await app.store.counts())["dead"] == 0


async def test_p9_dead_letters_go_to_their_sink_with_their_bytes_and_reason(tmp_path: Path) -> None:
    """What cannot be decoded and what cannot be bound both arrive: bytes, reason, subscription, headers."""
    shelf = Shelf()
    async with opened(tmp_path, dead=shelf) as app:
        await app.emit("order.placed", {"wrong": 1}, id="unbound")
        junk = Undecodable(
            id="junk", source="/test", body=b"\x00\xff", error="not JSON", headers={"x-key": "7"}
        )
        await app.house.reactor.record([app.house.router.arrive("somewhere", junk)], "somewhere")
        await eventually(lambda: len(shelf.taken) == 2, "both arrive")
        unbound, raw = shelf.taken
        assert (unbound.event.id, unbound.event.data, unbound.subscription) == (
            "unbound",
            {"wrong": 1},
            "events/orders",
        )
        assert unbound.reason is not None and "n" in unbound.reason
        assert (raw.event.id, raw.event.data, raw.reason, raw.headers) == (
            "junk",
            b"\x00\xff",
            "not JSON",
            {"x-key": "7"},
        )
        assert (
            raw.event.type == "eventflow.undecodable"
            and raw.trigger == "somewhere"
            and raw.subscription == ""
        )
        assert len(await app.store.dead()) == 2


async def test_retention_keeps_what_is_not_sent(tmp_path: Path) -> None:
    """An event that an outlet has not sent keeps its body, however old it is; once sent, it goes."""
    shelf = Shelf()
    shelf.gate.clear()
    async with opened(tmp_path, ("note", shelf)) as app:
        await app.emit("note", {"n": 1})
        later = app.clock.now() + 10**12
        assert await app.store.prune(bodies_before=later, identities_before=0) == 0
        shelf.gate.set()
        await eventually(lambda: is_empty(app), "it is sent")
        assert shelf.taken[0].event.data == {"n": 1}
        assert await app.store.prune(bodies_before=later, identities_before=0) == 1


async def test_the_doors_tell_how_outlets_fare(tmp_path: Path) -> None:
    """`/api/outlets` and `/metrics` name each outlet with what it sent and what waits, and the last error while it fails."""
    shelf = Shelf()
    shelf.failures = [OSError("gone")] * 10_000
    app = App("out", store=f"sqlite:///{tmp_path / 'out.db'}", ballast=0, free_floor=0)
    app.send("note", shelf)
    transport = httpx2.ASGITransport(make_asgi(app, auth=False, manage=False))
    async with app, httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        await app.emit("note", {"n": 1})

        async def failing() -> Any:
            (row,) = (await client.get("/api/outlets")).json()["outlets"]
            return row["state"] == "failing" and row

        await eventually(failing, "the outlet shows its failure")
        row = await failing()
        assert (row["name"], row["sink"], row["waiting"], row["last_error"]) == (
            "events/shelf",
            "shelf",
            1,
            "OSError: gone",
        )
        assert row["oldest_at"] is not None
        page = (await client.get("/metrics")).text
        assert 'eventflow_outbox_letters{outlet="events/shelf"} 1.0' in page


async def test_what_is_no_sink_is_said_at_once(tmp_path: Path) -> None:
    """`send` to something that has no name, send() and close() is a UsageError; two outlets to one sink have two names."""
    app = App("out")
    with pytest.raises(UsageError, match="expected a sink"):
        app.send("x", "kafka://scored")  # type: ignore[arg-type]
    shelf = Shelf()
    app.send("a", shelf)
    app.send("b", shelf)
    assert [outlet.name for outlet in app._outlets] == ["events/shelf", "events/shelf#2"]
