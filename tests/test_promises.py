"""The ten promises of the README, one test each, on a real App and a real store; deeper ones are
named test_p1_… too.
"""

import asyncio
import shutil
import sqlite3
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from eventflow import App, Event, Undecodable, current_run, current_task, flow, sleep, task
from eventflow.core.clock import SystemClock
from eventflow.core.errors import StoreFailed, StoreFull, UsageError
from eventflow.events.event import Trigger
from eventflow.runs.journal import Entry, Kind
from eventflow.runs.run import Completed, format_id
from eventflow.sdk.flow import Flow
from eventflow.store.protocol import Append, Fenced, Settle
from eventflow.store.writer import ConnectionJob
from eventflow.testing import MemoryTrigger, VirtualClock, drain, journal_of, running
from eventflow.web import actions
from tests.conftest import eventually
from tests.world import Ledger, image

pytestmark = pytest.mark.anyio

DAY = 86_400.0


def an_app(trigger: Trigger | None = None, *flows: Flow[..., Any], **options: Any) -> App:
    app = App("promises", **options)
    for each in flows:
        app.add(each) if trigger is None else app.on(trigger, each)
    return app


async def verdicts(app: App, event: str) -> list[tuple[str, Any]]:
    """The fates that the ledger holds for an event, with their reasons."""
    return [(verdict, detail) for _, verdict, detail in (await app.store.event(event))["verdicts"]]


async def test_p1_ack_follows_the_record(tmp_path: Path) -> None:
    """A webhook's 2xx, a committed Kafka offset, a deleted SQS message, a moved cursor happen only
    after the event is durable.

    Ack means durably recorded, never run finished.
    """
    finished: list[int] = []
    hold = asyncio.Event()

    @flow
    async def handle(n: int) -> None:
        await wait(n)

    @task
    async def wait(n: int) -> None:
        await hold.wait()
        finished.append(n)

    source, store = MemoryTrigger("src"), tmp_path / "live.db"
    async with running(an_app(source, handle), store=store):
        for n in range(5):
            (receipt,) = await source.send(data={"n": n}, cursor={"place": n})
            left = Ledger(
                image(store, tmp_path / f"killed-{n}.db")
            )  # kill -9 in the moment of the acknowledgement
            assert receipt.ledger_id in {row["id"] for row in left.events.values()}
            assert len(left.runs) == n + 1 and left.cursors == {"place": n}
        assert finished == []
        hold.set()


async def test_p2_one_event_one_verdict(tmp_path: Path) -> None:
    """Event, verdicts, runs and source cursors commit in one transaction; a duplicate starts
    nothing, and is counted.
    """

    @flow
    async def handle(n: int) -> None: ...

    source, store = MemoryTrigger("src"), tmp_path / "live.db"
    async with running(an_app(source, handle), store=store) as app:
        sends = [
            asyncio.create_task(source.send(data={"n": n}, id=f"e{n}", cursor={f"{n}": 1}))
            for n in range(40)
        ]
        images = 0

        def look() -> bool:
            """Killed at any moment, nothing is there in part."""
            nonlocal images
            left = Ledger(image(store, tmp_path / f"killed-{images}.db"))
            assert len(left.events) == len(left.runs) == len(left.cursors)
            assert {row["event"] for row in left.runs.values()} == {
                row["id"] for row in left.events.values()
            }
            images += 1
            return all(send.done() for send in sends)

        await eventually(look, "all are accepted", poll=0)
        again = await asyncio.gather(*(source.send(data={"n": 7}, id="e7") for _ in range(20)))
        assert all(
            receipt.duplicate and receipt.ledger_id == sends[7].result()[0].ledger_id
            for (receipt,) in again
        )
        (other,) = await source.send(data={"n": 8}, id="e7")
        assert other.conflict
    async with running(
        app, store=image(store, tmp_path / "next.db")
    ):  # remembered by the next process too
        assert (await source.send(data={"n": 7}, id="e7"))[0].duplicate
        counts = await drain(app)
        assert (counts["completed"], counts["duplicates"], counts["conflicts"]) == (40, 21, 1)
        assert (await app.store.event("e7"))["duplicates"] == 21


