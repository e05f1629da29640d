"""The intake that a monitor gives to its source: it counts events instead of recording them.

    source.listen ─► CountingIntake.accept ─► Engine.add_samples
                  ─► Intake.accept(drift events, cursor = the monitor's and the source's)
                  ─► the source acknowledges

The source's position, the counts and the drift events commit in one transaction: a crash changes
nothing, and an event that arrives twice counts once (`RecentIds`). Calls that wait for the lock
share a transaction. Until a transaction is known to have committed, the state in memory is void:
after an error or a cancel the engine is loaded from the store again, after a write that waits for
all earlier ones. `drift_monitor.py` makes one each time it listens.
"""

import asyncio
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from eventflow.core.backpressure import wait_while_full
from eventflow.core.clock import Clock
from eventflow.core.errors import StoreFull
from eventflow.events.event import Event, Intake, Json, Receipt, Undecodable
from triggers._drift.config import MonitorConfig, Sample
from triggers._drift.drift_events import DriftEvent
from triggers._drift.engine import Engine
from triggers._drift.samples import UNREADABLE, RowsOf, count_samples, read_sample
from triggers._drift.schema import to_event

SOURCE_PREFIX = "source:"
"""Of the source's own cursor keys; the monitor's begin with `drift:`."""

IDS_PER_PART = 256
"""Ids in one part of the cursor."""


class RecentIds:
    """The last ids, as 64-bit digests, in parts of BLOCK."""

    def __init__(self, limit: int, parts: Mapping[str, Any]) -> None:
        self._limit: int = limit
        numbers = sorted(int(key[8:]) for key in parts if key.startswith("drift:i/"))
        self._blocks: dict[int, list[str]] = {
            number: _split_ids(parts[f"drift:i/{number}"]) for number in numbers
        }
        self._known: set[str] = {each for block in self._blocks.values() for each in block}
        self._touched: set[int] = set()
        self._removed: list[int] = []

    def add(self, event: Event) -> bool:
        """Adds the id of an event; whether it is new."""
        ident = blake2b(f"{event.source}\0{event.id}".encode(), digest_size=8).hexdigest()
        if ident in self._known:
            return False
        self._known.add(ident)
        last = next(reversed(self._blocks), 0)
        if len(self._blocks.setdefault(last, [])) == IDS_PER_PART:
            last += 1
            self._blocks[last] = []
        self._blocks[last].append(ident)
        self._touched.add(last)
        if len(self._known) > self._limit + IDS_PER_PART:
            first = next(iter(self._blocks))
            self._known -= set(self._blocks.pop(first))
            self._removed.append(first)
        return True

    def changes(self) -> dict[str, Json]:
        found: dict[str, Json] = {
            f"drift:i/{number}": "".join(self._blocks[number])
            for number in self._touched & self._blocks.keys()
        }
        found |= {f"drift:i/{number}": None for number in self._removed}
        self._touched = set()
        self._removed = []
        return found


def _split_ids(text: str) -> list[str]:
    return [text[start : start + 16] for start in range(0, len(text), 16)]


class _PendingCall:
    """One call of `accept`, until a transaction includes it."""

    def __init__(
        self,
        items: Sequence[Event | Undecodable],
        samples: Mapping[int, Sample],
        cursor: Mapping[str, Json],
    ) -> None:
        self.items: Sequence[Event | Undecodable] = items
        self.samples: Mapping[int, Sample] = samples  # by position in `items`
        self.cursor: Mapping[str, Json] = cursor
        self.receipts: list[Receipt] | None = None


class UncertainCommit:
    """Whether a write of this process may still be in progress. Shared by successive intakes."""

    def __init__(self) -> None:
        self.is_open: bool = False


