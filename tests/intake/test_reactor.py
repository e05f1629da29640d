"""The reactor: the commit queue, which a flood of one trigger leaves open to others (threat S11),
and the wait while the ledger is full (P8).

The store is the real one, behind a gate: while it is shut, no posted operation reaches the writer.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest

from eventflow import App, Batch, flow
from eventflow.core.clock import SystemClock
from eventflow.core.errors import StoreError, StoreFull
from eventflow.events.event import Event, Receipt
from eventflow.intake.reactor import (
    FAIR_SHARE_FACTOR,
    MAX_BYTES,
    MAX_EVENTS,
    Reactor,
    TriggerHealth,
    TriggerIntake,
)
from eventflow.routing.router import Router
from eventflow.runs.run import Ids
from eventflow.store.protocol import Op, RecordEvents
from eventflow.store.sqlite import SqliteStore
from eventflow.testing import MemoryTrigger, running
from tests.conftest import eventually
from tests.triggers.serving import serving
from triggers.webhook import Webhook


class Gated(SqliteStore):
    """The real store; `shut` holds posted operations back until `open_gate`."""

    shut = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.waiting: list[tuple[Op, Callable[[Any], None], asyncio.AbstractEventLoop]] = []

    def post(self, op: Op, reply: Callable[[Any], None], loop: asyncio.AbstractEventLoop) -> None:
        if self.shut:
            self.waiting.append((op, reply, loop))
        else:
            super().post(op, reply, loop)

    @property
    def waiting_events(self) -> int:
        return sum(len(op.arrivals) for op, _, _ in self.waiting if isinstance(op, RecordEvents))

    def open_gate(self) -> None:
        self.shut = False
        for each in self.waiting:
            super().post(*each)
        self.waiting.clear()


class Flooded:
    """A reactor whose store does not commit, and the calls of its triggers."""

    def __init__(self, store: Gated, reactor: Reactor) -> None:
        self.store = store
        self.reactor = reactor
        self.calls: list[asyncio.Task[list[Receipt]]] = []
        self._numbers = iter(range(1_000_000))

    async def offer(self, trigger: str, events: int, size: int = 0) -> bool:
        """One call with so many events, `size` bytes of data in all; whether it is on its way to a
        commit.
        """
        waiting = len(self.store.waiting)
        arrivals = [self._arrival(trigger, size // events) for _ in range(events)]
        call = asyncio.create_task(self.reactor.record(lambda: arrivals, trigger))
        self.calls.append(call)
        await eventually(
            lambda: call.done() or len(self.store.waiting) > waiting,
            "the call is let in or refused",
        )
        if not call.done():
            return True
        self.calls.remove(call)
        with pytest.raises(StoreFull):
            call.result()
        return False

    async def flood(self, trigger: str, events: int = 1, size: int = 0) -> int:
        """Calls until one is refused; how many were let in."""
        calls = 0
        while await self.offer(trigger, events, size):
            calls += 1
        return calls

    async def finish(self) -> int:
        """Lets all of it be recorded; how many events that were."""
        self.store.open_gate()
        return sum(map(len, await asyncio.gather(*self.calls)))

    def intake(self, trigger: str) -> tuple[TriggerIntake, TriggerHealth]:
        health = self.reactor.health[trigger]
        return TriggerIntake(self.reactor, trigger, health), health

    def _arrival(self, trigger: str, size: int) -> Any:
        data = "x" * size
        return self.reactor.router.route(
            trigger, Event(id=str(next(self._numbers)), source="/s", type="t", data=data)
        )


@asynccontextmanager
async def flooded(path: Path, *triggers: Webhook) -> AsyncIterator[Flooded]:
    clock = SystemClock()
    store = Gated(path / "a.db", clock=clock, free_floor=0, ballast=0)
    store.open()
    reactor = Reactor(
        store, Router([], Ids(store.last_id), clock), clock, triggers, random.Random(1)
    )
    reactor.start(set())
    try:
        store.shut = True
        yield Flooded(store, reactor)
    finally:
        store.open_gate()
        await reactor.stop()
        store.close()


def test_s11_a_flood_leaves_space_for_others(tmp_path: Path):
    """A trigger alone has at most two thirds of the commit queue; a second one that floods gets in,
    and then a third.
    """

    async def main() -> None:
        async with flooded(tmp_path) as queue:
            assert await queue.flood("first", 50) * 50 == pytest.approx(
                MAX_EVENTS * FAIR_SHARE_FACTOR / (1 + FAIR_SHARE_FACTOR), abs=50
            )
            assert await queue.flood("second", 50) * 50 >= MAX_EVENTS // 5
            assert await queue.offer("third", 50)
            assert await queue.finish() == len(queue.calls) * 50

    asyncio.run(main())


def test_s11_each_commit_frees_space(tmp_path: Path):
    """Committed events, and those of cancelled calls, free their share of the queue."""

    async def main() -> None:
        async with flooded(tmp_path) as queue:
            first = await queue.flood("first", 100)
            queue.calls.pop().cancel()
            assert await queue.finish() == (first - 1) * 100
            queue.calls.clear()
            queue.store.shut = True
            assert await queue.flood("first", 100) == first

    asyncio.run(main())


def test_s11_shares_are_counted_in_bytes_too(tmp_path: Path):
    """Few but large events are a flood as well: a trigger has at most two thirds of the queue's
    bytes.
    """

    async def main() -> None:
        async with flooded(tmp_path) as queue:
            calls = await queue.flood("first", 1, 1 << 20)
            assert calls << 20 == pytest.approx(
                MAX_BYTES * FAIR_SHARE_FACTOR / (1 + FAIR_SHARE_FACTOR), abs=2 << 20
            )
            assert await queue.offer("second", 1, 8 << 20)

    asyncio.run(main())


def test_s11_a_large_call_is_let_in_when_nothing_waits(tmp_path: Path):
    """A call larger than any share, or than the whole queue, is recorded when it comes to an empty
    one, and only then.
    """

    async def main() -> None:
        async with flooded(tmp_path) as queue:
            assert await queue.offer("first", 1)
            assert not await queue.offer("second", MAX_EVENTS - 1)
            await queue.finish()
            queue.store.shut = True
            assert await queue.offer("second", MAX_EVENTS + 1)
            assert not await queue.offer("first", 1)
            assert await queue.finish() == MAX_EVENTS + 2

    asyncio.run(main())


def test_s11_a_flooded_webhook_keeps_no_other_out(tmp_path: Path):
    """Over HTTP: when a webhook's batches have its share and the next are told to come back,
    another one's event is let in.
    """
    batch = {"content-type": "application/cloudevents-batch+json"}

    def body(number: int) -> bytes:
        common = {"specversion": "1.0", "source": "/flood", "type": "t"}
        return orjson.dumps(
            [{**common, "id": f"{number}-{each}"} for each in range(MAX_EVENTS // 8)]
        )

    async def main() -> None:
        loud = Webhook("/loud", verify="none")
        quiet = Webhook("/quiet", verify="none")
        async with (
            flooded(tmp_path, loud, quiet) as queue,
            serving([*loud.routes, *quiet.routes]) as port,
            httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
        ):
            health = queue.reactor.health.values()
            await eventually(
                lambda: {each.state for each in health} == {"listening"}, "both listen"
            )
            flood = [
                asyncio.create_task(client.post("/hooks/loud", content=body(n), headers=batch))
                for n in range(8)
            ]
            await eventually(
                lambda: sum(task.done() for task in flood) == 3,
                "three batches are told to come back",
            )
            answer = asyncio.create_task(client.post("/hooks/quiet", json={}))
            await eventually(
                lambda: queue.store.waiting_events == 5 * (MAX_EVENTS // 8) + 1,
                "the other one's event is on its way",
            )
            queue.store.open_gate()
            assert (await answer).status_code == 202
            assert sorted([(await task).status_code for task in flood]) == [202] * 5 + [503] * 3

    asyncio.run(main())


# --------------------------------------------------------------------------- calls of one turn


def test_p2_calls_of_one_turn_are_one_operation_with_the_receipts_of_each(tmp_path: Path):
    """Concurrent calls of a trigger share one operation of the store; each gets the receipts of its
    own items, in order, and the cursor is that of the last one.
    """

    async def main() -> None:
        async with flooded(tmp_path, Webhook("/many", verify="none", name="many")) as queue:
            intake, health = queue.intake("many")
            calls = [
                asyncio.create_task(
                    intake.accept(
                        an_event(f"a-{n}"), an_event(f"b-{n % 10}"), cursor={"last": n, f"k{n}": n}
                    )
                )
                for n in range(200)
            ]
            await eventually(lambda: bool(queue.store.waiting), "the calls are posted")
            assert (len(queue.store.waiting), queue.store.waiting_events) == (1, 400)
            queue.store.open_gate()
            for n, receipts in enumerate(await asyncio.gather(*calls)):
                assert [each.event_id for each in receipts] == [f"a-{n}", f"b-{n % 10}"]
                assert [each.duplicate for each in receipts] == [False, n >= 10]
            cursor = await intake.cursor()
            assert cursor["last"] == 199 and len(cursor) == 201
            assert (health.events, health.duplicates) == (210, 190)

    asyncio.run(main())


def test_p8_a_call_that_cannot_be_recorded_fails_alone(tmp_path: Path):
    """A call with a cursor that no store can hold fails; those of the same turn are recorded."""
    unstorable: Any = 1j

    async def main() -> None:
        async with flooded(tmp_path, Webhook("/many", verify="none", name="many")) as queue:
            intake, _ = queue.intake("many")
            calls = [
                asyncio.create_task(
                    intake.accept(
                        an_event(f"e-{n}"), cursor={f"at-{n}": unstorable if n == 2 else n}
                    )
                )
                for n in range(5)
            ]
            await eventually(lambda: bool(queue.store.waiting), "the calls are posted")
            queue.store.open_gate()
            results = await asyncio.gather(*calls, return_exceptions=True)
            failed = [n for n, each in enumerate(results) if isinstance(each, StoreError)]
            assert failed == [2]
            assert await intake.cursor() == {f"at-{n}": n for n in (0, 1, 3, 4)}
            queue.store.shut = True
            assert await queue.offer("many", MAX_EVENTS + 1), "nothing is left in the queue"

    asyncio.run(main())


# --------------------------------------------------------------------------- waiting while full


async def full_queue(queue: Flooded) -> None:
    """Fills the commit queue, so that calls of the trigger `loud` wait."""
    await queue.flood("loud", 100)
    await queue.flood("loud")


def an_event(ident: str = "e-1", size: int = 0) -> Event:
    return Event(id=ident, source="/s", type="t", data="x" * size)


def test_p8_accept_waits_while_the_queue_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Without `max_wait`, accept waits for as long as it takes; meanwhile the trigger shows why,
    and the log has one line.
    """

    async def main() -> None:
        async with flooded(tmp_path, Webhook("/loud", verify="none", name="loud")) as queue:
            await full_queue(queue)
            intake, health = queue.intake("loud")
            calls = [asyncio.create_task(intake.accept(an_event(f"e-{n}"))) for n in range(3)]
            await eventually(lambda: health.backpressure is not None, "the wait is shown")
            assert not any(call.done() for call in calls)
            await queue.finish()
            receipts = [await call for call in calls]
            assert all(not receipt.duplicate for (receipt,) in receipts)
            assert health.backpressure is None and health.events == 3
            logged = [each for each in caplog.messages if "trigger.backpressure" in each]
            assert len(logged) == 1

    asyncio.run(main())


