"""One member of the consumer group, from joining to leaving: the loop that reads, records, and then commits.

    assigned ─► _take_up (positions.py: cursor, group, bounds) ─► seek, resume
    getmany ─► _fetch (faults.py: a partition that cannot be read stops alone) ─► batches.py ─► Intake.accept ─► _settle
                                                                               StoreFull ─► hold the batch, pause, poll on
    every second ─► commit what is recorded        revoked ─► let the batch under way end, commit, forget

The loop does everything in turn; beside it run only the committer, the probe and the client's own tasks, whose two callbacks
set a flag (assigned) or wait for the batch under way (revoked). The group's offset never leads the ledger's cursor: it is
committed after `accept` returned. getmany is called whatever happens, for that is what keeps a member in its group, and it is
never cancelled but to end. A consumer that raised is not used again, unless the error is one partition's.
"""

import asyncio
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress

import anyio.to_thread

from eventflow.core.errors import SourceError, StoreFull
from eventflow.events.event import Intake
from triggers._kafka.batches import Batch, read_batch
from triggers._kafka.client import (
    Consumer,
    ConsumerRebalanceListener,
    KafkaError,
    Record,
    TopicPartition,
    close,
)
from triggers._kafka.errors import (
    MISPLACED,
    TOO_LARGE,
    UNREADABLE,
    misplaced,
    too_large,
    unreadable,
)
from triggers._kafka.lag import Level
from triggers._kafka.options import Options
from triggers._kafka.partitions import Partitions
from triggers._kafka.positions import Place, Positions, Standing, key
from triggers._kafka.shutdown import to_its_end

Fetched = Mapping[TopicPartition, Sequence[Record]]

POLL = 0.5
"""Seconds that getmany waits for records."""

COMMIT_EVERY = 1.0
"""Seconds between commits of the group's offset, which serves lag displays and other stores; the cursor is the truth."""

PROBE_EVERY = 15.0
"""Seconds between looks at what the brokers have: lag of paused partitions, topics that are gone, a reader that stalled."""

STALLED = 180.0
"""Seconds without a record, while there are some to read, after which the consumer is made anew."""

ASKING = 30.0
"""Seconds that the brokers have for an answer before they count as away."""

REVOKING = 10.0
"""Seconds that a batch under way may take when its partitions are revoked; later it is dropped, and read again elsewhere."""

ENDING = 4.0
"""Seconds that the last commit, and then leaving the group, may take."""

LEAVING = 10.0
"""Seconds that all of it may take once it is cancelled."""

PATIENCE = 3.0
"""Seconds that a full ledger is waited for before partitions are paused: a pause throws away what was fetched ahead."""

AGAIN = 60.0
"""Seconds after which a partition that could not be read is tried again, and a full ledger is spoken of again."""

CAREFUL = 1_000
"""Records of a partition in one careful round."""


