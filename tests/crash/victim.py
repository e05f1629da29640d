"""One start of `eventflow serve` that a test kills, and the plain client of its senders.

The tests of this folder construct a `Server` for each start on a folder that outlives it:
`folder/store.db`, `folder/effects` (what task bodies did, see app.py) and `folder/serve.log`.
Nothing here retries: a request without an answer is the caller's to repeat.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2

from tests.server_process import ROOT, EventflowProcess, NoAnswer, request

__all__ = ["HERE", "ROOT", "Client", "NoAnswer", "Server"]

HERE = Path(__file__).parent


class Client:
    """A sender with one keep-alive connection, across restarts of the server."""

    def __init__(self, timeout: float = 20.0) -> None:
        self._http = httpx2.Client(timeout=timeout, trust_env=False, verify=False)

    def post(
        self, url: str, path: str, data: Any, headers: Mapping[str, str]
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Status, decoded body, headers. Raises NoAnswer."""
        return request(self._http, f"{url}{path}", data, headers)

    def close(self) -> None:
        self._http.close()


class Server(EventflowProcess):
    """One start of `app`. Task bodies write the number `boot` into the file of effects."""

    def __init__(
        self,
        app: Path,
        folder: Path,
        boot: int = 0,
        *,
        before: Sequence[str] = (),
        options: Sequence[str] = (),
        store: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        store = store or folder / "store.db"
        effects = {"CRASH_EFFECTS": str(folder / "effects"), "CRASH_BOOT": str(boot)}
        super().__init__(
            folder,
            str(app),
            *("--store", f"sqlite:///{store}", "--log", "json", *options),
            before=before,
            env={**effects, **(env or {})},
        )

    def wait(self, within: float = 30.0) -> int:
        """The exit code of a process that ends; its pipe is closed."""
        code = super().wait(within)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code
