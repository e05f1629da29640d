"""What a source sees of a monitor: an `Intake` that counts events instead of recording them.

    source.listen ─► Desk.accept ─► Engine.take ─► Intake.accept(drifts, cursor = its own + the source's) ─► the source acks

The source's position, the counts and the drifts commit in one transaction, so that a crash changes nothing, and an event that
comes twice counts once (`Recent`). Callers that wait together share one. Until a transaction is known to have committed, what
is in memory is void: after an error or a cancel the engine is read again from the store, behind a write that waits for those
before.
"""

import asyncio
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from eventflow.core.clock import Clock
from eventflow.core.errors import StoreFull
from eventflow.events.event import Event, Intake, Json, Receipt, Undecodable
from triggers._drift.config import Sample, Setting
from triggers._drift.drift_events import Told
from triggers._drift.engine import Engine
from triggers._drift.samples import UNREADABLE, RowsOf, sample, take
from triggers._drift.schema import to_event

SOURCE = "source:"
"""Before the source's own cursor keys; the monitor's begin with `drift:`."""

BLOCK = 256
"""Ids of one part."""


class Recent:
    """The last ids, as 64-bit digests, in parts of BLOCK."""

    def __init__(self, limit: int, parts: Mapping[str, Any]) -> None:
        self._limit = limit
        numbers = sorted(int(key[8:]) for key in parts if key.startswith("drift:i/"))
        self._blocks = {number: _cut(parts[f"drift:i/{number}"]) for number in numbers}
        self._known = {each for block in self._blocks.values() for each in block}
        self._touched: set[int] = set()
        self._gone: list[int] = []

    def add(self, event: Event) -> bool:
        """Whether it is a new one; it is known from now on."""
        ident = blake2b(f"{event.source}\0{event.id}".encode(), digest_size=8).hexdigest()
        if ident in self._known:
            return False
        self._known.add(ident)
        last = next(reversed(self._blocks), 0)
        if len(self._blocks.setdefault(last, [])) == BLOCK:
            last += 1
            self._blocks[last] = []
        self._blocks[last].append(ident)
        self._touched.add(last)
        if len(self._known) > self._limit + BLOCK:
            first = next(iter(self._blocks))
            self._known -= set(self._blocks.pop(first))
            self._gone.append(first)
        return True

    def changes(self) -> dict[str, Json]:
        found: dict[str, Json] = {
            f"drift:i/{number}": "".join(self._blocks[number])
            for number in self._touched & self._blocks.keys()
        }
        found |= {f"drift:i/{number}": None for number in self._gone}
        self._touched, self._gone = set(), []
        return found


def _cut(text: str) -> list[str]:
    return [text[place : place + 16] for place in range(0, len(text), 16)]


class _Waiting:
    """One call of `accept`, until a transaction has it."""

    def __init__(
        self,
        items: Sequence[Event | Undecodable],
        samples: Mapping[int, Sample],
        cursor: Mapping[str, Json],
    ) -> None:
        self.items, self.samples, self.cursor = items, samples, cursor
        self.receipts: list[Receipt] | None = None


class Doubt:
    """Whether a write of this process may still be under way, from one opening of the listener to the next."""

    def __init__(self) -> None:
        self.open = False


