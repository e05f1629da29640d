"""KafkaSink on real brokers: what a consumer reads is what was recorded, in order, also across a
broker's death and ours.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from eventflow import App, Event, Permanent, emit, flow
from eventflow.core.errors import UsageError
from eventflow.events.event import OutboxMessage, format_id
from tests.brokers import Broker, given_or_noida
from tests.conftest import eventually
from triggers import Kafka, KafkaSink

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with given_or_noida(tmp_path_factory.mktemp("broker")) as running:
        yield running


def message(event: Event, **more: Any) -> OutboxMessage:
    return OutboxMessage(number=1, event=event, trigger="events", ledger_id=7, **more)


def headers_of(record: Any) -> dict[str, str]:
    return {name: value.decode() for name, value in record.headers}


async def test_binary_mode_is_the_cloudevents_binding(broker: Broker):
    """Attributes are `ce_` headers, the data is the value with its content type, the key comes from
    partitionkey or subject.
    """
    topic = await broker.create()
    moment = datetime(2026, 1, 31, 8, 0, 0, 250_000, tzinfo=UTC)
    sink = KafkaSink(topic, bootstrap_servers=broker.server)
    await sink.send(
        message(
            Event(
                id="a",
                source="/flows/x",
                type="order.scored",
                data={"n": 1},
                subject="order/1",
                time=moment,
            )
        ),
        message(
            Event(
                id="b",
                source="/flows/x",
                type="raw",
                data=b"\x00\xff",
                extensions={"partitionkey": "k", "ok": True},
            )
        ),
        message(Event(id="c", source="/flows/x", type="order.gone", subject="order/3")),
        message(Event(id="d", source="/flows/x", type="order.empty")),
    )
    await sink.close()
    first, second, third, fourth = await broker.read(topic, 4)
    headers = headers_of(first)
    assert headers["ce_specversion"] == "1.0" and (headers["ce_id"], headers["ce_source"]) == (
        "a",
        "/flows/x",
    )
    assert (headers["ce_type"], headers["ce_subject"], headers["content-type"]) == (
        "order.scored",
        "order/1",
        "application/json",
    )
    assert datetime.fromisoformat(headers["ce_time"]) == moment and first.timestamp == 1769846400250
    assert (orjson.loads(first.value), first.key) == ({"n": 1}, b"order/1")
    assert (second.value, second.key, headers_of(second)["ce_ok"]) == (b"\x00\xff", b"k", "true")
    assert (
        third.value is None
        and third.key == b"order/3"
        and headers_of(third)["ce_type"] == "order.gone"
    )
    assert fourth.value == b"" and fourth.key is None


async def test_structured_mode_is_the_whole_event(broker: Broker):
    """One JSON document that reads back as the event; a key of one's own."""
    topic = await broker.create()
    sink = KafkaSink(
        topic, bootstrap_servers=broker.server, mode="structured", key=lambda event: f"k-{event.id}"
    )
    event = Event(id="a", source="/s", type="t", data={"n": 1})
    await sink.send(message(event))
    await sink.close()
    (record,) = await broker.read(topic, 1)
    assert Event.from_json(record.value) == event and record.key == b"k-a"
    assert headers_of(record)["content-type"].startswith("application/cloudevents+json")


async def test_a_dead_letter_keeps_its_bytes_and_reason(broker: Broker):
    """The bytes are the value, the sender's headers stay, the reason and where it came from are
    headers too.
    """
    topic = await broker.create()
    sink = KafkaSink(topic, bootstrap_servers=broker.server)
    junk = Event(id="junk", source="/in", type="eventflow.undecodable", data=b"{not json")
    await sink.send(message(junk, reason="not JSON", subscription="", headers={"x-key": "7"}))
    await sink.close()
    (record,) = await broker.read(topic, 1)
    headers = headers_of(record)
    assert record.value == b"{not json" and headers["x-key"] == "7"
    errors = {
        name.removeprefix("eventflow.error."): text
        for name, text in headers.items()
        if name.startswith("eventflow.error.")
    }
    assert (
        errors.items()
        >= {"reason": "not JSON", "id": "junk", "source": "/in", "ledger_id": format_id(7)}.items()
    )


async def test_p9_what_is_too_large_is_permanent_and_the_others_arrive(
    broker: Broker, tmp_path: Path
):
    """An event above `max_request_size` is a dead letter of its sink; those before and after it
    arrive.
    """
    topic = await broker.create()
    app = App("large", store=f"sqlite:///{tmp_path / 'large.db'}", ballast=0, free_floor=0)
    app.send("note", KafkaSink(topic, bootstrap_servers=broker.server, max_request_size=2_000))
    async with app:
        sizes = (10, 5_000, 10)
        await app.accept(
            *[
                Event(id=f"e-{n}", source="/t", type="note", data="x" * size)
                for n, size in enumerate(sizes)
            ]
        )

        async def dead() -> Any:
            return await app.store.dead_letters()

        await eventually(dead, "the large one is dead")
        (found,) = await dead()
        assert found["event_id"] == "e-1" and "too large" in found["reason"]
        ids = {headers_of(record)["ce_id"] for record in await broker.read(topic, 2)}
        assert ids <= {"e-0", "e-2"}


