"""The flow of the replay check: every construct of plain asyncio, each with journaled
calls in it.
"""

import asyncio
from typing import Any

import anyio

from eventflow.core.retry import Retry
from eventflow.sdk.flow import current_run, flow, sleep
from eventflow.sdk.task import Task, task
from tests.engine.replay_check.seeded_run import SeededRun

CURRENT: list[SeededRun] = []
"""The run that is played: bodies take its time and are counted there."""


async def _work(name: str, value: Any) -> None:
    seeded_run = CURRENT[-1]
    from eventflow.sdk.task import current_task

    key = current_task().idempotency_key.split("/", 1)[1]
    seeded_run.bodies[key] += 1
    await seeded_run.spend()


@task
async def fetch(value: int) -> int:
    await _work("fetch", value)
    return value * 10


@task
async def score(name: str, value: int) -> dict[str, Any]:
    await _work("score", value)
    return {"name": name, "value": value}


@task(retries=Retry(attempts=3, delay=0.4, jitter=False))
async def flaky(value: int) -> int:
    from eventflow.sdk.task import current_task

    await _work("flaky", value)
    if current_task().attempt < 1 + value % 3:
        raise ValueError(f"not yet {value}")
    return value


@task
async def doomed(value: int) -> int:
    await _work("doomed", value)
    raise KeyError(f"never {value}")


@task
async def slow(value: int) -> int:
    CURRENT[-1].bodies["slow"] += 1
    for _ in range(20):
        await CURRENT[-1].spend(6.0)
    return value


async def branch(name: str, first: int) -> list[Any]:
    """Two of these call one task name at the same time."""
    results: list[Any] = []
    for step in range(2):
        results.append(await score(name, first + step))
    results.append(await asyncio.gather(fetch(first), flaky(first + 1)))
    return results


async def first_of(seen: list[Any]) -> None:
    left = {asyncio.create_task(one(number)) for number in range(4)}
    while left:
        done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        seen.append(["first", next(iter(done)).result()])
        seen.append([item.result() for item in done])


async def one(number: int) -> int:
    return await fetch(number) + await fetch(number + 100)


async def as_they_come(seen: list[Any]) -> None:
    async def noted(number: int) -> int:
        seen.append(
            ["begun", number]
        )  # before any await: the order in which asyncio started them shows
        return await one(number)

    for next_one in asyncio.as_completed([noted(number) for number in (7, 3, 5, 1)]):
        seen.append(["came", await next_one])


async def queue_work(seen: list[Any]) -> None:
    queue: asyncio.Queue[int | None] = asyncio.Queue()

    async def worker(name: str) -> None:
        while (item := await queue.get()) is not None:
            seen.append([name, await score(name, item)])

    async with asyncio.TaskGroup() as group:
        for name in ("left", "right"):
            group.create_task(worker(name))
        for item in range(5):
            queue.put_nowait(await fetch(item))
        for _ in range(2):
            queue.put_nowait(None)


async def cancelled_sibling(seen: list[Any]) -> None:
    sibling = asyncio.create_task(slow(1))
    seen.append(await fetch(50))
    sibling.cancel()
    try:
        await sibling
        seen.append("slow won")
    except asyncio.CancelledError:
        seen.append("sibling cancelled")
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(slow(2))
            group.create_task(doomed(3))
    except ExceptionGroup as group_error:
        seen.append([type(error).__name__ for error in group_error.exceptions])


async def with_timeouts(seen: list[Any]) -> None:
    for limit in (0.5, 1.5, 9.0):
        try:
            async with asyncio.timeout(limit):
                seen.append(["in time", await fetch(int(limit * 10))])
        except TimeoutError:
            seen.append(["late", limit])
    started = current_run().now
    await sleep(1.25)
    seen.append(["slept", (current_run().now - started).total_seconds() >= 1.25])


async def with_anyio(seen: list[Any]) -> None:
    async def child(number: int) -> None:
        await anyio.sleep(0.1 * number)
        seen.append(["any", await fetch(number)])

    with anyio.move_on_after(4.0) as scope:
        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(child, number)
    seen.append(["cut", scope.cancelled_caught])


@flow
async def scenario() -> list[Any]:
    """All constructs at once; the result shows the order of their answers."""
    seen: list[Any] = [current_run().random.random()]
    async with asyncio.TaskGroup() as group:
        group.create_task(first_of(seen))
        group.create_task(as_they_come(seen))
        group.create_task(cancelled_sibling(seen))
        both = asyncio.gather(
            branch("a", 1), branch("b", 2), asyncio.gather(branch("c", 3), queue_work(seen))
        )
        seen.append(["both", await both])
        await with_timeouts(seen)
        group.create_task(with_anyio(seen))
        seen.append(await fetch.map(range(6), limit=3))
        seen.append(await doomed.map([1], return_exceptions=True) and "mapped")
        seen.append(current_run().random.random())
    return seen


ALL: list[Task[..., Any]] = [fetch, score, flaky, doomed, slow]
