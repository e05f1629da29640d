"""What real writers write, at every entry point of a running server: numbers that a float would
round, byte order marks, and events that are refused although their sender is known.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx2
import pytest

from eventflow.serialization.tagged_json import decode_tagged, encode_plain
from tests.brokers import Broker, given_or_noida
from tests.server_process import EventflowProcess, eventflow, serving
from tests.triggers.kafka_topic import make_topic

ROUNDED = [
    "18446744073709551616",
    "-9223372036854775809",
    "123456789012345678901234567890",
    "9" * 5000,
    "18446744073709551617.0",
    "9007199254740993.0",
    "90071992547409.93",
    "0.1234567890123456789",
    "1.8446744073709551617e19",
    "1e400",
    "-1E+400",
    "1e-400",
]
"""Numbers that 64 bits cannot hold: as floats they would be other numbers."""

EXACT = [
    "18446744073709551615",
    "-9223372036854775808",
    "1234567890123456789",
    "0.30000000000000004",
    "0.10000000000000000555",  # all digits of a float, as printf("%.20f") writes them
    "1E30",
    "18446744073709551616.0",
    "5e-324",
    "1.0000000000000000000000",
    '"18446744073709551616"',
    '"é 0.1234567890123456789"',
]

MARKED = ["utf-8-sig", "utf-16", "utf-32"]
"""Encodings that begin with a byte order mark."""

APP = """
import json
from eventflow import App, Event, flow
from triggers import Bearer, DriftAlert, GitHub, HMAC, Webhook

@flow
async def keep(event: Event) -> str:
    return json.dumps(event.data)

@flow
async def take(id) -> str:
    return json.dumps(id)

