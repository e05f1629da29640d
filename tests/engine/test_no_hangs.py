"""Runs that user code would keep from ending or from starting, and what an embedded App leaves
behind.
"""

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from msgspec.structs import replace

from eventflow import App, Event, flow, sleep, task
from eventflow.core.clock import SECOND, SystemClock
from eventflow.core.errors import RunCancelled, RunHeld
from eventflow.testing import MemoryTrigger, VirtualClock, result_of, running
from tests.conftest import eventually

pytestmark = pytest.mark.anyio


def own_threads() -> set[str]:
    return {each.name for each in threading.enumerate() if each.name.startswith("eventflow")}


# --------------------------------------------------------------------------- starts


BODY_WITHOUT_END = 3600.0
SLOW_BODY = 0.3
SHORT_BODY = 0.02
"""Seconds that task bodies sleep."""

FUSSY: list[type[BaseException] | None] = []
"""What the next `Fussy` raise."""


@dataclass
class Fussy:
    n: int

    def __post_init__(self) -> None:
        if FUSSY and (error := FUSSY.pop(0)) is not None:
            raise error("no")


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
async def test_a_run_whose_arguments_raise_fails(error: type[BaseException]) -> None:
    """Whatever the app's own types raise while the arguments are bound, the run has an outcome and
    others go on.
    """

    @flow
    async def starts(given: Fussy) -> int:
        return given.n

    app = App("starts", concurrency=1)
    app.add(starts)
    async with running(app), asyncio.timeout(15):
        FUSSY[:] = [None, error]  # the first is bound where the run is recorded
        run = await app.start(starts, given={"n": 1})
        await eventually(lambda: _state(app, run, "failed"), "the run has failed")
        assert not FUSSY
        assert await result_of(app, starts, given={"n": 2}) == 2


async def test_a_start_that_raises_holds_its_run(tmp_path: Path) -> None:
    """What keeps a run from starting holds it with the reason, and frees its slot: an option that
    cannot be used, a journal that cannot be read.
    """

    @flow
    async def starts(n: int) -> int:
        return n

    app = App("starts", concurrency=1)
    app.add(starts)
    options = starts.options
    async with running(app, store=tmp_path / "starts.db"), asyncio.timeout(15):
        starts.options = replace(options, timeout=math.inf)  # as no @flow takes it
        with pytest.raises(RunHeld, match=r"cannot be started|infinity"):
            await result_of(app, starts, n=1)
        starts.options = options
        assert await result_of(app, starts, n=2) == 2


async def _state(app: App, run: Any, state: str) -> bool:
    return (await run.row())["state"] == state


# --------------------------------------------------------------------------- cancels


@pytest.mark.parametrize("how", ["itself", "from its helper", "all tasks"])
@pytest.mark.parametrize("own_loop", [False, True])
async def test_a_body_that_is_cancelled_by_the_app_fails(how: str, own_loop: bool) -> None:
    """A body that cancels its own asyncio task, or every task of the loop, is a failed attempt, not
    one that runs again for ever; one that other code cancels runs once more. Other runs go on, the
    lifespan stays.
    """
    bodies: list[str] = []
    lifespan_is_over = False

    @asynccontextmanager
    async def lifespan() -> AsyncGenerator[None]:
        nonlocal lifespan_is_over
        yield
        lifespan_is_over = True

    @task
    async def cancels() -> None:
        bodies.append("began")
        mine = asyncio.current_task()
        assert mine is not None
        match how:
            case "itself":
                mine.cancel()
            case "from its helper":
                asyncio.get_running_loop().call_soon(mine.cancel)
            case _:
                for each in asyncio.all_tasks():
                    each.cancel()
        await asyncio.sleep(BODY_WITHOUT_END)

    @task
    async def add(a: int) -> int:
        await asyncio.sleep(SHORT_BODY)
        return a + 1

    @flow
    async def cancelled() -> None:
        await cancels()

    @flow
    async def goes_on(a: int) -> int:
        return await add(a)

    if how == "all tasks" and not own_loop:
        pytest.skip("there it cancels the tasks of the embedding program, this test among them")
    app = App("cancelled", lifespan=lifespan)
    app.add(cancelled, goes_on)
    await app.open(own_loop=own_loop)
    try:
        async with asyncio.timeout(15):
            other = await app.start(goes_on, a=1)
            run = await app.start(cancelled)
            await eventually(lambda: _state(app, run, "failed"), "the run has failed")
            assert "CancelledError" in str((await run.row())["error"])
            assert len(bodies) == (2 if how == "from its helper" else 1)
            assert await other.result() == 2
            assert await result_of(app, goes_on, a=2) == 3
            assert not lifespan_is_over
    finally:
        await app.close(0.5)
    assert lifespan_is_over


