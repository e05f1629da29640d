"""Where both ways in hand over: what `S3` was given, ready for use, and the one call of `accept`.

queue.py and sweep.py call `Desk.offer`. It waits while the ledger is full, so that a queue keeps its messages and a sweep
stands still (P8); it returns when everything is durable (P1), or says that the listener is stopping and nothing was recorded.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eventflow.core.clock import Clock
from eventflow.core.errors import StoreFull
from eventflow.events.event import Event, Intake, Json, Undecodable
from triggers._s3.clients import Caller
from triggers._s3.key_filter import Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `S3` was given. `every`: seconds between sweeps, None for none. Durations in seconds."""

    bucket: str | None
    queue: str | None
    selection: Selection
    every: float | None
    settle: float
    skip_existing: bool
    touch: bool
    deleted: bool
    wait: float
    visibility: float
    pollers: int
    page: int
    clock: Clock


class Desk:
    """The way to the ledger of one opened `S3`. `lock` is held by whoever decides, from what is seen to what is recorded."""

    def __init__(self, intake: Intake, caller: Caller) -> None:
        self._intake, self._caller, self.log = intake, caller, intake.log
        self.lock = asyncio.Lock()
        self.full: str | None = None

    async def offer(
        self, items: Sequence[Event | Undecodable], cursor: Mapping[str, Json] | None = None
    ) -> bool:
        """Durable when it returns True. False: the listener is stopping, and nothing was recorded."""
        while True:
            try:
                await self._intake.accept(*items, cursor=cursor)
            except StoreFull as full:
                if self._caller.stopping:
                    return False
                self._note(full)
                await self._caller.rest(full.retry_after)
            else:
                self.full = None
                return True

    def _note(self, full: StoreFull) -> None:
        if self.full is None:
            self.log.warning("bucket.slowed", reason=str(full), wait=full.retry_after)
        self.full = f"the ledger is full: {full}"

    async def cursor(self) -> Mapping[str, Json]:
        return await self._intake.cursor()


def shown(count: int, what: str) -> dict[str, Any]:
    """A count for a log line, if there is one."""
    return {what: count} if count else {}
