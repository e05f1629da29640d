"""The options of `S3`, and its one call of `Intake.accept`.

The queue's poller (queue.py) and the listing's scan (listing.py) call `LedgerIntake.accept`. It
returns when everything is durable (P1), or when the listener is stopping and nothing was recorded.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eventflow.core.clock import Clock
from eventflow.core.errors import StoreFull
from eventflow.events.event import Event, Intake, Json, Undecodable
from triggers._s3.clients import RetryingCaller
from triggers._s3.key_filter import KeyFilter


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Options:
    """The checked options of an `S3`. Durations are in seconds; `scan_interval` None: no scans."""

    bucket: str | None
    queue: str | None
    key_filter: KeyFilter
    scan_interval: float | None
    settle: float
    skip_existing: bool
    touch: bool
    deleted: bool
    wait: float
    visibility: float
    pollers: int
    page: int
    clock: Clock


class LedgerIntake:
    """`accept` for the poller and the scan of one `S3`, which may be stopping.

    `lock` is held from reading the known objects until the result is recorded.
    """

    def __init__(self, intake: Intake, caller: RetryingCaller) -> None:
        self._intake: Intake = intake
        self._caller: RetryingCaller = caller
        self.log: Any = intake.log
        self.lock = asyncio.Lock()

    async def accept(
        self, items: Sequence[Event | Undecodable], cursor: Mapping[str, Json] | None = None
    ) -> bool:
        """Durable when it returns True. False: the listener is stopping, and nothing was recorded.

        Waits while the ledger is full, so that a queue keeps its messages and a scan makes no
        progress (P8).
        """
        while True:
            try:
                await self._intake.accept(*items, cursor=cursor, max_wait=1.0)
            except (
                StoreFull
            ) as full:  # nothing was recorded: again, unless the listener is stopping
                if full.closing or self._caller.stopping:
                    return False
            else:
                return True
