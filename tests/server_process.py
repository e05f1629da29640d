"""A server as a user starts it: `python -m eventflow serve FILE` in a new process, reached by
TCP and signals.

`serving` is for tests that need one running server. Tests that kill servers, in tests/crash and
elsewhere, construct `EventflowProcess` (or victim.py's subclass) themselves, once for each start.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """The environment of this process without the developer's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EVENTFLOW_")}
    return {**kept, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", **more}


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "eventflow", *args]


def eventflow(
    folder: Path, *args: str, timeout: float = 60, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        command(*args),
        cwd=folder,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


class NoAnswer(httpx2.TransportError):
    """The connection failed: whether the request was handled is unknown."""


class EventflowProcess:
    """`eventflow serve TARGET`, from its start to its end; not ready when constructed.

    `before` is put in front of the command (strace). stderr goes to `folder/serve.log`, which all
    servers of a folder share.
    """

    command_name = "serve"

    def __init__(
        self,
        folder: Path,
        target: str,
        *options: str,
        before: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        limits: Callable[[], object] | None = None,
    ) -> None:
        self.folder = folder
        self.url = ""
        self.ready_line: dict[str, Any] = {}
        self.ready_after: float | None = None
        self._log = folder / "serve.log"
        self._client: httpx2.Client | None = None
        port = () if "--fd" in options or "--port" in options else ("--port", "0")
        with self._log.open("a") as errors:
            self.spawned = time.monotonic()
            self.process = subprocess.Popen(
                [*before, *command(self.command_name, target, *port, *options)],
                cwd=folder,
                env=environment(**(env or {})),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                pass_fds=pass_fds,
                preexec_fn=limits,  # noqa: PLW1509 (a limit set between fork and exec, no locks)
            )

    def wait_ready(self, within: float = 30.0) -> bool:
        """Wait up to `within` seconds for the ready line. False: it did not come."""
        assert self.process.stdout is not None
        if not self.url and select.select([self.process.stdout], [], [], max(0.0, within))[0]:
            line = self.process.stdout.readline()
            if line.endswith("\n"):
                self.ready_after = time.monotonic() - self.spawned
                self.ready_line = json.loads(line)
                self.url = self.ready_line["url"]
        return bool(self.url)

    @property
    def store(self) -> Path:
        return Path(self.ready_line["store"].removeprefix("sqlite:///"))

    @property
    def token(self) -> str:
        token = Path(f"{self.store}.token")
        return token.read_text().strip() if token.exists() else ""

    @property
    def client(self) -> httpx2.Client:
        """With the token, once the server is ready."""
        if self._client is None:
            self._client = httpx2.Client(
                base_url=self.url,
                headers={"authorization": f"Bearer {self.token}"},
                timeout=DEADLINE,
                trust_env=False,
                verify=False,
            )
        return self._client

    # ----------------------------------------------------------------- requests

    def get(self, path: str, **params: Any) -> Any:
        """The JSON of an API route. AssertionError when it is no 200; NoAnswer without one."""
        try:
            answer = self.client.get(path, params=params or None)
        except httpx2.TransportError as error:
            raise NoAnswer(str(error)) from error
        assert answer.status_code == 200, (path, answer.status_code, answer.text)
        return answer.json()

    def post(self, path: str, body: Any = None, **headers: str) -> httpx2.Response:
        return self.client.post(path, json=body, headers=headers)

    def send(
        self, ident: str, data: Any, path: str = "orders"
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Post one webhook: status, decoded body, headers. Raises NoAnswer."""
        return request(self.client, f"/hooks/{path}", data, {"webhook-id": ident})

    def start(self, flow: str, **params: Any) -> str:
        """The id of a new run."""
        answer = self.post("/api/runs", {"flow": flow, "params": params})
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]

    def wait_for(self, run: str, *states: str) -> dict[str, Any]:
        """The run, when it is in one of the states."""
        found: dict[str, Any] = {}

        def is_there() -> bool:
            found.update(self.get(f"/api/runs/{run}"))
            return found["state"] in states

        wait_until(is_there, f"run {run} is {' or '.join(states)}")
        return found

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def log_tail(self) -> str:
        return self.log[-3000:]

    @property
    def diary(self) -> list[str]:
        """What the task bodies of SHOP noted."""
        path = self.folder / "diary.txt"
        return path.read_text().splitlines() if path.exists() else []

    # ----------------------------------------------------------------- the end

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and the end of all that belongs to it. Also for a process that has ended."""
        self.process.kill()
        self.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def stop(self, within: float = 30.0) -> int:
        """SIGTERM, and the exit code."""
        self.process.terminate()
        return self.wait(within)

    def wait(self, within: float = 30.0) -> int:
        """The exit code of a process that ends by itself."""
        if self._client is not None:
            self._client.close()
            self._client = None
        return self.process.wait(within)


def request(
    client: httpx2.Client, url: str, data: Any, headers: Mapping[str, str]
) -> tuple[int, Any, Mapping[str, str]]:
    """Post `data` as JSON: status, decoded body, headers. NoAnswer when the connection fails."""
    try:
        answer = client.post(url, json=data, headers=headers)
    except httpx2.TransportError as error:
        raise NoAnswer(str(error)) from error
    return answer.status_code, answer.json() if answer.content else None, answer.headers


def start(folder: Path, *options: str, file: str = "shop.py", **process: Any) -> EventflowProcess:
    """A ready server; the test fails with its log when it does not get ready."""
    target = folder / file.partition(":")[0]
    if not target.exists():
        target.write_text(SHOP)
    server = EventflowProcess(folder, file, *options, **process)
    if not server.wait_ready(DEADLINE):
        server.kill()
        pytest.fail(f"the server did not get ready: {server.process.returncode}\n{server.log}")
    return server


@contextmanager
def serving(folder: Path, *options: str, **more: Any) -> Iterator[EventflowProcess]:
    """A ready server for the length of a test."""
    server = start(folder, *options, **more)
    try:
        yield server
    finally:
        server.kill()
