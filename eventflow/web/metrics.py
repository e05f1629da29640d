"""`/metrics` in Prometheus' text format: deliveries, worker, durations by flow and task, queues,
commits, triggers, sinks, loop lag.

api.py calls `render` for each scrape. Every value is read from where it is counted anyway.
"""

import asyncio
from collections.abc import Iterable, Iterator

import msgspec
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import CollectorRegistry

from eventflow.app import App
from eventflow.core.clock import SECOND, Clock
from eventflow.events.event import HasGauges

STATES = ("completed", "failed", "dead", "cancelled", "suppressed", "pending")
LOOP_TIMEOUT_SECONDS = 1.0
"""For one loop to run a callback; the lag is then reported as this long."""


class StaticCollector:
    """A collector of metrics that are complete already."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)


async def render(app: App) -> tuple[bytes, str]:
    """The page and its content type."""
    counts = await app.store.counts()
    metrics = [
        *_ledger(counts),
        *_worker(app),
        *_triggers(app),
        *_sources(app),
        *await _sinks(app),
        await _queue_age(app),
        *_durations(app),
        await _loop_lag(app),
    ]
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    registry.register(StaticCollector(metrics))  # pyright: ignore[reportArgumentType]
    return generate_latest(registry), CONTENT_TYPE_LATEST


def _ledger(counts: dict[str, int]) -> Iterator[Metric]:
    deliveries = GaugeMetricFamily(
        "eventflow_deliveries",
        "Deliveries by state; their sum is the number accepted.",
        labels=["state"],
    )
    for state in STATES:
        deliveries.add_metric([state], counts[state])
    yield deliveries
    for name, help_text in (
        ("accepted", "Deliveries accepted."),
        ("events", "Events recorded."),
        ("duplicates", "Events received again; they started nothing."),
        ("conflicts", "Known events received again with other content."),
        ("runs", "Runs recorded."),
    ):
        yield CounterMetricFamily(f"eventflow_{name}", help_text, value=counts[name])


def _worker(app: App) -> Iterator[Metric]:
    runs = GaugeMetricFamily(
        "eventflow_worker_runs",
        "Runs in memory: working, kept there while they wait, waiting for a slot.",
        labels=["where"],
    )
    for where, count in app.runtime.worker.load.items():
        runs.add_metric([where], count)
    yield runs
    yield GaugeMetricFamily(
        "eventflow_worker_paused",
        "1 while the worker starts no runs: memory is above the soft limit.",
        value=int(bool(app.runtime.worker.pause_reason)),
    )
    yield GaugeMetricFamily(
        "eventflow_threads_left_behind",
        "Plain task bodies that continue after their timeout or cancel, each in a thread.",
        value=app.runtime.worker.threads.left_behind,
    )
    for name, value in app.store.commits.items():
        yield CounterMetricFamily(
            f"eventflow_commit_{name}", f"Group commits since the start: {name}.", value=value
        )
    full = app.store.capacity() is not None
    yield GaugeMetricFamily(
        "eventflow_intake_full", "1 while the ledger or the disk is full.", value=int(full)
    )


def _triggers(app: App) -> Iterator[Metric]:
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
    for name, struct in app.runtime.reactor.health.items():
        health = msgspec.structs.asdict(struct)
        up.add_metric(
            [name, health["kind"]], int(health["state"] == "listening" and not health["paused"])
        )
        for counted, metric in counters.items():
            metric.add_metric([name], health[counted])
    yield up
    yield from counters.values()


def _sources(app: App) -> Iterator[Metric]:
    """The gauges of triggers: lag and others."""
    metrics: dict[str, GaugeMetricFamily] = {}
    for trigger in app.triggers:
        for gauge in trigger.gauges() if isinstance(trigger, HasGauges) else ():
            name = f"eventflow_trigger_{gauge.name}"
            labels = {"trigger": trigger.name, **gauge.labels}
            if name not in metrics:
                help_text = (
                    f"{gauge.name.replace('_', ' ').capitalize()}, as the trigger reports it."
                )
                metrics[name] = GaugeMetricFamily(name, help_text)
            metrics[name].add_sample(name, labels, gauge.value)
    yield from metrics.values()


async def _sinks(app: App) -> list[Metric]:
    waiting = GaugeMetricFamily(
        "eventflow_outbox_messages", "Messages not sent yet.", labels=["sink"]
    )
    oldest = GaugeMetricFamily(
        "eventflow_outbox_oldest_seconds", "Age of the oldest message not sent.", labels=["sink"]
    )
    counters = {
        name: CounterMetricFamily(
            f"eventflow_sink_{name}", f"{name.capitalize()} since the start.", labels=["sink"]
        )
        for name in ("sent", "rejected", "failures")
    }
    health = app.runtime.relay.health
    depths = await app.store.outbox_depths()
    now = app.clock.now()
    for name in sorted(health.keys() | depths.keys()):
        count, since = depths.get(name, (0, now))
        waiting.add_metric([name], count)
        oldest.add_metric([name], max(0, now - since) / SECOND)
    for name, state in health.items():
        for counted, metric in counters.items():
            metric.add_metric([name], getattr(state, counted))
    return [waiting, oldest, *counters.values()]


async def _queue_age(app: App) -> Metric:
    age = GaugeMetricFamily(
        "eventflow_queue_age_seconds",
        "How long the first pending run of a flow has been due; 0 if none is.",
        labels=["flow"],
    )
    flows = sorted(app.flows)
    heads = await app.store.queue_heads(flows)
    now = app.clock.now()
    for flow in flows:
        age.add_metric([flow], max(0, now - heads.get(flow, now)) / SECOND)
    return age


def _durations(app: App) -> Iterator[Metric]:
    runs, attempts = app.runtime.worker.durations
    for durations, name, label, help_text in (
        (runs, "run", "flow", "Seconds from the start of a run to its end."),
        (attempts, "task", "task", "Seconds that the body of a task's attempt took."),
    ):
        metric = HistogramMetricFamily(
            f"eventflow_{name}_duration_seconds", help_text, labels=[label, "outcome"]
        )
        for (what, outcome), (buckets, total) in durations.read().items():
            metric.add_metric([what, outcome], buckets, total)
        yield metric


async def _loop_lag(app: App) -> Metric:
    metric = GaugeMetricFamily(
        "eventflow_loop_lag_seconds", "How long a callback waits on the loop, now.", labels=["loop"]
    )
    here = asyncio.get_running_loop()
    flows, _ = app.runtime.flow_loop
    for name, loop in (("intake", here), *((("flows", flows),) if flows is not here else ())):
        metric.add_metric([name], await _turn_seconds(here, loop, app.clock))
    return metric


async def _turn_seconds(
    here: asyncio.AbstractEventLoop, loop: asyncio.AbstractEventLoop, clock: Clock
) -> float:
    start = clock.monotonic()
    turned = asyncio.Event()
    loop.call_soon_threadsafe(lambda: here.call_soon_threadsafe(turned.set))
    try:
        async with asyncio.timeout(LOOP_TIMEOUT_SECONDS):
            await turned.wait()
    except TimeoutError:
        pass  # the loop is blocked; the lag is at least this long
    return clock.monotonic() - start
