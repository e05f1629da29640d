"""Kafka topics as events: `app.on(Kafka("orders", bootstrap_servers="kafka:9092", group_id="shop"), handle, key="record")`.

Records are recorded in batches: events and the partitions' offsets in one transaction; the group's commit follows. So each
record is accepted exactly once, whatever dies in between, and a rebalance or a full ledger only delays. What cannot be read is
a dead letter, and its partition goes on. aiokafka's options pass through untouched.

This file is the public face; `_kafka/session.py` is the loop and shows the way of a record through the other rooms.
"""

import asyncio
import random
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from eventflow.core.clock import Clock, SystemClock
from eventflow.core.errors import UsageError
from eventflow.events.event import Gauge, Intake
from triggers._kafka.client import KafkaError
from triggers._kafka.lag import gauges
from triggers._kafka.options import OnGap, Options, Start, client_options, missing_codecs
from triggers._kafka.records import Decode, Reader, record_headers
from triggers._kafka.session import Session

__all__ = ["Kafka", "record_headers"]

BACKOFF = (0.5, 30.0)
"""Seconds before the brokers are tried again: first and longest; full jitter between."""


class Kafka:
    """A consumer group's records as events.

    A plain record is `io.eventflow.kafka.record`: `source` `kafka://<cluster>/<topic>`, `subject` the key, `time` the record's
    timestamp, `data` its value; extensions `kafkatopic`, `kafkapartition`, `kafkaoffset`, `kafkatombstone` (no value),
    `partitionkey` (a key that is not UTF-8, as `base64:…`). `record_headers(event)` gives its headers. A CloudEvent, binary or
    structured, comes as it was sent. `key="record"` runs records of one key in order, and different keys in parallel.

    Args:
        topics: names; or `pattern=`, a regular expression that topics' names match from their beginning.
        group_id: the consumer group. All servers of one deployment share it; no two deployments do.
        start: where a group without offsets begins: `"earliest"`, `"latest"`, or a datetime (records from then on). Applied
            once; then the ledger's cursor counts, or the group's offset where that is larger.
        decode: `"json"`, `"bytes"`, or a function of the record (aiokafka's ConsumerRecord) that returns the data, or an Event.
            What it raises is a dead letter; but RetryAfter, ConnectionError and TimeoutError hold the partition until it works.
        on_gap: what to do about offsets that the broker has no more (expired, or the topic was made anew): read on from the
            `"earliest"` or the `"latest"`, with an error in the log and a dead letter that names the offsets; or `"stop"` that
            partition.
        skip_corrupt: whether a record whose bytes are damaged, or compressed with a codec that is not installed, becomes a dead
            letter (coordinates only). By default its partition stops, and is tried again each minute.
        skip_tombstones: records without a value are no events. By default they are, with no data.
        max_body: bytes of a value; larger ones are dead letters.
        cluster: the name in `source`, by default the first bootstrap server. It is part of a record's identity.
        name: the trigger's name, by which its cursors are kept; by default `kafka:` and the topics.
        client: any option of AIOKafkaConsumer: `security_protocol`, `sasl_mechanism`, `ssl_context`, `group_instance_id`…
    """

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
        entropy: random.Random | None = None,
        **client: Any,
    ) -> None:
        _check(topics, pattern, group_id, start, decode, on_gap)
        servers = (
            bootstrap_servers if isinstance(bootstrap_servers, str) else ",".join(bootstrap_servers)
        )
        self.name = name or f"kafka:{pattern or ','.join(topics)}"
        given = {"bootstrap_servers": servers, "group_id": group_id, **client}
        self._options = Options(
            topics=topics,
            pattern=pattern,
            start=start,
            on_gap=on_gap,
            skip_corrupt=skip_corrupt,
            reader=Reader(
                cluster or servers.partition(",")[0],
                decode,
                max_body,
                skip_tombstones=skip_tombstones,
            ),
            client=client_options(given, self.name),
            clock=clock or SystemClock(),
        )
        self._draw = entropy or random.Random()
        self._sessions: list[Session] = []
        self._connecting: str | None = "connecting"

    @property
    def condition(self) -> str | None:
        """What keeps it from its work, in a line; None while nothing does."""
        said = [each.condition for each in self._sessions]
        return "; ".join(text for text in said if text) or (self._connecting if not said else None)

    def gauges(self) -> Sequence[Gauge]:
        """`lag_messages` and `lag_seconds` of each partition that is assigned here."""
        standing = [each for session in self._sessions for each in session.standing()]
        return list(gauges(standing, self._options.clock.now()))

    async def listen(self, intake: Intake) -> None:
        """A member of the group until cancelled. While no broker can be reached it tries again, at least every 30 s."""
        if missing := missing_codecs():
            intake.log.warning(
                "kafka.codecs_missing",
                codecs=missing,
                install="pip install 'eventflow-reactor[kafka]'",
            )
        wait = BACKOFF[0]
        while True:
            why = ""
            session = Session(self._options, intake, self._draw)
            self._sessions.append(session)
            try:
                await session.run()
            except (
                KafkaError,
                OSError,
                TimeoutError,
            ) as error:  # what the network and the brokers may do
                why = f"{type(error).__name__}: {error}"
            finally:
                self._sessions.remove(session)
            wait = BACKOFF[0] if session.joined else min(wait * 2, BACKOFF[1])
            seconds = self._draw.uniform(0, wait)
            self._connecting = f"connecting: {why}"
            intake.log.warning("kafka.lost", error=why, again_in=round(seconds, 1))
            await asyncio.sleep(seconds)


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
                f"Kafka: start= expected an aware datetime, found the naive {start.isoformat()}; add tzinfo=UTC"
            )
    elif start not in ("earliest", "latest"):
        raise UsageError(
            f'Kafka: start= expected "earliest", "latest" or a datetime, found {start!r}'
        )
    if not callable(decode) and decode not in ("json", "bytes"):
        raise UsageError(f'Kafka: decode= expected "json", "bytes" or a function, found {decode!r}')
    if on_gap not in ("earliest", "latest", "stop"):
        raise UsageError(
            f'Kafka: on_gap= expected "earliest", "latest" or "stop", found {on_gap!r}'
        )
