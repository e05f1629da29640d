"""The locks that SQLite itself holds on an open store, and that nothing of ours may drop."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from eventflow.core.errors import StoreLocked
from eventflow.store.sqlite import SqliteStore
from tests.store.ledger import Ledger, ManualClock
from tests.store.test_file_guards import WAYS, opening


@pytest.mark.parametrize("way", WAYS)
def test_a_refused_open_leaves_the_locks_of_the_open_store(tmp_path: Path, way: str):
    """A second open in the same process is refused before the file is opened, by whatever name:
    closing any handle of it would release SQLite's own locks, and another process could remove the
    WAL that is in use.
    """
    path = str(tmp_path / "a.db")
    store = SqliteStore(path, clock=ManualClock())
    store.open()
    ledger = Ledger(store, ManualClock())
    asyncio.run(ledger.recorded())
    assert isinstance(opening(WAYS[way](path)), StoreLocked)
    assert _sqlite_lock_is_held(path)
    program = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('SELECT * FROM ledger')"
    subprocess.run([sys.executable, "-c", program, path], check=True)
    assert Path(f"{path}-wal").stat().st_size > 0
    asyncio.run(ledger.recorded(name="second"))
    store.close()


def _sqlite_lock_is_held(path: str) -> bool:
    """Whether another process is refused the lock that SQLite takes before it removes a WAL."""
    program = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 510, 0x40000002)\n"
    )
    tried = subprocess.run([sys.executable, "-c", program, path], capture_output=True, check=False)
    assert tried.returncode == 0 or b"BlockingIOError" in tried.stderr, tried.stderr
    return tried.returncode != 0
