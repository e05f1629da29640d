"""What each kind of record becomes: an event with its attributes, or a dead letter with its bytes.
Through a real broker.
"""

import asyncio
import base64
import json
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import pytest
from aiokafka.structs import ConsumerRecord

from eventflow.core.errors import EmptySecret, MissingExtra, UsageError
from eventflow.events.event import Event
from tests.brokers import Broker, given_or_noida, now_ms
from tests.conftest import eventually
from tests.garbage import leaving_no_error_cycles
from tests.triggers.kafka_topic import Topic, make_topic
from triggers import env, record_headers
from triggers._kafka import session
from triggers._kafka.options import reveal_passwords
from triggers._kafka.records import RecordReader
from triggers.kafka import Kafka

STRUCTURED = [("content-type", b"application/cloudevents+json; charset=UTF-8")]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with given_or_noida(tmp_path_factory.mktemp("broker")) as running:
        yield running


def run(broker: Broker, work: Callable[[Topic], Awaitable[None]], **options: Any) -> Topic:
    """`work` with a new topic."""

    async def go() -> Topic:
        topic = await make_topic(broker, **options)
        await work(topic)
        return topic

    return asyncio.run(go())


def ce(name: str, **more: str) -> list[tuple[str, bytes]]:
    attributes = {
        "specversion": "1.0",
        "id": name,
        "source": "/shop",
        "type": "order.placed",
        **more,
    }
    return [(f"ce_{key}", value.encode()) for key, value in attributes.items() if value]


# ------------------------------------------------------------------ plain records


def test_k1_plain_json(broker: Broker):
    """K1: a record's topic, partition, offset, timestamp, key, headers and value are in its
    event.
    """
    at = now_ms()

    async def work(topic: Topic) -> None:
        headers = [
            ("trace", b"one"),
            ("trace", b"two"),
            ("empty", b""),
            ("bin", b"\xff\x00"),
            ("traceparent", b"00-ab-cd-01"),
        ]
        await topic.send({"total": 3}, key=b"customer-7", headers=headers, at=at)
        async with topic.read():
            await topic.has(1)
        (event,) = topic.events
        assert event.id == f"0:0:{at}" and event.source == f"kafka://test/{topic.name}"
        assert event.type == "io.eventflow.kafka.record" and event.subject == "customer-7"
        assert event.time == datetime.fromtimestamp(at // 1000, UTC).replace(
            microsecond=at % 1000 * 1000
        )
        assert event.data == {"total": 3} and event.datacontenttype == "application/json"
        assert (
            event.extensions["kafkatopic"] == topic.name and event.extensions["kafkapartition"] == 0
        )
        assert (
            event.extensions["kafkaoffset"] == "0"
            and event.extensions["traceparent"] == "00-ab-cd-01"
        )
        assert record_headers(event) == headers
        again = Event.from_json(event.to_json())
        assert record_headers(again) == headers and again.data == event.data

    run(broker, work)


def test_k3_tombstones(broker: Broker):
    """K3: a record without value is a tombstone with no data; left out if asked, and the offset
    advances all the same.
    """

    async def work(topic: Topic) -> None:
        await topic.send({"n": 1}, None, key=b"k")
        async with topic.read():
            await topic.has(2)
            await topic.committed(2)
        assert topic.events[1].data is None and topic.events[1].extensions["kafkatombstone"] is True
        assert topic.events[1].subject == "k"
        await topic.send(None, None, key=b"k")
        async with topic.read(skip_tombstones=True):
            await topic.committed(4)
        assert topic.cursor() == 4 and len(topic.events) == 2

    run(broker, work)


def test_k4_an_empty_value(broker: Broker):
    """K4: an empty value is not JSON, so it is a dead letter; with decode="bytes" it is data."""

    async def work(topic: Topic) -> None:
        await topic.send(b"")
        async with topic.read():
            await topic.has(1)
        assert topic.dead_letters[0].body == b"" and topic.events == []
        await topic.send(b"", b"\x00\xff")
        async with topic.read(decode="bytes"):
            await topic.has(3)
        assert topic.data == [b"", b"\x00\xff"]
        assert {event.datacontenttype for event in topic.events} == {"application/octet-stream"}

    run(broker, work)


