"""The queries behind lists, pages and the CLI: read-only functions of a connection.

`SqliteStore` runs them in the threads of readers.py. Newest first; `after` is the last id of the
page before. A row whose checksum does not match is left out of a list and logged; a query for that
row alone raises StoreCorrupt. `eventflow doctor` finds all of them.
"""

import sqlite3
from collections.abc import Sequence
from typing import Any

import orjson

from eventflow.core.errors import EventflowError, NotFound, StoreCorrupt, UsageError
from eventflow.events.event import EventOutcome, Json
from eventflow.logs.log import get_logger
from eventflow.runs.run import State, format_id, parse_id
from eventflow.store import rows
from eventflow.store.load import corrupt
from eventflow.store.readers import fetch_dicts

log = get_logger("eventflow.store")
LOG_EVENTS = {
    "store.row_corrupt": (
        "The checksum of a row does not match; the row is left out, everything else continues."
    ),
}

COUNTS = (
    "accepted", "completed", "failed", "dead", "cancelled", "suppressed", "pending",
    "events", "duplicates", "conflicts", "runs",
)  # fmt: skip

MAX_SCANNED_EVENTS = 50_000
"""Of the index, that one query for past events reads."""

MAX_NAMED_EVENTS = 20_000
"""How many of the newest events are searched for a subject, which has no index."""

BRIEF_BYTES = 200
"""Of a run's parameters, in a list."""

MAX_INDEXED_RUNS = 50_000
"""Live runs in one state up to which a list starts from their index. Of more, a scan finds the
newest soon.
"""

_EVENT = (
    "id, key, digest, trigger, event_id, source, type, subject, received_at, matched, kept,"
    " duplicates, last_duplicate_at, conflicts, crc, verdicts, headers, body"
)
_RUN = (
    "id, flow, subscription, event, state, created_at, due_at, started_at, finished_at, token,"
    " ordering_key, blocked, priority, parent, parent_call_key, depth, crash_suspect, crash_count,"
    " cancel_requested, unclaimed_entries, codec, reason, crc, outcome_crc, params, result, error,"
    " mode, deliveries"
)
_DEAD_LETTER = (
    "d.id, d.event, d.subscription, d.reason, d.at, d.redriven_at, e.trigger, e.event_id, e.source,"
    " e.type, coalesce(d.body, e.body) AS body, e.headers"
    " FROM dead_letters d JOIN events e ON e.id = d.event"
)

# --------------------------------------------------------------------------- cursors, pauses


def cursor(connection: sqlite3.Connection, trigger: str) -> dict[str, Json]:
    found = connection.execute("SELECT key, value FROM cursors WHERE trigger = ?", (trigger,))
    return {key: orjson.loads(value) for key, value in found}


def outcomes(connection: sqlite3.Connection, keys: Sequence[bytes]) -> list[EventOutcome | None]:
    """See `Store.outcomes`."""
    return [_outcome(connection, key) for key in keys]


def _outcome(connection: sqlite3.Connection, key: bytes) -> EventOutcome | None:
    found = connection.execute("SELECT id, matched FROM events WHERE key = ?", (key,)).fetchone()
    if found is None:
        return "unknown"
    event, matched = found
    states = [
        state
        for (state,) in connection.execute(
            "SELECT state FROM runs WHERE event = ?1 UNION ALL"
            " SELECT state FROM run_events JOIN runs ON runs.id = run WHERE run_events.event = ?1",
            (event,),
        )
    ]
    query = "SELECT 1 FROM pattern_events WHERE event = ? AND expired IS NULL LIMIT 1"
    if any(State(state).is_live for state in states) or _exists(connection, query, event):
        return None
    query = "SELECT 1 FROM dead_letters WHERE event = ? AND redriven_at IS NULL LIMIT 1"
    if any(state != State.COMPLETED for state in states) or _exists(connection, query, event):
        return "failed"
    return "completed" if len(states) >= matched else "unknown"


def _exists(connection: sqlite3.Connection, query: str, event: int) -> bool:
    return connection.execute(query, (event,)).fetchone() is not None


def paused(connection: sqlite3.Connection) -> set[str]:
    return {trigger for (trigger,) in connection.execute("SELECT trigger FROM paused_triggers")}


