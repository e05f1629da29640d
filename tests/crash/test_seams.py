"""kill -9 at each numbered seam of the data's way, K1 to K17, and what a restart shows.

gates.py stops the server where the user's code stands: its filter, its flow, its bodies. Where no
code of the user's stands, between the rows and the answer, strace kills the store's writer thread
as it enters the call that makes the seam. After each kill the sender sends again, as real ones do,
and every seam ends alike: one event, one run, the right result. K15 is an emitted event, published
by the commit that records it; K16 its letter, taken by a sink and not marked yet.
"""

import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import wait_until
from tests.crash.lives import APP, DATA, EVENT, Lives, settled_once
from tests.crash.syscalls import attach, can_trace
from tests.crash.victim import NoAnswer, Server
from tests.server_process import EventflowProcess, serving

# --------------------------------------------------------------------------- before the commit


def test_p1_k1_a_kill_in_mid_request_leaves_nothing(lives: Lives):
    """K1: half a body was read. Nothing is recorded; the sender's next try is the first."""
    server = lives.boot()
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port)) as sock:
        sock.sendall(
            b"POST /hooks/steps HTTP/1.1\r\nhost: localhost\r\nwebhook-id: e-1\r\n"
            b"content-length: 8\r\n\r\n{"
        )
        server = lives.boot()
    assert server.get("/api/counts")["events"] == 0
    status, body, _ = server.send(EVENT, DATA, "steps")
    assert (status, body["duplicate"]) == (202, False)
    settled_once(server)


def test_p1_k2_a_kill_before_the_transaction_leaves_nothing(lives: Lives):
    """K2: verified, parsed and being matched. Nothing is recorded; the sender's next try is the
    first.
    """
    server = lives.boot("parsed")
    with pytest.raises(NoAnswer):
        _send_and_kill(lives, server, "parsed")
    server = lives.boot()
    assert server.get("/api/counts")["events"] == 0
    assert server.send(EVENT, DATA, "steps")[0] == 202
    settled_once(server)


def _send_and_kill(lives: Lives, server: Server, gate: str) -> None:
    """Sends without waiting for the answer; kills when the gate is reached; reads the answer that
    cannot come.
    """
    sender = subprocess.Popen(
        [
            "python3",
            "-c",
            "import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], "
            "sys.argv[2].encode(), "
            "{'content-type': 'application/json', 'webhook-id': sys.argv[3]}))",
            f"{server.url}/hooks/steps",
            json.dumps(DATA),
            EVENT,
        ],
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: gate in lives.reached, f"the gate {gate!r} is reached")
    server.kill()
    if sender.wait(10) != 0:
        raise NoAnswer("no answer")


SYSCALL_SEAMS = {
    "K3 BEGIN": ("pwrite64", 1, {0}),
    "K4 rows half written": ("pwrite64", 2, {0}),
    "K5 fdatasync": ("fdatasync", 1, {0, 1}),
    "K6 commit returned": ("write", 1, {1}),
}
"""Seam: the writer's call to kill at, its ordinal, and how many events the restart may show. Its
only plain writes are those that wake a loop.
"""


@pytest.mark.skipif(not can_trace(), reason="strace is not here, or may not trace")
@pytest.mark.parametrize("seam", SYSCALL_SEAMS)
def test_p1_k3_to_k6_a_kill_around_the_commit(lives: Lives, seam: str):
    """K3 to K6: no answer was given. Absent before the commit, present after it, either at its
    fsync; never twice.
    """
    call, ordinal, may = SYSCALL_SEAMS[seam]
    server = lives.boot()
    wait_until(lambda: _is_marked(server), "the writer has done what a start gives it to do")
    writer = json.loads((lives.folder / "threads").read_text())["eventflow-store"]
    inject = f"inject={call}:signal=KILL:when={ordinal}"
    tracer = attach(server, ["-o", os.devnull, "-e", f"trace={call}", "-e", inject], writer)
    with pytest.raises(NoAnswer):
        server.send(EVENT, DATA, "steps")
    tracer.wait()
    server = lives.boot()
    found = sum(
        event["event_id"] == EVENT for event in server.get("/api/events")["events"]
    )  # its run may have emitted another
    assert found in may
    status, body, _ = server.send(EVENT, DATA, "steps")
    assert (status, body["duplicate"]) == ((200, True) if found else (202, False))
    settled_once(server)
    assert lives.ran() == {"first": 1, "second": 1}


def _is_marked(server: Server) -> bool:
    """Whether the high-water mark, which the writer sets when it has nothing else to do, is no
    older than the last commit.
    """
    mark, wal = (Path(f"{server.store}{end}").stat().st_mtime_ns for end in (".hwm", "-wal"))
    return mark >= wal


# --------------------------------------------------------------------------- after the answer


def test_p1_k7_a_kill_right_after_the_answer(lives: Lives):
    """K7: the 2xx is out and nothing else was done. The event is there, its sender's next try a
    duplicate, its run runs.
    """
    server = lives.boot()
    status, first, _ = server.send(EVENT, DATA, "steps")
    server.kill()
    assert status == 202
    server = lives.boot()
    status, again, _ = server.send(EVENT, DATA, "steps")
    assert (status, again["duplicate"], again["id"]) == (200, True, first["id"])
    settled_once(server)
    assert server.send(EVENT, {"n": 5}, "steps")[0] == 409
    assert server.get(f"/api/events/{EVENT}")["duplicates"] == 1


