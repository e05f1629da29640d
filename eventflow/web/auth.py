"""The access check for every HTTP and WebSocket request, before routing: deny by default.

`make_asgi` (api.py) wraps the whole app in a `Guard`. Without a token are reachable: GET or HEAD of
`/healthz` and `/readyz`; `/metrics` with `--open-metrics`; and the triggers' own routes, which
verify their senders themselves. Every other path, known or not, requires a Host on the allow-list
(421), then the token (401), then for a change a same-site request (403). Only below `/hooks/`,
where senders have no token, an unknown path is answered 404. While the server drains, requests that
bring new work are answered 503 here. A trigger's endpoint with a fixed path is called from here,
before routing and middleware.
"""

import asyncio
import hmac
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from hashlib import sha256
from ipaddress import IPv6Address
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from eventflow.core.errors import UsageError
from eventflow.logs.repeated import RepeatedLines
from eventflow.web.responses import (
    LOGGED_ERROR,
    client_address,
    error_json,
    internal_error,
    interrupted,
    log_refused,
    unavailable,
)

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
    returns True once a stop was requested, `unopened` if the host never opened the App. `clock`:
    monotonic seconds.
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
        unopened: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._app = app
        self._routes = routes
        self._endpoints = endpoints_by_path(routes)
        self._token = token
        self._hosts: frozenset[str] = frozenset(map(allowed_host, (*LOOPBACK, *hosts)))
        self._open_paths: frozenset[str] = frozenset((*OPEN_PATHS, *open_paths))
        self._draining = draining
        self._unopened = unopened
        self._failed_logins = FailedLogins(clock)
        self._rejections = RepeatedLines(_write_rejection)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, send)
            return
        if kind not in ("http", "websocket"):
            return
        try:
            endpoint = self._endpoints.get(route_path(scope)) if kind == "http" else None
            if endpoint is None or self._draining() or self._unopened():
                await self._answer(scope, receive, send)
            else:
                await endpoint(scope, receive, send)
        except BaseException as error:  # the server would answer 500 without a line in the log
            if kind == "http" and scope.get(LOGGED_ERROR) is not error:
                await _answer_failed(scope, receive, send, error)
            raise

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        rejection = await self._reject(scope)
        if rejection is not None:
            self._rejections.add(
                rejection.status_code,
                method=str(scope.get("method", "")),
                path=route_path(scope),
                response=rejection,
            )
        if rejection is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await rejection(scope, receive, send)

    async def _reject(self, scope: Scope) -> Response | None:
        """The response of a rejected request; None if it may pass."""
        path = route_path(scope)
        method = str(scope.get("method", ""))
        hook = any(_matches(route, scope) for route in self._routes)
        if self._draining() and (hook or (method == "POST" and path in INTAKE_PATHS)):
            return unavailable("the server is stopping; try again later", close_connection=True)
        if hook and self._unopened():
            return unavailable("the app is not open; its host must open it, see the log")
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
            # Not "Bearer TOKEN": the log would redact what follows the first word.
            detail = (
                "expected the API's token as a bearer token; it is in the file STORE.token, next "
                "to the store"
            )
            if not path.startswith("/api"):
                detail += "; the API is below /api, webhooks are below /hooks"
            return error_json(401, "unauthorized", detail, www_authenticate="Bearer")
        if (method not in SAFE_METHODS or scope["type"] == "websocket") and not _same_site(headers):
            return error_json(403, "cross_site", "a page of another site may not do this")
        return None

    async def _is_authorized(self, headers: Mapping[str, str], scope: Scope) -> bool:
        required = self._token()
        if required is None:
            return True
        given = headers.get("authorization", "")
        token = bearer_token(given)
        if token is not None and constant_time_equal(token, required):
            return True
        if " " in given:
            await self._failed_logins.note(client_address(scope))
        return False