async def test_p2_topic_to_topic_over_two_lives(tmp_path: Path):
    """Records in, a flow, its emits out: over two lives of ours every order is scored, and its
    score sent.
    """
    with given_or_noida(tmp_path / "broker") as broker:
        orders, scored = await broker.create(), await broker.create()

        @flow
        async def score(n: int) -> None:
            await emit("order.scored", {"n": n, "score": n * 2}, subject=f"order/{n}")

        def app() -> App:
            made = App("chain", store=f"sqlite:///{tmp_path / 'chain.db'}", ballast=0, free_floor=0)
            made.on(
                Kafka(
                    orders,
                    bootstrap_servers=broker.server,
                    group_id="chain",
                    session_timeout_ms=6_000,
                ),
                score,
            )
            made.send(
                "order.scored",
                KafkaSink(scored, bootstrap_servers=broker.server, request_timeout_ms=5_000),
            )
            return made

        await broker.send(orders, *({"n": n} for n in range(30)))
        async with app() as first:
            await eventually(lambda: _completed(first, 10), "some are done")
        async with app() as second:
            await eventually(lambda: _completed(second, 30), "all are done")
            await eventually(lambda: _sent_all(second), "all are sent")
        found = [orjson.loads(record.value)["n"] for record in await broker.read(scored, 30)]
        assert sorted(set(found)) == list(range(30))


async def _completed(app: App, count: int) -> bool:
    return (await app.store.counts())["completed"] >= count


async def _sent_all(app: App) -> bool:
    return not await app.store.outbox_depths()


async def test_a_broker_that_is_away_is_a_failure_that_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without a broker the sink fails and reports it; nothing is lost, no flow waits."""
    monkeypatch.setattr("eventflow.sinks.relay.RETRY_DELAY_SECONDS", 0.05)
    monkeypatch.setattr("eventflow.sinks.relay.MAX_RETRY_DELAY_SECONDS", 0.2)
    app = App("away", store=f"sqlite:///{tmp_path / 'away.db'}", ballast=0, free_floor=0)
    app.send("note", KafkaSink("t", bootstrap_servers="127.0.0.1:9", request_timeout_ms=1_000))
    async with app:
        await app.emit("note", {"n": 1})
        health = app.runtime.relay.health["events/kafka:t"]
        await eventually(lambda: health.failures >= 2, "it was tried again")
        assert health.last_error is not None and "127.0.0.1" in health.last_error
        assert (await app.store.outbox_depths())["events/kafka:t"][0] == 1


BAD_MESSAGES: dict[str, tuple[Event, dict[str, Any]]] = {
    "key= raises": (Event(id="a", source="/s", type="t"), {"key": lambda event: event.data["no"]}),
    "key= returns a number": (Event(id="a", source="/s", type="t"), {"key": lambda event: 7}),
    "text that is not Unicode": (Event(id="a", source="/s", type="t", subject="\ud800"), {}),
}


@pytest.mark.parametrize("kind", BAD_MESSAGES)
@pytest.mark.parametrize("mode", ["binary", "structured"])
async def test_a_message_that_is_no_record_holds_up_no_other(broker: Broker, kind: str, mode: Any):
    """A message that no record can be made of is Permanent, so that the outbox sets it aside; the
    sink sends the others.
    """
    bad, options = BAD_MESSAGES[kind]
    topic = await broker.create()
    sink = KafkaSink(topic, bootstrap_servers=broker.server, mode=mode, **options)
    with pytest.raises(Permanent):
        await sink.send(message(bad))
    await sink.close()
    others = KafkaSink(topic, bootstrap_servers=broker.server, mode=mode)
    await others.send(message(Event(id="b", source="/s", type="t", data=1)))
    await others.close()
    assert len(await broker.read(topic, 1)) == 1


def test_mistakes_are_reported_when_the_sink_is_made():
    """An unknown option, one that the guarantees need, a mode that is none, an empty topic."""
    with pytest.raises(UsageError, match="did you mean linger_ms"):
        KafkaSink("t", linger_m=5)
    with pytest.raises(UsageError, match="acks= cannot be set"):
        KafkaSink("t", acks=1)
    with pytest.raises(UsageError, match="mode="):
        KafkaSink("t", mode="avro")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="topic"):
        KafkaSink("")
    assert issubclass(Permanent, Exception)
