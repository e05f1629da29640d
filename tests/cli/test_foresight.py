"""`replay --dry-run`: which runs a time's events would make, by their windows."""

from pathlib import Path
from typing import Any

import httpx2
import pytest

from eventflow import App, Batch, Event, flow
from eventflow.cli.doing import _windows
from eventflow.store.audit import audit
from eventflow.testing import MemoryTrigger, VirtualClock, running
from eventflow.web.api import make_asgi

SECOND = 1_000_000


def said(at: float, lane: str | None = None, **window: Any) -> dict[str, Any]:
    facts = {"mode": "batch", "size": 3, "wait": 10 * SECOND, "longest": 10 * SECOND, "renewed": False, **window}
    verdict = {"subscription": "s", "fate": "run", "run": "r", "window": {**facts, "lane": lane, "at": int(at * SECOND)}}
    return {"event": "e", "verdicts": [verdict]}


def test_batches_close_by_size_and_by_time() -> None:
    """Three fill a run; what comes after its time opens the next."""
    lines = _windows([said(0), said(1), said(2), said(3), said(14)])
    assert lines == [
        "run 1  s  batch of 3 events",
        "run 2  s  batch of 1 events",
        "run 3  s  batch of 1 events",
        "5 events, 3 runs would start",
    ]


def test_keys_have_windows_of_their_own() -> None:
    """Events of two keys in turn make two runs."""
    assert _windows([said(n, "ab"[n % 2]) for n in range(6)])[:-1] == [
        "run 1  s  batch of 3 events",
        "run 2  s  batch of 3 events",
    ]


def test_a_debounce_is_put_off_to_its_bound() -> None:
    """Constant traffic makes a run every `max_wait`."""
    window: dict[str, Any] = {"mode": "debounce", "size": 10_000, "wait": 5 * SECOND, "longest": 30 * SECOND, "renewed": True}
    assert _windows([said(n, **window) for n in range(40)])[-1] == "40 events, 2 runs would start"


def test_one_at_a_time_cannot_be_foreseen() -> None:
    """How long runs would take nobody knows: the count is a lower bound, and says so."""
    window: dict[str, Any] = {"mode": "singleflight", "size": 10_000, "wait": 0, "longest": 0}
    assert _windows([said(n, **window) for n in range(4)])[-1] == "4 events, at least 1 runs would start"


@pytest.mark.anyio
async def test_the_api_tells_the_window_and_starts_nothing(tmp_path: Path) -> None:
    """A dry run has the window of each verdict, at the time the event came; a replay says which run the event joined."""

    @flow
    async def load(events: list[Event]) -> int:
        return len(events)

    app, trigger, clock = App("past"), MemoryTrigger("clicks"), VirtualClock()
    app.on(trigger, load, deliver=Batch(2, within=60))
    async with running(app, clock=clock):
        transport = httpx2.ASGITransport(make_asgi(app, auth=False, manage=False))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await trigger.send(data={}, id="a")
            foreseen = (await client.post("/api/events/a/replay", json={"dry_run": True})).json()
            (verdict,) = foreseen["verdicts"]
            assert verdict["window"]["mode"] == "batch" and verdict["window"]["at"] == clock.now()
            assert len(await app.store.runs()) == 1
            again = (await client.post("/api/events/a/replay", json={})).json()["verdicts"]
            assert [each["fate"] for each in again] == ["run"]  # it is in the first window already
            await trigger.send(data={}, id="b")
            joined = (await client.post("/api/events/a/replay", json={})).json()["verdicts"]
            assert [each["fate"] for each in joined] == ["run"]
            (other,) = (await client.post("/api/events/b/replay", json={})).json()["verdicts"]
            assert other["fate"] == "joined" and other["run"] == joined[0]["run"]
        assert await app.store._look(audit) == []
