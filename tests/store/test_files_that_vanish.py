"""The files of an open store are removed, moved, replaced or overwritten: it stops within about a
second (P10), and what was acknowledged is kept where that is possible.
"""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from eventflow.core.errors import StoreCorrupt, StoreError, StoreFailed
from eventflow.store.sqlite import SqliteStore
from tests.conftest import eventually, stays
from tests.store.ledger import Ledger, ManualClock
from tests.store.test_file_guards import holding

CHECKPOINT = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('PRAGMA wal_checkpoint')"

LONGER_THAN_A_LOOK = 1.3
"""Seconds: the files of an idle store are looked at once a second."""


def _remove(*ends: str) -> Callable[[Path], None]:
    def remove(path: Path) -> None:
        for end in ends:
            Path(f"{path}{end}").unlink()

    return remove


def _replace_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.mkdir()


def _restore_backup(path: Path) -> None:
    shutil.copy(path, f"{path}.backup")
    os.replace(f"{path}.backup", path)


def _remove_all(path: Path) -> None:
    for file in path.parent.glob("a.db*"):
        file.unlink()


def _replace(end: str) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        Path(f"{path}{end}").unlink()
        Path(f"{path}{end}").touch()

    return replace


def _rename(path: Path) -> None:
    path.rename(path.with_name("b.db"))


def _rename_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))


VANISHED: dict[str, tuple[Callable[[Path], None], str]] = {
    "all removed": (_remove_all, ""),
    "the file removed": (_remove(""), ""),
    "the file moved": (_rename, "b.db"),
    "the folder moved": (_rename_folder, "../moved/a.db"),
    "the folder replaced": (_replace_folder, "../moved/a.db"),
    "a backup put in its place": (_restore_backup, ""),
    "an empty file put in its place": (_replace(""), ""),
    "the WAL removed": (_remove("-wal"), "a.db"),
    "the WAL replaced": (_replace("-wal"), "a.db"),
    "the shared memory removed": (_remove("-shm"), "a.db"),
    "WAL and shared memory removed": (_remove("-wal", "-shm"), "a.db"),
}
"""What people do to the files of an open store, and where the ledger is afterwards."""


@pytest.mark.anyio
@pytest.mark.parametrize("how", VANISHED)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_p10_a_store_whose_file_vanished_stops(tmp_path: Path, how: str, busy: bool):
    """Idle or busy, within about a second the store has failed (exit 74) in one sentence that names
    the file. Nothing is acknowledged after the file is gone; what was acknowledged before is whole
    in the file that was moved, or whose WAL was removed.
    """
    path = tmp_path / "folder" / "a.db"
    store = SqliteStore(path, clock=ManualClock(), ballast=0)
    store.open()
    ledger = Ledger(store, ManualClock())
    failures: list[StoreError] = []
    store.on_failure(failures.append)
    await ledger.recorded(name="before")
    harm, place = VANISHED[how]
    acknowledged = 1
    began = time.monotonic()
    try:
        harm(path)
        while busy and time.monotonic() - began < 5:
            await ledger.recorded(name=f"after-{acknowledged}")
            acknowledged += 1
    except StoreError as error:
        assert error.exit_code == 74 and "removed, moved or replaced" in str(error)
    await eventually(lambda: failures, "the store has failed")
    assert time.monotonic() - began < 2.0
    if place != "a.db":  # only the WAL went: what is acknowledged meanwhile is not lost, see below
        assert acknowledged == 1
    assert store.failed is failures[0] and str(path) in str(failures[0])
    with pytest.raises(StoreFailed):
        await ledger.recorded(name="later")
    store.close()
    if place:
        kept = tmp_path / "kept"
        kept.mkdir()
        shutil.copy(os.path.normpath(path.parent / place), kept / "a.db")
        found = SqliteStore(kept / "a.db", clock=ManualClock(), ballast=0)
        found.open()
        assert acknowledged <= (await found.counts())["events"] <= acknowledged + 1
        found.close()


