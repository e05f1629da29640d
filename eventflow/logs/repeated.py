"""Log lines about repeated requests: the first is written at once, then at most one a second.

Webhooks (triggers/http_endpoint.py) and the API's guard (web/auth.py) log the requests that they
refuse here: a flood must not fill the disk, and a single refusal must not wait for the next one.
"""

import asyncio
from collections.abc import Callable
from typing import Any

INTERVAL_SECONDS = 1.0
"""Between two lines of one kind."""


class RepeatedLines:
    """Calls `write(kind, count, fields)` for added lines, at most once a second for each kind.

    The first of a kind is written at once. Those that follow within the second are one line at its
    end, with their number and the newest fields. Everything is called on one running event loop.
    """

    __slots__ = ("_unwritten", "_write")

    def __init__(self, write: Callable[[int, int, dict[str, Any]], None]) -> None:
        self._write = write
        # by kind, while its second runs: how many came since the last line, the newest's fields
        self._unwritten: dict[int, tuple[int, dict[str, Any]]] = {}

    def add(self, kind: int, **fields: Any) -> None:
        """`kind`: the status of the response."""
        if kind in self._unwritten:
            self._unwritten[kind] = (self._unwritten[kind][0] + 1, fields)
            return
        self._write(kind, 1, fields)
        self._start_second(kind)

    def _start_second(self, kind: int) -> None:
        self._unwritten[kind] = (0, {})
        asyncio.get_running_loop().call_later(INTERVAL_SECONDS, self._end_second, kind)

    def _end_second(self, kind: int) -> None:
        count, fields = self._unwritten.pop(kind)
        if count:
            self._write(kind, count, fields)
            self._start_second(kind)
