"""What the demo works with: a folder, a server process in it, and the senders of its events.

scenario.py calls it. The server is reached only as users reach it: by HTTP, files and signals.
"""

import base64
import hashlib
import hmac
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import orjson

from eventflow.core.clock import SECOND, Clock
from eventflow.core.errors import EventflowError

SHOP = Path(__file__).with_name("app") / "shop.py"

TIMEOUT_SECONDS = 30.0
"""For each request and wait; long enough for a busy machine."""


class DemoFailed(EventflowError):
    """A step of the demo did not happen."""


class DemoServer:
    """`eventflow serve shop.py`, ready when constructed. DemoFailed when it does not start."""

    def __init__(self, folder: Path, env: dict[str, str], port: int, log: Path) -> None:
        with log.open("ab") as errors:
            serve = [sys.executable, "-m", "eventflow", "serve", "shop.py"]
            self._process = subprocess.Popen(
                [*serve, "--port", str(port), "--log", "json"],
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # a Ctrl-C in the terminal is for the demo
            )
        self.ended = False
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._end()
            raise DemoFailed("the server did not start")
        self.pid: int = self._process.pid
        self.url = str(orjson.loads(line)["url"])
        self.port = int(self.url.rpartition(":")[2])

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._end()

    def stop(self) -> int:
        """Send SIGTERM and wait. The exit code."""
        self._process.terminate()
        return self._end()

    def _end(self) -> int:
        self.ended = True
        code = self._process.wait(TIMEOUT_SECONDS)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code


class DemoEnvironment:
    """The folder, the server, and the senders. `answers` counts the HTTP status of every post."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.folder = Path(tempfile.mkdtemp(prefix="eventflow-demo-"))
        self.landing = self.folder / "landing"
        self.log = self.folder / "server.log"
        self.landing.mkdir()
        shutil.copy(SHOP, self.folder / "shop.py")
        self.answers: Counter[int] = Counter()
        self.files = 0
        self._key = secrets.token_bytes(24)
        self._env = {
            name: value for name, value in os.environ.items() if not name.startswith("EVENTFLOW_")
        }
        self._env["EVENTFLOW_STORE"] = "sqlite:///shop.db"
        self._env["DEMO_SECRET"] = "whsec_" + base64.b64encode(self._key).decode()
        self._http = httpx2.Client(timeout=TIMEOUT_SECONDS)
        self._url = ""
        self._server: DemoServer | None = None

    def start(self, port: int = 0) -> DemoServer:
        self._server = DemoServer(self.folder, self._env, port, self.log)
        self._url = self._server.url
        return self._server

    def close(self, *, keep: bool) -> None:
        """Kill the server if it runs; remove the folder unless `keep`."""
        if self._server is not None and self._server.alive:
            self._server.kill()
        self._http.close()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    # ----------------------------------------------------------------- senders

    def post_order(self, message: str, data: Any, *, forged: bool = False) -> int:
        """Post a signed order, as a Standard Webhooks sender. The status; 0 after a kill."""
        body = orjson.dumps(data)
        now = str(self._clock.now() // SECOND)
        key = b"a forger's" if forged else self._key
        sign = base64.b64encode(
            hmac.digest(key, f"{message}.{now}.".encode() + body, hashlib.sha256)
        ).decode()
        headers = {
            "webhook-id": message,
            "webhook-timestamp": now,
            "webhook-signature": f"v1,{sign}",
        }
        return self._post("/hooks/orders", body, {**headers, "content-type": "application/json"})

    def post_alert(self, ident: str, data: Any) -> int:
        """Post a drift alert as a CloudEvent. The status."""
        event = {
            "specversion": "1.0",
            "id": ident,
            "source": "/monitor",
            "type": "drift.detected",
            "data": data,
        }
        return self._post(
            "/api/events",
            orjson.dumps(event),
            {"content-type": "application/cloudevents+json", **self._token()},
        )

    def drop_file(self, name: str, prices: Sequence[float]) -> None:
        """Write a CSV file into the watched folder."""
        (self.landing / name).write_text("price\n" + "".join(f"{price}\n" for price in prices))
        self.files += 1

    def _post(self, path: str, body: bytes, headers: dict[str, str]) -> int:
        try:
            status = self._http.post(self._url + path, content=body, headers=headers).status_code
        except httpx2.TransportError as error:
            if self._server is not None and self._server.ended:
                return 0
            raise DemoFailed(f"POST {path}: no answer: {error}") from None
        self.answers[status] += 1
        return status

    # ----------------------------------------------------------------- results

    def get(self, path: str, **params: str | int) -> Any:
        """The JSON of an API route; DemoFailed when it is no 200."""
        try:
            reply = self._http.get(self._url + path, params=params, headers=self._token())
        except httpx2.TransportError as error:
            raise DemoFailed(f"GET {path}: no answer: {error}") from None
        if reply.is_error:
            raise DemoFailed(f"GET {path}: expected 200, found {reply.status_code}: {reply.text}")
        return reply.json()

    def runs(self, **params: str) -> list[dict[str, Any]]:
        return self.get("/api/runs", limit=1000, **params)["runs"]

    def tasks(self, run: str) -> list[dict[str, Any]]:
        return self.get(f"/api/runs/{run}")["tasks"]

    def body_starts(self) -> list[dict[str, Any]]:
        """The lines that task bodies wrote when they started, killed ones included."""
        path = self.folder / "bodies.jsonl"
        return (
            [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
        )

    def count_started(self, task: str) -> int:
        return sum(body["task"] == task for body in self.body_starts())

    def flaky_call(self) -> dict[str, Any]:
        """The task call that fails twice, as the API shows it."""
        (run,) = self.get("/api/events/msg-3")["runs"]
        return next(
            (call for call in self.tasks(run["id"]) if call["name"] == "score"),
            {"state": "not started"},
        )

    def log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-12:]) or "(none)"

    def run_command(self, *words: str) -> str:
        """The output of an eventflow command; DemoFailed when it fails."""
        done = subprocess.run(
            [sys.executable, "-m", "eventflow", *words],
            cwd=self.folder,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        if done.returncode:
            raise DemoFailed(
                f"eventflow {' '.join(words)}: exit {done.returncode}: {done.stderr.strip()}"
            )
        return done.stdout

    def wait_until(self, condition: Callable[[], object], description: str) -> None:
        """Poll the condition; DemoFailed after TIMEOUT_SECONDS or when the server ends."""
        deadline = self._clock.monotonic() + TIMEOUT_SECONDS
        while not condition():
            if self._server is not None and not self._server.alive:
                raise DemoFailed(f"the server ended while waiting until {description}")
            if self._clock.monotonic() > deadline:
                raise DemoFailed(f"waited {TIMEOUT_SECONDS:g} s in vain until {description}")
            time.sleep(0.02)

    def _token(self) -> dict[str, str]:
        return {"authorization": f"Bearer {(self.folder / 'shop.db.token').read_text().strip()}"}
