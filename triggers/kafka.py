"""Kafka topics as events.

    orders = Kafka("orders", bootstrap_servers="kafka:9092", group_id="shop")
    app.on(orders, handle, key="record")

Records are recorded in batches: events and partition offsets in one transaction; the commit of the
group's offset follows. So each record is accepted exactly once, whichever process dies in between,
and a rebalance or a full ledger only delays it. An unreadable record is a dead letter, and its
partition is read on. aiokafka's options pass through unchanged.

This file is the public class. See `_kafka/session.py`: the loop, and a record's path through the
other files.
"""

import asyncio
import inspect
import random
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from eventflow.core.clock import Clock, SystemClock
from eventflow.core.declarations import declaration, whole_number
from eventflow.core.errors import UsageError
from eventflow.core.retry import Backoff
from eventflow.events.event import Gauge, Intake
from triggers._kafka.client import KafkaError
from triggers._kafka.lag import lag_gauges
from triggers._kafka.options import (
    KafkaOptions,
    OnGap,
    Start,
    client_options,
    missing_codecs,
    reveal_passwords,
)
from triggers._kafka.records import Decode, RecordReader, record_headers
from triggers._kafka.session import Session

LOG_EVENTS = {
    "kafka.codecs_missing": (
        "Records compressed with these codecs are not readable: a package is not installed."
    ),
    "kafka.disconnected": (
        "The brokers are not reachable, or the consumer failed; a new one connects in "
        "`retry_in` seconds."
    ),
}

__all__ = ["Kafka", "record_headers"]

MAX_RECONNECT_DELAY_SECONDS = 30.0


