"""Rows of the SQLite store: their shapes, their checksums, and the statements that read and write
many at once.

Called by the tables of a transaction (transaction.py) and by load.py, queries.py and audit.py.
Python's sqlite3 releases the GIL at every step of a statement, and taking it back from a busy event
loop may cost 5 ms. So rows are written as multi-row VALUES, a batch in a few statements, and read
as one row of JSON.
"""

import sqlite3
from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeAlias
from zlib import crc32

import msgspec

from eventflow.runs.journal import Entry
from eventflow.runs.run import Run, State
from eventflow.store.protocol import Arrival

NEVER = (1 << 63) - 1
"""`due_at` of a run that waits for something other than time."""

Value: TypeAlias = "int | str | bytes | None"
Values: TypeAlias = "Sequence[Value]"

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows in one statement.

Each text is prepared once; a batch is padded with NULL rows to the next size.
"""

_MAX_VARIABLES = 32_766
"""SQLite's limit of variables in a statement."""


def skip_adapters() -> None:
    """Binds None and bytes as they are, for every connection of this process.

    Python's sqlite3 looks for an adapter of each None and bytes, and finds that there is none by
    an exception (until 3.11 with a formatted message): an eighth of all instructions of a run. An
    adapter that returns its argument, in C, ends the search at once. Adapters that the program has
    registered for these types stay, and replace these when they are registered later.
    """
    if (type(None), sqlite3.PrepareProtocol) not in sqlite3.adapters:
        sqlite3.register_adapter(type(None), dict[None, None]().get)
    if (bytes, sqlite3.PrepareProtocol) not in sqlite3.adapters:
        sqlite3.register_adapter(bytes, bytes.__bytes__)


class BulkStatement:
    """One statement over many rows: `head (VALUES …) tail`. Rows with a NULL first column are
    padding.

    Never `(a, b) IN (VALUES …)`, for which SQLite walks the whole table: a CROSS JOIN looks each
    row up in the index, and so does `IN (SELECT * FROM (VALUES …))`, though perhaps by the first
    column only.
    """

    def __init__(self, head: str, width: int, tail: str) -> None:
        self._head = head
        self._width = width
        self._tail = tail
        self._texts: dict[int, str] = {}
        self._max_rows = max(size for size in _SIZES if size * width <= _MAX_VARIABLES)

    def execute(self, connection: sqlite3.Connection, rows: Sequence[Values]) -> int:
        """Executes the statement over all rows; returns how many rows changed."""
        if len(rows) <= self._max_rows:
            return self._run(connection, rows).rowcount
        changed = 0
        for first in range(0, len(rows), self._max_rows):
            changed += self._run(connection, rows[first : first + self._max_rows]).rowcount
        return changed

    def read(self, connection: sqlite3.Connection, rows: Sequence[Values]) -> list[Any]:
        """Executes a query whose result is one JSON text; returns one for each chunk of rows."""
        if not rows:
            return []
        return [
            self._run(connection, rows[first : first + self._max_rows]).fetchone()[0]
            for first in range(0, len(rows), self._max_rows)
        ]

    def _run(self, connection: sqlite3.Connection, rows: Sequence[Values]) -> sqlite3.Cursor:
        size = _SIZES[bisect_left(_SIZES, len(rows))]
        values = list(chain.from_iterable(rows))
        if padding := size - len(rows):
            values.extend([None] * (padding * self._width))
        return connection.execute(self._texts.get(size) or self.text(size), values)

    def text(self, size: int) -> str:
        """The statement for so many rows."""
        text = self._texts.get(size)
        if text is None:
            row = "(" + ",".join("?" * self._width) + ")"
            text = self._texts[size] = (
                f"{self._head} (VALUES {','.join([row] * size)}) {self._tail}"
            )
        return text


def insert(table: str, columns: Sequence[str], conflict: str = "") -> BulkStatement:
    head = f"INSERT INTO {table} ({','.join(columns)}) SELECT * FROM"
    return BulkStatement(head, len(columns), f"WHERE column1 IS NOT NULL {conflict}")


