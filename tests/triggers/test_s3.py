"""Objects that arrive in a bucket, on real servers over HTTP: what is an event, when, and that none
is lost or made twice.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from eventflow.events.event import Event
from eventflow.testing.trigger_contract import (
    CONTRACT,
    ContractLedger,
    Item,
    Promise,
    TriggerHarness,
)
from tests.aws import Aws, Bucket, Queue, ministack, moto
from tests.triggers.buckets import QUICK
from triggers.s3 import S3

__all__ = ["ministack", "moto"]


@pytest.fixture(params=["ministack", "moto"])
def aws(request: pytest.FixtureRequest) -> Aws:
    """Each of the servers."""
    return request.getfixturevalue(request.param)


# ------------------------------------------------------------------ the contract


class QueueHarness(TriggerHarness):
    """A bucket with a queue; an item is an object, acknowledged when no message is left."""

    def __init__(self, aws: Aws, **options: Any) -> None:
        self.aws = aws
        self.options = options
        self.offered = set[str]()

    @asynccontextmanager
    async def source(self) -> AsyncIterator[None]:
        self.bucket = Bucket(self.aws)
        self.queue = self.bucket.queue()
        yield

    def trigger(self) -> S3:
        return S3(
            self.bucket.name,
            queue=self.queue.url,
            name="arrivals",
            **{**QUICK, **self.aws.options, **self.options},
        )

    async def offer(self, keys: Sequence[str]) -> None:
        self.offered |= set(keys)
        for key in keys:
            await asyncio.to_thread(self.bucket.put, key, key)

    async def redeliver(self, keys: Sequence[str], ledger: ContractLedger) -> None:
        for item in list(ledger.recorded.values()):
            assert isinstance(item, Event) and item.time is not None
            data = item.data
            more = {
                "size": data["size"],
                "eTag": data["etag"],
                "sequencer": data["sequencer"],
                "versionId": data["version"],
            }
            record = self.bucket.record(
                "ObjectCreated:Put", data["key"], **{k: v for k, v in more.items() if v}
            )
            self.queue.send({"Records": [{**record, "eventTime": item.time.isoformat()}]})

    def key(self, item: Item) -> str:
        return item.data["key"]  # type: ignore[union-attr]

    async def acknowledged(self, ledger: ContractLedger) -> set[str]:
        return set() if await asyncio.to_thread(lambda: self.queue.remaining) else set(self.offered)


class BothHarness(QueueHarness):
    """A queue behind a topic, with scans. A second queue on the topic keeps copies of the
    notifications.
    """

    def __init__(self, aws: Aws) -> None:
        super().__init__(aws, reconcile=0.3)

    @asynccontextmanager
    async def source(self) -> AsyncIterator[None]:
        self.bucket = Bucket(self.aws)
        self.queue = self.bucket.queue(through="sns")
        self.copies = Queue(self.aws)
        self.aws.sns.subscribe(TopicArn=self.bucket.topic, Protocol="sqs", Endpoint=self.copies.arn)
        yield

    async def redeliver(self, keys: Sequence[str], ledger: ContractLedger) -> None:
        for body in await asyncio.to_thread(self.copies.receive_all):
            self.queue.send(body)


class ScanHarness(QueueHarness):
    """A bucket that is polled; an object is acknowledged when the cursor holds it."""

    @asynccontextmanager
    async def source(self) -> AsyncIterator[None]:
        self.bucket = Bucket(self.aws)
        yield

    def trigger(self) -> S3:
        return S3(
            self.bucket.name, name="arrivals", **{**QUICK, **self.aws.options, **self.options}
        )

    async def redeliver(self, keys: Sequence[str], ledger: ContractLedger) -> None:
        for key in keys:
            del ledger.cursors[f"o:{key}"]

    async def acknowledged(self, ledger: ContractLedger) -> set[str]:
        return {key.removeprefix("o:") for key in ledger.cursors if key.startswith("o:")}


@pytest.mark.parametrize("promise", CONTRACT)
@pytest.mark.parametrize("source", ["queue", "scan", "both"])
def test_contract(promise: Promise, source: str, aws: Aws):
    """A bucket keeps the promises of every trigger: by a queue, by scans, and by both together."""
    asyncio.run(
        promise({"queue": QueueHarness, "scan": ScanHarness, "both": BothHarness}[source](aws))
    )


def test_name_is_stable():
    """The name comes from bucket and prefix, or from the queue, or is given."""
    assert S3("lake", prefix="in/").name == "s3:lake/in" and S3("lake", name="x").name == "x"
    assert (
        S3(queue="arn:aws:sqs:eu-west-1:1:arrivals").name
        == S3(queue="https://sqs/1/arrivals").name
        == "s3:arrivals"
    )
