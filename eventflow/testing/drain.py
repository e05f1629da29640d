"""`drain` and `result_of`: let an app work until nothing is left to do, moving virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

from eventflow.app import App
from eventflow.runs.run import State
from eventflow.sdk.flow import Flow
from eventflow.testing.clock import VirtualClock
from eventflow.testing.idle import RealTimeDeadline, Stuck, live_runs_text, wait_until_idle

T = TypeVar("T")

DEFAULT_TIMEOUT_SECONDS = 10.0
"""Real time after which `drain` and `result_of` raise Stuck."""


async def drain(
    app: App, *, advance: bool = True, within: float = DEFAULT_TIMEOUT_SECONDS
) -> dict[str, int]:
    """Wait until no run can continue without an event; return `app.store.counts()`.

        await payments.send(data={"amount": 5})
        counts = await drain(app)  # the first attempt, a day of backoff, the last attempt
        assert counts["completed"] == 1 and counts["pending"] == 0

    A VirtualClock jumps from one due time to the next until every run has ended, is paused or is
    held; with `advance=False` it stands still. Another clock takes real time. Raises Stuck after
    `within` real seconds, with a table of what each run waits for: a body that hangs, a flow that
    never ends.
    """
    await _run_until(app, advance, within, None)
    return await app.store.counts()


@overload
async def result_of(app: App, flow: Flow[..., T], /, **params: Any) -> T: ...
@overload
async def result_of(app: App, flow: str, /, **params: Any) -> Any: ...
async def result_of(app: App, flow: Flow[..., Any] | str, /, *args: Any, **params: Any) -> Any:
    """Start a flow and return its value, or raise its error; time moves as in `drain`.

    assert await result_of(app, score, order=7) == 0.5
    """
    handle = await app.start(flow, *args, **params)  # refuses `args`

    async def ended() -> bool:
        state = State[(await handle.row())["state"].upper()]
        return not state.is_live or state in (State.PAUSED, State.HELD)

    await _run_until(app, True, DEFAULT_TIMEOUT_SECONDS, ended)
    if not await ended():
        raise Stuck(await live_runs_text(app, f"run {handle.id} waits for an event"))
    return await handle.result()


async def _run_until(
    app: App, advance: bool, within: float, ended: Callable[[], Awaitable[bool]] | None
) -> None:
    clock = app.clock
    if isinstance(clock, VirtualClock):
        clock.attach(app)
    deadline = RealTimeDeadline(within)
    while True:
        if deadline.passed or not await wait_until_idle(app, within, deadline):
            raise Stuck(await live_runs_text(app, f"not done after {within:g} s"))
        if not advance or (ended is not None and await ended()) or not await _has_live_runs(app):
            return
        if not isinstance(clock, VirtualClock):
            await asyncio.sleep(0.01)
        elif not await clock.jump():
            if await _only_events_awaited(app):
                return
            await asyncio.sleep(0.01)


async def _has_live_runs(app: App) -> bool:
    """Whether a run has not ended and is neither paused nor held."""
    if app.runtime.worker.load["in_memory"]:
        return True
    for state in (State.PENDING, State.WAITING, State.RUNNING):
        if await app.store.runs(state=state, limit=1):
            return True
    return False


async def _only_events_awaited(app: App) -> bool:
    """Whether no run can continue by itself, when no timer is set: none has a due time, and none
    is in memory, which a run leaves when it waits for an event.
    """
    for state in (State.PENDING, State.WAITING):
        for row in await app.store.runs(state=state, limit=1000):
            if row["due_at"] is not None and not row["blocked"]:
                return False
    return not await app.store.runs(state=State.RUNNING, limit=1)