async def test_p3_every_event_is_explained() -> None:
    """For each subscription the ledger holds a verdict: run started, filtered, duplicate, paused,
    invalid, dead.
    """

    @flow
    async def handle(n: int) -> None: ...

    source = MemoryTrigger("src")
    app = App("promises")
    app.on(source, handle, where={"ok": [True]})
    async with running(app):
        await source.send(data={"ok": True, "n": 1}, id="runs")
        await source.send(data={"ok": False, "n": 1}, id="filtered")
        await source.send(data={"ok": True, "n": "one"}, id="invalid")
        await source.send(Undecodable(id="dead", source="/s", body=b"\xff", error="not JSON"))
        await actions.pause(app, "src", True, by="test")
        await source.send(data={"ok": True, "n": 2}, id="paused")
        await app.emit("nobody.listens", id="unheard")

        ((verdict, run),) = await verdicts(app, "runs")
        assert verdict == "run" and (await app.store.run(run))["flow"] == "handle"
        ((verdict, reason),) = await verdicts(app, "filtered")
        assert verdict == "filtered" and "ok" in reason
        ((verdict, reason),) = await verdicts(app, "invalid")
        assert verdict == "invalid" and "'n'" in reason
        assert await verdicts(app, "dead") == [("dead", "not JSON")]
        ((verdict, run),) = await verdicts(app, "paused")
        assert verdict == "paused" and (await app.store.run(run))["state"] == "paused"
        assert await verdicts(app, "unheard") == []
        assert (await app.store.counts())["suppressed"] == 2  # filtered, and unheard


async def test_p4_a_recorded_value_is_never_computed_again_in_that_run(tmp_path: Path) -> None:
    """A recorded error is replayed too, until `retry`, which keeps values, drops errors and
    continues the attempt numbers.

    A task body runs at least once; effects get a stable idempotency key.
    """
    bodies: list[tuple[str, int]] = []
    keys: set[str] = set()
    mended = False

    @task
    async def first() -> int:
        bodies.append(("first", current_task().attempt))
        return 1

    @task(retries=[DAY])
    async def second() -> int:
        bodies.append(("second", current_task().attempt))
        keys.add(current_task().idempotency_key)
        if not mended:
            raise ConnectionError("down")
        return 2

    @flow
    async def handle() -> int:
        one = await first()
        try:
            await second()
        except ConnectionError:
            await sleep(DAY)
        return one + await second()

    clock, app = VirtualClock(), an_app(None, handle)
    async with running(app, clock=clock, store=tmp_path / "a.db"):
        number = (await app.start(handle)).number
        await clock.advance(DAY)  # the value, two attempts, the error, and the flow sleeps on it
        assert bodies == [("first", 1), ("second", 1), ("second", 2)]
        killed = image(tmp_path / "a.db", tmp_path / "b.db")
    async with running(app, clock=clock, store=killed):
        assert (await drain(app))["failed"] == 1
        assert bodies[3:] == [
            ("second", 1),
            ("second", 2),
        ]  # of the second call: the first one's error was replayed
        mended = True
        await app.store.retry(number)
        assert await (await app.run_handle(number)).result() == 3
        assert bodies[5:] == [("second", 3), ("second", 3)] and len(keys) == 2
        assert [
            step.value for step in await journal_of(app, number) if step.state == "completed"
        ] == [1, 2, 2]


