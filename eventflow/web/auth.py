"""The one layer that every request passes before any route is looked at: deny by default, over HTTP and WebSocket alike.

`make_asgi` (api.py) wraps the whole app in a `Guard`. Open are exactly: GET or HEAD of `/healthz` and `/readyz`; `/metrics`
when the operator said so; and the paths of the triggers' own routes, which verify their senders themselves. Everything else,
known path or not, needs a Host on the allow-list (421), then the token (401), then for a change a request that no foreign page
made (403). Only below `/hooks/`, where senders have no such token, a path that no trigger has is told as one (404). While the
server drains, the way in is answered 503 here, without asking anybody further in.
"""

import asyncio
import hmac
from collections.abc import Callable, Collection, Mapping
from hashlib import sha256
from urllib.parse import urlsplit

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from eventflow.web.responses import problem, unavailable

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN = ("/healthz", "/readyz")
SAFE = ("GET", "HEAD")
WAYS_IN = ("/api/events", "/api/runs")
"""Besides the triggers' own routes: what takes new work when it is POSTed to."""

WRONG = 5
"""Wrong tokens a minute and address after which the answer takes `SLOWLY` seconds (threat S27)."""
SLOWLY = 2.0


class Guard:
    """ASGI in, ASGI out.

    `token` gives the token, or None when none is asked for; it is called once the app is open. `hosts` are names without ports.
    `draining` tells whether a stop was asked for.
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
        self._app, self._routes, self._draining = app, routes, draining
        self._token, self._hosts = token, frozenset(host.lower() for host in (*LOOPBACK, *hosts))
        self._open = frozenset((*OPEN, *open_paths))
        self._wrong = Wrong(clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] not in ("http", "websocket"):
            return
        answer = await self._answer(scope)
        if answer is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await answer(scope, receive, send)

    async def _answer(self, scope: Scope) -> ASGIApp | None:
        """What the request is answered here; None: it may pass."""
        path, method = route_path(scope), str(scope.get("method", ""))
        hook = any(_leads(route, scope) for route in self._routes)
        if self._draining() and (hook or (method == "POST" and path in WAYS_IN)):
            return unavailable("the server is stopping; come back later", hang_up=True)
        if hook or (scope["type"] == "http" and method in SAFE and path in self._open):
            return None
        if path.startswith("/hooks/"):
            detail = f"no webhook takes {method} {path}; `eventflow ls triggers --json` lists their paths"
            return problem(404, "not_found", detail)
        headers = first_headers(scope)
        if host_name(headers.get("host", "")) not in self._hosts:
            return problem(
                421, "wrong_host", "this host name is not served; allow it with --allow-host NAME"
            )
        if not await self._knows(headers, scope):
            detail = "expected Authorization: Bearer TOKEN; the token is in STORE.token"
            return problem(401, "unauthorized", detail, www_authenticate="Bearer")
        if (method not in SAFE or scope["type"] == "websocket") and not _same_site(headers):
            return problem(403, "cross_site", "a page of another site may not do this")
        return None

    async def _knows(self, headers: Mapping[str, str], scope: Scope) -> bool:
        wanted = self._token()
        if wanted is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and same(given.strip(), wanted):
            return True
        if given:
            await self._wrong.note((scope.get("client") or ("",))[0])
        return False


class Wrong:
    """Wrong tokens by address, over the last minute; whoever tries often waits for the answer."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._began, self._count = clock, 0.0, dict[str, int]()

    async def note(self, address: str) -> None:
        now = self._clock()
        if now - self._began > 60 or len(self._count) > 10_000:
            self._began, self._count = now, {}
        self._count[address] = self._count.get(address, 0) + 1
        if self._count[address] > WRONG:
            await asyncio.sleep(SLOWLY)


def same(given: str, wanted: str) -> bool:
    """In a time that tells nothing, of lengths neither."""
    digests = (sha256(text.encode("utf-8", "surrogatepass")).digest() for text in (given, wanted))
    return hmac.compare_digest(*digests)


def route_path(scope: Scope) -> str:
    """The path below where this app is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def first_headers(scope: Scope) -> dict[str, str]:
    """Headers by lower-case name. One that came twice is not there: two readers could take different ones."""
    headers: dict[str, str] = {}
    twice: set[str] = set()
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        if key in headers:
            twice.add(key)
        headers[key] = value.decode("latin-1")
    return {
        key: value
        for key, value in headers.items()
        if key not in twice or key not in ("host", "authorization", "origin")
    }


def host_name(host: str) -> str:
    """`example.org:8710` → `example.org`, `[::1]:8710` → `::1`; empty for what is no host."""
    try:
        return urlsplit(f"//{host}").hostname or "" if "@" not in host and "/" not in host else ""
    except ValueError:
        return ""


def _leads(route: BaseRoute, scope: Scope) -> bool:
    return scope["type"] == "http" and route.matches(scope)[0] is Match.FULL


def _same_site(headers: Mapping[str, str]) -> bool:
    """A browser says where a request came from; programs say nothing."""
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")
