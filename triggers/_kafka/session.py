"""One member of the consumer group, from joining to leaving: fetch, record, then commit.

    assigned ─► Positions.resolve (cursor, group, bounds) ─► seek, resume
    Fetcher.fetch ─► decode_batch ─► Intake.accept ─► mark_recorded ─► GroupCommitter.commit
                                     StoreFull ─► keep the batch, pause, continue to poll
    revoked ─► the current batch ends, its offsets are committed, the partitions are forgotten

`Kafka.listen` runs a session until the consumer fails, then makes a new one. The loop does
everything in sequence; in parallel run the committer (committing.py), the probe (probe.py) and the
client's own tasks, whose two callbacks set a flag (assigned) or wait for the current batch
(revoked). The group's offset never leads the ledger's cursor: it is committed after `accept` has
returned. The loop polls also while the ledger is full, since a member that does not poll leaves its
group; a poll is cancelled only at the end.
"""

import asyncio
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial

import anyio.to_thread

from eventflow.core.errors import SourceError, StoreFull
from eventflow.events.event import Intake
from triggers._kafka.batches import DecodedBatch, decode_batch
from triggers._kafka.client import Consumer, ConsumerRebalanceListener, TopicPartition, close
from triggers._kafka.committing import GroupCommitter
from triggers._kafka.errors import CheckReason
from triggers._kafka.fetching import POLL_TIMEOUT_SECONDS, Fetched, Fetcher
from triggers._kafka.lag import Lag
from triggers._kafka.options import KafkaOptions
from triggers._kafka.partitions import AssignedPartitions
from triggers._kafka.positions import OffsetBounds, PartitionPosition, Positions, partition_name
from triggers._kafka.probe import BrokerProbe
from triggers._kafka.shutdown import finish_despite_cancel

LOG_EVENTS = {
    "kafka.assigned": "A consumer has its partitions and starts reading.",
    "kafka.decoder_slow": (
        "The user's `decode=` has not returned for 30 seconds; nothing is read until it does."
    ),
}

REQUEST_TIMEOUT_SECONDS = 30.0
"""For the brokers' answers about positions; later the consumer is replaced."""

REVOKE_TIMEOUT_SECONDS = 10.0
"""For the current batch when its partitions are revoked. Later it is dropped, and read again by
their next owner.
"""

LEAVE_TIMEOUT_SECONDS = 4.0
"""For the last commit, and again for leaving the group."""

CLOSE_TIMEOUT_SECONDS = 10.0
"""For the whole end of a cancelled session."""

SLOW_DECODER_SECONDS = 30.0
"""That decoding a batch takes before it is reported."""

PAUSE_AFTER_SECONDS = 3.0
"""That the ledger is full before the partitions are paused: a pause drops what was fetched ahead.
"""


