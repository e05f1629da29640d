"""What `Kafka` was given, checked and ready for use: our own words, and the client's options, which pass through untouched.

Names of client options are checked when the trigger is made, so that a slip is an error at start and no reconnect loop. The
options that carry the guarantees (who commits, where a partition without position begins, raw bytes) cannot be given.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias, cast

from eventflow.core.clock import Clock
from eventflow.core.errors import EmptySecret, UsageError
from eventflow.logs.redaction import SECRETS
from triggers._kafka.client import CODECS, Consumer, make_consumer, option_names
from triggers._kafka.records import Reader
from triggers.signatures import Secret

Start: TypeAlias = "Literal['earliest', 'latest'] | datetime"
OnGap: TypeAlias = "Literal['earliest', 'latest', 'stop']"

DEFAULTS: dict[str, Any] = {
    "isolation_level": "read_committed",  # a run for a record of an aborted transaction would be a phantom
    "session_timeout_ms": 45_000,  # the clients' own since Kafka 3.0; aiokafka's 10 s dies of one long garbage collection
    "heartbeat_interval_ms": 3_000,
    "rebalance_timeout_ms": 60_000,  # longer than the 10 s that a revocation may wait for a record under way
    "max_poll_interval_ms": 300_000,
    "metadata_max_age_ms": 30_000,  # how soon new partitions are found
    "max_poll_records": 1_000,  # events in one transaction, and held in memory while the ledger is full
    "fetch_max_bytes": 16 << 20,
}

OURS: dict[str, Any] = {
    "enable_auto_commit": False,  # the group's offset follows the record (P1)
    "auto_offset_reset": "none",  # positions come from the ledger; a reset in silence would be loss in silence
    "value_deserializer": None,  # one bad record would block its batch for ever
    "key_deserializer": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`client` is for aiokafka's consumer; `topics` or `pattern`, never both."""

    topics: tuple[str, ...]
    pattern: str | None
    start: Start
    on_gap: OnGap
    skip_corrupt: bool
    reader: Reader
    client: Mapping[str, Any]
    clock: Clock

    def consumer(self) -> Consumer:
        """A new client, not started; its values are checked here. To be made on the loop that it works on."""
        try:
            return make_consumer(self.client)
        except (TypeError, ValueError) as error:
            raise UsageError(f"Kafka: the client refuses its options: {error}") from error


def client_options(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The client's options: ours for certain, then the user's, then defaults that differ from aiokafka's."""
    known = option_names()
    for option in given:
        if option in OURS:
            raise UsageError(f"Kafka: {option}= cannot be set: {_INSTEAD[option]}")
        if option not in known:
            near = get_close_matches(option, known, n=1)
            hint = (
                f"did you mean {near[0]}=?"
                if near
                else "it takes those of aiokafka's AIOKafkaConsumer"
            )
            raise UsageError(f"Kafka: no option {option}=; {hint}")
    _check_security(given)
    revealed = {option: _revealed(option, value) for option, value in given.items()}
    options = {"client_id": f"eventflow-{name}", **DEFAULTS, **revealed, **OURS}
    return {option: value for option, value in options.items() if option in known}


_INSTEAD = {
    "enable_auto_commit": "the group's offset is committed once the ledger has the records",
    "auto_offset_reset": "use start= for the first start and on_gap= for offsets that are gone",
    "value_deserializer": "use decode=, so that a bad record becomes a dead letter and the partition goes on",
    "key_deserializer": "the key reaches decode= as bytes, in record.key",
}


def _revealed(option: str, value: Any) -> Any:
    """A secret's text; from then on the log hides it."""
    if option != "sasl_plain_password":
        return value
    secret = value if isinstance(value, Secret) else Secret(value or "")
    if not secret.reveal().strip():
        raise EmptySecret("Kafka: sasl_plain_password", secret.source)
    SECRETS.register(secret.reveal())
    return secret.reveal().decode()


def _check_security(given: Mapping[str, Any]) -> None:
    protocol = cast(str, given.get("security_protocol", "PLAINTEXT"))
    sasl = sorted(option for option in given if option.startswith("sasl_"))
    if sasl and not protocol.startswith("SASL_"):
        raise UsageError(
            f"Kafka: {sasl[0]}= needs security_protocol='SASL_SSL' (or 'SASL_PLAINTEXT'), found {protocol!r}"
        )
    if protocol.endswith("SSL") and given.get("ssl_context") is None:
        raise UsageError(
            f"Kafka: security_protocol={protocol!r} needs ssl_context=aiokafka.helpers.create_ssl_context(...)"
        )


def missing_codecs() -> list[str]:
    """The compression codecs whose records could not be read here."""
    return [name for name, present in CODECS.items() if not present()]