@pytest.mark.parametrize("kind", ["pending", "asleep", "bodies", "nested"])
async def test_a_cancel_comes_before_the_ends_of_the_children(kind: str) -> None:
    """A parent that is cancelled with its children ends as cancelled: it receives no error of a
    child that its own cancel has caused.
    """
    caught: list[BaseException] = []

    @task
    async def waits() -> None:
        await asyncio.sleep(BODY_WITHOUT_END)

    @flow(concurrency=1)
    async def child(kind: str) -> None:
        await (waits() if kind == "bodies" else sleep(3600))

    @flow
    async def middle(kind: str) -> None:
        await asyncio.gather(child(kind), child(kind))

    @flow
    async def parent(kind: str) -> None:
        try:
            if kind == "nested":
                await middle(kind)
            await asyncio.gather(*(child(kind) for _ in range(3)))
        except Exception as error:  # a compensation would start here
            caught.append(error)
            raise

    app = App("family")
    for each in (child, middle, parent):
        app.add(each)
    clock = SystemClock() if kind in ("bodies", "pending") else VirtualClock()
    async with running(app, clock=clock):
        run = await app.start(parent, kind=kind)
        wanted = {"pending": 4, "asleep": 4, "bodies": 4, "nested": 4}[kind]

        async def all_there() -> bool:
            return len(await app.store.runs(limit=50)) == wanted

        await eventually(all_there, "the children are recorded")
        if isinstance(clock, VirtualClock):
            await clock.advance(1)
        await run.cancel("enough")
        with pytest.raises(RunCancelled, match="enough"):
            await run.result()

        async def all_ended() -> bool:
            states = [row["state"] for row in await app.store.runs(limit=50)]
            return states == ["cancelled"] * wanted

        await eventually(all_ended, "the whole family is cancelled")
        assert caught == []
        await app.store.retry(run.number)  # the children run again, too

        async def none_ended() -> bool:
            states = [row["state"] for row in await app.store.runs(limit=50)]
            return len(states) == wanted and "cancelled" not in states

        await eventually(none_ended, "the family runs again")
        await run.cancel("enough")


@pytest.mark.parametrize(
    "how", ["broad except", "wait_for", "loop", "map", "sleep", "queue", "child", "emit", "restart"]
)
async def test_a_swallowed_cancel_starts_nothing(how: str) -> None:
    """After a cancel a flow that goes on as before starts no body, child, event or restart of
    itself, and ends as cancelled well before its grace is over.
    """
    from eventflow import emit, restart_with

    begun: list[str] = []

    @task
    async def first() -> None:
        await asyncio.sleep(BODY_WITHOUT_END)

    @task
    async def later(n: int = 0) -> int:
        begun.append("later")
        return n

    @flow
    async def grandchild() -> None:
        begun.append("child")

    @flow(grace=600)
    async def swallows(how: str) -> str:
        with suppress(BaseException):
            await first()
        if how == "wait_for":
            with suppress(BaseException):
                await vars(asyncio)["wait_for"](later(), 60)
        for n in range(100_000 if how == "loop" else 3):
            try:
                match how:
                    case "map":
                        await later.map([1, 2, 3])
                    case "sleep":
                        await sleep(3600)
                    case "queue":
                        await asyncio.Queue[int]().get()
                    case "child":
                        await grandchild()
                    case "emit":
                        await emit("swallowed")
                    case "restart":
                        await restart_with(how=how)
                    case _:
                        await later(n)
            except BaseException:
                pass
        return "swallowed"

    app = App("swallow")
    app.add(swallows, grandchild)
    app.on("swallowed", grandchild)
    async with running(app, clock=SystemClock()):
        run = await app.start(swallows, how=how)

        async def waits() -> bool:
            return bool(app.runtime.worker.running_calls(run.number))

        await eventually(waits, "the first body runs")
        await run.cancel("enough")
        async with asyncio.timeout(15):
            with pytest.raises(RunCancelled, match="enough"):
                await run.result()
        assert begun == []
        assert len(await app.store.runs(limit=10)) == 1


