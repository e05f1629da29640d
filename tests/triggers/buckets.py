"""A bucket with an `S3` on it, for tests: a real server, the contract's ledger on the far side."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from eventflow.testing.trigger_contract import ContractLedger, listening
from tests.aws import Aws, Queue
from tests.conftest import eventually
from tests.triggers.observed import ObservedTrigger
from triggers.s3 import S3

QUICK: dict[str, Any] = {"poll": 0.1, "wait": 1.0, "visibility": 2.0}
"""Options that make tests quick."""


class Landing(ObservedTrigger):
    """One `S3` listening."""

    def __init__(
        self, aws: Aws, bucket: str | None, ledger: ContractLedger | None = None, **options: Any
    ) -> None:
        super().__init__(ledger or ContractLedger())
        self.trigger = S3(bucket, **{"name": "landing", **QUICK, **aws.options, **options})

    @property
    def keys(self) -> list[str]:
        return [event.data["key"] for event in self.events]

    async def has(self, *keys: str, within: float = 40.0) -> None:
        """Waits until exactly these keys are events, as often as they are named."""
        await eventually(
            lambda: sorted(self.keys) == sorted(keys), f"{sorted(keys)} are events", within=within
        )

    async def emptied(self, queue: Queue) -> None:
        """Waits until no message is left."""
        await eventually(lambda: queue.remaining == 0, "the queue is empty")

    async def scanned(self) -> None:
        """Waits until a scan that began after now has ended: the second that ends."""
        before = self._scans()
        await eventually(lambda: self._scans() >= before + 2, "two scans have ended")

    def _scans(self) -> float:
        return {gauge.name: gauge.value for gauge in self.trigger.gauges()}["completed_scans"]


@asynccontextmanager
async def landing(
    aws: Aws, bucket: str | None, ledger: ContractLedger | None = None, **options: Any
) -> AsyncIterator[Landing]:
    """An `S3` that listens."""
    made = Landing(aws, bucket, ledger, **options)
    async with listening(made.trigger, made.ledger) as task:
        await eventually(
            lambda: task.done() or made.logged("bucket.opened"), "the bucket is opened"
        )
        yield made
