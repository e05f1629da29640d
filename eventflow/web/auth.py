"""The access check for every HTTP and WebSocket request, before routing: deny by default.

`make_asgi` (api.py) wraps the whole app in a `Guard`. Without a token are reachable: GET or HEAD of
`/healthz` and `/readyz`; `/metrics` with `--open-metrics`; and the triggers' own routes, which
verify their senders themselves. Every other path, known or not, requires a Host on the allow-list
(421), then the token (401), then for a change a same-site request (403). Only below `/hooks/`,
where senders have no token, an unknown path is answered 404. While the server drains, requests that
bring new work are answered 503 here.
"""

import asyncio
import hmac
from collections.abc import Callable, Collection, Mapping
from hashlib import sha256
from urllib.parse import urlsplit

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from eventflow.web.responses import error_json, unavailable

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/healthz", "/readyz")
SAFE_METHODS = ("GET", "HEAD")
INTAKE_PATHS = ("/api/events", "/api/runs")
"""Where a POST brings new work, besides the triggers' own routes."""

FREE_FAILURES = 5
"""Wrong tokens per minute and address that are answered without delay (threat S27)."""
FAILURE_DELAY_SECONDS = 2.0
"""Before the answer to each further one."""


class Guard:
    """ASGI in, ASGI out.

    `token` returns the required token, None for none. `hosts`: names without ports. `draining`
    returns True once a stop was requested. `clock`: monotonic seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: Collection[BaseRoute],
        token: Callable[[], str | None],
        hosts: Collection[str],
        open_paths: Collection[str],
        draining: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._app = app
        self._routes = routes
        self._token = token
        self._hosts: frozenset[str] = frozenset(host.lower() for host in (*LOOPBACK, *hosts))
        self._open_paths: frozenset[str] = frozenset((*OPEN_PATHS, *open_paths))
        self._draining = draining
        self._failed_logins = FailedLogins(clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] not in ("http", "websocket"):
            return
        rejection = await self._reject(scope)
        if rejection is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await rejection(scope, receive, send)

    async def _reject(self, scope: Scope) -> ASGIApp | None:
        """The response of a rejected request; None if it may pass."""
        path = route_path(scope)
        method = str(scope.get("method", ""))
        hook = any(_matches(route, scope) for route in self._routes)
        if self._draining() and (hook or (method == "POST" and path in INTAKE_PATHS)):
            return unavailable("the server is stopping; come back later", close_connection=True)
        if hook or (
            scope["type"] == "http" and method in SAFE_METHODS and path in self._open_paths
        ):
            return None
        if path.startswith("/hooks/"):
            detail = (
                f"no webhook takes {method} {path};"
                " `eventflow ls triggers --json` lists their paths"
            )
            return error_json(404, "not_found", detail)
        headers = first_headers(scope)
        if host_name(headers.get("host", "")) not in self._hosts:
            return error_json(
                421, "wrong_host", "this host name is not served; allow it with --allow-host NAME"
            )
        if not await self._is_authorized(headers, scope):
            detail = "expected Authorization: Bearer TOKEN; the token is in STORE.token"
            return error_json(401, "unauthorized", detail, www_authenticate="Bearer")
        if (method not in SAFE_METHODS or scope["type"] == "websocket") and not _same_site(headers):
            return error_json(403, "cross_site", "a page of another site may not do this")
        return None

    async def _is_authorized(self, headers: Mapping[str, str], scope: Scope) -> bool:
        required = self._token()
        if required is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and constant_time_equal(given.strip(), required):
            return True
        if given:
            await self._failed_logins.note((scope.get("client") or ("",))[0])
        return False


class FailedLogins:
    """Counts wrong tokens by address, per minute, and delays the answer to many."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._minute_start: float = 0.0
        self._count: dict[str, int] = {}

    async def note(self, address: str) -> None:
        now = self._clock()
        if now - self._minute_start > 60 or len(self._count) > 10_000:
            self._minute_start = now
            self._count = {}
        self._count[address] = self._count.get(address, 0) + 1
        if self._count[address] > FREE_FAILURES:
            await asyncio.sleep(FAILURE_DELAY_SECONDS)


def constant_time_equal(given: str, required: str) -> bool:
    """Compared in a time that depends neither on the contents nor on the lengths."""
    digests = (sha256(text.encode("utf-8", "surrogatepass")).digest() for text in (given, required))
    return hmac.compare_digest(*digests)


def route_path(scope: Scope) -> str:
    """The path relative to where this app is mounted."""
    path = str(scope["path"])
    root = str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def first_headers(scope: Scope) -> dict[str, str]:
    """Headers by lower-case name, without a repeated Host, Authorization or Origin: proxies and
    servers may read different ones of them.
    """
    headers: dict[str, str] = {}
    repeated: set[str] = set()
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        if key in headers:
            repeated.add(key)
        headers[key] = value.decode("latin-1")
    return {
        key: value
        for key, value in headers.items()
        if key not in repeated or key not in ("host", "authorization", "origin")
    }


def host_name(host: str) -> str:
    """`example.org:8710` → `example.org`, `[::1]:8710` → `::1`; empty if it is not a host."""
    try:
        return urlsplit(f"//{host}").hostname or "" if "@" not in host and "/" not in host else ""
    except ValueError:
        return ""


def _matches(route: BaseRoute, scope: Scope) -> bool:
    return scope["type"] == "http" and route.matches(scope)[0] is Match.FULL


def _same_site(headers: Mapping[str, str]) -> bool:
    """Whether no other site's page sent it. Browsers send the origin, programs do not."""
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")
