"""A monitor over other triggers: a Kafka topic on a real broker, objects in a real S3; and a flow
that resets the reference.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson
import pytest
from starlette.routing import Mount

from eventflow import App, flow, task
from eventflow.events.event import Event
from eventflow.testing import MemoryTrigger, drain, running
from eventflow.testing.trigger_contract import ContractLedger, listening
from tests.aws import Aws, Bucket, ministack
from tests.brokers import Broker, given_or_noida
from tests.conftest import eventually
from tests.triggers.kafka_topic import Topic
from tests.triggers.serving import serving
from triggers import S3, Drift, DriftAlert, DriftMonitor

__all__ = ["ministack"]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with given_or_noida(tmp_path_factory.mktemp("broker")) as running_broker:
        yield running_broker


def rows(seed: int, count: int, mean: float = 0.0) -> list[dict[str, float]]:
    return [{"x": value} for value in np.random.default_rng(seed).normal(mean, 1, count).tolist()]


def reference() -> Mapping[str, Sequence[float]]:
    return {"x": [row["x"] for row in rows(0, 3000)]}


def memory(ledger: ContractLedger) -> dict[str, Any]:
    found = ledger.cursors.get("drift:meta", {})
    assert isinstance(found, dict)
    return found


def counted(ledger: ContractLedger) -> int:
    """Rows in the open windows, as stored."""
    return sum(value[0] for key, value in ledger.cursors.items() if key.startswith("drift:w/"))  # pyright: ignore


class JsonLedger(ContractLedger):
    """Cursors as JSON, as on disk: later changes of the monitor's own objects do not reach them."""

    async def accept(self, *items: Any, cursor: Any = None, max_wait: float | None = None) -> Any:
        stored = msgspec.json.decode(msgspec.json.encode(cursor))
        return await super().accept(*items, cursor=stored, max_wait=max_wait)

    async def cursor(self) -> Any:
        return msgspec.json.decode(msgspec.json.encode(self.cursors))


def test_a_topic_is_watched_over_restarts_and_rewinds(broker: Broker):
    """Each record counts once: over a restart in mid-window, and when the topic is read again from
    the beginning.
    """

    async def main() -> None:
        topic = Topic(broker, "scores")
        ledger = JsonLedger()
        sent = [orjson.dumps(row) for row in rows(1, 700)] + [
            orjson.dumps(row) for row in rows(2, 1100, 1.0)
        ]

        def monitor() -> DriftMonitor:
            return DriftMonitor(
                topic.make(), features=["x"], reference=reference(), window=500, cooldown=0
            )

        await broker.create(topic.name, 1)
        await topic.send(*sent[:700])
        async with listening(monitor(), ledger):
            await eventually(
                lambda: (memory(ledger).get("judged"), counted(ledger)) == (1, 200),
                "700 rows count",
                within=60,
            )
        for key in [key for key in ledger.cursors if key.startswith("source:")]:
            del ledger.cursors[key]  # a position that was lost: the topic comes again
        await broker.commit(topic.group, topic.name, 0)
        await topic.send(*sent[700:])
        async with listening(monitor(), ledger):
            await eventually(
                lambda: (memory(ledger)["judged"], counted(ledger)) == (3, 300),
                "1,800 rows count",
                within=60,
            )
        (event,) = ledger.recorded.values()
        assert isinstance(event, Event) and event.type == "drift.detected"
        assert any(key.startswith("source:") for key in ledger.cursors)

    asyncio.run(main())


