"""The outbox: messages recorded with their events, sent at least once and in order, through failing
sinks and crashes.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx2
import pytest

from eventflow import App, Event, Permanent, emit, flow, task
from eventflow.core.errors import UsageError
from eventflow.core.secrets import KNOWN_SECRETS
from eventflow.events.event import OutboxMessage, Undecodable
from eventflow.web.api import make_asgi
from tests.conftest import eventually, stays

pytestmark = pytest.mark.anyio


class ListSink:
    """A sink in this process: keeps what it receives, and fails on demand."""

    def __init__(self, name: str = "shelf") -> None:
        self.name = name
        self.received: list[OutboxMessage] = []
        self.failures: list[Exception] = []
        self.rejects: set[str] = set()
        self.calls = 0
        self.closed = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def send(self, *messages: OutboxMessage) -> None:
        self.calls += 1
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        for message in messages:
            if message.event.id in self.rejects:
                raise Permanent(f"too large: {message.event.id}")
            self.received.append(message)

    async def close(self) -> None:
        self.closed = True

    @property
    def ids(self) -> list[str]:
        return [message.event.id for message in self.received]


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
    folder: Path, *sends: tuple[str, ListSink], dead: ListSink | None = None, where: Any = None
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
    monkeypatch.setattr("eventflow.sinks.relay.RETRY_DELAY_SECONDS", 0.02)
    monkeypatch.setattr("eventflow.sinks.relay.MAX_RETRY_DELAY_SECONDS", 0.1)


async def is_empty(app: App) -> bool:
    return not await app.store.outbox_depths()


async def test_p2_what_flows_and_tasks_emit_reaches_its_sinks_once_in_order(tmp_path: Path) -> None:
    """An emitted event goes to every sink subscription whose types match, in the order of
    recording, then leaves the outbox.
    """
    scored = ListSink("scored")
    everything = ListSink("everything")
    async with opened(tmp_path, ("order.scored", scored), ("order.*", everything)) as app:
        for n in range(20):
            await app.emit("order.placed", {"n": n}, id=f"o-{n}")
        await eventually(
            lambda: len(scored.received) == 20 and len(everything.received) == 60,
            "all messages arrive",
        )
        await eventually(lambda: is_empty(app), "the outbox is empty")
    assert {message.event.type for message in scored.received} == {"order.scored"}
    assert len(set(everything.ids)) == 60
    numbers = [message.number for message in everything.received]
    assert numbers == sorted(numbers)
    (done,) = [each.event for each in everything.received if each.event.subject == "order/7"]
    assert (
        done.type == "order.done"
        and done.data == {"n": 7}
        and done.source == "/flows/orders"
        and done.depth == 1
    )
    assert scored.closed and everything.closed


async def test_p3_an_event_lists_the_sinks_it_went_to(tmp_path: Path) -> None:
    """A sink subscription on the type has a verdict, also when its filter excludes the event; an
    unsent message is listed.
    """
    sink = ListSink()
    sink.gate.clear()
    async with opened(
        tmp_path, ("order.placed", sink), where={"n": [{"numeric": [">", 5]}]}
    ) as app:
        wanted = await app.emit("order.placed", {"n": 6})
        unwanted = await app.emit("order.placed", {"n": 1})
        row = await app.store.event(wanted.ledger_id)
        assert ["events/shelf", "outbox", "for sink shelf"] in row["verdicts"]
        assert [each["sink"] for each in row["outbox"]] == ["events/shelf"]
        verdicts = (await app.store.event(unwanted.ledger_id))["verdicts"]
        assert [each[:2] for each in verdicts if each[0] == "events/shelf"] == [
            ["events/shelf", "filtered"]
        ]
        sink.gate.set()
        await eventually(lambda: len(sink.received) == 1, "the wanted one arrives")


@pytest.mark.usefixtures("quick")
async def test_row_41_a_failing_sink_delays_no_run_and_loses_nothing(tmp_path: Path) -> None:
    """While a sink fails, runs complete and another sink receives its messages; after recovery it
    receives all, in order.
    """
    down = ListSink("down")
    up = ListSink("up")
    down.failures = [OSError("no route to host")] * 5
    async with opened(tmp_path, ("order.done", down), ("order.done", up)) as app:
        for n in range(10):
            await app.emit("order.placed", {"n": n})
        await eventually(lambda: len(up.received) == 10, "the other sink has its messages")
        health = app.runtime.relay.health["events/down"]
        await eventually(lambda: health.state == "failing" or down.received, "the failure shows")
        await eventually(lambda: health.sent == 10, "the sink that was down has them too")
        assert (
            down.ids == up.ids
            and health.failures == 5
            and health.last_error is None
            and health.sent == 10
        )
        assert (await app.store.counts())["completed"] == 10


async def test_p2_messages_survive_the_process_and_are_sent_first_by_the_next(
    tmp_path: Path,
) -> None:
    """Unsent messages are sent by the next process; one that a sink received before its row was
    deleted is sent again.
    """
    stuck = ListSink()
    stuck.gate.clear()
    async with opened(tmp_path, ("order.placed", stuck)) as app:
        for n in range(5):
            await app.emit("order.placed", {"n": n}, id=f"o-{n}")
        await eventually(lambda: stuck.calls == 1, "the sink is called")
    sink = ListSink()
    async with opened(tmp_path, ("order.placed", sink)) as app:
        await app.emit("order.placed", {"n": 5}, id="o-5")
        await eventually(lambda: len(sink.received) >= 6, "all six arrive")
    assert list(dict.fromkeys(sink.ids)) == [f"o-{n}" for n in range(6)]


async def test_p9_a_message_rejected_by_its_sink_is_a_dead_letter_and_can_be_redriven(
    tmp_path: Path,
) -> None:
    """`Permanent` for one of many messages: it becomes a dead letter with its reason, the others
    arrive; a redrive resends it.
    """
    sink = ListSink()
    sink.rejects = {"o-3"}
    async with opened(tmp_path, ("order.placed", sink)) as app:
        await app.accept(
            *[
                Event(id=f"o-{n}", source="/test", type="order.placed", data={"n": n})
                for n in range(6)
            ]
        )

        async def dead() -> list[dict[str, Any]]:
            return await app.store.dead_letters()

        await eventually(dead, "the rejected one is a dead letter")
        (letter,) = await dead()
        assert (letter["subscription"], letter["reason"], letter["event_id"]) == (
            "events/shelf",
            "too large: o-3",
            "o-3",
        )
        await eventually(lambda: {"o-4", "o-5"} <= set(sink.ids), "the ones behind it arrive")
        counts = await app.store.counts()
        parts = ("completed", "failed", "dead", "cancelled", "suppressed", "pending")
        assert counts["accepted"] == sum(counts[name] for name in parts) and counts["dead"] == 1
        sink.rejects.clear()
        event = Event.from_json((await app.store.dead_letter(letter["id"]))["body"])
        arrival = app.runtime.router.route(
            letter["trigger"], event, ledger_id=letter["event"], only=letter["subscription"]
        )
        await app.store.redrive(letter["id"], arrival)
        await eventually(lambda: "o-3" in sink.ids, "the redriven one arrives")
        assert await dead() == [] and (await app.store.counts())["dead"] == 0


async def test_p9_dead_letters_go_to_their_sink_with_their_bytes_and_reason(tmp_path: Path) -> None:
    """Undecodable bytes and an event that cannot be bound both arrive: with bytes, reason,
    subscription and headers.
    """
    sink = ListSink()
    async with opened(tmp_path, dead=sink) as app:
        await app.emit("order.placed", {"wrong": 1}, id="unbound")
        junk = Undecodable(
            id="junk", source="/test", body=b"\x00\xff", error="not JSON", headers={"x-key": "7"}
        )
        await app.runtime.reactor.record(
            lambda: [app.runtime.router.route("somewhere", junk)], "somewhere"
        )
        await eventually(lambda: len(sink.received) == 2, "both arrive")
        unbound, raw = sink.received
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
        assert len(await app.store.dead_letters()) == 2


async def test_a_sender_with_nothing_to_send_rests(tmp_path: Path) -> None:
    """After its last message a sender reads the outbox once more and then waits to be woken."""
    sink = ListSink()
    async with opened(tmp_path, ("note", sink)) as app:
        reads = 0
        unsent = app.store.unsent_messages

        async def counted(*args: Any) -> Any:
            nonlocal reads
            reads += 1
            return await unsent(*args)

        app.store.unsent_messages = counted  # type: ignore[method-assign]
        for n in range(3):
            await app.emit("note", {"n": n})
            await eventually(lambda n=n: len(sink.received) == n + 1, "it is sent")
            await eventually(lambda: is_empty(app), "the outbox is empty")
        await stays(lambda: reads <= 9, "the sender rests", during=0.3)


async def test_a_damaged_event_is_not_sent_and_holds_nobody_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A message whose event does not match its checksum is left out with an error that names the
    row; those around it are sent.
    """
    sink = ListSink()
    sink.gate.clear()
    async with opened(tmp_path, ("note", sink)) as app:
        for n in range(3):
            await app.emit("note", {"n": n}, id=f"n-{n}")
    with closing(sqlite3.connect(tmp_path / "out.db")) as ledger, ledger:
        ledger.execute("UPDATE events SET body = replace(body, '1', '7') WHERE event_id = 'n-1'")
    sink = ListSink()
    async with opened(tmp_path, ("note", sink)):
        await eventually(lambda: len(sink.received) >= 2, "the others are sent")
    assert sink.ids == ["n-0", "n-2"]
    assert "store.row_corrupt" in caplog.text


