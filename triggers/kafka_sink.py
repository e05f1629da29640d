"""`KafkaSink`: emitted events, and dead letters, to a topic.

    app.send("order.scored", KafkaSink("scored-orders", bootstrap_servers="kafka:9092"))
    app.send_dead_letters(KafkaSink("dead-orders", bootstrap_servers="kafka:9092"))

The outbox relay (eventflow/sinks/relay.py) calls `send` with messages in the order of recording.
All of them are acknowledged by all in-sync replicas before it returns; the producer is idempotent,
so its own retries neither repeat nor reorder. A message may be sent twice after a crash: consumers
deduplicate by `ce_source` and `ce_id`. Needs the extra `kafka`.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeAlias, cast

import orjson

from eventflow.core.declarations import declaration, nearest
from eventflow.core.errors import EmptySecret, UsageError, error_line
from eventflow.core.retry import Permanent
from eventflow.events.event import Event, OutboxMessage, format_id
from eventflow.logs.redaction import SECRETS
from triggers._kafka.producer import (
    MessageSizeTooLargeError,
    Producer,
    close,
    make_producer,
    option_names,
)
from triggers.signatures import Secret

Mode: TypeAlias = Literal["binary", "structured"]
Key: TypeAlias = Callable[[Event], "str | bytes | None"]

_FIXED_OPTIONS: Final[Mapping[str, Any]] = {"acks": "all", "enable_idempotence": True}
_UNSUPPORTED_OPTIONS: Final = ("value_serializer", "key_serializer", "transactional_id")
"""Producer options that the sink sets in another way, or does not support."""

Headers: TypeAlias = list[tuple[str, bytes]]


class KafkaSink:
    """Sends messages to `topic`, in the Kafka binding of CloudEvents 1.0.

    `mode="binary"`: the data as the value (JSON, or bytes as they are), the attributes as `ce_`
    headers. `mode="structured"`: the whole event as JSON. `key`: a callable of the event; by
    default its `partitionkey`, else its subject. The rest goes to aiokafka's AIOKafkaProducer
    (`sasl_plain_password` may be a secret from `env(...)`). UsageError for what does not fit.

    A dead letter has its own bytes as the value, its sender's headers, and `eventflow.error.*`:
    reason, subscription, trigger, source, id, ledger_id.
    """

    @declaration
    def __init__(
        self,
        topic: str,
        *,
        bootstrap_servers: str | list[str] = "localhost:9092",
        mode: Mode = "binary",
        key: Key | None = None,
        name: str | None = None,
        **client: Any,
    ) -> None:
        if not topic:
            raise UsageError("KafkaSink: expected a topic, found an empty name")
        if mode not in ("binary", "structured"):
            raise UsageError(f'KafkaSink: mode= expected "binary" or "structured", found {mode!r}')
        self.name = name or f"kafka:{topic}"
        self.topic = topic
        self._mode: Mode = mode
        self._key: Key = key or _partition_key
        self._options: dict[str, Any] = {
            "client_id": f"eventflow-{self.name}",
            **_check_options(client),
            "bootstrap_servers": bootstrap_servers,
            **_FIXED_OPTIONS,
        }
        self._producer: Producer | None = None

    def __repr__(self) -> str:
        return f"KafkaSink({self.topic!r}, name={self.name!r})"

    async def send(self, *messages: OutboxMessage) -> None:
        """Returns when the brokers have all of them. Permanent for one above `max_request_size` or
        the topic's limit, and for one that no record can be made of.
        """
        records = [self._converted(message) for message in messages]
        producer = await self._started()
        try:
            sent = [
                await producer.send(self.topic, value, key, timestamp_ms=at, headers=headers)
                for value, key, at, headers in records
            ]
            done = await asyncio.gather(*sent, return_exceptions=True)
        except MessageSizeTooLargeError as error:
            raise Permanent(f"too large for topic {self.topic}: {error}") from error
        failures = [each for each in done if isinstance(each, BaseException)]
        del done
        for failure in failures:
            if isinstance(failure, MessageSizeTooLargeError):
                raise Permanent(f"too large for topic {self.topic}: {failure}") from failure
        if failures:
            await self.close()  # its sequence is broken: the next try makes a new producer
            raise failures.pop(0)

    async def close(self) -> None:
        """Idempotent; a later `send` makes a new producer."""
        producer = self._producer
        self._producer = None
        if producer is not None:
            await close(producer)

    def check_secrets(self) -> None:
        """Raises EmptySecret; the app calls it before it sends."""
        self._revealed_options()

    def _revealed_options(self) -> dict[str, Any]:
        return {option: _reveal(option, value) for option, value in self._options.items()}

    async def _started(self) -> Producer:
        if self._producer is None:
            try:
                producer = make_producer(self._revealed_options())
            except (TypeError, ValueError) as error:  # aiokafka checks the values
                raise UsageError(f"KafkaSink: the client refuses its options: {error}") from error
            try:
                await producer.start()
            except BaseException:  # a cancel too: no connection stays open
                await close(producer)
                raise
            self._producer = producer
        return self._producer

    def _converted(
        self, message: OutboxMessage
    ) -> tuple[bytes | None, bytes | None, int | None, Headers]:
        """`_record`. Raises Permanent for a message that no record can be made of (`key=` raises,
        text that is not Unicode): it becomes a dead letter and does not hold up the others.
        """
        try:
            return self._record(message)
        except BaseException as error:  # user code: of this message
            raise Permanent(f"no record can be made: {error_line(error)}") from error

    def _record(
        self, message: OutboxMessage
    ) -> tuple[bytes | None, bytes | None, int | None, Headers]:
        """Value, key, timestamp in milliseconds, and headers."""
        event = message.event
        key = self._key(event)
        if key is not None and not isinstance(cast(object, key), str | bytes):
            raise TypeError(f"key= returned {type(key).__name__}, expected str, bytes or None")
        at = None if event.time is None else round(event.time.timestamp() * 1000)
        if message.reason is not None:
            value, headers = _dead_letter_record(message)
        elif self._mode == "structured":
            value = event.to_json()
            headers = [("content-type", b"application/cloudevents+json; charset=UTF-8")]
        else:
            value, headers = _binary_record(event)
        if value is None and key is None:
            value = b""  # a record needs a key or a value
        return value, key.encode() if isinstance(key, str) else key, at, headers


def _partition_key(event: Event) -> str | None:
    key = event.extensions.get("partitionkey", event.subject)
    return None if key is None else str(key)


def _value(event: Event) -> tuple[bytes | None, str | None]:
    """The data as bytes, and its content type."""
    if event.data is None:
        return None, event.datacontenttype
    if isinstance(event.data, bytes):
        return event.data, event.datacontenttype or "application/octet-stream"
    return orjson.dumps(event.data), event.datacontenttype or "application/json"


def _binary_record(event: Event) -> tuple[bytes | None, Headers]:
    """https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md#32-binary-content-mode"""
    value, content_type = _value(event)
    attributes: dict[str, Any] = {
        "specversion": "1.0",
        "id": event.id,
        "source": event.source,
        "type": event.type,
    }
    attributes |= {"subject": event.subject, "dataschema": event.dataschema}
    attributes["time"] = None if event.time is None else event.time.isoformat()
    attributes |= event.extensions
    headers = [
        (f"ce_{name}", _attribute_bytes(attribute))
        for name, attribute in attributes.items()
        if attribute is not None
    ]
    if content_type is not None:
        headers.append(("content-type", content_type.encode()))
    return value, headers


