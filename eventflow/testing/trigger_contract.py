"""The contract of a trigger, as tests: the acknowledgement follows the record, and nothing is lost.

The author of a trigger describes a real source with her trigger on it as a `TriggerHarness` and
runs every promise of `CONTRACT` against it. With pytest:

    @pytest.mark.parametrize("promise", CONTRACT)
    def test_contract(promise, tmp_path):
        asyncio.run(promise(InboxHarness(tmp_path)))

A promise is a coroutine function, so any test runner will do. A promise that does not hold raises
`ContractBroken`, which says what was expected, what was found and what to do. The other side of
the trigger is a `ContractLedger`: an `Intake` with the ledger's rules that a test can block, make
fail and fill up. docs/guides/write-a-trigger.md builds a trigger with this suite step by step.
"""

import asyncio
import threading
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import orjson
import structlog

from eventflow.core.backpressure import wait_while_full
from eventflow.core.errors import StoreError, StoreFailed, StoreFull
from eventflow.events.event import (
    Event,
    EventOutcome,
    Gauge,
    HasGauges,
    Intake,
    Json,
    Receipt,
    Trigger,
    Undecodable,
)
from eventflow.server.watchdog import locate

__all__ = [
    "CONTRACT",
    "ContractBroken",
    "ContractLedger",
    "Item",
    "Promise",
    "TriggerHarness",
    "content_of",
    "listening",
    "restarting",
]

Item: TypeAlias = Event | Undecodable

POLL_INTERVAL_SECONDS = 0.01
STOP_TIMEOUT_SECONDS = 12.0
"""What the reactor gives a cancelled listener: a poll under way may be shielded for 10 s."""
MAX_BLOCKED_SECONDS = 1.0
"""As in server/watchdog.py, which logs a loop that is blocked for longer."""


class ContractBroken(AssertionError):
    """A promise of the contract does not hold for this trigger."""

    def __init__(self, expected: str, found: str, do: str) -> None:
        super().__init__(f"expected {expected}; found {found}; do: {do}")


class TriggerHarness:
    """A source and the trigger on it. Items are known to the contract by short keys such as "a".

    One harness serves one promise. Override what raises NotImplementedError, and the rest where
    your source differs. `deadline`: seconds that a promise waits for a condition.
    """

    deadline: float = 20.0

    @asynccontextmanager
    async def source(self) -> AsyncGenerator[None]:
        """Starts and stops the source (a server, a directory, a topic). Entered once, first."""
        yield

    def trigger(self) -> Trigger:
        """A new trigger on the source, made the same way each time, as after a restart."""
        raise self._not_implemented("trigger")

    async def offer(self, keys: Sequence[str]) -> None:
        """Puts one new item for each key into the source. Does not wait until they are recorded.

        A source that pushes (an HTTP sender) keeps sending, in its own tasks, until it has an
        answer: a real sender repeats a request that was answered 5xx.
        """
        raise self._not_implemented("offer")

    async def redeliver(self, keys: Sequence[str], ledger: "ContractLedger") -> None:
        """Makes the source deliver these items again; called while no trigger listens.

        A sender sends them again, a topic is rewound, a cursor in `ledger.cursors` is put back.
        """
        await self.offer(keys)

    def key(self, item: Item) -> str:
        """The key of an item that the trigger handed to `accept`; by default its id."""
        return item.id

    async def acknowledged(self, ledger: "ContractLedger") -> Collection[str]:
        """The keys that the source need not deliver again.

        If the source remembers them: answered 2xx, offset committed, message deleted. If the
        trigger's cursor does: the items up to the position in `ledger.cursors`.
        """
        raise self._not_implemented("acknowledged")

    def _not_implemented(self, method: str) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__}.{method}: implement it, see the docstring of "
            f"TriggerHarness.{method} and docs/guides/write-a-trigger.md"
        )


