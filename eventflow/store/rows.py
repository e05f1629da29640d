"""Rows of the SQLite store: their shapes, their checksums, and the statements that read and write
many at once.

Called by the tables of a transaction (transaction.py) and by load.py, queries.py and audit.py.
Python's sqlite3 releases the GIL at every step of a statement, and taking it back from a busy event
loop may cost 5 ms. So rows are written as multi-row VALUES, a batch in a few statements, and read
as one row of JSON.
"""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any, TypeAlias
from zlib import crc32

import msgspec
from msgspec.structs import astuple

from eventflow.runs.journal import Entry
from eventflow.runs.run import Completed, Failed, Run, State
from eventflow.store.protocol import Arrival

NEVER = (1 << 63) - 1
"""`due_at` of a run that waits for something other than time."""

Value: TypeAlias = "int | str | bytes | None"
Values: TypeAlias = "Sequence[Value]"

_EVERY_SIZE_UP_TO = 16
_MAX_ROWS = 128
"""Sizes of a statement, in rows: each up to 16, then the powers of two up to 128.

Each text is prepared once, which costs some 20,000 instructions a row. More rows are split into a
few of these sizes, so that only values that are written are bound.
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
    """One statement over many rows: `head VALUES … tail`, each row as `row` has it.

    Never `(a, b) IN (VALUES …)`, for which SQLite walks the whole table: a CROSS JOIN looks each
    row up in the index, and so does `IN (SELECT * FROM (VALUES …))`, though perhaps by the first
    column only.
    """

    def __init__(self, head: str, row: str, tail: str) -> None:
        self._head = head
        self._row = row
        self._tail = tail
        self._texts: dict[int, str] = {}
        self._max_rows = _MAX_ROWS
        while self._max_rows * row.count("?") > _MAX_VARIABLES:
            self._max_rows //= 2

    def execute(self, connection: sqlite3.Connection, rows: Sequence[Values]) -> int:
        """Executes the statement over all rows, in order; returns how many rows changed."""
        return sum([cursor.rowcount for cursor in self._run(connection, rows)])

    def read(self, connection: sqlite3.Connection, rows: Sequence[Values]) -> list[Any]:
        """Executes a query whose result is one JSON text; returns one for each chunk of rows."""
        return [cursor.fetchone()[0] for cursor in self._run(connection, rows)]

    def _run(
        self, connection: sqlite3.Connection, rows: Sequence[Values]
    ) -> Iterator[sqlite3.Cursor]:
        first = 0
        left = len(rows)
        while left:
            size = left
            if left > _EVERY_SIZE_UP_TO:
                size = min(1 << left.bit_length() - 1, self._max_rows)
            chunk = rows if size == left and not first else rows[first : first + size]
            text = self._texts.get(size) or self.text(size)
            yield connection.execute(text, list(chain.from_iterable(chunk)))
            first += size
            left -= size

    def text(self, size: int) -> str:
        """The statement for so many rows."""
        text = self._texts.get(size)
        if text is None:
            text = f"{self._head} VALUES {','.join([self._row] * size)} {self._tail}"
            self._texts[size] = text
        return text


def _placeholders(width: int) -> str:
    return f"({','.join('?' * width)})"


def over(head: str, width: int, tail: str) -> BulkStatement:
    """A statement over the rows of `(VALUES …)`, a table of columns `column1`, `column2` …"""
    return BulkStatement(f"{head} (", _placeholders(width), f") {tail}")


def insert(
    table: str,
    columns: Sequence[str],
    conflict: str = "",
    constants: Mapping[str, int | str] = MappingProxyType({}),
) -> BulkStatement:
    """An INSERT. `constants`: further columns, with the same value in every row; they are part of
    the text, where they cost nothing.
    """
    names = ",".join((*columns, *constants))
    values = ",".join([*"?" * len(columns), *map(repr, constants.values())])
    return BulkStatement(f"INSERT INTO {table} ({names})", f"({values})", conflict)


_pack = msgspec.msgpack.Encoder().encode


def checksum(*payload: Value) -> int:
    """CRC-32 of a row's payload as a MessagePack array."""
    return crc32(_pack(payload))


