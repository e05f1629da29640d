"""`check` beside a writer: a copy is audited, so the sums are of one commit and the WAL can be
reset. With steps of one page there are commits between any two pages of the copy.
"""

import asyncio
import glob
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from eventflow import App, Event, count, flow
from eventflow.core.errors import StoreError, StoreFull
from eventflow.runs.run import Completed, Failed, State, format_id
from eventflow.store import backup
from eventflow.store.readers import Readers
from tests.conftest import eventually
from tests.store.ledger import Ledger, ManualClock, RecordingWorker, value

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def writing(write: Callable[[int], Awaitable[Any]]) -> AsyncIterator[list[int]]:
    """Call `write` repeatedly meanwhile; the list has the number of each completed call."""
    done: list[int] = []
    stop = asyncio.Event()

    async def write_repeatedly() -> None:
        while not stop.is_set():
            await write(len(done))
            done.append(len(done))

    async with asyncio.TaskGroup() as group:
        group.create_task(write_repeatedly())
        try:
            yield done
        finally:
            stop.set()


async def filled(ledger: Ledger, events: int, body: bytes = b"{}") -> None:
    """Events with a run each: settled, failed and pending ones, journals, dead letters."""
    for n in range(events):
        dead = [("s", "why")] if n % 5 == 0 else []
        await ledger.store.record(
            [ledger.arrival(f"old-{n}", ledger.run(), ledger.run(), body=body, dead=dead)],
            trigger="t",
        )
    for n, run in enumerate(await ledger.claimed(events)):
        await ledger.append(run, value())
        await ledger.settle(run, Failed(b"{}") if n % 3 == 0 else Completed(b"1"))


async def test_the_sums_are_of_one_commit(
    ledger: Ledger, path: str, monkeypatch: pytest.MonkeyPatch
):
    """With a commit between any two pages of the copy, and changes in every table, the sums are
    exact: nothing is reported, one byte too many is, and no copy is left.
    """
    monkeypatch.setattr(backup, "PAGES_PER_STEP", 1)
    await filled(ledger, 60)
    ledger.store.attach_worker(RecordingWorker(asyncio.get_running_loop(), capacity=0))
    failed = [row["id"] for row in await ledger.store.runs(state=State.FAILED, limit=1000)]

    async def write(n: int) -> None:
        await ledger.store.record(
            [ledger.arrival(f"new-{n}", ledger.run(ordering_key="a"), dead=[("s", "why")])],
            trigger="t",
        )
        await ledger.store.record(
            [ledger.arrival(f"old-{n % 60}", body=b"{}" if n % 2 else b"[]")], trigger="t"
        )
        for run in await ledger.claimed(2):
            await ledger.append(run, value())
            await ledger.settle(run, Completed(b"1") if n % 2 else Failed(b"{}"))
        if failed:
            await ledger.store.retry(failed.pop())
        for dead_letter in await ledger.store.dead_letters(limit=1):
            await ledger.store.redrive(
                dead_letter["id"], ledger.arrival(f"again-{n}", ledger.run())
            )
        ledger.clock.forward(1)
        await ledger.store.prune(
            payloads_before=ledger.clock.now() - 20_000_000, identities_before=0, step=5
        )

    async with writing(write) as done:
        while len(done) < 20:
            assert await ledger.store.check() == []
    counts = await ledger.store.counts()
    assert (
        min(
            counts[name]
            for name in ("completed", "failed", "dead", "pending", "duplicates", "conflicts")
        )
        > 0
    )

    connection = ledger.store._connection
    assert connection is not None
    (first,) = connection.execute("SELECT min(id) FROM runs WHERE state < 4").fetchone()
    connection.execute("UPDATE runs SET size = size + 1 WHERE id = ?", (first,))
    async with writing(
        lambda n: ledger.store.record([ledger.arrival(f"more-{n}", ledger.run())], trigger="t")
    ):
        assert [found.split()[0] for found in await ledger.store.check()] == ["pending_bytes"]
    connection.execute("UPDATE runs SET size = size - 1 WHERE id = ?", (first,))
    assert await ledger.store.check() == []
    assert not copies(path)
    ledger.store.attach_worker(None)


