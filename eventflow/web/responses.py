"""Answers of the doors: JSON out, `{"error", "detail"}` for what went wrong, and a request's body in, bounded in size and
time.

`answering` wraps every handler: what eventflow itself raises becomes its status, anything else a 500 with an id that the log
has too; a client never sees a traceback (threat S26).
"""

import asyncio
import math
import secrets
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, cast

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from eventflow.core.clock import to_us
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
from eventflow.events.cloudevents import read_json
from eventflow.logs.log import get_logger

MAX_BODY = 1 << 20
"""Bytes of a body of one event, of a run's parameters; of a batch, `MAX_BATCH`."""
MAX_BATCH = 16 << 20
PATIENCE, LONGEST, MIN_RATE = 10.0, 30.0, 1024
"""Seconds any body may take, seconds the largest may, and bytes per second between (fault 27)."""

Handler = Callable[[Request], Awaitable[Response]]

log = get_logger("eventflow.web")


class Json(Response):
    """JSON, never sniffed, never kept by a cache."""

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


class Refused(Exception):
    """The request ends here with this answer."""

    def __init__(self, answer: Response) -> None:
        super().__init__(answer.status_code)
        self.answer = answer


def problem(status: int, error: str, detail: str, *, hang_up: bool = False, **headers: str) -> Json:
    if hang_up:
        headers["connection"] = "close"
    return Json({"error": error, "detail": detail}, status, **headers)


def refuse(status: int, error: str, detail: str, **options: Any) -> Refused:
    return Refused(problem(status, error, detail, **options))


def unavailable(detail: str, *, hang_up: bool = False) -> Json:
    """503, to come back after a few seconds: spread, so that not all come at once."""
    return problem(
        503, "unavailable", detail, hang_up=hang_up, retry_after=str(1 + secrets.randbelow(5))
    )


# --------------------------------------------------------------------------- from errors to answers


def answering(handler: Handler) -> Handler:
    """The handler, with its errors as answers."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except Refused as refused:
            return refused.answer
        except EventflowError as error:
            return answer_to(error)
        except ClientDisconnect:
            return Response(status_code=499)

    return answer


def answer_to(error: EventflowError) -> Json:
    """Which status says what."""
    match error:
        case NotFound():
            return problem(404, "not_found", str(error))
        case BindingError() | NotStorable():
            return problem(400, "invalid", str(error))
        case ResultsUnavailable():
            return unavailable(str(error))
        case UsageError() | RunError():
            return problem(409, "refused", str(error))
        case StoreFull():
            status, name = (507, "disk_full") if error.disk else (503, "overloaded")
            return problem(
                status, name, str(error), retry_after=str(max(1, math.ceil(error.retry_after)))
            )
        case _:
            log.error("http.failed", error=str(error))
            return unavailable(str(error))


async def crashed(request: Request, error: Exception) -> Response:
    """A defect of ours: the traceback goes to the log, its number to the client."""
    number = secrets.token_hex(6)
    log.error(
        "http.failed", id=number, method=request.method, path=request.url.path, exc_info=error
    )
    return problem(500, "internal", f"something went wrong here; the log has it as {number}")


# --------------------------------------------------------------------------- bodies


async def read_body(request: Request, limit: int = MAX_BODY) -> bytes:
    """The body; Refused with 413 as soon as its size shows, 408 when it trickles, 415 when it is packed."""
    if request.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        detail = "expected Content-Encoding identity"
        raise refuse(415, "unsupported_encoding", detail, hang_up=True, accept_encoding="identity")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > 15 or int(declared) > limit):
        raise _too_large(limit)
    body = bytearray()
    start = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(start + PATIENCE) as deadline:
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
                deadline.reschedule(start + min(LONGEST, PATIENCE + len(body) / MIN_RATE))
    except TimeoutError:
        raise refuse(408, "timeout", "the body did not arrive in time", hang_up=True) from None
    return bytes(body)


def _too_large(limit: int) -> Refused:
    return refuse(413, "too_large", f"expected a body of at most {limit} bytes", hang_up=True)


async def read_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object; an empty one counts as `{}`."""
    body = await read_body(request)
    try:
        value: Any = read_json(body) if body.strip() else {}
    except ValueError as error:
        raise refuse(400, "unreadable", str(error)) from None
    if not isinstance(value, dict):
        raise refuse(400, "unreadable", "body: expected a JSON object")
    return cast(dict[str, Any], value)


# --------------------------------------------------------------------------- queries


def whole_number(request: Request, name: str, default: Any) -> Any:
    """A whole number of the query."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise refuse(400, "invalid", f"{name}: expected a whole number, found {text!r}")
    return int(text)


def instant(request: Request, name: str) -> int | None:
    """An instant of the query, in microseconds."""
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        return to_us(datetime.fromisoformat(text.replace(" ", "+")))
    except ValueError:
        raise refuse(
            400,
            "invalid",
            f"{name}: expected an instant such as 2026-01-31T08:00:00Z, found {text!r}",
        ) from None
