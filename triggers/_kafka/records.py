"""A Kafka record as an event, or as a dead letter that says why it is none.

session.py hands over what it fetched; nothing here waits. A record with `ce_` headers or an `application/cloudevents` content
type is read as the CloudEvents Kafka binding says, with its own source and id. Any other gets an id of partition, offset *and
timestamp*: offsets are used again when a topic is made anew or a broker lost its tail. Bytes are never lost: what cannot be
read becomes an `Undecodable` with its headers and coordinates. Next rooms: `eventflow/events/cloudevents.py`, then the intake.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, TypeAlias, cast

import orjson

from eventflow.core.clock import to_datetime
from eventflow.core.errors import caught
from eventflow.core.retry import RetryAfter
from eventflow.events.cloudevents import is_json, media_type, read_json
from eventflow.events.event import Event, Undecodable
from triggers._kafka.client import Record
from triggers._kafka.errors import Missing

TYPE = "io.eventflow.kafka.record"

MAX_ATTRIBUTES = 64 * 1024
"""Bytes of all headers together; the specification asks intermediaries to forward 64 KiB of attributes."""

MAX_REASON = 500
"""Characters of why a record cannot be read; the reason may quote it."""

END_OF_TIME = 253_402_300_800_000
"""Milliseconds until the year 10,000, which `datetime` does not know."""

TRACE = ("traceparent", "tracestate")
"""Headers that are extensions of their own in CloudEvents."""

Headers: TypeAlias = Sequence[tuple[str, bytes | None]]


Decode: TypeAlias = "Literal['json', 'bytes'] | Callable[[Any], Any]"


class Later(Exception):
    """A decoder asked for time (a schema registry does not answer): the record is to be read again after `seconds`."""

    def __init__(self, seconds: float, why: str) -> None:
        super().__init__(why)
        self.seconds = seconds


class Reader:
    """Reads records one by one. `cluster` stands in the source of plain records: `kafka://<cluster>/<topic>`."""

    def __init__(
        self, cluster: str, decode: Decode, max_body: int, *, skip_tombstones: bool
    ) -> None:
        self._cluster, self._decode, self._max_body, self._skip = (
            cluster,
            decode,
            max_body,
            skip_tombstones,
        )
        self._sources: dict[str, str] = {}

    @property
    def calls_user(self) -> bool:
        """Whether reading runs a decoder of the user's, which may look up a schema and so block."""
        return callable(self._decode)

    def source(self, topic: str) -> str:
        found = self._sources.get(topic)
        if found is None:
            found = self._sources[topic] = f"kafka://{self._cluster}/{topic}"
        return found

    def read(self, record: Record) -> Event | Undecodable | None:
        """The record's event; None for a tombstone that is to be skipped. Raises Later when its decoder asks for time."""
        value = record.value
        if value is None and self._skip:
            return None
        if value is not None and len(value) > self._max_body:
            return self.undecodable(
                record, f"value: expected at most {self._max_body} bytes, found {len(value)}"
            )
        try:
            if record.headers:
                _check_size(record)
                if _is_cloudevent(record):
                    return self._cloudevent(record)
            return self._plain(record)
        except ValueError as error:  # of our own making, or orjson's
            return self.undecodable(record, str(error))

    # ------------------------------------------------------------------ plain records

    def _plain(self, record: Record) -> Event:
        value, key, headers = record.value, record.key, record.headers
        extensions: dict[str, str | int | bool] = {
            "kafkatopic": record.topic,
            "kafkapartition": record.partition,
            "kafkaoffset": str(record.offset),  # CloudEvents integers have 32 bits
        }
        subject = None
        if key is not None:
            if len(key) > MAX_ATTRIBUTES:
                raise ValueError(f"key: expected at most {MAX_ATTRIBUTES} bytes, found {len(key)}")
            subject = _key_text(key)
            if subject is None:
                extensions["partitionkey"] = _key_in_base64(key)
        if headers:
            _put_headers(extensions, headers)
        data, content_type = None, None
        if value is None:
            extensions["kafkatombstone"] = True
        else:
            data, content_type = self._value(record, value)
            if type(data) is Event:
                return data
        return Event(
            id=ident(record),
            source=self.source(record.topic),
            type=TYPE,
            subject=subject,
            time=_time(record.timestamp),
            datacontenttype=content_type,
            data=data,
            extensions=extensions,
        )

    def _value(self, record: Record, value: bytes) -> tuple[Any, str | None]:
        """The data and its media type."""
        if self._decode == "json":
            return read_json(value), "application/json"
        if self._decode == "bytes":
            return value, _content_type(record.headers) or "application/octet-stream"
        return self._decoded(record), None

    def _decoded(self, record: Record) -> Any:
        """What the user's decoder makes of it. ValueError for whatever it raises, but Later where trying again can help."""
        data, error = caught(cast(Callable[[Any], Any], self._decode), record)
        match error:
            case None:
                return data
            case RetryAfter():
                raise Later(error.delay, str(error)) from error
            case ConnectionError() | TimeoutError():
                raise Later(1.0, f"{type(error).__name__}: {error}") from error
            case _:
                raise ValueError(f"decode= raised {type(error).__name__}: {error}") from error

    # ------------------------------------------------------------------ CloudEvents

    def _cloudevent(self, record: Record) -> Event:
        content_type = (_content_type(record.headers) or "").lower()
        if content_type.startswith("application/cloudevents-batch"):
            raise ValueError(
                "content-type: expected one CloudEvent, found a batch, which the Kafka binding does not have"
            )
        if content_type.startswith("application/cloudevents"):
            fields = read_json(record.value or b"")
            if not isinstance(fields, dict):
                raise ValueError(f"value: expected a JSON object, found {type(fields).__name__}")
            return Event.from_dict(_keyed(cast(dict[str, Any], fields), record.key))
        return self._binary(record)

    def _binary(self, record: Record) -> Event:
        fields: dict[str, Any] = {}
        for name, raw in record.headers:
            if name[:3].lower() == "ce_" and raw is not None:
                fields[name[3:].lower()] = _utf8(raw, name)
        for name in ("data", "data_base64", "datacontenttype"):
            if name in fields:
                raise ValueError(
                    f"ce_{name}: expected no such header; in binary mode the value is the data"
                )
        content_type = _content_type(record.headers)
        if content_type is not None:
            fields["datacontenttype"] = content_type
        value = record.value
        if value is None:
            fields["kafkatombstone"] = True
        elif callable(self._decode):
            fields["data"] = self._decoded(record)
        elif is_json(media_type({"content-type": content_type or ""})):
            fields["data"] = read_json(value)
        else:
            fields["data"] = value
        return Event.from_dict(_keyed(fields, record.key))

    # ------------------------------------------------------------------ dead letters

    def undecodable(self, record: Record, why: str) -> Undecodable:
        """The record as it came, with its coordinates, kept as a dead letter."""
        headers = {name: _shown(raw) for name, raw in record.headers}
        headers |= {
            f"kafka-{name}": str(getattr(record, name))
            for name in ("topic", "partition", "offset", "timestamp")
        }
        if record.key is not None:
            headers["kafka-key"] = _shown(record.key)
        return Undecodable(
            id=ident(record),
            source=self.source(record.topic),
            body=record.value or b"",
            error=why[:MAX_REASON],
            headers=headers,
        )

    def gap(self, topic: str, partition: int, missing: Missing, stamp: int) -> Undecodable:
        """The note that offsets were passed over. `stamp`, of the last record before, tells one such event from another."""
        first, after = missing.first, missing.after
        return Undecodable(
            id=f"gap:{partition}:{first}:{after}:{stamp}",
            source=self.source(topic),
            type="io.eventflow.kafka.gap",
            body=b"",
            error=missing.why[:MAX_REASON],
            headers={
                "kafka-topic": topic, "kafka-partition": str(partition), "kafka-offset": str(first), "kafka-next": str(after),
            },
        )  # fmt: skip