class CountingIntake:
    """The monitor's side of its source, for one `listen`.

    `remembered_ids`: how many event ids are known. `record`: events are also recorded.
    """

    def __init__(
        self,
        intake: Intake,
        config: MonitorConfig,
        rows: RowsOf,
        remembered_ids: int,
        record: bool,
        clock: Clock,
        uncertain_commit: UncertainCommit,
    ) -> None:
        self.log: Any = intake.log
        self.engine: Engine | None = None  # the last one loaded, for health and gauges
        self._intake: Intake = intake
        self._config: MonitorConfig = config
        self._rows: RowsOf = rows
        self._remembered_ids: int = remembered_ids
        self._record: bool = record
        self._clock: Clock = clock
        self._since: int = clock.now()
        self._uncertain_commit: UncertainCommit = uncertain_commit
        self._closed: bool = False
        self._lock = asyncio.Lock()  # held by the one call that changes engine and ids
        self._queue: list[_PendingCall] = []
        self._state: tuple[Engine, RecentIds] | None = None  # as last committed; None: unknown

    async def open(self) -> None:
        """Loads the state from the store."""
        async with self._lock:
            self._state = await self._take_state()

    def close(self) -> None:
        """Refuses further calls: the next `listen` has its own intake, and the two would overwrite
        each other's counts.
        """
        self._closed = True

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise StoreFull(f"{self._config.name} is being restarted", 1.0, closing=True)

    async def cursor(self) -> Mapping[str, Json]:
        """The source's own."""
        found = await self._intake.cursor()
        return {
            key.removeprefix(SOURCE_PREFIX): value
            for key, value in found.items()
            if key.startswith(SOURCE_PREFIX)
        }

    async def accept(
        self,
        *items: Event | Undecodable,
        cursor: Mapping[str, Json] | None = None,
        max_wait: float | None = None,
    ) -> list[Receipt]:
        """As `Intake.accept`. A counted event that is not recorded has the ledger id 0."""
        call = await self._read(items, cursor or {})
        return await wait_while_full(lambda: self._accept_once(call), max_wait)

    async def _accept_once(self, call: _PendingCall) -> list[Receipt]:
        self._queue.append(call)
        try:
            async with self._lock:
                if call.receipts is None:
                    self._refuse_when_closed()
                    await self._commit(list(self._queue))
        finally:
            if call in self._queue:
                self._queue.remove(call)
        assert call.receipts is not None
        return call.receipts

    async def tick(self) -> None:
        """Lets the engine act on the time. Waits while the ledger is full."""
        await wait_while_full(self._tick_once, None)

    async def _tick_once(self) -> None:
        async with self._lock:
            engine, recent = await self._take_state()
            events = engine.tick(self._clock.now())
            if events:
                await self._write(engine, recent, [*map(self._event, events)], {})
            self._state = engine, recent

    async def relearn(self) -> None:
        """The next rows are the new reference. Durable when it returns."""
        await wait_while_full(self._relearn_once, None)

    async def _relearn_once(self) -> None:
        async with self._lock:
            self._refuse_when_closed()
            engine, recent = await self._take_state()
            engine.relearn()
            await self._write(engine, recent, [], {})

    # ------------------------------------------------------------------------- rows

    async def _read(
        self, items: Sequence[Event | Undecodable], cursor: Mapping[str, Json]
    ) -> _PendingCall:
        """The rows of each event. One whose rows cannot be read becomes a dead letter."""
        found = list[Event | Undecodable]()
        samples = dict[int, Sample]()
        for position, item in enumerate(items):
            if isinstance(item, Undecodable):
                found.append(item)
                continue
            try:
                samples[position] = await read_sample(
                    item, self._rows, self._config.features, self._clock.now()
                )
                found.append(item)
            except UNREADABLE as error:  # around the user's `rows=` and its data
                found.append(
                    Undecodable(
                        id=item.id,
                        source=item.source,
                        body=item.to_json(),
                        error=f"rows: {type(error).__name__}: {error}",
                        type=item.type,
                    )
                )
        return _PendingCall(found, samples, cursor)

    # ------------------------------------------------------------------------- one transaction

    async def _commit(self, calls: Sequence[_PendingCall]) -> None:
        engine, recent = await self._take_state()
        counted = list[Sample]()
        recorded = list[Event | Undecodable]()
        receipts_of = [self._sort_items(call, recent, counted, recorded) for call in calls]
        events = [
            self._event(each) for each in await count_samples(engine, counted, self._clock.now())
        ]
        cursor = {
            SOURCE_PREFIX + key: value for call in calls for key, value in call.cursor.items()
        }
        written = await self._write(engine, recent, [*events, *recorded], cursor)
        rest = iter(written[len(events) :])
        for call, receipts in zip(calls, receipts_of, strict=True):
            call.receipts = [next(rest) if receipt is None else receipt for receipt in receipts]
            self._queue.remove(call)

    def _sort_items(
        self,
        call: _PendingCall,
        recent: RecentIds,
        counted: list[Sample],
        recorded: list[Event | Undecodable],
    ) -> list[Receipt | None]:
        """Adds the items to what is counted and what is recorded. Their receipts; None for a
        recorded item, whose receipt comes from the ledger.
        """
        receipts: list[Receipt | None] = []
        for position, item in enumerate(call.items):
            is_new = isinstance(item, Undecodable) or recent.add(item)
            if is_new and isinstance(item, Event) and "eventflowreplay" not in item.extensions:
                counted.append(call.samples[position])
            if self._record or isinstance(item, Undecodable):
                recorded.append(item)
                receipts.append(None)
            else:
                receipts.append(Receipt(0, item.id, duplicate=not is_new))
        return receipts

    async def _take_state(self) -> tuple[Engine, RecentIds]:
        """The committed state. The caller puts it back, once what it did to it has committed."""
        state = self._state
        self._state = None
        if state is None:
            if self._uncertain_commit.is_open:
                # Zero items: returns after every earlier write of this process is decided.
                await self._intake.accept()
            parts = await self._intake.cursor()
            recent = RecentIds(self._remembered_ids, parts)
            state = Engine(self._config, parts, self._since), recent
            self.engine = state[0]
        return state

    async def _write(
        self,
        engine: Engine,
        recent: RecentIds,
        items: Sequence[Event | Undecodable],
        cursor: Mapping[str, Json],
    ) -> list[Receipt]:
        """Never waits for room: the caller holds the lock."""
        self._uncertain_commit.is_open = True
        try:
            receipts = await self._intake.accept(
                *items, cursor={**cursor, **engine.changes(), **recent.changes()}, max_wait=0
            )
        except StoreFull:  # nothing was written, for certain
            self._uncertain_commit.is_open = False
            raise
        self._uncertain_commit.is_open = False
        self._state = engine, recent
        return receipts

    def _event(self, drift_event: DriftEvent) -> Event:
        return to_event(drift_event.drift, self._config.name, ident=drift_event.ident)
