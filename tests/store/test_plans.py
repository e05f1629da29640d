"""How SQLite looks rows up: what costs nothing in an empty ledger and everything in a full one."""

import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest

from eventflow import App, Batch, Event, absent, count, emit, flow, sleep
from eventflow.events.event import OutboxMessage
from eventflow.runs.run import Failed, State, Suspended
from eventflow.store import queries, rows
from eventflow.store.migrate import migrations
from eventflow.store.readers import QUERY_TIMEOUT_SECONDS
from eventflow.store.sqlite import SqliteStore
from eventflow.testing import MemoryTrigger, VirtualClock, drain, running
from tests.store.ledger import SECOND, Ledger, ManualClock, Reopen, value
from triggers import RunState

BULK_STATEMENTS = {
    name: value for name, value in vars(rows).items() if isinstance(value, rows.BulkStatement)
}


@pytest.fixture(scope="module")
def empty() -> Iterator[sqlite3.Connection]:
    """A ledger of today's form, in memory."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for _, script in migrations():
        connection.executescript(script)
    yield connection
    connection.close()


@pytest.mark.parametrize("name", BULK_STATEMENTS)
def test_no_bulk_statement_walks_a_table(empty: sqlite3.Connection, name: str):
    """Each row of a bulk statement is looked up by an index, however many rows the tables have."""
    bulk = BULK_STATEMENTS[name]
    tables = {
        table for (table,) in empty.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
    }
    shorts = {"e": "events", "j": "journal", "p": "patterns", "r": "runs", "w": "windows"}
    for size in (2, 64):
        text = bulk.text(size)
        plan = [
            step
            for *_, step in empty.execute(f"EXPLAIN QUERY PLAN {text}", [None] * text.count("?"))
        ]
        walked = [
            step
            for step in plan
            if step.startswith("SCAN") and shorts.get(step.split()[1], step.split()[1]) in tables
        ]
        assert not walked, plan


def test_ids_that_grow_touch_few_pages_of_their_index(empty: sqlite3.Connection):
    """An event's identity is looked up by the beginning of the sender's id, then by the digest."""
    filters = "EXPLAIN QUERY PLAN " + rows.known_events.text(2)
    assert any(
        "events_key (<expr>=? AND key=?)" in step for *_, step in empty.execute(filters, [None] * 4)
    )


@pytest.mark.anyio
@pytest.mark.parametrize(
    "ident", ["", "0:1", "order-1234567890-1", "ü" * 20, "a\0b" * 8, "\0", "x" * 1024]
)
async def test_p2_any_id_is_known_again(ledger: Ledger, ident: str):
    """A duplicate is found whatever its id is made of, and so is the event by its sender's id."""
    first = ledger.arrival(ident, ledger.run())
    await ledger.record(first)
    (receipt,) = await ledger.record(ledger.arrival(ident, ledger.run()))
    assert (receipt.ledger_id, receipt.duplicate) == (first.id, True)
    if ident:
        assert (await ledger.store.event(ident))["id"] == first.id


@pytest.mark.parametrize(
    ("name", "columns"),
    [("delete_cursors", "trigger=? AND key=?"), ("delete_patterns", "subscription=? AND key=?")],
)
def test_a_row_is_dropped_by_its_whole_key(empty: sqlite3.Connection, name: str, columns: str):
    """A trigger with a hundred thousand keys in its cursor forgets one without a look at the
    others.
    """
    text = BULK_STATEMENTS[name].text(2)
    plan = [step for *_, step in empty.execute(f"EXPLAIN QUERY PLAN {text}", [None] * 4)]
    assert any(step.startswith("SEARCH") and columns in step for step in plan), plan


# --------------------------------------------------------------------------- every other statement

GROWING_TABLES = {
    "cursors", "dead_letters", "events", "journal", "late_runs", "outbox", "pattern_events",
    "patterns", "run_events", "runs",
    "windows",
}  # fmt: skip
"""Tables that grow with what happens."""

ALIASES = {
    "d": "dead_letters",
    "e": "events",
    "m": "run_events",
    "o": "outbox",
    "p": "patterns",
    "r": "runs",
    "w": "windows",
}


SMALL_INDEXES = ("runs_ordering", "runs_blobs", "journal_blobs", "dead_letters_open")
"""Indexes of what is filters for and nothing else: live runs with an ordering key, blobs, open
dead letters.
"""