def test_k6_keys_that_are_not_text(broker: Broker):
    """K6: a key that is not UTF-8 is no subject; it is kept in base64, and lanes go by its bytes.
    An empty key is one too.
    """

    async def work(topic: Topic) -> None:
        for key in (b"\xff\x01", b"", None):
            await topic.send({"key": str(key)}, key=key)
        async with topic.read():
            await topic.has(3)
        raw, empty, none = topic.events
        assert (
            raw.subject is None
            and raw.extensions["partitionkey"]
            == f"base64:{base64.b64encode(bytes([255, 1])).decode()}"
        )
        assert empty.subject is None and empty.extensions["partitionkey"] == "base64:"
        assert none.subject is None and "partitionkey" not in none.extensions

    run(broker, work)


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_k7_codecs(broker: Broker, codec: str):
    """K7: records compressed with each codec are read."""

    async def work(topic: Topic) -> None:
        await topic.send(*({"n": n, "text": "x" * 200} for n in range(50)), compression_type=codec)
        async with topic.read():
            await topic.has(50)
        assert [data["n"] for data in topic.data] == list(range(50))

    run(broker, work)


# ------------------------------------------------------------------ CloudEvents


def test_binary_cloudevents(broker: Broker):
    """A record with ce_ headers is that CloudEvent: its attributes, its data by its content type,
    its own identity.
    """

    async def work(topic: Topic) -> None:
        json_type = [("content-type", b"application/json")]
        await topic.send(
            {"n": 1},
            headers=[
                *ce("one", subject="s", tenant="blue", time="2026-01-31T08:00:00Z"),
                *json_type,
            ],
        )
        await topic.send(
            b"\x00raw", key=b"k", headers=[*ce("two"), ("content-type", b"application/x-thing")]
        )
        await topic.send(None, key=b"k", headers=ce("three"))
        async with topic.read():
            await topic.has(3)
        one, two, three = topic.events
        assert (one.id, one.source, one.type, one.subject) == ("one", "/shop", "order.placed", "s")
        assert one.time == datetime(2026, 1, 31, 8, tzinfo=UTC) and one.data == {"n": 1}
        assert one.extensions == {"tenant": "blue"} and one.datacontenttype == "application/json"
        assert two.data == b"\x00raw" and two.extensions == {"partitionkey": "k"}
        assert three.data is None and three.extensions["kafkatombstone"] is True

    run(broker, work)


def test_k9_a_structured_cloudevent_that_repeats_its_headers(broker: Broker):
    """K9: the content type decides: a structured event with ce_ headers besides is that event, and
    not wrapped twice.
    """

    async def work(topic: Topic) -> None:
        fields = {
            "specversion": "1.0",
            "id": "s1",
            "source": "/shop",
            "type": "order.placed",
            "data": {"n": 1},
        }
        await topic.send(fields, headers=[*STRUCTURED, *ce("s1")])
        await topic.send(
            fields | {"id": "s2"},
            headers=[("Content-Type", b"Application/CloudEvents+JSON")],
            key=b"k",
        )
        async with topic.read():
            await topic.has(2)
        assert [event.id for event in topic.events] == ["s1", "s2"] and topic.data == [
            {"n": 1},
            {"n": 1},
        ]
        assert topic.events[1].extensions == {"partitionkey": "k"}

    run(broker, work)


@pytest.mark.parametrize(
    ("value", "headers", "why"),
    [
        (b"{}", ce("", type="t"), "id: expected a non-empty string"),
        (b"{}", [("ce_id", b"x")], "specversion"),
        (b"{}", [*ce("x"), ("ce_data", b"x")], "ce_data"),
        (b"{}", [*ce("x"), ("ce_thing", b"\xff")], "expected UTF-8"),
        (b"[]", STRUCTURED, "expected a JSON object"),
        (b"{", STRUCTURED, ""),
        (b"[{}]", [("content-type", b"application/cloudevents-batch+json")], "batch"),
    ],
    ids=["no id", "no version", "data header", "not UTF-8", "no object", "broken", "batch"],
)
def test_k10_cloudevents_that_are_none(
    broker: Broker, value: bytes, headers: list[tuple[str, bytes]], why: str
):
    """K10: a CloudEvent without id gets no invented one; it and other broken ones are dead letters,
    bytes and headers kept.
    """

    async def work(topic: Topic) -> None:
        await topic.send(value, headers=headers)
        await topic.send({"n": 1})
        async with topic.read():
            await topic.has(2)
            await topic.committed(2)
        (dead_letter,) = topic.dead_letters
        assert dead_letter.body == value and why in dead_letter.error and topic.data == [{"n": 1}]
        assert (
            dead_letter.headers["kafka-topic"] == topic.name
            and dead_letter.headers["kafka-offset"] == "0"
        )
        assert dead_letter.headers.keys() >= {name for name, _ in headers}

    run(broker, work)


