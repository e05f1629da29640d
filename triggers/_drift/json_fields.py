"""How the senders' rooms read JSON: pointers, and fields whose absence is told by name.

Everything raises ValueError with what was expected and where; the endpoint makes a dead letter of
it.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

from eventflow.events.event import parse_time
from triggers._drift.schema import Status

ZERO_TIME = "0001-01-01T00:00:00Z"
"""Alertmanager's word for an alert that has not ended."""

_STATUS: Mapping[str, Status] = {
    **dict.fromkeys(("detected", "firing", "alerting", "alarm", "drift", "drifted", "open", "active", "triggered"), "detected"),
    "escalated": "escalated",
    **dict.fromkeys(("resolved", "ok", "normal", "closed", "inactive", "recovered", "stable"), "resolved"),
    **dict.fromkeys(("nodata", "no_data", "insufficient_data", "missing"), "nodata"),
}  # fmt: skip


class MissingField(ValueError):
    """A pointer that leads nowhere."""

    def __init__(self, pointer: str, where: str) -> None:
        super().__init__(f"expected something at {pointer!r} in {where}, found nothing")


def point(value: Any, pointer: str, where: str = "the body") -> Any:
    """What a JSON pointer (RFC 6901) leads to; Absent names the pointer. A name without a slash is
    a field of the top level.
    """
    found = value
    for raw in pointer.lstrip("/").split("/") if pointer else ():
        step = raw.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and step in found:
            found = cast(dict[str, Any], found)[step]
        elif (
            isinstance(found, list) and step.isdecimal() and int(step) < len(cast(list[Any], found))
        ):
            found = cast(list[Any], found)[int(step)]
        else:
            raise MissingField(pointer, where)
    return found


def table(value: Any, where: str) -> dict[str, Any]:
    """An object; ValueError says what it is instead."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, found {type(value).__name__}")
    return cast(dict[str, Any], value)


def listed(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, found {type(value).__name__}")
    return cast(list[Any], value)


def text(value: Any, where: str) -> str:
    """Text that is there."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: expected a text, found {value!r}")
    return value


def texts(value: Any, where: str) -> dict[str, str]:
    """An object of texts; numbers are written out. Absent is empty."""
    return {
        str(key): each if isinstance(each, str) else f"{each}"
        for key, each in table(value or {}, where).items()
    }


def number(value: Any) -> float | None:
    """A finite number, also one written as text; None from anything else: senders put words where
    values are unknown.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def moment(value: Any, where: str) -> datetime | None:
    """An RFC 3339 time, in UTC; None for an absent one and for Alertmanager's zero."""
    if value is None or value in ("", ZERO_TIME):
        return None
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected an RFC 3339 time, found {value!r}")
    try:
        return parse_time(value).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from None


def status(value: Any, where: str) -> Status:
    """One of our three words for one of theirs."""
    found = _STATUS.get(str(value).lower().replace(" ", "_"))
    if found is None:
        raise ValueError(
            f'{where}: expected "firing", "resolved" or another word for it, found {value!r}'
        )
    return found


def first(found: Mapping[str, str], names: Sequence[str]) -> str | None:
    """The first of these names that has a text."""
    return next((found[name] for name in names if found.get(name)), None)
