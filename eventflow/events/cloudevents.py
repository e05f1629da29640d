"""CloudEvents 1.0 over HTTP, and strict JSON for all bodies from outside.

`parse_cloudevents` reads the three content modes: binary (`ce-*` headers, the body is the data),
structured (`application/cloudevents+json`) and batch (`application/cloudevents-batch+json`, all
events or none). `read_json` rejects JSON that two parsers may read differently (a repeated key,
NaN) and JSON that is expensive to process for its size (depth, number of keys). Every rejection is
a ValueError that names the field. Called by HTTP triggers and by `POST /api/events`.
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
"""Characters of all attributes together. The specification asks to forward at least 64 KiB."""


def parse_cloudevents(headers: Mapping[str, str], body: bytes) -> list[Event]:
    """The events of one HTTP message.

    `headers`: lower-case names, values decoded as latin-1. A batch may be empty. Raises ValueError
    naming the field, in a batch with the index of the event: `[2].id: …`.
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
    """Whether a message is declared as CloudEvents, in any mode."""
    return "ce-specversion" in headers or media_type(headers) in (STRUCTURED, BATCH)


def media_type(headers: Mapping[str, str]) -> str:
    """The media type without its parameters, in lower case; empty if there is none."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def is_json(media: str) -> bool:
    """Whether a media type is JSON. An empty one is: many senders leave it out."""
    return media in ("application/json", "text/json", "") or media.endswith("+json")


def _structured(fields: Any, prefix: str) -> Event:
    try:
        if not isinstance(fields, dict):
            raise ValueError(f"body: expected a JSON object, found {_kind(fields)}")
        attributes = cast(dict[str, Any], fields)
        _check_attribute_size(
            value for name, value in attributes.items() if name not in ("data", "data_base64")
        )
        return Event.from_dict(attributes)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _binary(headers: Mapping[str, str], body: bytes) -> Event:
    fields: dict[str, Any] = {
        name[3:]: _header_text(name, value)
        for name, value in headers.items()
        if name.startswith("ce-")
    }
    for name in ("data", "data_base64", "datacontenttype"):
        if name in fields:
            raise ValueError(
                f"ce-{name}: expected no such header; in binary mode the body is the data and "
                "Content-Type its type"
            )
    _check_attribute_size(fields.values())
    if "content-type" in headers:
        fields["datacontenttype"] = headers["content-type"]
    if body:
        fields["data"] = read_json(body) if is_json(media_type(headers)) else body
    return Event.from_dict(fields)


def _header_text(name: str, value: str) -> str:
    """An attribute from its header: unquoted, percent-decoded, UTF-8 (HTTP binding 3.1.3.2)."""
    if len(value) >= 2 and value[0] == value[-1] == '"':
        value = re.sub(r"\\(.)", r"\1", value[1:-1])
    try:
        return unquote_to_bytes(value.encode("latin-1")).decode("utf-8")
    except UnicodeError:
        raise ValueError(f"{name}: expected percent-encoded UTF-8, found other bytes") from None


def _check_attribute_size(values: Any) -> None:
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
    """The value of a JSON text in UTF-8.

    Raises ValueError for anything else, and for a key twice in one object, NaN, a lone surrogate,
    more than `MAX_JSON_DEPTH` levels or `MAX_JSON_KEYS` keys.
    """
    value = orjson.loads(body)
    keys = _count_keys(value)
    if keys != body.count(b'":') or _SPACED.search(body):
        # Counting proves nothing: a string has a quoted colon, a blank precedes a colon, or a key
        # is indeed repeated. The slow parser decides.
        json.loads(
            body.decode(), object_pairs_hook=_refuse_duplicate_keys, parse_int=str, parse_float=str
        )
    return value


_SPACED = re.compile(rb"[ \t\r\n]:")
"""Without a blank before a colon, the text has `":` at least once per key, and the parsed value has
one key per *distinct* key. If both numbers are equal, no key is repeated: two scans in C instead of
a second parse.
"""


def _count_keys(value: Any) -> int:
    """The number of keys in a parsed value. Raises ValueError above the limits."""
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
                f"body: expected at most {MAX_JSON_DEPTH} levels and {MAX_JSON_KEYS} keys, found "
                "more"
            )
        level = below
    return keys


_CONTAINERS = frozenset((dict, list))


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ValueError(f"{name}: expected each key once per object, found it twice")
        seen.add(name)
