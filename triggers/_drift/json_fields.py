"""Reading JSON of alerts: pointers, typed fields. Used by the parsers of all senders.

Each function raises ValueError with what was expected and where; the alert becomes a dead letter.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

from eventflow.events.event import parse_time
from triggers._drift.schema import Status

ZERO_TIME = "0001-01-01T00:00:00Z"
"""Alertmanager's end time of an alert that has not ended."""

_STATUS: Mapping[str, Status] = {
    **dict.fromkeys("detected firing alerting alarm drift drifted".split(), "detected"),
    **dict.fromkeys("open active triggered".split(), "detected"),
    "escalated": "escalated",
    **dict.fromkeys("resolved ok normal closed inactive recovered stable".split(), "resolved"),
    **dict.fromkeys("nodata no_data insufficient_data missing".split(), "nodata"),
}


class MissingField(ValueError):
    """A pointer to a field that is absent."""

    def __init__(self, pointer: str, where: str) -> None:
        super().__init__(f"expected something at {pointer!r} in {where}, found nothing")


def point(value: Any, pointer: str, where: str = "the body") -> Any:
    """The value at a JSON pointer (RFC 6901). A name without a slash is a field of the top level.

    Raises MissingField, which names the pointer.
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
    """`value` as an object; ValueError for anything else."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, found {type(value).__name__}")
    return cast(dict[str, Any], value)


def fields_of(value: Any) -> dict[str, Any]:
    """`value` as an object; an empty one for anything else."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def items_of(value: Any) -> list[Any]:
    """`value` as a list; an empty one for anything else."""
    return cast(list[Any], value) if isinstance(value, list) else []


def listed(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, found {type(value).__name__}")
    return cast(list[Any], value)


def text(value: Any, where: str) -> str:
    """`value` as a text that is not empty; ValueError for anything else."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: expected a text, found {value!r}")
    return value


def texts(value: Any, where: str) -> dict[str, str]:
    """An object of texts; other values as text. Absent is empty, and null is absent."""
    return {
        str(key): each if isinstance(each, str) else f"{each}"
        for key, each in table(value or {}, where).items()
        if each is not None
    }


def number(value: Any) -> float | None:
    """A finite number, also as text; None for anything else, such as "unknown"."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def truth(value: Any) -> bool:
    """A flag, also as the text that Python writes of numpy's: `"False"` is false."""
    return value.lower() == "true" if isinstance(value, str) else bool(value)


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
    """The status for a sender's name of it."""
    found = _STATUS.get(str(value).lower().replace(" ", "_"))
    if found is None:
        raise ValueError(
            f'{where}: expected "firing", "resolved" or another word for it, found {value!r}'
        )
    return found


def first(found: Mapping[str, str], names: Sequence[str]) -> str | None:
    """The first of these names that has a text."""
    return next((found[name] for name in names if found.get(name)), None)
