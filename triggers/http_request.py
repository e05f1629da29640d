"""One HTTP request as a webhook must read it: bounded, in its time, and answered without a word too much.

`webhook.py` calls `read_headers`, `read_body` and `decoded`, and sends a `Reply`. Everything a request can do wrong up to its
bytes is a `Refused` with its status: too large 413 (as soon as the declared or the counted size says so), too slow 408, an
encoding that is not taken 415, broken 400. Memory per request stays near the cap, whatever the chunks.
"""

import asyncio
import zlib
from collections.abc import Mapping

import msgspec
import orjson
from starlette.types import Receive, Send

PATIENCE = 10.0
"""Seconds a body may take however small it is; beyond them it must keep up `MIN_RATE`."""

MIN_RATE = 1024
"""Bytes per second."""

MAX_MEMBERS = 64
"""Gzip members of one body: each costs a set-up, and nobody needs more than one."""

LINGER = 1.0
"""Seconds for which the rest of a refused body is read and dropped, so that the sender sees the answer and not a reset."""


class Reply(msgspec.Struct, frozen=True):
    """An answer. `hang_up`: close the connection after it; `unread`: the sender may still be sending its body."""

    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()
    hang_up: bool = False
    unread: bool = False
    media: bytes = b"application/json"


class Refused(Exception):
    """The request ends here, with this reply."""

    def __init__(
        self,
        status: int,
        error: str,
        detail: str,
        *,
        hang_up: bool = False,
        unread: bool = False,
        **headers: str,
    ) -> None:
        super().__init__(status, error, detail)
        named = tuple(
            (name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()
        )
        self.reply = Reply(
            status, orjson.dumps({"error": error, "detail": detail}), named, hang_up, unread
        )


class Gone(Exception):
    """The sender hung up before its body was whole: there is nobody to answer."""


def read_headers(raw: list[tuple[bytes, bytes]]) -> tuple[dict[str, str], set[str]]:
    """The headers by lower-case name as latin-1 text, the first of each; and the names that came more than once."""
    headers: dict[str, str] = {}
    repeated: set[str] = set()
    for name, value in raw:
        key = name.decode("latin-1").lower()
        if key in headers:
            repeated.add(key)
        else:
            headers[key] = value.decode("latin-1")
    return headers, repeated


async def read_body(
    receive: Receive, headers: Mapping[str, str], limit: int, timeout: float
) -> bytes:
    """The body as sent. Raises Refused (413, 408) or Gone."""
    declared = headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > 15 or int(declared) > limit):
        raise _too_large(limit)
    body = bytearray()
    start = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(start + min(timeout, PATIENCE)) as deadline:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise Gone
                body += message.get("body", b"")
                if len(body) > limit:
                    raise _too_large(limit)
                if not message.get("more_body", False):
                    return bytes(body)
                deadline.reschedule(start + min(timeout, PATIENCE + len(body) / MIN_RATE))
    except TimeoutError:
        raise Refused(
            408, "timeout", "the body did not arrive in time", hang_up=True, unread=True
        ) from None


def _too_large(limit: int, *, unread: bool = True) -> Refused:
    return Refused(
        413, "too_large", f"expected a body of at most {limit} bytes", hang_up=unread, unread=unread
    )


def encoding(headers: Mapping[str, str], gzip: bool) -> str:
    """`""` or `"gzip"`. Raises Refused (415) for any other encoding, two layers, and gzip where it is not taken."""
    named = headers.get("content-encoding", "").strip().lower()
    if named in ("", "identity"):
        return ""
    if gzip and named in ("gzip", "x-gzip"):
        return "gzip"
    taken = "gzip" if gzip else "identity"
    detail = f"expected Content-Encoding {taken}"
    raise Refused(
        415, "unsupported_encoding", detail, hang_up=True, unread=True, accept_encoding=taken
    )


def gunzip(wire: bytes, limit: int) -> bytes:
    """At most `limit` bytes out of gzip: the cap holds while inflating, so a bomb costs no more than an honest body."""
    body = bytearray()
    for _ in range(MAX_MEMBERS):
        member = zlib.decompressobj(wbits=31)
        try:
            body += member.decompress(wire, limit + 1 - len(body))
        except zlib.error:
            raise Refused(400, "bad_encoding", "the body is not gzip") from None
        if len(body) > limit:
            raise _too_large(limit, unread=False)
        if not member.eof:
            raise Refused(400, "bad_encoding", "the gzip body is cut short")
        if not (wire := member.unused_data):
            return bytes(body)
    raise Refused(400, "bad_encoding", f"expected at most {MAX_MEMBERS} gzip members")


async def send_reply(reply: Reply, receive: Receive, send: Send) -> None:
    """Sends it whole. Where it hangs up, what the sender is still sending is dropped for a moment first."""
    headers = [
        (b"content-type", reply.media),
        (b"content-length", b"%d" % len(reply.body)),
        *reply.headers,
    ]
    if reply.hang_up:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body, "more_body": reply.unread})
    if reply.unread:
        await _linger(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _linger(receive: Receive) -> None:
    try:
        async with asyncio.timeout(LINGER):
            while (message := await receive())["type"] == "http.request" and message.get(
                "more_body", False
            ):
                pass
    except TimeoutError:
        return