def _dead_letter_record(message: OutboxMessage) -> tuple[bytes | None, Headers]:
    value, _ = _value(message.event)
    details = {
        "reason": message.reason,
        "subscription": message.subscription,
        "trigger": message.trigger,
        "source": message.event.source,
        "id": message.event.id,
        "ledger_id": format_id(message.ledger_id),
    }
    headers = [(name, _attribute_bytes(text)) for name, text in message.headers.items()]
    headers += [
        (f"eventflow.error.{name}", _attribute_bytes(detail))
        for name, detail in details.items()
        if detail is not None
    ]
    return value, headers


def _attribute_bytes(value: Any) -> bytes:
    """The canonical text of a CloudEvents attribute."""
    return (str(value).lower() if isinstance(value, bool) else str(value)).encode()


# --------------------------------------------------------------------------- the client's options


def _check_options(client: Mapping[str, Any]) -> dict[str, Any]:
    known = option_names()
    for option in client:
        if option in _FIXED_OPTIONS or option in _UNSUPPORTED_OPTIONS:
            raise UsageError(
                f"KafkaSink: {option}= cannot be set: records are bytes, "
                "and acknowledged by all replicas"
            )
        if option not in known:
            near = nearest(option, ["bootstrap_servers", "mode", "key", "name", *known])
            hint = (
                f"did you mean {near}=?"
                if near
                else "it takes those of aiokafka's AIOKafkaProducer"
            )
            raise UsageError(f"KafkaSink: no option {option}=; {hint}")
    return {
        option: value if isinstance(value, Secret) and value.is_deferred else _reveal(option, value)
        for option, value in client.items()
    }


def _reveal(option: str, value: Any) -> Any:
    """The text of a secret; other options unchanged. Raises EmptySecret."""
    if not isinstance(value, Secret):
        return value
    if not value.reveal().strip():
        raise EmptySecret(f"KafkaSink: {option}", value.source)
    SECRETS.register(value.reveal())
    return value.reveal().decode()