app = App("shop")
app.on(Webhook("/orders", verify=Bearer("s3cret-token"), gzip=True, max_body=50_000), keep)
app.on(Webhook("/forms", verify=Bearer("s3cret-token"), content="form"), keep)
app.on(DriftAlert("/drift", verify=Bearer("s3cret-token")), keep)
app.on("thing.made", keep)
app.add(take)
"""

BEARER = {"authorization": "Bearer s3cret-token"}
CLOUDEVENT = {"specversion": "1.0", "id": "1", "source": "/s", "type": "thing.made"}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EventflowProcess]:
    folder = tmp_path_factory.mktemp("writers")
    (folder / "shop.py").write_text(APP)
    with serving(folder) as running:
        yield running


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with given_or_noida(tmp_path_factory.mktemp("broker")) as running:
        yield running


class EntryPoint(NamedTuple):
    """An HTTP entry point: `wrap` gives its JSON around a text in the place of a value."""

    path: str
    headers: dict[str, str]
    wrap: Callable[[str], str]

    def post(self, server: EventflowProcess, body: bytes) -> httpx2.Response:
        return server.client.post(self.path, content=body, headers=self.headers)


def around(outer: dict[str, Any], name: str) -> Callable[[str], str]:
    head = json.dumps(outer)[:-1]
    return lambda text: f'{head}, "{name}": {text}}}'


CE_HEADERS = {f"ce-{name}": value for name, value in CLOUDEVENT.items()}
BATCH = {"content-type": "application/cloudevents-batch+json"}
ENTRY_POINTS = {
    "webhook": EntryPoint("/hooks/orders", {**BEARER, **JSON}, lambda text: f'{{"id": {text}}}'),
    "text/plain": EntryPoint(
        "/hooks/orders", {**BEARER, "content-type": "text/plain"}, lambda text: f"[{text}]"
    ),
    "binary": EntryPoint("/hooks/orders", {**BEARER, **JSON, **CE_HEADERS}, lambda text: text),
    "structured": EntryPoint(
        "/api/events",
        {"content-type": "application/cloudevents+json"},
        around(CLOUDEVENT, "data"),
    ),
    "batch": EntryPoint("/api/events", BATCH, lambda text: f"[{around(CLOUDEVENT, 'data')(text)}]"),
    "run": EntryPoint(
        "/api/runs", JSON, lambda text: f'{{"flow": "take", "params": {{"id": {text}}}}}'
    ),
}


@pytest.mark.parametrize("entry", ENTRY_POINTS.values(), ids=ENTRY_POINTS.keys())
def test_no_number_is_rounded_over_http(server: EventflowProcess, entry: EntryPoint):
    """A number that 64 bits cannot hold is refused with its digits; any other one is taken, also a
    long one in a string.
    """
    for text in ROUNDED:
        refused = entry.post(server, entry.wrap(text).encode())
        assert refused.status_code == 400, (text[:40], refused.text)
    for text in EXACT:
        taken = entry.post(server, entry.wrap(text).encode())
        assert taken.status_code in (200, 202, 409), (text, taken.text)


def test_no_number_is_rounded_on_the_command_line(server: EventflowProcess):
    """`-p`, `--params` and `emit -d` refuse such a number (exit 2), or keep its digits as text."""
    for text in ("18446744073709551616", "0.1234567890123456789", "1e400"):
        given = eventflow(server.folder, "run", "shop.py:take", "-p", f"id={text}")
        assert given.returncode == 2 or text in given.stdout, (given.stdout, given.stderr)
        (server.folder / "params.json").write_text(f'{{"id": {text}}}')
        for args in (
            ("run", "shop.py:take", "--params", "@params.json"),
            ("emit", "thing.made", "-d", f'{{"id": {text}}}'),
        ):
            refused = eventflow(server.folder, *args)
            assert refused.returncode == 2, (args, refused.stdout)


@pytest.mark.anyio
async def test_no_number_is_rounded_from_kafka(broker: Broker):
    """A record with such a number is a dead letter with its bytes; its neighbours are events."""
    topic = await make_topic(broker)
    bad = [f'{{"id": {text}}}'.encode() for text in ROUNDED]
    good = [f'{{"id": {text}}}'.encode() for text in EXACT]
    async with topic.read():
        await topic.send(*bad, *good, b'\xef\xbb\xbf{"id": 5}')
        await topic.has(len(bad) + len(good) + 1)
    assert [item.body for item in topic.ledger.dead_letters] == bad
    assert [event.data for event in topic.events] == [
        *({"id": json.loads(text)} for text in EXACT),
        {"id": 5},
    ]


def test_tagged_json_keeps_all_digits():
    """Values of tasks and flows keep integers of any size, at any depth, under both codecs."""
    for number in (2**64, -(2**63) - 1, 10**5000):
        for value in (number, [number], {"a": {"b": (number, 1.5)}}):
            codec, data = encode_plain(value, "value")
            assert codec == "tagged" and decode_tagged(data) == value


@pytest.mark.parametrize("encoding", MARKED)
@pytest.mark.parametrize("entry", ENTRY_POINTS.values(), ids=ENTRY_POINTS.keys())
def test_a_byte_order_mark_is_no_part_of_json(
    server: EventflowProcess, entry: EntryPoint, encoding: str
):
    """JSON after a byte order mark is read as without it, at every entry point."""
    answer = entry.post(server, entry.wrap('{"é": 1}').encode(encoding))
    assert answer.status_code in (200, 202, 409), answer.text


@pytest.mark.parametrize("encoding", MARKED)
def test_a_byte_order_mark_in_a_file_of_parameters(server: EventflowProcess, encoding: str):
    """A file that an editor saved with a byte order mark is JSON for `--params`."""
    (server.folder / "marked.json").write_bytes('{"id": "é"}'.encode(encoding))
    done = eventflow(server.folder, "run", "shop.py:take", "--params", "@marked.json")
    assert done.returncode == 0 and "u00e9" in done.stdout, done.stderr


CHARSETS: dict[str, tuple[str, str, bytes]] = {
    # webhook, content type, body
    "json in latin-1": ("orders", "application/json; charset=ISO-8859-1", b'{"caf\xe9": "\xfc"}'),
    "json in windows-1252": ("orders", 'text/plain;charset="windows-1252"', b'{"caf\xe9": "\xfc"}'),
    "json in utf-16 without a mark": (
        "orders",
        "application/json; charset=utf-16le",
        '{"café": "ü"}'.encode("utf-16-le"),
    ),
    "utf-8 that is called latin-1": (
        "orders",
        "application/json; charset=latin1",
        '{"café": "ü"}'.encode(),
    ),
    "a cloudevent in latin-1": (
        "orders",
        "application/cloudevents+json; charset=iso-8859-15",
        json.dumps(CLOUDEVENT | {"id": "latin"})[:-1].encode() + b', "data": {"caf\xe9": "\xfc"}}',
    ),
    "a form in latin-1": (
        "forms",
        "application/x-www-form-urlencoded; charset=iso-8859-1",
        b"caf\xe9=%FC",
    ),
    "a form in utf-8 that is called latin-1": (
        "forms",
        "application/x-www-form-urlencoded; charset=iso-8859-1",
        b"caf%C3%A9=%C3%BC",
    ),
}


@pytest.mark.parametrize("name", CHARSETS)
def test_a_text_is_read_in_its_charset(server: EventflowProcess, name: str):
    """A body that is not UTF-8 is read in the charset that its Content-Type names."""
    hook, content_type, body = CHARSETS[name]
    headers = {**BEARER, "content-type": content_type}
    answer = server.client.post(f"/hooks/{hook}", content=body, headers=headers)
    assert answer.status_code == 202, answer.text
    assert server.get(f"/api/events/{answer.json()['id']}")["event"]["data"] == {"café": "ü"}


@pytest.mark.parametrize("charset", ["punycode", "utf-7", "hex", "no-such", "a" * 300])
@pytest.mark.parametrize("hook", ["orders", "forms"])
def test_other_charsets_are_refused(server: EventflowProcess, hook: str, charset: str):
    """A text that is neither UTF-8 nor in a charset of text is refused, which names the charset."""
    media = "application/json" if hook == "orders" else "application/x-www-form-urlencoded"
    headers = {**BEARER, "content-type": f"{media}; charset={charset}"}
    body = b'{"a": "\xff"}' if hook == "orders" else b"a=%FF"
    answer = server.client.post(f"/hooks/{hook}", content=body, headers=headers)
    assert answer.status_code == 400 and "charset=utf-8" in answer.json()["detail"]


# --------------------------------------------------------------------------- verified, then refused


def dead(server: EventflowProcess) -> dict[str, str]:
    """The reasons of the dead letters, by the sender's event id."""
    letters = server.get("/api/dead", limit=1000)["dead"]
    return {letter["event_id"]: letter["reason"] for letter in letters}