def blob_references(connection: sqlite3.Connection) -> set[str]:
    """The references to blobs: values whose codec ends in @blob."""
    found = connection.execute(
        "SELECT value FROM journal INDEXED BY journal_blobs WHERE substr(codec, -5) = '@blob'"
        " UNION SELECT result FROM runs INDEXED BY runs_blobs WHERE substr(codec, -5) = '@blob'"
    )
    return {value.decode("ascii") for (value,) in found if value is not None}


# --------------------------------------------------------------------------- events


def events(
    connection: sqlite3.Connection,
    *,
    trigger: str | None,
    type: str | None,
    since: int | None,
    until: int | None,
    limit: int,
    after: int | None,
) -> list[dict[str, Any]]:
    """Without bodies. The ids come from an index, so a rare type does not read the rows of
    others.
    """
    where, values = _where(
        ("trigger = ?", trigger),
        ("type = ?", type),
        ("id >= ?", None if since is None else _first_id(since)),
        ("received_at >= ?", since),
        ("received_at < ?", until),
        ("id < ?", after),
    )
    ids = f"SELECT id FROM events INDEXED BY events_scan {where} ORDER BY id DESC LIMIT ?"
    found = fetch_dicts(
        connection,
        f"SELECT {_EVENT} FROM events WHERE id IN ({ids}) ORDER BY id DESC",
        (*values, limit),
    )
    return [
        _event_without_body(row)
        for row in found
        if _is_event_intact(row) or _log_corrupt("events", row)
    ]


def past(
    connection: sqlite3.Connection,
    *,
    triggers: Sequence[str],
    type: str | None,
    since: int,
    until: int,
    after: int,
    limit: int,
) -> tuple[list[dict[str, Any]], int | None]:
    """The next events of these triggers, oldest first, with bodies; and the `after` of the next
    page, None at the end.

    One query reads at most MAX_SCANNED_EVENTS of the index: a rare trigger takes more queries, not
    a longer one.
    """
    first = max(after + 1, _first_id(since))
    cut = "SELECT id FROM events INDEXED BY events_scan WHERE id >= ? ORDER BY id LIMIT 1 OFFSET ?"
    (end,) = connection.execute(cut, (first, MAX_SCANNED_EVENTS)).fetchone() or (None,)
    where, values = _where(
        ("id >= ?", first),
        ("id < ?", end),
        ("received_at >= ?", since),
        ("received_at < ?", until),
        ("type = ?", type),
        ("trigger IN (SELECT value FROM json_each(?))", orjson.dumps(triggers).decode()),
    )
    ids = f"SELECT id FROM events INDEXED BY events_scan {where} ORDER BY id LIMIT ?"
    found = fetch_dicts(
        connection, f"SELECT {_EVENT} FROM events WHERE id IN ({ids}) ORDER BY id", (*values, limit)
    )
    last = found[-1]["id"] if len(found) == limit else None if end is None else end - 1
    return [
        _decode_event(row) for row in found if _is_event_intact(row) or _log_corrupt("events", row)
    ], last


def _first_id(since: int) -> int:
    """The smallest id of an event received at `since`: an id is never older than its event
    (run.Ids).
    """
    return max(since, 0) // 1000 << 20


def event(connection: sqlite3.Connection, ident: str | int) -> dict[str, Any]:
    """With body, headers, its runs, its dead letters and its messages in the outbox."""
    number = _event_id(connection, ident)
    found = fetch_dicts(connection, f"SELECT {_EVENT} FROM events WHERE id = ?", (number,))
    if not found:
        raise NotFound("event", str(ident))
    if not _is_event_intact(found[0]):
        raise StoreCorrupt(corrupt("events", number))
    row = _decode_event(found[0])
    row["runs"] = [*runs(connection, event=number, limit=1000), *_joined_runs(connection, number)]
    row["verdicts"] = [_current_verdict(connection, row, stored) for stored in row["verdicts"]]
    row["dead"] = fetch_dicts(
        connection,
        "SELECT id, subscription, reason, at, redriven_at FROM dead_letters WHERE event = ?",
        (number,),
    )
    row["outbox"] = fetch_dicts(
        connection,
        "SELECT sink, subscription, at FROM outbox WHERE event = ? ORDER BY id",
        (number,),
    )
    return row


