"""The locks that SQLite itself holds on an open store, and that nothing of ours may drop."""

import subprocess
import sys
from pathlib import Path

from eventflow.core.errors import StoreLocked
from tests.store.ledger import Ledger
from tests.store.test_file_guards import opening


def test_a_refused_open_leaves_the_locks_of_the_open_store(
    ledger: Ledger, path: str, tmp_path: Path
):
    """A second open in the same process is refused before the file is opened: closing any handle of
    it would drop SQLite's own locks, and another process could remove the WAL that is in use.
    """
    (tmp_path / "other.db").symlink_to(path)
    for name in (str(tmp_path / "other.db"), path):
        assert isinstance(opening(name), StoreLocked)
        assert _sqlite_lock_is_held(path)


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
