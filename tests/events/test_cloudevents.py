"""CloudEvents over HTTP: the three modes against the specification's own SDK; rejections name the
field.
"""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from cloudevents.core.bindings.http import to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from eventflow.events.cloudevents import is_cloudevent, parse_cloudevents
from eventflow.events.event import Event
from eventflow.events.strict_json import read_json

STRUCTURED = {"content-type": "application/cloudevents+json; charset=utf-8"}
BATCH = {"content-type": "application/cloudevents-batch+json"}
MINIMAL = {"specversion": "1.0", "id": "1", "source": "/s", "type": "t"}
BINARY = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "/s", "ce-type": "t"}


def sdk_event(data: Any) -> CloudEvent:
    attributes: dict[str, Any] = {
        "id": "id with a space, é and %",
        "source": "/shop/ünïcode",
        "type": "order.placed",
        "subject": "日本",
        "tenant": "t 1",
        "time": datetime(2026, 1, 2, 3, 4, 5, 678000, UTC),
        "datacontenttype": "application/json",
        "dataschema": "urn:schema:1",
    }
    return CloudEvent(attributes=attributes, data=data)


def expected(data: Any) -> Event:
    return Event(
        id="id with a space, é and %",
        source="/shop/ünïcode",
        type="order.placed",
        subject="日本",
        data=data,
        time=datetime(2026, 1, 2, 3, 4, 5, 678000, UTC),
        datacontenttype="application/json",
        dataschema="urn:schema:1",
        extensions={"tenant": "t 1"},
    )


def asgi_headers(headers: dict[str, str]) -> dict[str, str]:
    """Headers as ASGI has them: lower-case names, values read as latin-1."""
    return {name.lower(): value.encode().decode("latin-1") for name, value in headers.items()}


@pytest.mark.parametrize("mode", [to_binary, to_structured], ids=["binary", "structured"])
@pytest.mark.parametrize("data", [{"total": 5, "items": ["é", None]}, {}])
def test_what_the_sdk_writes_is_read(mode: Any, data: Any):
    """A message written by the CloudEvents SDK reads as the same event, in binary and in structured
    mode.
    """
    message = mode(sdk_event(data), JSONFormat())
    assert is_cloudevent(asgi_headers(message.headers))
    assert parse_cloudevents(asgi_headers(message.headers), message.body) == [expected(data)]


def test_what_we_write_the_sdk_reads():
    """`Event.to_json` is a CloudEvent to the SDK."""
    event = JSONFormat().read(None, expected({"total": 5}).to_json())
    assert event.get_id() == "id with a space, é and %" and event.get_data() == {"total": 5}
    assert event.get_time() == datetime(2026, 1, 2, 3, 4, 5, 678000, UTC)


def test_batch():
    """A batch is a list of structured events, and may be empty."""
    second = {**MINIMAL, "id": "2", "data_base64": "AAH/", "n": 5, "flag": True, "absent": None}
    events = parse_cloudevents(BATCH, json.dumps([MINIMAL, second]).encode())
    assert [event.id for event in events] == ["1", "2"]
    assert events[1].data == b"\x00\x01\xff" and events[1].extensions == {"n": 5, "flag": True}
    assert parse_cloudevents(BATCH, b"[]") == []


def test_binary_bodies():
    """In binary mode JSON is parsed, other bytes stay bytes, and no body is no data."""
    assert parse_cloudevents({**BINARY, "content-type": "application/vnd.x+json"}, b'{"a":1}')[
        0
    ].data == {"a": 1}
    assert parse_cloudevents({**BINARY, "content-type": "text/plain"}, b"5")[0].data == b"5"
    assert parse_cloudevents(BINARY, b"")[0].data is None


def test_quoted_header_values():
    """A value in double quotes is unquoted before it is percent-decoded."""
    assert (
        parse_cloudevents({**BINARY, "ce-subject": '"a \\"b\\" %C3%A9"'}, b"")[0].subject
        == 'a "b" é'
    )