def test_objects_that_arrive_are_batches(ministack: Aws):
    """Each object under a prefix is a window; its rows come from an async `rows=` from a client of
    the user's own.
    """

    async def main() -> None:
        bucket, ledger = Bucket(ministack), JsonLedger()

        async def read(event: Event) -> list[dict[str, float]]:
            return orjson.loads(await asyncio.to_thread(bucket.read, event.data["key"]))

        source = S3(bucket.name, prefix="in/", poll=0.2, **ministack.options)
        monitor = DriftMonitor(
            source, features=["x"], reference=reference(), window="batch", rows=read, confirm=1
        )
        async with listening(monitor, ledger):
            await asyncio.to_thread(bucket.put, "in/a.json", orjson.dumps(rows(3, 800)))
            await eventually(
                lambda: memory(ledger).get("judged") == 1,
                "the first object is evaluated",
                within=60,
            )
            await asyncio.to_thread(bucket.put, "in/b.json", orjson.dumps(rows(4, 800, 1.0)))
            await eventually(lambda: ledger.recorded, "the drifted one is reported", within=60)
        assert memory(ledger)["judged"] == 2 and len(ledger.recorded) == 1

    asyncio.run(main())


def test_an_alarm_through_a_real_sns_is_confirmed_and_taken(ministack: Aws):
    """A topic that is subscribed over HTTP asks, is reported yes, and its alarm is one event; one
    of another topic is refused.
    """
    alarm = {
        "AlarmName": "prices",
        "NewStateValue": "ALARM",
        "StateChangeTime": "2026-11-22T10:00:00.000+0000",
        "Trigger": {
            "MetricName": "feature_baseline_drift_amount",
            "Dimensions": [],
            "Threshold": 0.2,
        },
    }

    async def main() -> None:
        topics = [
            ministack.sns.create_topic(Name=f"drift-{name}")["TopicArn"]
            for name in ("ours", "theirs")
        ]
        sns = ministack.url.replace("127.0.0.1", "localhost")  # as it calls itself
        trigger, ledger = (
            DriftAlert("/drift", verify="none", topics=topics[:1], sns=sns),
            ContractLedger(),
        )
        asked = list[int]()

        async def counting(scope: Any, receive: Any, send: Any) -> None:
            async def seen(message: Any) -> None:
                if message["type"] == "http.response.start":
                    asked.append(message["status"])
                await send(message)

            await trigger(scope, receive, seen)

        async with serving([Mount("/", counting)]) as port, listening(trigger, ledger):
            for topic in topics:
                endpoint = f"http://127.0.0.1:{port}/hooks/drift"
                await asyncio.to_thread(
                    ministack.sns.subscribe, TopicArn=topic, Protocol="http", Endpoint=endpoint
                )
            await eventually(lambda: sorted(asked) == [200, 403], "both topics have asked")
            for topic in topics:
                await asyncio.to_thread(
                    ministack.sns.publish, TopicArn=topic, Message=json.dumps(alarm)
                )
            await eventually(lambda: ledger.events, "the alarm is an event")
        (event,) = ledger.events
        assert event.data["sender"] == "sagemaker" and event.data["feature"] == "amount"

    asyncio.run(main())


def test_a_flow_on_its_own_loop_makes_a_new_reference(tmp_path: Path):
    """A retraining ends with `relearn`: from another thread's loop, durable, and what was drift is
    the reference then.
    """
    source = MemoryTrigger("rows")
    monitor = DriftMonitor(source, features=["x"], reference=500, window=500, confirm=1, cooldown=0)

    @task
    async def begin_anew() -> None:
        await monitor.relearn()

    @flow
    async def retrain(drift: Drift) -> str:
        await begin_anew()
        return drift.labels["reference"]

    async def main() -> None:
        app = App("relearn")
        app.on(monitor, retrain)
        async with running(app, store=tmp_path / "a.db", own_loop=True):
            await source.send(data=rows(5, 500))
            await source.send(data=rows(6, 500, 2.0))
            await drain(app)
            (run,) = await app.store.runs(flow="retrain")
            assert run["state"] == "completed"
        async with running(app, store=tmp_path / "a.db", own_loop=True):  # it was stored
            await source.send(data=rows(7, 1500, 2.0))
            await drain(app)
            assert len(await app.store.runs(flow="retrain")) == 1
            assert [
                gauge.value for gauge in monitor.gauges() if gauge.name == "drift_windows_judged"
            ] == [3]

    asyncio.run(main())