_pack = msgspec.msgpack.Encoder().encode


def checksum(*payload: Value) -> int:
    """CRC-32 of a row's payload as a MessagePack array."""
    return crc32(_pack(payload))


# --------------------------------------------------------------------------- events

EVENT_COLUMNS = (
    "id", "key", "digest", "trigger", "event_id", "source", "type", "subject", "received_at",
    "matched", "crc", "verdicts", "headers", "body",
)  # fmt: skip
insert_events = insert("events", EVENT_COLUMNS)


def event_row(a: Arrival) -> Values:
    crc = event_crc(a.id, a.key, a.digest, a.trigger, a.event_id, a.verdicts, a.headers, a.body)
    return (
        a.id, a.key, a.digest, a.trigger, a.event_id, a.source, a.type, a.subject, a.received_at,
        len(a.runs), crc, a.verdicts, a.headers, a.body,
    )  # fmt: skip


def event_crc(*payload: Value) -> int:
    """Over id, key, digest, trigger, event_id, verdicts, headers, body."""
    return checksum(*payload)


class KnownEvent(msgspec.Struct, array_like=True, gc=False):
    """An event that is already in the ledger; `key` and `digest` in hexadecimal."""

    id: int
    key: str
    digest: str
    matched: int


known_events = BulkStatement(
    "SELECT json_group_array(json_array(e.id, hex(e.key), hex(e.digest), e.matched)) FROM",
    2,
    "v CROSS JOIN events e"
    " ON substr(e.event_id, 1, 16) = substr(v.column1, 1, 16) AND e.key = v.column2",
)
count_duplicates = BulkStatement(
    "UPDATE events SET duplicates = duplicates + column2, conflicts = conflicts + column3,"
    " last_duplicate_at = coalesce(column4, last_duplicate_at) FROM",
    4,
    "WHERE events.id = column1",
)
insert_dead_letters = insert("dead_letters", ("event", "subscription", "reason", "at"))
insert_outbox = insert("outbox", ("sink", "event", "subscription", "at"))

# --------------------------------------------------------------------------- runs

RUN_COLUMNS = (
    "id", "flow", "subscription", "event", "state", "created_at", "due_at", "started_at", "token",
    "ordering_key", "blocked", "priority", "parent", "parent_call_key", "depth", "crash_suspect",
    "crash_count", "cancel_requested", "size", "crc", "params", "mode",
)  # fmt: skip
insert_runs = insert("runs", RUN_COLUMNS)


def run_row(run: Run, due_at: int, size: int) -> Values:
    crc = run_crc(run.id, run.flow, run.subscription, run.event, run.ordering_key, run.params)
    return (
        run.id, run.flow, run.subscription, run.event, int(run.state), run.created_at, due_at,
        run.started_at, run.token, run.ordering_key, int(run.ordering_key is not None),
        run.priority, run.parent, run.parent_call_key, run.depth, int(run.crash_suspect),
        run.crash_count, int(run.cancel_requested), size, crc, run.params, run.mode,
    )  # fmt: skip


def run_crc(
    ident: int,
    flow: str,
    subscription: str,
    event: int | None,
    ordering_key: str | None,
    params: bytes | None,
) -> int:
    return checksum(ident, flow, subscription, event, ordering_key, params)


class RunRow(msgspec.Struct, array_like=True, gc=False):
    """The columns of a run that a transaction reads and may change; the last four are written,
    never read.
    """

    id: int
    flow: str
    ordering_key: str | None
    event: int | None
    parent: int | None
    parent_call_key: str | None
    size: int
    state: State
    due_at: int
    started_at: int | None
    finished_at: int | None
    token: int
    blocked: int
    crash_suspect: int
    crash_count: int
    cancel_requested: int
    reason: str | None
    deliveries: int = 1
    depth: int = 0
    result: bytes | None = None
    codec: str | None = None
    error: bytes | None = None
    unclaimed_entries: int | None = None

    def clear_crashes(self) -> None:
        self.crash_suspect = 0
        self.crash_count = 0

    def clear_outcome(self) -> None:
        self.reason = None
        self.result = None
        self.codec = None
        self.error = None
        self.unclaimed_entries = None


