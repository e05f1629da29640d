"""uvicorn's HTTP/1.1 protocol with limits on slow request heads and on connections.

server/server.py passes the class to uvicorn. A request's head must be complete within 10 s and 64
KiB. Connections are limited in total and per address, loopback addresses excepted. Bodies are
limited where they are read: of the API in responses.py, of webhooks in triggers/http_request.py;
BODY_ARRIVED in a request's scope says that there is nothing to wait for.
The next check of a request is the Guard (auth.py).
"""

import asyncio
import resource
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from eventflow.core.http_body import BODY_ARRIVED
from eventflow.logs.log import get_logger
from eventflow.logs.repeated import RepeatedLines

HEAD_TIMEOUT_SECONDS = 10.0
MAX_HEAD_BYTES = 64 * 1024
MAX_CONNECTIONS = 10_000
MAX_CONNECTIONS_PER_ADDRESS = 1_000
RESERVED_FILES = 256
"""File descriptors left for the store, logs, blobs and what flows open."""

log = get_logger("eventflow.web")
LOG_EVENTS = {
    "http.connections_refused": (
        "Connections were answered 503: `open` ones are the most that there may be, or the address "
        "has too many; `count` since the last line."
    ),
}


class ConnectionLimiter:
    """Counts connections in total and by address."""

    def __init__(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.limit: int = max(16, min(MAX_CONNECTIONS, soft - RESERVED_FILES))
        self.total: int = 0
        self._by_address: dict[str, int] = {}
        self._refused = RepeatedLines(_write_refused)

    def enter(self, address: str) -> bool:
        """Counts one more; False if that is over a limit."""
        count = self._by_address.get(address, 0)
        is_local = address in ("", "127.0.0.1", "::1")
        if self.total >= self.limit or (count >= MAX_CONNECTIONS_PER_ADDRESS and not is_local):
            self._refused.add(503, address=address, open=self.total)
            return False
        self.total += 1
        self._by_address[address] = count + 1
        return True

    def leave(self, address: str) -> None:
        self.total -= 1
        left = self._by_address[address] - 1
        if left:
            self._by_address[address] = left
        else:
            del self._by_address[address]


def _write_refused(_: int, count: int, fields: dict[str, Any]) -> None:
    log.warning("http.connections_refused", count=count, **fields)


def limited_protocol(limiter: ConnectionLimiter) -> type[HttpToolsProtocol]:
    """The protocol class, counting in `limiter`."""
    return type("LimitedProtocol", (_LimitedProtocol,), {"limiter": limiter})


class _LimitedProtocol(HttpToolsProtocol):
    limiter: ConnectionLimiter
    _counted: str | None = None
    _reading = True
    _head = 0
    _deadline: asyncio.TimerHandle | None = None
    _arriving: Any = None
    """The scope of the last request whose head ended in the bytes that are being parsed."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        if not self.limiter.enter(address):
            self._refuse(b"503 Service Unavailable", b"too many connections")
            return
        self._counted = address
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        if self._counted is not None:
            self.limiter.leave(self._counted)
            self._counted = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._reading:
            self._head += len(data)
        super().data_received(data)
        self._arriving = None
        if not self._reading:
            self._stop_head_timer()
        elif self._head > MAX_HEAD_BYTES:
            self._refuse(
                b"431 Request Header Fields Too Large", b"the head of the request is over 64 KiB"
            )
        elif self._head and self._deadline is None:
            self._start_head_timer()

    def on_message_begin(self) -> None:
        self._reading = True
        self._head = self._head or 1
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._reading = False
        self._head = 0
        self._arriving = self.scope
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._arriving is not None:  # the application is called in a later turn of the loop
            self._arriving[BODY_ARRIVED] = True

    def _start_head_timer(self) -> None:
        self._deadline = self.loop.call_later(HEAD_TIMEOUT_SECONDS, self._on_head_timeout)

    def _stop_head_timer(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_head_timeout(self) -> None:
        self._deadline = None
        self._refuse(b"408 Request Timeout", b"the head of the request did not arrive in time")

    def _refuse(self, status: bytes, detail: bytes) -> None:
        body = b'{"error":"refused","detail":"%s"}' % detail
        head = (
            b"HTTP/1.1 %s\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n"
        )
        transport = cast(Any, self.transport)
        if transport is not None and not transport.is_closing():
            transport.write(head % (status, len(body)) + body)
            transport.close()
