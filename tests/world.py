"""A small world for the state machine: an app whose flows do what their plan says, and that can be
crashed at any moment.

A crash is what `kill -9` leaves: the store's files as they are at that instant, opened by an App
that knows nothing of the one before. What the bodies do is noted here, outside of any store, so
that it can be held against the journals.
"""

import asyncio
import shutil
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from eventflow import App, current_run, current_task, emit, flow, sleep, task, timeout
from eventflow.core.clock import SECOND, to_us
from eventflow.runs.run import State, format_id, parse_id
from eventflow.sdk.flow import Flow
from eventflow.testing import MemoryTrigger, VirtualClock
from eventflow.testing.idle import wait_until_idle

Step: TypeAlias = list[Any]
StepPlan: TypeAlias = list[Step]
"""What a flow does, one step after another: `["value", 3]`, `["sleep", 60]`, `["child", [...]]` …
see `World._flows`.
"""

TIMEOUT_SECONDS = 0.02

FLOW_RETRIES = [1, 61, 0]
"""Delays of the flow with retries, in seconds."""


def expected(plan: StepPlan) -> list[Any]:
    """What a run of this plan returns, whatever happens to it on the way, once everything is
    mended.
    """
    return [_expected(step) for step in plan]


def _expected(step: Step) -> Any:
    match step:
        case ["value", x]:
            return x
        case ["child" | "retried", plan]:
            return expected(plan)
        case ["both", *steps]:
            return [_expected(each) for each in steps]
        case [name, *_]:
            return name
        case _:
            raise AssertionError(step)


def image(store: Path, after: Path) -> Path:
    """What a `kill -9` at this instant leaves of a store, under another name. Everybody else goes
    on with the old one.
    """
    # The mark first, for it may lag and must not lead; then the file, which changes at checkpoints
    # only.
    for suffix in (".hwm", "", "-wal"):
        if Path(f"{store}{suffix}").exists():
            shutil.copyfile(f"{store}{suffix}", f"{after}{suffix}")
    return after