def new_run_row(run: Run, due_at: int, size: int) -> RunRow:
    """The row of a run that this transaction inserts."""
    return RunRow(
        id=run.id,
        flow=run.flow,
        ordering_key=run.ordering_key,
        event=run.event,
        parent=run.parent,
        parent_call_key=run.parent_call_key,
        size=size,
        state=run.state,
        due_at=due_at,
        started_at=run.started_at,
        finished_at=None,
        token=run.token,
        blocked=0,
        crash_suspect=int(run.crash_suspect),
        crash_count=run.crash_count,
        cancel_requested=int(run.cancel_requested),
        reason=None,
        depth=run.depth,
    )


_ROW = ",".join(RunRow.__struct_fields__[:19])
READ_ROWS = (
    f"SELECT json_group_array(json_array({_ROW})) FROM runs"
    " WHERE id IN (SELECT value FROM json_each(?))"
)
decode_rows = msgspec.json.Decoder(list[RunRow]).decode

_CHANGES = (
    "state", "due_at", "started_at", "finished_at", "token", "blocked", "crash_suspect",
    "crash_count", "cancel_requested", "reason", "result", "codec", "error", "unclaimed_entries",
    "outcome_crc",
)  # fmt: skip
_SET = ", ".join(f"{name} = column{n}" for n, name in enumerate(_CHANGES, 2))
update_runs = BulkStatement(
    f"UPDATE runs SET {_SET} FROM",
    len(_CHANGES) + 1,
    "WHERE runs.id = column1",
)


def run_changes(row: RunRow) -> Values:
    crc = (
        None
        if row.result is None and row.error is None
        else checksum(row.id, row.result, row.codec, row.error)
    )
    return (
        row.id, int(row.state), row.due_at, row.started_at, row.finished_at, row.token,
        row.blocked, row.crash_suspect, row.crash_count, row.cancel_requested, row.reason,
        row.result, row.codec, row.error, row.unclaimed_entries, crc,
    )  # fmt: skip


insert_run_events = insert("run_events", ("run", "event"), "ON CONFLICT DO NOTHING")
grow_runs = BulkStatement(
    "UPDATE runs SET deliveries = column2, due_at = column3, size = column4 FROM",
    4,
    "WHERE runs.id = column1",
)
"""For runs that further events have joined."""


class WindowRow(msgspec.Struct, array_like=True, gc=False):
    """The last window of a subscription and ordering key."""

    subscription: str
    ordering_key: str
    run: int
    count: int
    opened_at: int


known_windows = BulkStatement(
    "SELECT json_group_array(json_array(subscription, ordering_key, run, count, opened_at)) FROM",
    2,
    "v CROSS JOIN windows w ON w.subscription = v.column1 AND w.ordering_key = v.column2",
)
put_windows = insert(
    "windows",
    WindowRow.__struct_fields__,
    "ON CONFLICT (subscription, ordering_key) DO UPDATE SET run = excluded.run,"
    " count = excluded.count, opened_at = excluded.opened_at",
)
decode_windows = msgspec.json.Decoder(list[WindowRow]).decode

known_patterns = BulkStatement(
    "SELECT json_group_array(json_array(subscription, key, due_at, open, crc, hex(state))) FROM",
    2,
    "v CROSS JOIN patterns p ON p.subscription = v.column1 AND p.key = v.column2",
)
put_patterns = insert(
    "patterns",
    ("subscription", "key", "due_at", "open", "crc", "state"),
    "ON CONFLICT (subscription, key) DO UPDATE SET due_at = excluded.due_at, open = excluded.open,"
    " crc = excluded.crc, state = excluded.state",
)
delete_patterns = BulkStatement(
    "DELETE FROM patterns WHERE (subscription, key) IN (SELECT * FROM", 2, ")"
)
insert_pattern_events = insert(
    "pattern_events",
    ("event", "subscription", "key", "size"),
    "ON CONFLICT (event, subscription) DO UPDATE SET key = excluded.key, size = excluded.size,"
    " expired = NULL",
)
delete_pattern_events = BulkStatement(
    "DELETE FROM pattern_events WHERE (event, subscription) IN (SELECT * FROM", 2, ")"
)
expire_pattern_events = BulkStatement(
    "UPDATE pattern_events SET expired = column3 FROM",
    3,
    "WHERE pattern_events.event = column1 AND pattern_events.subscription = column2",
)