async def test_a_rejection_that_quotes_a_secret_is_kept_without_it(tmp_path: Path) -> None:
    """What a sink says about a rejected message is redacted before it is kept as a dead letter."""
    KNOWN_SECRETS.register("s3cr3t-of-the-sink")
    sink = ListSink()
    sink.rejects = {"s3cr3t-of-the-sink"}
    async with opened(tmp_path, ("note", sink)) as app:
        await app.emit("note", {"n": 1}, id="s3cr3t-of-the-sink")

        async def is_rejected() -> bool:
            return bool(await app.store.dead_letters())

        await eventually(is_rejected, "it is a dead letter")
        (letter,) = await app.store.dead_letters()
    assert "too large" in letter["reason"] and "s3cr3t" not in letter["reason"]


async def test_closing_waits_for_a_sink_for_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sink whose `close` does not return is left behind after the time limit."""
    monkeypatch.setattr("eventflow.sinks.relay.CLOSE_TIMEOUT_SECONDS", 0.1)
    cancelled = asyncio.Event()

    class Stuck(ListSink):
        async def close(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

    async with asyncio.timeout(10):
        async with opened(tmp_path, ("note", Stuck())) as app:
            await app.emit("note", {"n": 1})
        assert cancelled.is_set()


async def test_retention_keeps_what_is_not_sent(tmp_path: Path) -> None:
    """An event with an unsent message keeps its payload, however old; once sent, retention removes
    it.
    """
    sink = ListSink()
    sink.gate.clear()
    async with opened(tmp_path, ("note", sink)) as app:
        await app.emit("note", {"n": 1})
        later = app.clock.now() + 10**12
        assert await app.store.prune(payloads_before=later, identities_before=0) == 0
        sink.gate.set()
        await eventually(lambda: is_empty(app), "it is sent")
        assert sink.received[0].event.data == {"n": 1}
        assert await app.store.prune(payloads_before=later, identities_before=0) == 1


async def test_the_api_and_metrics_show_the_state_of_sinks(tmp_path: Path) -> None:
    """`/api/sinks` and `/metrics` show each sink subscription: sent, waiting, and the last error
    while it fails.
    """
    sink = ListSink()
    sink.failures = [OSError("gone")] * 10_000
    app = App("out", store=f"sqlite:///{tmp_path / 'out.db'}", ballast=0, free_floor=0)
    app.send("note", sink)
    transport = httpx2.ASGITransport(make_asgi(app, auth=False, manage=False))
    async with app, httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        await app.emit("note", {"n": 1})

        async def failing() -> Any:
            (row,) = (await client.get("/api/sinks")).json()["sinks"]
            return row["state"] == "failing" and row

        await eventually(failing, "the failure is shown")
        row = await failing()
        (old,) = (await client.get("/api/outlets")).json()["outlets"]  # the old path
        assert old.keys() == row.keys() and old["name"] == row["name"]
        assert (row["name"], row["sink"], row["waiting"], row["last_error"]) == (
            "events/shelf",
            "shelf",
            1,
            "OSError: gone",
        )
        assert row["oldest_at"] is not None
        page = (await client.get("/metrics")).text
        assert 'eventflow_outbox_messages{sink="events/shelf"} 1.0' in page


async def test_send_to_an_object_that_is_no_sink_is_a_usage_error(tmp_path: Path) -> None:
    """`send` to an object without name, send() and close() raises; two subscriptions of one sink
    have two names.
    """
    app = App("out")
    with pytest.raises(UsageError, match="expected a sink"):
        app.send("x", "kafka://scored")  # type: ignore[arg-type]
    sink = ListSink()
    app.send("a", sink)
    app.send("b", sink)
    assert [each.name for each in app._config.sink_subscriptions] == [
        "events/shelf",
        "events/shelf#2",
    ]
