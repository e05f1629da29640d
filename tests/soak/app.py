"""The app of the soak: every source, delivery mode and kind of wait, with a retention of seconds.

`__main__.py` serves it with `eventflow serve`; traffic.py sends what it handles. Each run notes
what it did as a line `KIND IDENT` in the file $SOAK_EFFECTS, which is compared with what was sent,
since the ledger itself forgets. A thread writes what only the process knows to $SOAK_STATS.
$SOAK_LEAK names figures that are to grow, `threads/100` with every hundredth order: the proof that
the verdicts can fail.
"""

import asyncio
import ctypes
import gc
import json
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from eventflow import (
    App,
    Batch,
    Debounce,
    Event,
    Intake,
    Latest,
    Retry,
    Singleflight,
    absent,
    all_of,
    checkpoint,
    count,
    current_task,
    emit,
    flow,
    restart_with,
    sequence,
    sleep,
    task,
    timeout,
)
from eventflow.store.readers import READER_THREADS
from triggers import (
    S3,
    At,
    Cron,
    Directory,
    Drift,
    DriftAlert,
    DriftMonitor,
    Every,
    Kafka,
    KafkaSink,
    Numeric,
    RunState,
    Webhook,
    delete,
    move,
    outcome,
)

EFFECTS = os.environ.get("SOAK_EFFECTS", os.devnull)
STATS = os.environ.get("SOAK_STATS", os.devnull)
STATS_INTERVAL = float(os.environ.get("SOAK_INTERVAL", "1"))
KEEP = float(os.environ.get("SOAK_KEEP", "10"))
"""Seconds for which the ledger keeps what is over."""
REST = float(os.environ.get("SOAK_REST", "3"))
"""Seconds of a durable sleep; from 60 on the run leaves memory."""
TOO_LONG = 60.0
"""Seconds of what is timed out."""
BLOCK = 0.3
"""Seconds of a plain body, which nothing can end."""
LEAKS = {
    name: int(every or 1)
    for name, _, every in (
        each.partition("/") for each in os.environ.get("SOAK_LEAK", "").split(",")
    )
}
"""By figure, the number of orders for one leak."""
BROKER = os.environ.get("SOAK_BROKER", "localhost:9092")
MEMBER: dict[str, Any] = {"session_timeout_ms": 6_000, "rebalance_timeout_ms": 1_000}

leaked: list[Any] = []


def note(kind: str, *idents: str) -> None:
    """One line per ident, in one write."""
    fd = os.open(EFFECTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, "".join(f"{kind} {ident}\n" for ident in idents).encode())
    finally:
        os.close(fd)


async def leak(n: int) -> None:
    """What a body with the fault named in $SOAK_LEAK would leave behind, at the n-th order."""
    due = {name for name, every in LEAKS.items() if n % every == 0}
    if "memory" in due:
        leaked.append(b"\1" * 400_000)
    if "descriptors" in due:
        leaked.append(socket.socket())
    if "threads" in due:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    if "tasks" in due:
        leaked.append(asyncio.get_running_loop().create_task(asyncio.Event().wait()))
    if "objects" in due:
        leaked.append([[] for _ in range(2_000)])
    if "store" in due:
        Path(f"{app.store.path}.blobs", f"x{len(leaked)}").write_bytes(b"x" * 200_000)
        leaked.append(None)
    if "backlog" in due:
        await app.emit("forever.begun", {})


# ------------------------------------------------------------------ tasks


@task
async def noted(kind: str, idents: list[str]) -> None:
    note(kind, *idents)


@task
async def price(n: int) -> int:
    await leak(n)
    return n * 2


@task(retries=Retry(attempts=3, delay=0.05, jitter=False))
async def flaky(n: int) -> int:
    if current_task().attempt == 1:
        raise OSError("the first attempt always fails")
    return n


@task
def compute(n: int) -> int:
    print(f"computing {n}")
    return sum(range(n % 1000))


@task(timeout=0.2)
async def hang() -> None:
    await asyncio.sleep(TOO_LONG)


@task(timeout=0.1)
def block() -> None:
    time.sleep(BLOCK)  # a plain body that outlives its timeout


@task(retries=Retry(attempts=3, delay=0.05, jitter=False))
def fit(ident: str) -> int:
    kept = checkpoint()
    weights, step = kept.load() or ([0.0] * 1_000, 0)
    kept.save([weight + 1 for weight in weights], step=step + 1)
    if step == 0:
        raise OSError("interrupted after its first checkpoint")
    return step


@task
def lines_of(path: str) -> int:
    return len(Path(path).read_text().splitlines())


@task
async def large(key: str) -> str:
    """Larger than what the journal holds: a file beside the store. Always the same file, because
    files are swept by the hour.
    """
    return "x" * 300_000