def _joined_runs(connection: sqlite3.Connection, event: int) -> list[dict[str, Any]]:
    """The runs of other events that this event is part of."""
    query = "SELECT run FROM run_events WHERE event = ? ORDER BY run DESC LIMIT 1000"
    return [
        _without(run(connection, ident), "params", "result")
        for (ident,) in connection.execute(query, (event,))
    ]


def _current_verdict(
    connection: sqlite3.Connection, row: dict[str, Any], stored: list[Any]
) -> list[Any]:
    """The verdict now: an event that was recorded as waiting in a pattern may have expired or
    matched.
    """
    name, outcome, _ = stored
    if outcome != "waiting":
        return stored
    query = "SELECT expired FROM pattern_events WHERE event = ? AND subscription = ?"
    found = connection.execute(query, (row["id"], name)).fetchone()
    if found is not None:
        return stored if found[0] is None else [name, "expired", found[0]]
    runs = [run["id"] for run in row["runs"] if run["subscription"] == name]
    return (
        [name, "batched", runs[0]] if runs else [name, "matched", "its run is past its retention"]
    )


def _is_event_intact(row: dict[str, Any]) -> bool:
    names = ("id", "key", "digest", "trigger", "event_id", "verdicts", "headers", "body")
    return row["crc"] is None or row["crc"] == rows.event_crc(*(row[name] for name in names))


def _event_without_body(row: dict[str, Any]) -> dict[str, Any]:
    row = _decode_event(row)
    del row["body"], row["headers"]
    return row


def _decode_event(row: dict[str, Any]) -> dict[str, Any]:
    del row["crc"], row["key"], row["digest"]
    row["kept"] = bool(row["kept"])
    row["verdicts"] = [
        [name, _RENAMED_VERDICTS.get(outcome, outcome), detail]
        for name, outcome, detail in orjson.loads(row["verdicts"])
    ]
    return row


_RENAMED_VERDICTS = {"held": "paused", "joined": "batched", "lapsed": "expired", "waits": "waiting"}
"""Verdicts that an earlier version stored under another name; the checksum of the event covers the
stored text.
"""


def _event_id(connection: sqlite3.Connection, ident: str | int) -> int:
    if isinstance(ident, int):
        return ident
    number = _find_exact(connection, "events", ident)
    if number is not None:
        return number
    # The index has the first 16 characters. The + keeps SQLite from replacing event_id by the
    # constant
    # in the first condition too, which then would not match the index. Of several rows of one
    # identity, the first one is the event: the others are dead letters of other content.
    query = """
        SELECT coalesce(min(iif(type <> 'eventflow.undecodable', id, NULL)), min(id)) AS first
        FROM events INDEXED BY events_key
        WHERE substr(event_id, 1, 16) = substr(?, 1, 16) AND +event_id = ?
        GROUP BY "trigger", source ORDER BY first DESC LIMIT 2
    """
    found = [number for (number,) in connection.execute(query, (ident, ident))]
    if not found:
        found = _find_by_subject(connection, ident)
    if found:
        return _single(found, ident, "event")
    return _find_by_part(connection, "events", ident, "event")


def _find_by_subject(connection: sqlite3.Connection, name: str) -> list[int]:
    """The newest events whose subject, or its last part as a path, is `name`; at most four."""
    query = f"""
        SELECT id FROM (SELECT id, subject FROM events ORDER BY id DESC LIMIT {MAX_NAMED_EVENTS})
        WHERE subject = ?1 OR substr(subject, -length(?1) - 1) = '/' || ?1
        ORDER BY id DESC LIMIT 4
    """
    return [number for (number,) in connection.execute(query, (name,))]


# --------------------------------------------------------------------------- runs


def runs(
    connection: sqlite3.Connection,
    *,
    event: int | None = None,
    flow: str | None = None,
    state: State | None = None,
    parent: int | None = None,
    limit: int = 50,
    after: int | None = None,
) -> list[dict[str, Any]]:
    """Without parameters and results."""
    where, values = _where(
        ("event = ?", event),
        ("flow = ?", flow),
        ("state = ?", state),
        ("parent = ?", parent),
        ("id < ?", after),
    )
    where += _index_condition(state)
    if state is not None and state.is_live and event is None and parent is None:
        ids, id_values = _live_run_ids(flow, state)
        count = f"SELECT count(*) FROM ({ids} LIMIT {MAX_INDEXED_RUNS + 1})"
        if connection.execute(count, id_values).fetchone()[0] <= MAX_INDEXED_RUNS:
            where += f" AND id IN ({ids})"
            values += id_values
    found = fetch_dicts(
        connection, f"SELECT {_RUN} FROM runs {where} ORDER BY id DESC LIMIT ?", (*values, limit)
    )
    _add_about(connection, found)
    return [
        _without(_decode_run(row), "params", "result")
        for row in found
        if _is_run_intact(row) or _log_corrupt("runs", row)
    ]