class Session(ConsumerRebalanceListener):
    """`run` it once. `partitions` and `condition` may be read at any time on its loop; `joined`: it
    had an assignment.
    """

    def __init__(self, options: KafkaOptions, intake: Intake, rng: random.Random) -> None:
        self._options: KafkaOptions = options
        self._intake: Intake = intake
        self.consumer: Consumer = options.create_consumer()
        self.partitions = AssignedPartitions(options, self.consumer, intake.log)
        self._positions = Positions(options, intake, self.consumer, rng)
        self._fetcher = Fetcher(self.consumer, self.partitions, skip_corrupt=options.skip_corrupt)
        self._committer = GroupCommitter(
            self.consumer, self.partitions, self._positions, intake.log
        )
        self._probe = BrokerProbe(self.partitions, self._positions, options.clock)
        self._is_revoked: bool = False
        self._assigned: Collection[TopicPartition] | None = None  # not started yet
        self._batch: DecodedBatch | None = None  # not recorded yet
        self._not_recording = asyncio.Event()  # set while no accept is in progress
        self._not_recording.set()
        self._full_since: float = 0.0  # monotonic
        self._retry_at: float = float("-inf")  # monotonic: when a full ledger is tried again
        self.joined: bool = False

    @property
    def condition(self) -> str | None:
        """What prevents reading, in one line; None if nothing does."""
        if not self.joined:
            return "joining the group"
        if self.partitions.decoder_is_slow:
            return f"decode= has not returned for more than {SLOW_DECODER_SECONDS:.0f} s"
        if self.partitions.store_full is not None:
            return f"paused: {self.partitions.store_full}"
        problems = [self._probe.problem] if self._probe.problem else []
        problems += [
            f"no topic {topic!r}"
            for topic in self._options.topics
            if not self.consumer.partitions_for_topic(topic)
        ]
        problems += [
            f"{partition_name(tp)} is stopped: {each.stopped.reason}"
            for tp, each in self.partitions.items()
            if each.stopped
        ]
        return "; ".join(problems) or None

    def lag_states(self) -> Iterator[tuple[TopicPartition, PartitionPosition, Lag]]:
        """Each partition, its recorded position, and its end as known now."""
        for tp, partition in self.partitions.items():
            if tp in self.consumer.assignment():
                partition.lag.update(self.consumer, tp)
            yield tp, partition.position, partition.lag

    async def run(self) -> None:
        """Until cancelled, or until the consumer or the ledger fails."""
        options = self._options
        self.consumer.subscribe(list(options.topics), pattern=options.pattern, listener=self)
        helpers: list[asyncio.Task[None]] = []
        try:
            await self._start()
            helpers = [
                asyncio.create_task(self._committer.run()),
                asyncio.create_task(self._probe.run()),
            ]
            while True:
                for task in helpers:
                    if task.done():
                        task.result()
                await self._step()
        finally:
            await finish_despite_cancel(self._end(helpers), CLOSE_TIMEOUT_SECONDS)

    async def _start(self) -> None:
        try:
            await self.consumer.start()
        except (KeyError, IndexError, ValueError) as error:  # aiokafka's errors for a refused login
            raise SourceError(
                f"authentication or handshake failed: {type(error).__name__}: {error}"
            ) from error

    async def _end(self, helpers: Sequence[asyncio.Task[None]]) -> None:
        for task in helpers:
            task.cancel()
        await asyncio.gather(*helpers, return_exceptions=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_TIMEOUT_SECONDS):
                await self._committer.commit()
        await close(self.consumer, LEAVE_TIMEOUT_SECONDS)

    # ------------------------------------------------------------------ the loop

    async def _step(self) -> None:
        """The next piece of work, in order of urgency."""
        partitions = self.partitions
        if self._is_revoked:
            await self._fetcher.fetch()  # waits for the assignment
        elif self._options.clock.monotonic() < self._retry_at:
            await self._wait_for_room()
        elif self._assigned is not None:
            await self._start_partitions(self._assigned)
        elif self._batch is not None:
            await self._record(self._batch)
        elif partitions.uncertain:
            await self._check_position(*partitions.uncertain.popitem())
        elif partitions.gaps:
            self._batch = partitions.skip_gaps()
        else:
            partitions.resume_due()
            fetched = await self._fetcher.fetch()
            self._batch = (
                await self._decode(fetched) if fetched else await partitions.advance_idle()
            )

    async def _decode(self, fetched: Fetched) -> DecodedBatch | None:
        """The fetched records as a batch; None when their partitions were revoked meanwhile."""
        partitions = self.partitions
        reader = self._options.reader
        epoch = partitions.epoch
        known = [(partitions[tp], records) for tp, records in fetched.items() if tp in partitions]
        positions: dict[TopicPartition, int] = {}
        for partition, _ in known:
            positions[partition.tp] = await self.consumer.position(partition.tp)
            partition.fetch_offset = positions[partition.tp]
        if reader.runs_user_code:  # it may ask a schema registry: not on the loop of the heartbeats
            decoding = partial(decode_batch, reader, known, positions, epoch)
            batch = await self._decode_in_thread(decoding)
        else:
            batch = decode_batch(reader, known, positions, epoch)
        if epoch != partitions.epoch:
            return None
        for tp, later in batch.retry_later.items():
            partitions.stop(
                tp,
                f"the decoder asks for time: {later}",
                later.seconds,
                batch.positions[tp].offset,
                temporary=True,
            )
        for tp in batch.changed:
            partitions.mark_uncertain(tp, CheckReason.CHANGED)
        return batch if batch.positions else None

    async def _decode_in_thread(self, decoding: Callable[[], DecodedBatch]) -> DecodedBatch:
        """The batch. A decoder that does not return is a line in the log, and the condition."""
        watch = asyncio.create_task(self._report_slow_decoder())
        try:
            return await anyio.to_thread.run_sync(decoding)
        finally:
            watch.cancel()
            self.partitions.decoder_is_slow = False
            await asyncio.gather(watch, return_exceptions=True)

    async def _report_slow_decoder(self) -> None:
        await asyncio.sleep(SLOW_DECODER_SECONDS)
        self.partitions.decoder_is_slow = True
        self._intake.log.warning("kafka.decoder_slow", seconds=SLOW_DECODER_SECONDS)

    async def _record(self, batch: DecodedBatch) -> None:
        """Records events and cursors in one transaction. While the ledger is full, the batch is
        kept and tried again.
        """
        if batch.epoch != self.partitions.epoch:
            self._batch = None
            return
        cursor = {partition_name(tp): each.to_cursor() for tp, each in batch.positions.items()}
        self._not_recording.clear()
        try:
            await self._intake.accept(
                *batch.items, cursor=cursor | self._positions.unrecorded_keys, max_wait=0
            )
        except StoreFull as full:  # nothing was recorded
            if full.closing:
                raise
            self._on_store_full(full.copy())
            return
        finally:
            self._not_recording.set()
        self._batch = None
        self._positions.unrecorded_keys = {}
        self.partitions.mark_recorded(batch)

    # ------------------------------------------------------------------ back-pressure

    def _on_store_full(self, full: StoreFull) -> None:
        now = self._options.clock.monotonic()
        if self.partitions.store_full is None:
            self._full_since = now
        self.partitions.store_full = full
        self._retry_at = now + full.retry_after

    async def _wait_for_room(self) -> None:
        """Waits a part of the time until the next try, and stays in the group."""
        now = self._options.clock.monotonic()
        seconds = min(POLL_TIMEOUT_SECONDS, max(0.0, self._retry_at - now))
        if now - self._full_since < PAUSE_AFTER_SECONDS:
            await asyncio.sleep(seconds)
            return
        self.partitions.pause_all()
        for tp, records in (await self._fetcher.fetch(seconds)).items():
            self.consumer.seek(tp, records[0].offset)  # fetched before the pause: read again later

    # ------------------------------------------------------------------ positions and membership

    async def _check_position(self, tp: TopicPartition, reason: CheckReason) -> None:
        epoch = self.partitions.epoch
        async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
            begin, end = await self._positions.bounds(tp)
        if epoch != self.partitions.epoch:
            return
        partition = self.partitions[tp]
        self.partitions.check(partition, OffsetBounds(partition.position, begin, end), reason)

    async def on_partitions_revoked(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, revoked: Collection[TopicPartition]
    ) -> None:
        """Called by the client, which heartbeats meanwhile. Waits for the current batch, and
        commits it.
        """
        self.partitions.epoch += 1
        self._is_revoked = True
        self._assigned = None
        with suppress(TimeoutError):
            async with asyncio.timeout(REVOKE_TIMEOUT_SECONDS):
                await self._not_recording.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_TIMEOUT_SECONDS):
                await self._committer.commit()
        self.partitions.revoke_all()
        self._batch = None

    def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Called by the client. The partitions stay paused until `_start_partitions`."""
        self.consumer.pause(*assigned)
        self.partitions.epoch += 1
        self._is_revoked = False
        self._assigned = assigned

    async def _start_partitions(self, assigned: Collection[TopicPartition]) -> None:
        """Resolves the position of each partition, and starts to read there."""
        epoch = self.partitions.epoch
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
                resolved = await self._positions.resolve(assigned)
        except StoreFull as full:  # the start position was not recorded: again later
            self._on_store_full(full)
            return
        if epoch != self.partitions.epoch:
            return
        for tp, bounds in resolved.items():
            self.partitions.assign(tp, bounds)
        self._assigned = None
        self.joined = True
        names = sorted(partition_name(tp) for tp in assigned)
        self._intake.log.info("kafka.assigned", partitions=names)