REFUSED: dict[str, tuple[str, dict[str, str], bytes, int]] = {
    "another type": ("orders", {"content-type": "application/xml"}, b"<order/>", 415),
    "a form": ("orders", {"content-type": "application/x-www-form-urlencoded"}, b"a=1", 415),
    "json for a form": ("forms", JSON, b'{"a": 1}', 415),
    "another type of alert": ("drift", {"content-type": "application/xml"}, b"<alert/>", 415),
    "text that is no json": ("orders", {"content-type": "text/plain"}, b"hello", 400),
    "a number": ("orders", JSON, b'{"n": 1e999}', 400),
    "no alert": ("drift", JSON, b'{"text": "hello"}', 400),
    "another encoding": ("orders", {**JSON, "content-encoding": "br"}, b"\x0b\x02\x80{}\x03", 415),
    "two encodings": (
        "orders",
        {**JSON, "content-encoding": "gzip, gzip"},
        gzip.compress(gzip.compress(b"{}")),
        415,
    ),
    "gzip that is not taken": (
        "forms",
        {"content-type": "application/x-www-form-urlencoded", "content-encoding": "gzip"},
        gzip.compress(b"a=1"),
        415,
    ),
    "damaged gzip": ("orders", {**JSON, "content-encoding": "gzip"}, b"\x1f\x8bno gzip", 400),
    "a gzip bomb": (
        "orders",
        {**JSON, "content-encoding": "gzip"},
        gzip.compress(b" " * 1_000_000),
        413,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_verified_sender_sent_is_kept(server: EventflowProcess, name: str):
    """Anything refused after the proof of its sender held is a dead letter with its bytes, once for
    each content; the same request without the proof leaves nothing.
    """
    hook, headers, body, status = REFUSED[name]
    before = server.get("/api/counts")["dead"]

    def post(**more: str) -> int:
        return server.client.post(
            f"/hooks/{hook}", content=body, headers={**headers, **more}
        ).status_code

    assert post(authorization="Bearer wrong") == 401
    assert server.get("/api/counts")["dead"] == before
    assert [post(**BEARER), post(**BEARER)] == [status, status]
    assert server.get("/api/counts")["dead"] == before + 1
    letter = server.get("/api/dead", limit=1)["dead"][0]
    assert server.get(f"/api/events/{letter['ledger_id']}")["trigger"].endswith(hook)


def test_a_known_id_with_another_body_is_kept_and_redriven(server: EventflowProcess):
    """A conflict is 409 and a dead letter that says which event came first; the same again is no
    second one; redriven, it runs.
    """
    ids = [
        server.client.post(
            "/hooks/orders", content=body, headers={**BEARER, **JSON, "idempotency-key": "twice"}
        )
        for body in (b'{"n": 1}', b'{"n": 2}', b'{"n": 2}', b'{"n": 1}')
    ]
    assert [answer.status_code for answer in ids] == [202, 409, 409, 200]
    first = ids[0].json()["id"]
    (letter,) = [each for each in server.get("/api/dead")["dead"] if each["event_id"] == "twice"]
    assert first in letter["reason"]
    counts = server.get("/api/counts")
    assert counts["accepted"] == sum(
        counts[name]
        for name in ("completed", "failed", "dead", "cancelled", "suppressed", "pending")
    )
    assert server.post(f"/api/dead/{letter['id']}/redrive").status_code == 202

    (run,) = server.get("/api/runs", event=letter["ledger_id"])["runs"]
    assert server.wait_for(run["id"], "completed")["result"] == '{"n": 2}'


def test_a_whole_body_after_a_cut_one_is_an_event(server: EventflowProcess):
    """A body that could not be read does not take the id of the whole one that is sent after it."""
    headers = {**BEARER, **JSON, "idempotency-key": "cut"}
    for body, status in ((b'{"n": ', 400), (b'{"n": 1}', 202), (b'{"n": 1}', 200)):
        answer = server.client.post("/hooks/orders", content=body, headers=headers)
        assert answer.status_code == status


def test_conflicting_events_of_the_api_are_kept(server: EventflowProcess):
    """`POST /api/events` answers 409 as a webhook does, and the event is a dead letter."""
    for data, status in ((1, 202), (2, 409)):
        event = {**CLOUDEVENT, "id": "api-1", "data": data}
        headers = {"content-type": "application/cloudevents+json"}
        answer = server.client.post("/api/events", content=json.dumps(event), headers=headers)
        assert answer.status_code == status
    assert "api-1" in dead(server)
