"""The parts of an event that can be recorded, for an event that cannot be recorded completely.

Text in Python may hold lone surrogates, which UTF-8, and so the ledger, cannot; a number may have
no JSON form. The router (routing/router.py) calls this module for items that cannot be recorded as
they are: they become dead letters, and the other items are recorded.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import msgspec

from eventflow.events.event import Event, Undecodable

ID_EXPECTED = "id and source: expected a str each"


def storable_text(value: object) -> str:
    """Text without lone surrogates, each of which is written as `\\udcNN`; other values as `str`
    shows them.
    """
    text = value if isinstance(value, str) else str(value)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def check_storable(event: Event, body: bytes) -> None:
    """Raises if JSON or the ledger would change or refuse a value. `body`: the event's JSON.

    ValueError for NaN and Infinity, which are written as null; TypeError for an id,
    source or subject that is no text.
    """
    found: Any = event  # made by code without types
    if not (isinstance(found.id, str) and isinstance(found.source, str)):
        raise TypeError(ID_EXPECTED)
    if found.subject is not None and not isinstance(found.subject, str):
        raise TypeError(f"subject: expected a str, found {type(found.subject).__name__}")
    if b"null" in body and not _is_finite(event.data):
        raise ValueError("data: expected finite numbers, found NaN or Infinity")


def _is_finite(data: Any) -> bool:
    """Whether all numbers in `data` are finite. `data` is JSON: its depth is bounded."""
    match data:
        case float():
            return math.isfinite(data)
        case Mapping():
            return all(map(_is_finite, cast(Iterable[Any], data.values())))
        case list() | tuple():
            return all(map(_is_finite, cast(Iterable[Any], data)))
        case _:
            return True


def storable_event(event: Event) -> tuple[Event, bytes | None]:
    """The event as far as it can be recorded, and its JSON; None when its data has none."""
    bare = _without_data(event)
    try:
        whole = msgspec.structs.replace(bare, data=event.data)
        return whole, whole.to_json() if _is_finite(event.data) else None
    except (TypeError, RecursionError):  # its data has no JSON form
        return bare, None


def _without_data(event: Event) -> Event:
    extensions = cast(object, event.extensions)
    named: Mapping[object, object] = (
        cast(Mapping[object, object], extensions) if isinstance(extensions, Mapping) else {}
    )
    return Event(
        id=storable_text(event.id),
        source=storable_text(event.source),
        type=storable_text(event.type),
        subject=None if event.subject is None else storable_text(event.subject),
        extensions={storable_text(name): _storable_value(value) for name, value in named.items()},
    )


def _storable_value(value: object) -> str | int | bool:
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return value
    return storable_text(value)


def storable_undecodable(item: Undecodable) -> Undecodable:
    """The same bytes; id, reason and headers as far as they can be recorded."""
    return msgspec.structs.replace(
        item,
        id=storable_text(item.id),
        source=storable_text(item.source),
        type=storable_text(item.type),
        error=storable_text(item.error),
        headers={storable_text(name): storable_text(value) for name, value in item.headers.items()},
    )
