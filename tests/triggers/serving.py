"""A webhook behind a real server: uvicorn with the server's protocol, on a free port and the
test's loop, with the app's routes behind the guard and mounted as the app does. Tests talk to it
over TCP, with a client or by hand (`raw`) where a client would be too well-behaved.
"""

import asyncio
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.routing import BaseRoute

from eventflow.web.auth import Guard
from eventflow.web.http_protocol import ConnectionLimiter, limited_protocol
from tests.conftest import eventually


@asynccontextmanager
async def serving(routes: Sequence[BaseRoute]) -> AsyncIterator[int]:
    """The port of a server with these routes."""
    app = Starlette(routes=list(routes))
    app.router.redirect_slashes = False
    guard = Guard(
        app,
        routes=routes,
        token=lambda: None,
        hosts=(),
        open_paths=(),
        draining=lambda: False,
        unopened=lambda: False,
        clock=time.monotonic,
    )
    config = uvicorn.Config(
        guard,
        host="127.0.0.1",
        port=0,
        log_level="error",
        access_log=False,
        lifespan="off",
        http=limited_protocol(ConnectionLimiter()),
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())  # `serve` would take the signals
    try:
        await eventually(lambda: server.started or task.done(), "the server is up")
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


Response = tuple[int, dict[str, str], bytes]


async def raw(
    port: int, request: bytes, *, chunks: Sequence[bytes] = (), pause: float = 0.0
) -> Response:
    """One request exactly as written, further chunks after pauses. Returns status, headers and
    body.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = asyncio.create_task(
        _response(reader)
    )  # read as it comes: a server may answer and close while we still send
    try:
        writer.write(request)
        for chunk in chunks:
            await asyncio.sleep(pause)
            if not answer.done():
                writer.write(chunk)
        async with asyncio.timeout(15):
            return await answer
    finally:
        answer.cancel()
        writer.close()


async def _response(reader: asyncio.StreamReader) -> Response:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {
        name.lower(): value.strip()
        for name, _, value in (line.partition(":") for line in head[1:] if line)
    }
    return (
        int(head[0].split()[1]),
        headers,
        await reader.readexactly(int(headers.get("content-length", 0))),
    )


def post(path: str, body: bytes, *headers: tuple[str, str], length: bool = True) -> bytes:
    """A POST as bytes on the wire."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: test",
        *(f"{name}: {value}" for name, value in headers),
    ]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def now() -> int:
    return int(time.time())


def digest(key: bytes, *parts: bytes, algorithm: str = "sha256") -> bytes:
    return hmac.new(key, b"".join(parts), getattr(hashlib, algorithm)).digest()
