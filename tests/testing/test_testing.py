"""eventflow.testing: what it gives users is what their tests may lean on."""

import asyncio
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from eventflow import App, Event, Permanent, RunHandle, Undecodable, emit, flow, sleep, task
from eventflow.core.clock import SECOND, SystemClock, to_us
from eventflow.core.errors import RunHeld, TaskTimedOut, UsageError
from eventflow.logs.log import LogLine, get_logger
from eventflow.testing import (
    MemoryTrigger,
    Stuck,
    VirtualClock,
    drain,
    events_of,
    journal_of,
    result_of,
    running,
)

pytestmark = pytest.mark.anyio

DAY = 86_400
BUSY_BODY = 0.05
"""Seconds of the real clock."""


class Shop:
    """An app with a task that fails as often as it is told, and flows around it."""

    def __init__(self) -> None:
        self.failures = 0
        self.tried_at: list[datetime] = []
        self.app = App("shop")
        self.orders = MemoryTrigger("orders")
        clock = self.clock = VirtualClock()

        @task(retries=[DAY, DAY, DAY])
        async def charge(amount: int) -> int:
            self.tried_at.append(datetime.fromtimestamp(clock.now() / SECOND, UTC))
            if len(self.tried_at) <= self.failures:
                raise ConnectionError("the bank is closed")
            return amount * 2

        @flow
        async def handle(amount: int) -> int:
            return await charge(amount)

        self.handle = handle
        self.app.on(self.orders, handle)


async def test_a_day_of_backoff_passes_in_milliseconds() -> None:
    """`drain` moves time to each due retry in turn, and no attempt begins before its time."""
    shop = Shop()
    shop.failures = 2
    began = time.monotonic()
    async with running(shop.app, clock=shop.clock):
        await shop.orders.send(data={"amount": 21})
        counts = await drain(shop.app)
    assert counts["completed"] == counts["accepted"] == 1 and counts["pending"] == 0
    start = datetime(2030, 1, 1, tzinfo=UTC)
    assert shop.tried_at == [start, start + timedelta(days=1), start + timedelta(days=2)]
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("own_loop", [False, True])
async def test_time_moves_flows_on_the_callers_loop_and_on_their_own(own_loop: bool) -> None:
    """Timers set on the loop of another thread fire there, and `advance` waits until what they
    set off is recorded.
    """
    threads: list[int] = []

    @task
    async def note(n: int) -> None:
        threads.append(threading.get_ident())

    @flow
    async def remind() -> None:
        for n in range(3):
            await sleep(100)
            await note(n)

    app, clock = App("reminders"), VirtualClock()
    async with running(app, clock=clock, own_loop=own_loop):
        handle = await app.start(remind)
        await clock.advance(99)
        assert threads == []
        await clock.advance(1)
        assert len(threads) == 1
        await clock.advance(1000)
        assert len(threads) == 3 and (await handle.row())["state"] == "completed"
    assert (set(threads) == {threading.get_ident()}) is not own_loop


async def test_the_clock_fires_in_order_of_due_times_and_never_early() -> None:
    """`advance` passes every due time on the way; a cancelled timer stays silent, a past one fires
    at once.
    """
    clock, loop = VirtualClock(datetime(2031, 5, 1, tzinfo=UTC)), asyncio.get_running_loop()
    fired: list[tuple[str, float]] = []

    def arm(name: str, seconds: float):
        due = to_us(datetime(2031, 5, 1, tzinfo=UTC)) + int(seconds * SECOND)
        return clock.timer(loop, due, lambda: fired.append((name, clock.monotonic())))

    arm("late", 30)
    arm("early", 10)
    arm("never", 20).cancel()
    arm("past", -5)
    assert clock.next_due == datetime(2031, 5, 1, 0, 0, 10, tzinfo=UTC)
    await clock.advance(9.999999)
    assert fired == [("past", 0.0)]
    assert await clock.jump()
    await clock.advance(timedelta(minutes=1))
    assert fired == [("past", 0.0), ("early", 10.0), ("late", 30.0)]
    assert not await clock.jump() and clock.next_due is None


async def test_a_timer_cancelled_after_it_fired_but_before_its_turn_is_not_called() -> None:
    """A cancel counts until the call itself."""
    clock, calls = VirtualClock(), list[int]()
    timer = clock.timer(asyncio.get_running_loop(), clock.now(), lambda: calls.append(1))
    timer.cancel()
    await asyncio.sleep(0)
    assert calls == []


