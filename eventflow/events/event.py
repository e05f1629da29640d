"""Events, and the protocols between eventflow and its sources and sinks.

`Trigger` and `Intake` are the way in: a trigger makes `Event`s (CloudEvents 1.0), or `Undecodable`s
for bytes that it cannot read; `Intake.accept` returns when they are durable; then the trigger
acknowledges to its source. `EventSink` and `OutboxMessage` are the way out. The other protocols are
optional features of a trigger: `Scheduled`, `Simulatable`, `HasGauges`; `LedgerTrigger` is for
events that the ledger records by itself.

The package `triggers` imports only this layer of eventflow. docs/guides/library.md shows a trigger.
"""

import base64
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Literal, Protocol, TypeAlias, cast, runtime_checkable

import msgspec
import orjson

from eventflow.events.strict_json import MAX_JSON_DEPTH, read_json

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

MAX_DEPTH = 20
"""Emits between an event and the outside event that caused it, at most."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One CloudEvents 1.0 event.

    `(trigger, source, id)` is its identity: a second event with it starts nothing. `data` is JSON,
    as Python values, or `bytes`. `extensions` holds further CloudEvents attributes: names of
    lower-case letters and digits, values str, int or bool.
    """

    id: str
    source: str
    type: str
    data: Any = None
    subject: str | None = None
    time: datetime | None = None
    datacontenttype: str | None = None
    dataschema: str | None = None
    extensions: Mapping[str, str | int | bool] = {}

    @property
    def depth(self) -> int:
        """The number of emits between this event and the outside event that caused it."""
        return int(self.extensions.get("eventflowdepth", 0))

    def to_json(self) -> bytes:
        """The CloudEvents JSON form; `bytes` data as `data_base64`.

        Raises TypeError for data without a JSON form, such as integers beyond 64 bits.
        """
        return self.to_json_parts()[0]

    def to_json_parts(self) -> tuple[bytes, bytes | None]:
        """`to_json`, and the part of it that is the JSON of the data: None for `bytes` and for no
        data.
        """
        fields: dict[str, Any] = {
            "specversion": "1.0",
            "id": self.id,
            "source": self.source,
            "type": self.type,
        }
        if self.subject is not None:
            fields["subject"] = self.subject
        if self.time is not None:
            fields["time"] = self.time
        if self.datacontenttype is not None:
            fields["datacontenttype"] = self.datacontenttype
        if self.dataschema is not None:
            fields["dataschema"] = self.dataschema
        if self.extensions:
            fields.update(self.extensions)
        data = self.data
        if data is None:
            return orjson.dumps(fields), None
        if isinstance(data, bytes):
            fields["data_base64"] = base64.b64encode(data).decode()
            return orjson.dumps(fields), None
        text = orjson.dumps(data)
        fields["data"] = orjson.Fragment(text)
        return orjson.dumps(fields), text

    @classmethod
    def from_json(cls, body: bytes) -> "Event":
        """An event from structured-mode CloudEvents JSON, such as `to_json` writes.

        Raises ValueError naming the field.
        """
        # The data was within the limits of its source when it was recorded.
        fields = read_json(body, max_keys=sys.maxsize, max_depth=MAX_JSON_DEPTH + 1)
        if not isinstance(fields, dict):
            raise ValueError(f"a CloudEvent is a JSON object, found {type(fields).__name__}")
        return cls.from_dict(cast("dict[str, Any]", fields))

    @classmethod
    def from_recorded(cls, body: bytes) -> "Event":
        """An event from JSON of `to_json`, without the checks of `from_json`."""
        left: dict[str, Any] = orjson.loads(body)
        del left["specversion"]
        pop = left.pop
        encoded = pop("data_base64", None)
        moment = pop("time", None)
        return cls(
            id=pop("id"),
            source=pop("source"),
            type=pop("type"),
            data=pop("data", None) if encoded is None else base64.b64decode(encoded),
            subject=pop("subject", None),
            time=None if moment is None else datetime.fromisoformat(moment),
            datacontenttype=pop("datacontenttype", None),
            dataschema=pop("dataschema", None),
            extensions=left,
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Event":
        """An event from its CloudEvents attributes; null attributes count as absent.

        Raises ValueError naming the attribute.
        """
        left = dict(fields)
        version, data, *texts = map(left.pop, _ATTRIBUTES, _ABSENT)
        if version != "1.0":
            raise ValueError(f'specversion: expected "1.0", found {version!r}')
        if left:
            data = _pop_data(left, data)
        ident, source, event_type, subject, time, datacontenttype, dataschema = texts
        if not (ident and source and event_type and _TEXT_TYPES.issuperset(map(type, texts))):
            _refuse_texts(dict(zip(_TEXTS, texts, strict=True)))
        if left:
            left = _extensions(left)
        return cls(
            id=ident,
            source=source,
            type=event_type,
            data=data,
            subject=subject,
            time=None if time is None else parse_rfc3339(time),
            datacontenttype=datacontenttype,
            dataschema=dataschema,
            extensions=left,
        )


_TEXTS = ("id", "source", "type", "subject", "time", "datacontenttype", "dataschema")
_TEXT_TYPES = frozenset((str, type(None)))
_ATTRIBUTES = ("specversion", "data", *_TEXTS)
_ABSENT = (None,) * len(_ATTRIBUTES)


def _refuse_texts(attributes: Mapping[str, object]) -> None:
    """ValueError for the first attribute that is missing, or that is no string."""
    for name in ("id", "source", "type"):
        if not attributes[name]:
            raise ValueError(f"{name}: expected a non-empty string, found none")
    for name, value in attributes.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name}: expected a string, found {type(value).__name__}")


