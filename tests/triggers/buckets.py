"""A bucket with an `S3` on it, for tests: a real server, the contract's ledger on the far side."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from structlog.testing import LogCapture

from eventflow.event import Event, Undecodable
from tests.aws import Aws, Queue
from tests.conftest import eventually
from tests.triggers.contract import Ledger, listening
from triggers.s3 import S3

QUICK: dict[str, Any] = {"poll": 0.1, "wait": 1.0, "visibility": 2.0}
"""Options that make tests quick."""


class Landing:
    """One `S3` listening. `events` are the recorded ones in order; `said` is what it logged."""

    def __init__(self, aws: Aws, bucket: str | None, ledger: Ledger | None = None, **options: Any) -> None:
        self.ledger = ledger or Ledger()
        self.capture = LogCapture()
        self.ledger.log = structlog.wrap_logger(structlog.ReturnLogger(), processors=[self.capture])
        self.trigger = S3(bucket, **{"name": "landing", **QUICK, **aws.options, **options})

    @property
    def events(self) -> list[Event]:
        return [item for item in self.ledger.kept.values() if isinstance(item, Event)]

    @property
    def dead(self) -> list[Undecodable]:
        return [item for item in self.ledger.kept.values() if isinstance(item, Undecodable)]

    @property
    def keys(self) -> list[str]:
        return [event.data["key"] for event in self.events]

    def said(self, event: str) -> list[dict[str, Any]]:
        return [dict(entry) for entry in self.capture.entries if entry["event"] == event]

    async def has(self, *keys: str, within: float = 20.0) -> None:
        """Waits until exactly these keys are events, as often as they are named."""
        await eventually(lambda: sorted(self.keys) == sorted(keys), f"{sorted(keys)} are events", within=within)

    async def emptied(self, queue: Queue) -> None:
        """Waits until no message is left."""
        await eventually(lambda: queue.left == 0, "the queue is empty")

    async def swept(self) -> None:
        """Waits until a sweep that began after now has ended: the second that ends."""
        before = self._sweeps()
        await eventually(lambda: self._sweeps() >= before + 2, "two sweeps have ended")

    def _sweeps(self) -> float:
        return {gauge.name: gauge.value for gauge in self.trigger.gauges()}["whole_sweeps"]


@asynccontextmanager
async def landing(aws: Aws, bucket: str | None, ledger: Ledger | None = None, **options: Any) -> AsyncIterator[Landing]:
    """An `S3` that listens."""
    made = Landing(aws, bucket, ledger, **options)
    async with listening(made.trigger, made.ledger) as task:
        await eventually(lambda: task.done() or made.said("bucket.opened"), "the bucket is opened")
        yield made
