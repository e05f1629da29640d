"""Bodies made to do harm, over real sockets: too large, too slow, packed, nested, ambiguous. Always
a 4xx, never a 500.
"""

import asyncio
import gzip
import json
import resource
import zlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eventflow.events.event import Event, Undecodable
from eventflow.testing.trigger_contract import ContractLedger, listening
from tests.conftest import eventually
from tests.triggers.hooks import Hook, over_http
from tests.triggers.serving import digest, post, raw, serving
from triggers.signatures import GitHub
from triggers.webhook import Webhook

JSON = ("Content-Type", "application/json")
GZIP = ("Content-Encoding", "gzip")


def of_size(size: int) -> bytes:
    return b'{"pad":"' + b"x" * (size - 10) + b'"}'


# --------------------------------------------------------------------------- size and time


@pytest.mark.parametrize("chunked", [False, True])
def test_size_at_the_limit_passes_and_one_more_is_413(chunked: bool):
    """A body of exactly `max_body` bytes is recorded; one more is 413, declared or counted."""

    def request(body: bytes) -> bytes:
        if not chunked:
            return post("/hooks/orders", body, JSON)
        pieces = [body[at : at + 700] for at in range(0, len(body), 700)]
        framed = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        return post("/hooks/orders", framed, JSON, ("Transfer-Encoding", "chunked"), length=False)

    async def check(hook: Hook) -> None:
        assert (await raw(hook.port, request(of_size(5000))))[0] == 202
        status, headers, body = await raw(hook.port, request(of_size(5001)))
        assert status == 413 and headers["connection"] == "close"
        assert json.loads(body) == {
            "error": "too_large",
            "detail": "expected a body of at most 5000 bytes",
        }
        assert len(hook.ledger.offered) == 1

    over_http(check, max_body=5000)


def test_declared_size_is_refused_before_the_body():
    """A Content-Length over the limit is answered at once, without waiting for a byte of
    the body.
    """

    async def check(hook: Hook) -> None:
        for length in ("1048577", "9" * 15):
            head = post("/hooks/orders", b"", JSON, ("Content-Length", length), length=False)
            assert (await raw(hook.port, head))[0] == 413

    over_http(check)


def test_a_large_body_is_refused_without_being_kept():
    """An endless chunked body costs no more memory than the limit, and its sender sees the 413."""

    async def check(hook: Hook) -> None:
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        head = post("/hooks/orders", b"", JSON, ("Transfer-Encoding", "chunked"), length=False)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        status, _, _ = await raw(hook.port, head, chunks=[chunk] * 400)
        assert status == 413
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000

    over_http(check)


def test_slow_bodies_are_408_and_delay_no_others():
    """Senders that trickle are answered 408 in time, while others are served."""

    async def check(hook: Hook) -> None:
        head = post("/hooks/orders", b'{"a"', JSON, ("Content-Length", "9"), length=False)
        slow = [asyncio.create_task(raw(hook.port, head)) for _ in range(50)]
        assert (await hook.post({})).status_code == 202
        answers = await asyncio.gather(*slow)
        assert {status for status, _, _ in answers} == {408}
        assert json.loads(answers[0][2])["error"] == "timeout"
        assert len(hook.ledger.offered) == 1

    over_http(check, body_timeout=0.5)


def test_a_steady_body_may_take_longer_than_a_dripping_one(monkeypatch: pytest.MonkeyPatch):
    """Beyond the first seconds a body must keep up a rate: one that does is recorded, one that
    drips is 408.
    """
    monkeypatch.setattr("eventflow.core.http_body.GRACE_SECONDS", 0.4)
    monkeypatch.setattr("eventflow.core.http_body.MIN_BYTES_PER_SECOND", 100_000)

    async def check(hook: Hook) -> None:
        head = post("/hooks/orders", b"", JSON, ("Content-Length", "400010"), length=False)
        steady = [b'{"pad":"', *[b"x" * 100_000] * 4, b'"}']
        drips = [b'{"pad":"', *[b"x"] * 6]
        answers = await asyncio.gather(
            raw(hook.port, head, chunks=steady, pause=0.15),
            raw(hook.port, head, chunks=drips, pause=0.15),
        )
        assert [status for status, _, _ in answers] == [202, 408]

    over_http(check)