class Kafka:
    """The records of a consumer group, as events.

    A plain record is `io.eventflow.kafka.record`: `source` `kafka://<cluster>/<topic>`, `subject`
    the key, `time` the record's timestamp, `data` its value; extensions `kafkatopic`,
    `kafkapartition`, `kafkaoffset`, `kafkatombstone` (no value), `partitionkey` (a key that is not
    UTF-8, as `base64:…`). `record_headers(event)` gives its headers. A CloudEvent, binary or
    structured, keeps its own attributes. `key="record"` runs records of one key in order, and
    different keys in parallel.

    Args:
        topics: names; or `pattern=`, a regular expression that matches the beginning of topic
            names.
        group_id: the consumer group. All servers of one deployment share it; no two deployments do.
        start: where a group without offsets begins: `"earliest"`, `"latest"`, or a datetime
            (records from then on). Applied once; after that the ledger's cursor decides, or a
            larger group offset.
        decode: `"json"`, `"bytes"`, or a function of the record (aiokafka's ConsumerRecord) that
            returns the data, or an Event. An exception makes the record a dead letter; but after
            RetryAfter, ConnectionError or TimeoutError the partition waits and the record is
            decoded again.
        on_gap: what to do when the broker no longer has the next offset (expired, or the topic was
            recreated): read from the `"earliest"` or the `"latest"`, with an error in the log
            and a dead letter that names the offsets; or `"stop"` that partition.
        skip_corrupt: whether a record whose bytes are damaged, or compressed with a codec that is
            not installed, becomes a dead letter (coordinates only). By default its partition stops,
            and is tried again each minute.
        skip_tombstones: whether records without a value are skipped. By default they are events
            without data.
        max_body: bytes of a value; larger ones are dead letters.
        cluster: the name in `source`, by default the first bootstrap server. It is part of a
            record's identity.
        name: the trigger's name, the key of its cursors; by default `kafka:` and the topics.
        client: any option of AIOKafkaConsumer: `security_protocol`, `sasl_mechanism`,
            `ssl_context`, `group_instance_id`…
    """

    @declaration
    def __init__(
        self,
        *topics: str,
        group_id: str,
        pattern: str | None = None,
        bootstrap_servers: str | Sequence[str] = "localhost:9092",
        start: Start = "earliest",
        decode: Decode = "json",
        on_gap: OnGap = "earliest",
        skip_corrupt: bool = False,
        skip_tombstones: bool = False,
        max_body: int = 1 << 20,
        cluster: str | None = None,
        name: str | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        **client: Any,
    ) -> None:
        _check(topics, pattern, group_id, start, decode, on_gap)
        whole_number(max_body, "Kafka: max_body=")
        servers = (
            bootstrap_servers if isinstance(bootstrap_servers, str) else ",".join(bootstrap_servers)
        )
        self.name = name or f"kafka:{pattern or ','.join(topics)}"
        client_values = {"bootstrap_servers": servers, "group_id": group_id, **client}
        self._options = KafkaOptions(
            topics=topics,
            pattern=pattern,
            start=start,
            on_gap=on_gap,
            skip_corrupt=skip_corrupt,
            reader=RecordReader(
                cluster or servers.partition(",")[0],
                decode,
                max_body,
                skip_tombstones=skip_tombstones,
            ),
            client=client_options(client_values, self.name),
            clock=clock or SystemClock(),
        )
        self._rng = rng or random.Random()
        self._sessions: list[Session] = []
        self._connection_state: str = "connecting"

    @property
    def condition(self) -> str | None:
        """What prevents reading, in one line; None if nothing does."""
        if not self._sessions:
            return self._connection_state
        conditions = [each.condition for each in self._sessions]
        return "; ".join(text for text in conditions if text) or None

    def gauges(self) -> Sequence[Gauge]:
        """`lag_messages` and `lag_seconds` of each partition assigned to this process."""
        states = [each for session in self._sessions for each in session.lag_states()]
        return list(lag_gauges(states, self._options.clock.now()))

    def check_secrets(self) -> None:
        """Raises EmptySecret; the app calls it before it listens."""
        reveal_passwords(self._options.client)

    def __repr__(self) -> str:
        options = self._options
        source = (
            f"pattern={options.pattern!r}"
            if options.pattern
            else ", ".join(map(repr, options.topics))
        )
        return f"Kafka({source}, name={self.name!r})"

    async def listen(self, intake: Intake) -> None:
        """A member of the group until cancelled. While no broker answers, it reconnects with
        backoff, at least every 30 s.
        """
        if missing := missing_codecs():
            intake.log.warning(
                "kafka.codecs_missing",
                codecs=missing,
                install="pip install 'eventflow-reactor[kafka]'",
            )
        backoff = Backoff(max_delay=MAX_RECONNECT_DELAY_SECONDS, rng=self._rng)
        while True:
            reason = ""
            session = Session(self._options, intake, self._rng)
            self._sessions.append(session)
            try:
                await session.run()
            except (
                KafkaError,
                OSError,
                TimeoutError,
            ) as error:  # from the network or the brokers: another consumer may succeed
                reason = f"{type(error).__name__}: {error}"
            finally:
                self._sessions.remove(session)
            if session.joined:
                backoff.reset()
            retry_in = next(backoff)
            self._connection_state = f"connecting: {reason}"
            intake.log.warning("kafka.disconnected", error=reason, retry_in=round(retry_in, 1))
            await asyncio.sleep(retry_in)


def _check(
    topics: tuple[str, ...],
    pattern: str | None,
    group_id: str,
    start: Start,
    decode: Decode,
    on_gap: OnGap,
) -> None:
    if bool(topics) == bool(pattern):
        raise UsageError("Kafka: expected names of topics, or pattern=, and not both")
    if not group_id:
        raise UsageError("Kafka: group_id= expected a name, found none")
    if pattern is not None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(
                f"Kafka: pattern={pattern!r} is no regular expression: {error}"
            ) from error
    if isinstance(start, datetime):
        if start.tzinfo is None:
            raise UsageError(
                "Kafka: start= expected an aware datetime, found the naive "
                f"{start.isoformat()}; add tzinfo=UTC"
            )
    elif start not in ("earliest", "latest"):
        raise UsageError(
            f'Kafka: start= expected "earliest", "latest" or a datetime, found {start!r}'
        )
    if not callable(decode) and decode not in ("json", "bytes"):
        raise UsageError(f'Kafka: decode= expected "json", "bytes" or a function, found {decode!r}')
    if inspect.iscoroutinefunction(decode):
        raise UsageError("Kafka: decode= expected a plain function, found an `async` one")
    if on_gap not in ("earliest", "latest", "stop"):
        raise UsageError(
            f'Kafka: on_gap= expected "earliest", "latest" or "stop", found {on_gap!r}'
        )
