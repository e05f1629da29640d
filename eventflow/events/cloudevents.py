"""CloudEvents 1.0 over HTTP, and the strict JSON that every body from outside must be.

`parse_cloudevents` reads the three content modes: binary (`ce-*` headers, the body is the data), structured
(`application/cloudevents+json`) and batch (`application/cloudevents-batch+json`, all events or none). `read_json` refuses what
two readers could understand differently (a key twice, NaN) and what is made to cost more than it weighs (depth, key count).
Webhooks and `POST /api/events` call both; everything refused is a ValueError that names the field. Next room: `event.py`.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import unquote_to_bytes

import orjson

from eventflow.events.event import Event

STRUCTURED = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"

MAX_JSON_DEPTH = 64
MAX_JSON_KEYS = 10_000
MAX_ATTRIBUTES = 64 * 1024
"""Characters of all attributes together; the specification asks intermediaries to forward 64 KiB."""


def parse_cloudevents(headers: Mapping[str, str], body: bytes) -> list[Event]:
    """The events of one HTTP message. `headers` by lower-case name, values as latin-1 text, as ASGI has them.

    A batch may be empty. Raises ValueError naming the field, in a batch with its place: `[2].id: ...`; then none is valid.
    """
    match media_type(headers):
        case "application/cloudevents+json":
            return [_structured(read_json(body), "")]
        case "application/cloudevents-batch+json":
            listed = read_json(body)
            if not isinstance(listed, list):
                raise ValueError(
                    f"body: expected a JSON array of CloudEvents, found {_kind(listed)}"
                )
            return [
                _structured(fields, f"[{index}].")
                for index, fields in enumerate(cast(list[Any], listed))
            ]
        case _:
            return [_binary(headers, body)]


def is_cloudevent(headers: Mapping[str, str]) -> bool:
    """Whether a message says that it carries CloudEvents, in any mode."""
    return "ce-specversion" in headers or media_type(headers) in (STRUCTURED, BATCH)


def media_type(headers: Mapping[str, str]) -> str:
    """The media type without its parameters, in lower case; empty when none is given."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def is_json(media: str) -> bool:
    """Whether a media type's bodies are JSON. No type at all counts: many senders leave it out."""
    return media in ("application/json", "text/json", "") or media.endswith("+json")


def _structured(fields: Any, place: str) -> Event:
    try:
        if not isinstance(fields, dict):
            raise ValueError(f"body: expected a JSON object, found {_kind(fields)}")
        attributes = cast(dict[str, Any], fields)
        _bounded(value for name, value in attributes.items() if name not in ("data", "data_base64"))
        return Event.from_dict(attributes)
    except ValueError as error:
        raise ValueError(f"{place}{error}") from None


def _binary(headers: Mapping[str, str], body: bytes) -> Event:
    fields: dict[str, Any] = {
        name[3:]: _header_text(name, value)
        for name, value in headers.items()
        if name.startswith("ce-")
    }
    for name in ("data", "data_base64", "datacontenttype"):
        if name in fields:
            raise ValueError(
                f"ce-{name}: expected no such header; in binary mode the body is the data and Content-Type its type"
            )
    _bounded(fields.values())
    if "content-type" in headers:
        fields["datacontenttype"] = headers["content-type"]
    if body:
        fields["data"] = read_json(body) if is_json(media_type(headers)) else body
    return Event.from_dict(fields)


def _header_text(name: str, value: str) -> str:
    """An attribute from its header: quotes off first, then one round of percent-decoding, as UTF-8 (HTTP binding 3.1.3.2)."""
    if len(value) >= 2 and value[0] == value[-1] == '"':
        value = re.sub(r"\\(.)", r"\1", value[1:-1])
    try:
        return unquote_to_bytes(value.encode("latin-1")).decode("utf-8")
    except UnicodeError:
        raise ValueError(f"{name}: expected percent-encoded UTF-8, found other bytes") from None


def _bounded(values: Any) -> None:
    if sum(len(value) for value in values if isinstance(value, str)) > MAX_ATTRIBUTES:
        raise ValueError(f"attributes: expected at most {MAX_ATTRIBUTES} characters in all")


def _kind(value: object) -> str:
    names: dict[type, str] = {
        type(None): "null",
        bool: "a boolean",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return names.get(type(value), "a number")


# --------------------------------------------------------------------------- strict JSON


def read_json(body: bytes) -> Any:
    """The value of a JSON text in UTF-8. ValueError for anything else, and for a key that stands twice in one object, NaN, a
    lone surrogate, more than `MAX_JSON_DEPTH` levels or `MAX_JSON_KEYS` keys.
    """
    value = orjson.loads(body)
    keys = _measure(value)
    if keys != body.count(b'":') or _SPACED.search(body):
        # Not proven by counting: strings with quoted colons, blanks before colons, or indeed a key given twice.
        json.loads(body.decode(), object_pairs_hook=_once, parse_int=str, parse_float=str)
    return value


_SPACED = re.compile(rb"[ \t\r\n]:")
"""Without it, each colon of the grammar follows a quote, so `":` is found at least once per key written; the parsed value has
one per *different* key. If the two numbers agree, no key was written twice: two scans in C instead of a second parse."""


def _measure(value: Any) -> int:
    """How many keys a parsed value has. ValueError above the bounds."""
    keys = depth = 0
    level: list[Any] = [value]
    while level:
        depth += 1
        below: list[Any] = []
        for node in level:
            kind = node.__class__
            if kind is dict:
                keys += len(node)
                below += [child for child in node.values() if child.__class__ in _CONTAINERS]
            elif kind is list:
                below += [child for child in node if child.__class__ in _CONTAINERS]
        if depth > MAX_JSON_DEPTH or keys > MAX_JSON_KEYS:
            raise ValueError(
                f"body: expected at most {MAX_JSON_DEPTH} levels and {MAX_JSON_KEYS} keys, found more"
            )
        level = below
    return keys


_CONTAINERS = frozenset((dict, list))


def _once(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ValueError(f"{name}: expected each key once per object, found it twice")
        seen.add(name)