async def test_clean_up_after_a_cancel_still_runs() -> None:
    """In `except`, `finally`, `__aexit__`, and in tasks made there, a cancelled flow may call
    tasks, sleep, and gather.
    """
    done: list[str] = []

    @task
    async def first() -> None:
        await asyncio.sleep(BODY_WITHOUT_END)

    @task
    async def undo(what: str) -> str:
        done.append(what)
        return what

    @asynccontextmanager
    async def guarded() -> AsyncGenerator[None]:
        try:
            yield
        finally:
            await undo("context")

    async def step() -> None:
        await undo("helper")

    @flow
    async def saga() -> None:
        try:
            async with guarded(), asyncio.TaskGroup() as group:
                group.create_task(first())
                await first()
        except asyncio.CancelledError:
            await undo("except")
            await asyncio.gather(undo("gathered"), step())
            async with asyncio.timeout(5):
                await asyncio.shield(undo("shielded"))
            raise
        finally:
            await sleep(0.01)
            await undo.map(["mapped"])

    app = App("saga")
    app.add(saga)
    async with running(app, clock=SystemClock()):
        run = await app.start(saga)

        async def waits() -> bool:
            return len(app.runtime.worker.running_calls(run.number)) == 2

        await eventually(waits, "the bodies run")
        await run.cancel("enough")
        with pytest.raises(RunCancelled):
            await run.result()
    assert sorted(done) == ["context", "except", "gathered", "helper", "mapped", "shielded"]


@pytest.mark.parametrize("group", ["asyncio", "anyio", "nested"])
@pytest.mark.parametrize("what", ["a body", "a short sleep", "a long sleep", "both"])
async def test_a_flow_that_waits_for_its_group_cleans_up(group: str, what: str) -> None:
    """A task group holds the cancel back until its tasks have ended. That is no swallowed cancel:
    the clean-up behind the group works.
    """
    done: list[str] = []

    @task
    async def waits() -> None:
        await asyncio.sleep(BODY_WITHOUT_END)

    @task
    async def undo(what: str) -> None:
        done.append(what)

    async def slow() -> None:
        try:
            await waits()
        finally:
            await undo("member")

    async def member() -> None:
        match what:
            case "a body":
                await waits()
            case "a short sleep":
                await sleep(30)
            case "a long sleep":
                await sleep(3600)
            case _:
                await asyncio.gather(slow(), sleep(30))

    @flow
    async def grouped() -> None:
        try:
            if group == "anyio":
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(member)
            elif group == "asyncio":
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(member())
            else:
                async with asyncio.TaskGroup() as outer:
                    async with asyncio.TaskGroup() as inner:
                        inner.create_task(member())
                    outer.create_task(member())
        finally:
            await undo("flow")

    app = App("groups")
    app.add(grouped)
    async with running(app, clock=SystemClock()), asyncio.timeout(15):
        run = await app.start(grouped)

        async def waits_now() -> bool:
            state = (await run.row())["state"]
            return state == "waiting" if what == "a long sleep" else _has_waits(app, run.number)

        await eventually(waits_now, "it waits")
        await run.cancel("enough")
        with pytest.raises(RunCancelled, match="enough"):
            await run.result()
    # A cancelled scope of anyio cancels every await in it again, as anyio says.
    cleans_up = what == "both" and group != "anyio"
    assert done == (["member", "flow"] if cleans_up else ["flow"])


def _has_waits(app: App, run: int) -> bool:
    execution = app.runtime.worker.executions.get(run)
    return execution is not None and len(execution.pending.waiting) > 0


# --------------------------------------------------------------------------- time


class SetClock(SystemClock):
    """A machine whose wall clock is set by `offset` microseconds."""

    offset = 0

    def now(self) -> int:
        return super().now() + self.offset


