"""The schema: `schema/current.sql` for a new store, numbered files that change an older one.

Called once by the store's `open`. The number of the last file applied is SQLite's `user_version`.
All missing files are applied in one transaction, so a migration is complete or has changed nothing.
A store with data is copied first, to `PATH.schema-N.bak`.
"""

import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from eventflow.core.errors import StoreError

SCHEMA = Path(__file__).with_name("schema")
CURRENT = "current.sql"


def migrations() -> list[tuple[int, str]]:
    """`(number, SQL)` of each numbered schema file, in order."""
    return sorted(
        (int(file.name.split(".")[0]), file.read_text())
        for file in SCHEMA.glob("*.sql")
        if file.name != CURRENT
    )


def newest_schema() -> int:
    """The number of the newest migration. Reads no file: most stores that are opened have it."""
    names = (name for name in os.listdir(SCHEMA) if name.endswith(".sql") and name != CURRENT)
    return max(int(name.split(".")[0]) for name in names)


def current_schema() -> str:
    """The SQL that makes what all migrations together make, in one step."""
    return (SCHEMA / CURRENT).read_text()


def migrate(
    connection: sqlite3.Connection,
    path: str,
    known: Sequence[tuple[int, str]],
    current: str | None = None,
) -> None:
    """Brings the store at `path` to the newest schema of `known`.

    A new store gets `current`, if given, instead of each migration in turn, which takes SQLite
    about 20 ms. Raises StoreError for a store that a newer eventflow wrote.
    """
    newest = known[-1][0]
    found: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if found > newest:
        raise StoreError(
            f"the store {path} has schema {found}, this eventflow knows up to {newest}: "
            "a newer version wrote it; install that version, "
            "or restore the copy that was made before its upgrade"
        )
    missing = [sql for number, sql in known if number > found]
    if not missing:
        return
    if found:
        _keep_old(connection, f"{path}.schema-{found}.bak")
    elif current is not None:
        missing = [current]
    try:
        connection.executescript(
            "\n".join(["BEGIN IMMEDIATE;", *missing, f"PRAGMA user_version = {newest};", "COMMIT;"])
        )
    except sqlite3.Error:
        connection.rollback()
        raise


def _keep_old(connection: sqlite3.Connection, path: str) -> None:
    """Copies the store. A copy that exists is from a migration that failed and holds the same."""
    from eventflow.store.backup import back_up  # once per upgrade

    if not os.path.exists(path):
        back_up(connection, path, lambda: None)