def _add_about(connection: sqlite3.Connection, found: list[dict[str, Any]]) -> None:
    """Adds to rows of runs what tells them apart: `subject`, `event_id` and `event_type` of their
    event, and `brief`, the beginning of their parameters.
    """
    idents = {row["event"] for row in found if row["event"] is not None}
    query = (
        "SELECT id, event_id, type, subject FROM events"
        " WHERE id IN (SELECT value FROM json_each(?))"
    )
    asked = connection.execute(query, (orjson.dumps(list(idents)).decode(),)) if idents else ()
    events = {ident: rest for ident, *rest in asked}
    for row in found:
        event = events.get(row["event"], (None, None, None))
        row["event_id"], row["event_type"], row["subject"] = event
        row["brief"] = None if row["params"] is None else row["params"][:BRIEF_BYTES]


def queue_heads(connection: sqlite3.Connection, flows: Sequence[str]) -> dict[str, int]:
    """By flow, since when its first pending run is due (microseconds); flows without one are left
    out.
    """
    query = """
        SELECT max(due_at, created_at) FROM runs INDEXED BY runs_live
        WHERE state < 4 AND blocked = 0 AND state = 0 AND flow = ?
        ORDER BY priority DESC, due_at, id LIMIT 1
    """
    heads = {flow: connection.execute(query, (flow,)).fetchone() for flow in flows}
    return {flow: head[0] for flow, head in heads.items() if head is not None}


def _live_run_ids(flow: str | None, state: State) -> tuple[str, list[Any]]:
    """The ids of live runs in a state, and of all runs blocked by their ordering key, whose index
    has no state.
    """
    condition, values = _where(("flow = ?", flow))
    condition = condition.replace("WHERE", "AND")
    ids = f"""
        SELECT id FROM runs INDEXED BY runs_live
        WHERE state < 4 AND blocked = 0 AND state = ? {condition}
        UNION ALL
        SELECT id FROM runs INDEXED BY runs_ordering
        WHERE ordering_key IS NOT NULL AND state < 4 AND blocked = 1 {condition}
    """
    return ids, [int(state), *values, *values]


def _index_condition(state: State | None) -> str:
    """The condition of the partial indexes, repeated because SQLite compares it literally."""
    return " AND state > 4" if state is not None and state > State.COMPLETED else ""


def run(connection: sqlite3.Connection, ident: str | int) -> dict[str, Any]:
    number = ident if isinstance(ident, int) else _find_exact(connection, "runs", ident)
    if number is None:
        try:
            number = _find_by_part(connection, "runs", str(ident), "run")
        except NotFound:
            raise _no_run(connection, str(ident)) from None
    found = fetch_dicts(connection, f"SELECT {_RUN} FROM runs WHERE id = ?", (number,))
    if not found:
        raise NotFound("run", str(ident))
    if not _is_run_intact(found[0]):
        raise StoreCorrupt(corrupt("runs", number))
    _add_about(connection, found)
    row = _decode_run(found[0])
    query = "SELECT event FROM run_events WHERE run = ? ORDER BY event LIMIT 1000"
    row["joined"] = [event for (event,) in connection.execute(query, (number,))]
    return row


def _no_run(connection: sqlite3.Connection, ident: str) -> NotFound:
    """With the runs that the event of this id started, if there is one."""
    try:
        event = _event_id(connection, ident)
    except EventflowError:
        return NotFound("run", ident)
    started = [format_id(row["id"]) for row in runs(connection, event=event, limit=3)]
    what = f"its runs: {', '.join(started)}" if started else "it started no run of its own"
    return NotFound(
        "run", ident, f"it names an event; {what}; `eventflow explain {ident}` shows all"
    )