def test_k12_one_cloudevent_on_two_topics(broker: Broker):
    """K12: a CloudEvent is itself wherever it comes from: on two topics it is recorded once."""

    async def work(topic: Topic) -> None:
        second = await broker.create()
        await broker.send(second, {"n": 1}, headers=ce("same"))
        await topic.send({"n": 1}, headers=ce("same"))
        both = Kafka(
            topic.name,
            second,
            group_id=topic.group,
            bootstrap_servers=broker.server,
            name="kafka",
            metadata_max_age_ms=1000,
        )
        topic.triggers.append(both)
        task = asyncio.create_task(both.listen(topic.ledger))
        try:
            await topic.committed(1)
            await eventually(lambda: len(topic.ledger.offered) == 2, "both are offered")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert len(topic.ledger.recorded) == 1

    run(broker, work)


def test_cloudevents_as_the_sdk_writes_them(broker: Broker):
    """What the CloudEvents SDK writes, in either mode, is read as what it meant."""
    from cloudevents.core.bindings.kafka import to_binary, to_structured
    from cloudevents.core.formats.json import JSONFormat
    from cloudevents.core.v1.event import CloudEvent

    event = CloudEvent(
        {"id": "sdk", "source": "/sdk", "type": "t", "specversion": "1.0", "subject": "é"}, {"n": 1}
    )

    async def work(topic: Topic) -> None:
        for message in (to_binary(event, JSONFormat()), to_structured(event, JSONFormat())):
            value = (
                message.value if isinstance(message.value, bytes) else str(message.value).encode()
            )
            await topic.send(value, headers=list(message.headers.items()))
        async with topic.read():
            await eventually(lambda: len(topic.ledger.offered) == 2, "both are offered")
        binary, structured = topic.ledger.offered
        assert isinstance(binary, Event) and isinstance(structured, Event)
        assert (binary.id, binary.subject, binary.data) == (
            structured.id,
            structured.subject,
            structured.data,
        )
        assert (binary.id, binary.subject, binary.data) == ("sdk", "é", {"n": 1})

    run(broker, work)


# ------------------------------------------------------------------ what cannot be read


def test_undecodable_records_do_not_stop_a_partition(broker: Broker):
    """A record that is no JSON is a dead letter with value, key, headers and coordinates; those
    around it are events.
    """

    async def work(topic: Topic) -> None:
        await topic.send({"n": 1})
        await topic.send(b'{"n": ', key=b"\xff", headers=[("h", b"v"), ("raw", b"\xff")])
        await topic.send({"n": 3})
        async with topic.read():
            await topic.has(3)
            await topic.committed(3)
        (dead_letter,) = topic.dead_letters
        assert topic.data == [{"n": 1}, {"n": 3}] and dead_letter.body == b'{"n": '
        coordinates = {
            "h": "v",
            "raw": "base64:/w==",
            "kafka-key": "base64:/w==",
            "kafka-partition": "0",
            "kafka-offset": "1",
        }
        assert coordinates.items() <= dead_letter.headers.items()

    run(broker, work)


def test_c7_the_largest_value(broker: Broker):
    """C7: a value of exactly the limit is an event; one byte more is a dead letter with all its
    bytes.
    """
    fits = b'"' + b"x" * 998 + b'"'

    async def work(topic: Topic) -> None:
        await topic.send(fits, fits[:-1] + b'x"')
        async with topic.read(max_body=1000):
            await topic.has(2)
        assert topic.data == ["x" * 998]
        assert (
            len(topic.dead_letters[0].body) == 1001
            and "at most 1000 bytes, found 1001" in topic.dead_letters[0].error
        )

    run(broker, work)