async def test_a_timeout_passes_while_its_body_hangs() -> None:
    """`advance` does not wait for a body that does nothing: its timeout fires when it is due, not
    before.
    """

    @task(timeout=30)
    async def hang() -> None:
        await asyncio.get_running_loop().create_future()

    @flow
    async def wait() -> None:
        await hang()

    app, clock = App("slow"), VirtualClock()
    async with running(app, clock=clock):
        handle = await app.start(wait)
        await clock.advance(29)
        assert (await handle.row())["state"] == "running"
        await clock.advance(1)
        with pytest.raises(TaskTimedOut):
            await handle.result()


async def test_drain_waits_for_bodies_that_are_busy_for_real() -> None:
    """Threads and real sleeps are waited for: `drain` returns when what they return is recorded."""

    @task
    def compute() -> int:
        time.sleep(BUSY_BODY)
        return 1

    @task
    async def fetch() -> int:
        await asyncio.sleep(BUSY_BODY)
        return 2

    @flow
    async def both() -> int:
        return sum(await asyncio.gather(compute(), fetch()))

    app = App("real")
    async with running(app):
        handle = await app.start(both)
        assert (await drain(app, advance=False))["completed"] == 1
        assert await handle.result() == 3


async def test_drain_lists_what_is_stuck() -> None:
    """After its deadline `drain` raises a table: each live run with what it waits for."""

    @task
    async def hang() -> None:
        await asyncio.get_running_loop().create_future()

    @flow
    async def stuck() -> None:
        await hang()

    @flow
    async def tomorrow() -> None:
        await sleep(DAY)

    app = App("table")
    async with running(app):
        first, second = await app.start(stuck), await app.start(tomorrow)
        with pytest.raises(Stuck) as raised:
            await drain(app, within=0.3)
    lines = str(raised.value).splitlines()
    assert any(first.id in line and "hang#0, attempt 1" in line for line in lines)
    assert any(second.id in line and "2030-01-02 00:00:00" in line for line in lines)


async def test_a_flow_that_never_ends_is_stuck_and_not_an_endless_test() -> None:
    """Time that moves for ever does not keep `drain` for ever."""

    @flow
    async def heartbeat() -> None:
        while True:
            await sleep(3600)

    app = App("endless")
    async with running(app):
        await app.start(heartbeat)
        with pytest.raises(Stuck, match="heartbeat"):
            await drain(app, within=0.5)


async def test_drain_leaves_time_alone_when_asked() -> None:
    """With `advance=False` a sleeping run sleeps on."""

    @flow
    async def nap() -> None:
        await sleep(10)

    app, clock = App("nap"), VirtualClock()
    async with running(app, clock=clock):
        await app.start(nap)
        assert (await drain(app, advance=False))["pending"] == 1 and clock.monotonic() == 0
        assert (await drain(app))["completed"] == 1 and clock.monotonic() == 10


async def test_drain_with_the_machines_own_clock_waits_for_due_times() -> None:
    """With real time `drain` waits in real time."""

    @flow
    async def nap() -> None:
        await sleep(0.05)

    app = App("real-time")
    async with running(app, clock=SystemClock()):
        await app.start(nap)
        assert (await drain(app))["completed"] == 1


async def test_result_of_returns_the_value_or_raises_the_error() -> None:
    """`result_of` is the run's result through any waits; what the flow raised, or that it is held,
    is raised.
    """

    @task
    async def refuse() -> None:
        raise Permanent("no")

    @flow
    async def later(n: int) -> int:
        await sleep(DAY)
        return n + 1

    @flow
    async def failing() -> None:
        await refuse()

    @flow
    async def waiting_for_nobody() -> None:
        await asyncio.get_running_loop().create_future()

    app = App("results")
    async with running(app):
        assert await result_of(app, later, n=1) == 2
        with pytest.raises(Permanent, match="no"):
            await result_of(app, failing)
        with pytest.raises(RunHeld):
            await result_of(app, waiting_for_nobody)


async def test_a_memory_trigger_is_a_trigger_like_any_other() -> None:
    """Receipts, duplicates, dead letters and cursors are the ledger's own; `send` returns when they
    are durable.
    """
    shop = Shop()
    async with running(shop.app, clock=shop.clock):
        (first,) = await shop.orders.send(data={"amount": 1}, id="a", cursor={"page": 1})
        (again,) = await shop.orders.send(data={"amount": 1}, id="a", cursor={"page": 2})
        (other,) = await shop.orders.send(data={"amount": 2}, id="a")
        letter, event = await shop.orders.send(
            Undecodable(id="b", source="/x", body=b"\xff", error="no JSON"),
            Event(id="c", source="/x", type="t", data={}),
        )
        assert not first.duplicate and again.duplicate and other.conflict
        assert again.ledger_id == first.ledger_id and first.matched == 1
        assert await shop.orders.cursor() == {"page": 2}
        counts = await drain(shop.app)
        assert (letter.matched, event.matched) == (0, 0)
    assert (
        counts["completed"] == 1
        and counts["dead"] == 3  # the conflict is kept, too
        and counts["duplicates"] == 1
        and counts["conflicts"] == 1
    )