class ContractLedger:
    """An intake with the ledger's rules: identity, duplicates, conflicts, cursors with the record.

    `recorded` holds the items by (source, id), `offered` every item ever handed to `accept`,
    `calls` counts the calls of `accept`, `cursors` is the cursor, which a test may change. While
    `error` is set, `accept` raises it, or waits if it is a StoreFull and the trigger did not limit
    the wait; `refused_calls` counts the tries. `block` makes `accept` wait until `unblock`.
    `event_outcomes`, by event id, is what `outcomes` answers; a test fills it.
    """

    def __init__(self) -> None:
        self.recorded: dict[tuple[str, str], Item] = {}
        self.ledger_ids: dict[tuple[str, str], int] = {}
        self.cursors: dict[str, Json] = {}
        self.offered: list[Item] = []
        self.calls: int = 0
        self.error: StoreError | None = None
        self.refused_calls: int = 0
        self.log: Any = structlog.get_logger("tests.ledger")
        self.event_outcomes: dict[str, EventOutcome] = {}
        self._unblocked = asyncio.Event()
        self._unblocked.set()

    async def accept(
        self,
        *items: Item,
        cursor: Mapping[str, Json] | None = None,
        max_wait: float | None = None,
    ) -> list[Receipt]:
        self.calls += 1
        self.offered += items
        return await wait_while_full(lambda: self._accept_once(items, cursor), max_wait)

    async def _accept_once(
        self, items: Sequence[Item], cursor: Mapping[str, Json] | None
    ) -> list[Receipt]:
        await self._unblocked.wait()
        if self.error is not None:
            self.refused_calls += 1
            raise self.error
        receipts = [self._record(item) for item in items]
        for key, value in (cursor or {}).items():
            if value is None:
                self.cursors.pop(key, None)
            else:
                self.cursors[key] = value
        return receipts

    def _record(self, item: Item) -> Receipt:
        if isinstance(item, Event):
            item.to_json()  # TypeError for data that the store could not write
        identity = (item.source, item.id)
        known = self.recorded.get(identity)
        if known is None:
            self.recorded[identity] = item
            self.ledger_ids[identity] = len(self.ledger_ids) + 1
            return Receipt(self.ledger_ids[identity], item.id, matched=1)
        conflict = content_of(known) != content_of(item)
        digests = (
            (f"{hash(content_of(known)):x}", f"{hash(content_of(item)):x}") if conflict else None
        )
        return Receipt(
            self.ledger_ids[identity], item.id, duplicate=True, conflict=conflict, digests=digests
        )

    async def cursor(self) -> Mapping[str, Json]:
        return dict(self.cursors)

    async def outcomes(self, source: str, ids: Sequence[str]) -> Mapping[str, EventOutcome]:
        return {ident: self.event_outcomes[ident] for ident in ids if ident in self.event_outcomes}

    def block(self) -> None:
        """From now on `accept` does not return."""
        self._unblocked.clear()

    def unblock(self) -> None:
        self._unblocked.set()

    @property
    def events(self) -> list[Event]:
        """The recorded events, in order."""
        return [item for item in self.recorded.values() if isinstance(item, Event)]

    @property
    def dead_letters(self) -> list[Undecodable]:
        """The recorded items that are no events, in order."""
        return [item for item in self.recorded.values() if isinstance(item, Undecodable)]


def content_of(item: Item) -> bytes:
    """What distinguishes a conflict from a duplicate in the ledger: type and data, not the time."""
    body = item.data if isinstance(item, Event) else item.body
    return item.type.encode() + (body if isinstance(body, bytes) else orjson.dumps(body))


@asynccontextmanager
async def listening(trigger: Trigger, intake: Intake) -> AsyncGenerator[asyncio.Task[None]]:
    """Runs `trigger.listen` for the length of the block, then cancels it, as a drain does.

    Raises ContractBroken unless the cancel is what ends it.
    """
    task = asyncio.create_task(trigger.listen(intake))
    try:
        yield task
    except BaseException:  # the block's own failure is the one to report
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    task.cancel()
    await asyncio.wait([task], timeout=STOP_TIMEOUT_SECONDS)
    if not task.cancelled():
        raise ContractBroken(
            f"listen to end with CancelledError within {STOP_TIMEOUT_SECONDS:g} s of its cancel",
            _end_of(task),
            "do not return from listen, and let CancelledError pass; clean up in `finally`",
        )


def _end_of(task: asyncio.Task[None]) -> str:
    if not task.done():
        return "it still runs"
    if task.cancelled():
        return "it was cancelled"
    error = task.exception()
    return "it returned" if error is None else f"it raised {error!r}"