def ident(record: Record) -> str:
    return f"{record.partition}:{record.offset}:{record.timestamp}"


def record_headers(event: Event) -> list[tuple[str, bytes | None]]:
    """The headers of the record that an event was read from, in order, with duplicates; empty for a CloudEvent."""
    stored = event.extensions.get("kafkaheaders")
    if not isinstance(stored, str):
        return []
    pairs = cast("list[tuple[str, str | dict[str, str] | None]]", orjson.loads(stored))
    return [(name, _original(value)) for name, value in pairs]


def _original(value: str | dict[str, str] | None) -> bytes | None:
    if value is None:
        return None
    return value.encode() if isinstance(value, str) else base64.b64decode(value["base64"])


def _check_size(record: Record) -> None:
    if sum(len(name) + len(raw or b"") for name, raw in record.headers) > MAX_ATTRIBUTES:
        raise ValueError(f"headers: expected at most {MAX_ATTRIBUTES} bytes in all")


def _put_headers(extensions: dict[str, str | int | bool], headers: Headers) -> None:
    pairs = [(name, None if raw is None else _as_json(raw)) for name, raw in headers]
    extensions["kafkaheaders"] = orjson.dumps(pairs).decode()
    for name, value in pairs:
        if name in TRACE and isinstance(value, str) and value:
            extensions[name] = value


def _as_json(raw: bytes) -> str | dict[str, str]:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(raw).decode()}


def _is_cloudevent(record: Record) -> bool:
    for name, raw in record.headers:
        low = name.lower()
        if low[:3] == "ce_":
            return True
        if (
            low == "content-type"
            and raw is not None
            and raw[:23].lower() == b"application/cloudevents"
        ):
            return (
                record.value is not None
            )  # without a value it is a tombstone, and no structured event
    return False


def _content_type(headers: Headers) -> str | None:
    for name, raw in headers:
        if name.lower() == "content-type" and raw is not None:
            return _utf8(raw, name)
    return None


def _utf8(raw: bytes, name: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{name}: expected UTF-8, found other bytes") from None


def _shown(raw: bytes | None) -> str:
    """Bytes as text that can be read back: UTF-8 where they are, base64 else."""
    if raw is None:
        return ""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return _key_in_base64(raw)


def _keyed(fields: Mapping[str, Any], key: bytes | None) -> Mapping[str, Any]:
    """A CloudEvent's attributes with the record's key as its `partitionkey`, unless it brings one: lanes go by it."""
    if key is None or fields.get("partitionkey") is not None:
        return fields
    return {**fields, "partitionkey": _key_text(key) or _key_in_base64(key)}


def _key_text(key: bytes) -> str | None:
    """A key as an attribute; None when it is empty or not UTF-8."""
    try:
        return key.decode() or None
    except UnicodeDecodeError:
        return None


def _key_in_base64(key: bytes) -> str:
    return f"base64:{base64.b64encode(key).decode()}"


def _time(milliseconds: int) -> datetime | None:
    """None for a timestamp that is unknown, or that no calendar has: producers write what they like."""
    return to_datetime(milliseconds * 1000) if 0 <= milliseconds < END_OF_TIME else None