def test_the_line_of_a_received_event_names_its_subject(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A reader sees which file, object or run an event is about: its id may be a hash."""

    async def main() -> None:
        async with flooded(tmp_path, Webhook("/loud", verify="none", name="loud")) as queue:
            await queue.finish()
            queue.reactor.logs_received = True
            intake, _ = queue.intake("loud")
            await intake.accept(Event(id="ed1c", source="/in", type="a", data=1, subject="b.csv"))
            (line,) = [each for each in caplog.messages if "event.received" in each]
            assert "subject=b.csv" in line

    caplog.set_level("INFO")
    asyncio.run(main())


async def together(n: int) -> None: ...


def test_the_line_of_a_batched_event_names_its_run(caplog: pytest.LogCaptureFixture):
    """The second event of a window is logged with the run that it joined, which exists."""

    async def main() -> None:
        events = MemoryTrigger("m")
        app = App("shop")
        app.on(events, flow(together), deliver=Batch(10, within=60))
        async with running(app):
            app.runtime.reactor.logs_received = True
            await events.send(data={"n": 1})
            await events.send(data={"n": 2})

    caplog.set_level("INFO")
    asyncio.run(main())
    first, second = [each for each in caplog.messages if "event.received" in each]
    assert "starts together, run " in first and "joins m/together, run " in second
    assert first.rpartition("run ")[2] == second.rpartition("run ")[2]


def test_the_line_of_an_event_without_a_run_has_the_reason(caplog: pytest.LogCaptureFixture):
    """Filtered, unheard, known already, known with other content: one line each, with the reason.
    An event that does not fit its flow has its warning in place of that line.
    """

    async def main() -> None:
        events = MemoryTrigger("m")
        app = App("shop")
        app.on(events, flow(together), types=["made"], where={"total": [5]})
        async with running(app):
            app.runtime.reactor.logs_received = True
            await events.send(data={"n": 1, "total": 3}, type="made", id="filtered")
            await events.send(data={"n": 1}, type="deleted", id="unheard")
            for n in (1, 1, 2):
                await events.send(data={"n": n, "total": 3}, type="made", id="again")
            await events.send(data={"n": "x", "total": 5}, type="made", id="unfit")

    caplog.set_level("INFO")
    asyncio.run(main())
    lines = [
        each
        for each in caplog.messages
        if each.startswith(("event.received", "event.dead_lettered"))
    ]
    wanted = (
        ("filtered", "total = 5 (found 3)"),
        ("unheard", "no subscription accepts deleted: starts nothing"),
        ("again", "total = 5 (found 3)"),
        ("again", "known already: starts nothing"),
        ("again", "known with other content: starts nothing"),
        ("unfit", "Expected `int`, got `str`"),
    )
    for line, (ident, reason) in zip(lines, wanted, strict=True):
        assert f"event_id={ident}" in line and reason in line, line


def test_p8_accept_raises_after_max_wait(tmp_path: Path):
    """With `max_wait`, accept raises StoreFull once it is over, with 0 at once; nothing was
    recorded.
    """

    async def main() -> None:
        async with flooded(tmp_path, Webhook("/loud", verify="none", name="loud")) as queue:
            await full_queue(queue)
            intake, health = queue.intake("loud")
            loop = asyncio.get_running_loop()
            start = loop.time()
            posted = len(queue.store.waiting)
            with pytest.raises(StoreFull):
                await intake.accept(an_event(), max_wait=0)
            assert loop.time() - start < 0.2
            with pytest.raises(StoreFull):
                await intake.accept(an_event(), max_wait=0.3)
            assert loop.time() - start >= 0.3
            assert len(queue.store.waiting) == posted and health.backpressure is None

    asyncio.run(main())


def test_p8_zero_items_never_wait(tmp_path: Path):
    """A cursor alone is recorded although the queue is full."""

    async def main() -> None:
        async with flooded(tmp_path, Webhook("/loud", verify="none", name="loud")) as queue:
            await full_queue(queue)
            intake, _ = queue.intake("loud")
            call = asyncio.create_task(intake.accept(cursor={"last": 7}, max_wait=0))
            await asyncio.sleep(0)
            await queue.finish()
            assert await call == []
            assert await intake.cursor() == {"last": 7}

    asyncio.run(main())


def test_p8_draining_and_cancelling_end_the_wait(tmp_path: Path):
    """A drain ends the wait with StoreFull that is `closing`, a cancel with CancelledError; nothing
    was recorded.
    """

    async def main() -> None:
        async with flooded(tmp_path, Webhook("/loud", verify="none", name="loud")) as queue:
            await full_queue(queue)
            intake, health = queue.intake("loud")
            posted = len(queue.store.waiting)
            cancelled, drained = (
                asyncio.create_task(intake.accept(an_event(ident))) for ident in ("e-1", "e-2")
            )
            await eventually(lambda: health.backpressure is not None, "both wait")
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            queue.reactor.draining = True
            with pytest.raises(StoreFull) as full:
                await drained
            assert full.value.closing and len(queue.store.waiting) == posted

    asyncio.run(main())


def test_p8_waiting_requests_hold_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Calls with a `max_wait` wait with at most MAX_WAITING_BYTES per trigger; the next one is
    refused at once.
    """
    monkeypatch.setattr("eventflow.intake.reactor.MAX_WAITING_BYTES", 10_000)

    async def main() -> None:
        async with flooded(tmp_path, Webhook("/loud", verify="none", name="loud")) as queue:
            await full_queue(queue)
            intake, health = queue.intake("loud")
            first = asyncio.create_task(intake.accept(an_event("e-1", 8_000), max_wait=60.0))
            await eventually(lambda: health.backpressure is not None, "the first waits")
            start = asyncio.get_running_loop().time()
            with pytest.raises(StoreFull):
                await intake.accept(an_event("e-2", 8_000), max_wait=60.0)
            assert asyncio.get_running_loop().time() - start < 5
            await queue.finish()
            await first

    asyncio.run(main())


def test_p8_an_event_that_waited_is_routed_as_its_trigger_is_then(tmp_path: Path):
    """An event that waits while its trigger is paused gets a paused delivery."""

    async def main() -> None:
        async with flooded(tmp_path, Webhook("/loud", verify="none", name="loud")) as queue:
            await full_queue(queue)
            intake, health = queue.intake("loud")
            paused: list[bool] = []
            route_all = queue.reactor.router.route_all

            def routed(trigger: str, items: Any, paused_now: bool) -> Any:
                paused.append(paused_now)
                return route_all(trigger, items, paused_now)

            queue.reactor.router.route_all = routed  # type: ignore[method-assign]
            call = asyncio.create_task(intake.accept(an_event()))
            await eventually(lambda: health.backpressure is not None, "it waits")
            queue.reactor.pause("loud", True)
            await queue.finish()
            await call
            assert paused[0] is False and paused[-1] is True

    asyncio.run(main())


@flow
async def take(event: Event) -> None: ...


@pytest.mark.anyio
async def test_a_cursor_that_cannot_be_stored_fails_its_own_call():
    """Of two calls in one turn, the one whose cursor cannot be stored raises and records nothing,
    even if the other call replaces that value.
    """
    orders = MemoryTrigger("orders")
    app = App("shop")
    app.on(orders, take)
    async with running(app):
        bad: Any = {"position": 1j}
        found = await asyncio.gather(
            orders.send(data=1, id="bad", cursor=bad),
            orders.send(data=2, id="good", cursor={"position": 5}),
            return_exceptions=True,
        )
        assert isinstance(found[0], StoreError) and "position" in str(found[0])
        assert isinstance(found[1], list)
        assert [row["event_id"] for row in await app.store.events()] == ["good"]
        assert await orders.cursor() == {"position": 5}