async def _answer_failed(scope: Scope, receive: Receive, send: Send, error: BaseException) -> None:
    """Logs what no handler has, and answers, unless a response has begun: an error of the guard, a
    cancel by the server's stop, a BaseException of user code.
    """
    task = asyncio.current_task()
    is_cancelled = task is not None and bool(task.cancelling())
    is_stop = is_cancelled and isinstance(error, asyncio.CancelledError)
    answer = interrupted if is_stop else internal_error
    response = await answer(Request(scope), error)
    with suppress(RuntimeError):  # of a server to which a response has begun
        await response(scope, receive, send)


def endpoints_by_path(routes: Collection[BaseRoute]) -> dict[str, ASGIApp]:
    """The endpoints that are ASGI apps for all methods of one path without parameters, as those of
    `triggers`. The first one has the path.
    """
    found: dict[str, ASGIApp] = {}
    for route in routes:
        if not isinstance(route, Route) or route.methods is not None or "{" in route.path:
            break  # routing asks the routes in order: it must ask this one, and those after it
        if route.app is not route.endpoint:
            break
        found.setdefault(route.path, route.app)
    return found


def _write_rejection(_: int, count: int, fields: dict[str, Any]) -> None:
    log_refused(fields["method"], fields["path"], fields["response"], count)


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
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def first_headers(scope: Scope) -> dict[str, str]:
    """Headers by lower-case name; a repeated one as its values with commas between.

    Proxies and servers may read different ones of two. So a repeated Host, Origin or Authorization
    is a text that none of the guards can parse, and the request is rejected.
    """
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return headers


_HOST: Final = re.compile(
    r"(?:\[(?P<ipv6>[0-9a-f:.]{2,45})\]|(?P<name>[a-z0-9_](?:[a-z0-9_.-]{0,252}[a-z0-9_])?))"
    r"(?::(?P<port>[0-9]{1,5}))?",
    re.ASCII | re.IGNORECASE,
)


def parse_host(host: str) -> tuple[str, str] | None:
    """Name and port of a Host header: `Example.org:8710` → `("example.org", "8710")`, `[::1]` →
    `("::1", "")`. None if the text is anything else.

    The whole text must match. A parser that takes what it understands and drops the rest would find
    an allowed name in `[::1].evil.example`.
    """
    found = _HOST.fullmatch(host)
    if found is None or int(found["port"] or 0) > 65535:
        return None
    if found["ipv6"] is None:
        return found["name"].lower(), found["port"] or ""
    try:
        return str(IPv6Address(found["ipv6"])), found["port"] or ""
    except ValueError:
        return None


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets; empty if it is not a host."""
    parsed = parse_host(host)
    return parsed[0] if parsed is not None else ""


def allowed_host(name: str) -> str:
    """An entry of the allow-list as `host_name` returns it. UsageError for what is no name."""
    found = host_name(f"[{name}]") or parse_host(name)
    if isinstance(found, tuple):
        found = found[0] if found[1] == "" else ""
    if not found:
        raise UsageError(
            "--allow-host (allowed_hosts=) expected a name as in a Host header, without scheme and"
            f" port, found {name!r}"
        )
    return found


_BEARER: Final = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*)", re.ASCII | re.IGNORECASE)


def bearer_token(authorization: str) -> str | None:
    """The token of an Authorization header; None if it is no bearer token (RFC 6750)."""
    found = _BEARER.fullmatch(authorization)
    return found[1] if found is not None else None


def _matches(route: BaseRoute, scope: Scope) -> bool:
    return scope["type"] == "http" and route.matches(scope)[0] is Match.FULL


_ORIGIN: Final = re.compile(r"https?://([^/]+)", re.ASCII)


def _same_site(headers: Mapping[str, str]) -> bool:
    """Whether no other site's page sent it. Browsers send the origin, programs do not."""
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    if origin is None:
        return True
    found = _ORIGIN.fullmatch(origin)
    site = parse_host(found[1]) if found is not None else None
    return site is not None and site == parse_host(headers.get("host", ""))
