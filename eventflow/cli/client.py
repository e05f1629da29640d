"""The HTTP API of a ledger, for every command that reads or changes one.

The server's URL comes from `--url` or from the file `STORE.server` that a server writes next to
its store; the token from $EVENTFLOW_TOKEN or `STORE.token`. Without a server, the command takes the
store's lock and opens an App that runs nothing and listens to nothing; its ASGI app answers the
same requests in this process, so that each command is written once. Such an App has flows only
with `--app TARGET`. The routes are in web/api.py.
"""

import logging
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast
from urllib.parse import quote

import click
import httpx2
import msgspec
import orjson

from eventflow.app import App
from eventflow.cli.output import json_option, note
from eventflow.cli.target import load_app
from eventflow.core.errors import EventflowError, StoreCorrupt, StoreLocked, UsageError
from eventflow.logs.store import LogStore
from eventflow.store.url import open_store
from eventflow.web.api import make_asgi

F = TypeVar("F", bound=Callable[..., Any])

TIMEOUT_SECONDS = 30.0


class Unreachable(EventflowError):
    """There is no server, and the command cannot work without one."""

    exit_code: ClassVar[int] = 4


class StoreInUse(EventflowError):
    """Another process has the store open, and it answers no requests."""

    exit_code: ClassVar[int] = 75


class ApiError(EventflowError):
    """An error response of the API. `error`: its error code; `code`: the exit code."""

    def __init__(self, status: int, error: str, detail: str) -> None:
        super().__init__(detail)
        self.error = error
        self.code = {401: 4, 403: 4, 421: 4, 404: 5, 400: 2, 409: 2, 413: 2, 415: 2}.get(status, 69)


class LedgerLocation(msgspec.Struct, frozen=True):
    """Where to find the ledger: the values of `--store`, `--url` and `--app`."""

    store: str | None = None
    url: str | None = None
    app: str | None = None


def ledger_options(command: F) -> F:
    """Add `--store`, `--url` and `--app`, passed to the command as `location`, and `--json`."""

    @wraps(command)
    def with_location(*args: Any, **given: Any) -> Any:
        location = LedgerLocation(given.pop("store"), given.pop("url"), given.pop("app"))
        return command(*args, location=location, **given)

    decorated = cast(F, with_location)
    for option in (
        click.option(
            "--app",
            envvar="EVENTFLOW_APP",
            help="Without a server, load this app: file.py or pkg.mod:app.",
        ),
        click.option(
            "--url",
            envvar="EVENTFLOW_URL",
            help="Use the server at this URL; its token is $EVENTFLOW_TOKEN.",
        ),
        click.option(
            "--store",
            envvar="EVENTFLOW_STORE",
            help="sqlite:///PATH; default: the one in ./.eventflow.",
        ),
    ):
        decorated = option(decorated)
    return json_option(decorated)


class ApiClient:
    """The API of one ledger.

    `address`: the URL, or the path of the store, for messages. `live`: a server answers.
    `knows_flows`: the app is loaded, there or here. `get` and `post` return the decoded JSON; they
    raise ApiError for an error response and Unreachable when there is none.
    """

    def __init__(
        self, client: httpx2.AsyncClient, address: str, *, live: bool, knows_flows: bool
    ) -> None:
        self._client = client
        self._in_use: str = ""
        self.address = address
        self.live = live
        self.knows_flows = knows_flows

    async def get(self, path: str, *, timeout: float | None = TIMEOUT_SECONDS, **query: Any) -> Any:
        """`timeout` in seconds; None waits for ever. Parameters that are None are left out."""
        params = {name: value for name, value in query.items() if value is not None}
        return await self._request("GET", path, params=params, timeout=timeout)

    def mark_in_use(self, locked: StoreLocked) -> None:
        """Another process has the store open: requests that change it are refused."""
        self._in_use = locked.holder

    @property
    def is_read_only(self) -> bool:
        return bool(self._in_use)

    def _check_writable(self) -> None:
        if self._in_use:
            raise StoreInUse(
                f"{self._in_use} has {self.address} open without a server, so commands can "
                "only read (ls, show, explain, logs, dry runs); do this in that program, or stop it"
            )

    async def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        self._check_writable()
        return await self._request(
            "POST",
            path,
            json={name: value for name, value in (body or {}).items() if value is not None},
        )

    async def publish(self, event: bytes) -> Any:
        self._check_writable()
        return await self._request(
            "POST",
            "/api/events",
            content=event,
            headers={"content-type": "application/cloudevents+json"},
        )

    def require_flows(self, purpose: str) -> None:
        """Raise Unreachable unless the app is loaded, which knows the flows an event starts."""
        if not self.live and not self.knows_flows:
            raise Unreachable(
                f"no server has {self.address}, and {purpose} needs the app's flows; "
                "start it, or give --app TARGET"
            )

    async def _request(self, method: str, path: str, **options: Any) -> Any:
        try:
            answer = await self._client.request(method, path, **options)
        except httpx2.TransportError as error:
            raise Unreachable(
                f"no server answers at {self.address}: {str(error) or type(error).__name__}"
            ) from None
        data: Any = _decoded(answer.content)
        if answer.status_code >= 400:
            fields = cast(dict[str, Any], data) if isinstance(data, dict) else {}
            status = answer.status_code
            detail = str(fields.get("detail") or f"{method} {path} was answered {status}")
            raise ApiError(status, str(fields.get("error") or "refused"), detail)
        return data