# --------------------------------------------------------------------------- events

_EVENT_COLUMNS = (
    "id", "key", "digest", "trigger", "event_id", "verdicts", "body", "source", "type",
    "received_at", "matched", "crc",
)  # fmt: skip
_IF_KNOWN = "ON CONFLICT (substr(event_id, 1, 16), key) DO NOTHING"
insert_events = insert("events", (*_EVENT_COLUMNS, "subject", "headers"), _IF_KNOWN)
insert_bare_events = insert("events", _EVENT_COLUMNS, _IF_KNOWN)
"""Both leave out events whose identity the ledger has. Bare events have no subject and no headers:
a NULL in the text costs nothing, one that is bound some thousand instructions.
"""


def event_rows(arrivals: Sequence[Arrival]) -> list[Values]:
    return [
        (*row, a.subject, a.headers)
        for a, row in zip(arrivals, bare_event_rows(arrivals), strict=True)
    ]


def bare_event_rows(arrivals: Sequence[Arrival]) -> list[Values]:
    found: list[Values] = []
    for a in arrivals:
        content = (a.id, a.key, a.digest, a.trigger, a.event_id, a.verdicts, a.headers, a.body)
        others = (
            a.body, a.source, a.type, a.received_at, len(a.runs), crc32(_pack(content)),
        )  # fmt: skip
        found.append(content[:6] + others)
    return found


decide_events = over(
    "UPDATE events SET matched = column2, crc = column3, verdicts = column4 FROM",
    4,
    "WHERE events.id = column1",
)
"""For events whose verdicts a window or a pattern decided."""


def decided_row(a: Arrival) -> Values:
    crc = event_crc(a.id, a.key, a.digest, a.trigger, a.event_id, a.verdicts, a.headers, a.body)
    return (a.id, len(a.runs), crc, a.verdicts)


def event_crc(*payload: Value) -> int:
    """Over id, key, digest, trigger, event_id, verdicts, headers, body."""
    return checksum(*payload)


class KnownEvent(msgspec.Struct, array_like=True, gc=False):
    """An event that is already in the ledger; `key` and `digest` in hexadecimal."""

    id: int
    key: str
    digest: str
    matched: int