@pytest.mark.parametrize("hours", [-5, 5])
@pytest.mark.parametrize("what", ["task", "flow", "block", "sleep", "retry"])
async def test_durations_go_by_the_monotonic_clock(what: str, hours: int) -> None:
    """A wall clock that is set back or forward in the middle of a duration neither stretches nor
    cuts it.
    """
    clock, begun, tries = SetClock(), asyncio.Event(), list[int]()

    async def wait(seconds: float) -> str:
        begun.set()
        await asyncio.sleep(seconds)
        return "slept"

    bounded = task(name="bounded", timeout=0.6)(wait)
    free = task(name="free")(wait)

    @task(retries=[0.4])
    async def fails_once() -> str:
        tries.append(1)
        begun.set()
        if len(tries) == 1:
            raise ValueError
        return "slept"

    @flow
    async def healthy() -> str:
        match what:
            case "task":
                return await bounded(0.3)
            case "block":
                async with asyncio.timeout(0.6):
                    return await free(0.3)
            case "sleep":
                await free(0)
                await sleep(0.4)
                return "slept"
            case "retry":
                return await fails_once()
            case _:
                return await free(0.3)

    @flow
    async def too_long() -> str:
        match what:
            case "task":
                return await bounded(30)
            case "block":
                async with asyncio.timeout(0.6):
                    return await free(30)
            case _:
                return await free(30)

    app = App("clocks")
    limited = flow(name="limited", timeout=0.6)(healthy.fn)
    endless = flow(name="endless", timeout=0.6)(too_long.fn)
    app.add(healthy, too_long, limited, endless)
    async with running(app, clock=clock):
        async with asyncio.timeout(15):
            run = await app.start(limited if what == "flow" else healthy)
            started = time.monotonic()
            await begun.wait()
            if what in ("sleep", "retry"):  # the wait has begun once the flow is idle
                await eventually(lambda: _is_idle(app), "the flow waits")
            clock.offset = hours * 3600 * SECOND
            assert await run.result() == "slept"
            assert time.monotonic() - started > 0.25
            if what in ("task", "flow", "block"):
                begun.clear()
                run = await app.start(endless if what == "flow" else too_long)
                await begun.wait()
                clock.offset = 0
                with pytest.raises(TimeoutError):
                    await run.result()


def _is_idle(app: App) -> bool:
    executions = app.runtime.worker.executions.values()
    return any(each.suspension.is_idle for each in executions)


@pytest.mark.parametrize("delay", [1 / 3, 2 / 3, 1e-7, 0.1, 1e-6, math.pi])
@pytest.mark.parametrize("how", ["move_on_after", "timeout", "polling"])
async def test_no_duration_spins_under_a_clock_that_stands_still(how: str, delay: float) -> None:
    """A due time is never before the time that the flow's code asked for: what looks at the
    clock once more and waits again ends.
    """

    @flow
    async def waits() -> bool:
        loop = asyncio.get_running_loop()
        if how == "move_on_after":
            with anyio.move_on_after(delay) as scope:
                await asyncio.Event().wait()
            return scope.cancelled_caught
        if how == "timeout":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(delay):
                    await asyncio.Event().wait()
            return True
        end = loop.time() + delay
        while (left := end - loop.time()) > 0:
            await asyncio.sleep(left)
        return True

    app, clock = App("spins"), VirtualClock()
    app.add(waits)
    async with running(app, clock=clock), asyncio.timeout(15):
        run = await app.start(waits)
        for _ in range(5):
            await clock.advance(1)
        assert await run.result() is True
        execution = app.runtime.worker.executions.get(run.number)
        assert execution is None


# --------------------------------------------------------------------------- limits


@pytest.mark.parametrize("shape", ["recursion", "mutual", "gather"])
async def test_a_flows_cap_counts_runs_that_work(shape: str) -> None:
    """A flow with `concurrency=1` may call itself: a parent that waits leaves its place to its
    child. No two of its runs work at once.
    """
    working, most = list[int](), list[int]()

    @task
    async def work(depth: int) -> None:
        working.append(depth)
        most.append(len(working))
        await asyncio.sleep(SHORT_BODY)
        working.remove(depth)

    @flow(concurrency=1)
    async def ping(depth: int) -> int:
        await work(depth)
        if depth:
            if shape == "gather":
                await asyncio.gather(ping(depth - 1), ping(0))
            else:
                await (ping if shape == "recursion" else pong)(depth - 1)
        await work(depth)
        return depth

    @flow(concurrency=1)
    async def pong(depth: int) -> int:
        return await ping(depth)

    app = App("recursive")
    app.add(ping, pong)
    async with running(app, clock=SystemClock()), asyncio.timeout(15):
        assert await result_of(app, ping, depth=6) == 6
        runs = [await app.start(ping, depth=1) for _ in range(5)]
        assert [await run.result() for run in runs] == [1] * 5
        assert max(most) == 1


# --------------------------------------------------------------------------- closing


