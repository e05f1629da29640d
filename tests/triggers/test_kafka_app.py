"""Kafka in a whole app: records to runs, lanes by key, dead letters, a full ledger, and the API."""

import asyncio
import re
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from eventflow import App, Event, flow
from eventflow.web.api import make_asgi
from tests.brokers import Broker, free_port, given_or_noida
from tests.conftest import eventually, stays
from tests.triggers.kafka_topic import QUICK
from triggers.kafka import Kafka

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with given_or_noida(tmp_path_factory.mktemp("broker")) as running:
        yield running


class Shop:
    """An app with one trigger on a topic; `gates` are what its flows may wait for."""

    def __init__(self, broker: Broker, topic: str, folder: Path, **options: Any) -> None:
        self.broker = broker
        self.topic = topic
        self.gates: dict[str, threading.Event] = {}
        self.app = App("shop", store=f"sqlite:///{folder}/shop.db", **options)
        self.trigger = Kafka(
            topic, bootstrap_servers=broker.server, group_id=f"g-{topic}", name="kafka", **QUICK
        )

    async def counts(self, **expected: int) -> None:
        async def agree() -> bool:
            counts = await self.app.store.counts()
            return all(counts[name] == n for name, n in expected.items())

        await eventually(agree, f"the counts are {expected}", within=60)

    async def get(self, path: str) -> Any:
        transport = httpx2.ASGITransport(make_asgi(self.app, auth=False, manage=False))
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=30
        ) as client:
            answer = await client.get(path)
            assert answer.status_code == 200, answer.text
            return (
                answer.json()
                if answer.headers["content-type"] == "application/json"
                else answer.text
            )


async def passed(gate: threading.Event) -> None:
    """Flows may run on another loop, so a gate is a thread event."""
    await eventually(gate.is_set, "the gate is open")


Work = Callable[[Shop], Awaitable[None]]


def run(
    broker: Broker,
    folder: Path,
    prepare: Callable[[Shop], None],
    work: Work,
    partitions: int = 1,
    **options: Any,
) -> None:
    async def go() -> None:
        shop = Shop(broker, await broker.create(partitions=partitions), folder, **options)
        prepare(shop)
        async with shop.app:
            await work(shop)

    asyncio.run(go())


def test_c1_records_become_runs_once(broker: Broker, tmp_path: Path):
    """C1: each record starts one run; a CloudEvent that comes again starts none and is counted; a
    second life starts none.
    """
    topic = asyncio.run(broker.create())
    headers = [
        ("ce_specversion", b"1.0"),
        ("ce_id", b"one"),
        ("ce_source", b"/s"),
        ("ce_type", b"t"),
    ]
    seen: list[Any] = []

    @flow
    async def handle(event: Event) -> None:
        seen.append(event.data)

    def app() -> App:
        made = App("shop", store=f"sqlite:///{tmp_path}/shop.db")
        made.on(
            Kafka(
                topic, bootstrap_servers=broker.server, group_id=f"g-{topic}", name="kafka", **QUICK
            ),
            handle,
        )
        return made

    async def life(shop: App, **expected: int) -> None:
        async def agree() -> bool:
            counts = await shop.store.counts()
            return all(counts[name] == n for name, n in expected.items())

        async with shop:
            await eventually(agree, f"the counts are {expected}", within=60)

    async def go() -> None:
        await broker.send(topic, {"n": 1}, {"n": 2})
        await broker.send(topic, {"n": 3}, {"n": 3}, headers=headers)
        await life(app(), completed=3, duplicates=1, pending=0)
        await broker.send(topic, {"n": 4})
        await life(app(), completed=4, duplicates=1, pending=0)

    asyncio.run(go())
    assert sorted(each["n"] for each in seen) == [1, 2, 3, 4]


def test_c14_records_of_one_key_run_in_order(broker: Broker, tmp_path: Path):
    """C14: with key="record" the second of a key waits while the first is slow, and another key's
    runs at once; keys that are no text are keys too.
    """
    started: list[str] = []

    def prepare(shop: Shop) -> None:
        shop.gates["a1"] = threading.Event()

        @flow
        async def handle(event: Event) -> None:
            started.append(event.data)
            if event.data in shop.gates:
                await passed(shop.gates[event.data])

        shop.app.on(shop.trigger, handle, key="record")

    async def work(shop: Shop) -> None:
        await broker.send(shop.topic, "a1", key=b"\xffa")
        await broker.send(shop.topic, "a2", key=b"\xffa")
        await broker.send(shop.topic, "b1", key=b"b")
        await broker.send(shop.topic, "none")
        await shop.counts(completed=2)
        assert sorted(started) == ["a1", "b1", "none"]
        shop.gates["a1"].set()
        await shop.counts(completed=4, pending=0)
        assert started.index("a2") > started.index("a1")

    run(broker, tmp_path, prepare, work)


def test_a_bad_record_is_a_dead_letter_with_its_bytes(broker: Broker, tmp_path: Path):
    """P9: a record that cannot be decoded and one that cannot be bound are dead letters; with
    bytes, headers and coordinates.
    """

    def prepare(shop: Shop) -> None:
        @flow
        async def handle(total: int) -> int:
            return total

        shop.app.on(shop.trigger, handle)

    async def work(shop: Shop) -> None:
        await broker.send(shop.topic, b"{broken", headers=[("tenant", b"blue")])
        await broker.send(shop.topic, {"totl": 3}, {"total": 3})
        await shop.counts(completed=1, dead=2, pending=0)
        dead_letters = {
            each["subscription"]: each for each in (await shop.get("/api/dead"))["dead"]
        }
        whole = await shop.get(f"/api/dead/{dead_letters['']['id']}")
        assert (
            whole["body"] == "{broken" and dead_letters["kafka/handle"]["reason"].find("total") >= 0
        )
        rows = (await shop.get("/api/events"))["events"]
        assert {row["trigger"] for row in rows} == {"kafka"} and len(rows) == 3

    run(broker, tmp_path, prepare, work)


