"""The checked options of `Kafka`: its own, and those of aiokafka's consumer.

`Kafka.__init__` calls `client_options`. Names of client options are checked there, so that a typing
error is an error at start and not an endless reconnect. The options that carry the guarantees (who
commits, where a partition without a position begins, raw bytes) cannot be set.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeAlias, cast

from eventflow.core.clock import Clock
from eventflow.core.declarations import nearest
from eventflow.core.errors import EmptySecret, UsageError
from eventflow.logs.redaction import SECRETS
from triggers._kafka.client import CODECS, Consumer, make_consumer, option_names
from triggers._kafka.records import RecordReader
from triggers.signatures import Secret

Start: TypeAlias = "Literal['earliest', 'latest'] | datetime"
OnGap: TypeAlias = "Literal['earliest', 'latest', 'stop']"

DEFAULT_OPTIONS: dict[str, Any] = {
    "isolation_level": "read_committed",  # no runs for records of aborted transactions
    "session_timeout_ms": 45_000,  # as in Kafka 3.0; a long pause exceeds aiokafka's 10 s
    "heartbeat_interval_ms": 3_000,
    "rebalance_timeout_ms": 60_000,  # longer than REVOKE_TIMEOUT_SECONDS
    "max_poll_interval_ms": 300_000,
    "metadata_max_age_ms": 30_000,  # how soon new partitions are found
    "max_poll_records": 1_000,  # in one transaction, and in memory while the ledger is full
    "fetch_max_bytes": 16 << 20,
}

OWN_OPTIONS = (
    "group_id",
    "pattern",
    "bootstrap_servers",
    "start",
    "decode",
    "on_gap",
    "skip_corrupt",
    "skip_tombstones",
    "max_body",
    "cluster",
    "name",
)
"""Options of `Kafka` itself, for the hint of a misspelt one."""

FIXED_OPTIONS: dict[str, Any] = {
    "enable_auto_commit": False,  # the group's offset follows the ledger (P1)
    "auto_offset_reset": "none",  # positions are the ledger's; a silent reset loses records
    "value_deserializer": None,  # one bad record would block its batch forever
    "key_deserializer": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KafkaOptions:
    """The checked options of a `Kafka`. `client`: for aiokafka's consumer. `topics` or `pattern`,
    never both.
    """

    topics: tuple[str, ...]
    pattern: str | None
    start: Start
    on_gap: OnGap
    skip_corrupt: bool
    reader: RecordReader
    client: Mapping[str, Any]
    clock: Clock

    def create_consumer(self) -> Consumer:
        """A new consumer, not started, on the running loop. UsageError for refused values."""
        try:
            return make_consumer(reveal_passwords(self.client))
        except (TypeError, ValueError) as error:  # aiokafka checks the values
            raise UsageError(f"Kafka: the client refuses its options: {error}") from error


def client_options(requested: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The consumer's options: the fixed ones, then the user's, then our defaults. UsageError for
    unknown or fixed names.
    """
    known = option_names()
    for option in requested:
        if option in FIXED_OPTIONS:
            raise UsageError(f"Kafka: {option}= cannot be set: {_FIXED_OPTION_HINTS[option]}")
        if option not in known:
            near = nearest(option, [*OWN_OPTIONS, *known])
            hint = (
                f"did you mean {near}=?"
                if near
                else "it takes those of aiokafka's AIOKafkaConsumer"
            )
            raise UsageError(f"Kafka: no option {option}=; {hint}")
    _check_security(requested)
    for option, value in requested.items():  # the environment is read at the start
        if not (isinstance(value, Secret) and value.is_deferred):
            _reveal_password(option, value)
    merged = {"client_id": f"eventflow-{name}", **DEFAULT_OPTIONS, **requested, **FIXED_OPTIONS}
    return {option: value for option, value in merged.items() if option in known}


_FIXED_OPTION_HINTS = {
    "enable_auto_commit": "the group's offset is committed once the ledger has the records",
    "auto_offset_reset": "use start= for the first start and on_gap= for offsets that are gone",
    "value_deserializer": "use decode=: there a bad record becomes a dead letter",
    "key_deserializer": "the key reaches decode= as bytes, in record.key",
}


def reveal_passwords(client: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the text of their secrets. Raises EmptySecret."""
    return {option: _reveal_password(option, value) for option, value in client.items()}


def _reveal_password(option: str, value: Any) -> Any:
    """The text of a secret option, which the log redacts from then on; other options unchanged."""
    if option != "sasl_plain_password":
        return value
    secret = value if isinstance(value, Secret) else Secret(value or "")
    if not secret.reveal().strip():
        raise EmptySecret("Kafka: sasl_plain_password", secret.source)
    SECRETS.register(secret.reveal())
    return secret.reveal().decode()


def _check_security(options: Mapping[str, Any]) -> None:
    protocol = cast(str, options.get("security_protocol", "PLAINTEXT"))
    sasl = sorted(option for option in options if option.startswith("sasl_"))
    if sasl and not protocol.startswith("SASL_"):
        raise UsageError(
            f"Kafka: {sasl[0]}= needs security_protocol='SASL_SSL' (or 'SASL_PLAINTEXT'), "
            f"found {protocol!r}"
        )
    if protocol.endswith("SSL") and options.get("ssl_context") is None:
        raise UsageError(
            f"Kafka: security_protocol={protocol!r} needs "
            "ssl_context=aiokafka.helpers.create_ssl_context(...)"
        )


def missing_codecs() -> list[str]:
    """The compression codecs whose packages are not installed."""
    return [name for name, present in CODECS.items() if not present()]
