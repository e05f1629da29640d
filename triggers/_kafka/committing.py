"""Commits the group's offsets, which follow the ledger's cursor and never lead it.

`Session` runs `GroupCommitter.run` in parallel to its loop, and calls `commit` when partitions are
revoked and at its end. The group's offset serves lag displays and other ledgers that work for the
group; the cursor decides where this ledger continues.
"""

import asyncio
from contextlib import suppress
from typing import Any

from triggers._kafka.client import Consumer, KafkaError
from triggers._kafka.partitions import AssignedPartitions
from triggers._kafka.positions import Positions

LOG_EVENTS = {
    "kafka.commit_failed": (
        "The group offset was not committed; reading continues at the cursor in the ledger in any "
        "case (debug)."
    ),
}

COMMIT_INTERVAL_SECONDS = 1.0

COMMIT_TIMEOUT_SECONDS = 30.0
"""For one periodic commit."""


class GroupCommitter:
    """`positions` has the ledger's name, the metadata of every committed offset."""

    def __init__(
        self, consumer: Consumer, partitions: AssignedPartitions, positions: Positions, log: Any
    ) -> None:
        self._consumer: Consumer = consumer
        self._partitions: AssignedPartitions = partitions
        self._positions: Positions = positions
        self._log: Any = log

    async def run(self) -> None:
        """Commits periodically until cancelled."""
        while True:
            await asyncio.sleep(COMMIT_INTERVAL_SECONDS)
            with suppress(TimeoutError):
                async with asyncio.timeout(COMMIT_TIMEOUT_SECONDS):
                    await self.commit()

    async def commit(self) -> None:
        """Commits the recorded offsets that changed. Never without offsets: that would commit what
        is only fetched.
        """
        assigned = self._consumer.assignment()
        recorded = {
            tp: each.position.offset
            for tp, each in self._partitions.items()
            if tp in assigned and each.position.offset != each.group_offset
        }
        if not recorded:
            return
        ledger = self._positions.ledger
        try:
            await self._consumer.commit({tp: (offset, ledger) for tp, offset in recorded.items()})
        except (
            KafkaError
        ) as error:  # a rebalance came first, or no broker answers: the cursor decides
            self._log.debug("kafka.commit_failed", error=f"{type(error).__name__}: {error}")
            return
        for tp, offset in recorded.items():
            if tp in self._partitions:
                self._partitions[tp].group_offset = offset
