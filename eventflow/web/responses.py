"""Responses and request parsing for all handlers: JSON, errors as `{"error", "detail"}`, bounded
bodies.

`with_error_responses` wraps every handler: an error of eventflow becomes its HTTP status; any other
becomes a 500 with an id that the log has too. A client never sees a traceback (threat S26).
"""

import math
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable
from datetime import datetime
from ipaddress import ip_address
from typing import Any, cast

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from eventflow.core.clock import to_us
from eventflow.core.declarations import nearest
from eventflow.core.errors import (
    BindingError,
    EventflowError,
    NotFound,
    NotStorable,
    ResultsUnavailable,
    RunError,
    StoreFull,
    UsageError,
)
from eventflow.core.http_body import (
    BODY_ARRIVED,
    BodyRejected,
    ClientDisconnected,
    read_http_body,
)
from eventflow.events.strict_json import read_json
from eventflow.logs.log import get_logger

MAX_BODY_BYTES = 1 << 20
"""Bytes of a body: one event, a run's parameters."""
MAX_BATCH_BYTES = 16 << 20
"""Bytes of a batch of events."""
MAX_BODY_SECONDS = 30.0
"""For the largest body (fault 27); see core/http_body.py."""

Handler = Callable[[Request], Awaitable[Response]]
ApiRoute = tuple[str, str, Handler]
"""Method, path and handler."""

log = get_logger("eventflow.web")
LOG_EVENTS = {
    "http.failed": (
        "An HTTP request failed with an internal error; the response has the same id. Without an "
        "id: its store failed, or the server stopped before it could answer."
    ),
    "http.refused": (
        "The API refused a request: no token, a wrong host, too large, not valid; `reason` says "
        "why."
    ),
}


class Json(Response):
    """A JSON response, never cached, never content-sniffed. Header names are given with `_` for
    `-`.
    """

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        super().__init__(
            content,
            status,
            {"cache-control": "no-store", "x-content-type-options": "nosniff", **named},
        )

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, default=str)


class HttpError(Exception):
    """Raised by a handler: ends the request with this response."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status_code)
        self.response = response


def error_json(
    status: int, error: str, detail: str, *, close_connection: bool = False, **headers: str
) -> Json:
    if close_connection:
        headers["connection"] = "close"
    return Json({"error": error, "detail": detail}, status, **headers)


def http_error(status: int, error: str, detail: str, **options: Any) -> HttpError:
    return HttpError(error_json(status, error, detail, **options))


def unavailable(detail: str, *, close_connection: bool = False) -> Json:
    """503 with a random Retry-After of 1 to 5 s, so that senders do not all come back at once."""
    return error_json(
        503,
        "unavailable",
        detail,
        close_connection=close_connection,
        retry_after=str(1 + secrets.randbelow(5)),
    )


# --------------------------------------------------------------------------- errors

LOGGED_ERROR = "eventflow.logged_error"
"""In the scope of a request: the error that `internal_error` has logged."""


def with_error_responses(handler: Handler) -> Handler:
    """The handler, with its errors as responses."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except HttpError as refused:
            response = refused.response
        except EventflowError as error:
            response = error_response(error)
        except (ClientDisconnect, ClientDisconnected):  # no client reads the response
            return Response(status_code=499)
        if request.method not in ("GET", "HEAD"):  # a page may look for what is not there
            log_refused(request.method, request.url.path, response)
        return response

    return handle


def log_refused(method: str, path: str, response: Response, count: int = 1) -> None:
    """A warning with the reason of a 4xx; `count`: refusals since the last line."""
    if 400 <= response.status_code < 500:
        reason = orjson.loads(response.body)["detail"]
        log.warning(
            "http.refused",
            method=method,
            path=path,
            status=response.status_code,
            reason=reason,
            count=count,
        )


def error_response(error: EventflowError) -> Json:
    """The response for an error of eventflow."""
    match error:
        case NotFound():
            return error_json(404, "not_found", str(error))
        case BindingError() | NotStorable():
            return error_json(400, "invalid", str(error))
        case ResultsUnavailable():
            return _failed(error)
        case UsageError() | RunError():
            return error_json(409, "refused", str(error))
        case StoreFull():
            status, name = (507, "disk_full") if error.disk else (503, "overloaded")
            return error_json(
                status, name, str(error), retry_after=str(max(1, math.ceil(error.retry_after)))
            )
        case _:
            return _failed(error)


