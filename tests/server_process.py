"""A server as a user starts it: `python -m eventflow serve FILE` in its own process, its ready line
read, its API over TCP.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.conftest import DEADLINE, wait_until

ROOT = Path(__file__).parent.parent

SHOP = """
import asyncio, time
from pathlib import Path
from eventflow import App, Retry, current_run
from eventflow import flow, task
from triggers import Webhook

DIARY = Path(__file__).with_name("diary.txt")

def note(text):
    with DIARY.open("a") as diary:
        diary.write(text + "\\n")

@task
async def double(total: float) -> float:
    note(f"double {total}")
    return total * 2

@task
async def rest(seconds: float) -> str:
    note("resting")
    await asyncio.sleep(seconds)
    note("rested")
    return "rested"

@task
async def block(seconds: float) -> str:
    time.sleep(seconds)
    return "blocked"

@task
async def compute(seconds: float) -> int:
    end, total = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        total += sum(range(100))
    return total

@task(retries=Retry(attempts=2, delay=0.01))
async def fail(message: str) -> None:
    raise ValueError(message)

@flow
async def handle(total: float) -> dict:
    print(f"handling {total}")
    return {"score": await double(total)}

@flow
async def sleepy(seconds: float) -> str:
    await double(1)
    return await rest(seconds)

@flow
async def blocking(seconds: float) -> str:
    return await block(seconds)

@flow
async def computing(seconds: float) -> bool:
    return await compute(seconds) > 0

@flow
async def failing(message: str) -> None:
    await fail(message)

app = App("shop")
app.on(Webhook("/orders", verify="none", id="id"), handle, where={"total": [{"numeric": [">", 0]}]})
app.on("thing.made", handle)
for each in (sleepy, blocking, computing, failing):
    app.add(each)
"""


def environment(**more: str) -> dict[str, str]:
    """This process's, without the developer's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EVENTFLOW_")}
    return {**kept, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", **more}


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "eventflow", *args]


def eventflow(
    folder: Path, *args: str, timeout: float = 60, **env: str
) -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    return subprocess.run(
        command(*args),
        cwd=folder,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


class RunningServer:
    """A running server."""

    def __init__(
        self, folder: Path, process: subprocess.Popen[str], ready: dict[str, Any], log: Path
    ) -> None:
        self.folder, self.process, self.ready, self._log = folder, process, ready, log
        self.url: str = ready["url"]
        self.store = Path(ready["store"].removeprefix("sqlite:///"))
        token = Path(f"{self.store}.token")
        self.token = token.read_text().strip() if token.exists() else ""
        self.client = httpx2.Client(
            base_url=self.url, headers={"authorization": f"Bearer {self.token}"}, timeout=DEADLINE, trust_env=False,
            verify=False,
        )  # fmt: skip

    def get(self, path: str, **params: Any) -> Any:
        answer = self.client.get(path, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: Any = None, **headers: str) -> httpx2.Response:
        return self.client.post(path, json=body, headers=headers)

    def start(self, flow: str, **params: Any) -> str:
        answer = self.post("/api/runs", {"flow": flow, "params": params})
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]

    def wait_for(self, run: str, *states: str) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def there() -> bool:
            found.update(self.get(f"/api/runs/{run}"))
            return found["state"] in states

        wait_until(there, f"run {run} is {' or '.join(states)}")
        return found

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def diary(self) -> list[str]:
        path = self.folder / "diary.txt"
        return path.read_text().splitlines() if path.exists() else []

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = DEADLINE) -> int:
        self.client.close()
        return self.process.wait(timeout)

    def end(self) -> None:
        """Ends it, whatever became of it."""
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()


def start(
    folder: Path,
    *args: str,
    file: str = "shop.py",
    pass_fds: Sequence[int] = (),
    limits: Any = None,
) -> RunningServer:
    """Starts it and waits for the ready line; fails with its log when there is none."""
    target = folder / file.partition(":")[0]
    if not target.exists():
        target.write_text(SHOP)
    log = folder / "serve.log"
    port = () if "--fd" in args or "--port" in args else ("--port", "0")
    with log.open("a") as errors:
        process = subprocess.Popen(
            command("serve", file, *port, *args), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=errors,
            text=True, pass_fds=pass_fds, preexec_fn=limits,  # noqa: PLW1509 (a limit set between fork and exec, no locks)
        )  # fmt: skip
    line = _ready_line(process)
    if not line:
        process.kill()
        pytest.fail(f"the server did not get ready: {process.wait()}\n{log.read_text()}")
    return RunningServer(folder, process, json.loads(line), log)


def _ready_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 0.1)[0]:
            return process.stdout.readline()
        if process.poll() is not None:
            return ""
    return ""


@contextmanager
def serving(folder: Path, *args: str, **options: Any) -> Iterator[RunningServer]:
    """A server for the length of a test, ended whatever became of it."""
    served = start(folder, *args, **options)
    try:
        yield served
    finally:
        served.end()
