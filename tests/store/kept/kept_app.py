"""The app of the kept store: its flows, triggers, patterns and sinks.

`make_kept.py` runs it on the old version and fills the store; `test_kept.py` runs it on the version
of today. So it uses public names only. A flow must make the same calls as then, for their claims
are in the store: do not reorder or rename anything here.
"""

import asyncio
import os
import signal
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import msgspec

from eventflow import (
    App,
    Batch,
    Debounce,
    Event,
    Latest,
    Permanent,
    Singleflight,
    absent,
    all_of,
    any_of,
    checkpoint,
    count,
    current_run,
    current_task,
    emit,
    flow,
    part,
    restart_with,
    sequence,
    sleep,
    task,
    timeout,
)
from eventflow.testing import MemoryTrigger
from triggers import Cron, DriftMonitor, RunState

HOUR, DAY = 3600.0, 86_400.0
LONG = 30 * DAY
LARGE = 300_000
"""Characters of a value that goes to a file: more than 256 KiB."""


class Stage:
    """What is different between the lives of the app."""

    gate = False
    """Bodies at the gate end. The store is made with a closed gate, and tested with an open one."""
    mended = False
    """What fails or kills is mended."""
    is_new = False
    """The code has changed: flows make other calls than those that are recorded."""
    is_early = False
    """A pattern is written as it was at first."""
    bodies: list[str]
    """The idempotency key of each body that has started, in order."""

    def __init__(self) -> None:
        self.bodies = []


stage = Stage()


def note() -> None:
    """A body starts."""
    stage.bodies.append(current_task().idempotency_key)


# --------------------------------------------------------------------------- tasks


class Point(msgspec.Struct):
    """A value that is stored by its annotation."""

    x: int
    y: float


class Cat(msgspec.Struct):
    """One of two classes that only their names tell apart."""

    name: str


class Dog(msgspec.Struct):
    """The other one."""

    name: str


TAGGED: dict[Any, Any] = {
    1: (2, "three"),
    "set": {4},
    "frozen": frozenset({5}),
    "bytes": b"six",
    "big": 1 << 70,
    "infinite": float("inf"),
    "at": datetime(2030, 3, 2, 6, tzinfo=UTC),
    "day": datetime(2030, 3, 2, tzinfo=UTC).date(),
    "for": timedelta(days=7, seconds=1),
    "cost": Decimal("8.90"),
}
"""A value that JSON has no words for."""


@task
async def value(x: Any) -> Any:
    note()
    current_task().log.info("value.made", x=str(x)[:20])
    return x


@task
async def as_tagged() -> Any:
    note()
    return TAGGED


@task
async def as_bytes() -> bytes:
    note()
    return b"\x00\xff bytes"


@task
async def as_point() -> Point:
    note()
    return Point(1, 2.5)


@task
async def as_point_without_number() -> Point:
    note()
    return Point(1, float("nan"))


@task
async def as_pet() -> Cat | Dog:
    note()
    return Dog("Rex")


@task(codec="pickle")
async def as_pickle() -> Any:
    note()
    return Fraction(2, 3)


@task
async def as_large(kind: str) -> Any:
    note()
    return {"json": "x" * LARGE, "bytes": b"y" * LARGE, "tagged": ("z" * LARGE,)}[kind]


@task
async def gate(name: str) -> str:
    note()
    if not stage.gate:
        await asyncio.get_running_loop().create_future()
    return name


@task
async def boom(message: str) -> str:
    note()
    if not stage.mended:
        raise Permanent(message)
    return "mended"


@task(retries=[0, 3 * HOUR])
async def flaky() -> str:
    """Keeps a checkpoint, and fails until it is mended."""
    note()
    kept = checkpoint()
    known = kept.load()
    if stage.mended:
        return f"went on after {known.state if known else None}"
    kept.save({"step": current_task().attempt, "at": ("a", 1)}, step=current_task().attempt)
    raise ConnectionError("not yet")


@task(retries=[3 * HOUR])
async def third(n: int) -> int:
    """Fails for 3 until it is mended."""
    note()
    if n == 3 and not stage.mended:
        raise ConnectionError("three")
    return n * 10


@task(timeout=30.0)
async def slow() -> str:
    note()
    await asyncio.get_running_loop().create_future()
    return "never"


@task
async def emits() -> str:
    note()
    return await emit("kept.by_task", {"by": "task"})


@task
async def kills() -> str:
    note()
    if not stage.mended:
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


# --------------------------------------------------------------------------- flows that wait


@flow
async def work(n: int = 0) -> int:
    """One task, and its value."""
    return await value(n)


@flow
async def sleeper(hours: float = 3.0) -> str:
    """A value, a long sleep, a value."""
    first = await value("before")
    current_run().log.info("sleeper.sleeps", hours=hours)
    await sleep(hours * HOUR)
    return f"{first}, {await value('after')}"