# ------------------------------------------------------------------ flows


@flow
async def child(n: int) -> int:
    return await compute(n)


@flow
async def handle(id: str, n: int) -> int:
    total = await price(n)
    parts = await asyncio.gather(flaky(n), compute(n), child(n))
    await sleep(0.05)
    await emit("order.handled", {"id": id}, subject=id)
    await noted("order", [id])
    return total + sum(parts)


@flow
async def account(id: str) -> None:
    await noted("account", [id])


@flow
async def batched(events: list[Event]) -> None:
    await noted("batch", idents_of(events))


@flow
async def debounced(events: list[Event]) -> None:
    await noted("debounce", idents_of(events))


@flow
async def singly(events: list[Event]) -> None:
    await sleep(0.1)
    await noted("singleflight", idents_of(events))


@flow
async def newest(events: list[Event]) -> None:
    await sleep(0.1)
    await noted("latest", idents_of(events))


@flow
async def record(id: str) -> None:
    await noted("record", [id])


@flow
async def stored(key: str) -> int:
    size = len(await large(key)) if key.endswith("0") else 0
    await noted("object", [key])
    return size


@flow
async def landed(path: str, name: str) -> int:
    lines = await lines_of(path)
    await noted("file", [name])
    if "bad" in name:
        raise ValueError(f"{name} is not to be loaded")
    return lines


@flow
async def fired(schedule: str, scheduled_at: datetime) -> None:
    await noted(schedule, [f"{scheduled_at.timestamp():.0f}"])


@flow
async def alerted(event: Event, drift: Drift) -> None:
    await noted("alert", [f"{drift.fingerprint}/{drift.status}"])


@flow
async def drifted(event: Event) -> None:
    await noted("drift", [f"{event.id}/{event.type}"])


@flow
async def matched(events: list[Event]) -> None:
    first = events[0]
    await noted(first.type, [first.data["key"]])


@flow
async def fails(id: str) -> None:
    await noted("fail", [id])
    raise RuntimeError(f"{id} always fails")


@flow
async def filled(event: Event) -> None:
    await noted("pools", [event.id])


@flow
async def failed(run: str) -> None:
    await noted("failed", [run])


@flow
async def late(run: str) -> None:
    await noted("late", [run])


@flow
async def nap(id: str, seconds: float) -> None:
    """Until it is cancelled. From 60 seconds on it has left memory by then, and comes back."""
    try:
        await sleep(seconds)
    finally:
        await noted("nap", [id])


@flow
async def rest(id: str) -> None:
    await sleep(REST)
    await noted("rest", [id])


@flow
async def times_out(id: str) -> None:
    for step in (hang, block):
        try:
            await step()
        except TimeoutError:
            continue
    try:
        async with timeout(0.1):
            await asyncio.sleep(TOO_LONG)
    except TimeoutError:
        await noted("timeout", [id])


@flow(timeout=0.3)
async def overdue(id: str) -> None:
    try:
        await asyncio.sleep(TOO_LONG)
    finally:
        await noted("overdue", [id])


@flow
async def train(id: str) -> None:
    await fit(id)
    await noted("train", [id])


@flow
async def again(id: str, left: int) -> None:
    await compute(left)
    if left:
        await restart_with(id=id, left=left - 1)
    await noted("again", [id])


@flow
async def forever() -> None:
    await sleep(3600)


def idents_of(events: Sequence[Event]) -> list[str]:
    return [event.data["id"] for event in events]


# ------------------------------------------------------------------ numbers of the process


def survey() -> dict[str, Any]:
    """Objects that survive a garbage collection, asyncio tasks among them; which they are, and
    which threads there are.
    """
    # A list of all objects refers to half-made tuples of other threads, which C code must not meet
    # (it resizes them): none of them runs meanwhile.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1.0)
    try:
        gc.collect()
        classes = Counter(map(type, gc.get_objects()))
    finally:
        sys.setswitchinterval(interval)
    tasks = sum(n for each, n in classes.items() if issubclass(each, asyncio.Task))
    objects = {f"{each.__module__}.{each.__qualname__}": n for each, n in classes.most_common(100)}
    kinds = {"objects": objects, "threads": threads()}
    return {"objects": classes.total(), "tasks": tasks, "kinds": kinds}


def threads() -> Counter[str]:
    """Numbers of threads by name, those of libraries in C and Rust included."""
    names = {str(each.native_id): each.name for each in threading.enumerate()}
    found: Counter[str] = Counter()
    for each in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            name = names.get(each) or Path(f"/proc/self/task/{each}/comm").read_text().strip()
            found[re.sub(r"\d+", "N", name)] += 1
    return found


