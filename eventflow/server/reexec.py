"""A process that replaces itself: the same program with the same arguments, under the same pid, with the socket it listened on.

server.py hands over with `succeed` when memory ran out, after the drain; the next life asks `inherited` before it binds. What
connects in between queues on the socket. Everything else is closed by exec: the store's lock is free, threads are gone. An exit
would need somebody to start it again: systemd's `Restart=on-failure` does not after a clean end, Kubernetes waits longer each
time, and a shell not at all.
"""

import os
import socket
import sys
from contextlib import suppress
from typing import NoReturn

HEIR = "EVENTFLOW_INHERITED_FD"
"""Set for the moment between two lives only."""


def bequeath(sock: socket.socket) -> int:
    """A descriptor for the next life; this life's own may be closed."""
    fd = os.dup(sock.fileno())
    os.set_inheritable(fd, True)
    return fd


def succeed(fd: int) -> NoReturn:
    """Begins the next life. From any thread; nothing after it runs."""
    os.environ[HEIR] = str(fd)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def inherited() -> int | None:
    """The descriptor that the life before left, once."""
    found = os.environ.pop(HEIR, None)
    if found is None:
        return None
    os.set_inheritable(int(found), False)
    return int(found)