@asynccontextmanager
async def restarting(trigger: Trigger, intake: Intake) -> AsyncGenerator[asyncio.Task[None]]:
    """Runs `trigger.listen` under a supervisor like the reactor's: after an exception, again."""

    async def supervise() -> None:
        while True:
            try:
                await trigger.listen(intake)
            except Exception as error:  # around a listener: a trigger may raise anything
                if not isinstance(error, StoreError):
                    intake.log.warning("trigger.restarted", error=repr(error))
                await asyncio.sleep(POLL_INTERVAL_SECONDS)

    task = asyncio.create_task(supervise())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class _Check:
    """One promise: its harness, its ledger, and the waits that explain why they failed."""

    def __init__(self, harness: TriggerHarness) -> None:
        self.harness = harness
        self.ledger = ContractLedger()

    def keys_of(self, items: Sequence[Item]) -> set[str]:
        return {self.harness.key(item) for item in items}

    @property
    def recorded(self) -> set[str]:
        return self.keys_of(list(self.ledger.recorded.values()))

    async def acknowledged(self) -> set[str]:
        return set(await self.harness.acknowledged(self.ledger))

    async def until(
        self,
        condition: Callable[[], Awaitable[object]],
        expected: str,
        do: str | Callable[[], str],
        listener: asyncio.Task[None],
    ) -> None:
        """Waits until `condition`; ContractBroken after the deadline, or when `listener` ended.

        `do`: the advice in the error; a callable is called then.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.harness.deadline
        while not await condition():
            ended = listener.done()
            if ended or loop.time() > deadline:
                waited = "" if ended else f" after {self.harness.deadline:g} s"
                raise ContractBroken(
                    expected,
                    f"recorded {_listed(self.recorded)}, acknowledged "
                    f"{_listed(await self.acknowledged())}{waited}"
                    + (f"; listen ended: {_end_of(listener)}" if ended else ""),
                    do if isinstance(do, str) else do(),
                )
            await asyncio.sleep(POLL_INTERVAL_SECONDS)

    async def until_recorded(self, keys: set[str], listener: asyncio.Task[None]) -> None:
        async def is_recorded() -> bool:
            return self.recorded == keys

        await self.until(
            is_recorded,
            f"{_listed(keys)} recorded",
            "hand each item of the source to `intake.accept`, under keys that `key` returns",
            listener,
        )

    async def until_acknowledged(self, keys: set[str], listener: asyncio.Task[None]) -> None:
        async def is_acknowledged() -> bool:
            return await self.acknowledged() >= keys

        def advice() -> str:
            if self.ledger.refused_calls and self.keys_of(self.ledger.offered) - self.recorded:
                return (
                    "an item whose `accept` raised was not offered again: let the exception leave "
                    "`listen`, and catch no Exception around `accept`"
                )
            return (
                "acknowledge once `accept` has returned: answer, commit, delete, or pass the "
                "cursor to `accept`; a duplicate is acknowledged like a new item"
            )

        await self.until(is_acknowledged, f"{_listed(keys)} acknowledged", advice, listener)

    async def until_offered(self, listener: asyncio.Task[None], tries: int = 0) -> None:
        """Waits until `accept` was called, or was refused `tries` times."""

        async def is_offered() -> bool:
            return bool(self.ledger.offered) and self.ledger.refused_calls >= tries

        def advice() -> str:
            if self.ledger.calls and not self.ledger.offered:
                return (
                    "`intake.accept` was called without items: pass the cursor together with the "
                    "items that it covers"
                )
            if self.ledger.offered:
                return (
                    "an item whose `accept` raised was not offered again: let the exception leave "
                    "`listen`, and catch no Exception around `accept`"
                )
            return "hand each item of the source to `intake.accept`"

        await self.until(is_offered, "`accept` called with the offered items", advice, listener)

    async def expect_nothing_acknowledged(self, when: str) -> None:
        if early := await self.acknowledged():
            raise ContractBroken(
                f"nothing acknowledged {when}",
                f"{_listed(early)} acknowledged",
                "acknowledge after `await intake.accept(...)` has returned, never before it or in "
                "an `except` or `finally` around it",
            )

    def expect_recorded_once(self, keys: set[str]) -> None:
        count = len(self.ledger.recorded)
        if self.recorded != keys or count != len(keys):
            raise ContractBroken(
                f"each of {_listed(keys)} recorded once",
                f"{count} records of {_listed(self.recorded)}",
                "give an item the same `source` and `id` each time: take both from what the "
                "source knows it by, never from the clock or a counter of this process",
            )


def _listed(keys: Collection[str]) -> str:
    return ", ".join(sorted(keys)) or "nothing"


# ------------------------------------------------------------------------------- the promises


async def acknowledges_recorded_items(harness: TriggerHarness) -> None:
    """Each offered item is recorded once, and then acknowledged."""
    check = _Check(harness)
    async with harness.source(), listening(harness.trigger(), check.ledger) as listener:
        await harness.offer(["a", "b", "c"])
        await check.until_recorded({"a", "b", "c"}, listener)
        await check.until_acknowledged({"a", "b", "c"}, listener)
    check.expect_recorded_once({"a", "b", "c"})


async def acknowledges_nothing_while_recording(harness: TriggerHarness) -> None:
    """Nothing is acknowledged before `accept` has returned; then everything is."""
    check = _Check(harness)
    check.ledger.block()
    async with harness.source(), listening(harness.trigger(), check.ledger) as listener:
        await harness.offer(["a", "b"])
        await check.until_offered(listener)
        await check.expect_nothing_acknowledged("while `accept` has not returned")
        check.ledger.unblock()
        await check.until_acknowledged({"a", "b"}, listener)


async def acknowledges_nothing_that_failed(harness: TriggerHarness) -> None:
    """Nothing is acknowledged when `accept` raises; everything arrives once the store works."""
    check = _Check(harness)
    check.ledger.error = StoreFailed("the disk is gone")
    async with harness.source():
        async with restarting(harness.trigger(), check.ledger) as listener:
            await harness.offer(["a", "b"])
            await check.until_offered(listener, tries=1)
            await check.expect_nothing_acknowledged("after `accept` raised StoreFailed")
            check.ledger.error = None
            await check.until_acknowledged({"a", "b"}, listener)
        check.expect_recorded_once({"a", "b"})


async def waits_while_the_ledger_is_full(harness: TriggerHarness) -> None:
    """While the ledger is full nothing is acknowledged or dropped; then each arrives once."""
    check = _Check(harness)
    check.ledger.error = StoreFull("1,000,000 events are pending", 0.05)
    async with harness.source():
        async with restarting(harness.trigger(), check.ledger) as listener:
            await harness.offer(["a", "b", "c"])
            await check.until_offered(listener, tries=2)
            await check.expect_nothing_acknowledged("while the ledger is full")
            check.ledger.error = None
            await check.until_acknowledged({"a", "b", "c"}, listener)
        check.expect_recorded_once({"a", "b", "c"})


async def repeats_the_same_identity(harness: TriggerHarness) -> None:
    """An item delivered twice has the same identity and content, and is acknowledged again."""
    check = _Check(harness)
    ledger = check.ledger
    async with harness.source():
        async with listening(harness.trigger(), ledger) as listener:
            await harness.offer(["a", "b"])
            await check.until_acknowledged({"a", "b"}, listener)
        before = len(ledger.offered)
        await harness.redeliver(["a", "b"], ledger)
        async with listening(harness.trigger(), ledger) as listener:

            async def are_offered_again() -> bool:
                return check.keys_of(ledger.offered[before:]) == {"a", "b"}

            await check.until(
                are_offered_again,
                "a, b handed to `accept` again after their redelivery",
                "leave duplicates to the ledger: hand each delivery to `accept`",
                listener,
            )
            await check.until_acknowledged({"a", "b"}, listener)
    check.expect_recorded_once({"a", "b"})
    contents = {content_of(item) for item in ledger.offered}
    if len(contents) != 2:
        raise ContractBroken(
            "the same type and data in each delivery of an item",
            f"{len(contents)} contents of 2 items",
            "keep what differs between deliveries (a time of receipt, a delivery count) out of "
            "the event's data; `time` and `extensions` may differ",
        )


async def loses_nothing_when_cancelled(harness: TriggerHarness) -> None:
    """A cancel during `accept` acknowledges only what was recorded; a restart gets the rest."""
    check = _Check(harness)
    check.ledger.block()
    async with harness.source():
        async with listening(harness.trigger(), check.ledger) as listener:
            await harness.offer(["a", "b"])
            await check.until_offered(listener)
            listener.cancel()
            await asyncio.sleep(0)
            await check.expect_nothing_acknowledged("when listen is cancelled during `accept`")
            check.ledger.unblock()
        if early := await check.acknowledged() - check.recorded:
            raise ContractBroken(
                "only recorded items acknowledged after a cancel",
                f"{_listed(early)} acknowledged and not recorded",
                "acknowledge after `accept` has returned, not in a `finally`",
            )
        async with listening(harness.trigger(), check.ledger) as listener:
            await check.until_acknowledged({"a", "b"}, listener)
    check.expect_recorded_once({"a", "b"})


async def resumes_where_it_stopped(harness: TriggerHarness) -> None:
    """Items offered while nothing listens arrive after a restart; earlier ones do not again."""
    check = _Check(harness)
    async with harness.source():
        async with listening(harness.trigger(), check.ledger) as listener:
            await harness.offer(["a"])
            await check.until_acknowledged({"a"}, listener)
        await harness.offer(["b", "c"])
        async with listening(harness.trigger(), check.ledger) as listener:
            await check.until_acknowledged({"a", "b", "c"}, listener)
    check.expect_recorded_once({"a", "b", "c"})


async def keeps_its_name(harness: TriggerHarness) -> None:
    """Two triggers made the same way have the same name: cursor and ledger are keyed by it."""
    async with harness.source():
        one = harness.trigger()
        other = harness.trigger()
    if not isinstance(one, Trigger):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ContractBroken(
            "a trigger", repr(one), "give it a `name` and `async def listen(self, intake)`"
        )
    if not one.name or one.name != other.name:
        raise ContractBroken(
            "the same name, not empty, from two triggers made the same way",
            f"{one.name!r} and {other.name!r}",
            "make the name from the options alone, or take it as an option",
        )


async def leaves_the_event_loop_free(harness: TriggerHarness) -> None:
    """The event loop is not blocked for a second: all triggers and HTTP share it."""
    check = _Check(harness)
    async with (
        harness.source(),
        _blocked_lines() as lines,
        listening(harness.trigger(), check.ledger) as listener,
    ):
        await harness.offer(["a", "b", "c"])
        await check.until_acknowledged({"a", "b", "c"}, listener)
    if lines:
        raise ContractBroken(
            f"the event loop not blocked for {MAX_BLOCKED_SECONDS:g} s",
            f"it blocked at {lines[0]}",
            "use an async client, or call what blocks by `asyncio.to_thread`",
        )


@asynccontextmanager
async def _blocked_lines() -> AsyncGenerator[list[str]]:
    """`file:line function` for each time that the running loop is blocked in the block."""
    loop = asyncio.get_running_loop()
    loop_thread = threading.get_ident()
    ended = threading.Event()
    lines: list[str] = []

    def watch() -> None:
        while not ended.wait(POLL_INTERVAL_SECONDS):
            turned = threading.Event()
            loop.call_soon_threadsafe(turned.set)
            if not turned.wait(MAX_BLOCKED_SECONDS):
                line = locate(loop_thread)["stack"]
                if not turned.wait(0.1):  # else the whole process was stopped, not the loop
                    lines.append(line)
                    turned.wait()

    thread = threading.Thread(target=watch, name="eventflow-contract", daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        ended.set()
        await asyncio.to_thread(thread.join)


async def reports_its_health(harness: TriggerHarness) -> None:
    """`condition` and `gauges`, where a trigger has them, answer before, during and after."""
    check = _Check(harness)
    async with harness.source():
        trigger = harness.trigger()
        _expect_health(trigger)
        async with listening(trigger, check.ledger) as listener:
            await asyncio.sleep(0)
            _expect_health(trigger)
            await harness.offer(["a"])
            await check.until_acknowledged({"a"}, listener)
            _expect_health(trigger)
        _expect_health(trigger)


def _expect_health(trigger: Trigger) -> None:
    if not isinstance(trigger, HasGauges):
        return
    condition: Any = trigger.condition
    gauges: list[Any] = list(trigger.gauges())
    if condition is not None and not isinstance(condition, str):
        raise ContractBroken(
            "`condition` to be a line of text or None",
            repr(condition),
            "return None while the source works",
        )
    labels: dict[str, set[str]] = {}
    for gauge in gauges:
        is_named = isinstance(gauge, Gauge) and gauge.name.isidentifier() and gauge.name.islower()
        if not is_named or labels.setdefault(gauge.name, set(gauge.labels)) != set(gauge.labels):
            raise ContractBroken(
                "gauges with snake_case names, and the same label names for each gauge of one name",
                repr(gauge),
                'return eventflow.events.event.Gauge("lag_seconds", 1.5, {"partition": "0"})',
            )


Promise: TypeAlias = Callable[[TriggerHarness], Coroutine[Any, Any, None]]

CONTRACT: Sequence[Promise] = (
    acknowledges_recorded_items,
    acknowledges_nothing_while_recording,
    acknowledges_nothing_that_failed,
    waits_while_the_ledger_is_full,
    repeats_the_same_identity,
    loses_nothing_when_cancelled,
    resumes_where_it_stopped,
    keeps_its_name,
    leaves_the_event_loop_free,
    reports_its_health,
)
"""Every promise, for `pytest.mark.parametrize`: pytest names the tests after the functions."""
