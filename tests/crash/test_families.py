"""A parent and its child in flight together when the process dies, and the child quicker than its
parent in the next life.
"""

import asyncio

import pytest

from eventflow.runs.journal import Entry, Kind
from eventflow.store.sqlite import SqliteStore
from tests.conftest import eventually, wait_until
from tests.crash.gates import app
from tests.crash.lives import EVENT, Lives


def _killed_family(lives: Lives) -> str:
    """The store of a parent and a child that were both in memory when the process was killed."""
    server = lives.boot("child")
    assert server.send(EVENT, {"n": 4}, "parent")[0] == 202
    wait_until(lambda: "child" in lives.reached, "the child is under way")
    lives.end()
    return f"sqlite:///{server.store}"


def test_row_1_a_parent_gets_an_answer_given_while_its_journal_is_read(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
):
    """The child ends between the reading of its parent's journal and the parent's first step: the
    answer is not lost.
    """
    location = _killed_family(lives)
    read = SqliteStore.load

    async def slow(store: SqliteStore, run: int) -> list[Entry]:
        entries = await read(store, run)
        if any(entry.kind is Kind.CHILD for entry in entries):
            await eventually(_child_is_gone, "the child has ended")
        return entries

    monkeypatch.setattr(SqliteStore, "load", slow)
    asyncio.run(_both_end(location))


async def _child_is_gone() -> bool:
    return "completed" in await _states() and app.runtime.worker.load["in_memory"] == 0


async def _states() -> list[str]:
    return [run["state"] for run in await app.store.runs()]


async def _both_end(location: str) -> None:
    await app.open(store=location, listen=False)
    try:

        async def ended() -> bool:
            return await _states() == ["completed", "completed"]

        await eventually(ended, "parent and child have completed", within=10)
    finally:
        await app.close(0.0)
