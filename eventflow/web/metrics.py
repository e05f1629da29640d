"""`/metrics` in Prometheus' text format: the sum of P9, the way in and through, triggers, loop lag.

api.py calls `render` for each scrape; nothing is counted twice, everything is read where it is kept anyway.
"""

import asyncio
from collections.abc import Iterable, Iterator

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import CollectorRegistry

from eventflow.core.clock import SECOND, Clock
from eventflow.events.event import Gauged
from eventflow.web.served import Served

STATES = ("completed", "failed", "dead", "cancelled", "suppressed", "pending")
LAG = 1.0
"""Seconds a scrape waits for a loop to answer."""


class _Once:
    """Metrics that were made already, as a collector."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)


async def render(app: Served) -> tuple[bytes, str]:
    """The page and its content type."""
    counts = await app.store.counts()
    metrics = [
        *_ledger(counts),
        *_worker(app),
        *_triggers(app),
        *_sources(app),
        *await _outlets(app),
        await _lag(app),
    ]
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    registry.register(_Once(metrics))  # pyright: ignore[reportArgumentType]
    return generate_latest(registry), CONTENT_TYPE_LATEST


def _ledger(counts: dict[str, int]) -> Iterator[Metric]:
    deliveries = GaugeMetricFamily(
        "eventflow_deliveries",
        "Deliveries by what became of them; their sum is what was accepted.",
        labels=["state"],
    )
    for state in STATES:
        deliveries.add_metric([state], counts[state])
    yield deliveries
    for name, said in (
        ("accepted", "Deliveries accepted."),
        ("events", "Events recorded."),
        ("duplicates", "Events that came again and started nothing."),
        ("conflicts", "Known events that came again with other content."),
        ("runs", "Runs recorded."),
    ):
        yield CounterMetricFamily(f"eventflow_{name}", said, value=counts[name])


def _worker(app: Served) -> Iterator[Metric]:
    said = "Runs in memory: working, held there, waiting for a slot."
    runs = GaugeMetricFamily("eventflow_worker_runs", said, labels=["where"])
    for where, count in app.house.worker.load.items():
        runs.add_metric([where], count)
    yield runs
    held = int(bool(app.house.worker.held_back))
    yield GaugeMetricFamily(
        "eventflow_worker_held_back", "1 while no runs are begun, for want of memory.", value=held
    )
    for name, value in app.store.commits.items():
        yield CounterMetricFamily(
            f"eventflow_commit_{name}", f"Group commits since the start: {name}.", value=value
        )
    full = app.store.room() is not None
    yield GaugeMetricFamily(
        "eventflow_intake_full", "1 while the ledger or the disk takes no more.", value=int(full)
    )


def _triggers(app: Served) -> Iterator[Metric]:
    up = GaugeMetricFamily(
        "eventflow_trigger_up",
        "1 while a trigger listens and is not paused.",
        labels=["trigger", "kind"],
    )
    counters = {
        name: CounterMetricFamily(
            f"eventflow_trigger_{name}", f"{name.capitalize()} since the start.", labels=["trigger"]
        )
        for name in ("events", "duplicates", "undecodable", "failures")
    }
    for name, struct in app.house.reactor.health.items():
        health = msgspec.structs.asdict(struct)
        up.add_metric(
            [name, health["kind"]], int(health["state"] == "listening" and not health["paused"])
        )
        for counted, metric in counters.items():
            metric.add_metric([name], health[counted])
    yield up
    yield from counters.values()


def _sources(app: Served) -> Iterator[Metric]:
    """What triggers tell about their sources: lag and the like."""
    metrics: dict[str, GaugeMetricFamily] = {}
    for trigger in app.triggers:
        for gauge in trigger.gauges() if isinstance(trigger, Gauged) else ():
            name, labels = (
                f"eventflow_trigger_{gauge.name}",
                {"trigger": trigger.name, **gauge.labels},
            )
            if name not in metrics:
                said = f"{gauge.name.replace('_', ' ').capitalize()}, as the trigger tells."
                metrics[name] = GaugeMetricFamily(name, said)
            metrics[name].add_sample(name, labels, gauge.value)
    yield from metrics.values()


async def _outlets(app: Served) -> list[Metric]:
    """What waits for sinks, and for how long the oldest of it."""
    waiting = GaugeMetricFamily(
        "eventflow_outbox_letters", "Letters that a sink does not have yet.", labels=["outlet"]
    )
    oldest = GaugeMetricFamily(
        "eventflow_outbox_oldest_seconds", "Age of the oldest of them.", labels=["outlet"]
    )
    counters = {
        name: CounterMetricFamily(
            f"eventflow_outlet_{name}", f"{name.capitalize()} since the start.", labels=["outlet"]
        )
        for name in ("sent", "refused", "failures")
    }
    health, depths, now = app.house.relay.health, await app.store.outbox_depths(), app.clock.now()
    for name in sorted(health.keys() | depths.keys()):
        count, since = depths.get(name, (0, now))
        waiting.add_metric([name], count)
        oldest.add_metric([name], max(0, now - since) / SECOND)
    for name, fared in health.items():
        for counted, metric in counters.items():
            metric.add_metric([name], getattr(fared, counted))
    return [waiting, oldest, *counters.values()]


async def _lag(app: Served) -> Metric:
    metric = GaugeMetricFamily(
        "eventflow_loop_lag_seconds", "How long a loop took to turn, now.", labels=["loop"]
    )
    here = asyncio.get_running_loop()
    flows, _ = app.house.flow_loop
    for name, loop in (("intake", here), *((("flows", flows),) if flows is not here else ())):
        metric.add_metric([name], await _turn(here, loop, app.clock))
    return metric


async def _turn(
    here: asyncio.AbstractEventLoop, loop: asyncio.AbstractEventLoop, clock: Clock
) -> float:
    begun, turned = clock.monotonic(), asyncio.Event()
    loop.call_soon_threadsafe(lambda: here.call_soon_threadsafe(turned.set))
    try:
        async with asyncio.timeout(LAG):
            await turned.wait()
    except TimeoutError:
        pass
    return clock.monotonic() - begun
