"""One `eventflow serve` as a process of its own, to be killed; and the plain client that its
senders are.

The tests of this folder make a `Server` per boot on a folder that outlives it: `folder/store.db`,
`folder/effects` (what bodies did, see app.py) and `folder/serve.log`. Nothing here retries: what a
killed server did not answer is the caller's to send again.
"""

import http.client
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


class NoAnswer(Exception):
    """No answer: whether the request was taken is unknown."""


class Client:
    """One keep-alive connection. Any failure of it is `Lost`; the next request opens another."""

    def __init__(self, timeout: float = 20.0) -> None:
        self._timeout = timeout
        self._url = ""
        self._connection: http.client.HTTPConnection | None = None

    def request(
        self,
        url: str,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Status, decoded body, headers."""
        try:
            connection = self._connected(url)
            data = None if body is None else json.dumps(body).encode()
            connection.request(
                method, path, data, {"content-type": "application/json", **(headers or {})}
            )
            reply = connection.getresponse()
            text = reply.read()
            return (
                reply.status,
                json.loads(text) if text else None,
                {k.lower(): v for k, v in reply.getheaders()},
            )
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise NoAnswer(str(error)) from error

    def _connected(self, url: str) -> http.client.HTTPConnection:
        if self._connection is None or self._url != url:
            self.close()
            self._url, parts = url, urlsplit(url)
            self._connection = http.client.HTTPConnection(
                parts.hostname or "", parts.port, timeout=self._timeout
            )
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Server:
    """One boot. `before` is put in front of the command (strace); `boot` names it in the file of
    effects.
    """

    def __init__(
        self, app: Path, folder: Path, boot: int = 0, *, before: Sequence[str] = (), options: Sequence[str] = (),
        store: Path | None = None, env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.store = folder, store or folder / "store.db"
        self.url, self.client = "", Client()
        self.ready_after: float | None = None
        serve = [
            sys.executable,
            "-m",
            "eventflow",
            "serve",
            str(app),
            "--port",
            "0",
            "--store",
            f"sqlite:///{self.store}",
        ]
        known = {
            "CRASH_EFFECTS": str(folder / "effects"),
            "CRASH_BOOT": str(boot),
            "PYTHONPATH": str(ROOT),
            **(env or {}),
        }
        with (folder / "serve.log").open("ab") as log:
            self.spawned = time.monotonic()
            self.process = subprocess.Popen(
                [*before, *serve, "--log", "json", *options], cwd=folder, env={**os.environ, **known},
                stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip

    def ready(self, within: float = 30.0) -> bool:
        """Waits for the ready line, `within` seconds of now at most. False: it has not come, or the
        process is gone.
        """
        assert self.process.stdout is not None
        if not self.url and select.select([self.process.stdout], [], [], max(0.0, within))[0]:
            line = self.process.stdout.readline()
            if line.endswith(b"\n"):
                self.ready_after = time.monotonic() - self.spawned
                self.url = json.loads(line)["url"]
        return bool(self.url)

    @property
    def log_tail(self) -> str:
        """The end of what all boots of this folder wrote on stderr."""
        return (self.folder / "serve.log").read_text()[-3000:]

    # ----------------------------------------------------------------- asking

    def send(
        self, ident: str, data: Any, path: str = "orders"
    ) -> tuple[int, Any, Mapping[str, str]]:
        """One webhook."""
        return self.client.request(self.url, "POST", f"/hooks/{path}", data, {"webhook-id": ident})

    def get(self, path: str) -> Any:
        """One answer of the API. AssertionError when it is no 200."""
        token = Path(f"{self.store}.token").read_text().strip()
        status, body, _ = self.client.request(
            self.url, "GET", path, headers={"authorization": f"Bearer {token}"}
        )
        assert status == 200, (path, status, body)
        return body

    # ----------------------------------------------------------------- ends

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, reaped. Also for one that has ended."""
        self.process.kill()
        self._reap()

    def stop(self, within: float = 30.0) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.wait(within)

    def wait(self, within: float = 30.0) -> int:
        """The exit code of a process that ends by itself."""
        self.process.wait(within)
        return self._reap()

    def _reap(self) -> int:
        self.client.close()
        code = self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code