@flow
async def codecs() -> str:
    """A value of each codec, a long sleep; then it says which values came back unequal."""
    found: list[Any] = [
        await value({"plain": [1, None, "ä"]}),
        await as_tagged(),
        await as_bytes(),
        await as_point(),
        await as_pet(),
        await as_pickle(),
        await as_large("json"),
        await as_large("bytes"),
        await as_large("tagged"),
    ]
    nan = await as_point_without_number()
    await sleep(3 * HOUR)
    made: list[Any] = [
        {"plain": [1, None, "ä"]},
        TAGGED,
        b"\x00\xff bytes",
        Point(1, 2.5),
        Dog("Rex"),
        Fraction(2, 3),
        "x" * LARGE,
        b"y" * LARGE,
        ("z" * LARGE,),
    ]
    wrong = [
        n
        for n, (one, other) in enumerate(zip(found, made, strict=True))
        if one != other or type(one) is not type(other)
    ]
    return f"wrong: {wrong}, {nan.y}"


@flow
async def kid(n: int) -> int:
    return await value(n)


@flow
async def kid_sleeps() -> str:
    await sleep(3 * HOUR)
    return await value("slept")


@flow
async def kid_fails() -> str:
    return await boom("kid")


@flow
async def parent() -> list[Any]:
    """A child that completes, one that fails, one that a person cancels, one that sleeps."""
    told: list[Any] = [await kid(1)]
    try:
        await kid_fails()
    except Permanent as error:
        told.append(f"Permanent: {error}")
    try:
        await kid_sleeps()
    except Exception as error:
        told.append(f"{type(error).__name__}: {error}")
    told.append(await kid_sleeps())
    return told


@flow
async def failing_parent() -> str:
    """Fails with its child."""
    return f"kid: {await kid_fails()}"


@flow
async def retrying() -> str:
    """Waits for the next attempt of a task that keeps a checkpoint."""
    return await flaky()


@flow
async def mapped() -> list[int]:
    """A map of which one item waits for its next attempt, keyed and not."""
    keyed = await third.map([1, 2], key=str)
    return [*keyed, *await third.map([1, 2, 3, 4])]


@flow
async def catcher() -> list[str]:
    """Catches errors by their class, then sleeps. A replay must catch the recorded ones too."""
    told: list[str] = []
    try:
        await boom("caught")
    except Permanent as error:
        told.append(f"Permanent: {error}")
    try:
        await slow()
    except TimeoutError:
        told.append("timed out")
    await sleep(3 * HOUR)
    return told


@flow
async def timers() -> list[Any]:
    """Timers that fired, emissions of flow and task, the time; then a long sleep."""
    began = current_run().now
    await sleep(5)
    try:
        async with timeout(10):
            await sleep(LONG)
    except TimeoutError:
        pass
    await emit("kept.by_flow", {"by": "flow"}, subject="a subject")
    await emits()
    await asyncio.gather(value("left"), value("right"))
    drawn = await value(current_run().random.randrange(1000))
    await sleep(3 * HOUR)
    return [(current_run().now - began) >= timedelta(hours=3), drawn == await value(drawn)]


@flow(timeout=2 * DAY, timeout_counts="running")
async def counted() -> str:
    """Its timeout counts the time in memory only."""
    await value("counted")
    await sleep(3 * HOUR)
    return "done"


@flow(timeout=LONG)
async def walled() -> str:
    """Waits under a timeout."""
    await sleep(3 * HOUR)
    return "done"


@flow(timeout=70)
async def timed_out() -> str:
    """Fails by its own timeout."""
    await value("before")
    await sleep(LONG)
    return "never"


@flow
async def afresh(n: int) -> str:
    """Begins afresh while `n` is not 0, each time with a child that has ended by then."""
    if n:
        await kid(n)
        await restart_with(n=n - 1)
    await value("afresh")
    await sleep(3 * HOUR)
    return "done"


# ------------------------------------------------------------------ flows that end, or are held


@flow
async def failing(message: str = "broken") -> str:
    """A value, then an error until it is mended."""
    return f"{await value('before')}, {await boom(message)}"


@flow
async def grouped() -> list[str]:
    """Fails with the errors of a map."""
    return await boom.map(["one", "two"])


@flow
async def poison() -> str:
    """A value, then a body that kills the process until it is mended."""
    return f"{await value('before')}, {await kills()}"


@flow
async def poisoned() -> str:
    """Has a child that kills the process."""
    return f"kid: {await poison()}"


@flow
async def guardian() -> str:
    """Has a child that is held."""
    return f"kid: {await stuck()}"