def _pop_data(left: dict[str, Any], data: Any) -> Any:
    """The data of an event, which is `data` unless `data_base64` is present."""
    encoded = left.pop("data_base64", None)
    if encoded is None:
        return data
    if data is not None:
        raise ValueError("data and data_base64 are both present; a CloudEvent has one of them")
    return _decoded(encoded)


def _extensions(left: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that are not null. ValueError for one that is no extension."""
    extensions = {name: value for name, value in left.items() if value is not None}
    for name, value in extensions.items():
        if not (name.isascii() and name.isalnum() and name == name.lower()) or not isinstance(
            value, str | int | bool
        ):
            raise ValueError(
                f"extension {name!r}: expected a lower-case alphanumeric name and a string, "
                "integer or boolean"
            )
    return extensions


def _decoded(text: object) -> bytes:
    if isinstance(text, str):
        try:
            return base64.b64decode(text, validate=True)
        except ValueError:
            pass
    raise ValueError("data_base64: expected base64, found something else")


_RFC_3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d):(\d\d)(\.\d+)?([Zz]|[+-]\d\d:\d\d)?", re.ASCII
)


def parse_rfc3339(text: str) -> datetime:
    """An aware datetime from RFC 3339, rounded down to microseconds; a leap second is the second
    after it.

    Raises ValueError for other forms of ISO 8601: without separators, by week, without a time zone.
    """
    found = _RFC_3339.fullmatch(text)
    if found is None:
        raise ValueError(f"time: expected RFC 3339 (2026-01-31T08:00:00Z), found {text!r}")
    day, minute, second, fraction, zone = found.groups()
    if zone is None:
        raise ValueError(f"time: expected a time zone (such as Z), found {text!r}")
    is_leap = second == "60"
    try:
        moment = datetime.fromisoformat(
            f"{day}T{minute}:{'59' if is_leap else second}{fraction or ''}{zone.upper()}"
        )
        return moment + timedelta(seconds=1) if is_leap else moment
    except (ValueError, OverflowError):
        raise ValueError(f"time: expected an existing time, found {text!r}") from None


def parse_time(text: str) -> datetime:
    """An aware datetime from RFC 3339, or from another form of ISO 8601, as people and senders of
    alerts write it. Raises ValueError, for one without a time zone too.
    """
    if _RFC_3339.fullmatch(text):
        return parse_rfc3339(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"time: expected RFC 3339, found {text!r}") from None
    if moment.tzinfo is None:
        raise ValueError(f"time: expected a time zone (such as Z), found {text!r}")
    return moment


class Undecodable(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes from a source that are no event. Recorded as a dead letter with the reason `error`."""

    id: str
    source: str
    body: bytes
    error: str
    type: str = "eventflow.undecodable"
    headers: Mapping[str, str] = {}


class Receipt(msgspec.Struct, frozen=True):
    """The result of one accepted item.

    `ledger_id` is its id in the ledger; for a duplicate, that of the first one. `conflict`: an
    event with this identity and other content was recorded before, so this one starts nothing and
    becomes a dead letter; `digests`
    are the hex digests of the recorded and of this content. `matched`: the number of runs it
    started. `verdicts`: JSON, if its commit decided them: the event joined windows or patterns.
    """

    ledger_id: int
    event_id: str
    duplicate: bool = False
    conflict: bool = False
    matched: int = 0
    digests: tuple[str, str] | None = None
    verdicts: bytes | None = None

    @property
    def id_text(self) -> str:
        """The ledger id as text, as in the API and the command line."""
        return format_id(self.ledger_id)


ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32, lower case
_PAIRS = tuple(first + second for first in ALPHABET for second in ALPHABET)


def format_id(ident: int) -> str:
    """An id as 13 characters of Crockford's base 32. The text sorts like the number."""
    return f"{_first_letters(ident >> 10)}{_PAIRS[ident & 1023]}"


@lru_cache(maxsize=1024)
def _first_letters(high: int) -> str:
    """All but the last two letters. Ids that are made in a row share them."""
    pairs = _PAIRS
    return (
        f"{ALPHABET[high >> 50 & 31]}{pairs[high >> 40 & 1023]}{pairs[high >> 30 & 1023]}"
        f"{pairs[high >> 20 & 1023]}{pairs[high >> 10 & 1023]}{pairs[high & 1023]}"
    )


class Intake(Protocol):
    """What a trigger records its events with. Bound to the trigger's name."""

    async def accept(
        self,
        *items: Event | Undecodable,
        cursor: Mapping[str, Json] | None = None,
        max_wait: float | None = None,
    ) -> list[Receipt]:
        """Record items and cursor in one transaction; durable when it returns.

        Returns one receipt per item, in order. `cursor` sets values by key (a partition, a path); a
        value of None deletes the key. Zero items are allowed. Concurrent calls share group commits.

        While the ledger is full, the call waits for room: for `max_wait` seconds at most, 0: not at
        all, None: as long as it takes. A cancel during this wait leaves nothing recorded. Raises
        `StoreFull` after `max_wait`, and at once (with `closing` set) while the server drains;
        nothing was recorded then. Raises `StoreFailed` if the outcome is unknown.
        """
        ...

    async def cursor(self) -> Mapping[str, Json]:
        """The trigger's cursors as last committed."""
        ...

    @property
    def log(self) -> Any:
        """A logger with the methods of structlog's, bound to the trigger's name."""
        ...


EventOutcome: TypeAlias = Literal["completed", "failed", "unknown"]


@runtime_checkable
class KnowsOutcomes(Protocol):
    """An intake that knows what became of recorded events. The App's intake does; one that records
    a part of its events does not.
    """

    async def outcomes(self, source: str, ids: Sequence[str]) -> Mapping[str, EventOutcome]:
        """By event id, of this trigger's events. An event with a run that has not ended is missing.

        "completed": each of its runs completed, or none was to start. "failed": a run failed, was
        cancelled or quarantined, or a delivery is a dead letter. "unknown": the ledger does not
        have the event, or retention has removed a run.
        """
        ...


@runtime_checkable
class Trigger(Protocol):
    """A source of events. It acknowledges to the source after `accept` has returned.

    `name` is stable: cursors and events in the ledger are stored under it. `listen` runs until it
    is cancelled; a poll in progress may finish, shielded, within 10 s. When `listen` raises or
    returns, the reactor logs it and calls it again, with backoff. A poller needs no loop for a full
    ledger: `accept` waits, and a `StoreFull` while the server drains may leave `listen`.

    A trigger that serves HTTP also has `routes`, a list of Starlette routes. A trigger with events
    of several types may have `default_types`: those that a subscription without `types=` accepts. A
    trigger with `repeats_may_differ = True` repeats its events with changed content (an alert with
    its current value): such a repetition is counted; of other triggers it becomes a dead letter.
    """

    @property
    def name(self) -> str: ...

    async def listen(self, intake: Intake) -> None: ...


class LateSpec(msgspec.Struct, frozen=True):
    """Runs of `flow` that have not ended `after` microseconds after their due time.

    In `flow`, `*` is a wildcard.
    """

    flow: str
    after: int


@runtime_checkable
class LedgerTrigger(Protocol):
    """A trigger without a listener, for events that the ledger records by itself (run states).

    `types` and `pattern` select the events. `late`: the runs to monitor for lateness, so that there
    are late-run events to select.
    """

    @property
    def types(self) -> Sequence[str]: ...

    @property
    def pattern(self) -> Mapping[str, Any]:
        """A filter in EventBridge's grammar, as `where=` takes it."""
        ...

    @property
    def late(self) -> LateSpec | None: ...


@runtime_checkable
class Scheduled(Protocol):
    """A trigger whose events follow from a schedule. Used by `eventflow backfill`.

    Datetimes are aware unless stated otherwise.
    """

    @property
    def name(self) -> str: ...

    def occurrences(self, since: datetime, until: datetime) -> Iterable[datetime]:
        """The nominal times in [since, until), in order.

        A naive bound is a wall-clock time in the schedule's time zone.
        """
        ...

    def occurrence(self, at: datetime) -> Event:
        """The event of a nominal time, with the id that it has when the schedule fires it.

        Raises ValueError when the schedule has no such time.
        """
        ...

    def settled(self, cursor: Mapping[str, Json]) -> datetime | None:
        """The last nominal time that is done by `cursor`; the schedule itself fires later ones."""
        ...


class SimulatedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event that a trigger would have sent at `at`. `summary`: one line about it."""

    at: datetime
    event: Event
    summary: str


class Simulation(Protocol):
    """A past period, simulated with a trigger's current settings. Writes nothing.

    The dry run calls `replaces` and `advance` for each recorded event, in order of time.
    """

    @property
    def notes(self) -> Sequence[str]:
        """Remarks for the user, such as what is unknown of the period. Complete at the end."""
        ...

    def replaces(self, event: Event, at: datetime) -> bool:
        """Whether the trigger itself made this recorded event: `advance` simulates it again."""
        ...

    async def advance(self, at: datetime, event: Event | None = None) -> Sequence[SimulatedEvent]:
        """The events it would have sent up to `at`. Then it receives `event`, if given."""
        ...


@runtime_checkable
class Simulatable(Protocol):
    """A trigger that derives its events from others. Used by `eventflow replay --dry-run`."""

    @property
    def name(self) -> str: ...

    def simulate(
        self, cursor: Mapping[str, Json], since: datetime | None, until: datetime
    ) -> Simulation:
        """A simulation with the current settings that starts at `since` (None: as early as known).

        `cursor`: the trigger's cursor in the ledger.
        """
        ...


class OutboxMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A message for a sink: an emitted event or a dead letter.

    A message may be sent twice: identify it by its event's source and id. `number` is its position
    in the outbox. A dead letter has a `reason` and the `subscription` that it was for; bytes that
    are no event are the `data` of an event of type `eventflow.undecodable`. `headers` are those
    that came with the event. `trigger` and `ledger_id` locate it in the ledger.
    """

    number: int
    event: Event
    trigger: str
    ledger_id: int
    reason: str | None = None
    subscription: str | None = None
    headers: Mapping[str, str] = {}


@runtime_checkable
class EventSink(Protocol):
    """A destination of emitted events and dead letters.

    Messages are sent at least once, in the order of recording, one call at a time. `send` returns
    when the destination has all of them. When it raises, the same messages are sent again later; a
    message for which `send` alone raises `Permanent` becomes a dead letter. `close` is called once,
    at the end.
    """

    @property
    def name(self) -> str: ...

    async def send(self, *messages: OutboxMessage) -> None: ...

    async def close(self) -> None: ...


class Gauge(msgspec.Struct, frozen=True):
    """A current measurement of a trigger's source.

    `name` is in snake_case with its unit (`lag_seconds`); `/metrics` lists it as
    `eventflow_trigger_<name>`. All gauges of one name have the same label names (a partition, a
    queue). `total`: how the values of one name are aggregated.
    """

    name: str
    value: float
    labels: Mapping[str, str] = {}
    total: Literal["sum", "max"] = "sum"


@runtime_checkable
class HasGauges(Protocol):
    """A trigger that reports the health of its source.

    Shown by `/metrics`, `/api/triggers` and `eventflow ls triggers`. Both are read on the intake's
    event loop at any time; they must return at once, from memory, and must not raise.
    """

    @property
    def condition(self) -> str | None:
        """What is wrong ("connecting: no broker at kafka:9092"), in one line; None: nothing is."""
        ...

    def gauges(self) -> Sequence[Gauge]: ...


def gauge_totals(gauges: Sequence[Gauge]) -> dict[str, float]:
    """One value per gauge name: the sum or the maximum, as `Gauge.total` says."""
    found: dict[str, float] = {}
    for gauge in gauges:
        before = found.get(gauge.name)
        if before is None:
            found[gauge.name] = gauge.value
        else:
            found[gauge.name] = (
                before + gauge.value if gauge.total == "sum" else max(before, gauge.value)
            )
    return found