def quoted(ident: str) -> str:
    """An id as one segment of a URL path. UsageError for an empty one, such as an unset shell
    variable.
    """
    if not ident:
        raise UsageError(
            "expected an id or a name, found an empty text; `eventflow ls` lists what there is"
        )
    return quote(ident, safe="")


def _decoded(content: bytes) -> Any:
    try:
        return orjson.loads(content)
    except ValueError:
        return None


@asynccontextmanager
async def open_api(location: LedgerLocation) -> AsyncGenerator[ApiClient]:
    """The API of the ledger at `location`.

    Raises Unreachable, AppNotFound, StoreLocked, UsageError, and the errors of opening a store.
    """
    if location.url is not None:
        if not location.url.startswith(("http://", "https://")):
            raise UsageError(
                f"--url expected http://HOST:PORT or https://HOST, found {location.url!r}"
            )
        async with _client(location.url, os.environ.get("EVENTFLOW_TOKEN", "")) as client:
            yield ApiClient(client, location.url, live=True, knows_flows=True)
        return
    app = load_app(location.app) if location.app else None
    path = store_path(location, app)
    server = await running_server(path)
    if server is not None:
        async with _client(server, _token(path)) as client:
            yield ApiClient(client, server, live=True, knows_flows=True)
        return
    async with _open_without_server(app, path) as (client, locked):
        api = ApiClient(client, path, live=False, knows_flows=app is not None)
        if locked is not None:
            api.mark_in_use(locked)
        yield api


def _client(url: str, token: str) -> httpx2.AsyncClient:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return httpx2.AsyncClient(
        base_url=url, headers=headers, timeout=TIMEOUT_SECONDS, trust_env=False
    )


def _token(path: str) -> str:
    given = os.environ.get("EVENTFLOW_TOKEN")
    if given:
        return given
    try:
        return Path(f"{path}.token").read_text().strip()
    except OSError:  # a server with --no-auth writes none
        return ""


@asynccontextmanager
async def _open_without_server(
    app: App | None, path: str
) -> AsyncGenerator[tuple[httpx2.AsyncClient, StoreLocked | None]]:
    """A client of the API in this process; and who has the store, if it could only be opened for
    reading.
    """
    if not has_store(path):
        raise Unreachable(
            f"no server has the store {path}, and there is no such file; "
            "name another with --store, or start one"
        )
    _check_is_sqlite(path)
    # What the API refuses is the command's own error.
    logging.getLogger("eventflow.web").setLevel(logging.ERROR)
    app = app or App(Path(path).stem)
    locked = await _open_passive(app, path)
    try:
        transport = httpx2.ASGITransport(make_asgi(app, auth=False, manage=False))
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=None
        ) as client:
            yield client, locked
    finally:
        await app.close()


async def _open_passive(app: App, path: str) -> StoreLocked | None:
    """Open the store; for reading only, and the reason, where another process has it."""
    logs = LogStore(f"{path}.logs.db", clock=app.clock)
    try:
        await app.open(store=f"sqlite:///{path}", logs=logs, passive=True)
    except StoreLocked as locked:
        await app.open(store=f"sqlite:///{path}", logs=logs, passive=True, read_only=True)
        note(f"{locked.holder} has the store open without a server: reading it as it is now")
        return locked
    return None


def store_path(location: LedgerLocation, app: App | None) -> str:
    """The absolute path of the store: of `--store`, of the app, or the only one in ./.eventflow."""
    if location.store or app is not None:
        url = location.store or (app.url if app is not None else "")
        return open_store(url if "://" in url else f"sqlite:///{url}", App("name").clock).path
    found = [
        path
        for path in sorted(Path(".eventflow").glob("*.db"))
        if not path.name.endswith(".logs.db")
    ]
    if len(found) == 1:
        return str(found[0].resolve())
    if found:
        names = ", ".join(map(str, found))
        raise UsageError(f"several stores are in ./.eventflow; say which with --store: {names}")
    raise Unreachable(
        "there is no store in ./.eventflow; "
        "name one with --store or $EVENTFLOW_STORE, or a server with --url"
    )


def _check_is_sqlite(path: str) -> None:
    """Raise StoreCorrupt for another kind of file, before a lock file is written next to it."""
    with open(path, "rb") as file:
        if file.read(16) not in (b"", b"SQLite format 3\0"):
            raise StoreCorrupt(
                f"{path} is damaged, or no store: expected an SQLite file; "
                "name another with --store"
            )


def has_store(path: str) -> bool:
    return Path(path).exists()


def _advertised_url(path: str) -> str | None:
    """The URL in `STORE.server`, if that process is alive. None for a UNIX socket."""
    try:
        server = orjson.loads(Path(f"{path}.server").read_bytes())
        os.kill(int(server["pid"]), 0)
        url = str(server["url"])
    except (OSError, ValueError, KeyError, TypeError):  # no such file or process, or damaged
        return None
    return None if url.startswith("unix:") else url


async def running_server(path: str) -> str | None:
    """The URL of the server that has this store, if one answers there."""
    url = _advertised_url(path)
    if url is None:
        return None
    try:
        async with _client(url, "") as client:
            return url if (await client.get("/healthz", timeout=5)).status_code == 200 else None
    except httpx2.TransportError:
        return None
