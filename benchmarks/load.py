"""The load both sides of a measure are put under: the same bytes, the same callers, the same clock.

`w1.py`, `w2.py` and `limit.py` call it; it knows neither the limit loop nor eventflow, only
something that accepts bodies and something that counts finished runs.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import orjson
import uvloop

T = TypeVar("T")
Accept = Callable[..., Awaitable[Any]]
Count = Callable[[], Awaitable[int]]

MODES = {"batch": (100, 16), "single": (1, 200)}
"""Events handed in by one call, and how many callers do so at once, each waiting until its events
are durable.
"""


class Latency(NamedTuple):
    """Seconds."""

    p50: float
    p99: float


def run(main: Coroutine[Any, Any, T], loop: str = "uvloop") -> T:
    with asyncio.Runner(
        loop_factory=uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    ) as runner:
        return runner.run(main)


def bodies(count: int, source: str = "bench") -> list[bytes]:
    """Structured CloudEvents of about 250 bytes, each with an id of its own."""
    return [
        orjson.dumps(
            {
                "specversion": "1.0",
                "id": f"order-{number}",
                "source": source,
                "type": "order.placed",
                "data": {
                    "order": number,
                    "amount": number % 97,
                    "currency": "EUR",
                    "note": "x" * 100,
                },
            }
        )
        for number in range(count)
    ]


def decode(body: bytes) -> dict[str, Any]:
    return orjson.loads(body)


async def score(data: Any) -> dict[str, int]:
    """The task of every measure: as little as a task can do."""
    return {"total": data["amount"] * 2}


async def throughput(accept: Accept, given: list[bytes], finished: Count, mode: str) -> float:
    """Finished runs per second, from the first call until all of `given` are finished."""
    return await drive(accept, given, finished, *MODES[mode])


async def drive(
    accept: Accept, given: list[bytes], finished: Count, per_call: int, callers: int
) -> float:
    """As `throughput`, with `per_call` events in a call and so many callers."""
    left = iter(given)

    async def caller() -> None:
        while chunk := list(islice(left, per_call)):
            await accept(*chunk)

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    await settle(finished, len(given))
    return len(given) / (time.perf_counter() - began)


async def settle(finished: Count, count: int, step: float = 0.001) -> None:
    deadline = time.perf_counter() + 120
    while (found := await finished()) < count:
        if time.perf_counter() > deadline:
            raise TimeoutError(f"expected {count} finished runs within 120 s, found {found}")
        await asyncio.sleep(step)


class Probe:
    """A task that notes when its first line runs."""

    def __init__(self) -> None:
        self.began = 0.0
        self.waits: list[float] = []

    async def score(self, data: Any) -> dict[str, int]:
        self.waits.append(time.perf_counter() - self.began)
        return {"total": data["amount"] * 2}

    async def measure(self, accept: Accept, given: Iterable[bytes], finished: Count) -> Latency:
        """Hands in one event at a time, each after the last one's run has finished and the machine
        has gone idle.
        """
        for number, body in enumerate(given, 1):
            self.began = time.perf_counter()
            await accept(body)
            await settle(finished, number)
            await asyncio.sleep(0.001)
        return percentiles(self.waits[len(self.waits) // 10 :])


def percentiles(waits: list[float]) -> Latency:
    ranked = sorted(waits)
    return Latency(ranked[len(ranked) // 2], ranked[len(ranked) * 99 // 100])
