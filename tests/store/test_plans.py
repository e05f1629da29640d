"""How SQLite looks rows up: what costs nothing in an empty ledger and everything in a full one."""

import sqlite3
from collections.abc import Iterator

import pytest

from eventflow.store import rows
from eventflow.store.migrate import migrations
from tests.store.ledger import Ledger

BULKS = {name: value for name, value in vars(rows).items() if isinstance(value, rows.Bulk)}


@pytest.fixture(scope="module")
def empty() -> Iterator[sqlite3.Connection]:
    """A ledger of today's form, in memory."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for _, script in migrations():
        connection.executescript(script)
    yield connection
    connection.close()


@pytest.mark.parametrize("name", BULKS)
def test_no_bulk_statement_walks_a_table(empty: sqlite3.Connection, name: str):
    """Each row of a bulk statement is looked up by an index, however many rows the tables have."""
    bulk = BULKS[name]
    tables = {table for (table,) in empty.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    shorts = {"e": "events", "j": "journal", "p": "patterns", "r": "runs", "w": "windows"}
    for size in (2, 64):
        text = bulk.text(size)
        plan = [step for *_, step in empty.execute(f"EXPLAIN QUERY PLAN {text}", [None] * text.count("?"))]
        walked = [step for step in plan if step.startswith("SCAN") and shorts.get(step.split()[1], step.split()[1]) in tables]
        assert not walked, plan


def test_ids_that_grow_touch_few_pages_of_their_index(empty: sqlite3.Connection):
    """An event's identity is looked up by the beginning of the sender's id, then by the digest."""
    asked = "EXPLAIN QUERY PLAN " + rows.known_events.text(2)
    assert any("events_key (<expr>=? AND key=?)" in step for *_, step in empty.execute(asked, [None] * 4))


@pytest.mark.anyio
@pytest.mark.parametrize("ident", ["", "0:1", "order-1234567890-1", "ü" * 20, "a\0b" * 8, "\0", "x" * 1024])
async def test_p2_any_id_is_known_again(ledger: Ledger, ident: str):
    """A duplicate is found whatever its id is made of, and so is the event by its sender's id."""
    first = ledger.arrival(ident, ledger.run())
    await ledger.record(first)
    (receipt,) = await ledger.record(ledger.arrival(ident, ledger.run()))
    assert (receipt.ledger_id, receipt.duplicate) == (first.id, True)
    if ident:
        assert (await ledger.store.event(ident))["id"] == first.id