class Shelf:
    """A sink that keeps the types it was sent."""

    name = "shelf"

    def __init__(self) -> None:
        self.taken: list[str] = []

    async def send(self, *messages: OutboxMessage) -> None:
        self.taken += [message.event.type for message in messages]

    async def close(self) -> None: ...


class StatementTrace:
    """Every statement that SQLite was given, by any connection, with the values in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.statements: list[str] = []
        connect = sqlite3.connect

        def traced(*args: Any, **options: Any) -> sqlite3.Connection:
            connection = connect(*args, **options)
            connection.set_trace_callback(self.statements.append)
            return connection

        monkeypatch.setattr(sqlite3, "connect", traced)

    def walks(self, empty: sqlite3.Connection) -> dict[str, str]:
        """Steps of their plans that walk a table, each with a statement that does."""
        found: dict[str, str] = {}
        schema = "".join(script for _, script in migrations())
        for text in self.statements:
            if text.strip().rstrip(";") in schema:
                continue  # a migration: it ran on the columns of before
            if not text.lstrip().startswith(
                ("SELECT", "INSERT INTO", "INSERT OR", "UPDATE", "DELETE", "WITH")
            ):
                continue
            for *_, step in empty.execute(f"EXPLAIN QUERY PLAN {text}"):
                words = step.split()
                if (
                    words[0] == "SCAN"
                    and words[-1] not in SMALL_INDEXES
                    and ALIASES.get(words[1], words[1]) in GROWING_TABLES
                ):
                    found[step] = text
        return found


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> StatementTrace:
    return StatementTrace(monkeypatch)


@pytest.mark.anyio
async def test_no_verb_of_the_writer_walks_a_table(
    empty: sqlite3.Connection, trace: StatementTrace, reopen: Reopen
):
    """Whatever a person asks for, and the start of a store, costs what it changes, not what the
    ledger holds.
    """
    ledger = reopen()
    parent = await ledger.running()
    child = ledger.run(parent=parent.id, parent_call_key="c#1")
    await ledger.append(parent, children=[child])
    await ledger.mark((await ledger.claimed())[0])
    held, _ = await ledger.recorded(
        ledger.run(ordering_key="x", state=State.PAUSED),
        ledger.run(ordering_key="x", state=State.PAUSED),
    )
    await ledger.store.set_paused("t", True)
    await ledger.store.set_paused("t", False)
    assert (await ledger.store.run(held.id))["state"] == "pending"
    await ledger.store.cancel(parent.id, "as filters")
    await ledger.settle(parent, Failed(b"{}"))
    await ledger.store.retry(parent.id)
    await ledger.store.cancel(parent.id, "as filters")
    await ledger.store.retry(parent.id, discard_journal=True)
    ledger = reopen()
    await ledger.settle((await ledger.claimed())[0], Suspended(None, 0, 0))
    await ledger.store.record(
        [ledger.arrival("dead", dead=[("s", "unfit")])], trigger="t", cursor={"a": 1, "b": None}
    )
    (dead,) = await ledger.store.dead_letters()
    assert (await ledger.store.event("dead"))["id"] == dead["event"]
    await ledger.store.redrive(dead["id"], ledger.arrival("dead", ledger.run()))
    await ledger.store.replay(dead["event"], ledger.arrival("dead", ledger.run()))
    later = ledger.clock.now() + 1_000 * SECOND
    await ledger.store.record_late_runs([run["id"] for run in await ledger.store.runs()], 1)
    while await ledger.store.prune(payloads_before=later, identities_before=later):
        pass
    walks = trace.walks(empty)
    assert walks.keys() <= {"SCAN runs"}, walks  # the list of the newest


@pytest.mark.anyio
async def test_the_writer_never_looks_for_bodies_to_drop(
    empty: sqlite3.Connection, trace: StatementTrace, ledger: Ledger
):
    """What has lost its body already is walked over by a reader; the writer is given ids, and looks
    those up.
    """
    await ledger.store.record([ledger.arrival(f"e{n}") for n in range(5)])
    later = ledger.clock.now() + 1_000 * SECOND
    steps = [
        await ledger.store.prune(payloads_before=later, identities_before=0, step=2)
        for _ in range(4)
    ]
    assert steps == [2, 2, 1, 0]
    await ledger.store.record([ledger.arrival("one more")])
    assert await ledger.store.prune(payloads_before=later, identities_before=0, step=2) == 1
    dropped = [text for text in trace.statements if "SET kept = 0" in text]
    assert len(dropped) == 4
    for text in dropped:
        assert (
            empty.execute(f"EXPLAIN QUERY PLAN {text}").fetchone()[3]
            == "SEARCH e USING INTEGER PRIMARY KEY (rowid=?)"
        )


@pytest.mark.anyio
async def test_no_run_of_an_app_walks_a_table(empty: sqlite3.Connection, trace: StatementTrace):
    """Ordering keys, windows, patterns, children, messages and late runs are found by indexes,
    at every step of theirs.
    """

    @flow
    async def child(n: int) -> int:
        return n

    @flow
    async def whole(event: Event) -> None:
        await emit("half.done")
        await child(1)
        await sleep(100)
        await emit("done")

    @flow
    async def act(events: list[Event]) -> None: ...

    clock, trigger, shelf = VirtualClock(), MemoryTrigger("src"), Shelf()
    app = App("plans", clock=clock)
    app.add(child)
    app.on(trigger, whole, key="k")
    app.on(trigger, act, deliver=Batch(3, within=5), key="k")
    app.on(count(trigger, 2, within=60, by="k"), act)
    app.on(absent(trigger, for_=60, by="k"), act)
    app.on(RunState(whole, "late", "completed", after=50), act)
    app.send("half.*", shelf)
    async with running(app, clock=clock):
        for n in range(6):
            await trigger.send(data={"k": n % 2})
        counts = await drain(app)
        assert counts["completed"] >= 12 and not counts["pending"]
        assert set(shelf.taken) == {"half.done"}
    walks = trace.walks(empty)
    assert walks.keys() <= {"SCAN runs"}, walks


@pytest.mark.parametrize("state", [None, *State])
@pytest.mark.parametrize(
    "filters",
    [{}, {"flow": "f"}, {"after": 9}, {"parent": 1}, {"event": 1}, {"parent": 1, "after": 9}],
)
def test_lists_of_runs_are_read_from_an_index(
    empty: sqlite3.Connection, state: State | None, filters: dict[str, Any]
):
    """A flow that is rare, a state that few runs are in, the children of one: no list walks over a
    million others to find them. Only the newest of all, or of those that completed, are read in
    order until the page is full.
    """
    statements: list[str] = []
    empty.set_trace_callback(statements.append)
    queries.runs(empty, state=state, **filters)
    empty.set_trace_callback(None)
    steps = {
        step
        for text in statements
        for *_, step in empty.execute(f"EXPLAIN QUERY PLAN {text}")
        if not step.endswith(SMALL_INDEXES)
    }
    in_order = state in (None, State.COMPLETED) and not filters.keys() & {"flow", "parent", "event"}
    walk = ("SCAN runs", "SEARCH runs USING INTEGER PRIMARY KEY (rowid<?)")
    assert in_order == any(step.startswith(walk) for step in steps), steps


def test_a_list_of_recent_events_does_not_go_back_further(empty: sqlite3.Connection):
    """`since` bounds the ids too, so that asking for the last minutes of a rare type costs those
    minutes.
    """
    statements: list[str] = []
    empty.set_trace_callback(statements.append)
    queries.events(
        empty,
        trigger=None,
        type="rare",
        since=1_800_000_000 * SECOND,
        until=None,
        limit=5,
        after=None,
    )
    empty.set_trace_callback(None)
    steps = [
        step for text in statements for *_, step in empty.execute(f"EXPLAIN QUERY PLAN {text}")
    ]
    assert "SEARCH events USING COVERING INDEX events_scan (id>?)" in steps


class Racing(ManualClock):
    """Every look at it is a second later."""

    looked = 0

    def monotonic(self) -> float:
        self.looked += 1
        return float(self.looked)


@pytest.mark.anyio
async def test_what_work_needs_is_read_however_long_it_takes(path: str):
    """A trigger with a million keys must start, a run with a long journal continue: only a list is
    refused after two seconds.
    """
    clock = Racing()
    store = SqliteStore(path, clock=clock, ballast=0, free_floor=0)
    store.open()
    ledger = Ledger(store, clock)
    await store.record([], trigger="t", cursor={f"key-{n}": n for n in range(20_000)})
    run = await ledger.running()
    await ledger.append(run, *(value(f"task#{n}") for n in range(20_000)))
    before = clock.looked
    assert len(await store.cursor("t")) == 20_000
    assert clock.looked - before > QUERY_TIMEOUT_SECONDS
    before = clock.looked
    assert len(await store.load(run.id)) == 20_000
    assert clock.looked - before > QUERY_TIMEOUT_SECONDS
    store.close()
