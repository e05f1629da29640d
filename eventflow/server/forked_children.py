"""Closes, in children that user code forks, what belongs to the server process (server.py).

A child may outlive a killed server. If it kept the port, the next server could not listen; a
connection that it kept would stay open for the other side.
"""

import asyncio
import os
import signal
import socket
from contextlib import suppress
from typing import Any

import uvicorn

from eventflow.core.forks import call_in_forked_children


class ForkedChildren:
    """Gives children Python's signal handlers, and closes in them the port and the connections of
    the server's loop: from clients, and to brokers and other systems.

    Connections of the flow loop, and sockets that user code made, are left to user code.
    """

    def __init__(
        self, sock: socket.socket, server: uvicorn.Server, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._sock = sock
        self._server = server
        self._connect = loop.create_connection
        self._outgoing: list[Any] = []  # sockets
        setattr(loop, "create_connection", self._create_connection)  # noqa: B010
        call_in_forked_children(self._after_fork)

    async def _create_connection(self, *args: Any, **options: Any) -> Any:
        """The loop's method; keeps the socket too, because a loop does not list its connections."""
        transport, protocol = await self._connect(*args, **options)
        self._outgoing = [each for each in self._outgoing if each.fileno() >= 0]
        self._outgoing.append(transport.get_extra_info("socket"))
        return transport, protocol

    def _after_fork(self) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(-1)  # a byte written there would wake the parent's loop
        sockets: list[Any] = [self._sock, *self._outgoing]
        for connection in self._server.server_state.connections:
            transport: Any = getattr(connection, "transport", None)
            if transport is not None:
                sockets.append(transport.get_extra_info("socket"))
        for each in sockets:
            with suppress(OSError, AttributeError):
                os.close(each.fileno())  # socket.close() waits for the parent's transports
