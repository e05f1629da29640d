"""Whether another process is a worker of the same server: `uvicorn --workers 2`, gunicorn.

App asks it when the store is locked: such a worker must not stop the server that the other one
runs in.
"""

import os
import sys
from pathlib import Path


def is_sibling_worker(pid: int | None) -> bool:
    """Whether the process and this one were started by one server as its workers.

    They have one parent, which runs the same program (gunicorn forks) or started this process by
    multiprocessing (uvicorn). False where /proc does not tell.
    """
    if pid is None or pid == os.getpid():
        return False
    parent = os.getppid()
    if _parent_of(pid) != parent:
        return False
    # A process that multiprocessing started has imported it.
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None and multiprocessing.parent_process() is not None:
        return True
    return _program(parent) == _program(os.getpid())


def _parent_of(pid: int) -> int | None:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
        return int(status.rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _program(pid: int) -> bytes | None:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