def _failed(error: EventflowError) -> Json:
    log.error("http.failed", exc_info=error)
    return unavailable(str(error))


async def internal_error(request: Request, error: BaseException) -> Response:
    """A defect of eventflow: the traceback goes to the log, its id to the client."""
    ident = secrets.token_hex(6)
    log.error("http.failed", id=ident, method=request.method, path=request.url.path, exc_info=error)
    request.scope[LOGGED_ERROR] = error
    return error_json(500, "internal", f"internal error; the log has it under id {ident}")


async def interrupted(request: Request, error: BaseException) -> Response:
    """For a request that a stop has cancelled: whether its work was recorded is not known."""
    log.error("http.failed", method=request.method, path=request.url.path, exc_info=error)
    return unavailable("the server stopped before it could answer", close_connection=True)


# --------------------------------------------------------------------------- bodies


async def read_body(request: Request, limit: int = MAX_BODY_BYTES) -> bytes:
    """The body. HttpError 413 when it is over `limit` bytes, 408 when too slow, 415 when
    compressed.
    """
    if request.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        detail = "expected Content-Encoding identity"
        raise http_error(
            415, "unsupported_encoding", detail, close_connection=True, accept_encoding="identity"
        )
    length = request.headers.get("content-length", "")
    try:
        return await read_http_body(
            request.receive,
            length,
            max_bytes=limit,
            max_seconds=MAX_BODY_SECONDS,
            has_arrived=BODY_ARRIVED in request.scope,
        )
    except BodyRejected as rejected:
        raise http_error(
            rejected.status, rejected.error, rejected.detail, close_connection=True
        ) from None


async def read_object(request: Request, *known: str) -> dict[str, Any]:
    """The body as a JSON object with the `known` fields; an empty one counts as `{}`.

    HttpError 400 for what is no object, and for another field: it would be ignored otherwise, and
    the request would do something else than its sender meant.
    """
    body = await read_body(request)
    try:
        value: Any = read_json(body) if body.strip() else {}
    except ValueError as error:
        raise http_error(400, "unreadable", str(error)) from None
    if not isinstance(value, dict):
        raise http_error(400, "unreadable", "body: expected a JSON object")
    fields = cast(dict[str, Any], value)
    _refuse_unknown("field", fields, known)
    return fields


def check_query(request: Request, *known: str) -> None:
    """HttpError 400 for a query parameter that is not among `known`."""
    _refuse_unknown("query parameter", request.query_params, known)


def _refuse_unknown(kind: str, given: Iterable[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            hint = nearest(name, known)
            expected = f"did you mean {hint!r}?" if hint else f"it has {', '.join(known) or 'none'}"
            raise http_error(400, "invalid", f"{name}: no such {kind}; {expected}")


# --------------------------------------------------------------------------- request parameters


def caller(request: Request) -> str:
    """Who sends the request, as far as a shared token can tell: address and user agent."""
    address = client_address(request.scope) or "here"
    return f"{address} {request.headers.get('user-agent', '')[:80]}".strip()


def whole_number(request: Request, name: str, default: Any) -> Any:
    """A query parameter that is a whole number; `default` without it."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise http_error(400, "invalid", f"{name}: expected a whole number, found {text!r}")
    return int(text)


def instant(request: Request, name: str) -> int | None:
    """A query parameter that is an instant, in microseconds; None without it."""
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        return to_us(datetime.fromisoformat(text.replace(" ", "+")))
    except ValueError:
        raise http_error(
            400,
            "invalid",
            f"{name}: expected an instant such as 2026-01-31T08:00:00Z, found {text!r}",
        ) from None


def client_address(scope: Scope) -> str:
    """The address of the sender, or of the proxy if the server does not trust it; empty if that is
    not an address, as behind a UNIX socket or a proxy that passes on what its client wrote.
    """
    address = (scope.get("client") or ("",))[0]
    try:
        return str(ip_address(address))
    except ValueError:
        return ""
