"""How the command line reaches a ledger: over HTTP when a server has it, else by opening the store
itself, behind the same API.

`--url`, or the `STORE.server` that a server writes beside its store, says where; `STORE.token` (or
$EVENTFLOW_TOKEN) lets us in. With no server and the lock free, an App over the store is opened
passively (it runs nothing, listens to nothing) and its ASGI app answers in this process, so that
every command is written once. Without `--app TARGET` such an App knows no flows.
"""

import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast
from urllib.parse import quote

import click
import httpx2
import msgspec
import orjson

from eventflow.app import App
from eventflow.cli.output import json_option
from eventflow.cli.target import load_app
from eventflow.core.errors import EventflowError, StoreCorrupt, UsageError
from eventflow.logs.store import LogStore
from eventflow.store import open_store
from eventflow.web.api import make_asgi

F = TypeVar("F", bound=Callable[..., Any])

TIMEOUT_SECONDS = 30.0


class Unreachable(EventflowError):
    """No server, and nothing to do without one."""

    exit_code: ClassVar[int] = 4


class ApiError(EventflowError):
    """The API said no; `error` is its word, the code follows the status."""

    def __init__(self, status: int, error: str, detail: str) -> None:
        super().__init__(detail)
        self.error = error
        self.code = {401: 4, 403: 4, 421: 4, 404: 5, 400: 2, 409: 2, 413: 2, 415: 2}.get(status, 69)


class LedgerLocation(msgspec.Struct, frozen=True):
    """Where the ledger is, as the options of a command say."""

    store: str | None = None
    url: str | None = None
    app: str | None = None


def ledger_options(command: F) -> F:
    """`--store`, `--url`, `--app` and `--json`, for every command that asks a ledger."""
    for option in (
        click.option(
            "--app",
            envvar="EVENTFLOW_APP",
            help="TARGET of the app: for what needs its flows, without a server.",
        ),
        click.option(
            "--url",
            envvar="EVENTFLOW_URL",
            help="A server elsewhere; its token comes from $EVENTFLOW_TOKEN.",
        ),
        click.option(
            "--store",
            envvar="EVENTFLOW_STORE",
            help="sqlite:///PATH; default: the one in ./.eventflow.",
        ),
    ):
        command = option(command)
    return json_option(command)


class ApiClient:
    """The API of one ledger."""

    def __init__(
        self,
        client: httpx2.AsyncClient,
        where: str,
        *,
        live: bool,
        knows_flows: bool,
        url: str = "",
    ) -> None:
        self._client, self.address, self.live, self.knows_flows, self.url = (
            client,
            where,
            live,
            knows_flows,
            url,
        )

    async def get(self, path: str, *, timeout: float | None = TIMEOUT_SECONDS, **asked: Any) -> Any:
        """`patience`: seconds to wait for the answer; None: as long as it takes."""
        params = {name: value for name, value in asked.items() if value is not None}
        return await self._request("GET", path, params=params, timeout=timeout)

    async def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        return await self._request(
            "POST",
            path,
            json={name: value for name, value in (body or {}).items() if value is not None},
        )

    async def publish(self, event: bytes) -> Any:
        return await self._request(
            "POST",
            "/api/events",
            content=event,
            headers={"content-type": "application/cloudevents+json"},
        )

    def require_flows(self, purpose: str) -> None:
        """For work that asks which flows an event starts."""
        if not self.live and not self.knows_flows:
            raise Unreachable(
                f"no server has {self.address}, and {purpose} needs the app's flows; start it, or give --app TARGET"
            )

    async def _request(self, method: str, path: str, **options: Any) -> Any:
        try:
            answer = await self._client.request(method, path, **options)
        except httpx2.TransportError as error:
            raise Unreachable(
                f"no server answers at {self.address}: {error or type(error).__name__}"
            ) from None
        data: Any = _decoded(answer.content)
        if answer.status_code >= 400:
            said = cast(dict[str, Any], data) if isinstance(data, dict) else {}
            detail = str(said.get("detail") or f"{method} {path} was answered {answer.status_code}")
            raise ApiError(answer.status_code, str(said.get("error") or "refused"), detail)
        return data


def quoted(ident: str) -> str:
    """An id as a part of a path: a sender's may hold anything. UsageError for none, as from a
    shell's empty variable.
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
    """The API of the ledger at a place. Raises Unreachable, NotFound, StoreLocked, or what opening
    the store raises.
    """
    if location.url is not None:
        if not location.url.startswith(("http://", "https://")):
            raise UsageError(
                f"--url expected http://HOST:PORT or https://HOST, found {location.url!r}"
            )
        async with _client(location.url, os.environ.get("EVENTFLOW_TOKEN", "")) as client:
            yield ApiClient(client, location.url, live=True, knows_flows=True, url=location.url)
        return
    app = load_app(location.app) if location.app else None
    path = store_path(location, app)
    server = await running_server(path)
    if server is not None:
        async with _client(server, _token(path)) as client:
            yield ApiClient(client, server, live=True, knows_flows=True, url=server)
        return
    async with _open_without_server(app, path) as client:
        yield ApiClient(client, path, live=False, knows_flows=app is not None)


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
    except OSError:
        return ""


@asynccontextmanager
async def _open_without_server(app: App | None, path: str) -> AsyncGenerator[httpx2.AsyncClient]:
    if not has_store(path):
        raise Unreachable(
            f"no server has the store {path}, and there is no such file; name another with --store, or start one"
        )
    _check_is_sqlite(path)
    app = app or App(Path(path).stem)
    await app.open(
        store=f"sqlite:///{path}", sink=LogStore(f"{path}.logs.db", clock=app.clock), passive=True
    )
    try:
        transport = httpx2.ASGITransport(make_asgi(app, auth=False, manage=False))
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=None
        ) as client:
            yield client
    finally:
        await app.close()


def store_path(location: LedgerLocation, app: App | None) -> str:
    """The absolute path of the store."""
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
        raise UsageError(
            f"several stores are in ./.eventflow; say which with --store: {', '.join(map(str, found))}"
        )
    raise Unreachable(
        "there is no store in ./.eventflow; name one with --store or $EVENTFLOW_STORE, or a server with --url"
    )


def _check_is_sqlite(path: str) -> None:
    """Before anything is written beside a file that was named by mistake."""
    with open(path, "rb") as file:
        if file.read(16) not in (b"", b"SQLite format 3\0"):
            raise StoreCorrupt(
                f"{path} is damaged, or no store: expected an SQLite file; name another with --store"
            )


def has_store(path: str) -> bool:
    return Path(path).exists()


def _advertised_url(path: str) -> str | None:
    """What a server left beside its store, if that process still lives."""
    try:
        server = orjson.loads(Path(f"{path}.server").read_bytes())
        os.kill(int(server["pid"]), 0)
        url = str(server["url"])
    except (OSError, ValueError, KeyError, TypeError):
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