def test_lag_is_shown(broker: Broker, tmp_path: Path):
    """/metrics has the lag of each partition in messages and seconds, the API its sum, and both
    show why it grows.
    """

    def prepare(shop: Shop) -> None:
        @flow
        async def handle(event: Event) -> None: ...

        shop.app.on(shop.trigger, handle)

    async def work(shop: Shop) -> None:
        await broker.send(shop.topic, *range(10), partition=1)
        await shop.counts(completed=10)

        async def level() -> bool:
            (row,) = (await shop.get("/api/triggers"))["triggers"]
            return (
                row["totals"] == {"lag_messages": 0, "lag_seconds": 0} and row["condition"] is None
            )

        await eventually(level, "nothing lags")
        text = await shop.get("/metrics")
        labels = f'{{partition="1",topic="{shop.topic}",trigger="kafka"}}'
        assert (
            f"eventflow_trigger_lag_messages{labels} 0.0" in text
            and f"eventflow_trigger_lag_seconds{labels} 0.0" in text
        )

    run(broker, tmp_path, prepare, work, partitions=2)


def test_c10_a_flood_fills_the_ledger_and_no_further(broker: Broker, tmp_path: Path):
    """C10, P8: 5,000 records and room for 500: the partitions pause, nothing is dropped, and in the
    end all have run.
    """
    gates: list[threading.Event] = []

    def prepare(shop: Shop) -> None:
        gates.append(threading.Event())

        @flow
        async def handle(event: Event) -> None:
            await passed(gates[0])

        shop.trigger = Kafka(
            shop.topic,
            bootstrap_servers=broker.server,
            group_id=f"g-{shop.topic}",
            name="kafka",
            max_poll_records=100,
            **QUICK,
        )
        shop.app.on(shop.trigger, handle)

    async def work(shop: Shop) -> None:
        await broker.send(shop.topic, *range(5_000))
        await eventually(
            lambda: "paused" in (shop.trigger.condition or ""), "the trigger is paused", within=60
        )
        counts = await shop.app.store.counts()
        assert 500 <= counts["pending"] <= 600
        lag = sum(gauge.value for gauge in shop.trigger.gauges() if gauge.name == "lag_messages")
        assert lag == 5_000 - counts["events"]
        gates[0].set()
        await shop.counts(completed=5_000, pending=0, duplicates=0)

    run(broker, tmp_path, prepare, work, max_pending=500)


POLL_INTERVAL_MS = 2_000


def test_long_flows_cause_no_rebalance(broker: Broker, tmp_path: Path):
    """Flows that run longer than the poll interval do not cost the member its group."""
    gate: list[threading.Event] = []

    def prepare(shop: Shop) -> None:
        gate.append(threading.Event())

        @flow
        async def handle(event: Event) -> None:
            await passed(gate[0])

        shop.trigger = Kafka(
            shop.topic,
            bootstrap_servers=broker.server,
            group_id=f"g-{shop.topic}",
            name="kafka",
            max_poll_interval_ms=POLL_INTERVAL_MS,
            **QUICK,
        )
        shop.app.on(shop.trigger, handle)

    async def work(shop: Shop) -> None:
        await broker.send(shop.topic, *range(3))
        await shop.counts(pending=3)
        session = shop.trigger._sessions[0]
        epoch = session.partitions.epoch
        await stays(
            lambda: session.partitions.epoch == epoch and shop.trigger._sessions == [session],
            "it keeps its partitions",
            during=3 * POLL_INTERVAL_MS / 1000,
        )
        gate[0].set()
        await shop.counts(completed=3, pending=0)

    run(broker, tmp_path, prepare, work)


def test_c11_a_source_that_is_away_leaves_the_others_alone(broker: Broker, tmp_path: Path):
    """C11: while one trigger finds no broker, another one's records run, and the API shows both
    states.
    """

    def prepare(shop: Shop) -> None:
        @flow
        async def handle(event: Event) -> None: ...

        shop.app.on(shop.trigger, handle)
        nowhere = f"127.0.0.1:{free_port()}"
        shop.app.on(Kafka("orders", bootstrap_servers=nowhere, group_id="g", name="away"), handle)

    async def work(shop: Shop) -> None:
        await broker.send(shop.topic, *range(3))
        await shop.counts(completed=3, pending=0)

        async def reported() -> bool:
            rows = {row["name"]: row for row in (await shop.get("/api/triggers"))["triggers"]}
            return (
                "connecting: KafkaConnectionError" in (rows["away"]["condition"] or "")
                and rows["kafka"]["condition"] is None
            )

        await eventually(reported, "the page shows the difference")

    run(broker, tmp_path, prepare, work)


def test_memory_is_flat_behind_a_full_ledger():
    """While records wait in a topic behind a ledger that is full, the process does not grow. The
    whole measure is `python -m benchmarks.kafka waiting`.
    """
    sizes = ["--records", "30000", "--max-pending", "2000", "--seconds", "5"]
    command = [sys.executable, "-m", "benchmarks.kafka", "waiting", *sizes]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"2[78],\d{3} records wait", done.stdout), done.stdout
