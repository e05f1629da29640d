"""`eventflow serve` from outside: its ready line, its shutdowns; neither a blocked flow nor a slow
client stops intake.
"""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from tests.conftest import wait_until
from tests.server_process import eventflow, serving, start

FREE_PORT = ("--port", "0")


def test_ready_line(tmp_path: Path):
    """One JSON line on stdout has the URL, once the server answers there; token and address file
    lie beside the store, mode 0600.
    """
    with serving(tmp_path) as served:
        assert set(served.ready_line) == {"ready", "url", "pid", "store"}
        assert served.ready_line["ready"] is True and served.ready_line["pid"] == served.process.pid
        assert served.store == tmp_path / ".eventflow" / "shop.db"
        assert served.client.get("/readyz").status_code == 200
        token = Path(f"{served.store}.token")
        sidecar = Path(f"{served.store}.server")
        assert token.stat().st_mode & 0o777 == sidecar.stat().st_mode & 0o777 == 0o600
        assert json.loads(sidecar.read_text()) == {"url": served.url, "pid": served.process.pid}
        assert "token was created" in served.log and served.token not in served.log
        assert served.stop() == 0
        assert not sidecar.exists() and token.exists()
        assert served.process.stdout is not None and served.process.stdout.read() == ""


def test_webhook_to_result(tmp_path: Path):
    """A webhook's 202 names the event; the API shows its run, task and result; a repeated event
    starts nothing.
    """
    with serving(tmp_path) as served:
        first = served.post("/hooks/orders", {"id": "o-1", "total": 5})
        assert first.status_code == 202
        again = served.post("/hooks/orders", {"id": "o-1", "total": 5})
        assert (again.status_code, again.json()["duplicate"], again.json()["id"]) == (
            200,
            True,
            first.json()["id"],
        )
        (run,) = served.get("/api/events/o-1")["runs"]
        found = served.wait_for(run["id"], "completed")
        assert found["result"] == {"score": 10.0}
        assert [(task["name"], task["state"], task["attempts"]) for task in found["tasks"]] == [
            ("double", "completed", 1)
        ]
        wait_until(
            lambda: served.get(f"/api/runs/{run['id']}/logs")["lines"], "the run's line is kept"
        )
        (line,) = served.get(f"/api/runs/{run['id']}/logs")["lines"]
        assert line["event"] == "handling 5.0"
        counts = served.get("/api/counts")
        assert (counts["accepted"], counts["completed"], counts["duplicates"]) == (1, 1, 1)


# --------------------------------------------------------------------------- ends


def test_sigterm_lets_attempts_finish(tmp_path: Path):
    """SIGTERM: new events are refused, running attempts end and are recorded, exit 0."""
    with serving(tmp_path) as served:
        run = served.start("sleepy", seconds=1.5)
        wait_until(lambda: "resting" in served.diary, "the body runs")
        served.signal(signal.SIGTERM)
        wait_until(lambda: served.client.get("/readyz").status_code == 503, "it drains")
        refused = served.post("/hooks/orders", {"id": "late", "total": 1})
        assert refused.status_code == 503
        assert refused.headers["connection"] == "close" and int(refused.headers["retry-after"]) > 0
        assert (
            served.post("/api/runs", {"flow": "handle", "params": {"total": 1}}).status_code == 503
        )
        assert served.get(f"/api/runs/{run}")["state"] == "running"
        assert served.wait() == 0
        assert served.diary[-1] == "rested"
    with serving(tmp_path) as served:
        assert served.wait_for(run, "completed")["result"] == "rested"
        assert served.diary.count("resting") == 1


def test_sigterm_interrupts_what_outlasts_the_grace(tmp_path: Path):
    """An attempt that outlasts --grace is recorded as interrupted, not failed; the next process
    resumes its run.
    """
    with serving(tmp_path, "--grace", "0.3") as served:
        run = served.start("sleepy", seconds=5)
        wait_until(lambda: "resting" in served.diary, "the body runs")
        begun = time.monotonic()
        assert served.stop() == 0
        assert time.monotonic() - begun < 5
    with serving(tmp_path) as served:
        row = served.get(f"/api/runs/{run}")
        assert row["state"] in ("running", "pending") and row["error"] is None
        wait_until(lambda: served.diary.count("resting") == 2, "the body runs again")
        assert served.diary.count("double 1") == 1


