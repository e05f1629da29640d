"""Decodes a Kafka record into an event, or into a dead letter with the reason.

`decode_batch` (batches.py) calls `RecordReader.read`; nothing here waits. A record with `ce_`
headers or an `application/cloudevents` content type follows the CloudEvents Kafka binding, with its
own source and id. The id of any other record is partition, offset *and timestamp*, since offsets
are used again when a topic is recreated or a broker loses its tail. No bytes are lost: what cannot
be read becomes an `Undecodable` with its headers and coordinates.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, TypeAlias, cast

import orjson

from eventflow.core.clock import to_datetime
from eventflow.core.errors import error_line, error_text
from eventflow.core.retry import RetryAfter
from eventflow.events.cloudevents import is_json, media_type
from eventflow.events.event import Event, Undecodable
from eventflow.events.storable import check_storable
from eventflow.events.strict_json import read_json
from triggers._kafka.client import KafkaRecord
from triggers._kafka.errors import MissingOffsets

RECORD_TYPE = "io.eventflow.kafka.record"

MAX_ATTRIBUTE_BYTES = 64 * 1024
"""Of all headers together: the specification asks intermediaries to forward 64 KiB of attributes.
"""

MAX_REASON_CHARACTERS = 500
"""Of the reason in a dead letter, which may quote the record."""

YEAR_10000_MILLISECONDS = 253_402_300_800_000
"""The first instant that `datetime` cannot represent."""

TRACE_HEADERS = ("traceparent", "tracestate")
"""Headers that become CloudEvents extensions of the same name."""

Headers: TypeAlias = Sequence[tuple[str, bytes | None]]


Decode: TypeAlias = "Literal['json', 'bytes'] | Callable[[Any], Any]"


class RetryLater(Exception):
    """The decoder asked for time (a schema registry does not answer): read the record again after
    `seconds`.
    """

    def __init__(self, seconds: float, reason: str) -> None:
        super().__init__(reason)
        self.seconds = seconds


class RecordReader:
    """Decodes records one by one. The source of a plain record is `kafka://<cluster>/<topic>`."""

    def __init__(
        self, cluster: str, decode: Decode, max_body: int, *, skip_tombstones: bool
    ) -> None:
        self._cluster: str = cluster
        self._decode: Decode = decode
        self._max_body: int = max_body
        self._skip_tombstones: bool = skip_tombstones
        self._sources: dict[str, str] = {}  # by topic

    @property
    def runs_user_code(self) -> bool:
        """Whether `read` calls the user's decoder, which may block."""
        return callable(self._decode)

    def source(self, topic: str) -> str:
        found = self._sources.get(topic)
        if found is None:
            found = self._sources[topic] = f"kafka://{self._cluster}/{topic}"
        return found

    def read(self, record: KafkaRecord) -> Event | Undecodable | None:
        """The record's event or dead letter; None for a skipped tombstone. Raises RetryLater when
        the decoder asks for time.
        """
        value = record.value
        if value is None and self._skip_tombstones:
            return None
        if value is not None and len(value) > self._max_body:
            return self.undecodable(
                record, f"value: expected at most {self._max_body} bytes, found {len(value)}"
            )
        try:
            if record.headers:
                _check_header_size(record)
                if _is_cloudevent(record):
                    return self._checked(self._cloudevent(record))
            return self._checked(self._plain(record))
        except ValueError as error:  # raised in this file, or by orjson
            return self.undecodable(record, str(error))

    def _checked(self, event: Event) -> Event:
        """Raises ValueError for what the user's decoder made and the ledger could not hold: the
        dead letter then has the record's bytes.
        """
        if self.runs_user_code:
            try:
                check_storable(event, event.to_json())
            except BaseException as error:  # user code: its objects may raise anything
                raise ValueError(
                    f"decode= made data that cannot be recorded: {error_text(error)}"
                ) from None
        return event

    # ------------------------------------------------------------------ plain records

    def _plain(self, record: KafkaRecord) -> Event:
        value = record.value
        key = record.key
        extensions: dict[str, str | int | bool] = {
            "kafkatopic": record.topic,
            "kafkapartition": record.partition,
            "kafkaoffset": str(record.offset),  # CloudEvents integers have 32 bits
        }
        subject = None
        if key is not None:
            if len(key) > MAX_ATTRIBUTE_BYTES:
                raise ValueError(
                    f"key: expected at most {MAX_ATTRIBUTE_BYTES} bytes, found {len(key)}"
                )
            subject = _key_text(key)
            if subject is None:
                extensions["partitionkey"] = _key_base64(key)
        if record.headers:
            _add_headers(extensions, record.headers)
        data = None
        content_type = None
        if value is None:
            extensions["kafkatombstone"] = True
        else:
            data, content_type = self._value(record, value)
            if type(data) is Event:
                return data
        return Event(
            id=record_id(record),
            source=self.source(record.topic),
            type=RECORD_TYPE,
            subject=subject,
            time=_time(record.timestamp),
            datacontenttype=content_type,
            data=data,
            extensions=extensions,
        )

    def _value(self, record: KafkaRecord, value: bytes) -> tuple[Any, str | None]:
        """The data and its media type."""
        if self._decode == "json":
            return read_json(value), "application/json"
        if self._decode == "bytes":
            return value, _content_type(record.headers) or "application/octet-stream"
        return self._call_decoder(record), None

    def _call_decoder(self, record: KafkaRecord) -> Any:
        """The decoder's result. ValueError for what it raises; RetryLater where another try can
        help.
        """
        try:
            return cast(Callable[[Any], Any], self._decode)(record)
        except RetryAfter as error:
            raise RetryLater(error.delay, error_text(error)) from error
        except (ConnectionError, TimeoutError) as error:
            raise RetryLater(1.0, error_line(error)) from error
        except BaseException as error:  # user code: the record is a dead letter
            raise ValueError(f"decode= raised {error_line(error)}") from error

    # ------------------------------------------------------------------ CloudEvents

    def _cloudevent(self, record: KafkaRecord) -> Event:
        content_type = (_content_type(record.headers) or "").lower()
        if content_type.startswith("application/cloudevents-batch"):
            raise ValueError(
                "content-type: expected one CloudEvent, found a batch, "
                "which the Kafka binding does not have"
            )
        if content_type.startswith("application/cloudevents"):
            fields = read_json(record.value or b"")
            if not isinstance(fields, dict):
                raise ValueError(f"value: expected a JSON object, found {type(fields).__name__}")
            return Event.from_dict(_with_partition_key(cast(dict[str, Any], fields), record.key))
        return self._binary(record)

    def _binary(self, record: KafkaRecord) -> Event:
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
            fields["data"] = self._call_decoder(record)
        elif is_json(media_type({"content-type": content_type or ""})):
            fields["data"] = read_json(value)
        else:
            fields["data"] = value
        return Event.from_dict(_with_partition_key(fields, record.key))

    # ------------------------------------------------------------------ dead letters

    def undecodable(self, record: KafkaRecord, reason: str) -> Undecodable:
        """The dead letter of a record: its bytes, headers and coordinates."""
        headers = {name: _bytes_to_text(raw) for name, raw in record.headers}
        headers |= {
            f"kafka-{name}": str(getattr(record, name))
            for name in ("topic", "partition", "offset", "timestamp")
        }
        if record.key is not None:
            headers["kafka-key"] = _bytes_to_text(record.key)
        return Undecodable(
            id=record_id(record),
            source=self.source(record.topic),
            body=record.value or b"",
            error=reason[:MAX_REASON_CHARACTERS],
            headers=headers,
        )

    def gap_dead_letter(
        self, topic: str, partition: int, missing: MissingOffsets, last_timestamp: int
    ) -> Undecodable:
        """The dead letter about skipped offsets. `last_timestamp`, of the record before them, makes
        its id unique.
        """
        first = missing.first
        end = missing.end
        return Undecodable(
            id=f"gap:{partition}:{first}:{end}:{last_timestamp}",
            source=self.source(topic),
            type="io.eventflow.kafka.gap",
            body=b"",
            error=missing.reason[:MAX_REASON_CHARACTERS],
            headers={
                "kafka-topic": topic,
                "kafka-partition": str(partition),
                "kafka-offset": str(first),
                "kafka-next": str(end),
            },
        )