class Session(ConsumerRebalanceListener):
    """`run` it once. What it tells about itself (`partitions`, `condition`) may be read at any time on its loop."""

    def __init__(self, options: Options, intake: Intake, draw: random.Random) -> None:
        self._options, self._intake, self._log, self._clock = (
            options,
            intake,
            intake.log,
            options.clock,
        )
        self.consumer: Consumer = options.consumer()
        self.partitions = Partitions(options, self.consumer, intake.log)
        self._positions = Positions(options, intake, self.consumer, draw)
        self._epoch = 0
        self._revoked = False
        self._assigned: Collection[TopicPartition] | None = None
        self._batch: Batch | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._full: StoreFull | None = None
        self._full_since, self._try_at = 0.0, float("-inf")
        self.joined = False
        self._away: str | None = None

    @property
    def condition(self) -> str | None:
        """What keeps it from its work; None while nothing does."""
        if not self.joined:
            return "joining the group"
        if self._full is not None:
            return f"paused: {self._full}"
        stopped = [
            f"{key(tp)} is stopped: {each.stopped.why}"
            for tp, each in self.partitions.items()
            if each.stopped
        ]
        missing = [
            f"no topic {topic!r}"
            for topic in self._options.topics
            if not self.consumer.partitions_for_topic(topic)
        ]
        return "; ".join([*([self._away] if self._away else []), *missing, *stopped]) or None

    def standing(self) -> Iterator[tuple[TopicPartition, Place, Level]]:
        """Each partition, how far it is recorded, and what is known of its end by now."""
        for tp, partition in self.partitions.items():
            if tp in self.consumer.assignment():
                partition.level.look(self.consumer, tp)
            yield tp, partition.place, partition.level

    async def run(self) -> None:
        """Until cancelled, or until the consumer or the ledger cannot go on."""
        topics, pattern = list(self._options.topics), self._options.pattern
        self.consumer.subscribe(topics, pattern=pattern, listener=self)
        beside: list[asyncio.Task[None]] = []
        try:
            await self._start()
            beside = [
                asyncio.create_task(self._commit_now_and_then()),
                asyncio.create_task(self._probe()),
            ]
            while True:
                for task in beside:
                    if task.done():
                        task.result()
                await self._turn()
        finally:
            await to_its_end(self._end(beside), LEAVING)

    async def _start(self) -> None:
        try:
            await self.consumer.start()
        except (
            KeyError,
            IndexError,
            ValueError,
        ) as error:  # how aiokafka says that a login was refused
            raise SourceError(
                f"authentication or handshake failed: {type(error).__name__}: {error}"
            ) from error

    async def _end(self, beside: Sequence[asyncio.Task[None]]) -> None:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(ENDING):
                await self._commit()
        await close(self.consumer, ENDING)

    # ------------------------------------------------------------------ the loop

    async def _turn(self) -> None:
        """The next thing there is to do."""
        if self._revoked:
            await self._fetch()  # which waits for the assignment
        elif self._clock.monotonic() < self._try_at:
            await self._wait_for_room()
        elif self._assigned is not None:
            await self._take_up(self._assigned)
        elif self._batch is not None:
            await self._record(self._batch)
        elif self.partitions.doubtful:
            await self._examine(*self.partitions.doubtful.popitem())
        elif self.partitions.gaps:
            self._batch = self.partitions.pass_gaps(self._epoch)
        else:
            self._full = None
            self.partitions.go_on()
            fetched = await self._fetch()
            now = self._clock.now()
            self._batch = (
                await self._read(fetched)
                if fetched
                else await self.partitions.catch_up(self._epoch, now)
            )

    async def _read(self, fetched: Fetched) -> Batch | None:
        """What was fetched, as a batch; None when its partitions were taken away meanwhile."""
        epoch, reader = self._epoch, self._options.reader
        known = [
            (self.partitions[tp], records)
            for tp, records in fetched.items()
            if tp in self.partitions
        ]
        positions = {each.tp: await self.consumer.position(each.tp) for each, _ in known}
        if not reader.calls_user:
            batch = read_batch(reader, known, positions, epoch)
        else:  # a decoder may ask a schema registry: not on the loop that heartbeats are sent from
            batch = await anyio.to_thread.run_sync(read_batch, reader, known, positions, epoch)
        if epoch != self._epoch:
            return None
        for tp, later in batch.later.items():
            why, offset = f"the decoder asks for time: {later}", batch.places[tp].offset
            self.partitions.stop(tp, why, later.seconds, offset, passing=True)
        for tp in batch.changed:
            self.partitions.doubt(tp, changed=True)
        return batch if batch.places else None

    async def _record(self, batch: Batch) -> None:
        """Events and cursors in one transaction. With no room for them the batch is held, and tried again."""
        if batch.epoch != self._epoch:
            self._batch = None
            return
        cursor = {
            key(tp): place.cursor() for tp, place in batch.places.items()
        } | self._positions.notes
        self._idle.clear()
        try:
            await self._intake.accept(*batch.items, cursor=cursor)
        except StoreFull as full:
            self._slow_down(full)
            return
        finally:
            self._idle.set()
        self._batch, self._positions.notes = None, {}
        self.partitions.settle(batch)

    # ------------------------------------------------------------------ back-pressure

    def _slow_down(self, full: StoreFull) -> None:
        now = self._clock.monotonic()
        if self._full is None:
            self._full_since = now
            if (
                now > self._try_at + AGAIN
            ):  # a ledger at its bound is full again after every batch: once says it
                self._log.warning("kafka.slowed", reason=str(full))
        self._full, self._try_at = full, now + full.retry_after
        self.partitions.full = True

    async def _wait_for_room(self) -> None:
        """Waits a little, and stays in the group while it does."""
        now = self._clock.monotonic()
        seconds = min(POLL, max(0.0, self._try_at - now))
        if now - self._full_since < PATIENCE:
            await asyncio.sleep(seconds)
            return
        self.partitions.hold_all()
        for tp, records in (
            await self._fetch(seconds)
        ).items():  # what nobody can take now is read again
            self.consumer.seek(tp, records[0].offset)

    # ------------------------------------------------------------------ fetching

    async def _fetch(self, seconds: float = POLL) -> Fetched:
        try:
            return await self.consumer.getmany(timeout_ms=max(1, int(seconds * 1000)))
        except MISPLACED as error:
            for tp in misplaced(error):
                self.partitions.doubt(tp)
        except TOO_LARGE as error:
            self._meet_unreadable(*too_large(error), error)
        except UNREADABLE:
            return await self._fetch_with_care()
        return {}

    async def _fetch_with_care(self) -> Fetched:
        """Record by record, partition by partition, to find what cannot be read. What came before it is returned."""
        epoch, found = self._epoch, dict[TopicPartition, Sequence[Record]]()
        for tp in self.consumer.assignment() - self.consumer.paused():
            records: list[Record] = []
            position = await self.consumer.position(tp)
            if (self.consumer.highwater(tp) or position + 1) <= position:
                continue
            try:
                self.consumer.seek(tp, position)  # forgets what was fetched and half read
                while len(records) < CAREFUL and (
                    got := await self.consumer.getmany(tp, timeout_ms=500, max_records=1)
                ):
                    records += got[tp]
            except UNREADABLE as error:
                if epoch == self._epoch:
                    self._meet_unreadable(tp, await self.consumer.position(tp), error)
            if epoch != self._epoch:
                return {}
            if records:
                found[tp] = records
        return found

    def _meet_unreadable(self, tp: TopicPartition, offset: int, error: KafkaError) -> None:
        why = unreadable(error, offset)
        if tp not in self.partitions:
            return
        if self._options.skip_corrupt:
            self.partitions.skip(tp, offset, why)
        else:
            self.partitions.stop(tp, why, AGAIN, offset)

    # ------------------------------------------------------------------ gaps

    async def _examine(self, tp: TopicPartition, changed: bool) -> None:
        epoch = self._epoch
        async with asyncio.timeout(ASKING):
            begin, end = await self._positions.bounds(tp)
        if epoch != self._epoch:
            return
        partition = self.partitions[tp]
        standing = Standing(partition.place, begin, end)
        if changed or standing.is_gap:
            self.partitions.meet_gap(partition, standing)
        else:
            self.partitions.read_on(partition, begin)

    # ------------------------------------------------------------------ membership

    async def on_partitions_revoked(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, revoked: Collection[TopicPartition]
    ) -> None:
        """Called by the client, while it heartbeats: lets the batch under way end, and commits it. Waits for nothing else."""
        self._epoch += 1
        self._revoked, self._assigned = True, None
        with suppress(TimeoutError):
            async with asyncio.timeout(REVOKING):
                await self._idle.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(ENDING):
                await self._commit()
        self.partitions.forget()
        self._batch = None

    def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Called by the client. Nothing is read before the loop knows where to begin."""
        self.consumer.pause(*assigned)
        self._epoch += 1
        self._revoked, self._assigned = False, assigned

    async def _take_up(self, assigned: Collection[TopicPartition]) -> None:
        """Finds where to read each partition on, and begins there."""
        epoch = self._epoch
        try:
            async with asyncio.timeout(ASKING):
                found = await self._positions.find(assigned)
        except StoreFull as full:
            self._slow_down(full)
            return
        if epoch != self._epoch:
            return
        for tp, standing in found.items():
            self.partitions.take(tp, standing)
        self._assigned, self.joined = None, True
        self._log.info("kafka.assigned", partitions=sorted(key(tp) for tp in assigned))

    # ------------------------------------------------------------------ beside the loop

    async def _commit_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(COMMIT_EVERY)
            with suppress(TimeoutError):
                async with asyncio.timeout(ASKING):
                    await self._commit()

    async def _commit(self) -> None:
        """Tells the group what is recorded, with the ledger's name. Never a bare commit: that takes what is not recorded."""
        assigned = self.consumer.assignment()
        due = {
            tp: each.place.offset
            for tp, each in self.partitions.items()
            if each.place.offset != each.committed
        }
        offsets = {
            tp: (offset, self._positions.ledger) for tp, offset in due.items() if tp in assigned
        }
        if not offsets:
            return
        try:
            await self.consumer.commit(offsets)
        except (
            KafkaError
        ) as error:  # a rebalance was quicker, or the broker is away: the cursor knows
            self._log.debug("kafka.commit_failed", error=f"{type(error).__name__}: {error}")
            return
        for tp in offsets:
            if tp in self.partitions:
                self.partitions[tp].committed = due[tp]

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(PROBE_EVERY)
            tps = list(self.partitions)
            try:
                async with asyncio.timeout(ASKING):
                    end = await self._positions.ends(tps)
            except (KafkaError, TimeoutError) as error:
                self._away = f"the brokers do not answer: {type(error).__name__}: {error}"
                continue
            self._away = None
            for tp, offset in end.items():
                self._take_end(tp, offset)

    def _take_end(self, tp: TopicPartition, end: int) -> None:
        if (partition := self.partitions.get(tp)) is None:
            return
        partition.level.end = end
        if end < partition.place.offset and not self.partitions.is_held(tp):
            self.partitions.read_on(partition)
        waiting = end > partition.place.offset and partition.stopped is None and self._full is None
        if not waiting:
            partition.moved_at = self._clock.monotonic()
        elif self._clock.monotonic() - partition.moved_at > STALLED:
            raise SourceError(
                f"{key(tp)}: {end - partition.place.offset} records wait, and none came in {STALLED:g} s"
            )
