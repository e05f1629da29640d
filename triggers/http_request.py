"""Reads one HTTP request within limits of size and time, and sends the reply.

`http_endpoint.py` calls it; core/http_body.py reads the body. An invalid request raises
`RequestRejected` with its status: too large 413 (as soon as the declared or the counted size
exceeds the limit), too slow 408, a damaged encoding 400. Memory per request stays near the limit,
whatever the chunks.
"""

import asyncio
import zlib
from collections.abc import Mapping
from itertools import chain, repeat

import msgspec
import orjson
from starlette.types import Receive, Scope, Send

from eventflow.core.http_body import BODY_ARRIVED, BodyRejected, read_http_body

MAX_GZIP_MEMBERS = 64
"""Of one body. Each costs a set-up, and senders write one."""

DRAIN_TIMEOUT_SECONDS = 1.0
"""For the rest of a rejected body, so that its sender sees the reply and not a reset."""


class Reply(msgspec.Struct, frozen=True):
    """A response.

    `close_connection`: the connection is closed after it. `body_unread`: the client may still be
    sending its body.
    """

    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()
    close_connection: bool = False
    body_unread: bool = False
    media_type: bytes = b"application/json"


class RequestRejected(Exception):
    """The request ends here, with this reply."""

    def __init__(
        self,
        status: int,
        error: str,
        detail: str,
        *,
        close_connection: bool = False,
        body_unread: bool = False,
        **headers: str,
    ) -> None:
        super().__init__(status, error, detail)
        self.is_logged: bool = False
        named = tuple(
            (name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()
        )
        self.reply = Reply(
            status,
            orjson.dumps({"error": error, "detail": detail}),
            named,
            close_connection,
            body_unread,
        )


def read_headers(raw: list[tuple[bytes, bytes]]) -> tuple[dict[str, str], set[str]]:
    """The first header of each name, by lower-case name as latin-1 text; and the repeated names."""
    texts = [*map(bytes.decode, chain.from_iterable(raw), repeat("latin-1"))]
    names = [*map(str.lower, texts[::2])]
    values = texts[1::2]
    headers = dict(zip(names, values, strict=True))
    repeated: set[str] = set()
    if len(headers) < len(names):
        headers = {}
        for name, value in zip(names, values, strict=True):
            if name in headers:
                repeated.add(name)
            else:
                headers[name] = value
    return headers, repeated


async def read_body(
    scope: Scope, receive: Receive, headers: Mapping[str, str], limit: int, timeout: float
) -> bytes:
    """The body as sent. Raises RequestRejected (413, 408) or ClientDisconnected."""
    try:
        return await read_http_body(
            receive,
            headers.get("content-length", ""),
            max_bytes=limit,
            max_seconds=timeout,
            has_arrived=BODY_ARRIVED in scope,
        )
    except BodyRejected as rejected:
        raise RequestRejected(
            rejected.status,
            rejected.error,
            rejected.detail,
            close_connection=True,
            body_unread=True,
        ) from None


def encoding(headers: Mapping[str, str]) -> str:
    """The Content-Encoding in lower case: `""` for none, `"gzip"` also for its other name."""
    if "content-encoding" not in headers:
        return ""
    named = headers["content-encoding"].strip().lower()
    return {"identity": "", "x-gzip": "gzip"}.get(named, named)


def unsupported_encoding(taken: str) -> RequestRejected:
    """415 for another Content-Encoding than `taken`, for two layers, and for unwanted gzip."""
    detail = f"expected Content-Encoding {taken}"
    return RequestRejected(415, "unsupported_encoding", detail, accept_encoding=taken)


def gunzip(wire: bytes, limit: int) -> bytes:
    """The unpacked body, of at most `limit` bytes. The limit holds while unpacking: a gzip bomb
    costs no more than a valid body.
    """
    body = bytearray()
    for _ in range(MAX_GZIP_MEMBERS):
        member = zlib.decompressobj(wbits=31)
        try:
            body += member.decompress(wire, limit + 1 - len(body))
        except zlib.error:
            raise RequestRejected(400, "bad_encoding", "the body is not gzip") from None
        if len(body) > limit:
            detail = f"expected a body of at most {limit} bytes"
            raise RequestRejected(413, "too_large", detail)
        if not member.eof:
            raise RequestRejected(400, "bad_encoding", "the gzip body is cut short")
        if not (wire := member.unused_data):
            return bytes(body)
    raise RequestRejected(400, "bad_encoding", f"expected at most {MAX_GZIP_MEMBERS} gzip members")


async def send_reply(reply: Reply, receive: Receive, send: Send) -> None:
    """Sends the reply; before it closes a connection, it drops the rest of the body for a while."""
    headers = [
        (b"content-type", reply.media_type),
        (b"content-length", b"%d" % len(reply.body)),
        *reply.headers,
    ]
    if reply.close_connection:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body, "more_body": reply.body_unread})
    if reply.body_unread:
        await _drain_request(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drain_request(receive: Receive) -> None:
    try:
        async with asyncio.timeout(DRAIN_TIMEOUT_SECONDS):
            while (message := await receive())["type"] == "http.request" and message.get(
                "more_body", False
            ):
                pass
    except TimeoutError:
        return