def sqlite_memory() -> int:
    """Bytes that SQLite holds, nearly all of them page caches; 0 if it is linked statically."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    path = next((line.split()[-1] for line in maps if "libsqlite3" in line), None)
    if path is None:
        return 0
    used = ctypes.CDLL(path).sqlite3_memory_used
    used.restype = ctypes.c_int64
    return used()


def write_stats(over: threading.Event) -> None:
    while not over.wait(STATS_INTERVAL):
        draft = Path(f"{STATS}.draft")
        draft.write_text(json.dumps(survey() | {"page_caches": sqlite_memory()}))
        draft.replace(STATS)


@asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    over = threading.Event()
    thread = threading.Thread(target=write_stats, args=(over,), name="soak-stats")
    thread.start()
    yield
    over.set()
    await asyncio.to_thread(thread.join)


# ------------------------------------------------------------------ the pools of threads


async def fill(size: int, enter: Callable[[Callable[[], int]], Awaitable[int]]) -> None:
    """Gives a pool all its threads: as many calls as it has are in it at the same time.
    BrokenBarrierError when it has fewer.
    """
    gate = threading.Barrier(size, timeout=30.0)
    await asyncio.gather(*(enter(gate.wait) for _ in range(size)))


class FilledPools:
    """A trigger that fills all pools, and has an event when they are full.

    A pool that gets its last thread late, when more work waits than ever before, looks like a
    leak. The sizes are the product's own.
    """

    name = "pools"

    async def listen(self, intake: Intake) -> None:
        flows = app.runtime.own_loop
        bodies = app.runtime.worker.threads
        assert flows is not None
        of_a_loop = ThreadPoolExecutor()._max_workers  # what asyncio.to_thread uses
        await fill(of_a_loop, asyncio.to_thread)
        await flows.call(fill(of_a_loop, asyncio.to_thread))
        await fill(READER_THREADS, lambda wait: app.store._read(lambda _: wait()))
        await fill(bodies.limit, lambda wait: asyncio.wrap_future(bodies.submit(wait)))
        await intake.accept(Event(id="filled", source="soak", type="pools.filled", data={}))
        await asyncio.Event().wait()


# ------------------------------------------------------------------ the app


app = App(
    "soak",
    lifespan=lifespan,
    threads=8,  # few, so that some bodies have to wait
    retention=KEEP,
    identities=2 * KEEP,
    ballast=0,
    free_floor=0,
)


def hook(path: str) -> Webhook:
    return Webhook(f"/{path}", verify="none", id="id", name=path)


app.on(hook("orders"), handle, key="customer")
app.on(hook("clicks"), batched, deliver=Batch(20, within=1))
app.on(hook("states"), debounced, key="key", deliver=Debounce(0.2, max_wait=1))
app.on(hook("models"), singly, key="key", deliver=Singleflight())
app.on(hook("prices"), newest, key="key", deliver=Latest())
app.on(hook("fails"), fails)

app.on("order.handled", account)
app.send("order.handled", KafkaSink("handled", bootstrap_servers=BROKER))

app.on(
    Kafka("records", bootstrap_servers=BROKER, group_id="soak", name="records", **MEMBER),
    record,
    key="record",
)
app.on(
    S3(
        os.environ.get("SOAK_BUCKET", "soak"),
        queue=os.environ.get("SOAK_QUEUE", "soak"),
        wait=1,
        visibility=10,
        reconcile=5,
        name="objects",
    ),
    stored,
)
app.on(
    Directory(
        os.environ.get("SOAK_LANDING", "landing"),
        pattern="/*.csv",
        settle=0.2,
        rescan=5,
        after=outcome(completed=delete(), failed=move("failed")),
        name="landing",
    ),
    landed,
)

app.on(Every(seconds=1, name="every"), fired)
app.on(Cron("*/2 * * * * *", name="cron"), fired)
app.on(At(datetime.now(UTC) + timedelta(seconds=8), name="at"), fired)

app.on(DriftAlert("/alerts", verify="none", name="alerts"), alerted, types=["drift.*"])
app.on(
    DriftMonitor(
        Webhook("/scores", verify="none", id="id", name="scores"),
        features={"amount": Numeric()},
        rows=lambda event: event.data["rows"],
        reference=500,
        window=100,
        cooldown=0.5,
        name="monitor",
    ),
    drifted,
    types=["drift.*"],
)

app.on(count("login", 3, within=60, by="key"), matched)
app.on(sequence("placed", then="paid", unless="withdrawn", within=60, by="key"), matched)
app.on(all_of("left", "right", within=60, by="key"), matched)
app.on(absent("shipped", 1, after="sold", by="key"), matched)

app.on(FilledPools(), filled)
app.on(RunState(fails, "failed"), failed)
app.on(RunState(nap, "late", after=0.5), late)
app.on("forever.begun", forever)
for each in (nap, rest, times_out, overdue, train, again):
    app.add(each)
