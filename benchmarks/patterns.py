"""Counting: what `Batch` and `count` add to the recording of an event, on one core; and what an
open key takes of memory.

Each is the writer's own work in its transactions (looking up what is open, deciding, writing it
back), on SQLite in memory, so that no disk is measured; the event's own row is left out. `machine`
is the pattern's machine by itself.
"""

import sqlite3
import time
from collections.abc import Iterator, Sequence
from itertools import islice

from benchmarks.measure import Figure, alone
from benchmarks.memory import resident
from eventflow import App, Batch, Event, count, flow
from eventflow.core.clock import Moment, SystemClock, to_datetime
from eventflow.routing.pattern_machine import PatternItem, PatternState
from eventflow.routing.patterns import compile_pattern
from eventflow.routing.router import Router
from eventflow.runs.run import Ids
from eventflow.store.apply import deliver
from eventflow.store.migrate import migrations
from eventflow.store.protocol import Arrival
from eventflow.store.transaction import TOTALS, Transaction

FIGURES = (
    Figure(
        key="machine",
        what="count: the machine alone",
        unit="/s",
        floor=50_000,
        goal=200_000,
        combine=alone,
    ),
    Figure(
        key="count",
        what="count: events/s per core in the writer",
        unit="/s",
        floor=50_000,
        goal=100_000,
        combine=alone,
    ),
    Figure(
        key="batch",
        what="Batch: events/s per core in the writer",
        unit="/s",
        floor=50_000,
        goal=100_000,
        combine=alone,
    ),
    Figure(
        key="key",
        what="count: memory of an open key",
        unit="kB",
        floor=4,
        goal=2,
        combine=alone,
        lower_is_better=True,
    ),
    Figure(
        key="growth",
        what="count: growth by ten times the events",
        unit="MB",
        floor=4,
        goal=1,
        combine=alone,
        lower_is_better=True,
    ),
)

KEYS, SIZE, STEP = 100, 50, 1000


@flow
async def take(events: list[Event]) -> None: ...


async def eventflow(quick: bool) -> dict[str, float]:
    events = 20_000 if quick else 200_000
    key, growth = memory(500 if quick else 4_000)
    return {
        "machine": machine(events),
        "count": writer(counting(), events),
        "batch": writer(batching(), events),
        "key": key,
        "growth": growth,
    }


SIDES = {"eventflow": eventflow}


def counting() -> App:
    app = App("counting")
    app.on(count("click", SIZE, within=3600, by="k"), take)
    return app


def batching() -> App:
    app = App("batching")
    app.on("click", take, deliver=Batch(SIZE, within=3600), key="k")
    return app


def writer(app: App, events: int) -> float:
    """Events a second of the writer's processor time."""
    router = Router(app.subscriptions, Ids(), SystemClock())
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for _, sql in migrations():
        connection.executescript(sql)
    arrivals = (router.route("events", event) for event in made(events))
    spent = 0.0
    totals: dict[str, int] = dict.fromkeys(TOTALS, 0)
    while step := list(islice(arrivals, STEP)):
        now = step[-1].received_at
        tx = Transaction(
            connection,
            batch=1,
            at=now,
            read_at=Moment(now, 0.0),
            totals=totals,
            receiver=None,
            running={},
            advancer=router.patterns,
        )
        connection.execute("BEGIN")
        began = time.process_time()
        record(tx, step)
        tx.flush()
        spent += time.process_time() - began
        connection.execute("COMMIT")
        totals = tx.commit.totals
    assert totals["runs"] == events // SIZE, totals
    return events / spent


def record(tx: Transaction, step: Sequence[Arrival]) -> None:
    """What apply.py does with events that are new, but for their own rows."""
    tx.windows.load(step)
    tx.patterns.load(step)
    for arrival in step:
        if arrival.batch_policies:
            arrival = tx.windows.assign(arrival, arrival.id)
        if arrival.pattern_events:
            arrival = tx.patterns.advance(arrival, arrival.id)
        deliver(tx, [arrival])


def made(events: int) -> Iterator[Event]:
    now = to_datetime(SystemClock().now())
    for n in range(events):
        yield Event(
            id=str(n), source="/bench", type="click", time=now, data={"k": f"key-{n % KEYS}"}
        )


def machine(events: int) -> float:
    states: dict[int, PatternState] = {}
    began = time.process_time()
    feed(states, events, KEYS)
    return events / (time.process_time() - began)


def feed(
    states: dict[int, PatternState], events: int, keys: int, size: int = SIZE, first: int = 0
) -> None:
    """Events of `keys` keys in turn, one each millisecond; what is not open is not kept."""
    counted = compile_pattern(count("click", size, within=3600, by="k")).machine
    for n in range(first, first + events):
        now, key = n * 1000, n % keys
        state = states.get(key) or counted.initial_state(now)
        counted.advance(state, now, 0, PatternItem(now, now, (n,), 100))
        counted.due(state)
        if counted.is_open(state):
            states[key] = state
        else:
            states.pop(key, None)


def memory(keys: int) -> tuple[float, float]:
    """Kilobytes of an open key with five events in it; megabytes that ten times the events add
    while the keys stay as many.
    """
    states: dict[int, PatternState] = {}
    feed({}, keys, keys)
    before = resident()
    feed(states, 25 * keys, keys, size=10)
    full = resident()
    feed(states, 250 * keys, keys, size=10, first=25 * keys)
    assert len(states) == keys
    return (full - before) * 1024 / keys, resident() - full
