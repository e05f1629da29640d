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
from enum import Enum
from hashlib import blake2b
from typing import Any

import orjson
from msgspec.structs import replace

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
    """The last ids, as 64-bit digests, each with a 32-bit digest of its content, in parts of
    IDS_PER_PART: cursor keys `drift:k/N`. Keys `drift:i/N`, of an earlier version, have only ids.
    """

    def __init__(self, limit: int, parts: Mapping[str, Any]) -> None:
        self._limit: int = limit
        self._blocks: dict[int, list[str]] = {}
        self._contents: dict[str, str] = {}
        numbers = {int(key[8:]) for key in parts if key.startswith(("drift:k/", "drift:i/"))}
        for number in sorted(numbers):
            entries = _split(parts.get(f"drift:k/{number}") or "", 24)
            entries = entries or _split(parts[f"drift:i/{number}"], 16)
            self._blocks[number] = [each[:16] for each in entries]
            self._contents |= {each[:16]: each[16:] or UNKNOWN_CONTENT for each in entries}
        self._outdated = {number for number in numbers if f"drift:i/{number}" in parts}
        self._touched: set[int] = set()
        self._removed: list[int] = []

    def add(self, event: Event) -> "Novelty":
        """Adds the id of an event, if it is new; what was known of the event before."""
        ident = blake2b(f"{event.source}\0{event.id}".encode(), digest_size=8).hexdigest()
        content = _content_digest(event)
        known = self._contents.get(ident)
        if known is not None:
            is_other = known != content and UNKNOWN_CONTENT not in (known, content)
            return Novelty.OTHER_CONTENT if is_other else Novelty.KNOWN
        self._contents[ident] = content
        last = next(reversed(self._blocks), 0)
        if len(self._blocks.setdefault(last, [])) == IDS_PER_PART:
            last += 1
            self._blocks[last] = []
        self._blocks[last].append(ident)
        self._touched.add(last)
        if len(self._contents) > self._limit + IDS_PER_PART:
            first = next(iter(self._blocks))
            for each in self._blocks.pop(first):
                del self._contents[each]
            self._removed.append(first)
        return Novelty.NEW

    def changes(self) -> dict[str, Json]:
        touched = self._touched & self._blocks.keys()
        found: dict[str, Json] = {
            f"drift:k/{number}": "".join(each + self._contents[each] for each in block)
            for number, block in self._blocks.items()
            if number in touched
        }
        found |= {f"drift:k/{number}": None for number in self._removed}
        outdated = self._outdated & {*touched, *self._removed}
        found |= {f"drift:i/{number}": None for number in outdated}
        self._outdated -= outdated
        self._touched = set()
        self._removed = []
        return found


class Novelty(Enum):
    """What is known of an event: nothing, its id and content, or its id with other content."""

    NEW = 1
    KNOWN = 2
    OTHER_CONTENT = 3


UNKNOWN_CONTENT = "--------"


def _content_digest(event: Event) -> str:
    """Digest of type and data, which does not depend on the order of keys (8 hex digits)."""
    data = event.data
    try:
        body = data if isinstance(data, bytes) else orjson.dumps(data, option=_SORTED)
    except TypeError:  # it has no JSON, and is not recorded
        return UNKNOWN_CONTENT
    return blake2b(event.type.encode() + b"\0" + body, digest_size=4).hexdigest()


_SORTED = orjson.OPT_SORT_KEYS


def _split(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


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
        self.conflicts: set[int] = set()  # positions of known ids with other content


class UncertainCommit:
    """Whether a write of this process may still be in progress. Shared by successive intakes."""

    def __init__(self) -> None:
        self.is_open: bool = False


class CountingIntake:
    """The monitor's side of its source, for one `listen`.

    `remembered_ids`: how many event ids are known. `record`: events are also recorded.
    `repeats_may_differ`: the source's; if false, a known id with other content is a dead letter.
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
        repeats_may_differ: bool = False,
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
        self._repeats_may_differ: bool = repeats_may_differ
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
            for position in call.conflicts:
                receipt = call.receipts[position]
                call.receipts[position] = replace(receipt, duplicate=False, conflict=True)
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
        call.conflicts.clear()  # of an earlier try
        for position, item in enumerate(call.items):
            novelty = Novelty.NEW if isinstance(item, Undecodable) else recent.add(item)
            is_new = novelty is Novelty.NEW
            if is_new and isinstance(item, Event) and "eventflowreplay" not in item.extensions:
                counted.append(call.samples[position])
            if self._record or isinstance(item, Undecodable):
                recorded.append(item)  # the ledger finds a conflict by itself
                receipts.append(None)
            elif novelty is Novelty.OTHER_CONTENT and not self._repeats_may_differ:
                recorded.append(_conflicting(item))
                receipts.append(None)
                call.conflicts.add(position)
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


def _conflicting(event: Event) -> Undecodable:
    """The dead letter of an event whose id was counted with other content."""
    return Undecodable(
        id=event.id,
        source=event.source,
        body=event.to_json(),
        error="its id is known with other content, which came first and was counted",
        type=event.type,
    )
