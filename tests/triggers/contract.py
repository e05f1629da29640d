"""What holds for every trigger: the acknowledgement follows the record, and nothing is lost on the way there (P1, P2, P8).

A trigger's tests bring a `Harness`, a real source with the trigger on it, and run every promise in `CONTRACT` against it:

    @pytest.mark.parametrize("promise", CONTRACT, ids=promise_name)
    def test_contract(promise: Promise, tmp_path: Path):
        asyncio.run(promise(MyHarness(tmp_path)))

The far side is a `Ledger`: an `Intake` with the ledger's rules (identity, duplicates, conflicts, cursors with the record) that
can be told to hold still, to fail or to be full, and that counts what it was offered.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol, TypeAlias

import orjson
import pytest
import structlog
from structlog.testing import LogCapture

from eventflow.core.errors import StoreError, StoreFailed, StoreFull
from eventflow.events.event import Event, Intake, Json, Receipt, Trigger, Undecodable
from tests.conftest import eventually

Item: TypeAlias = Event | Undecodable


class Harness(Protocol):
    """A real source with items in it, each known to the test by a short key such as "a"."""

    def source(self) -> AbstractAsyncContextManager[None]:
        """The source itself, running (a server, a directory, a broker). The suite enters it once, around everything else."""
        ...

    def trigger(self) -> Trigger:
        """A new trigger on the source, with the same name each time, as after a restart of the process."""
        ...

    async def offer(self, keys: Sequence[str]) -> None:
        """Puts items into the source. Does not wait until they are taken; a push source keeps sending until it is answered."""
        ...

    async def offer_again(self, keys: Sequence[str], ledger: "Ledger") -> None:
        """Makes the source deliver these once more: send again, rewind, forget the cursor. The suite restarts the trigger."""
        ...

    def key(self, item: Item) -> str:
        """Which offered item this is."""
        ...

    async def acknowledged(self, ledger: "Ledger") -> set[str]:
        """The keys the source takes for settled: answered 2xx, offset committed, message deleted, cursor moved past."""
        ...


class Ledger:
    """An intake with the ledger's rules. `offered` holds every item ever handed over, `kept` the recorded ones."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], Item] = {}
        self.ids: dict[tuple[str, str], int] = {}
        self.cursors: dict[str, Json] = {}
        self.offered: list[Item] = []
        self.failing: StoreError | None = None
        self.refusals = 0
        self.open = asyncio.Event()
        self.open.set()
        self.log: Any = structlog.get_logger("tests.ledger")

    async def accept(self, *items: Item, cursor: Mapping[str, Json] | None = None) -> list[Receipt]:
        self.offered += items
        await self.open.wait()
        if self.failing is not None:
            self.refusals += 1
            raise self.failing
        receipts = [self._record(item) for item in items]
        for key, value in (cursor or {}).items():
            self.cursors.pop(key, None) if value is None else self.cursors.__setitem__(key, value)
        return receipts

    async def cursor(self) -> Mapping[str, Json]:
        return dict(self.cursors)

    @property
    def events(self) -> list[Event]:
        """The recorded ones, in order."""
        return [item for item in self.kept.values() if isinstance(item, Event)]

    @property
    def dead(self) -> list[Undecodable]:
        return [item for item in self.kept.values() if isinstance(item, Undecodable)]

    def _record(self, item: Item) -> Receipt:
        if isinstance(item, Event):
            item.to_json()  # whatever a trigger hands over must be writable
        identity = (item.source, item.id)
        known = self.kept.get(identity)
        if known is None:
            self.kept[identity] = item
            self.ids[identity] = len(self.ids) + 1
            return Receipt(self.ids[identity], item.id, matched=1)
        conflict = content(known) != content(item)
        digests = (f"{hash(content(known)):x}", f"{hash(content(item)):x}") if conflict else None
        return Receipt(
            self.ids[identity], item.id, duplicate=True, conflict=conflict, digests=digests
        )