@flow
async def shows(kind: str) -> Any:
    """Results of every codec that a flow has."""
    match kind:
        case "tagged":
            return TAGGED
        case "bytes":
            return b"\x00 bytes"
        case "large":
            return "r" * LARGE
        case "none":
            return None
        case _:
            return {"kind": kind}


@flow
async def shows_point() -> Point:
    return Point(3, 4.5)


@flow
async def changed() -> Any:
    """The new code calls with other arguments."""
    first = await value("new" if stage.is_new else "old")
    await sleep(120)
    return first


@flow
async def diverged() -> Any:
    """The new code does not make the recorded call any more, and waits."""
    if stage.is_new:
        await asyncio.get_running_loop().create_future()
    first = await value("old")
    await sleep(120)
    return first


@flow
async def unreadable() -> str:
    """The new code reads the recorded value as something else."""
    first = await (as_point_anew() if stage.is_new else as_point())
    await sleep(120)
    return str(first)


@task(name="as_point")
async def as_point_anew() -> list[int]:
    return []


@flow
async def gone() -> str:
    """The new code does not have it."""
    first = await value("old")
    await sleep(120)
    return first


@flow
async def shrunk() -> str:
    """The new code makes fewer calls, and completes."""
    if not stage.is_new:
        await value("old")
        await sleep(120)
    return "done"


@flow
async def stuck() -> str:
    """Waits for what nothing brings about, until it is mended."""
    first = await value("before")
    if not stage.mended:
        await asyncio.get_running_loop().create_future()
    return f"{first}, unstuck"


@flow
async def ordered(k: str, how: str = "") -> str:
    """One after the other by `k`; the first may sleep, or be stuck."""
    first = await value(k)
    if how == "sleep":
        await sleep(3 * HOUR)
    elif how == "stuck" and not stage.mended:
        await asyncio.get_running_loop().create_future()
    return first


# --------------------------------------------------------------------------- flows at the gate


@flow
async def at_gate(name: str) -> list[Any]:
    """A value, then the gate, then a value."""
    return [await value("before"), await gate(name), await value("after")]


@flow(concurrency=1, priority=3)
async def narrow(n: int) -> str:
    """One at a time."""
    return await gate(f"narrow {n}")


@flow(grace=1000 * DAY)
async def cancelling() -> str:
    """Tidies up at the gate when it is cancelled."""
    try:
        return await gate("work")
    except asyncio.CancelledError:
        await gate("tidy up")
        raise


# ------------------------------------------------------------------ flows over several events


@flow
async def gathered(events: list[Event]) -> list[str]:
    return await value([event.id for event in events])


@flow
async def one_sleeps(events: list[Event]) -> list[str]:
    """One at a time; the first one sleeps."""
    if events[0].data == {"how": "sleep"}:
        await sleep(3 * HOUR)
    return await value([event.id for event in events])


@flow
async def one_at_gate(events: list[Event]) -> list[str]:
    """One at a time; the first one waits at the gate."""
    await gate("one")
    return [event.id for event in events]


@flow
async def matched(events: list[Event]) -> list[str]:
    """What a pattern matched."""
    return await value([event.id for event in events])


@flow
async def told(event: Event) -> Any:
    """What became of a run."""
    return await value(
        [event.type, event.data["flow"], event.data["state"], event.data.get("run_state")]
    )


@flow
async def ticks(event: Event) -> str:
    return event.id


@flow
async def chain(n: int) -> str:
    """Emits the event that starts it again, until the ledger refuses."""
    return await emit("kept.chain", {"n": n + 1})


@flow
async def told_of_emission(event: Event) -> Any:
    return await value(event.data)


# --------------------------------------------------------------------------- sinks


class Post:
    """A sink that takes everything, or fails, or refuses."""

    def __init__(self, name: str, how: str) -> None:
        self.name = name
        self.how = how
        self.taken: list[Any] = []

    async def send(self, *letters: Any) -> None:
        if self.how == "fail":
            raise ConnectionError("nobody is there")
        if self.how == "refuse":
            raise Permanent("refused")
        self.taken += letters

    async def close(self) -> None:
        pass


# --------------------------------------------------------------------------- the app


