"""The app that the kill loop and the syscall test kill: an order with every kind of journal entry
in it.

`loop.py` and `syscalls.py` serve it with `eventflow serve`. Each task body first writes one line,
`KEY ATTEMPT BOOT MICROSECONDS`, to the file $CRASH_EFFECTS: what really ran, to be held against
what the journal says. `expected` is what an order must come to, whatever was killed on the way.
"""

import asyncio
import json
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from eventflow import App, Retry, current_task, emit, flow, sleep, task
from eventflow.engine import run_parts
from triggers import Webhook

run_parts.MAKES_ALL_PARTS = "ALL_PARTS" in os.environ

PARTS = 6
_EFFECTS = os.environ.get("CRASH_EFFECTS")
_BOOT = os.environ.get("CRASH_BOOT", "0")


def leave_trace() -> None:
    """One line, one write: a kill leaves it whole or not at all. No fsync: what a kill must not
    take is in the page cache.
    """
    if _EFFECTS is None:
        return
    me = current_task()
    fd = os.open(_EFFECTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(
            fd, f"{me.idempotency_key} {me.attempt} {_BOOT} {time.time_ns() // 1000}\n".encode()
        )
    finally:
        os.close(fd)


@task
async def add(n: int) -> int:
    leave_trace()
    await asyncio.sleep(n % 5 / 1000)
    return n + 1


@task(retries=Retry(attempts=3, delay=0.02, jitter=False))
async def flaky(n: int) -> int:
    leave_trace()
    if current_task().attempt == 1:
        raise OSError("the first attempt always fails")
    return n * 2


@task
async def part(n: int, i: int) -> int:
    leave_trace()
    await asyncio.sleep((n + i) % 7 / 1000)
    return n * 10 + i


@task
def twice(n: int) -> int:
    leave_trace()
    return n * 2


@task
async def file(n: int) -> int:
    leave_trace()
    return n


@flow
async def double(n: int) -> int:
    return await twice(n)


@flow
async def handle(n: int) -> dict[str, Any]:
    first = await add(n)
    retried, *parts = await asyncio.gather(flaky(n), *(part(n, i) for i in range(PARTS)))
    await sleep(0.05)
    doubled = await double(n)
    await emit("order.handled", {"n": n})
    return {"n": n, "total": first + retried + sum(parts) + doubled}


@flow
async def account(n: int) -> int:
    return await file(n)


def expected(n: int) -> dict[str, Any]:
    """The result of `handle(n)`."""
    return {"n": n, "total": n + 1 + n * 2 + sum(n * 10 + i for i in range(PARTS)) + n * 2}


@asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    """Leaves the threads' numbers in $CRASH_THREADS, for who wants to trace one of them."""
    if path := os.environ.get("CRASH_THREADS"):
        Path(path).write_text(
            json.dumps({thread.name: thread.native_id for thread in threading.enumerate()})
        )
    yield


app = App("crash", lifespan=lifespan, ballast=0, free_floor=0)
app.on(Webhook("/orders", verify="none", name="orders"), handle)
app.on("order.handled", account)