GATES = {
    "K8 claimed": ("claimed", {"first": 1, "second": 1}, 1),
    "K10 body runs": ("body runs", {"first": 2, "second": 1}, 1),
    "K11 effect done": ("effect done", {"first": 2, "second": 1}, 2),
    "K11 value came": ("value came", {"first": 2, "second": 1}, 2),
    "K12 K13 next task": ("next task", {"first": 1, "second": 2}, 1),
    "K15 published": ("emitted", {"first": 1, "second": 1}, 1),
}
"""Seam: its gate, how often each body begins in all, and how often `first` has its effect."""


@pytest.mark.parametrize("seam", GATES)
def test_p2_p4_k8_to_k15_a_kill_on_the_way_through(lives: Lives, seam: str):
    """K8 to K13: what was not recorded runs again, with the same idempotency key and no failure
    counted; what was recorded never does. What was emitted is there once.
    """
    gate, ran, effects = GATES[seam]
    server = lives.boot(gate)
    assert server.send(EVENT, DATA, "steps")[0] == 202
    wait_until(lambda: gate in lives.reached, f"the gate {gate!r} is reached")
    server = lives.boot()
    whole = settled_once(server)
    assert lives.ran() == ran
    assert [line for line in lives.reached if line.startswith("did ")] == [
        f"did {whole['id']}/first#0"
    ] * effects
    assert {attempt for _, attempt, _ in lives.bodies()} == {1}
    (emitted,) = server.get("/api/events?type=stepped")["events"]
    assert emitted["runs_started"] == 1


def test_row_2_k9_a_crash_counts_when_its_start_was_journaled_and_is_cleared(lives: Lives):
    """K9: the first death of a body is nobody's fault. From the second life on its start is on
    record, and each death counts, once; lives that end in their own start count nothing. One
    recorded value forgives them all.
    """
    server = lives.boot("body runs")
    server.send(EVENT, DATA, "steps")
    _body_began(lives, 1)
    for crashes in (1, 2):
        _killed_starts(lives, 2)
        server = lives.boot("body runs")
        _body_began(lives, crashes + 1)
        assert _run(server)["crash_count"] == crashes
    server = lives.boot()
    assert settled_once(server)["crash_count"] == 0
    assert lives.ran() == {"first": 4, "second": 1}


def _body_began(lives: Lives, times: int) -> None:
    wait_until(
        lambda: lives.reached.count("body runs") == times,
        f"the body of `first` began {times} times",
    )


def _run(server: Server) -> dict[str, object]:
    (run,) = server.get(f"/api/events/{EVENT}")["runs"]
    return server.get(f"/api/runs/{run['id']}")


def _killed_starts(lives: Lives, times: int) -> None:
    """Boots that die on their way to ready: fault 2."""
    lives.end()
    for n in range(times):
        lives.boots += 1
        server = Server(APP, lives.folder, lives.boots, env={"GATE": "body runs"})
        server.wait_ready(0.2 + 0.1 * n)
        server.kill()


def test_p2_k14_a_kill_right_after_the_end(lives: Lives):
    """K14: the run is settled. It stays so: nothing of it runs again."""
    server = lives.boot()
    server.send(EVENT, DATA, "steps")
    settled_once(server)
    before = lives.bodies()
    server = lives.boot()
    assert settled_once(server)["attempts"] == 1
    assert lives.bodies() == before


MAKER = """
import asyncio
from pathlib import Path
from eventflow import App, emit
from eventflow import flow

class Notebook:
    name = "notebook"

    async def send(self, *letters):
        with open("sent", "a") as sent:
            sent.writelines(letter.event.id + "\\n" for letter in letters)
        while not Path("go").exists():  # the letters have arrived, and nobody knows yet
            await asyncio.sleep(0.01)

    async def close(self): ...

@flow
async def make(n: int) -> None:
    await emit("made", {"n": n})

app = App("maker")
app.add(make)
app.send("made", Notebook())
"""


def test_p2_k16_a_kill_after_a_sink_has_a_message(tmp_path: Path):
    """K16: the sink has it, the outbox does not know. It is sent once more, under the same id, and
    then no more.
    """
    (tmp_path / "maker.py").write_text(MAKER)
    sent = tmp_path / "sent"
    with serving(tmp_path, file="maker.py") as server:  # ended by kill -9
        server.wait_for(server.start("make", n=1), "completed")
        wait_until(sent.exists, "the sink has the letter")
    (tmp_path / "go").touch()
    with serving(tmp_path, file="maker.py") as server:
        wait_until(lambda: _waiting(server) == 0, "the outbox is empty")
        server.wait_for(server.start("make", n=2), "completed")
        wait_until(
            lambda: _waiting(server) == 0 and len(sent.read_text().split()) == 3,
            "the next letter has gone too",
        )
        first, again, other = sent.read_text().split()
        assert first == again != other


def _waiting(server: EventflowProcess) -> int:
    (sink,) = server.get("/api/sinks")["sinks"]
    return sink["waiting"]


@pytest.mark.skipif(not can_trace(), reason="strace is not here, or may not trace")
@pytest.mark.parametrize("ordinal", [1, 3])
def test_p1_k17_a_kill_in_the_checkpoint(lives: Lives, ordinal: int):
    """K17: the WAL is being copied home, and half of it is. The next start finds everything."""
    server = lives.boot()
    server.send(EVENT, DATA, "steps")
    settled_once(server)
    inject = f"inject=pwrite64:signal=KILL:when={ordinal}"
    where = ["-f", "-P", str(server.store), "-o", os.devnull, "-e", "trace=pwrite64", "-e", inject]
    tracer = attach(server, where, server.process.pid)
    server.signal(signal.SIGTERM)
    assert server.wait() == -signal.SIGKILL
    tracer.wait()
    server = lives.boot()
    settled_once(server)
    assert lives.ran() == {"first": 1, "second": 1}