class Kept:
    """The app with what a program needs to feed it."""

    def __init__(self, clock: Any, *, sinks: bool = False) -> None:
        """`sinks`: all of them take what they are given."""
        self.clock = clock
        self.orders = MemoryTrigger("orders")
        self.paused = MemoryTrigger("paused")
        self.scores = MemoryTrigger("scores")
        self.good = Post("good", "take")
        self.bad = Post("bad", "take" if sinks else "fail")
        self.picky = Post("picky", "take" if sinks else "refuse")
        self.graves = Post("graves", "take" if sinks else "fail")
        self.app = app = App("kept", clock=clock, ballast=0, free_floor=0)
        app.add(
            sleeper,
            codecs,
            parent,
            failing_parent,
            retrying,
            mapped,
            catcher,
            timers,
            counted,
            walled,
            timed_out,
            afresh,
            failing,
            poison,
            poisoned,
            grouped,
            guardian,
            shows,
            shows_point,
            changed,
            diverged,
            unreadable,
            shrunk,
            stuck,
            at_gate,
            narrow,
            cancelling,
        )
        if not stage.is_new:
            app.add(gone)
        self._subscribe()
        self._join()
        self._tell()
        app.send("kept.good", self.good)
        app.send("kept.bad", self.bad, where={"n": [{"numeric": ["<", 10]}]})
        app.send("kept.picky", self.picky)
        app.send("kept.odd", self.good, where=lambda event: event.data["missing"], name="odd")
        app.send_dead_letters(self.graves)

    def _subscribe(self) -> None:
        app, orders, paused = self.app, self.orders, self.paused
        app.on(
            orders, work, types=["order"], where={"n": [{"numeric": [">=", 0]}]}, name="orders/work"
        )
        app.on(orders, ordered, types=["ordered"], key="k", name="orders/ordered")
        app.on(orders, gathered, types=["batch"], deliver=Batch(3, within=6 * HOUR), name="batch")
        app.on(
            orders,
            gathered,
            types=["debounce"],
            deliver=Debounce(6 * HOUR, max_wait=DAY),
            name="debounce",
        )
        app.on(orders, one_sleeps, types=["single"], deliver=Singleflight(), name="single")
        app.on(orders, one_at_gate, types=["latest"], deliver=Latest(), name="latest")
        app.on(paused, work, types=["order"], priority=5, name="paused/work")
        app.on(paused, ordered, types=["ordered"], key="k", name="paused/ordered")
        app.on(
            paused,
            gathered,
            types=["batch"],
            deliver=Batch(5, within=6 * HOUR),
            name="paused/batch",
        )
        app.on("kept.by_flow", told_of_emission, name="by_flow")
        app.on("kept.chain", chain, name="chain")
        drift = DriftMonitor(
            self.scores,
            features=["amount"],
            reference=100,
            window=20,
            confirm=1,
            model="m",
            name="drift",
            clock=self.clock,
        )
        app.on(drift, ticks, name="drift/ticks")
        app.on(Cron("0 6 * * *", name="daily", clock=self.clock), ticks, name="daily/ticks")

    def _join(self) -> None:
        """Patterns of every kind."""
        app, paused = self.app, self.paused
        app.on(all_of("p.a", "p.b", within=LONG), matched, name="all")
        app.on(all_of(any_of("p.c", "p.d"), "p.e", within=LONG), matched, name="nested")
        app.on(any_of("p.any", "p.other"), matched, name="any")
        app.on(
            sequence("p.s1", then="p.s2", unless="p.s3", within=LONG, by="k"),
            matched,
            name="sequence",
        )
        app.on(sequence("p.l1", then="p.l2", within=LONG, lateness=6 * HOUR), matched, name="late")
        app.on(count("p.n", 3, within=LONG), matched, name="count")
        app.on(
            count("p.m", 2, within=LONG, by="k"), one_sleeps, deliver=Singleflight(), name="keyed"
        )
        app.on(absent("p.x", DAY, after="p.y", by="k"), matched, name="absent")
        app.on(absent("p.z", DAY), matched, name="silence")
        app.on(absent("p.daily", by="06:00", tz="Europe/Berlin"), ticks, name="daily")
        app.on(
            all_of(part(paused, where={"pattern": [True]}), "p.q", within=LONG, by="k"),
            matched,
            name="paused/all",
        )
        app.on(
            all_of(RunState("failing", "failed"), "p.ack", within=LONG),
            matched,
            name="acknowledged",
        )
        app.on(
            count("p.changed", 4 if stage.is_early else 5, within=LONG), matched, name="rewritten"
        )
        if not stage.is_new:
            app.on(count("p.gone", 3, within=60), matched, name="lost")

    def _tell(self) -> None:
        """What becomes of runs."""
        app = self.app
        app.on(RunState("shows", "completed"), told, name="told/completed")
        app.on(RunState("failing", "failed"), told, name="told/failed")
        app.on(RunState("sleeper", "cancelled"), told, name="told/cancelled")
        app.on(RunState("poison", "dead"), told, name="told/dead")
        app.on(RunState("stuck", "held"), told, name="told/held")
        app.on(RunState("sleeper", "late", after=600), told, name="told/late")
        app.on(RunState("work", "late", after=600), told, name="told/late-work")
        app.on(RunState("at_gate", "late", after=600), told, name="told/late-gate")
        app.on(RunState("one_sleeps", "late", after=600), told, name="told/late-one")