def record_id(record: KafkaRecord) -> str:
    return f"{record.partition}:{record.offset}:{record.timestamp}"


def record_headers(event: Event) -> list[tuple[str, bytes | None]]:
    """The headers of an event's record, in order, with duplicates; empty for a CloudEvent."""
    stored = event.extensions.get("kafkaheaders")
    if not isinstance(stored, str):
        return []
    pairs = cast("list[tuple[str, str | dict[str, str] | None]]", orjson.loads(stored))
    return [(name, _header_bytes(value)) for name, value in pairs]


def _header_bytes(value: str | dict[str, str] | None) -> bytes | None:
    if value is None:
        return None
    return value.encode() if isinstance(value, str) else base64.b64decode(value["base64"])


def _check_header_size(record: KafkaRecord) -> None:
    if sum(len(name) + len(raw or b"") for name, raw in record.headers) > MAX_ATTRIBUTE_BYTES:
        raise ValueError(f"headers: expected at most {MAX_ATTRIBUTE_BYTES} bytes in all")


def _add_headers(extensions: dict[str, str | int | bool], headers: Headers) -> None:
    pairs = [(name, None if raw is None else _header_json(raw)) for name, raw in headers]
    extensions["kafkaheaders"] = orjson.dumps(pairs).decode()
    for name, value in pairs:
        if name in TRACE_HEADERS and isinstance(value, str) and value:
            extensions[name] = value


def _header_json(raw: bytes) -> str | dict[str, str]:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(raw).decode()}


def _is_cloudevent(record: KafkaRecord) -> bool:
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
            )  # without a value it is a tombstone, not a structured event
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


def _bytes_to_text(raw: bytes | None) -> str:
    """UTF-8 text, or `base64:…` for other bytes."""
    if raw is None:
        return ""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return _key_base64(raw)


def _with_partition_key(fields: Mapping[str, Any], key: bytes | None) -> Mapping[str, Any]:
    """A CloudEvent's attributes with the record's key as `partitionkey`, unless it has one:
    `key="record"` reads it.
    """
    if key is None or fields.get("partitionkey") is not None:
        return fields
    return {**fields, "partitionkey": _key_text(key) or _key_base64(key)}


def _key_text(key: bytes) -> str | None:
    """A key as an attribute; None when it is empty or not UTF-8."""
    try:
        return key.decode() or None
    except UnicodeDecodeError:
        return None


def _key_base64(key: bytes) -> str:
    return f"base64:{base64.b64encode(key).decode()}"


def _time(milliseconds: int) -> datetime | None:
    """None for an unknown timestamp, or one that `datetime` cannot represent: producers write any
    number.
    """
    return to_datetime(milliseconds * 1000) if 0 <= milliseconds < YEAR_10000_MILLISECONDS else None
