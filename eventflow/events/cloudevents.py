"""CloudEvents 1.0 over HTTP.

`parse_cloudevents` reads the three content modes: binary (`ce-*` headers, the body is the data),
structured (`application/cloudevents+json`) and batch (`application/cloudevents-batch+json`, all
events or none). The JSON is read by strict_json.py. Every rejection is a ValueError that names the
field. Called by HTTP triggers and by `POST /api/events`.
"""

import re
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import unquote_to_bytes

from eventflow.events.event import Event
from eventflow.events.strict_json import MAX_JSON_KEYS, in_utf8, read_json

STRUCTURED = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"

MAX_ATTRIBUTES = 64 * 1024
"""Characters of all attributes together. The specification asks to forward at least 64 KiB."""


def parse_cloudevents(
    headers: Mapping[str, str], body: bytes, *, max_keys: int = MAX_JSON_KEYS
) -> list[Event]:
    """The events of one HTTP message.

    `headers`: lower-case names, values decoded as latin-1. `max_keys`: of one JSON object. A batch
    may be empty. Raises ValueError naming the field, in a batch with the index of the event:
    `[2].id: …`.
    """
    match media_type(headers):
        case "application/cloudevents+json":
            return [_structured(read_http_json(headers, body, max_keys), "")]
        case "application/cloudevents-batch+json":
            listed = read_http_json(headers, body, max_keys)
            if not isinstance(listed, list):
                raise ValueError(
                    f"body: expected a JSON array of CloudEvents, found {_kind(listed)}"
                )
            return [
                _structured(fields, f"[{index}].")
                for index, fields in enumerate(cast(list[Any], listed))
            ]
        case _:
            return [_binary(headers, body, max_keys)]


def is_cloudevent(headers: Mapping[str, str], media: str | None = None) -> bool:
    """Whether a message is declared as CloudEvents, in any mode. `media`: its media type, if the
    caller has it.
    """
    if media is None:
        media = media_type(headers)
    return "ce-specversion" in headers or media in (STRUCTURED, BATCH)


def media_type(headers: Mapping[str, str]) -> str:
    """The media type without its parameters, in lower case; empty if there is none."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def charset(headers: Mapping[str, str]) -> str:
    """The charset that the Content-Type names, in lower case; empty if there is none."""
    content_type = headers.get("content-type", "")
    if ";" not in content_type:
        return ""
    found = _CHARSET.search(content_type)
    return found[1].lower() if found else ""


_CHARSET = re.compile(r""";\s*charset\s*=\s*["']?([\w.:+-]+)""", re.I | re.A)


def read_http_json(headers: Mapping[str, str], body: bytes, max_keys: int) -> Any:
    """`read_json` of a body in the charset that its Content-Type names."""
    return read_json(in_utf8(body, charset(headers)), max_keys=max_keys)


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


def _binary(headers: Mapping[str, str], body: bytes, max_keys: int) -> Event:
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
        is_json_data = is_json(media_type(headers))
        fields["data"] = read_http_json(headers, body, max_keys) if is_json_data else body
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