@pytest.mark.anyio
@pytest.mark.parametrize("content", ["an older copy", "another store", "nothing"])
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_p10_a_store_whose_file_is_overwritten_stops(
    tmp_path: Path, content: str, busy: bool
):
    """`cp` over the file of an open store: within about a second the store has failed, and its last
    commits lie in a WAL of another name. What was copied is whole, and is refused at the next start
    because it lacks commits that were acknowledged.
    """
    path = tmp_path / "a.db"
    other = tmp_path / "other.db"
    for each in (path, other):
        first = SqliteStore(each, clock=ManualClock(), ballast=0)
        first.open()
        entries = Ledger(first, ManualClock())
        for name in ("first", "second") if each == other else ("first",):
            await entries.recorded(name=name)
        first.close()
    copy = tmp_path / "copy.db"
    shutil.copy(other if content == "another store" else path, copy)
    if content == "nothing":
        copy.write_bytes(b"")
    store = SqliteStore(path, clock=ManualClock(), ballast=0)
    store.open()
    ledger = Ledger(store, ManualClock())
    failures: list[StoreError] = []
    store.on_failure(failures.append)
    for n in range(20):
        await ledger.recorded(name=f"before-{n}")
    await checkpoint_elsewhere(path)
    await ledger.recorded(name="before the copy")
    os.utime(path)
    await stays(lambda: not failures, "a touch is no overwrite", during=LONGER_THAN_A_LOOK)
    began = time.monotonic()
    shutil.copyfile(copy, path)
    with suppress(StoreError):
        n = 0
        while busy and time.monotonic() - began < 5:
            await ledger.recorded(name=f"after-{n}")
            n += 1
    await eventually(lambda: failures, "the store has failed")
    assert time.monotonic() - began < 2.5
    assert failures[0].exit_code == 74 and f"{path} was overwritten" in str(failures[0])
    store.close()
    assert path.read_bytes() == copy.read_bytes()
    assert len(list(tmp_path.glob("a.db-wal.*"))) == 1
    again = SqliteStore(path, clock=ManualClock(), ballast=0)
    with pytest.raises(StoreCorrupt, match="missing"):
        again.open()
    again.close()


@pytest.mark.anyio
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_p10_a_wal_that_was_put_in_place_is_not_touched(tmp_path: Path, busy: bool):
    """A backup is moved over an open store, its WAL first. The open store fails in between, and its
    close neither removes that WAL nor writes to it: when the backup's own file follows, it has all
    its commits.
    """
    path, backup = tmp_path / "a.db", tmp_path / "backup" / "b.db"
    backup.parent.mkdir()
    with holding(str(backup), "record") as holder:
        holder.kill()  # its commit is in its WAL only
    content = Path(f"{backup}-wal").read_bytes()
    assert content
    store = SqliteStore(path, clock=ManualClock(), ballast=0)
    store.open()
    ledger = Ledger(store, ManualClock())
    failures: list[StoreError] = []
    store.on_failure(failures.append)
    for n in range(5):
        await ledger.recorded(name=f"before-{n}")
    began = time.monotonic()
    os.replace(f"{backup}-wal", f"{path}-wal")
    with suppress(StoreError):
        while busy and time.monotonic() - began < 5:
            await ledger.recorded(name=f"after-{time.monotonic()}")
    await eventually(lambda: failures, "the store has failed")
    store.close()
    assert Path(f"{path}-wal").read_bytes() == content
    os.replace(f"{path}-wal", f"{backup}-wal")
    restored = SqliteStore(backup, clock=ManualClock(), ballast=0)
    restored.open()
    assert (await restored.counts())["events"] == 1
    restored.close()
    again = SqliteStore(path, clock=ManualClock(), ballast=0)
    again.open()
    assert (await again.counts())["events"] >= 5
    again.close()


async def checkpoint_elsewhere(path: Path) -> None:
    command = [sys.executable, "-c", CHECKPOINT, path]
    await asyncio.to_thread(subprocess.run, command, check=True)


@pytest.mark.anyio
async def test_a_checkpoint_of_another_program_is_no_overwrite(tmp_path: Path):
    """Litestream and the sqlite3 shell write the WAL into the store's file: the store goes on."""
    path = tmp_path / "a.db"
    store = SqliteStore(path, clock=ManualClock(), ballast=0)
    store.open()
    ledger = Ledger(store, ManualClock())
    for n in range(2):
        for each in range(20):
            await ledger.recorded(name=f"{n}-{each}")
        before = path.stat().st_mtime_ns
        await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", CHECKPOINT, path], check=True
        )
        assert path.stat().st_mtime_ns != before
        await stays(lambda: store.failed is None, "it serves", during=LONGER_THAN_A_LOOK)
    await ledger.recorded(name="later")
    store.close()
