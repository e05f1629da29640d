"""`running`: an app on a fresh store and a virtual clock; `MemoryTrigger`: a source of events that
a test feeds.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from os import PathLike, fspath
from tempfile import TemporaryDirectory
from typing import Any

from eventflow.app import App
from eventflow.core.clock import Clock
from eventflow.core.errors import UsageError
from eventflow.events.event import Event, Intake, Json, Receipt, Trigger, Undecodable
from eventflow.logs.capture import configure
from eventflow.logs.log import Line
from eventflow.testing.clock import VirtualClock
from eventflow.testing.idle import RealTimeDeadline

OPEN_TIMEOUT_SECONDS = 10.0
"""Real seconds that `MemoryTrigger.send` waits for the app to listen."""


class _NoData:
    pass


class MemoryTrigger:
    """A trigger whose events a test sends:

        drift = MemoryTrigger("drift")
        app.on(drift, retrain, where={"score": [{"numeric": [">", 0.3]}]})
        async with running(app):
            (receipt,) = await drift.send(data={"score": 0.5})
            assert receipt.matched == 1

    Its cursors are kept as any trigger's are.
    """

    def __init__(self, name: str = "memory") -> None:
        self.name = name
        self._intake: Intake | None = None

    async def listen(self, intake: Intake) -> None:
        self._intake = intake
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._intake = None

    async def send(
        self,
        *items: Event | Undecodable,
        data: Any = _NoData,
        type: str = "memory",
        id: str | None = None,
        subject: str | None = None,
        cursor: Mapping[str, Json] | None = None,
    ) -> list[Receipt]:
        """Hands in events, or one made of `data`; returns their receipts once they and the `cursor`
        are durable.

        Waits until the app listens. Without an `id` the event is a new one. Raises what
        `Intake.accept` raises.
        """
        if data is not _NoData:
            made = Event(
                id=id or uuid.uuid4().hex,
                source=f"/{self.name}",
                type=type,
                data=data,
                subject=subject,
            )
            items = (*items, made)
        return await (await self._listening()).accept(*items, cursor=cursor)

    async def cursor(self) -> Mapping[str, Json]:
        """The cursors as last committed."""
        return await (await self._listening()).cursor()

    async def _listening(self) -> Intake:
        deadline = RealTimeDeadline(OPEN_TIMEOUT_SECONDS)
        while self._intake is None:
            if deadline.passed:
                raise UsageError(
                    f"trigger {self.name!r}: expected an open app that subscribes to it, found none"
                )
            await asyncio.sleep(0.001)
        return self._intake


@asynccontextmanager
async def running(
    app: App,
    *,
    clock: Clock | None = None,
    store: str | PathLike[str] | None = None,
    lines: list[Line] | None = None,
    own_loop: bool = False,
) -> AsyncGenerator[App, None]:
    """The app, open on a fresh store and a clock that stands still; closed at the end, and as it
    was before.

        async with running(app) as app:
            assert await result_of(app, score, order=7) == 0.5

    `clock`: by default the app's own VirtualClock, or a new one. `store`: a URL, or the path of a
    SQLite file, to open the same one twice; by default a file in a folder that is removed at the
    end. `lines` collects what flows and tasks log and print. `own_loop` gives flows a loop and
    thread of their own, as `eventflow serve` does. Schedules of the app follow the clock too.
    """
    before, options = app.clock, app._store_options  # pyright: ignore[reportPrivateUsage]
    app.clock = clock or (before if isinstance(before, VirtualClock) else VirtualClock())
    app._store_options = {"ballast": 0, "free_floor": 0, **options}  # pyright: ignore[reportPrivateUsage]
    with ExitStack() as undo:
        undo.callback(setattr, app, "clock", before)
        undo.callback(setattr, app, "_store_options", options)
        clock_users = [trigger for trigger in app.triggers if _set_clock(app.clock, trigger, undo)]
        sink = None if lines is None else _LineCollector(lines)
        if lines is not None:
            undo.enter_context(configure(stream=None, clock=app.clock))
        await app.open(store=_url(app, store, undo), own_loop=own_loop, sink=sink)
        if isinstance(app.clock, VirtualClock):
            app.clock.attach(app)
        try:
            await _wait_for_schedules(clock_users)
            yield app
        finally:
            await app.close(grace=1.0)


def _set_clock(clock: Clock, trigger: Trigger, undo: ExitStack) -> bool:
    """A trigger with a `clock` of its own (a schedule) follows the test's until the end; whether it
    is one.
    """
    previous = getattr(trigger, "clock", None)
    if previous is not None:
        undo.callback(setattr, trigger, "clock", previous)
        setattr(trigger, "clock", clock)  # noqa: B010 (no part of the protocol)
    return previous is not None


async def _wait_for_schedules(clock_users: Sequence[Trigger]) -> None:
    """Until the schedules have read their cursors: time that moves before would pass them by."""
    deadline = RealTimeDeadline(OPEN_TIMEOUT_SECONDS)
    while not all(getattr(trigger, "is_open", True) for trigger in clock_users):
        if deadline.passed:
            return
        await asyncio.sleep(0.001)


def _url(app: App, store: str | PathLike[str] | None, undo: ExitStack) -> str:
    if store is None:
        folder = undo.enter_context(TemporaryDirectory(prefix="eventflow-"))
        return f"sqlite:///{folder}/{app.name}.db"
    location = fspath(store)
    return location if ":///" in location else f"sqlite:///{location}"


class _LineCollector:
    """A log.Sink that is a list."""

    def __init__(self, lines: list[Line]) -> None:
        self._lines = lines

    def post(self, line: Line) -> None:
        self._lines.append(line)
