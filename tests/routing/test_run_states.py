"""Run states as events: recorded with the end of the run, once per end, whatever caused it."""

from typing import Any

import pytest

from eventflow import App, Debounce, Permanent, UsageError, current_run, flow
from eventflow.testing import MemoryTrigger, drain, running
from triggers import RunState

pytestmark = pytest.mark.anyio

SEEN: list[dict[str, Any]] = []


@pytest.fixture(autouse=True)
def fresh() -> None:
    SEEN.clear()


@flow
async def train(n: int) -> dict[str, int]:
    if n < 0:
        raise Permanent(f"no {n}")
    return {"n": n}


@flow
async def note(run: str, state: str, result: Any, error: Any) -> None:
    event = current_run().event
    assert event is not None
    SEEN.append(
        {
            "run": run,
            "state": state,
            "result": result,
            "error": error,
            "type": event.type,
            "subject": event.subject,
        }
    )


async def test_p2_an_end_and_its_event_are_one_transaction() -> None:
    """A completed run is an event with its result, a failed one with its error; each once, with a
    run of its own.
    """
    app = App("states")
    app.add(train)
    app.on(RunState(train, "completed", "failed"), note)
    async with running(app):
        good, bad = await app.start(train, n=1), await app.start(train, n=-1)
        await drain(app)
        batches = {run["id"]: run for run in await app.store.runs(flow="note")}
        assert len(batches) == 2
        events = await app.store.events(type="eventflow.run.completed")
        assert [event["subject"] for event in events] == [good.id]
        assert events[0]["received_at"] == (await good.row())["finished_at"]
    by_state = {seen["state"]: seen for seen in SEEN}
    assert (
        by_state["completed"]["result"] == {"n": 1} and by_state["completed"]["subject"] == good.id
    )
    assert by_state["failed"]["run"] == bad.id and by_state["failed"]["error"]["message"] == "no -1"


async def test_every_end_of_a_run_has_its_event() -> None:
    """A run that is cancelled before it started has its event like any other; a retried run ends a
    second time.
    """
    app, trigger = App("states"), MemoryTrigger("work")
    app.on(trigger, train, deliver=Debounce(60, max_wait=60))
    app.on(RunState("tra*"), note)
    async with running(app):
        await trigger.send(data={"n": 1})
        (run,) = await app.store.runs()
        await app.store.cancel(run["id"], "not wanted")
        await drain(app)
        assert [seen["state"] for seen in SEEN] == ["cancelled"]
        bad = await app.start(train, n=-1)
        await drain(app)
        await app.store.retry(bad.number)
        await drain(app)
    failed = [seen for seen in SEEN if seen["state"] == "failed"]
    assert len(failed) == 2 and {seen["run"] for seen in failed} == {bad.id}


async def test_without_a_subscription_there_is_no_event() -> None:
    """Without a subscription that names the type there is no such event; one to all types does not
    name it.
    """
    app = App("states")
    app.add(train)
    app.on("*", note)
    async with running(app):
        await app.start(train, n=1)
        await drain(app)
        assert await app.store.events(type="eventflow.run.completed") == [] and SEEN == []


async def test_a_flow_triggered_by_its_own_ends_stops() -> None:
    """A flow triggered by the ends of its own runs is stopped at depth 20, with a dead letter that
    has the reason.
    """

    @flow
    async def again(run: str) -> None: ...

    app = App("states")
    app.on("start", again)
    app.on(RunState(again, "completed"), again)
    async with running(app):
        await app.emit("start", {"run": "first"})
        await drain(app)
        (dead,) = await app.store.dead_letters()
        assert "20" in dead["reason"] and len(await app.store.runs(limit=100)) <= 22


async def test_where_is_combined_with_state_and_flow() -> None:
    """`where=` is combined with the state and the flow; the same field twice raises."""
    app = App("states")
    app.add(train)
    app.on(RunState(train, "completed"), note, where={"result": {"n": [{"numeric": [">", 5]}]}})
    async with running(app):
        await app.start(train, n=3)
        await app.start(train, n=7)
        await drain(app)
    assert [seen["result"] for seen in SEEN] == [{"n": 7}]
    with pytest.raises(UsageError, match="flow"):
        App("states").on(RunState(train, "completed"), note, where={"flow": ["x"]})
    with pytest.raises(UsageError, match="expected states among"):
        RunState(train, "finished")