def test_sigterm_with_a_blocked_flow_loop(tmp_path: Path):
    """A flow that blocks its loop cannot keep the process: it ends within grace + 5 s, with 0."""
    with serving(tmp_path, "--grace", "0.2") as served:
        served.start("blocking", seconds=60)
        wait_until(lambda: '"loop.blocked"' in served.log, "the loop is blocked")
        begun = time.monotonic()
        assert served.stop() == 0
        assert time.monotonic() - begun < 5.2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_second_signal(tmp_path: Path, number: int, code: int):
    """A second signal ends the process at once."""
    with serving(tmp_path) as served:
        served.start("sleepy", seconds=60)
        wait_until(lambda: "resting" in served.diary, "the body runs")
        served.signal(number)
        wait_until(lambda: served.client.get("/readyz").status_code == 503, "it drains")
        begun = time.monotonic()
        served.signal(number)
        assert served.wait() == code
        assert time.monotonic() - begun < 2


def test_kill_and_restart(tmp_path: Path):
    """After kill -9 the next process resumes the runs in flight; recorded values are not computed
    again.
    """
    served = start(tmp_path)
    run = served.start("sleepy", seconds=0.5)
    wait_until(lambda: "resting" in served.diary, "the body runs")
    served.kill()
    with serving(tmp_path) as again:
        found = again.wait_for(run, "completed")
        assert found["attempts"] == 2 and found["result"] == "rested"
        assert again.diary.count("double 1") == 1 and again.diary.count("resting") == 2
        assert again.client.get("/healthz").status_code == 200


def test_storage_error_stops_the_process(tmp_path: Path):
    """When the store cannot be written: no 2xx, one line with the reason, exit 74 (here: the file
    may not grow).
    """

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    with serving(tmp_path, limits=little) as served:
        answers: list[int] = []

        def dead() -> bool:
            with suppress(httpx2.TransportError):
                order = {"id": str(len(answers)), "total": -1, "x": "y" * 50_000}
                answers.append(served.post("/hooks/orders", order).status_code)
            return served.process.poll() is not None

        wait_until(dead, "it stops")
        assert served.wait() == 74
        assert set(answers) <= {202, 503}
        (line,) = [line for line in served.log.splitlines() if '"store.failed"' in line]
        assert json.loads(line)["level"] == "error"


# --------------------------------------------------------------------------- starts that fail


def test_port_taken(tmp_path: Path):
    """A taken port is reported in one line, with 69, before the store is opened."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        (tmp_path / "app.py").write_text("from eventflow import App\napp = App('a')\n")
        done = eventflow(tmp_path, "serve", "app.py", "--port", str(other.getsockname()[1]))
    assert done.returncode == 69
    assert (
        "is taken by another process" in done.stderr
        and "--port" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / ".eventflow" / "a.db").exists()


def test_store_locked(tmp_path: Path):
    """A second process on one store exits 75 and names the first pid, on another port and on the
    same one.
    """
    with serving(tmp_path) as served:
        port = served.url.rpartition(":")[2]
        for args in (FREE_PORT, ("--port", port)):
            done = eventflow(tmp_path, "serve", "shop.py", *args)
            assert done.returncode == 75, done.stderr
            assert f"process {served.process.pid}" in done.stderr
        assert served.client.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--host", "0.0.0.0"), 2, "--insecure-http"),
        (("--host", "0.0.0.0", "--insecure-http", "--no-auth"), 2, "loopback"),
        (("--tls-cert", "x.pem"), 2, "--tls-key"),
        (("--store", "mysql:///x"), 2, "sqlite:///"),
        (("--store", "sqlite:////proc/nowhere/x.db"), 73, "cannot create or write"),
        (("--fd", "77"), 2, "expected a socket"),
    ],
)
def test_refuses_to_start(tmp_path: Path, args: tuple[str, ...], code: int, message: str):
    """Settings that would expose the API, or cannot work, are refused in one line with their exit
    code.
    """
    (tmp_path / "app.py").write_text("from eventflow import App\napp = App('a')\n")
    done = eventflow(tmp_path, "serve", "app.py", *FREE_PORT, *args)
    assert done.returncode == code and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_read_only_directory(tmp_path: Path):
    """A store in a directory that cannot be written exits 73."""
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "app.py").write_text("from eventflow import App\napp = App('a')\n")
    (tmp_path / "shut").mkdir(mode=0o500)
    done = eventflow(tmp_path, "serve", "app.py", *FREE_PORT, "--store", "sqlite:///shut/x.db")
    assert done.returncode == 73 and "cannot create or write" in done.stderr


def test_no_auth_and_wide_bind(tmp_path: Path):
    """--no-auth on loopback requires no token; --insecure-http allows other addresses, with a
    token.
    """
    with serving(tmp_path, "--no-auth", "--open-metrics") as served:
        assert httpx2.get(f"{served.url}/api/counts", trust_env=False).status_code == 200
        assert "eventflow_deliveries" in httpx2.get(f"{served.url}/metrics", trust_env=False).text
        served.stop()
    with serving(tmp_path, "--host", "0.0.0.0", "--insecure-http") as served:
        assert served.url.startswith("http://127.0.0.1:")
        assert httpx2.get(f"{served.url}/api/counts", trust_env=False).status_code == 401
        assert served.get("/api/counts")


def test_inherited_socket(tmp_path: Path):
    """--fd takes an inherited listening socket: connections made before the server is up are
    answered.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        answers: list[int] = []

        def early() -> None:
            answers.append(httpx2.get(f"{url}/healthz", timeout=30, trust_env=False).status_code)

        client = threading.Thread(target=early)
        client.start()
        with serving(tmp_path, "--fd", str(sock.fileno()), pass_fds=[sock.fileno()]) as served:
            client.join(20)
            assert served.url == url and answers == [200]


