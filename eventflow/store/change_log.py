"""What the writer moves while an audit walks the tables: temporary triggers on its connection note what changes of the sums.

`SqliteStore.check` follows, takes after each slice and again with the ledger's row, and forgets; audit.py adds what it took.
The writer pays for it only while a check goes on, and the hot path knows nothing of it. Triggers and notes are in the
connection's own temporary schema, in memory: nothing of them is in the file, and a rollback takes them back with the rest.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

WEIGHED: Mapping[str, Sequence[str]] = {
    "runs": ("{}state", "{}deliveries", "{}size", "{}parent IS NOT NULL"),
    "events": ("{}duplicates", "{}conflicts"),
    "dead_letters": ("{}redriven_at IS NULL",),
    "pattern_events": ("{}expired IS NULL", "{}size"),
}
"""By table, what the sums are made of; `{}` is for NEW. and OLD."""

_KEYS = {
    "runs": "{}id, ''",
    "events": "{}id, ''",
    "dead_letters": "{}id, ''",
    "pattern_events": "{}event, {}subscription",
}
_WATCHED = {
    "runs": "state, deliveries, size",
    "events": "duplicates, conflicts",
    "dead_letters": "redriven_at",
    "pattern_events": "expired, size",
}
_WIDTH = max(map(len, WEIGHED.values()))


class Move(NamedTuple):
    """A row that came (`sign` 1) or went (-1) with these values; a change is both. `after`: the last commit before it."""

    table: str
    key: tuple[int, str]
    after: int
    sign: int
    values: Sequence[Any]


class Moves:
    """One audit's notes. Every method is an errand: on the writer's connection, between two commits."""

    def __init__(self) -> None:
        self._name = f"moves_{id(self):x}"  # two audits may go on at once

    def follow(self, connection: sqlite3.Connection) -> None:
        values = ", ".join(f"v{n}" for n in range(_WIDTH))
        connection.execute(f"CREATE TEMP TABLE {self._name} (tab, id, text, after, sign, {values})")
        for table in WEIGHED:
            came, went = self._note(table, "NEW.", 1), self._note(table, "OLD.", -1)
            self._trigger(connection, f"INSERT ON main.{table}", came)
            self._trigger(connection, f"DELETE ON main.{table}", went)
            self._trigger(connection, f"UPDATE OF {_WATCHED[table]} ON main.{table}", went, came)

    def _note(self, table: str, of: str, sign: int) -> str:
        columns = [*WEIGHED[table], *["NULL"] * (_WIDTH - len(WEIGHED[table]))]
        values = ", ".join(
            [_KEYS[table], "(SELECT batch FROM main.ledger)", str(sign), *columns]
        ).replace("{}", of)
        return f"INSERT INTO {self._name} VALUES ('{table}', {values});"

    def _trigger(self, connection: sqlite3.Connection, when: str, *notes: str) -> None:
        name = f"{self._name}_{when.split(maxsplit=1)[0]}_{when.rpartition('.')[2]}"
        connection.execute(f"CREATE TEMP TRIGGER {name} AFTER {when} BEGIN {' '.join(notes)} END")

    def take(self, connection: sqlite3.Connection) -> list[Move]:
        """What was noted since the last call, in order."""
        noted = connection.execute(f"SELECT * FROM {self._name} ORDER BY rowid").fetchall()
        connection.execute(f"DELETE FROM {self._name}")
        return [
            Move(table, (ident, text), after, sign, values[: len(WEIGHED[table])])
            for table, ident, text, after, sign, *values in noted
        ]

    def forget(self, connection: sqlite3.Connection) -> None:
        """The triggers first: they write to the table."""
        owned = (
            "SELECT name FROM sqlite_temp_schema WHERE type = 'trigger' AND name LIKE ? ESCAPE '!'"
        )
        for (name,) in connection.execute(
            owned, (f"{self._name}!_%".replace("_", "!_", 1),)
        ).fetchall():
            connection.execute(f"DROP TRIGGER temp.{name}")
        connection.execute(f"DROP TABLE IF EXISTS temp.{self._name}")