def test_headers_and_keys_have_a_bound(broker: Broker):
    """Headers or a key over 64 KiB are refused, and the record kept as a dead dead_letter."""

    async def work(topic: Topic) -> None:
        await topic.send({"n": 1}, headers=[("h", b"x" * 70_000)])
        await topic.send({"n": 2}, headers=[*ce("x"), ("h", b"x" * 70_000)])
        await topic.send({"n": 3}, key=b"x" * 70_000)
        async with topic.read():
            await topic.has(3)
        assert ["headers" in each.error for each in topic.dead_letters] == [
            True,
            True,
            False,
        ] and "key" in topic.dead_letters[2].error
        assert [each.body for each in topic.dead_letters] == [b'{"n":1}', b'{"n":2}', b'{"n":3}']

    run(broker, work)


def test_timestamps_that_no_calendar_has(broker: Broker):
    """A producer that writes microseconds where milliseconds belong gets events all the same,
    without a time.
    """
    reader = RecordReader("test", "json", 1000, skip_tombstones=False)
    for stamp in (-1, now_ms() * 1000, 2**63 - 1):
        record: Any = ConsumerRecord("t", 0, 7, stamp, 0, None, b"1", None, -1, 1, ())
        event = reader.read(record)
        assert isinstance(event, Event) and event.time is None and event.id == f"0:7:{stamp}"

    async def work(topic: Topic) -> None:
        await topic.send({"n": 1}, at=now_ms() * 1000)
        async with topic.read():
            await topic.has(1)
        assert topic.data == [{"n": 1}] and topic.events[0].time is None

    run(broker, work)


def test_c8_difficult_texts(broker: Broker):
    """C8: U+0000, right-to-left marks, emoji come back as they were; a lone surrogate is no text,
    and its bytes are kept.
    """
    text = "\x00 \u202e עברית 🎉 \U0001f9d1\u200d\U0001f680 é"

    async def work(topic: Topic) -> None:
        lone = b'"\\ud800"'
        await topic.send({"text": text}, lone, key=text.encode())
        async with topic.read():
            await topic.has(2)
        assert topic.events[0].data == {"text": text} and topic.events[0].subject == text
        assert Event.from_json(topic.events[0].to_json()).data == {"text": text}
        assert topic.dead_letters[0].body == lone

    run(broker, work)


# ------------------------------------------------------------------ decode=


def test_a_decoder_makes_data_or_an_event(broker: Broker):
    """decode= gets the record; what it returns is the data, or the whole event; for a binary
    CloudEvent it is the data.
    """

    def decode(record: Any) -> Any:
        number = int(record.value)
        return (
            Event(id=f"own-{number}", source="/own", type="own", data=number)
            if number > 9
            else {"n": number}
        )

    async def work(topic: Topic) -> None:
        await topic.send(b"1", b"10")
        await topic.send(b"2", headers=ce("c"))
        async with topic.read(decode=decode):
            await topic.has(3)
        first, own, cloud = topic.events
        assert first.data == {"n": 1} and first.id.startswith("0:0:")
        assert (own.id, own.source, own.data) == ("own-10", "/own", 10)
        assert (cloud.id, cloud.data) == ("c", {"n": 2})

    run(broker, work)


def test_a_decoder_that_raises_makes_a_dead_letter(broker: Broker):
    """What decode= raises is the reason of the record's dead letter; the partition is read on."""

    def decode(record: Any) -> Any:
        return {"half": 10 / int(record.value)}

    async def work(topic: Topic) -> None:
        await topic.send(b"0", b"2")
        async with topic.read(decode=decode):
            await topic.has(2)
        assert topic.data == [{"half": 5.0}]
        assert (
            "ZeroDivisionError" in topic.dead_letters[0].error
            and topic.dead_letters[0].body == b"0"
        )

    run(broker, work)