async def test_the_sums_count_events_that_wait_in_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Events that enter and leave a pattern during the copy are counted once each."""
    monkeypatch.setattr(backup, "PAGES_PER_STEP", 1)

    @flow
    async def act(events: list[Event]) -> int:
        return len(events)

    app = App("patterns")
    app.on(count("a", 3, within=60, by="k"), act)

    async def write(n: int) -> None:
        await app.accept(Event(id=str(n), source="/test", type="a", data={"k": n % 7}))

    await app.open(store=f"sqlite:///{tmp_path}/patterns.db")
    async with writing(write) as done:
        for enough in (50, 150, 300):
            await eventually(
                lambda enough=enough: len(done) > enough, "events wait, and leave", within=60
            )
            before = len(done)
            while len(done) == before:  # a short copy can end before the write beside it
                assert await app.store.check() == []
    assert await app.store.check() == []
    await app.close()


async def test_the_wal_is_reset_while_a_check_goes_on(ledger: Ledger, path: str):
    """During a check the WAL is checkpointed and reset: of 64 MiB written meanwhile it has less
    than 48.
    """
    ledger.store.attach_worker(RecordingWorker(asyncio.get_running_loop(), capacity=0))
    await filled(ledger, 200)
    body, sizes = os.urandom(1 << 20), [0]

    async def write(n: int) -> None:
        await ledger.store.record([ledger.arrival(f"new-{n}", body=body)], trigger="t")
        sizes.append(os.stat(f"{path}-wal").st_size)

    longest = 0
    async with writing(write) as done:
        while longest < 64:
            before = len(done)
            assert await ledger.store.check() == []
            longest = max(longest, len(done) - before)
    assert max(sizes) < 48 << 20
    ledger.store.attach_worker(None)


async def test_damage_in_any_row_is_found(ledger: Ledger):
    """Damaged rows, the first, one in the middle and the last of each table, are found while others
    are written.
    """
    await filled(ledger, 30)
    ledger.store.attach_worker(RecordingWorker(asyncio.get_running_loop(), capacity=0))
    connection = ledger.store._connection
    assert connection is not None
    damaged: list[tuple[str, str, str, int]] = []
    for table, column, key in (
        ("events", "body", "id"),
        ("runs", "result", "id"),
        ("journal", "value", "run"),
    ):
        idents = [
            row[0]
            for row in connection.execute(
                f"SELECT {key} FROM {table} WHERE {column} IS NOT NULL ORDER BY {key}"
            )
        ]
        damaged += [
            (table, column, key, ident)
            for ident in (idents[0], idents[len(idents) // 2], idents[-1])
        ]
    for table, column, key, ident in damaged:
        connection.execute(
            f"UPDATE {table} SET {column} = CAST({column} || ' ' AS BLOB) WHERE {key} = ?", (ident,)
        )
    async with writing(lambda n: ledger.recorded(ledger.run())):
        found = await ledger.store.check()
    for table, column, key, ident in damaged:
        assert any(text.startswith(f"{table} row {format_id(ident)}") for text in found), found
        cut = f"CAST(substr({column}, 1, length({column}) - 1) AS BLOB)"
        connection.execute(f"UPDATE {table} SET {column} = {cut} WHERE {key} = ?", (ident,))
    assert len(found) == len(damaged)
    ledger.store.attach_worker(None)


async def test_a_check_without_space_for_the_copy_is_refused(ledger: Ledger, path: str):
    """Without disk space for the copy the check is refused, with both numbers, and the store works
    on.
    """
    await filled(ledger, 5)
    ledger.store.attach_worker(RecordingWorker(asyncio.get_running_loop(), capacity=0))
    space = ledger.store._space
    floor, space._floor = space._floor, 1 << 60
    with pytest.raises(StoreFull, match=r"\d+ MiB free in .*, expected 1099511627776 MiB: .* copy"):
        await ledger.store.check()
    space._floor = floor
    assert await ledger.store.check() == []
    assert not copies(path)
    ledger.store.attach_worker(None)


async def test_closing_the_store_interrupts_an_audit(path: str, clock: ManualClock):
    """A store that is closed does not wait until a large copy is audited."""
    readers = Readers(path, clock)
    started = threading.Event()
    copy = sqlite3.connect(":memory:", check_same_thread=False)
    copy.create_function("started", 0, started.set)
    endless = (
        "WITH RECURSIVE n(x) AS (SELECT started() UNION ALL SELECT 1 FROM n) SELECT count(*) FROM n"
    )
    audit = asyncio.create_task(
        readers.read_copy(copy, lambda copy: copy.execute(endless).fetchone())
    )
    await asyncio.to_thread(started.wait)
    readers.close()
    with pytest.raises(StoreError, match="interrupted"):
        await audit


async def test_a_killed_check_leaves_no_copy(ledger: Ledger, path: str):
    """A copy that a killed process left is removed when the store is opened."""
    ledger.store.close()
    left = Path(f"{path}.check-abc")
    left.write_bytes(b"a part of the ledger")
    ledger.store.open()
    assert not left.exists()


def copies(path: str) -> list[str]:
    return glob.glob(f"{glob.escape(path)}.check-*")
