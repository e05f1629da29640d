"""A topic on a real broker and a `Kafka` trigger on it, for tests, with the contract's ledger on
the far side.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from eventflow.events.event import Event, Undecodable, gauge_totals
from eventflow.testing.trigger_contract import ContractLedger, listening
from tests.brokers import Broker
from tests.conftest import eventually
from tests.triggers.observed import ObservedTrigger
from triggers.kafka import Kafka

QUICK: dict[str, Any] = {
    "session_timeout_ms": 6_000,
    "heartbeat_interval_ms": 500,
    "rebalance_timeout_ms": 6_000,
    "metadata_max_age_ms": 1_000,
    "fetch_max_wait_ms": 100,
}
"""Options that make tests quick."""


class Topic(ObservedTrigger):
    """A topic, its group, and what triggers made of it."""

    def __init__(self, broker: Broker, name: str, partitions: int = 1, **options: Any) -> None:
        super().__init__(ContractLedger())
        self.broker = broker
        self.name = name
        self.partitions = partitions
        self.group = f"group-{name}"
        self.options = {**QUICK, **options}
        self.triggers: list[Kafka] = []

    @property
    def data(self) -> list[Any]:
        return [event.data for event in self.events]

    @property
    def trigger(self) -> Kafka:
        """The one made last."""
        return self.triggers[-1]

    def make(self, **options: Any) -> Kafka:
        """A new trigger, as after a restart of the process."""
        topics = () if "pattern" in {**self.options, **options} else (self.name,)
        given = {
            "bootstrap_servers": self.broker.server,
            "group_id": self.group,
            "name": "kafka",
            "cluster": "test",
        }
        self.triggers.append(Kafka(*topics, **{**given, **self.options, **options}))
        return self.trigger

    @asynccontextmanager
    async def read(
        self, *, joined: bool = True, within: float = 40.0, **options: Any
    ) -> AsyncIterator[asyncio.Task[None]]:
        """The trigger at work; `joined`, once it has its partitions."""
        before = len(self.logged("kafka.assigned"))
        async with listening(self.make(**options), self.ledger) as task:
            if joined:
                await eventually(
                    lambda: task.done() or len(self.logged("kafka.assigned")) > before,
                    "partitions are assigned",
                    within=within,
                )
            yield task

    async def send(self, *values: Any, **options: Any) -> list[int]:
        return await self.broker.send(self.name, *values, **options)

    async def has(self, count: int, within: float = 40.0) -> None:
        """Waits until so many items are recorded; more are an error."""
        await eventually(
            lambda: len(self.ledger.recorded) >= count, f"{count} items are recorded", within=within
        )
        assert len(self.ledger.recorded) == count, list(self.ledger.recorded.values())

    async def committed(self, *offsets: int | None) -> None:
        """Waits until the group has these offsets, by partition."""

        async def agrees() -> bool:
            return await self.broker.committed(self.group, self.name, len(offsets)) == list(offsets)

        await eventually(agrees, f"the group has committed {offsets}", within=40)

    def cursor(self, partition: int = 0) -> int:
        """The next offset to be recorded, as the ledger has it."""
        found: Any = self.ledger.cursors[f"{self.name}/{partition}"]
        return found[0]

    def totals(self) -> dict[str, float]:
        return gauge_totals(self.trigger.gauges())


async def make_topic(broker: Broker, partitions: int = 1, **options: Any) -> Topic:
    return Topic(broker, await broker.create(partitions=partitions), partitions, **options)


def offsets_of(items: Sequence[Event | Undecodable]) -> list[int]:
    """The offsets that items came from."""
    return [int(item.id.split(":")[1]) for item in items]