def test_each_request_of_a_connection_has_its_own_body():
    """Requests that are written at once, one of which asks before it sends its body, are recorded
    with the body of each, and so is one whose body is late.
    """

    async def check(hook: Hook) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", hook.port)
        late = post("/hooks/orders", b'{"n":3}', JSON)
        writer.write(
            post("/hooks/orders", b'{"n":1}', JSON)
            + post("/hooks/orders", b'{"n":2}', JSON, ("Expect", "100-continue"))
            + late[:-4]
        )
        await eventually(lambda: len(hook.ledger.offered) == 2, "two are recorded")
        writer.write(late[-4:])
        await eventually(lambda: len(hook.ledger.offered) == 3, "the third is recorded")
        bodies = [getattr(item, "data", None) for item in hook.ledger.offered]
        assert bodies == [{"n": 1}, {"n": 2}, {"n": 3}]
        writer.close()

    over_http(check)


def test_hanging_up_in_the_middle_records_nothing():
    """A sender that goes away before its body is whole leaves no trace."""

    async def check(hook: Hook) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", hook.port)
        writer.write(post("/hooks/orders", b'{"a"', JSON, ("Content-Length", "9"), length=False))
        await writer.drain()
        writer.close()
        assert (await hook.post({})).status_code == 202
        assert len(hook.ledger.offered) == 1

    over_http(check)


def test_p1_hanging_up_after_the_record_still_counts():
    """A sender that goes away while its event is being recorded has delivered it."""

    async def check(hook: Hook) -> None:
        hook.ledger.block()
        _, writer = await asyncio.open_connection("127.0.0.1", hook.port)
        writer.write(post("/hooks/orders", b"{}", JSON))
        await eventually(lambda: hook.ledger.offered, "it is offered")
        writer.close()
        hook.ledger.unblock()
        await eventually(lambda: hook.recorded, "it is recorded")

    over_http(check)


# --------------------------------------------------------------------------- encodings


@pytest.mark.parametrize(
    "encoding", ["gzip", "x-gzip", "deflate", "br", "zstd", "gzip, gzip", "identity, gzip"]
)
def test_encodings_are_refused_unless_taken(encoding: str):
    """Any encoding is 415 by default, saying what is taken."""

    async def check(hook: Hook) -> None:
        answer = await hook.post(gzip.compress(b"{}"), content_encoding=encoding)
        assert answer.status_code == 415 and answer.headers["accept-encoding"] == "identity"

    over_http(check)


def test_gzip_when_taken():
    """With `gzip=True` one layer is unpacked; identity still passes, two layers and other encodings
    do not.
    """

    async def check(hook: Hook) -> None:
        assert (
            await hook.post(gzip.compress(b'{"a": 1}'), content_encoding="GZIP", webhook_id="1")
        ).status_code == 202
        assert hook.event.data == {"a": 1}
        assert (
            await hook.post(
                gzip.compress(b'{"a":') + gzip.compress(b" 1}"), content_encoding="gzip"
            )
        ).status_code == 202
        assert (await hook.post(b"{}", content_encoding="identity")).status_code == 202
        for encoding in ("gzip, gzip", "deflate", "br"):
            assert (await hook.post(b"{}", content_encoding=encoding)).status_code == 415

    over_http(check, gzip=True)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (gzip.compress(of_size(1 << 20)), 202),
        (gzip.compress(of_size((1 << 20) + 1)), 413),
        (gzip.compress(bytes(1 << 30 >> 4)), 413),  # 64 MiB of zeros in 64 KiB: 1000 to 1
        (gzip.compress(b"") * 63 + gzip.compress(b"{}"), 202),
        (gzip.compress(b"") * 64 + gzip.compress(b"{}"), 400),
        (gzip.compress(gzip.compress(b"{}")), 400),
        (gzip.compress(b"{}")[:-1], 400),
        (gzip.compress(b"{}") + b"trailing", 400),
        (zlib.compress(b"{}"), 400),
        (b"{}", 400),
        (b"", 202),
    ],
    ids=[
        "limit",
        "over",
        "bomb",
        "members",
        "too many members",
        "twice",
        "cut",
        "trailing",
        "zlib",
        "plain",
        "empty",
    ],
)
def test_gzip_bombs(body: bytes, status: int):
    """The cap holds on the unpacked side, members are counted, and what is no gzip is a 400."""

    async def check(hook: Hook) -> None:
        answer = await hook.post(body, content_encoding="gzip")
        assert answer.status_code == (400 if body == b"" else status), answer.text

    over_http(check, gzip=True)


