"""`@flow(retries=)`: a run that fails is executed again later, with its recorded values."""

import asyncio
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from eventflow import (
    App,
    Event,
    Permanent,
    Retry,
    RetryAfter,
    current_task,
    flow,
    sleep,
    task,
)
from eventflow.core.errors import RunCancelled, RunTimedOut, UsageError
from eventflow.logs.capture import configure
from eventflow.runs.journal import RETRY_NOTE
from eventflow.runs.run import parse_id
from eventflow.testing import VirtualClock, drain, running
from tests.conftest import eventually

pytestmark = pytest.mark.anyio

WAIT = 30.0


class Bodies:
    """Records the calls of a test's bodies, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def fail(self, name: str, times: int, error: BaseException | None = None) -> int:
        """Records a call and returns its number by name; raises in the first `times` calls."""
        self.calls.append(name)
        count = self.calls.count(name)
        if count <= times:
            raise error or ConnectionError(f"{name} failed, call {count}")
        return count


async def state_of(app: App, number: int) -> str:
    return (await app.store.run(number))["state"]


async def awaits(app: App, number: int, reason: str = "attempt ") -> None:
    """Waits until the run waits for a retry, with a reason that begins so."""

    async def found() -> bool:
        row = await app.store.run(number)
        return row["state"] == "waiting" and (row["reason"] or "").startswith(reason)

    await eventually(found, f"the run waits: {reason}")


async def in_state(app: App, number: int, state: str) -> None:
    async def found() -> bool:
        return await state_of(app, number) == state

    await eventually(found, f"the run is {state}")


async def child_of(app: App, parent: int, flow_name: str) -> int:
    found: list[int] = []

    async def find() -> list[int]:
        rows = await app.store.runs(parent=parent)
        found[:] = [row["id"] for row in rows if row["flow"] == flow_name]
        return found

    await eventually(find, f"{flow_name} has been started")
    return found[0]


async def test_a_failed_run_is_executed_again_from_its_recorded_values() -> None:
    """Each failed attempt is followed by its whole delay; recorded values are not computed again;
    the run completes with the first attempt that succeeds, and is counted once.
    """
    seen = Bodies()
    keys: set[str] = set()

    @task
    async def reserve() -> str:
        return f"r-{seen.fail('reserve', 0)}"

    @task
    async def charge(what: str) -> str:
        keys.add(current_task().idempotency_key)
        return f"{what} charged, call {seen.fail('charge', 2)}"

    @flow(retries=[WAIT, 2 * WAIT])
    async def order() -> str:
        return await charge(await reserve())

    app, clock = App("retries"), VirtualClock()
    app.add(order)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(order)
        number = run.number
        await awaits(app, number, "attempt 1 of 3 failed: ConnectionError: charge failed, call 1")
        assert (await app.store.counts())["pending"] == 1
        await clock.advance(WAIT - 1)
        assert await state_of(app, number) == "waiting"
        await clock.advance(1)
        await awaits(app, number, "attempt 2 of 3 failed: ConnectionError: charge failed, call 2")
        await clock.advance(2 * WAIT - 1)
        assert await state_of(app, number) == "waiting"
        await clock.advance(1)
        assert await run.result() == "r-1 charged, call 3"
        assert seen.calls == ["reserve", "charge", "charge", "charge"] and len(keys) == 1
        counts = await app.store.counts()
        assert (counts["completed"], counts["failed"], counts["pending"]) == (1, 0, 0)
        notes = [e for e in await app.store.load(number) if e.call_key == RETRY_NOTE]
        assert [note.attempt for note in notes] == [1, 2]
        assert (await app.store.run(number))["reason"] is None
        assert await app.store.check() == []


async def test_the_last_failure_ends_the_run_and_is_reported_once() -> None:
    """Before the last attempt there is no event, no error line and no `on_failure`, only `on_retry`
    and a warning with attempt, delay and error. The last failure is reported in each of these ways,
    once.
    """
    hooks: list[tuple[str, str, object]] = []
    events: list[str] = []

    @flow(
        retries=[1, 2],
        on_failure=lambda run, error: hooks.append(("failure", str(error), None)),  # pyright: ignore
        on_retry=lambda run, error, delay: hooks.append(("retry", str(error), delay)),  # pyright: ignore
    )
    async def bad() -> None:
        raise ValueError("no")

    @flow
    async def alarm(event: Event) -> None:
        events.append(event.type)

    app, clock = App("failing"), VirtualClock()
    app.on("eventflow.run.failed", alarm)
    stream = io.BytesIO()
    with configure(stream=stream, pretty=False) as logs:
        async with running(app, clock=clock), asyncio.timeout(20):
            run = await app.start(bad)
            for attempt, delay in ((1, 1), (2, 2)):
                await awaits(app, run.number, f"attempt {attempt} of 3 failed: ValueError: no")
                assert events == []
                await clock.advance(delay)
            with pytest.raises(ValueError, match="no"):
                await run.result()
            await eventually(lambda: len(hooks) == 3 and events, "hooks and event are there")
            assert hooks == [("retry", "no", 1.0), ("retry", "no", 2.0), ("failure", "no", None)]
            assert events == ["eventflow.run.failed"]
            assert await app.store.check() == []
        logs.flush()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    warned = [line for line in lines if line["event"] == "run.attempt_failed"]
    assert [(each["level"], each["attempt"], each["retry_in"]) for each in warned] == [
        ("warning", 1, 1.0),
        ("warning", 2, 2.0),
    ]
    assert all("ValueError: no" in each["error"] and each["attempts"] == 3 for each in warned)
    assert [each["event"] for each in lines if each["level"] == "error"] == ["run.failed"]


class Refused(Exception):
    pass


class Busy(RetryAfter):
    """A RetryAfter whose constructor does not call that of its base."""

    def __init__(self, who: str) -> None:  # pyright: ignore[reportMissingSuperCall]
        self.who = who

    def __str__(self) -> str:
        return f"{self.who} is busy"


class Endless(RetryAfter):
    def __init__(self) -> None:
        super().__init__(1)
        self.delay = math.inf


def _group(*errors: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("several", errors)


@pytest.mark.parametrize(
    ("retries", "error", "attempts"),
    [
        (Retry(attempts=3, delay=1, jitter=False), OSError("x"), 3),
        (2, OSError("x"), 3),
        (0, OSError("x"), 1),
        (None, OSError("x"), 1),
        (2, Permanent("never"), 1),
        (2, RetryAfter(7, "busy"), 3),
        (2, Busy("x"), 3),
        (2, Endless(), 3),
        (Retry(attempts=3, delay=1, on=(OSError,)), Busy("x"), 1),
        (Retry(attempts=3, delay=1, on=(OSError,)), ValueError("x"), 1),
        (Retry(attempts=3, delay=1, on=(OSError,)), ConnectionError("x"), 3),
        (Retry(attempts=3, delay=1, give_up_on=(Refused,)), Refused("x"), 1),
        (2, _group(OSError("x"), ValueError("y")), 3),
        (2, _group(OSError("x"), Permanent("never")), 1),
        (Retry(attempts=3, delay=1, on=(OSError,)), _group(OSError("x"), ValueError("y")), 1),
        (Retry(attempts=3, delay=1, on=(ExceptionGroup,)), _group(ValueError("y")), 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("by", ["the flow's code", "a task"])
async def test_retries_mean_what_they_mean_on_a_task(
    retries: Any, error: Exception, attempts: int, by: str
) -> None:
    """`retries=` takes the same values as on a task, and `on`, `give_up_on`, Permanent and
    RetryAfter have the same effect, whether a task or the flow's own code raised.
    """
    made: list[int] = []

    @task
    async def body() -> None:
        raise error

    @flow(retries=retries)
    async def once() -> None:
        made.append(1)
        if by == "a task":
            await body()
        raise error

    app, clock = App("policy"), VirtualClock()
    app.add(once)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(once)
        await drain(app)
        assert await state_of(app, run.number) == "failed"
        assert len(made) == attempts


async def test_retry_after_of_the_flow_sets_the_delay() -> None:
    """The next attempt starts after the delay of RetryAfter, not after that of the formula."""
    made: list[int] = []

    @flow(retries=Retry(attempts=2, delay=1))
    async def busy() -> str:
        made.append(1)
        if len(made) == 1:
            raise RetryAfter(500)
        return "done"

    app, clock = App("after"), VirtualClock()
    app.add(busy)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(busy)
        await awaits(app, run.number)
        await clock.advance(499)
        assert await state_of(app, run.number) == "waiting"
        await clock.advance(1)
        assert await run.result() == "done"


async def test_a_timeout_is_that_of_one_attempt() -> None:
    """An attempt that exceeds `timeout=` has failed and is retried; the next one has the whole time
    again, and the wait does not count.
    """
    made: list[int] = []

    @task
    async def slow() -> None:
        made.append(1)
        if len(made) < 3:
            await asyncio.Event().wait()

    @flow(timeout=10, retries=[WAIT, WAIT], grace=0)
    async def bounded() -> str:
        await slow()
        await sleep(9)
        return "in time"

    app, clock = App("bounded"), VirtualClock()
    app.add(bounded)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(bounded)
        for attempt in (1, 2):
            await eventually(lambda n=attempt: len(made) == n, "the body runs")
            await clock.advance(10)
            await awaits(app, run.number, f"attempt {attempt} of 3 failed: ")
            await clock.advance(WAIT)
        await eventually(lambda: len(made) == 3, "the third attempt runs")
        await clock.advance(9)
        assert await run.result() == "in time"


async def test_the_last_timeout_fails_the_run() -> None:
    """When the retries are used up, a timeout fails the run."""

    @flow(timeout=10, retries=[1])
    async def stands() -> None:
        await sleep(3600)

    app, clock = App("stands"), VirtualClock()
    app.add(stands)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(stands)
        await drain(app)
        with pytest.raises(RunTimedOut):
            await run.result()


async def test_a_cancel_in_the_wait_lets_the_flow_clean_up() -> None:
    """A run that waits for its retry and is cancelled is executed once more, with the cancel: its
    recorded calls keep their values, its clean-up may call tasks, and it is not retried again.
    """
    seen = Bodies()

    @task
    async def reserve() -> str:
        seen.fail("reserve", 0)
        return "r-1"

    @task
    async def work() -> None:
        seen.fail("work", 99)

    @task
    async def release(what: str) -> None:
        seen.fail(f"release {what}", 0)

    @flow(retries=[WAIT] * 9)
    async def saga() -> None:
        what = await reserve()
        try:
            await work()
        except asyncio.CancelledError:
            await release(what)
            raise

    app, clock = App("cancelled"), VirtualClock()
    app.add(saga)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(saga)
        await awaits(app, run.number)
        await run.cancel("enough")
        with pytest.raises(RunCancelled, match="enough"):
            await run.result()
        assert seen.calls == ["reserve", "work", "release r-1"]
        await clock.advance(10 * WAIT)
        assert await state_of(app, run.number) == "cancelled"
        assert await app.store.check() == []


async def test_a_run_that_fails_after_its_cancel_is_not_retried() -> None:
    """A flow that raises another error after its cancel has failed, as without retries."""

    @flow(retries=[WAIT])
    async def stubborn() -> None:
        try:
            await sleep(10)
        except asyncio.CancelledError:
            raise ValueError("in the clean-up") from None

    app, clock = App("stubborn"), VirtualClock()
    app.add(stubborn)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(stubborn)
        await in_state(app, run.number, "running")
        await run.cancel("enough")
        with pytest.raises(ValueError, match="in the clean-up"):
            await run.result()


async def test_retry_by_hand_ends_the_wait_and_renews_the_retries() -> None:
    """`retry` of a run that waits for its retry starts the next attempt now. After the final
    failure, `retry` gives the run all its retries again; the errors of all attempts are kept.
    """
    seen = Bodies()

    @task
    async def work() -> str:
        return f"call {seen.fail('work', 5)}"

    @flow(retries=[WAIT])
    async def job() -> str:
        return await work()

    app, clock = App("by hand"), VirtualClock()
    app.add(job)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(job)
        await awaits(app, run.number, "attempt 1 of 2")
        await app.store.retry(run.number)
        await in_state(app, run.number, "failed")
        assert len(seen.calls) == 2
        await app.store.retry(run.number)
        await awaits(app, run.number, "attempt 1 of 2")
        assert len(seen.calls) == 3
        await clock.advance(WAIT)
        await in_state(app, run.number, "failed")
        await app.store.retry(run.number)
        await awaits(app, run.number, "attempt 1 of 2")
        await clock.advance(WAIT)
        assert await run.result() == "call 6"
        notes = [e for e in await app.store.load(run.number) if e.call_key == RETRY_NOTE]
        assert [note.value is None for note in notes] == [False, True, False, True, False]
        assert all(note.error for note in notes)
        assert await app.store.check() == []


async def test_a_run_that_waits_for_its_retry_releases_its_slot_and_keeps_its_key() -> None:
    """With `concurrency=1` another run of the flow executes during the wait. A run with the same
    ordering key does not: it starts when the first one has ended.
    """
    done: list[str] = []
    failing = {"a1"}

    @flow(concurrency=1, retries=[WAIT])
    async def handle(event: Event) -> None:
        if event.id in failing:
            raise OSError("not yet")
        done.append(event.id)

    app, clock = App("lanes"), VirtualClock()
    app.on("order", handle, key="@subject")
    async with running(app, clock=clock), asyncio.timeout(20):
        for ident, key in (("a1", "a"), ("a2", "a"), ("b1", "b")):
            await app.emit("order", {}, id=ident, subject=key)
        await eventually(lambda: done == ["b1"], "the run of the other key has ended")
        failing.clear()
        await clock.advance(WAIT - 1)
        assert done == ["b1"]
        await clock.advance(1)
        await eventually(lambda: done == ["b1", "a1", "a2"], "the lane goes on, in order")


# --------------------------------------------------------------------------- families


async def test_a_parent_waits_on_while_its_child_is_retried() -> None:
    """A child with retries gives its parent no answer until it has ended."""
    seen = Bodies()

    @task
    async def work() -> str:
        return f"call {seen.fail('work', 2)}"

    @flow(retries=[WAIT, WAIT])
    async def child() -> str:
        return await work()

    @flow
    async def parent() -> str:
        return await child()

    app, clock = App("child"), VirtualClock()
    app.add(parent)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(parent)
        for _ in range(2):
            await awaits(app, await child_of(app, run.number, "child"))
            await clock.advance(WAIT)
        assert await run.result() == "call 3"
        assert await app.store.check() == []


async def test_failed_children_are_executed_again_with_their_parent_and_not_earlier() -> None:
    """A child that failed waits until its parent is due, and keeps its values; a sibling that was
    still running continues, and the next attempt gets its value.
    """
    seen = Bodies()
    go = asyncio.Event()

    @task
    async def prepare() -> str:
        return f"prepared {seen.fail('prepare', 0)}"

    @task
    async def work() -> str:
        return f"call {seen.fail('work', 1)}"

    @task
    async def long() -> str:
        seen.fail("long", 0)
        await go.wait()
        return "long"

    @flow
    async def quick() -> str:
        return f"{await prepare()}, {await work()}"

    @flow
    async def brother() -> str:
        return await long()

    @flow(retries=[WAIT])
    async def parent() -> list[str]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(brother()), group.create_task(quick())]
        return [each.result() for each in tasks]

    app, clock = App("family"), VirtualClock()
    app.add(parent)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(parent)
        await awaits(app, run.number)
        first = await child_of(app, run.number, "quick")
        other = await child_of(app, run.number, "brother")
        await awaits(app, first, "retried with its parent")
        await clock.advance(WAIT - 1)
        assert seen.calls.count("work") == 1
        assert await state_of(app, other) == "running"
        go.set()
        await in_state(app, other, "completed")
        assert await state_of(app, run.number) == "waiting"
        await clock.advance(1)
        assert await run.result() == ["long", "prepared 1, call 2"]
        assert sorted(seen.calls) == ["long", "prepare", "work", "work"]
        assert len(await app.store.runs(parent=run.number)) == 2
        assert await app.store.check() == []


@pytest.mark.parametrize("ends", ["in the wait", "in the next attempt"])
async def test_a_child_that_its_parent_cancelled_is_executed_again(ends: str) -> None:
    """A child that a failing attempt cancelled, and whose clean-up lasts longer, is executed again
    from its values: the next attempt gets its result and no error of the old cancel.
    """
    seen = Bodies()
    cleaned = asyncio.Event()

    @task
    async def step() -> str:
        return f"step {seen.fail('step', 0)}"

    @task
    async def stand() -> str:
        if seen.fail("stand", 0) == 1:
            await asyncio.Event().wait()
        return "stood"

    @task
    async def clean() -> None:
        seen.fail("clean", 0)
        await cleaned.wait()

    @flow(grace=3600)
    async def child() -> str:
        done = await step()
        try:
            return f"{done}, {await stand()}"
        except asyncio.CancelledError:
            await clean()
            raise

    @task
    async def wait_for_clean_up() -> None:
        await eventually(lambda: "clean" in seen.calls, "the child cleans up")

    @flow(retries=[WAIT])
    async def parent() -> str:
        call = asyncio.create_task(child())
        if seen.calls.count("attempt") == 0:
            seen.calls.append("attempt")
            await sleep(1)
            call.cancel()
            await wait_for_clean_up()
            raise OSError("failed")
        return await call

    app, clock = App("cancelled child"), VirtualClock()
    app.add(parent)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(parent)
        await eventually(lambda: "stand" in seen.calls, "the child works")
        await clock.advance(1)
        await awaits(app, run.number)
        number = await child_of(app, run.number, "child")
        if ends == "in the wait":
            cleaned.set()
            await awaits(app, number, "retried with its parent")
            await clock.advance(WAIT)
        else:
            await clock.advance(WAIT)
            await in_state(app, run.number, "running")
            cleaned.set()
        assert await run.result() == "step 1, stood"
        assert [*seen.calls] == ["attempt", "step", "stand", "clean", "stand"]
        assert len(await app.store.runs(parent=run.number)) == 1
        assert await app.store.check() == []


async def test_a_child_that_a_person_cancelled_stays_so() -> None:
    """A retry of the parent does not execute a child again that a person cancelled: the parent
    fails at once.
    """

    @flow
    async def child() -> None:
        await sleep(3600)

    @flow(retries=[WAIT])
    async def parent() -> None:
        await child()

    app, clock = App("a person"), VirtualClock()
    app.add(parent)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(parent)
        number = await child_of(app, run.number, "child")
        await in_state(app, number, "waiting")
        await app.store.cancel(number, "not this one")
        with pytest.raises(RunCancelled, match="not this one"):
            await run.result()
        assert await state_of(app, number) == "cancelled"


async def test_a_held_run_is_not_retried() -> None:
    """A run that needs a person stays held, also with retries left."""
    arguments = iter("ab")

    @task
    async def work(x: str) -> str:
        return x

    @flow(retries=[WAIT])
    async def changes() -> None:
        await work(next(arguments))
        raise OSError("again")

    app, clock = App("held"), VirtualClock()
    app.add(changes)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(changes)
        await awaits(app, run.number)
        await clock.advance(WAIT)
        await in_state(app, run.number, "held")
        await clock.advance(10 * WAIT)
        assert await state_of(app, run.number) == "held"


@pytest.mark.parametrize("when", ["in the wait", "as it fails"])
async def test_a_cancel_ends_a_flow_that_raises_before_it_gets_it(when: str) -> None:
    """A cancelled run whose flow raises at its first step is cancelled, and not failed or retried,
    whether the cancel came during the wait for the retry or while the failure was being recorded.
    """
    made: list[int] = []
    app = App("raises")

    @task
    async def cancel_me() -> None:
        ident = current_task().run_id
        await app.store.cancel(parse_id(ident) or 0, "enough")

    @flow(retries=[WAIT] * 9)
    async def job() -> None:
        made.append(1)
        if when == "as it fails" and len(made) == 1:
            await cancel_me()
        raise OSError("no")

    clock = VirtualClock()
    app.add(job)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(job)
        if when == "in the wait":
            await awaits(app, run.number)
            await run.cancel("enough")
        with pytest.raises(RunCancelled, match="enough"):
            await run.result()
        assert len(made) <= 2
        assert await app.store.check() == []


async def test_a_wait_goes_on_after_a_restart(tmp_path: Path) -> None:
    """The due time is the recorded one: a restart during the wait, and one after it, neither
    shorten nor lengthen it, and attempts are counted on.
    """
    made: list[int] = []

    @flow(retries=[WAIT, WAIT])
    async def job() -> str:
        made.append(1)
        if len(made) < 3:
            raise OSError("no")
        return "done"

    clock = VirtualClock()
    number = 0
    for life, forward in enumerate((WAIT / 2, WAIT / 2, WAIT, 0)):
        app = App("lives")
        app.add(job)
        async with running(app, clock=clock, store=tmp_path / "lives.db"), asyncio.timeout(20):
            if life == 0:
                number = (await app.start(job)).number
            if life < 3:
                await awaits(app, number, f"attempt {1 + (life == 2)} of 3")
                assert len(made) == 1 + (life == 2)
            else:
                await in_state(app, number, "completed")
            assert await app.store.check() == []
        await clock.advance(forward)
    assert len(made) == 3


# --------------------------------------------------------------------------- declaration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retries": "3"}, "expected a Retry, a number or a list of delays, found '3'"),
        ({"retries": True}, "found a bool"),
        ({"retries": -1}, "retries="),
        ({"retries": [1, -2]}, "retries="),
        ({"retry": 3}, "did you mean"),
        ({"retry_delay_seconds": 3}, r"write retries=Retry\(attempts=..., delay=...\)"),
        ({"on_retry": 3}, "on_retry="),
    ],
)
def test_wrong_retries_are_refused_where_they_are_written(
    options: dict[str, Any], message: str
) -> None:
    """The error says what was expected, with file and line."""
    with pytest.raises(UsageError, match=message) as error:
        flow(**options)
    assert "test_flow_retries.py:" in str(error.value)


async def test_a_flow_called_like_a_function_is_not_retried() -> None:
    """Outside of a run a flow is a plain function: its error is raised at once."""
    made: list[int] = []

    @flow(retries=5)
    async def direct() -> None:
        made.append(1)
        raise OSError("once")

    with pytest.raises(OSError, match="once"):
        await direct()
    assert made == [1]