class World:
    """Lives of one app on one ledger. `bodies` counts body starts by idempotency key, `started`
    says which attempt when, `begun` when the flow with retries took its first step, by run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = VirtualClock(busy_timeout=TIMEOUT_SECONDS)
        self.gate = asyncio.Event()
        self.gate.set()
        self.mended = False
        self.life = 0
        self.crashes = 0
        self.path = folder / "0.db"
        self.bodies: Counter[str] = Counter()
        self.started: list[tuple[str, int, int]] = []
        self.begun: list[tuple[int, int]] = []
        self.recorded: dict[str, bytes] = {}
        self.wrong: list[str] = []

    # ----------------------------------------------------------------- lives

    async def open(self) -> None:
        self.source = MemoryTrigger("src")
        self.app = App(
            "world", clock=self.clock, store=f"sqlite:///{self.path}", ballast=0, free_floor=0
        )
        work, forward = self._flows(self.life)
        self.app.on(self.source, work, where={"ok": [True]})
        self.app.on("made", forward)
        await self.app.open()
        self.clock.attach(self.app)

    async def rest(self) -> None:
        await wait_until_idle(self.app, TIMEOUT_SECONDS)

    async def restart(self) -> None:
        """A clean stop, with a short grace for running bodies, and a start."""
        await self.app.close(grace=0.02)
        self.life += 1
        await self.open()

    async def crash(self) -> None:
        """The files as they are now, and a new life on them. The old one goes on with its own
        files, and nobody looks.
        """
        self.crashes += 1
        old, self.path = self.app, image(self.path, self.folder / f"{self.crashes}.db")
        self.life += 1
        await old.close(grace=0)
        await self.open()

    async def close(self) -> None:
        await self.app.close(grace=0.02)

    # ----------------------------------------------------------------- the flows

    def _flows(self, life: int) -> tuple[Flow[..., Any], Flow[..., Any]]:
        world = self

        async def enter() -> None:
            """A body starts."""
            if life != world.life:
                await asyncio.get_running_loop().create_future()  # its process is dead
            call = current_task()
            if call.idempotency_key in world.recorded:
                world.wrong.append(
                    f"{call.idempotency_key} runs again, attempt {call.attempt}: its "
                    "value is recorded"
                )
            world.bodies[call.idempotency_key] += 1
            world.started.append((call.idempotency_key, call.attempt, world.clock.now()))
            await asyncio.sleep(0)

        @task
        async def value(x: Any) -> Any:
            await enter()
            return x

        @task
        async def flaky(times: int) -> str:
            await enter()
            if current_task().attempt <= times:
                raise ConnectionError(f"attempt {current_task().attempt}")
            return "flaky"

        @task
        async def gate() -> str:
            await enter()
            await world.gate.wait()
            return "gate"

        @task
        async def boom() -> str:
            await enter()
            if not world.mended:
                raise RuntimeError("broken")
            return "boom"

        async def nap(seconds: float) -> str:
            before = to_us(current_run().now)
            await sleep(seconds)
            if to_us(current_run().now) - before < seconds * SECOND:
                world.wrong.append(f"run {current_run().id} slept less than {seconds} s")
            return "sleep"

        async def race(seconds: float) -> str:
            racers = {asyncio.create_task(value("first")), asyncio.create_task(nap(seconds))}
            _, slow = await asyncio.wait(racers, return_when=asyncio.FIRST_COMPLETED)
            for loser in slow:
                loser.cancel()
            return "race"

        async def limited(seconds: float) -> str:
            try:
                async with timeout(seconds):
                    await sleep(seconds * 10)
            except TimeoutError:
                return "timeout"
            return "slept through its timeout"

        async def take(step: Step) -> Any:
            match step:
                case ["value", x]:
                    return await value(x)
                case ["flaky", times, delay]:
                    return await flaky.options_with(retries=[delay] * times)(times)
                case ["gate"]:
                    return await gate()
                case ["boom"]:
                    return await boom()
                case ["sleep", seconds]:
                    return await nap(seconds)
                case ["race", seconds]:
                    return await race(seconds)
                case ["timeout", seconds]:
                    return await limited(seconds)
                case ["child", plan]:
                    return await work(plan=plan)
                case ["retried", plan]:
                    return await patient(plan=plan)
                case ["both", *steps]:
                    return list(await asyncio.gather(*map(take, steps)))
                case ["emit"]:
                    await emit("made", {"plan": [["value", "heard"]]})
                    return "emit"
                case _:
                    raise AssertionError(step)

        @flow(name="work")
        async def work(plan: list[Any]) -> list[Any]:
            return [await take(step) for step in plan]

        @flow(name="patient", retries=FLOW_RETRIES)
        async def patient(plan: list[Any]) -> list[Any]:
            if life == world.life:
                world.begun.append((parse_id(current_run().id) or 0, world.clock.now()))
            return [await take(step) for step in plan]

        @flow(name="heard")
        async def forward(plan: list[Any]) -> list[Any]:
            return [await take(step) for step in plan]

        return work, forward

    # ----------------------------------------------------------------- what is in the ledger

    def look(self) -> "Ledger":
        return Ledger(self.path)


class Ledger:
    """Everything in the store's file at one commit, read past eventflow's own readers."""

    def __init__(self, path: Path) -> None:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
        connection.row_factory = sqlite3.Row
        try:
            connection.execute("BEGIN")
            self.runs = {
                row["id"]: row for row in connection.execute("SELECT * FROM runs ORDER BY id")
            }
            self.event_rows = list(connection.execute("SELECT * FROM events ORDER BY id"))
            self.events: dict[str, sqlite3.Row] = {}  # by the sender's id, the first of it
            for row in self.event_rows:
                self.events.setdefault(row["event_id"], row)
            self.journal = list(
                connection.execute("SELECT * FROM journal ORDER BY batch, position")
            )
            self.totals = dict(connection.execute("SELECT * FROM ledger").fetchone())
            self.dead = list(connection.execute("SELECT * FROM dead_letters"))
            self.cursors = {
                row["key"]: orjson.loads(row["value"])
                for row in connection.execute("SELECT * FROM cursors")
            }
        finally:
            connection.close()

    def state(self, run: int) -> State:
        return State(self.runs[run]["state"])

    def in_state(self, *states: State) -> list[int]:
        return [ident for ident, row in self.runs.items() if row["state"] in states]

    def key(self, entry: sqlite3.Row) -> str:
        """The idempotency key of the call that an entry belongs to."""
        return f"{format_id(entry['run'])}/{entry['call_key']}"

    def plan(self, run: int) -> StepPlan:
        row = self.runs[run]
        if row["params"] is not None:
            return orjson.loads(row["params"])["plan"]
        (body,) = (event["body"] for event in self.event_rows if event["id"] == row["event"])
        return orjson.loads(body)["data"]["plan"]

    def family(self, run: int) -> set[int]:
        """The run and everything below it."""
        below = {child for child, row in self.runs.items() if row["parent"] == run}
        return {run}.union(*map(self.family, below))

    def has_above(self, run: int, flow: str) -> bool:
        """Whether a run of this flow is an ancestor of the run."""
        row = self.runs.get(run)
        parent = None if row is None else self.runs.get(row["parent"])
        return parent is not None and (parent["flow"] == flow or self.has_above(parent["id"], flow))