class Desk:
    """The monitor's side of its source, for one opening. `record`: events go on into the ledger too."""

    def __init__(
        self,
        intake: Intake,
        setting: Setting,
        rows: RowsOf,
        remember: int,
        record: bool,
        clock: Clock,
        doubt: Doubt,
    ) -> None:
        self.log: Any = intake.log
        self._intake, self._setting, self._rows, self._clock = intake, setting, rows, clock
        self._remember, self._record_too = remember, record
        self._since, self._doubt, self._closed = clock.now(), doubt, False
        self._turn = asyncio.Lock()
        self._queue: list[_Waiting] = []
        self._state: tuple[Engine, Recent] | None = None
        self.engine: Engine | None = None
        self.duplicates = 0

    async def open(self) -> None:
        """Reads what is stored, so that it is there to look at."""
        async with self._turn:
            self._state = await self._loaded()

    def close(self) -> None:
        """Nothing more is counted here: the next opening has a desk of its own, and two would overwrite each other."""
        self._closed = True

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise StoreFull(f"{self._setting.name} is being opened again", 1.0)

    async def cursor(self) -> Mapping[str, Json]:
        """The source's own."""
        found = await self._intake.cursor()
        return {
            key.removeprefix(SOURCE): value
            for key, value in found.items()
            if key.startswith(SOURCE)
        }

    async def accept(
        self, *items: Event | Undecodable, cursor: Mapping[str, Json] | None = None
    ) -> list[Receipt]:
        """Durable when it returns. A counted event that is not recorded has the ledger id 0."""
        waiting = await self._read(items, cursor or {})
        self._queue.append(waiting)
        try:
            async with self._turn:
                if waiting.receipts is None:
                    self._refuse_when_closed()
                    await self._commit(list(self._queue))
        finally:
            if waiting in self._queue:
                self._queue.remove(waiting)
        assert waiting.receipts is not None
        return waiting.receipts

    async def tick(self) -> None:
        """Time has passed."""
        async with self._turn:
            engine, recent = await self._loaded()
            told = engine.tick(self._clock.now())
            if told:
                await self._write(engine, recent, [*map(self._event, told)], {})
            self._state = engine, recent

    async def relearn(self) -> None:
        """The next rows are the new reference. Durable when it returns."""
        async with self._turn:
            self._refuse_when_closed()
            engine, recent = await self._loaded()
            engine.relearn()
            await self._write(engine, recent, [], {})

    # ------------------------------------------------------------------------- rows

    async def _read(
        self, items: Sequence[Event | Undecodable], cursor: Mapping[str, Json]
    ) -> _Waiting:
        """The rows of each event; one whose rows cannot be read is a dead letter, as the source's own are."""
        kept, samples = list[Event | Undecodable](), dict[int, Sample]()
        for place, item in enumerate(items):
            if isinstance(item, Undecodable):
                kept.append(item)
                continue
            try:
                samples[place] = await sample(
                    item, self._rows, self._setting.watched, self._clock.now()
                )
                kept.append(item)
            except UNREADABLE as error:
                reason = f"rows: {type(error).__name__}: {error}"
                kept.append(
                    Undecodable(
                        id=item.id,
                        source=item.source,
                        body=item.to_json(),
                        error=reason,
                        type=item.type,
                    )
                )
        return _Waiting(kept, samples, cursor)

    # ------------------------------------------------------------------------- one transaction

    async def _commit(self, batch: Sequence[_Waiting]) -> None:
        engine, recent = await self._loaded()
        counted, passed = list[Sample](), list[Event | Undecodable]()
        plan = [self._plan(waiting, recent, counted, passed) for waiting in batch]
        told = await take(engine, counted, self._clock.now())
        cursor = {SOURCE + key: value for waiting in batch for key, value in waiting.cursor.items()}
        given = await self._write(engine, recent, [*map(self._event, told), *passed], cursor)
        left = iter(given[len(told) :])
        for waiting, receipts in zip(batch, plan, strict=True):
            waiting.receipts = [next(left) if receipt is None else receipt for receipt in receipts]
            self._queue.remove(waiting)

    def _plan(
        self,
        waiting: _Waiting,
        recent: Recent,
        counted: list[Sample],
        passed: list[Event | Undecodable],
    ) -> list[Receipt | None]:
        """What is counted and what goes on into the ledger, whose receipts are then None here."""
        receipts: list[Receipt | None] = []
        for place, item in enumerate(waiting.items):
            fresh = isinstance(item, Undecodable) or recent.add(item)
            if not fresh:
                self.duplicates += 1
            elif isinstance(item, Event) and "eventflowreplay" not in item.extensions:
                counted.append(waiting.samples[place])
            if self._record_too or isinstance(item, Undecodable):
                passed.append(item)
                receipts.append(None)
            else:
                receipts.append(Receipt(0, item.id, duplicate=not fresh))
        return receipts

    async def _loaded(self) -> tuple[Engine, Recent]:
        """The state, which is nobody's until it is put back: with a transaction that has committed."""
        state, self._state = self._state, None
        if state is None:
            if self._doubt.open:
                await (
                    self._intake.accept()
                )  # behind any write still under way, whose outcome nobody waited for
            parts = await self._intake.cursor()
            state = Engine(self._setting, parts, self._since), Recent(self._remember, parts)
            self.engine = state[0]
        return state

    async def _write(
        self,
        engine: Engine,
        recent: Recent,
        items: Sequence[Event | Undecodable],
        cursor: Mapping[str, Json],
    ) -> list[Receipt]:
        self._doubt.open = True
        receipts = await self._intake.accept(
            *items, cursor={**cursor, **engine.changes(), **recent.changes()}
        )
        self._doubt.open = False
        self._state = engine, recent
        return receipts

    def _event(self, told: Told) -> Event:
        return to_event(told.drift, self._setting.name, ident=told.ident)