known_events = over(
    "SELECT json_group_array(json_array(e.id, hex(e.key), hex(e.digest), e.matched)) FROM",
    2,
    "v CROSS JOIN events e"
    " ON substr(e.event_id, 1, 16) = substr(v.column1, 1, 16) AND e.key = v.column2",
)
count_duplicates = over(
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


_STARTED_COLUMNS = (
    "id", "flow", "subscription", "event", "created_at", "started_at", "priority", "depth", "size",
    "crc",
)  # fmt: skip
_STARTED_CONSTANTS: Mapping[str, int | str] = {
    "state": 1, "due_at": 0, "token": 1, "blocked": 0, "crash_suspect": 0, "crash_count": 0,
    "cancel_requested": 0,
}  # fmt: skip
insert_started_runs = insert("runs", _STARTED_COLUMNS, constants=_STARTED_CONSTANTS)
"""Runs of one event each that the worker takes as they are recorded."""


def started_rows(started: Sequence[tuple[Run, int]]) -> list[Values]:
    """Rows of runs, each with its size."""
    return [
        (
            run.id,
            run.flow,
            run.subscription,
            run.event,
            run.created_at,
            run.started_at,
            run.priority,
            run.depth,
            size,
            crc32(_pack((run.id, run.flow, run.subscription, run.event, None, None))),
        )
        for run, size in started
    ]


def run_crc(
    ident: int,
    flow: str,
    subscription: str,
    event: int | None,
    ordering_key: str | None,
    params: bytes | None,
) -> int:
    return checksum(ident, flow, subscription, event, ordering_key, params)


BY_A_PERSON = 1
BY_ITS_PARENTS_CANCEL = -1
"""Values of `RunRow.cancel_requested`."""


class RunRow(msgspec.Struct, array_like=True, gc=False):
    """The columns of a run that a transaction reads and may change. The defaults are those of a run
    that begins as it is recorded. `outcome`: Completed or Failed once the run ended, or None;
    written, never read.

    `cancel_requested` is 0 or says who cancelled the run: BY_A_PERSON, BY_ITS_PARENTS_CANCEL, or
    1 + the token of the claim in which its parent's flow gave up the call. retries.py uses it.
    """

    id: int
    flow: str
    event: int | None
    size: int
    started_at: int | None
    depth: int
    ordering_key: str | None = None
    parent: int | None = None
    parent_call_key: str | None = None
    state: State = State.RUNNING
    due_at: int = 0
    finished_at: int | None = None
    token: int = 1
    blocked: int = 0
    crash_suspect: int = 0
    crash_count: int = 0
    cancel_requested: int = 0
    reason: str | None = None
    deliveries: int = 1
    outcome: Any = None  # msgspec decodes no union of structs

    @property
    def awaits_retry(self) -> bool:
        """Whether an execution of the run has failed, and the next one has not begun."""
        return (
            self.reason is not None
            and self.state in (State.WAITING, State.PENDING)
            and not self.cancel_requested
        )

    def clear_wait_reason(self) -> None:
        """For a claim: the run awaits no retry any more, even if the claim is interrupted."""
        if not self.cancel_requested:
            self.reason = None

    def clear_crashes(self) -> None:
        self.crash_suspect = 0
        self.crash_count = 0

    def clear_outcome(self) -> None:
        self.reason = None
        self.outcome = None


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
update_runs = over(
    f"UPDATE runs SET {_SET} FROM",
    len(_CHANGES) + 1,
    "WHERE runs.id = column1",
)


def outcome_columns(row: RunRow) -> tuple[bytes | None, str | None, bytes | None, int | None]:
    """`result`, `codec`, `error`, `unclaimed_entries`."""
    match row.outcome:
        case Completed(value, codec, unclaimed_entries):
            return value, codec, None, unclaimed_entries
        case Failed(error):
            return None, None, error, None
        case _:
            return None, None, None, None


def run_changes(row: RunRow) -> Values:
    result, codec, error, unclaimed_entries = outcome_columns(row)
    crc = None if row.outcome is None else checksum(row.id, result, codec, error)
    return (
        row.id, int(row.state), row.due_at, row.started_at, row.finished_at, row.token,
        row.blocked, row.crash_suspect, row.crash_count, row.cancel_requested, row.reason,
        result, codec, error, unclaimed_entries, crc,
    )  # fmt: skip


def _ends(state: State, *columns: str) -> BulkStatement:
    """Running runs that ended with an outcome, in this state.

    The rows exist, so that each is found and changed in one pass, where UPDATE … FROM makes two.
    The table's other columns must have a value all the same.
    """
    constants: dict[str, int | str] = {
        "state": int(state), "flow": "", "subscription": "", "created_at": 0, "due_at": 0,
        "token": 0, "blocked": 0, "priority": 0, "depth": 0, "crash_suspect": 0, "crash_count": 0,
        "cancel_requested": 0, "size": 0, "crc": 0,
    }  # fmt: skip
    return insert(
        "runs",
        ("id", "finished_at", "outcome_crc", *columns),
        "ON CONFLICT (id) DO UPDATE SET state = excluded.state, finished_at = excluded.finished_at,"
        " result = excluded.result, codec = excluded.codec, error = excluded.error,"
        " unclaimed_entries = excluded.unclaimed_entries, outcome_crc = excluded.outcome_crc,"
        " reason = NULL",
        constants,
    )


end_completed_runs = _ends(State.COMPLETED, "result", "codec", "unclaimed_entries")
end_failed_runs = _ends(State.FAILED, "error")


def completed_rows(ended: Sequence[tuple[RunRow, Completed]]) -> list[Values]:
    return [
        (
            row.id,
            row.finished_at,
            crc32(_pack((row.id, end.value, end.codec, None))),
            end.value,
            end.codec,
            end.unclaimed_entries,
        )
        for row, end in ended
    ]


def failed_rows(ended: Sequence[tuple[RunRow, Failed]]) -> list[Values]:
    return [
        (row.id, row.finished_at, checksum(row.id, None, None, end.error), end.error)
        for row, end in ended
    ]


insert_run_events = insert("run_events", ("run", "event"), "ON CONFLICT DO NOTHING")
grow_runs = over(
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


known_windows = over(
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

known_patterns = over(
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
delete_patterns = over("DELETE FROM patterns WHERE (subscription, key) IN (SELECT * FROM", 2, ")")
insert_pattern_events = insert(
    "pattern_events",
    ("event", "subscription", "key", "size"),
    "ON CONFLICT (event, subscription) DO UPDATE SET key = excluded.key, size = excluded.size,"
    " expired = NULL",
)
delete_pattern_events = over(
    "DELETE FROM pattern_events WHERE (event, subscription) IN (SELECT * FROM", 2, ")"
)
expire_pattern_events = over(
    "UPDATE pattern_events SET expired = column3 FROM",
    3,
    "WHERE pattern_events.event = column1 AND pattern_events.subscription = column2",
)

unblock_heads = over(
    "UPDATE runs SET blocked = 0 WHERE id IN (SELECT (SELECT min(id) FROM runs"
    " WHERE flow = column1 AND ordering_key = column2 AND blocked = 1"
    " AND ordering_key IS NOT NULL AND state < 4) FROM",
    2,
    "WHERE NOT EXISTS (SELECT 1 FROM runs"
    " WHERE flow = column1 AND ordering_key = column2 AND blocked = 0"
    " AND ordering_key IS NOT NULL AND state < 4))",
)
"""Each ordering key has exactly one live run that is not blocked, its head: where there is none,
the oldest live run becomes it.
"""

known_children = over(
    "SELECT json_group_array(json_array(parent, parent_call_key)) FROM",
    2,
    "v CROSS JOIN runs r ON r.parent = v.column1 AND r.parent_call_key = v.column2",
)

# --------------------------------------------------------------------------- journal

_ENTRY_COLUMNS = (
    "run", "call_key", "attempt", "kind", "batch", "position", "at", "crc", "codec", "fingerprint",
    "value", "after", "waited", "took",
)  # fmt: skip
insert_entries = insert("journal", (*_ENTRY_COLUMNS, "due_at", "error"))
insert_values = insert("journal", _ENTRY_COLUMNS)
"""Entries that have no due time and no error."""


def entry_rows(entries: Sequence[tuple[int, Entry]]) -> list[Values]:
    """Rows of entries, each with its run."""
    return [
        (*row, e.due_at, e.error) for (_, e), row in zip(entries, value_rows(entries), strict=True)
    ]


def value_rows(entries: Sequence[tuple[int, Entry]]) -> list[Values]:
    return [
        (
            run,
            e.call_key,
            e.attempt,
            int(e.kind),
            e.batch,
            e.position,
            e.at,
            entry_crc(run, e),
            e.codec,
            e.fingerprint,
            e.value,
            e.after,
            e.waited,
            e.took,
        )
        for run, e in entries
    ]


def entry_crc(run: int, e: Entry) -> int:
    """Over the run and the fields of `Entry` in their order, but for `at`. The times are part of it
    where there are any: earlier versions recorded none.
    """
    content = (run, *astuple(e)[: _WITHOUT_TIMES if e.took is None else _WITH_TIMES])
    return crc32(_pack(content))


_WITHOUT_TIMES = Entry.__struct_fields__.index("after")
_WITH_TIMES = Entry.__struct_fields__.index("at")


known_entries = over(
    "SELECT count(*) FROM",
    4,
    "v CROSS JOIN journal j ON j.run = v.column1 AND j.call_key = v.column2"
    " AND j.attempt = v.column3 AND j.kind = v.column4",
)
finals = over(
    "SELECT json_group_array(json_array(run, call_key)) FROM",
    2,
    "v CROSS JOIN journal j ON j.run = v.column1 AND j.call_key = v.column2 AND j.kind IN (0, 1)",
)
"""Calls that have an end, VALUE or ERROR: a later answer is ignored."""

later_entries = over(
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
delete_cursors = over("DELETE FROM cursors WHERE (trigger, key) IN (SELECT * FROM", 2, ")")
