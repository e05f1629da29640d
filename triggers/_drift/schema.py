"""`Drift`: the data of every drift event, whatever detected the drift; and the event made of it.

The parsers of senders.py and the monitor's evaluator.py make it. A flow takes it whole,
`async def retrain(drift: Drift)`, or field by field. The event's id says what the drift is about
and since when, not when it was reported: a sender's repetitions are duplicates.
"""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, TypeAlias

import msgspec
import orjson

from eventflow.events.event import Event

Status: TypeAlias = Literal["detected", "escalated", "resolved", "nodata"]

DETECTED = "drift.detected"
RESOLVED = "drift.resolved"
ESCALATED = "drift.escalated"
NODATA = "drift.nodata"
TYPES: Mapping[Status, str] = {
    "detected": DETECTED,
    "escalated": ESCALATED,
    "resolved": RESOLVED,
    "nodata": NODATA,
}

MAX_ID_LENGTH = 200
"""In characters; a longer id becomes its hash."""


class Bin(msgspec.Struct, frozen=True):
    """One bar of a histogram: `label` (`"[10.0, 12.5)"`, a category, `"missing"`), the samples in
    it, and their share.
    """

    label: str
    count: int
    share: float


class DriftWindow(msgspec.Struct, frozen=True, kw_only=True):
    """The samples of one side of a comparison; None or empty where the sender does not say."""

    start: datetime | None = None
    end: datetime | None = None
    samples: int | None = None
    histogram: Sequence[Bin] = ()


class DriftFinding(msgspec.Struct, frozen=True, kw_only=True):
    """One drifted feature."""

    feature: str
    metric: str | None = None
    statistic: float | None = None
    threshold: float | None = None
    p_value: float | None = None
    baseline: DriftWindow | None = None
    current: DriftWindow | None = None


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """A drift that was detected, escalated or resolved, or can no longer be measured without data.

    `feature`, `metric`, `statistic`, `threshold`, `p_value`, `baseline` and `current` are those of
    the worst feature; `findings` has each drifted one, if the sender reports several, and `share`
    is their share of all. `severity` is the sender's, in lower case. `fingerprint` is the same from
    detection to resolution. `labels` and `annotations` are the sender's.
    """

    status: Status
    sender: str
    name: str
    fingerprint: str
    model: str | None = None
    feature: str | None = None
    features: Sequence[str] = ()
    metric: str | None = None
    statistic: float | None = None
    threshold: float | None = None
    p_value: float | None = None
    share: float | None = None
    severity: str = "warning"
    segment: str | None = None
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    baseline: DriftWindow | None = None
    current: DriftWindow | None = None
    findings: Sequence[DriftFinding] = ()
    labels: Mapping[str, str] = {}
    annotations: Mapping[str, str] = {}
    url: str | None = None


def to_event(drift: Drift, source: str, *, ident: str | None = None) -> Event:
    """The event of a drift. `ident`: its id, if fingerprint, start and status are not unique."""
    return Event(
        id=ident or identity(drift),
        source=source,
        type=TYPES[drift.status],
        subject="/".join(part for part in (drift.model or drift.name, drift.feature) if part),
        time=drift.ends_at if drift.status == "resolved" and drift.ends_at else drift.starts_at,
        data=msgspec.to_builtins(drift),
        datacontenttype="application/json",
    )


def identity(drift: Drift) -> str:
    """The id of one state of one alert, the same for each repetition."""
    since = drift.starts_at.isoformat() if drift.starts_at else ""
    text = f"{drift.fingerprint}@{since}/{drift.status}"
    return text if len(text) <= MAX_ID_LENGTH else short_hash(text)


def short_hash(*parts: object) -> str:
    """A short stable id of these parts."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def short_json_hash(value: Any) -> str:
    """A short stable id of a JSON value, whatever the order of its keys."""
    return hashlib.blake2b(json_bytes(value), digest_size=8).hexdigest()


def json_bytes(value: Any) -> bytes:
    """JSON with sorted keys, with integers of any number of digits."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # an integer beyond 64 bits
        return msgspec.json.encode(value, order="sorted")