WRONG: list[tuple[dict[str, str], Any, str]] = [
    (STRUCTURED, [], "body: expected a JSON object, found an array"),
    (STRUCTURED, 5, "body: expected a JSON object, found a number"),
    (BATCH, {}, "body: expected a JSON array of CloudEvents, found an object"),
    (BATCH, [MINIMAL, 5], r"\[1\].body"),
    (BATCH, [MINIMAL, {**MINIMAL, "type": ""}], r"\[1\].type: expected"),
    (STRUCTURED, {**MINIMAL, "specversion": "0.3"}, "specversion: expected"),
    (STRUCTURED, {**MINIMAL, "id": None}, "id: expected"),
    (STRUCTURED, {**MINIMAL, "source": 5}, "source: expected"),
    (STRUCTURED, {**MINIMAL, "time": "yesterday"}, "time: expected RFC 3339"),
    (STRUCTURED, {**MINIMAL, "time": "2026-01-01T00:00:00"}, "time: expected a time zone"),
    (STRUCTURED, {**MINIMAL, "data_base64": "???"}, "data_base64: expected"),
    (STRUCTURED, {**MINIMAL, "data_base64": 5}, "data_base64: expected"),
    (STRUCTURED, {**MINIMAL, "data": 1, "data_base64": "AA=="}, "data and data_base64"),
    (STRUCTURED, {**MINIMAL, "Tenant": "x"}, "extension 'Tenant'"),
    (STRUCTURED, {**MINIMAL, "tenant": [1]}, "extension 'tenant'"),
    (STRUCTURED, {**MINIMAL, "tenant": "x" * 65536}, "attributes: expected at most"),
]


@pytest.mark.parametrize(("headers", "body", "message"), WRONG)
def test_rejections_name_the_field(headers: dict[str, str], body: Any, message: str):
    """The invalid field is named, in a batch with the index of its event."""
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_cloudevents(headers, json.dumps(body).encode())


@pytest.mark.parametrize("name", ["id", "source", "type", "specversion"])
def test_missing_headers_are_named(name: str):
    """A missing or empty required header is named."""
    for headers in (
        {**BINARY, f"ce-{name}": ""},
        {key: value for key, value in BINARY.items() if key != f"ce-{name}"},
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            parse_cloudevents(headers, b"")


@pytest.mark.parametrize("name", ["data", "data_base64", "datacontenttype"])
def test_headers_that_would_be_data_are_rejected(name: str):
    """The data and its type cannot be given twice."""
    with pytest.raises(ValueError, match=f"^ce-{name}"):
        parse_cloudevents({**BINARY, f"ce-{name}": "x"}, b"{}")


def test_headers_must_be_utf8():
    """Percent-encoded bytes that are no UTF-8 are rejected."""
    with pytest.raises(ValueError, match=r"^ce-subject"):
        parse_cloudevents({**BINARY, "ce-subject": "%FF"}, b"")


# --------------------------------------------------------------------------- strict JSON

TEXT = st.text(st.sampled_from('":{}[], \\ab\n'), max_size=6)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(
    TREES,
    st.sampled_from([None, 2]),
    st.sampled_from([(",", ":"), (", ", ": "), (",", " :"), (" , ", "\n:\t")]),
)
def test_all_json_without_repeated_keys_is_read(
    tree: Any, indent: int | None, separators: tuple[str, str]
):
    """JSON without repeated keys, however it is spaced and quoted, reads as with the standard
    library.
    """
    body = json.dumps(tree, indent=indent, separators=separators).encode()
    assert read_json(body) == json.loads(body)


def repeated(tree: Any, picks: list[int]) -> Any:
    """The tree with the key of one of its objects written twice, as pairs; None if it has no object
    with a key.
    """
    objects: list[dict[str, Any]] = []
    stack = [tree]
    while stack:
        node = stack.pop()
        children = (
            list(node.values())
            if isinstance(node, dict)
            else node
            if isinstance(node, list)
            else []
        )
        stack += children
        if isinstance(node, dict) and node:
            objects.append(node)
    if not objects:
        return None
    chosen = objects[picks[0] % len(objects)]
    key = sorted(chosen)[picks[1] % len(chosen)]
    chosen[Marked(key)] = chosen[key]
    return tree


class Marked(str):
    """A key equal to another one in the text, not in the dict."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


@given(
    TREES,
    st.lists(st.integers(0, 100), min_size=2, max_size=2),
    st.sampled_from([(",", ":"), (", ", ": "), (",", " :")]),
)
def test_no_repeated_key_is_read(tree: Any, picks: list[int], separators: tuple[str, str]):
    """A text with a key twice in one object, at any depth, is rejected: the count that skips the
    second parse is sound.
    """
    twice = repeated(tree, picks)
    if twice is not None:
        body = json.dumps(twice, separators=separators).encode()
        with pytest.raises(ValueError, match="expected each key once"):
            read_json(body)