def everything_asyncio_offers(done: list[str]) -> Flow[[], Any]:
    """A flow of every construct, whose result tells the order in which things happened; bodies are
    noted in `done`.
    """

    @task
    async def work(name: str, turns: int) -> str:
        for _ in range(turns):
            await asyncio.sleep(0)
        done.append(current_task().idempotency_key)
        return name

    @flow(name="everything")
    async def everything() -> list[Any]:
        order: list[Any] = []
        order.append(await asyncio.gather(work("a", 9), work("b", 0), work("c", 4)))
        async with asyncio.TaskGroup() as group:
            for name in "def":
                group.create_task(work(name, ord("f") - ord(name))).add_done_callback(
                    lambda t: order.append(t.result())
                )
        racers = [asyncio.create_task(work(name, 3)) for name in "ghi"]
        won, lost = await asyncio.wait(racers, return_when=asyncio.FIRST_COMPLETED)
        order.append(sorted(racer.result() for racer in won))
        order.append(sorted([await racer for racer in lost]))
        order += [
            await each for each in asyncio.as_completed([work("j", 5), work("k", 1), work("l", 3)])
        ]
        queue: asyncio.Queue[str] = asyncio.Queue()
        async with asyncio.TaskGroup() as group:
            for name in "mno":
                group.create_task(work(name, 2)).add_done_callback(
                    lambda t: queue.put_nowait(t.result())
                )
            order += [await queue.get() for _ in range(3)]
        order += [current_run().random.random(), current_run().now.isoformat()]
        return order

    return everything


async def test_p5_plain_asyncio_is_safe(tmp_path: Path) -> None:
    """`gather`, `TaskGroup`, `wait`, `as_completed`, queues in a flow replay to the same values
    after a crash at any commit.
    """
    bodies: list[str] = []
    everything = everything_asyncio_offers(bodies)
    images: dict[int, Path] = {}

    def keep_an_image(store: Path) -> None:
        left = image(store, tmp_path / "left.db")
        batch = Ledger(left).totals["batch"]
        if batch not in images:
            images[batch] = image(left, tmp_path / f"{batch}.db")

    app, live = an_app(None, everything), tmp_path / "live.db"
    async with running(app, store=live):
        handle = await app.start(everything)
        finished = asyncio.create_task(handle.result())

        def is_over() -> bool:
            keep_an_image(live)
            return finished.done()

        await eventually(is_over, "the run is over", poll=0)
        value = finished.result()
    assert len(images) > 3
    assert await replayed(app, live, handle.number) == value
    for left in images.values():
        recorded = {
            f"{format_id(entry['run'])}/{entry['call_key']}" for entry in Ledger(left).journal
        }
        bodies.clear()
        async with running(app, store=left):
            value = await (await app.run_handle(handle.number)).result()
        assert recorded.isdisjoint(bodies)
        assert await replayed(app, left, handle.number) == value


async def replayed(app: App, store: Path, run: int) -> Any:
    """What the run comes to when its whole journal is replayed: with its last commit, the outcome,
    taken back.
    """
    copy = Path(shutil.copyfile(store, store.with_suffix(".again.db")))
    connection = sqlite3.connect(copy)
    connection.execute(
        "UPDATE runs SET state = 0, result = NULL, codec = NULL, outcome_crc = NULL, "
        "finished_at = NULL"
    )
    connection.execute("UPDATE ledger SET completed = completed - 1, pending = pending + 1")
    connection.commit()
    connection.close()
    async with running(app, store=copy):
        return await (await app.run_handle(run)).result()


