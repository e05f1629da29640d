"""Reads the body of an HTTP request from ASGI, bounded in size and in time.

The API (web/responses.py) and the HTTP triggers (triggers/http_request.py) call `read_http_body`.
The memory of a request stays near its limit whatever the chunks; a sender that trickles is cut off.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

GRACE_SECONDS = 10.0
MIN_BYTES_PER_SECOND = 1024
"""A body may take the grace period plus its size at this rate, but never more than
`max_seconds`.
"""

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class BodyRejected(Exception):
    """The body is too large (413) or too slow (408), or its length is no number (400). The rest of
    it is unread.
    """

    def __init__(self, status: int, error: str, detail: str) -> None:
        super().__init__(status, error, detail)
        self.status = status
        self.error = error
        self.detail = detail


class ClientDisconnected(Exception):
    """The sender closed the connection before its body was complete: nobody waits for a
    response.
    """


BODY_ARRIVED = "eventflow.body_arrived"
"""In the scope of a request: all of its body came with its head (web/http_protocol.py)."""


async def read_http_body(
    receive: Receive,
    content_length: str,
    *,
    max_bytes: int,
    max_seconds: float,
    has_arrived: bool = False,
) -> bytes:
    """The body as sent. `content_length`: the header, or "" without one. `has_arrived`: the server
    has all of it (BODY_ARRIVED), so no deadline is needed.

    Raises BodyRejected as soon as the declared or the counted size is over `max_bytes` or the time
    is over, ClientDisconnected when the sender left.
    """
    if content_length:
        if not (content_length.isascii() and content_length.isdigit()):
            raise BodyRejected(400, "bad_request", "Content-Length: expected digits")
        if len(content_length) > 15 or int(content_length) > max_bytes:
            raise _too_large(max_bytes)
    body = bytearray()
    if has_arrived:
        while _add_part(body, await receive(), max_bytes):
            pass
        return bytes(body)
    start = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(start + min(max_seconds, GRACE_SECONDS)) as deadline:
            while _add_part(body, await receive(), max_bytes):
                allowed = GRACE_SECONDS + len(body) / MIN_BYTES_PER_SECOND
                deadline.reschedule(start + min(max_seconds, allowed))
            return bytes(body)
    except TimeoutError:
        raise BodyRejected(408, "timeout", "the body did not arrive in time") from None


def _add_part(body: bytearray, message: MutableMapping[str, Any], max_bytes: int) -> bool:
    """Adds a part to `body`. Returns whether more parts follow."""
    if message["type"] != "http.request":
        raise ClientDisconnected
    body += message.get("body", b"")
    if len(body) > max_bytes:
        raise _too_large(max_bytes)
    return message.get("more_body", False)


def _too_large(max_bytes: int) -> BodyRejected:
    return BodyRejected(413, "too_large", f"expected a body of at most {max_bytes} bytes")
