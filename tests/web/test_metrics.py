"""The durations and queue ages of `/metrics`, held against counts made by hand."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from eventflow import App, Permanent, flow, sleep, task
from eventflow.engine.durations import BOUNDS, MAX_SERIES, Durations
from eventflow.testing import VirtualClock
from eventflow.testing.idle import wait_until_idle
from eventflow.web.api import make_asgi

pytestmark = pytest.mark.anyio

RUN = "eventflow_run_duration_seconds"
TASK = "eventflow_task_duration_seconds"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@task
async def work() -> None: ...


@task
async def broken() -> None:
    raise Permanent("no")


@flow
async def naps(seconds: float) -> None:
    await work()
    await sleep(seconds)


@flow
async def fails() -> None:
    await work()
    await broken()


@task
def wait() -> None:
    GATE.wait(20)


@flow(concurrency=1)
async def queued(gate: bool = False) -> None:
    if gate:
        await wait()


GATE = threading.Event()


async def scrape(app: App) -> Samples:
    transport = httpx2.ASGITransport(make_asgi(app, auth=False, manage=False))
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def series(samples: Samples, name: str, **labels: str) -> dict[str, float]:
    """The buckets of one histogram by `le`, its `sum` and `count`."""
    wanted = set(labels.items())
    found: dict[str, float] = {}
    for (sample, given), value in samples.items():
        if sample.startswith(name) and wanted <= given:
            rest = dict(given - wanted)
            assert not rest.keys() - {"le"}, rest
            found[rest.get("le", sample.removeprefix(f"{name}_"))] = value
    return found


@asynccontextmanager
async def opened(tmp_path: Path, *flows: object) -> AsyncIterator[tuple[App, VirtualClock]]:
    clock = VirtualClock()
    app = App("shop", clock=clock, store=f"sqlite:///{tmp_path}/shop.db")
    for each in flows:
        app.add(each)  # pyright: ignore[reportArgumentType]
    await app.open()
    clock.attach(app)
    try:
        yield app, clock
    finally:
        await app.close(grace=0)


async def test_runs_are_counted_by_flow_and_outcome(tmp_path: Path):
    """A run counts from its start to its end, sleeps included, in the bucket of its flow and
    outcome; a task's attempts count by the task's name.
    """
    async with opened(tmp_path, naps, fails) as (app, clock):
        for seconds in (3, 3, 20, 7200):  # buckets: ≤ 5, ≤ 5, ≤ 30, above all
            await app.start(naps, seconds=seconds)
        await app.start(fails)
        await wait_until_idle(app, 0.2)
        for step in (3, 17, 7180):
            await clock.advance(step)
            await wait_until_idle(app, 0.2)
        counts = await app.store.counts()
        samples = await scrape(app)
    assert (counts["completed"], counts["failed"]) == (4, 1)
    completed = series(samples, RUN, flow="naps", outcome="completed")
    assert {le: completed[le] for le in ("1.0", "5.0", "30.0", "3600.0", "+Inf", "count")} == {
        "1.0": 0, "5.0": 2, "30.0": 3, "3600.0": 3, "+Inf": 4, "count": 4,
    }  # fmt: skip
    assert completed["sum"] == pytest.approx(3 + 3 + 20 + 7200, abs=1)
    assert series(samples, RUN, flow="fails", outcome="failed")["count"] == 1
    assert series(samples, RUN, flow="fails", outcome="completed") == {}
    assert series(samples, TASK, task="work", outcome="completed")["count"] == 5
    assert series(samples, TASK, task="broken", outcome="failed")["count"] == 1


def test_a_duration_on_a_bound_is_within_it():
    """Buckets are cumulative and hold their upper bound; `+Inf` has all; the sum is the sum."""
    durations = Durations()
    for seconds in (0.0, 0.005, 0.0051, 0.5, 3600.0, 3600.1):
        durations.observe("f", "completed", seconds)
    (buckets, total) = durations.read()["f", "completed"]
    assert [int(count) for _, count in buckets] == [2, 3, 3, 4, 4, 4, 4, 4, 4, 5, 6]
    assert [le for le, _ in buckets] == [*map(str, BOUNDS), "+Inf"]
    assert total == pytest.approx(7200.6101)


def test_generated_names_are_bounded():
    """After so many label sets no new one is counted, and the known ones go on."""
    durations = Durations()
    for n in range(MAX_SERIES + 5):
        durations.observe(f"task-{n}", "completed", 1.0)
    durations.observe("task-0", "completed", 1.0)
    read = durations.read()
    assert len(read) == MAX_SERIES
    assert read["task-0", "completed"][1] == 2.0


async def test_the_queue_age_is_that_of_the_first_due_run(tmp_path: Path):
    """`eventflow_queue_age_seconds` is how long the first pending run of a flow has been due; 0
    where none waits, and for one that is due later.
    """
    GATE.clear()
    age = "eventflow_queue_age_seconds"
    async with opened(tmp_path, queued, naps) as (app, clock):
        await app.start(queued, gate=True)
        await wait_until_idle(app, 0.2)
        await app.start(queued)  # waits for the place of the first
        await clock.advance(90)
        await app.start(queued)
        await clock.advance(10)
        samples = await scrape(app)
        GATE.set()
        await wait_until_idle(app, 0.2)
        after = await scrape(app)
    assert samples[age, frozenset({("flow", "queued")})] == pytest.approx(100, abs=1)
    assert samples[age, frozenset({("flow", "naps")})] == 0
    assert after[age, frozenset({("flow", "queued")})] == 0