def test_a_decoder_whose_data_cannot_be_recorded_makes_a_dead_letter(broker: Broker):
    """What JSON would refuse or change (a lone surrogate, an integer of 70 bits, NaN, an object) is
    a dead letter with the record's bytes, for plain records, own events and CloudEvents alike; the
    records beside it are events.
    """
    made: dict[bytes, Any] = {
        b"good": {"n": 1},
        b"surrogate": "a\ud800",
        b"integer": {"n": 2**70},
        b"nan": [float("nan")],
        b"object": object(),
        b"event": Event(id="a\ud800", source="/own", type="own"),
        b"event without id": Event(id=cast(Any, None), source="/own", type="own"),
        b"last": "last",
    }

    async def work(topic: Topic) -> None:
        await topic.send(*made)
        await topic.send(b"surrogate", headers=ce("c"))
        async with topic.read(decode=lambda record: made[record.value]):
            await topic.has(len(made) + 1)
        assert topic.data == [{"n": 1}, "last"]
        bodies = [letter.body for letter in topic.dead_letters]
        assert bodies == [*list(made)[1:-1], b"surrogate"]
        assert all("cannot be recorded" in letter.error for letter in topic.dead_letters)

    run(broker, work)


def test_a_decoder_that_does_not_return_is_reported(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
):
    """While decode= stands still, the condition says so, once in the log; then all is read."""
    monkeypatch.setattr(session, "SLOW_DECODER_SECONDS", 0.2)
    go_on = threading.Event()

    async def work(topic: Topic) -> None:
        await topic.send(b"1", b"2")
        async with topic.read(decode=lambda record: go_on.wait(30) and "decoded"):
            await eventually(
                lambda: "decode= has not returned" in (topic.trigger.condition or ""),
                "the condition names the decoder",
            )
            assert len(topic.logged("kafka.decoder_slow")) == 1
            go_on.set()
            await topic.has(2)
            await eventually(lambda: topic.trigger.condition is None, "it goes on")
        assert topic.data == ["decoded", "decoded"]

    run(broker, work)