async def test_p6_time_survives(tmp_path: Path) -> None:
    """A waiting retry, sleep or timeout fires never before its due time, at once on restart if
    past, and is recorded once.
    """
    tried: list[float] = []
    clock = VirtualClock()

    @task(retries=[DAY])
    async def flaky() -> None:
        tried.append(clock.monotonic())
        if len(tried) == 1:
            raise ConnectionError

    @flow
    async def handle() -> list[datetime]:
        await flaky()
        before = current_run().now
        await sleep(DAY)
        return [before, current_run().now]

    app, store = an_app(None, handle), tmp_path / "a.db"
    async with running(app, clock=clock, store=store):
        number = (await app.start(handle)).number
        await clock.advance(DAY - 1)
        assert len(tried) == 1
    async with running(app, clock=clock, store=store):
        await drain(app, advance=False)
        assert len(tried) == 1
        await clock.advance(1)
        assert tried == [0, DAY]
    await clock.advance(3 * DAY)  # nobody is up
    async with running(app, clock=clock, store=store):
        before, after = await (await app.run_handle(number)).result()
        assert (after - before).total_seconds() == 3 * DAY
        assert [
            (step.name, step.state)
            for step in await journal_of(app, number)
            if step.state == "fired"
        ] == [("sleep", "fired")]


async def test_p7_no_zombie_writes() -> None:
    """A worker that lost its lease, or an abandoned attempt, can write nothing."""
    late = asyncio.Event()
    ended: list[str] = []

    @task(timeout=10)
    async def deaf() -> str:
        while not late.is_set():
            try:
                await late.wait()
            except asyncio.CancelledError:
                continue
        ended.append("deaf")
        return "too late"

    @flow
    async def stubborn() -> str:
        return await deaf()

    @flow
    async def nap() -> str:
        await sleep(DAY)
        return "rested"

    clock, app = VirtualClock(), an_app(None, stubborn, nap)
    async with running(app, clock=clock):
        zombie, sleeper = await app.start(stubborn), await app.start(nap)
        await clock.advance(60)
        assert (await zombie.row())["state"] == "failed"
        late.set()
        await eventually(lambda: ended, "the abandoned body has returned")
        (step,) = await journal_of(app, zombie)
        assert step.state == "failed" and (await zombie.row())["state"] == "failed"

        first = (await sleeper.row())["token"]
        await clock.advance(DAY)
        assert await sleeper.result() == "rested"
        for op in (
            Append(
                sleeper.number,
                first,
                [Entry(call_key="zombie#0", kind=Kind.VALUE, codec="json", value=b"1")],
            ),
            Settle(sleeper.number, first, Completed(b'"stolen"')),
        ):
            assert isinstance(await posted(app, op), Fenced)
        assert await sleeper.result() == "rested"
        assert not [step for step in await journal_of(app, sleeper) if step.name == "zombie"]


async def posted(app: App, op: Any) -> Any:
    loop = asyncio.get_running_loop()
    reply: asyncio.Future[Any] = loop.create_future()
    app.store.post(op, reply.set_result, loop)
    return await reply


async def test_p8_back_pressure_never_drops() -> None:
    """At the bound of the commit queue or of the ledger `accept` says so; what it accepted before
    is there, and finishes.
    """

    @task
    async def wait() -> None:
        await open_.wait()

    @flow
    async def handle(n: int) -> None:
        await wait()

    open_ = asyncio.Event()
    source = MemoryTrigger("src")
    app = an_app(source, handle, max_pending=100)
    async with running(app):
        taken = 0
        with pytest.raises(StoreFull) as full:
            while True:
                await source.send(data={"n": taken})
                taken += 1
        assert taken == 100 and full.value.retry_after > 0
        open_.set()
        assert (await drain(app, advance=False))["completed"] == 100
        await source.send(data={"n": 100})  # there is room again

    flood = an_app(source, handle)
    async with running(flood):
        results = await asyncio.gather(
            *(source.send(data={"n": n}) for n in range(4300)), return_exceptions=True
        )
        refused = [result for result in results if isinstance(result, BaseException)]
        assert refused and all(isinstance(error, StoreFull) for error in refused)
        assert (await drain(flood, advance=False))["completed"] == 4300 - len(refused)


def adds_up(counts: dict[str, int]) -> bool:
    parts = ("completed", "failed", "dead", "cancelled", "suppressed", "pending")
    return counts["accepted"] == sum(counts[name] for name in parts)


