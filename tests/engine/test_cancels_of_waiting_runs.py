"""A run that waits, out of memory, is cancelled as one in memory is: its flow may clean up."""

import asyncio

import pytest

from eventflow import App, flow, sleep, task
from eventflow.core.errors import RunCancelled
from eventflow.runs.run import State
from eventflow.testing import VirtualClock, running
from tests.conftest import eventually

pytestmark = pytest.mark.anyio

DAY = 86_400


async def in_state(app: App, number: int, state: str) -> bool:
    return (await app.store.run(number))["state"] == state


@pytest.mark.parametrize("how", ["sleep", "retry", "child", "timeout"])
async def test_a_waiting_run_cleans_up_when_it_is_cancelled(how: str) -> None:
    """Its `except` and `finally` blocks call tasks; what was recorded before does not run again;
    it ends as cancelled with the reason.
    """
    done: list[str] = []

    @task
    async def reserve() -> str:
        done.append("reserve")
        return "r-1"

    @task
    async def release(what: str) -> None:
        done.append(f"release {what}")

    @task(retries=[DAY])
    async def fails() -> None:
        raise OSError("not now")

    @flow
    async def child() -> None:
        try:
            await sleep(DAY)
        finally:
            await release("child")

    @flow(timeout=2 * DAY)
    async def saga() -> None:
        what = await reserve()
        try:
            match how:
                case "sleep":
                    await sleep(DAY)
                case "retry":
                    await fails()
                case "timeout":
                    async with asyncio.timeout(DAY):
                        await asyncio.Event().wait()
                case _:
                    await child()
        except Exception as error:
            done.append(f"compensates for {error!r}")
            raise
        finally:
            await release(what)

    app, clock = App("saga"), VirtualClock()
    app.add(saga, child)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(saga)
        if how == "child":  # the parent stays in memory for a minute after its child has left
            await eventually(lambda: _runs_in(app, "waiting", 1), "the child waits")
            await clock.advance(70)
        await eventually(lambda: in_state(app, run.number, "waiting"), "it has left memory")
        await run.cancel("enough")
        with pytest.raises(RunCancelled, match="enough"):
            await run.result()
        await eventually(lambda: _runs_in(app, "cancelled", 1 + (how == "child")), "all ended")
    expected = ["reserve", "release r-1"] + ["release child"] * (how == "child")
    assert sorted(done) == sorted(expected)


async def _runs_in(app: App, state: str, count: int) -> bool:
    return len(await app.store.runs(state=State[state.upper()], limit=50)) == count


async def test_a_waiting_run_whose_flow_is_gone_is_cancelled() -> None:
    """A cancel does not wait for code that the app no longer has."""

    @flow
    async def gone() -> None:
        await sleep(DAY)

    app = App("gone")
    app.add(gone)
    async with running(app, clock=VirtualClock()), asyncio.timeout(20):
        run = await app.start(gone)
        await eventually(lambda: in_state(app, run.number, "waiting"), "it has left memory")
        del app.flows[gone.name]
        await run.cancel("enough")
        await eventually(lambda: in_state(app, run.number, "cancelled"), "it is cancelled")