def test_a_dead_letter_has_the_encoding_of_its_bytes():
    """The body of a dead letter has its Content-Encoding: none once it was unpacked."""

    async def check(hook: Hook) -> None:
        for packed in (gzip.compress(b"no json"), b"no gzip"):
            await hook.post(packed, content_encoding="gzip")
        found = [(item.body, item.headers.get("content-encoding")) for item in hook.dead_letters]
        assert found == [(b"no json", None), (b"no gzip", "gzip")]

    over_http(check, gzip=True)


@pytest.mark.parametrize("over", ["wire", "unpacked"])
def test_packed_bodies_are_signed_either_way(over: str):
    """A signature over the bytes sent or over what they unpack to is taken; a forged one is not."""
    body = b'{"ref": "main"}'
    packed = gzip.compress(body)
    signature = "sha256=" + digest(b"s3cret", packed if over == "wire" else body).hex()

    async def check(hook: Hook) -> None:
        headers = {"content-encoding": "gzip", "x-hub-signature-256": signature}
        assert (await hook.post(packed, **headers)).status_code == 202
        assert (await hook.post(gzip.compress(b'{"ref": "other"}'), **headers)).status_code == 401

    over_http(check, gzip=True, verify=GitHub("s3cret"))


# --------------------------------------------------------------------------- JSON


UNREADABLE = {
    "empty": b"",
    "blank": b"  ",
    "cut": b'{"a": 1',
    "trailing": b"{} {}",
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "overflow": b'{"a": 1e999}',
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "twice": b'{"a": 1, "a": 2}',
    "twice escaped": b'{"a": 1, "\\u0061": 2}',
    "twice deep": b'{"x": [{"a": ":", "b" : {"c": 1, "c": 1}}]}',
    "twice hidden by a quoted colon": b'{"a":":","a":1}',
    "deep": b"[" * 65 + b"]" * 65,
    "deeper": b"[" * 5000 + b"]" * 5000,
    "many keys": b"{" + b",".join(b'"k%d":1' % n for n in range(10_001)) + b"}",
    "lone surrogate": b'{"a": "\\ud800"}',
    "latin-1": b'{"a": "\xe9"}',
    "two BOMs": b"\xef\xbb\xbf\xef\xbb\xbf{}",
    "utf-16 without a BOM": '{"a": 1}'.encode("utf-16-le"),
    "single quotes": b"{'a': 1}",
    "comment": b'{"a": 1 /* x */}',
}


@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_p9_unreadable_json_is_400_and_kept(body: bytes):
    """Signed JSON that cannot be read, or could be read two ways, is 400, and a dead letter with
    its id and bytes.
    """

    async def check(hook: Hook) -> None:
        headers = {
            "x-hub-signature-256": "sha256=" + digest(b"s3cret", body).hex(),
            "x-github-delivery": "g1",
        }
        answer = await hook.post(
            body, **headers, authorization="Basic eA==", user_agent="GitHub-Hookshot"
        )
        assert answer.status_code == 400 and answer.json()["error"] == "unreadable"
        (item,) = hook.recorded
        assert isinstance(item, Undecodable)
        assert (item.id, item.source, item.body) == ("g1", "/hooks/orders", body)
        assert item.error == answer.json()["detail"]
        assert item.headers == {"content-type": "application/json", "user-agent": "GitHub-Hookshot"}

    over_http(check, verify=GitHub("s3cret"))


READABLE = {
    "deep": b"[" * 64 + b"]" * 64,
    "keys": b"{" + b",".join(b'"k%d":1' % n for n in range(10_000)) + b"}",
    "same key in two objects": b'[{"a":1},{"a":2},{"b":{"a":3}}]',
    "quoted colons": b'{"a":":","b":"\\":","c" :1,"at":"2026-01-01T00:00:00Z"}',
    "text": '{"a": "\\u0000 \u202e \U0001f600 é \\n"}'.encode(),
    "scalar": b"5",
    "null": b"null",
    "blanks": b' \r\n\t{ "a" :\t1 } ',
}


@pytest.mark.parametrize("body", READABLE.values(), ids=READABLE.keys())
def test_readable_json_is_recorded_as_it_means(body: bytes):
    """Any JSON within the limits is recorded with exactly its meaning."""

    async def check(hook: Hook) -> None:
        assert (await hook.post(body)).status_code == 202
        assert hook.event.data == json.loads(body)
        assert Event.from_json(hook.event.to_json()).data == json.loads(body)

    over_http(check)