def _is_run_intact(row: dict[str, Any]) -> bool:
    is_intact = row["crc"] == rows.run_crc(
        *(row[name] for name in ("id", "flow", "subscription", "event", "ordering_key", "params"))
    )
    outcome = row["outcome_crc"]
    return is_intact and (
        outcome is None
        or outcome == rows.checksum(*(row[name] for name in ("id", "result", "codec", "error")))
    )


def _decode_run(row: dict[str, Any]) -> dict[str, Any]:
    del row["crc"], row["outcome_crc"]
    row["state"] = State(row["state"]).label
    row["due_at"] = None if row["due_at"] == rows.NEVER else row["due_at"] or row["created_at"]
    for name in ("blocked", "crash_suspect", "cancel_requested"):
        row[name] = bool(row[name])
    return row


# --------------------------------------------------------------------------- dead letters


def dead(connection: sqlite3.Connection, *, limit: int, after: int | None) -> list[dict[str, Any]]:
    """Open ones, without bodies."""
    where, values = _where(("d.id < ?", after))
    query = f"""
        SELECT {_DEAD_LETTER} {where} {"AND" if where else "WHERE"} d.redriven_at IS NULL
        ORDER BY d.id DESC LIMIT ?
    """
    found = fetch_dicts(connection, query, (*values, limit))
    return [_without(row, "body", "headers") for row in found]


def dead_letter(connection: sqlite3.Connection, ident: str | int) -> dict[str, Any]:
    number = _parse_number(str(ident))
    query = f"SELECT {_DEAD_LETTER} WHERE d.id = ?"
    found = [] if number is None else fetch_dicts(connection, query, (number,))
    if not found:
        raise NotFound("dead letter", str(ident))
    return found[0]


# --------------------------------------------------------------------------- conditions and ids


def _where(*conditions: tuple[str, Any]) -> tuple[str, list[Any]]:
    given = [(text, value) for text, value in conditions if value is not None]
    return ("WHERE " + " AND ".join(text for text, _ in given) if given else ""), [
        value for _, value in given
    ]


def _log_corrupt(table: str, row: dict[str, Any]) -> bool:
    """False, for a filter: log a row whose content is not what was recorded."""
    log.error("store.row_corrupt", table=table, row=format_id(row["id"]))
    return False


def _without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _find_exact(connection: sqlite3.Connection, table: str, ident: str) -> int | None:
    """A complete id, in base 32 or as a number."""
    for number in (parse_id(ident), _parse_number(ident)):
        known = f"SELECT 1 FROM {table} WHERE id = ?"
        if number is not None and connection.execute(known, (number,)).fetchone():
            return number
    return None


def _parse_number(text: str) -> int | None:
    """A whole number that SQLite can hold."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None
    return None if number is None or number >= 1 << 63 else number


_SMALL_INDEXES = {"events": "events_scan", "runs": "runs_flow"}


def _find_by_part(connection: sqlite3.Connection, table: str, part: str, noun: str) -> int:
    """The one id that begins or ends with these letters."""
    low = parse_id(part.ljust(13, "0"))
    high = parse_id(part.ljust(13, "z")) or (1 << 63) - 1
    tail = parse_id(part.rjust(13, "0"))
    if len(part) > 12 or not part or tail is None:
        raise NotFound(noun, part)
    found: set[int] = set()
    if low is not None:
        query = f"SELECT id FROM {table} WHERE id BETWEEN ? AND ? LIMIT 2"
        found.update(number for (number,) in connection.execute(query, (low, high)))
    if len(found) < 2:
        # The end of an id takes a scan: over the smallest index, because rows may be long.
        index = _SMALL_INDEXES[table]
        query = f"SELECT id FROM {table} INDEXED BY {index} WHERE id & ? = ? LIMIT 2"
        mask = (1 << 5 * len(part)) - 1
        found.update(number for (number,) in connection.execute(query, (mask, tail)))
    if not found:
        raise NotFound(noun, part)
    return _single(sorted(found), part, noun)


def _single(found: Sequence[int], ident: str, noun: str) -> int:
    if len(found) > 1:
        ids = ", ".join(map(format_id, found))
        raise UsageError(
            f"several {noun}s match {ident!r}: {ids}, …; give one of these ids, or more letters"
        )
    return found[0]
