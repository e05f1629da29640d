"""What users declare is checked where they write it: names of options, durations, counts."""

import asyncio
import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import eventflow
from eventflow import (
    App,
    Backoff,
    Batch,
    Debounce,
    Each,
    Latest,
    Retry,
    RetryAfter,
    Singleflight,
    UsageError,
    absent,
    all_of,
    any_of,
    checks,
    count,
    flow,
    part,
    sequence,
    sleep,
    task,
    timeout,
)
from triggers import (
    HMAC,
    S3,
    At,
    Bearer,
    Categorical,
    Cron,
    Directory,
    DriftAlert,
    DriftMonitor,
    Every,
    GitHub,
    Kafka,
    KafkaSink,
    Numeric,
    RunState,
    Webhook,
    move,
)

HERE = Path(__file__).name


def _app() -> Any:
    return App("declared")


@flow
async def accepts(event: eventflow.Event) -> None:
    """Takes any event."""


def _task(**options: Any) -> Any:
    @task(**options)
    async def body() -> None: ...

    return body


def _flow(**options: Any) -> Any:
    @flow(**options)
    async def body() -> None: ...

    return body


MISSPELT: dict[str, tuple[Callable[[], Any], str]] = {
    "App": (lambda: App("a", max_pendng=3), "max_pending"),  # type: ignore[call-arg]
    "App keyword of its own": (lambda: App("a", concurency=3), "concurrency"),  # type: ignore[call-arg]
    "task": (lambda: _task(retires=3), "retries"),
    "task: none is near": (lambda: _task(colour=3), "retries"),
    "task.options_with": (lambda: _task().options_with(retrys=3), "retries"),
    "flow": (lambda: _flow(timout=3), "timeout"),
    "app.on": (lambda: _app().on("a", accepts, wher={}), "where"),
    "app.send": (lambda: _app().send("a", to=None, wher={}), "where"),
    "app.send_dead_letters": (lambda: _app().send_dead_letters(too=None), "to"),
    "app.asgi": (lambda: _app().asgi(auht=False), "auth"),
    "Retry": (lambda: Retry(attemps=3), "attempts"),  # type: ignore[call-arg]
    "Backoff": (lambda: Backoff(dely=3), "delay"),  # type: ignore[call-arg]
    "Batch": (lambda: Batch(3, witin=3), "within"),  # type: ignore[call-arg]
    "Debounce": (lambda: Debounce(3, maxwait=3), "max_wait"),  # type: ignore[call-arg]
    "Each": (lambda: Each(size=3), "it has none"),  # type: ignore[call-arg]
    "Latest": (lambda: Latest(size=3), "it has none"),  # type: ignore[call-arg]
    "Singleflight": (lambda: Singleflight(size=3), "it has none"),  # type: ignore[call-arg]
    "all_of": (lambda: all_of("a", "b", witin=3), "within"),  # type: ignore[call-arg]
    "any_of": (lambda: any_of("a", bye="x"), "by"),  # type: ignore[call-arg]
    "sequence": (lambda: sequence("a", the="b", within=3), "then"),  # type: ignore[call-arg]
    "count": (lambda: count("a", 3, wihtin=3), "within"),  # type: ignore[call-arg]
    "absent": (lambda: absent("a", fro_=3), "for_"),  # type: ignore[call-arg]
    "part": (lambda: part("a", wher={}), "where"),  # type: ignore[call-arg]
    "checks": (lambda: checks.gate("auc", 1.0, atleast=0.5), "at_least"),  # type: ignore[call-arg]
    "Webhook": (lambda: Webhook("/a", verify="none", max_bdy=1), "max_body"),  # type: ignore[call-arg]
    "DriftAlert": (lambda: DriftAlert("/a", verify="none", filds={}), "fields"),  # type: ignore[call-arg]
    "DriftMonitor": (lambda: DriftMonitor(Every(1), featurs=["a"]), "features"),  # type: ignore[call-arg]
    "Numeric": (lambda: Numeric(metrc="psi"), "metric"),  # type: ignore[call-arg]
    "Categorical": (lambda: Categorical(topp=3), "top"),  # type: ignore[call-arg]
    "Directory": (lambda: Directory("a", setle=3), "settle"),  # type: ignore[call-arg]
    "move": (lambda: move(too="a"), "to"),  # type: ignore[call-arg]
    "Kafka": (lambda: Kafka("a", group_id="g", decod="json"), "decode"),
    "KafkaSink": (lambda: KafkaSink("a", mod="binary"), "mode"),
    "S3": (lambda: S3("a", prefx="b"), "prefix"),  # type: ignore[call-arg]
    "Cron": (lambda: Cron("* * * * *", missfire="skip"), "misfire"),  # type: ignore[call-arg]
    "Every": (lambda: Every(minuts=3), "minutes"),  # type: ignore[call-arg]
    "At": (lambda: At(graze=3), "grace"),  # type: ignore[call-arg]
    "RunState": (lambda: RunState("a", "late", aftr=3), "after"),  # type: ignore[call-arg]
    "GitHub": (lambda: GitHub(secrt="x"), "secret"),  # type: ignore[call-arg]
    "HMAC": (lambda: HMAC("x", heder="X"), "header"),  # type: ignore[call-arg]
    "Bearer": (lambda: Bearer(tokn="x"), "token"),  # type: ignore[call-arg]
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_option_names_the_nearest_one_and_the_line(name: str) -> None:
    """An unknown option of a public callable is a UsageError with file, line and nearest name."""
    declare, expected = MISSPELT[name]
    with pytest.raises(UsageError) as caught:
        declare()
    assert expected in str(caught.value)
    assert f"{HERE}:{declare.__code__.co_firstlineno}" in str(caught.value) or HERE in str(
        caught.value
    )
    assert caught.value.location is not None
    assert HERE in caught.value.location


WRONG: dict[str, Callable[[], Any]] = {
    "flow timeout inf": lambda: _flow(timeout=math.inf),
    "flow timeout nan": lambda: _flow(timeout=math.nan),
    "flow timeout 0": lambda: _flow(timeout=0),
    "flow timeout negative": lambda: _flow(timeout=timedelta(seconds=-1)),
    "flow timeout text": lambda: _flow(timeout="5m"),
    "flow timeout bool": lambda: _flow(timeout=True),
    "flow timeout beyond the calendar": lambda: _flow(timeout=1e300),
    "flow grace nan": lambda: _flow(grace=math.nan),
    "flow grace inf": lambda: _flow(grace=math.inf),
    "flow grace negative": lambda: _flow(grace=-1),
    "flow concurrency 0": lambda: _flow(concurrency=0),
    "flow concurrency 1.5": lambda: _flow(concurrency=1.5),
    "flow priority nan": lambda: _flow(priority=math.nan),
    "flow name empty": lambda: _flow(name=""),
    "flow hook": lambda: _flow(on_success="mail"),
    "task timeout inf": lambda: _task(timeout=math.inf),
    "task timeout nan": lambda: _task(timeout=math.nan),
    "task concurrency 0": lambda: _task(concurrency=0),
    "task concurrency True": lambda: _task(concurrency=True),
    "task retries -1": lambda: _task(retries=-1),
    "task retries nan": lambda: _task(retries=[1, math.nan]),
    "task retries inf": lambda: _task(retries=[math.inf]),
    "task retries negative": lambda: _task(retries=[-1]),
    "task retries float": lambda: _task(retries=1.5),
    "task retries text": lambda: _task(retries="3"),
    "task key": lambda: _task(key="id"),
    "task name empty": lambda: _task(name=" "),
    "options_with": lambda: _task().options_with(timeout=math.nan),
    "RetryAfter inf": lambda: RetryAfter(math.inf),
    "RetryAfter nan": lambda: RetryAfter(math.nan),
    "RetryAfter negative": lambda: RetryAfter(-1),
    "Retry attempts 0": lambda: Retry(attempts=0),
    "Retry delay nan": lambda: Retry(delay=math.nan),
    "Retry delay inf": lambda: Retry(delay=math.inf),
    "Retry factor nan": lambda: Retry(factor=math.nan),
    "Retry max_delay inf": lambda: Retry(max_delay=math.inf),
    "Backoff delay nan": lambda: Backoff(delay=math.nan),
    "Backoff max_delay inf": lambda: Backoff(max_delay=math.inf),
    "App concurrency 0": lambda: App("a", concurrency=0),
    "App threads 0": lambda: App("a", threads=0),
    "App retention negative": lambda: App("a", retention=-1),
    "App retention nan": lambda: App("a", retention=math.nan),
    "App identities negative": lambda: App("a", identities=timedelta(days=-1)),
    "App identities inf": lambda: App("a", identities=math.inf),
    "App max_pending 0": lambda: App("a", max_pending=0),
    "App max_pending_bytes text": lambda: App("a", max_pending_bytes="1 GB"),  # type: ignore
    "App synchronous": lambda: App("a", synchronous="OFF"),  # type: ignore
    "App name empty": lambda: App(""),
    "app.on priority": lambda: _app().on("a", accepts, priority=1.5),
    "Batch size 0": lambda: Batch(0, within=1),
    "Batch within nan": lambda: Batch(2, within=math.nan),
    "Batch within inf": lambda: Batch(2, within=math.inf),
    "Debounce quiet nan": lambda: Debounce(math.nan, max_wait=3),
    "Debounce max_wait nan": lambda: Debounce(1, max_wait=math.nan),
    "all_of within nan": lambda: all_of("a", "b", within=math.nan),
    "all_of lateness nan": lambda: all_of("a", "b", within=1, lateness=math.nan),
    "count n 0": lambda: count("a", 0, within=1),
    "count n 2.5": lambda: count("a", 2.5, within=1),  # type: ignore
    "absent for inf": lambda: absent("a", math.inf),
    "sequence within 0": lambda: sequence("a", then="b", within=0),
    "Webhook max_body nan": lambda: Webhook("/a", verify="none", max_body=math.nan),  # type: ignore
    "Webhook max_body 0": lambda: Webhook("/a", verify="none", max_body=0),
    "Webhook max_rate nan": lambda: Webhook("/a", verify="none", max_rate=math.nan),
    "Webhook body_timeout inf": lambda: Webhook("/a", verify="none", body_timeout=math.inf),
    "Directory settle nan": lambda: Directory("a", settle=math.nan),
    "Directory poll 0": lambda: Directory("a", poll=0),
    "Directory rescan inf": lambda: Directory("a", rescan=math.inf),
    "S3 poll nan": lambda: S3("a", poll=math.nan),
    "S3 wait nan": lambda: S3(queue="q", wait=math.nan),
    "S3 pollers 0": lambda: S3(queue="q", pollers=0),
    "Kafka max_body": lambda: Kafka("a", group_id="g", max_body=-1),
    "DriftMonitor lateness nan": lambda: DriftMonitor(Every(1), features=["a"], lateness=math.nan),
    "DriftMonitor cooldown inf": lambda: DriftMonitor(Every(1), features=["a"], cooldown=math.inf),
    "DriftMonitor confirm 0": lambda: DriftMonitor(Every(1), features=["a"], confirm=0),
    "Cron jitter nan": lambda: Cron("* * * * *", jitter=math.nan),
    "Cron grace inf": lambda: Cron("* * * * *", grace=math.inf),
    "Cron limit 0": lambda: Cron("* * * * *", limit=0),
    "Every nan": lambda: Every(math.nan),
    "Every inf": lambda: Every(seconds=math.inf),
    "Every negative": lambda: Every(minutes=-1),
    "RunState after nan": lambda: RunState("a", "late", after=math.nan),
    "RunState after inf": lambda: RunState("a", "late", after=math.inf),
    "sleep nan": lambda: asyncio.run(_awaited(sleep, math.nan)),
    "sleep text": lambda: asyncio.run(_awaited(sleep, "5")),
    "timeout nan": lambda: timeout(math.nan),
}


async def _awaited(function: Callable[..., Any], *args: Any) -> None:
    await function(*args)


@pytest.mark.parametrize("name", WRONG)
def test_a_number_that_makes_no_sense_is_refused_where_it_is_written(name: str) -> None:
    """A duration or count that is NaN, infinite, negative or no number is a UsageError with the
    line.
    """
    with pytest.raises(UsageError, match="expected") as caught:
        WRONG[name]()
    assert HERE in str(caught.value)


def test_the_line_is_that_of_the_declaration(tmp_path: Path) -> None:
    """The location is the file and line of the user's module, also for a decorated function."""
    module = tmp_path / "shop.py"
    module.write_text(
        "from eventflow import App, flow, task\n"
        "\n"
        "app = App('shop')\n"
        "@task(timeout=-1)\n"
        "async def charge(): ...\n"
    )
    with pytest.raises(UsageError, match=r"shop\.py:4\)$") as caught:
        exec(compile(module.read_text(), str(module), "exec"), {"__name__": "shop"})
    assert caught.value.location == f"{module}:4"
    with pytest.raises(UsageError, match=r"shop\.py:1\)$"):
        exec(
            compile("from eventflow import flow; flow(lambda: 1)", "shop.py", "exec"),
            {"__name__": "shop"},
        )


def test_what_is_legal_stays_legal() -> None:
    """Zero grace, a retention of zero, a long but finite timeout, an endless sleep are accepted."""
    assert _flow(grace=0).options.grace == 0.0
    assert _flow(timeout=timedelta(days=36_500)).options.timeout == 36_500 * 86_400.0
    assert _task(retries=[0, 1.5, timedelta(seconds=2)]).options.retries.delays == (0, 1.5, 2)
    assert RetryAfter(0).delay == 0.0
    App("a", retention=0, max_pending=1, free_floor=0)
    asyncio.run(_awaited(sleep, -1))