class Registry(BaseHTTPRequestHandler):
    """A schema registry with one schema, number 7."""

    down = False
    asked = 0
    SCHEMA = json.dumps(
        {"type": "record", "name": "Payment", "fields": [{"name": "amount", "type": "long"}]}
    )

    def do_GET(self) -> None:
        Registry.asked += 1
        known = self.path == "/schemas/ids/7"
        self.send_response(503 if Registry.down else 200 if known else 404)
        self.end_headers()
        self.wfile.write(
            json.dumps({"schema": self.SCHEMA} if known else {"error_code": 40403}).encode()
        )

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def registry() -> Iterator[str]:
    Registry.down = False
    Registry.asked = 0
    server = HTTPServer(("127.0.0.1", 0), Registry)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def guide_decoder() -> Any:
    """The class that the guide shows."""
    text = (Path(__file__).parents[2] / "docs/guides/kafka.md").read_text()
    code = text.partition("```python\n# avro.py\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("RetryAfter(5,", "RetryAfter(0.2,"), names)
    return names["Avro"]


def framed(amount: int, schema: int = 7) -> bytes:
    import fastavro

    body = BytesIO()
    fastavro.schemaless_writer(
        body, fastavro.parse_schema(json.loads(Registry.SCHEMA)), {"amount": amount}
    )
    return struct.pack(">bI", 0, schema) + body.getvalue()


def test_avro_with_a_schema_registry(broker: Broker, registry: str):
    """The guide's decoder: framed records are data, an unknown schema and a stranger's bytes are
    dead letters.
    """

    async def work(topic: Topic) -> None:
        await topic.send(framed(1), framed(2), framed(3, schema=8), b"\x01plain", framed(4))
        async with topic.read(decode=guide_decoder()(registry)):
            await topic.has(5)
        assert topic.data == [{"amount": 1}, {"amount": 2}, {"amount": 4}]
        assert (
            "no schema 8" in topic.dead_letters[0].error
            and "magic byte" in topic.dead_letters[1].error
        )
        assert Registry.asked == 2

    run(broker, work)


def test_a_registry_that_is_away_holds_the_partition_and_loses_nothing(
    broker: Broker, registry: str
):
    """While a decoder asks for time its partition waits, and reports it; what came before is
    recorded, and then all the rest.
    """

    async def work(topic: Topic) -> None:
        decode = guide_decoder()(registry)
        decode.schema(7)
        Registry.down = True
        await topic.send(framed(1), framed(2, schema=9), framed(3))
        async with topic.read(decode=decode):
            await topic.has(1)
            await eventually(
                lambda: "asks for time" in (topic.trigger.condition or ""),
                "it reports what it waits for",
            )
            assert topic.dead_letters == [] and topic.cursor() == 1
            Registry.down = False
            await topic.has(3)
            await topic.committed(3)
        assert (
            topic.data == [{"amount": 1}, {"amount": 3}]
            and "no schema 9" in topic.dead_letters[0].error
        )
        assert [each["log_level"] for each in topic.logged("kafka.partition_stopped")] == [
            "warning"
        ]

    run(broker, work)


# ------------------------------------------------------------------ configuration


async def async_decode(record: Any) -> None:
    """Its coroutine would be the data of every event."""


@pytest.mark.parametrize(
    ("topics", "options", "why"),
    [
        ((), {}, "names of topics"),
        (("a",), {"pattern": "a"}, "not both"),
        ((), {"pattern": "("}, "regular expression"),
        (("a",), {"group_id": ""}, "group_id"),
        (("a",), {"start": "now"}, "start="),
        (("a",), {"start": datetime(2026, 1, 1, tzinfo=UTC).replace(tzinfo=None)}, "naive"),
        (("a",), {"decode": "avro"}, "decode="),
        (("a",), {"decode": async_decode}, "`async`"),
        (("a",), {"on_gap": "ignore"}, "on_gap="),
        (("a",), {"sesion_timeout_ms": 1}, "did you mean session_timeout_ms="),
        (("a",), {"nonsense": 1}, "AIOKafkaConsumer"),
        (("a",), {"enable_auto_commit": True}, "once the ledger has"),
        (("a",), {"auto_offset_reset": "latest"}, "use start="),
        (("a",), {"value_deserializer": bytes}, "use decode="),
        (("a",), {"sasl_mechanism": "PLAIN"}, "security_protocol='SASL_SSL'"),
        (("a",), {"security_protocol": "SSL"}, "ssl_context"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_found_when_it_is_made(
    topics: tuple[str, ...], options: dict[str, Any], why: str
):
    """A mistake in the options is an error at once, which names the correction."""
    with pytest.raises(UsageError) as raised:
        Kafka(*topics, **{"group_id": "g", **options})
    assert why in str(raised.value)


def test_secrets(monkeypatch: pytest.MonkeyPatch):
    """A password may come from the environment by reference; an empty one stops the start."""
    made = Kafka(
        "a", group_id="g", security_protocol="SASL_PLAINTEXT", sasl_plain_password=env("PASSWORD")
    )
    with pytest.raises(EmptySecret, match="PASSWORD"):
        made.check_secrets()
    monkeypatch.setenv("PASSWORD", "open sesame")
    made.check_secrets()
    assert reveal_passwords(made._options.client)["sasl_plain_password"] == "open sesame"
    with pytest.raises(EmptySecret, match="given value"):
        Kafka("a", group_id="g", security_protocol="SASL_PLAINTEXT", sasl_plain_password="")


def test_without_the_extra_the_error_names_the_package():
    """Without aiokafka, importing Kafka names the command that mends it."""
    import subprocess
    import sys

    program = (
        "import sys; sys.modules['aiokafka'] = None\n"
        "import triggers\ntriggers.Webhook\ntriggers.Kafka"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and MissingExtra.__name__ in done.stderr
    assert "pip install 'eventflow-reactor[kafka]'" in done.stderr


def test_two_triggers_of_one_name(tmp_path: Path):
    """C13: two triggers with one name are refused when the app is made."""
    from eventflow import App, flow

    @flow
    async def work() -> None: ...

    app = App("two", store=f"sqlite:///{tmp_path}/two.db")
    app.on(Kafka("a", group_id="g"), work)
    with pytest.raises(UsageError, match="kafka:a"):
        app.on(Kafka("a", group_id="h"), work)


def test_a_record_that_cannot_be_read_leaves_no_error_cycle(broker: Broker):
    """The error of a record that is no JSON, or that the decoder or the ledger refuses, is freed at
    once.
    """

    def refuse(record: ConsumerRecord) -> Any:
        raise LookupError(record.offset)

    def make_a_set(record: ConsumerRecord) -> Any:
        return {record.offset}

    async def work(topic: Topic) -> None:
        for found, decode in enumerate(("json", refuse, make_a_set)):
            with leaving_no_error_cycles():
                await topic.send(b"{")
                async with topic.read(decode=decode):
                    await eventually(
                        lambda found=found: len(topic.dead_letters) > found, "a dead letter"
                    )

    run(broker, work)
