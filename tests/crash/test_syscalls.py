"""A sample of every durable system call, killed at. `python -m tests.crash.syscalls` does all of
them, in half an hour.
"""

import os
import shutil
from pathlib import Path

import pytest

from tests.crash.syscalls import can_trace, search

ALL = os.environ.get("EVENTFLOW_TEST_EVERY_CALL") == "1"
SECONDS = None if ALL else 45.0


@pytest.mark.skipif(
    not can_trace(), reason="strace is not here, or may not trace: no call can be killed at"
)
@pytest.mark.timeout(7200 if ALL else 240)
def test_p1_p2_row_1_kill_9_at_durable_system_calls(tmp_path: Path):
    """Killed as a write, fsync, rename, unlink, truncation or creation of the store's files is
    entered, at its first start, in service, in recovery and in its last checkpoint, the server
    comes back with every acknowledged event, one run each, and no recorded task run twice.
    """
    found = search(tmp_path, SECONDS)
    print(
        f"{found.points} calls listed, {found.tried} tried",
        *sorted(found.by.items()),
        *found.missed,
        sep="\n",
    )
    assert found.wrong == []
    assert found.points > 300 and found.tried > 6 and len(found.missed) < found.tried / 2
    shutil.rmtree(tmp_path)