async def test_sending_to_a_closed_app_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """`send` waits for the app to listen, but not for ever."""
    monkeypatch.setattr("eventflow.testing.apps.OPEN_TIMEOUT_SECONDS", 0.05)
    with pytest.raises(UsageError, match="open app"):
        await MemoryTrigger("nobody").send(data=1)


async def test_a_store_that_is_opened_twice_goes_on_where_it_was(tmp_path: Path) -> None:
    """With a path of its own the store outlives `running`: what was pending then is finished
    now.
    """
    shop = Shop()
    shop.failures = 1
    async with running(shop.app, clock=shop.clock, store=tmp_path / "shop.db"):
        await shop.orders.send(data={"amount": 1})
        await drain(shop.app, advance=False)
    assert len(shop.tried_at) == 1 and not shop.app.is_open
    async with running(shop.app, clock=shop.clock, store=tmp_path / "shop.db"):
        assert (await drain(shop.app))["completed"] == 1
    assert shop.tried_at[1] - shop.tried_at[0] == timedelta(days=1)


async def test_running_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The temporary store is gone afterwards, also when the test fails, and the app has its own
    clock again.
    """
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shop = Shop()
    before = shop.app.clock
    with pytest.raises(ZeroDivisionError):
        async with running(shop.app):
            assert list(tmp_path.rglob("shop.db"))
            raise ZeroDivisionError
    assert not list(tmp_path.iterdir()) and shop.app.clock is before and not shop.app.is_open


async def test_lines_that_flows_and_tasks_log_and_print_are_collected() -> None:
    """`lines` holds what user code said inside runs, with run, task and attempt."""

    @task
    async def speak() -> None:
        print("printed")
        get_logger("shop").info("said", price=3)

    @flow
    async def talk() -> None:
        await speak()

    app, lines = App("talk"), list[LogLine]()
    async with running(app, lines=lines):
        handle = await app.start(talk)
        await handle.result()
    assert {line.event for line in lines} >= {"printed", "said"}
    assert all(
        line.run == handle.number and line.task == "speak" and line.attempt == 1 for line in lines
    )


async def test_the_journal_shows_calls_with_attempts_and_states() -> None:
    """`journal_of` tells of each call what became of it, in the order recorded: tasks, timers,
    emits, child runs.
    """

    @task(retries=[60])
    async def flaky() -> str:
        if len(tries) < 1:
            tries.append(1)
            raise ValueError("first")
        return "ok"

    @flow
    async def child() -> int:
        return 7

    @flow
    async def parent() -> None:
        await flaky()
        await sleep(5)
        await emit("parent.done", {"n": 1})
        await child()

    tries: list[int] = []
    app = App("journal")
    async with running(app):
        handle = await app.start(parent)
        await drain(app, advance=False)
        (step,) = await journal_of(app, handle)
        assert (step.state, step.attempts, step.error) == ("retrying", 1, "first")
        assert step.next_at == datetime(2030, 1, 1, 0, 1, tzinfo=UTC)
        await drain(app)
        steps = await journal_of(app, handle.id)
        assert [(s.name, s.state, s.attempts) for s in steps if not s.call_key.startswith("@")] == [
            ("flaky", "completed", 2),
            ("sleep", "fired", 0),
            ("emit:parent.done", "published", 0),
            ("child", "completed", 1),
        ]
        assert steps[0].value == "ok" and [s.value for s in steps if s.name == "child"] == [7]


async def test_events_that_a_run_emitted_are_found() -> None:
    """`events_of` gives the events of one run, from flow and task bodies, and not those of
    another.
    """

    @task
    async def publish(n: int) -> None:
        await emit("from.task", {"n": n})

    @flow
    async def speak(n: int) -> None:
        await publish(n)
        await emit("from.flow", {"n": n})

    app = App("emits")
    async with running(app):
        one: RunHandle = await app.start(speak, n=1)
        await app.start(speak, n=2)
        await drain(app)
        found = await events_of(app, one)
    assert [(event.type, event.data) for event in found] == [
        ("from.task", {"n": 1}),
        ("from.flow", {"n": 1}),
    ]