unblock_heads = BulkStatement(
    "UPDATE runs SET blocked = 0 WHERE id IN (SELECT (SELECT min(id) FROM runs"
    " WHERE flow = column1 AND ordering_key = column2 AND blocked = 1"
    " AND ordering_key IS NOT NULL AND state < 4) FROM",
    2,
    "WHERE column1 IS NOT NULL AND NOT EXISTS (SELECT 1 FROM runs"
    " WHERE flow = column1 AND ordering_key = column2 AND blocked = 0"
    " AND ordering_key IS NOT NULL AND state < 4))",
)
"""Each ordering key has exactly one live run that is not blocked, its head: where there is none,
the oldest live run becomes it.
"""

known_children = BulkStatement(
    "SELECT json_group_array(json_array(parent, parent_call_key)) FROM",
    2,
    "v CROSS JOIN runs r ON r.parent = v.column1 AND r.parent_call_key = v.column2",
)

# --------------------------------------------------------------------------- journal

ENTRY_COLUMNS = (
    "run",
    "call_key",
    "attempt",
    "kind",
    "batch",
    "position",
    "at",
    "due_at",
    "crc",
    "codec",
    "fingerprint",
    "value",
    "error",
    "after",
    "waited",
    "took",
)
insert_entries = insert("journal", ENTRY_COLUMNS)


def entry_row(run: int, e: Entry) -> Values:
    return (
        run, e.call_key, e.attempt, int(e.kind), e.batch, e.position, e.at, e.due_at,
        entry_crc(run, e), e.codec, e.fingerprint, e.value, e.error, e.after, e.waited, e.took,
    )  # fmt: skip


def entry_crc(run: int, e: Entry) -> int:
    """The times are part of it where there are any: earlier versions recorded none."""
    content = (
        run, e.call_key, e.attempt, int(e.kind), e.batch, e.position, e.due_at, e.codec,
        e.fingerprint, e.value, e.error,
    )  # fmt: skip
    if e.took is None:
        return checksum(*content)
    return checksum(*content, e.after, e.waited, e.took)


known_entries = BulkStatement(
    "SELECT count(*) FROM",
    4,
    "v CROSS JOIN journal j ON j.run = v.column1 AND j.call_key = v.column2"
    " AND j.attempt = v.column3 AND j.kind = v.column4",
)
finals = BulkStatement(
    "SELECT json_group_array(json_array(run, call_key)) FROM",
    2,
    "v CROSS JOIN journal j ON j.run = v.column1 AND j.call_key = v.column2 AND j.kind IN (0, 1)",
)
"""Calls that have an end, VALUE or ERROR: a later answer is ignored."""

later_entries = BulkStatement(
    "SELECT json_group_array(v.column1) FROM",
    3,
    "AS v WHERE EXISTS (SELECT 1 FROM journal WHERE run = v.column1 AND batch > v.column2)"
    " OR (v.column3 > 0 AND (SELECT count(*) FROM journal WHERE run = v.column1) > v.column3)",
)
decode_pairs = msgspec.json.Decoder(list[tuple[int, str]]).decode
decode_known = msgspec.json.Decoder(list[KnownEvent]).decode
decode_ids = msgspec.json.Decoder(list[int]).decode

# --------------------------------------------------------------------------- cursors

put_cursors = insert(
    "cursors",
    ("trigger", "key", "value"),
    "ON CONFLICT (trigger, key) DO UPDATE SET value = excluded.value",
)
delete_cursors = BulkStatement("DELETE FROM cursors WHERE (trigger, key) IN (SELECT * FROM", 2, ")")