@pytest.mark.parametrize(
    "media",
    ["text/csv", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "a"],
)
def test_other_types_are_415(media: str):
    """By default only JSON is accepted; the response names what is expected, and the body is kept
    as a dead letter. No type at all counts as JSON.
    """

    async def check(hook: Hook) -> None:
        answer = await hook.post(b'{"a": 1}', content_type=media)
        assert answer.status_code == 415 and "application/json" in answer.json()["detail"]
        assert [item.body for item in hook.dead_letters] == [b'{"a": 1}']
        assert (await raw(hook.port, post("/hooks/orders", b"{}")))[0] == 202
        assert (
            await hook.post(b"{}", content_type="application/vnd.shop+json; charset=utf-8")
        ).status_code == 202

    over_http(check)


def test_forms():
    """With content="form" the fields come as an object, a repeated one as the list of its values,
    whatever byte order mark precedes the first; JSON is 415.
    """

    async def check(hook: Hook) -> None:
        form = "application/x-www-form-urlencoded"
        assert (
            await hook.post(b"payload=%7B%7D&empty=&caf%C3%A9=1", content_type=form)
        ).status_code == 202
        assert hook.event.data == {"payload": "{}", "empty": "", "café": "1"}
        for mark in (b"\xef\xbb\xbf", b"%EF%BB%BF"):
            body = mark + b"a=1&b=2&a=3&a="
            assert (await hook.post(body, content_type=form)).status_code == 202
            assert hook.events[-1].data == {"a": ["1", "3", ""], "b": "2"}
        for wrong in (b"a=%FF", b"\xff", b"&".join(b"f%d=1" % n for n in range(5001))):
            assert (await hook.post(wrong, content_type=form)).status_code == 400
        assert (await hook.post(b"{}")).status_code == 415

    over_http(check, content="form", max_keys=5000)


def test_raw_bytes():
    """With content="raw" any bytes are the data, with their content type."""
    body = bytes(range(256))

    async def check(hook: Hook) -> None:
        assert (await hook.post(body, content_type="image/png")).status_code == 202
        assert (hook.event.data, hook.event.datacontenttype) == (body, "image/png")

    over_http(check, content="raw")


# --------------------------------------------------------------------------- anything at all

HEADER_TEXT = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=30
).map(str.strip)
NAMES = st.sampled_from(
    "webhook-id webhook-timestamp webhook-signature ce-id ce-source ce-type ce-specversion ce-time "
    "ce-data ce-data_base64 ce-é "
    "ce-datacontenttype ce-x content-type content-encoding idempotency-key authorization "
    "x-tenant cookie accept".split()
)
MEDIA = st.sampled_from(
    [
        "application/json",
        "application/cloudevents+json",
        "application/cloudevents-batch+json",
        "text/plain",
        "application/json;",
        "",
    ]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
NAMED = st.sampled_from(
    "specversion id source type time subject data data_base64 datacontenttype x X é".split()
) | st.text(max_size=3)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMED, inner, max_size=5),
    max_leaves=8,
)
EVENTS = st.fixed_dictionaries(
    {
        "specversion": st.just("1.0") | LEAVES,
        "id": st.text(max_size=3) | LEAVES,
        "source": st.just("/s"),
        "type": st.just("t"),
    },
    optional={
        "time": st.just("2026-01-01T00:00:00Z") | LEAVES,
        "data": VALUES,
        "data_base64": LEAVES,
        "x": LEAVES,
    },
)
BODIES = st.binary(max_size=30) | (VALUES | EVENTS | st.lists(EVENTS, max_size=3)).map(
    lambda value: json.dumps(value).encode()
)


def test_never_500_on_input():
    """Whatever a sender sends, the answer is a 2xx or a 4xx, and what is handed to the ledger can
    be written.
    """

    async def main() -> None:
        trigger, ledger = (
            Webhook("/orders", verify="none", gzip=True, keep=["X-Tenant"], id="id"),
            ContractLedger(),
        )
        loop = asyncio.get_running_loop()
        async with serving(trigger.routes) as port, listening(trigger, ledger):
            await loop.run_in_executor(None, hammer, loop, port)

    def hammer(loop: Any, port: int) -> None:
        @settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(BODIES, MEDIA, st.lists(st.tuples(NAMES, HEADER_TEXT), max_size=5))
        def sends(body: bytes, media: str, headers: list[tuple[str, str]]) -> None:
            named = [
                ("Content-Type", media),
                ("Connection", "close"),
                *(pair for pair in headers if pair[0].isascii()),
            ]
            status, _, answer = asyncio.run_coroutine_threadsafe(
                raw(port, post("/hooks/orders", body, *named)), loop
            ).result(30)
            assert status in (200, 202, 400, 409, 415), (status, answer)
            json.loads(answer)

        sends()

    asyncio.run(main())
