"""HTTP/1.1 on the wire, with bounds: uvicorn's protocol that does not wait for slow heads, and takes no more than its
connections.

server.py hands the class to uvicorn. A request's head must be whole within 10 s and 64 KiB; connections are capped in all and
per address, loopback (a proxy, the tests) excepted. Bodies are bounded by who reads them. Next: the Guard (auth.py).
"""

import asyncio
import resource
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0
HEAD_BYTES = 64 * 1024
CONNECTIONS = 10_000
PER_ADDRESS = 1_000
SPARE_FILES = 256
"""File descriptors left for the store, logs, blobs and what flows open."""


class Connections:
    """How many there are, and from where."""

    def __init__(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.most = max(16, min(CONNECTIONS, soft - SPARE_FILES))
        self.total = 0
        self._by_address: dict[str, int] = {}

    def enter(self, address: str) -> bool:
        """Counts one more; False when it is one too many."""
        crowd = self._by_address.get(address, 0)
        near = address in ("", "127.0.0.1", "::1")
        if self.total >= self.most or (crowd >= PER_ADDRESS and not near):
            return False
        self.total += 1
        self._by_address[address] = crowd + 1
        return True

    def leave(self, address: str) -> None:
        self.total -= 1
        left = self._by_address[address] - 1
        if left:
            self._by_address[address] = left
        else:
            del self._by_address[address]


def bounded(connections: Connections) -> type[HttpToolsProtocol]:
    """The protocol class, counting in `connections`."""
    return type("Bounded", (_Bounded,), {"crowd": connections})


class _Bounded(HttpToolsProtocol):
    crowd: Connections
    _counted: str | None = None
    _reading = True
    _head = 0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        if not self.crowd.enter(address):
            self._refuse(b"503 Service Unavailable", b"too many connections")
            return
        self._counted = address
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._counted is not None:
            self.crowd.leave(self._counted)
            self._counted = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._reading:
            self._head += len(data)
        super().data_received(data)
        if not self._reading:
            self._disarm()
        elif self._head > HEAD_BYTES:
            self._refuse(
                b"431 Request Header Fields Too Large", b"the head of the request is over 64 KiB"
            )
        elif self._head and self._deadline is None:
            self._arm()

    def on_message_begin(self) -> None:
        self._reading, self._head = True, self._head or 1
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._reading, self._head = False, 0
        super().on_headers_complete()

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        self._refuse(b"408 Request Timeout", b"the head of the request did not arrive in time")

    def _refuse(self, status: bytes, detail: bytes) -> None:
        body = b'{"error":"refused","detail":"%s"}' % detail
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        transport = cast(Any, self.transport)
        if transport is not None and not transport.is_closing():
            transport.write(head % (status, len(body)) + body)
            transport.close()