class Watched:
    """A trigger under test, as its tests see it: what its ledger recorded, and what it `said` in its log."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self._capture = ledger, LogCapture()
        ledger.log = structlog.wrap_logger(structlog.ReturnLogger(), processors=[self._capture])

    @property
    def events(self) -> list[Event]:
        return self.ledger.events

    @property
    def dead(self) -> list[Undecodable]:
        return self.ledger.dead

    def said(self, event: str) -> list[dict[str, Any]]:
        return [dict(entry) for entry in self._capture.entries if entry["event"] == event]


def content(item: Item) -> bytes:
    """What tells a duplicate from a conflict, as in the ledger: type and data, not the time, which a source may stamp anew."""
    body = item.data if isinstance(item, Event) else item.body
    return item.type.encode() + (body if isinstance(body, bytes) else orjson.dumps(body))


@asynccontextmanager
async def listening(trigger: Trigger, intake: Intake) -> AsyncIterator[asyncio.Task[None]]:
    """The trigger at work. It is cancelled at the end, as a drain does, and must end by that alone."""
    task = asyncio.create_task(trigger.listen(intake))
    try:
        yield task
    finally:
        task.cancel()
        done = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError), (
            f"listen ended with {done[0]!r}, not with the cancel"
        )


def keys(harness: Harness, items: Sequence[Item]) -> set[str]:
    return {harness.key(item) for item in items}


async def kept(harness: Harness, ledger: Ledger, expected: set[str]) -> None:
    await eventually(
        lambda: keys(harness, list(ledger.kept.values())) == expected,
        f"{sorted(expected)} are recorded",
    )


async def settled(harness: Harness, ledger: Ledger, expected: set[str]) -> None:
    async def agrees() -> bool:
        return await harness.acknowledged(ledger) >= expected

    await eventually(agrees, f"{sorted(expected)} are acknowledged")


# ----------------------------------------------------------------------------- the promises


async def acknowledges_what_is_recorded(harness: Harness) -> None:
    """Each offered item is recorded once, and then acknowledged."""
    ledger = Ledger()
    async with harness.source(), listening(harness.trigger(), ledger):
        await harness.offer(["a", "b", "c"])
        await kept(harness, ledger, {"a", "b", "c"})
        await settled(harness, ledger, {"a", "b", "c"})
    assert len(ledger.kept) == 3


async def acknowledges_nothing_while_recording(harness: Harness) -> None:
    """While `accept` has not returned, nothing is acknowledged; when it has, everything is."""
    ledger = Ledger()
    ledger.open.clear()
    async with harness.source(), listening(harness.trigger(), ledger):
        await harness.offer(["a", "b"])
        await eventually(lambda: ledger.offered, "something is offered")
        assert await harness.acknowledged(ledger) == set()
        ledger.open.set()
        await settled(harness, ledger, {"a", "b"})


async def acknowledges_nothing_that_failed(harness: Harness) -> None:
    """When `accept` raises, nothing is acknowledged; when the store is back and the listener reopened, everything arrives."""
    ledger = Ledger()
    ledger.failing = StoreFailed("the disk is gone")
    async with harness.source():
        async with reopening(harness.trigger(), ledger):
            await harness.offer(["a", "b"])
            await eventually(lambda: ledger.refusals, "something is refused")
            assert await harness.acknowledged(ledger) == set()
            assert ledger.kept == {}
            ledger.failing = None
            await settled(harness, ledger, {"a", "b"})
        assert keys(harness, list(ledger.kept.values())) == {"a", "b"}


async def waits_while_the_ledger_is_full(harness: Harness) -> None:
    """A full ledger slows the source down: nothing is acknowledged or dropped, and with room again everything arrives once."""
    ledger = Ledger()
    ledger.failing = StoreFull("1,000,000 events are pending", 0.05)
    async with harness.source():
        async with reopening(harness.trigger(), ledger):
            await harness.offer(["a", "b", "c"])
            await eventually(lambda: ledger.refusals >= 2, "the source tries again")
            assert await harness.acknowledged(ledger) == set()
            ledger.failing = None
            await settled(harness, ledger, {"a", "b", "c"})
        assert len(ledger.kept) == 3


async def offers_duplicates_under_the_same_id(harness: Harness) -> None:
    """What the source delivers twice comes with the same identity and content: it is recorded once and acknowledged again."""
    ledger = Ledger()
    async with harness.source():
        async with listening(harness.trigger(), ledger):
            await harness.offer(["a", "b"])
            await settled(harness, ledger, {"a", "b"})
        before = len(ledger.offered)
        await harness.offer_again(["a", "b"], ledger)
        async with listening(harness.trigger(), ledger):
            await eventually(
                lambda: keys(harness, ledger.offered[before:]) == {"a", "b"},
                "both are offered again",
            )
            await settled(harness, ledger, {"a", "b"})
    assert len(ledger.kept) == 2
    assert len({content(item) for item in ledger.offered}) == 2


async def loses_nothing_when_cancelled(harness: Harness) -> None:
    """A cancel in the middle of `accept` acknowledges only what was recorded; the next listener takes up the rest."""
    ledger = Ledger()
    ledger.open.clear()
    async with harness.source():
        async with listening(harness.trigger(), ledger) as task:
            await harness.offer(["a", "b"])
            await eventually(lambda: ledger.offered, "something is offered")
            task.cancel()
            await asyncio.sleep(0)
            assert await harness.acknowledged(ledger) == set()
            ledger.open.set()
        assert await harness.acknowledged(ledger) <= keys(harness, list(ledger.kept.values()))
        async with listening(harness.trigger(), ledger):
            await settled(harness, ledger, {"a", "b"})
    assert keys(harness, list(ledger.kept.values())) == {"a", "b"} and len(ledger.kept) == 2


async def goes_on_where_it_stopped(harness: Harness) -> None:
    """What is offered while nobody listens arrives after a restart; what was acknowledged before is recorded once only."""
    ledger = Ledger()
    async with harness.source():
        async with listening(harness.trigger(), ledger):
            await harness.offer(["a"])
            await settled(harness, ledger, {"a"})
        await harness.offer(["b", "c"])
        async with listening(harness.trigger(), ledger):
            await settled(harness, ledger, {"a", "b", "c"})
    assert keys(harness, list(ledger.kept.values())) == {"a", "b", "c"} and len(ledger.kept) == 3


@asynccontextmanager
async def reopening(trigger: Trigger, ledger: Ledger) -> AsyncIterator[None]:
    """The trigger under a supervisor like the reactor's: what `listen` raises opens it again, here at once."""

    async def supervised() -> None:
        while True:
            try:
                await trigger.listen(ledger)
            except StoreError:
                await asyncio.sleep(0.05)

    task = asyncio.create_task(supervised())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


Promise: TypeAlias = Callable[[Harness], Coroutine[Any, Any, None]]

CONTRACT: list[Promise] = [
    acknowledges_what_is_recorded,
    acknowledges_nothing_while_recording,
    acknowledges_nothing_that_failed,
    waits_while_the_ledger_is_full,
    offers_duplicates_under_the_same_id,
    loses_nothing_when_cancelled,
    goes_on_where_it_stopped,
]


def promise_name(promise: Promise) -> str:
    return getattr(promise, "__name__", "promise")


def is_stable_name(trigger: Trigger, again: Trigger) -> None:
    """Two triggers made the same way have the same, non-empty name: cursors and the ledger are keyed by it."""
    if not trigger.name or trigger.name != again.name:
        pytest.fail(f"expected one stable name, found {trigger.name!r} and {again.name!r}")
