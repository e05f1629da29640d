"""The lives of one store: boots of gates.py on the same folder, and the one outcome that an event
must have in the end.

test_seams.py and test_faults.py take `lives` from conftest.py.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from tests.conftest import wait_until
from tests.crash.victim import HERE, Server

APP = HERE / "gates.py"
EVENT, DATA = "e-1", {"n": 4}
RESULT = 50


class Lives:
    """One folder's boots, one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.boots = 0
        self.server: Server | None = None

    def boot(self, gate: str = "", *options: str, **more: str) -> Server:
        self.end()
        self.boots += 1
        env = {"GATE": gate, "CRASH_THREADS": str(self.folder / "threads"), **more}
        self.server = Server(APP, self.folder, self.boots, options=options, env=env)
        assert self.server.wait_ready(), self.server.log_tail
        return self.server

    def end(self) -> None:
        if self.server is not None:
            self.server.kill()
            self.server = None

    @property
    def reached(self) -> list[str]:
        path = self.folder / "reached"
        return path.read_text().splitlines() if path.exists() else []

    def bodies(self) -> list[tuple[str, int, int]]:
        """Idempotency key, attempt and boot of every body that began."""
        path = self.folder / "effects"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(key, int(attempt), int(boot)) for key, attempt, boot, _ in map(str.split, lines)]

    def ran(self) -> Counter[str]:
        return Counter(key.rpartition("/")[2].partition("#")[0] for key, _, _ in self.bodies())


def at_rest(server: Server) -> bool:
    return server.get("/api/counts")["pending"] == 0


def settled_once(server: Server, ident: str = EVENT, result: object = RESULT) -> dict[str, Any]:
    """One event, one run, completed with the right result; the sums hold."""
    wait_until(lambda: at_rest(server), "everything is at rest")
    event = server.get(f"/api/events/{ident}")
    (run,) = event["runs"]
    whole = server.get(f"/api/runs/{run['id']}")
    assert (whole["state"], whole["result"]) == ("completed", result), whole
    counts = server.get("/api/counts")
    parts = sum(
        counts[name]
        for name in ("completed", "failed", "dead", "cancelled", "suppressed", "pending")
    )
    assert counts["accepted"] == parts == counts["completed"]
    return whole