# --------------------------------------------------------------------------- isolation


def test_a_blocked_flow_does_not_stop_intake(tmp_path: Path):
    """While a flow blocks its loop, webhooks and /healthz answer within 250 ms, and the log names
    the blocking line.
    """
    with serving(tmp_path) as served:
        run = served.start("blocking", seconds=3)
        wait_until(lambda: served.get(f"/api/runs/{run}")["state"] == "running", "it blocks")
        slowest = 0.0
        for number in range(20):
            begun = time.monotonic()
            assert served.post("/hooks/orders", {"id": f"b{number}", "total": 1}).status_code == 202
            assert served.client.get("/healthz").status_code == 200
            slowest = max(slowest, (time.monotonic() - begun) / 2)
        assert slowest < 0.25
        wait_until(lambda: '"loop.blocked"' in served.log, "the watchdog tells")
        (line,) = [json.loads(line) for line in served.log.splitlines() if '"loop.blocked"' in line]
        assert (
            line["loop"] == "flows"
            and line["stack"].endswith(" block")
            and "shop.py:" in line["stack"]
        )
        assert (line["run"], line["flow"], line["level"]) == (run, "blocking", "warning")
        served.wait_for(run, "completed")


def test_a_computing_flow_gives_up_the_interpreter_in_time(tmp_path: Path):
    """While a flow computes in plain Python a webhook is answered within 35 ms, apart from the
    machine's pauses; with Python's own switch interval of 5 ms it would take 50.
    """
    with serving(tmp_path) as served:
        run = served.start("computing", seconds=5)
        wait_until(lambda: served.get(f"/api/runs/{run}")["state"] == "running", "it computes")
        spans: list[float] = []
        while len(spans) < 60 and served.get(f"/api/runs/{run}")["state"] == "running":
            begun = time.monotonic()
            assert (
                served.post("/hooks/orders", {"id": f"c{len(spans)}", "total": 1}).status_code
                == 202
            )
            spans.append(time.monotonic() - begun)
        assert len(spans) >= 20 and sorted(spans)[len(spans) // 4] < 0.035


def test_a_stopped_process_is_no_blocked_loop(tmp_path: Path):
    """After SIGSTOP and SIGCONT no loop is logged as blocked, and work continues."""
    with serving(tmp_path) as served:
        served.signal(signal.SIGSTOP)
        done = threading.Event()
        threading.Timer(2.5, lambda: (served.signal(signal.SIGCONT), done.set())).start()
        assert done.wait(10)
        run = served.start("sleepy", seconds=1.5)  # long enough for the watchdog to look again
        served.wait_for(run, "completed")
        assert '"loop.blocked"' not in served.log


def test_slow_heads_and_large_heads_are_cut_off(tmp_path: Path):
    """A request head that never ends is cut off at 64 KiB or 10 s; meanwhile others are served."""
    with serving(tmp_path) as served:
        host, port = served.url.removeprefix("http://").split(":")
        there = (host, int(port))
        with (
            socket.create_connection(there, timeout=20) as slow,
            socket.create_connection(there) as wide,
        ):
            slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
            begun = time.monotonic()
            wide.sendall(b"GET /healthz HTTP/1.1\r\nx: " + b"y" * 70_000)
            wide.settimeout(20)
            assert b" 431 " in wide.recv(1000)
            assert served.client.get("/healthz").status_code == 200
            assert b" 408 " in slow.recv(1000)
            assert 8 < time.monotonic() - begun < 15


def test_tls(tmp_path: Path):
    """With a certificate the server speaks HTTPS, with Strict-Transport-Security."""
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificate with openssl")
    arguments = (
        "req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
        " -keyout key.pem -out cert.pem"
    ).split()
    subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True)
    with serving(tmp_path, "--tls-cert", "cert.pem", "--tls-key", "key.pem") as served:
        answer = served.client.get("/healthz")
        assert served.url.startswith("https://") and answer.status_code == 200
        assert "max-age" in answer.headers["strict-transport-security"]
