"""A server that ends, or cannot start, leaves alone what belongs to the one that runs."""

import json
import signal
from pathlib import Path

import pytest

from tests.server_process import EventflowProcess, eventflow, serving


def _state(store: Path) -> dict[str, tuple[int, bytes]]:
    """Inode and content of the files that only the server which runs may write."""
    return {
        end: ((found := Path(f"{store}{end}")).stat().st_ino, found.read_bytes())
        for end in (".server", ".token")
    }


FAILS = {
    "the store is open": [],
    "its port is taken": ["--port", "{port}"],
    "its certificate is missing": ["--tls-cert", "none.pem", "--tls-key", "none.key"],
    "it may not listen there": ["--host", "0.0.0.0"],
}


@pytest.mark.parametrize("how", FAILS)
def test_a_server_that_cannot_start_changes_no_file_of_another(tmp_path: Path, how: str):
    """Whatever keeps a second server on one store from starting, address and token of the first
    stay as they are, the first answers, and the command line finds it.
    """
    with serving(tmp_path) as first:
        before = _state(first.store)
        given = [each.format(port=first.url.rpartition(":")[2]) for each in FAILS[how]]
        second = EventflowProcess(tmp_path, "shop.py", *given)
        try:
            assert second.wait() not in (0, -signal.SIGKILL), second.log_tail
        finally:
            second.kill()
        assert _state(first.store) == before
        run = first.start("handle", total=3)
        first.wait_for(run, "completed")
        shown = eventflow(tmp_path, "ls", "--json", "--store", str(first.store))
        assert shown.returncode == 0 and run in shown.stdout, shown.stderr


def test_a_server_that_lost_its_store_leaves_its_successor_alone(tmp_path: Path):
    """The files of a server that stands still are removed, and another one starts at the same path.
    When the first goes on and stops (74), the address of the second stays.
    """
    with serving(tmp_path) as first:
        first.signal(signal.SIGSTOP)
        for each in first.store.parent.glob("shop.db*"):
            each.unlink()
        with serving(tmp_path) as second:
            before = _state(second.store)
            first.signal(signal.SIGCONT)
            assert first.wait(20) == 74, first.log_tail
            assert _state(second.store) == before
            assert json.loads(before[".server"][1])["pid"] == second.process.pid
            second.wait_for(second.start("handle", total=3), "completed")
            assert second.stop() == 0
            assert not Path(f"{second.store}.server").exists()
