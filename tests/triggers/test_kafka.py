"""Kafka: what holds for every trigger, on two brokers; and what is particular to groups, offsets
and restarts.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest

from eventflow.events.event import Event
from eventflow.testing.trigger_contract import (
    CONTRACT,
    ContractLedger,
    Item,
    Promise,
    TriggerHarness,
)
from tests.brokers import GIVEN_SERVER, Broker, given_or_noida, tansu
from tests.triggers.kafka_topic import make_topic
from triggers.kafka import Kafka


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with given_or_noida(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture(scope="module")
def other() -> Iterator[Broker]:
    if GIVEN_SERVER:
        pytest.skip("EVENTFLOW_TEST_KAFKA names the broker to test with")
    with tansu() as running:
        yield running


# ------------------------------------------------------------------ the conformance suite


class Shelf(TriggerHarness):
    """A topic with one partition; an item's key is its data."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.keys = list[str]()

    @asynccontextmanager
    async def source(self) -> AsyncIterator[None]:
        self.topic = await make_topic(self.broker, rebalance_timeout_ms=2_000)
        yield

    def trigger(self) -> Kafka:
        return self.topic.make()

    async def offer(self, keys: Sequence[str]) -> None:
        self.keys += keys
        await self.topic.send(*keys)

    async def redeliver(self, keys: Sequence[str], ledger: ContractLedger) -> None:
        ledger.cursors.clear()
        await self.broker.commit(self.topic.group, self.topic.name, 0)

    def key(self, item: Item) -> str:
        assert isinstance(item, Event)
        return item.data

    async def acknowledged(self, ledger: ContractLedger) -> set[str]:
        (offset,) = await self.broker.committed(self.topic.group, self.topic.name)
        return set(self.keys[: offset or 0])


@pytest.mark.parametrize("promise", CONTRACT)
def test_contract(promise: Promise, broker: Broker):
    """Kafka keeps what every trigger promises."""
    asyncio.run(promise(Shelf(broker)))


@pytest.mark.parametrize("promise", CONTRACT[:1])
def test_contract_on_another_broker(promise: Promise, other: Broker):
    """It does so on a broker of another make as well."""
    asyncio.run(promise(Shelf(other)))


def test_its_name_is_stable():
    """The name comes from the topics, or is given: cursors are kept by it."""
    assert Kafka("a", "b", group_id="g").name == "kafka:a,b"
    assert Kafka(pattern="a.*", group_id="g").name == "kafka:a.*"
    assert Kafka("a", group_id="g", name="mine").name == "mine"
