"""Re-exec: the process replaces itself with the same program, arguments and pid, on the same
socket.

server.py calls `reexec` after the drain when a memory limit was exceeded; the new program calls
`take_inherited_fd` before it binds. Connections made in between queue on the socket. exec closes
everything else: the store's lock is released, threads are gone. An exit instead would depend on a
supervisor: systemd's `Restart=on-failure` does not restart after a clean exit, Kubernetes waits
longer each time, a shell does nothing.
"""

import os
import socket
import sys
from contextlib import suppress
from typing import NoReturn

INHERITED_FD_ENV = "EVENTFLOW_INHERITED_FD"
"""Environment variable with the descriptor; set only across the exec."""


def inheritable_copy(sock: socket.socket) -> int:
    """An inheritable descriptor of the socket; `sock` itself may be closed."""
    fd = os.dup(sock.fileno())
    os.set_inheritable(fd, True)
    return fd


def reexec(fd: int) -> NoReturn:
    """Re-executes the current program. Thread-safe; does not return."""
    os.environ[INHERITED_FD_ENV] = str(fd)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def take_inherited_fd() -> int | None:
    """The descriptor that the program before the exec left, once; None otherwise."""
    found = os.environ.pop(INHERITED_FD_ENV, None)
    if found is None:
        return None
    os.set_inheritable(int(found), False)
    return int(found)
