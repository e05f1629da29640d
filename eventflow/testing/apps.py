"""`running`: an app on a fresh store and a virtual clock. `MemoryTrigger`: a trigger whose events a
test sends.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from os import PathLike, fspath
from tempfile import TemporaryDirectory
from typing import Any

from msgspec.structs import replace

from eventflow.app import App
from eventflow.core.clock import Clock
from eventflow.core.errors import UsageError
from eventflow.events.event import Event, Intake, Json, Receipt, Trigger, Undecodable
from eventflow.logs.capture import configure
from eventflow.logs.log import LogLine
from eventflow.testing.clock import VirtualClock
from eventflow.testing.idle import RealTimeDeadline

OPEN_TIMEOUT_SECONDS = 10.0
"""Real time that `MemoryTrigger.send` waits for the app to listen."""


class _NoData:
    pass


class MemoryTrigger:
    """A trigger whose events a test sends.

        drift = MemoryTrigger("drift")
        app.on(drift, retrain, where={"score": [{"numeric": [">", 0.3]}]})
        async with running(app):
            (receipt,) = await drift.send(data={"score": 0.5})
            assert receipt.matched == 1

    Its cursors are stored as those of any trigger.
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
        max_wait: float | None = 0.0,
    ) -> list[Receipt]:
        """Send events, or one made of `data`, and return their receipts when they and the `cursor`
        are durable.

        Waits until the app listens, and for room in the ledger for up to `max_wait` seconds (None:
        as long as it takes). Without an `id` the event gets a unique one. Raises the errors of
        `Intake.accept`.
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
        for item in items:
            if not isinstance(item, Event | Undecodable):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise UsageError(
                    f"send(): expected an Event, found {item!r}; for its data alone write "
                    "send(data=...)"
                )
        return await (await self._listening()).accept(*items, cursor=cursor, max_wait=max_wait)

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
    lines: list[LogLine] | None = None,
    own_loop: bool = False,
) -> AsyncGenerator[App, None]:
    """Open the app on a fresh store and a virtual clock; at the end close it and restore its
    settings.

        async with running(app) as app:
            assert await result_of(app, score, order=7) == 0.5

    `clock`: by default the app's VirtualClock, or a new one; schedules of the app follow it too.
    `store`: a URL or the path of an SQLite file, for a test that opens it twice; by default a file
    in a temporary folder. `lines` collects what flows and tasks log and print. `own_loop` runs
    flows on an event loop in another thread, as `eventflow serve` does.
    """
    before = app.clock
    config = app._config  # pyright: ignore[reportPrivateUsage]
    options = {"ballast": 0, "free_floor": 0, **config.store_options}
    app.clock = clock or (before if isinstance(before, VirtualClock) else VirtualClock())
    app._config = replace(config, store_options=options)  # pyright: ignore[reportPrivateUsage]
    with ExitStack() as undo:
        undo.callback(setattr, app, "clock", before)
        undo.callback(setattr, app, "_config", config)
        clock_users = [trigger for trigger in app.triggers if _set_clock(app.clock, trigger, undo)]
        logs = None if lines is None else _LineCollector(lines)
        if lines is not None:
            undo.enter_context(configure(stream=None, clock=app.clock))
        url = _url(app, store, undo)
        await app.open(store=url, own_loop=own_loop, logs=logs, require_secrets=False)
        if isinstance(app.clock, VirtualClock):
            app.clock.attach(app)
        try:
            await _wait_for_schedules(clock_users)
            yield app
        finally:
            await app.close(grace=1.0)


def _set_clock(clock: Clock, trigger: Trigger, undo: ExitStack) -> bool:
    """Replace the `clock` of a trigger that has one (a schedule) until `undo`. Whether it has."""
    previous = getattr(trigger, "clock", None)
    if previous is not None:
        undo.callback(setattr, trigger, "clock", previous)
        setattr(trigger, "clock", clock)  # noqa: B010 (no part of the protocol)
    return previous is not None


async def _wait_for_schedules(clock_users: Sequence[Trigger]) -> None:
    """Wait until the schedules have read their cursors; they would miss time that moves before."""
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
    """A `LogReceiver` that appends to a list."""

    def __init__(self, lines: list[LogLine]) -> None:
        self._lines = lines

    def post(self, line: LogLine) -> None:
        self._lines.append(line)
