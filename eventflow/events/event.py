"""The words of the way in: `Event`, what a trigger may hand over, and the two protocols between a source and the ledger.

`triggers/` imports this file and its floor, nothing else of eventflow. A trigger makes `Event`s (CloudEvents 1.0 attributes)
or, for bytes it cannot read, `Undecodable`s; `Intake.accept` returns when they are durable; then the trigger acknowledges.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, Protocol, TypeAlias, cast, runtime_checkable

import msgspec
import orjson

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

MAX_DEPTH = 20
"""Hops an emitted event may be away from one that came from outside."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One CloudEvents 1.0 event.

    `(trigger, source, id)` is its identity: a second one starts nothing. `data` is JSON (as Python values) or `bytes`.
    `extensions` holds further CloudEvents attributes (lower-case letters and digits; str, int or bool).
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
        """How many emits lie between this event and one from outside."""
        return int(self.extensions.get("eventflowdepth", 0))

    def to_json(self) -> bytes:
        """The CloudEvents JSON form; `bytes` data as `data_base64`. Big integers and NaN are refused with TypeError."""
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
        if isinstance(self.data, bytes):
            fields["data_base64"] = base64.b64encode(self.data).decode()
        elif self.data is not None:
            fields["data"] = self.data
        return orjson.dumps(fields)

    @classmethod
    def from_json(cls, body: bytes) -> "Event":
        """The event that `to_json` wrote, or any structured-mode CloudEvent. Raises ValueError naming what is wrong."""
        fields = orjson.loads(body)
        if not isinstance(fields, dict):
            raise ValueError(f"a CloudEvent is a JSON object, found {type(fields).__name__}")
        return cls.from_dict(cast(dict[str, Any], fields))

    @classmethod
    def from_recorded(cls, body: bytes) -> "Event":
        """The event that `to_json` wrote, taken at its word: the ledger's own bytes need no second check."""
        left: dict[str, Any] = orjson.loads(body)
        del left["specversion"]
        take = left.pop
        encoded, moment = take("data_base64", None), take("time", None)
        return cls(
            id=take("id"),
            source=take("source"),
            type=take("type"),
            data=take("data", None) if encoded is None else base64.b64decode(encoded),
            subject=take("subject", None),
            time=None if moment is None else datetime.fromisoformat(moment),
            datacontenttype=take("datacontenttype", None),
            dataschema=take("dataschema", None),
            extensions=left,
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Event":
        """An event from its CloudEvents attributes; null attributes count as absent."""
        left = {name: value for name, value in fields.items() if value is not None}
        version = left.pop("specversion", None)
        if version != "1.0":
            raise ValueError(f'specversion: expected "1.0", found {version!r}')
        data = left.pop("data", None)
        if "data_base64" in left:
            if data is not None:
                raise ValueError(
                    "data and data_base64 are both present; a CloudEvent has one of them"
                )
            data = _decoded(left.pop("data_base64"))
        known = {name: left.pop(name) for name in _TEXT if name in left}
        for name in ("id", "source", "type"):
            if not known.get(name):
                raise ValueError(f"{name}: expected a non-empty string, found none")
        for name, value in known.items():
            if not isinstance(value, str):
                raise ValueError(f"{name}: expected a string, found {type(value).__name__}")
        if "time" in known:
            known["time"] = parse_time(known["time"])
        for name, value in left.items():
            if not (name.isascii() and name.isalnum() and name == name.lower()) or not isinstance(
                value, str | int | bool
            ):
                raise ValueError(
                    f"extension {name!r}: expected a lower-case alphanumeric name and a string, integer or boolean"
                )
        return cls(data=data, extensions=left, **known)


_TEXT = ("id", "source", "type", "subject", "time", "datacontenttype", "dataschema")


def _decoded(text: object) -> bytes:
    if isinstance(text, str):
        try:
            return base64.b64decode(text, validate=True)
        except ValueError:
            pass
    raise ValueError("data_base64: expected base64, found something else")


def parse_time(text: str) -> datetime:
    """An RFC 3339 timestamp with its zone; ValueError otherwise."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"time: expected RFC 3339, found {text!r}") from None
    if moment.tzinfo is None:
        raise ValueError(f"time: expected a time zone (such as Z), found {text!r}")
    return moment


class Undecodable(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes from a real sender that are no event: kept as a dead letter with the reason, never dropped."""

    id: str
    source: str
    body: bytes
    error: str
    type: str = "eventflow.undecodable"
    headers: Mapping[str, str] = {}


class Receipt(msgspec.Struct, frozen=True):
    """What became of one accepted item.

    `ledger_id` is its id in the ledger, or for a duplicate the first one's. `conflict`: the same identity came with other
    content; the first one stands and this one was not recorded, and `digests` holds the first content's digest and this one's,
    in hex. `matched` counts the runs it started.
    """

    ledger_id: int
    event_id: str
    duplicate: bool = False
    conflict: bool = False
    matched: int = 0
    digests: tuple[str, str] | None = None

    @property
    def id_text(self) -> str:
        """The ledger id as people and the API see it."""
        return format_id(self.ledger_id)


ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32, lower case
_PAIRS = tuple(first + second for first in ALPHABET for second in ALPHABET)


def format_id(ident: int) -> str:
    """An id as its 13 letters of Crockford's base 32; sorts as the number does."""
    pairs = _PAIRS  # ten bits at a time: this is on the way of every run
    return (
        f"{ALPHABET[ident >> 60 & 31]}{pairs[ident >> 50 & 1023]}{pairs[ident >> 40 & 1023]}{pairs[ident >> 30 & 1023]}"
        f"{pairs[ident >> 20 & 1023]}{pairs[ident >> 10 & 1023]}{pairs[ident & 1023]}"
    )


class Intake(Protocol):
    """The way into the ledger, bound to one trigger's name."""

    async def accept(
        self,
        *items: Event | Undecodable,
        cursor: Mapping[str, Json] | None = None,
        max_wait: float | None = None,
    ) -> list[Receipt]:
        """Records items and cursor in one transaction; durable when it returns. One receipt per item, in order.

        `cursor` upserts values by key (a partition, a path); None deletes a key. Zero items are legal. Concurrent calls
        share group commits. Waits while there is no room for the items: `max_wait` in seconds, None for as long as it takes,
        0 for not at all; a cancel during this wait ends it with nothing recorded. Raises `StoreFull` after `max_wait`, or at
        once with `closing` set while the server drains (nothing was recorded), and `StoreFailed` (unknown, not refused).
        """
        ...

    async def cursor(self) -> Mapping[str, Json]:
        """The trigger's cursors as last committed."""
        ...

    @property
    def log(self) -> Any:
        """A structlog logger bound to the trigger."""
        ...


@runtime_checkable
class Trigger(Protocol):
    """A source of events. It acknowledges in plain code order, after `accept` returns.

    `name` is stable: cursors and the ledger are keyed by it. `listen` runs until it is cancelled (a poll under way may
    finish under a shield of at most 10 s); what it raises is logged, and the reactor opens it again with backoff. A
    trigger that serves HTTP also has `routes`, a list of Starlette routes; one whose events are of several types may have
    `heard`, the types that a subscription without `types=` hears of.
    """

    @property
    def name(self) -> str: ...

    async def listen(self, intake: Intake) -> None: ...


class LateSpec(msgspec.Struct, frozen=True):
    """Runs of `flow` (`*` for any part) that have not ended `after` microseconds after they were due to begin."""

    flow: str
    after: int


@runtime_checkable
class LedgerTrigger(Protocol):
    """Events that the ledger records by itself, where a trigger may stand: nothing listens, `types` and `pattern` choose.

    `late`: the runs that are looked out for, so that there are such events at all.
    """

    @property
    def types(self) -> Sequence[str]: ...

    @property
    def pattern(self) -> Mapping[str, Any]:
        """A filter over the data, in EventBridge's grammar."""
        ...

    @property
    def late(self) -> LateSpec | None: ...


@runtime_checkable
class Scheduled(Protocol):
    """A trigger whose events are known beforehand: what `eventflow backfill` asks. Datetimes are aware unless it says so."""

    @property
    def name(self) -> str: ...

    def occurrences(self, since: datetime, until: datetime) -> Iterable[datetime]:
        """The nominal times in [since, until), in order. A naive bound is a time on the schedule's own wall clock."""
        ...

    def occurrence(self, at: datetime) -> Event:
        """The event of a nominal time, with the id it has when the schedule fires it. ValueError when there is none then."""
        ...

    def settled(self, cursor: Mapping[str, Json]) -> datetime | None:
        """The last nominal time that the schedule is through with, by its cursor; later ones are its own to fire."""
        ...


class SimulatedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event that a trigger would have sent, when, and what it is in a line."""

    at: datetime
    event: Event
    summary: str


class Simulation(Protocol):
    """A past time by the rules that a trigger has now. Asked once for each instant, in their order; keeps nothing anywhere."""

    @property
    def notes(self) -> Sequence[str]:
        """What a person should know of it, such as what is not known of that time; complete at the end."""
        ...

    def replaces(self, event: Event, at: datetime) -> bool:
        """Whether this event on record is the trigger's own making, and whatever `advance` tells stands in its place."""
        ...

    async def advance(self, at: datetime, event: Event | None = None) -> Sequence[SimulatedEvent]:
        """What it would have sent up to this instant, at which it then recorded `event`."""
        ...


@runtime_checkable
class Simulatable(Protocol):
    """A trigger that makes its events of others, by thresholds and windows: what `eventflow replay --dry-run` asks."""

    @property
    def name(self) -> str: ...

    def simulate(
        self, cursor: Mapping[str, Json], since: datetime | None, until: datetime
    ) -> Simulation:
        """As if it had begun at `since` (None: with what is known), as it is set now. `cursor`: its own in the ledger."""
        ...


class OutboxMessage(msgspec.Struct, frozen=True, kw_only=True):
    """What a sink is given: an event that was emitted, or a dead letter.

    A letter may come twice: know it by its event's source and id; `number` is only its place in the outbox. Of a dead letter,
    `reason` says why it is one and `subscription` for whom; bytes that never were an event are the `data` of one with type
    `eventflow.undecodable`. `headers` came with it, `trigger` and `ledger_id` tell where it is in the ledger.
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
    """A place that emitted events and dead letters are sent to. At least once, in the order of recording, one call at a time.

    `send` returns when the other side has all of them. When it raises, the same letters come again after a while; `Permanent`
    says that waiting will not help, and what it is raised for alone becomes a dead letter. `close` is called once, at the end.
    """

    @property
    def name(self) -> str: ...

    async def send(self, *messages: OutboxMessage) -> None: ...

    async def close(self) -> None: ...


class Gauge(msgspec.Struct, frozen=True):
    """A number that a trigger tells about its source, as it is now.

    `name` is in snake_case and says its unit, where it has one (`lag_seconds`); `/metrics` shows it as
    `eventflow_trigger_<name>`. Every gauge of one name has the same `labels` (a partition, a queue); `total` says what the
    values of one name come to together.
    """

    name: str
    value: float
    labels: Mapping[str, str] = {}
    total: Literal["sum", "max"] = "sum"


@runtime_checkable
class HasGauges(Protocol):
    """A trigger that tells how its source fares. Optional; shown by `/metrics`, `/api/triggers` and `eventflow ls triggers`.

    Both are read on the loop of the way in, whenever somebody looks: they answer from memory and never raise.
    """

    @property
    def condition(self) -> str | None:
        """What keeps the source from its work, in a line ("connecting: no broker at kafka:9092"); None while nothing does."""
        ...

    def gauges(self) -> Sequence[Gauge]: ...


def totals(gauges: Sequence[Gauge]) -> dict[str, float]:
    """One number for each name: the sum or the largest, as its gauges say."""
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
