"""The schema files (store/migrate.py): a new store has the schema that all migrations make."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from eventflow.store.migrate import current_schema, migrate, migrations
from tests.store.ledger import Reopen


def structure(connection: sqlite3.Connection) -> dict[str, Any]:
    """Tables with their columns, in order, and indexes with their columns and conditions."""
    found: dict[str, Any] = {}
    rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema").fetchall()
    for kind, name, table, sql in rows:
        if kind == "table":
            columns = connection.execute(f"PRAGMA table_xinfo({name})").fetchall()
            found[name] = (columns, "WITHOUT ROWID" in (sql or ""), "CHECK" in (sql or ""))
        else:
            columns = connection.execute(f"PRAGMA index_xinfo({name})").fetchall()
            condition = " ".join((sql or "").split()).partition(" WHERE ")[2]
            unique = (sql or "").startswith("CREATE UNIQUE")
            found[name] = (table, [column[2:] for column in columns], condition, unique)
    return found


def test_a_new_store_has_the_schema_of_the_migrations(tmp_path: Path):
    """`current.sql` and the numbered files make the same tables, columns, indexes and rows."""
    made = {}
    for name, current in (("new", current_schema()), ("migrated", None)):
        connection = sqlite3.connect(tmp_path / name, isolation_level=None)
        migrate(connection, str(tmp_path / name), migrations(), current)
        made[name] = (
            structure(connection),
            connection.execute("SELECT * FROM ledger").fetchall(),
            connection.execute("PRAGMA user_version").fetchone(),
        )
        connection.close()
    assert made["new"] == made["migrated"]
    assert len(made["new"][0]) > 30


def test_structure_sees_a_difference():
    """The comparison is not vacuous: it sees a column, an index or a condition more."""
    plain = sqlite3.connect(":memory:")
    plain.executescript(current_schema())
    for change in (
        "ALTER TABLE runs ADD COLUMN extra TEXT",
        "DROP INDEX runs_flow",
        "DROP INDEX runs_event; CREATE INDEX runs_event ON runs (event) WHERE event > 0",
    ):
        other = sqlite3.connect(":memory:")
        other.executescript(current_schema())
        other.executescript(change)
        assert structure(other) != structure(plain), change
        other.close()
    plain.close()


@pytest.mark.parametrize("reopened", [False, True])
def test_a_new_store_opens_without_migrations(reopen: Reopen, path: str, reopened: bool):
    """A new store has the newest version at once, and a second opening finds nothing to do."""
    reopen().store.close()
    if reopened:
        reopen().store.close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (migrations()[-1][0],)
    connection.close()
    assert list(Path(path).parent.glob("*.bak")) == []