async def test_p9_nothing_fails_silently() -> None:
    """What is undecodable, unbindable or exhausted is kept with its bytes, error and attempts; it
    is redriven once.

    accepted = completed + failed + dead + cancelled + suppressed + pending, always.
    """

    @task(retries=[60, 60])
    async def refuse(n: int) -> int:
        if n == 3:
            raise ConnectionError("never")
        return n

    @flow
    async def handle(n: int) -> int:
        if n == 4:
            await sleep(365 * DAY)
        return await refuse(n)

    source, clock = MemoryTrigger("src"), VirtualClock()
    app = App("promises")
    app.on(source, handle, where=lambda event: event.data["n"] != 0)
    async with running(app, clock=clock):
        for n in range(6):
            await source.send(data={"n": n}, id=f"e{n}")
            assert adds_up(await app.store.counts())
        await source.send(Event(id="bad", source="/s", type="t", data={"n": "three"}))
        await source.send(Undecodable(id="bytes", source="/s", body=b"\x00\xff", error="not JSON"))
        await clock.advance(200)
        (sleeper,) = await app.store.runs(state=None, event=(await app.store.event("e4"))["id"])
        assert (await app.store.counts())["pending"] == 1
        await app.store.cancel(sleeper["id"], "no longer wanted")
        counts = await drain(app)
        expected = {
            "completed": 3,
            "failed": 1,
            "dead": 2,
            "cancelled": 1,
            "suppressed": 1,
            "pending": 0,
        }
        assert {name: counts[name] for name in expected} == expected and adds_up(counts)

        (failed,) = [row for row in await app.store.runs() if row["state"] == "failed"]
        (step,) = await journal_of(app, failed["id"])
        assert (step.attempts, step.error) == (3, "never")

        letters = {row["event_id"]: row for row in await app.store.dead_letters()}
        assert (await app.store.dead_letter(letters["bytes"]["id"]))["body"] == b"\x00\xff"
        for letter in letters.values():
            await actions.redrive(app, str(letter["id"]), {"data": {"n": 7}}, by="test")
            with pytest.raises(UsageError, match="redriven already"):
                await actions.redrive(app, str(letter["id"]), {"data": {"n": 7}}, by="test")
        counts = await drain(app)
        assert counts["completed"] == 5 and counts["dead"] == 0 and adds_up(counts)


async def test_p10_fail_stop(tmp_path: Path) -> None:
    """On a storage error: stop acknowledging within 1 s, say why; embedded, `accept` and `result()`
    raise StoreFailed.

    What was acknowledged before is there after a restart.
    """

    @task
    async def wait() -> None:
        await asyncio.get_running_loop().create_future()

    @flow
    async def handle(n: int, pad: str) -> None:
        await wait()

    source, store = MemoryTrigger("src"), tmp_path / "a.db"
    app = an_app(source, handle)
    async with running(app, store=store):
        acked = [
            receipt.ledger_id
            for n in range(3)
            for receipt in await source.send(data={"n": n, "pad": ""})
        ]
        waiting = asyncio.create_task(
            (await app.run_handle((await app.store.runs(limit=1))[0]["id"])).result()
        )
        await posted(
            app,
            ConnectionJob(
                lambda connection: connection.execute("PRAGMA max_page_count = 1").fetchone()
            ),
        )
        began = SystemClock().monotonic()
        with pytest.raises(StoreFailed, match="SQLITE_FULL"):
            await source.send(data={"n": 3, "pad": "x" * 1_000_000})
        with pytest.raises(StoreFailed):
            await source.send(data={"n": 4, "pad": ""})
        with pytest.raises(StoreFailed):
            await waiting
        with pytest.raises(StoreFailed):
            await app.start(handle, n=5, pad="")
        assert SystemClock().monotonic() - began < 1
    left = Ledger(store)
    assert acked == [row["id"] for row in left.events.values()][:3] and len(left.runs) == len(
        left.events
    )