@pytest.mark.parametrize("own_loop", [False, True])
@pytest.mark.parametrize("how", ["anyio scope", "cancelled twice", "lifespan", "lifespan exits"])
async def test_close_is_safe_against_its_own_interruption(
    tmp_path: Path, how: str, own_loop: bool
) -> None:
    """Closing in a cancelled scope, being cancelled while closing, or a lifespan that raises,
    leaves neither threads nor the lock.
    """

    @asynccontextmanager
    async def lifespan() -> AsyncGenerator[None]:
        yield
        if how == "lifespan":
            raise ValueError("lifespan")
        if how == "lifespan exits" and own_loop:
            raise SystemExit(3)
        if how == "lifespan exits":
            raise RuntimeError("lifespan")

    @task
    async def slow() -> None:
        await asyncio.sleep(SLOW_BODY)

    @flow
    async def works() -> None:
        await slow()

    before = own_threads()
    app = App("closing", store=f"sqlite:///{tmp_path}/closing.db", lifespan=lifespan)
    app.add(works)
    await app.open(own_loop=own_loop)
    run = await app.start(works)
    await eventually(lambda: app.runtime.worker.running_calls(run.number), "the body runs")
    if how == "anyio scope":
        with anyio.CancelScope() as scope:
            scope.cancel()
            await app.close(1.0)
    elif how == "cancelled twice":
        closing = asyncio.create_task(app.close(1.0))
        for _ in range(2):
            await asyncio.sleep(0)
            closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
    else:
        with pytest.raises(BaseException, match=r"lifespan|3"):
            await app.close(1.0)
    assert not app.is_open
    await eventually(lambda: own_threads() <= before, "no thread is left")
    await app.open(own_loop=own_loop)  # the lock is free
    if how.startswith("lifespan"):
        with pytest.raises(BaseException, match=r"lifespan|3"):
            await app.close(1.0)
    else:
        await app.close(1.0)


@pytest.mark.parametrize("error", [ValueError, SystemExit])
async def test_an_open_that_fails_leaves_nothing(
    tmp_path: Path, error: type[BaseException]
) -> None:
    """A lifespan that raises at the start is raised by `open`; threads end, the lock is free."""

    @asynccontextmanager
    async def lifespan() -> AsyncGenerator[None]:
        raise error("at the start")
        yield

    before = own_threads()
    app = App("opening", store=f"sqlite:///{tmp_path}/opening.db", lifespan=lifespan)
    for own_loop in (True, False):
        with pytest.raises(error):
            await app.open(own_loop=own_loop)
        assert not app.is_open
        await eventually(lambda: own_threads() <= before, "no thread is left")


async def test_code_that_catches_everything_is_left_behind_by_an_embedded_app() -> None:
    """Closing an App on the caller's loop ends although a body and a flow ignore every cancel, and
    `asyncio.run` need not wait for them.
    """
    stop = False

    @task
    async def swallow() -> None:
        while not stop:
            with suppress(BaseException):
                await asyncio.sleep(SHORT_BODY)

    @flow(grace=0.1)
    async def stubborn() -> None:
        await swallow()

    app = App("embedded")
    app.add(stubborn)
    async with asyncio.timeout(20):
        async with running(app, clock=SystemClock()):
            run = await app.start(stubborn)

            async def works() -> bool:
                return bool(app.runtime.worker.running_calls(run.number))

            await eventually(works, "the body runs")
    names = [each.get_coro().__qualname__ for each in asyncio.all_tasks()]  # pyright: ignore
    assert not any("_attempt" in name for name in names)
    stop = True


async def test_events_are_processed_while_a_trigger_or_sink_exits() -> None:
    """`sys.exit()` in a listener, a filter or a binding costs that listener or delivery only."""

    class Exits:
        name = "exits"

        async def listen(self, intake: Any) -> None:
            raise SystemExit(4)

    def refuses(event: Event) -> bool:
        if event.data.get("exit"):
            raise SystemExit(5)
        return True

    @flow
    async def handle(event: Event) -> str:
        return event.id

    app, trigger = App("sources"), MemoryTrigger("src")
    app.on(Exits(), handle)
    app.on(trigger, handle, where=refuses)

    async def done() -> bool:
        return (await app.store.counts())["completed"] == 1

    async with running(app):
        await trigger.send(data={"exit": True}, id="a")
        await trigger.send(data={"exit": False}, id="b")
        await eventually(done, "the second event has its run")
