"""The app whose way can be stopped at a seam: it says that it has come there, and stands until it
is killed.

test_seams.py and test_faults.py serve it. A gate named in $GATE appends its name to `reached` in
the working directory and blocks where it stands; any other lets pass at once. Bodies leave their
traces as those of app.py do.
"""

import asyncio
import os
import signal
import threading
from pathlib import Path

from eventflow import (
    App,
    Debounce,
    Event,
    Retry,
    current_run,
    current_task,
    emit,
    flow,
    sleep,
    task,
)
from tests.crash.app import leave_trace, lifespan
from triggers import Webhook

GATE = os.environ.get("GATE", "")
REACHED = Path("reached")
BODY_BEFORE_DEATH = 0.3
BODY_WITHOUT_END = 3600.0


def gate(name: str) -> None:
    """Blocks the thread it is called in, when it is the one to stop at."""
    if name == GATE:
        note(name)
        threading.Event().wait()


def note(name: str) -> None:
    with REACHED.open("a") as file:
        file.write(f"{name}\n")


# --------------------------------------------------------------------------- two steps and gates


@task
async def first(n: int) -> int:
    leave_trace()
    gate("body runs")
    note(f"did {current_task().idempotency_key}")
    gate("effect done")
    return n + 1


@task
async def second(n: int) -> int:
    leave_trace()
    gate("next task")
    return n * 10


@flow
async def steps(n: int) -> int:
    gate("claimed")
    value = await first(n)
    gate("value came")
    await emit("stepped", {"n": n})
    gate("emitted")
    return await second(value)


@flow
async def follow(n: int) -> int:
    return n


def matched(event: Event) -> bool:
    gate("parsed")
    return True


# --------------------------------------------------------------------------- bad task bodies


@task
async def deadly(how: str) -> None:
    leave_trace()
    await asyncio.sleep(BODY_BEFORE_DEATH)
    if how == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    os._exit(66)


@flow
async def poison(how: str) -> None:
    await deadly(how)


@task
async def work(seconds: float) -> float:
    leave_trace()
    await asyncio.sleep(seconds)
    return seconds


@flow
async def patient(seconds: float, bodies: int = 1) -> float:
    """Bodies at once, each longer than a poisoned process lives."""
    return sum(await asyncio.gather(*(work(seconds) for _ in range(bodies))))


@task
async def deaf(n: int) -> int:
    leave_trace()
    ends = asyncio.get_running_loop().time() + (60 if GATE == "deaf" else 0)
    while (left := ends - asyncio.get_running_loop().time()) > 0:
        note("deaf")
        try:
            await asyncio.sleep(left)
        except asyncio.CancelledError:
            continue
    return n


@flow
async def stubborn(n: int) -> int:
    return await deaf(n)


@flow
async def blocking(n: int) -> int:
    gate("blocked")
    return n


# --------------------------------------------------------------------------- families


@flow
async def child(n: int) -> int:
    """Held up in memory in one life, and with nothing left to do in the next."""
    if GATE == "child":
        note("child")
        await sleep(50)
    return n


@flow
async def parent(n: int) -> int:
    return await child(n)


# --------------------------------------------------------------------------- time


@task
async def mark(what: str) -> None:
    leave_trace()


@task(retries=Retry(attempts=2, delay=2.5, jitter=False))
async def fails_once() -> None:
    leave_trace()
    if current_task().attempt == 1:
        raise OSError("once")


@task
async def forever() -> None:
    leave_trace()
    await asyncio.sleep(BODY_WITHOUT_END)


@flow
async def waits(how: str, seconds: float) -> str:
    """Ends when its time has come, and says at what time it believes it is."""
    match how:
        case "sleep":
            await sleep(seconds)
        case "retry":
            await fails_once()
        case _:
            try:
                async with asyncio.timeout(seconds):
                    await forever()
            except TimeoutError:
                pass
    await mark(how)
    return current_run().now.isoformat()


@flow(timeout=2.5)
async def bounded() -> None:
    await forever()


@flow
async def burst(events: list[Event]) -> list[int]:
    return [event.data["n"] for event in events]


app = App("gates", lifespan=lifespan, ballast=0, free_floor=int(os.environ.get("FLOOR", "0")))
app.on(Webhook("/steps", verify="none", name="steps"), steps, where=matched)
app.on("stepped", follow)
app.on(Webhook("/bursts", verify="none", name="bursts"), burst, deliver=Debounce(1.5, max_wait=5.0))
for one in (poison, patient, stubborn, blocking, parent, waits, bounded):
    app.on(Webhook(f"/{one.name}", verify="none", name=one.name), one)
