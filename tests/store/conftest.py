"""A fresh ledger for each test, audited when the test is over."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from eventflow.store.sqlite import SqliteStore
from tests.store.ledger import Ledger, ManualClock, Reopen


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "ledger.db")


@pytest.fixture
def reopen(path: str, clock: ManualClock) -> Iterator[Reopen]:
    """Opens the test's store, closing it first when it is open; at the end the ledger must be
    sound.
    """
    opened: list[SqliteStore] = []

    def again() -> Ledger:
        if opened:
            opened[-1].close()
        store = SqliteStore(path, clock=clock, ballast=0, free_floor=0)
        opened.append(store)
        store.open()
        return Ledger(store, clock)

    yield again
    if opened and opened[-1].failed is None:
        again()
        found = asyncio.run(opened[-1].check())
        opened[-1].close()
        assert found == []


@pytest.fixture
def ledger(reopen: Reopen) -> Ledger:
    return reopen()
