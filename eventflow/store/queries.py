"""The questions behind the lists and pages, each one read-only function of a connection. Called in a reader's thread.

Newest first; `after` is the last id of the page before. A row whose checksum does not hold is left out of a list and logged;
asked for alone it raises StoreCorrupt. `eventflow doctor` finds them all.
"""

import sqlite3
from collections.abc import Sequence
from typing import Any

import orjson

from eventflow.core.errors import NotFound, StoreCorrupt, UsageError
from eventflow.events.event import Json
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
    "accepted", "completed", "failed", "dead", "cancelled", "suppressed", "pending", "events", "duplicates", "conflicts",
    "runs",
)  # fmt: skip

MAX_SCANNED_EVENTS = 50_000
"""Events that one look for some of the past walks over."""

MAX_INDEXED_RUNS = 50_000
"""Live runs in one state up to which a list of them starts from their index; of more, the newest are soon found by walking."""

_EVENT = (
    "id, key, digest, trigger, event_id, source, type, subject, received_at, matched, kept, duplicates, last_duplicate_at,"
    " conflicts, crc, verdicts, headers, body"
)
_RUN = (
    "id, flow, subscription, event, state, created_at, due_at, started_at, finished_at, token, ordering_key, blocked, priority, parent,"
    " parent_call_key, depth, crash_suspect, crash_count, cancel_requested, unclaimed_entries, codec, reason, crc, outcome_crc, params, result, error,"
    " mode, deliveries"
)
_DEAD = (
    "d.id, d.event, d.subscription, d.reason, d.at, d.redriven_at, e.trigger, e.event_id, e.source, e.type,"
    " coalesce(d.body, e.body) AS body, e.headers FROM dead_letters d JOIN events e ON e.id = d.event"
)

# --------------------------------------------------------------------------- cursors, pauses


def cursor(connection: sqlite3.Connection, trigger: str) -> dict[str, Json]:
    found = connection.execute("SELECT key, value FROM cursors WHERE trigger = ?", (trigger,))
    return {key: orjson.loads(value) for key, value in found}


def paused(connection: sqlite3.Connection) -> set[str]:
    return {trigger for (trigger,) in connection.execute("SELECT trigger FROM paused_triggers")}


def blob_references(connection: sqlite3.Connection) -> set[str]:
    """What is stored beside the ledger: the references under codecs that end in @blob."""
    found = connection.execute(
        "SELECT value FROM journal INDEXED BY journal_blobs WHERE substr(codec, -5) = '@blob'"
        " UNION SELECT result FROM runs INDEXED BY runs_blobs WHERE substr(codec, -5) = '@blob'"
    )
    return {value.decode("ascii") for (value,) in found if value is not None}


# --------------------------------------------------------------------------- events


def events(
    connection: sqlite3.Connection, *, trigger: str | None, type: str | None, since: int | None, until: int | None, limit: int,
    after: int | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Without bodies. The index that grows with the ledger finds the ids, so a rare type costs no reading of bodies."""
    first = (
        None if since is None else max(since, 0) // 1000 << 20
    )  # an id is never older than its event (run.Ids)
    where, values = _where(("trigger = ?", trigger), ("type = ?", type), ("id >= ?", first), ("received_at >= ?", since),
                           ("received_at < ?", until), ("id < ?", after))  # fmt: skip
    ids = f"SELECT id FROM events INDEXED BY events_scan {where} ORDER BY id DESC LIMIT ?"
    found = fetch_dicts(
        connection,
        f"SELECT {_EVENT} FROM events WHERE id IN ({ids}) ORDER BY id DESC",
        (*values, limit),
    )
    return [
        _event_without_body(row) for row in found if _is_event_intact(row) or _log_corrupt("events", row)
    ]


def past(
    connection: sqlite3.Connection, *, triggers: Sequence[str], type: str | None, since: int, until: int, after: int,
    limit: int,
) -> tuple[list[dict[str, Any]], int | None]:  # fmt: skip
    """The next events of these triggers, oldest first, with bodies; and the id to give as `after` for more, if there may be.

    One look walks at most SLICE of the index, so that a rare trigger costs more looks, not a long one.
    """
    first = max(after + 1, since // 1000 << 20)  # an id is never older than its event (run.Ids)
    cut = "SELECT id FROM events INDEXED BY events_scan WHERE id >= ? ORDER BY id LIMIT 1 OFFSET ?"
    (end,) = connection.execute(cut, (first, MAX_SCANNED_EVENTS)).fetchone() or (None,)
    where, values = _where(("id >= ?", first), ("id < ?", end), ("received_at >= ?", since), ("received_at < ?", until),
                           ("type = ?", type), ("trigger IN (SELECT value FROM json_each(?))", orjson.dumps(triggers).decode()),
                           )  # fmt: skip
    ids = f"SELECT id FROM events INDEXED BY events_scan {where} ORDER BY id LIMIT ?"
    found = fetch_dicts(
        connection, f"SELECT {_EVENT} FROM events WHERE id IN ({ids}) ORDER BY id", (*values, limit)
    )
    last = found[-1]["id"] if len(found) == limit else None if end is None else end - 1
    return [
        _decode_event(row) for row in found if _is_event_intact(row) or _log_corrupt("events", row)
    ], last


def event(connection: sqlite3.Connection, ident: str | int) -> dict[str, Any]:
    """With body, headers, its runs, its dead letters, and what is still to be sent of it."""
    number = _event_id(connection, ident)
    found = fetch_dicts(connection, f"SELECT {_EVENT} FROM events WHERE id = ?", (number,))
    if not found:
        raise NotFound("event", str(ident))
    if not _is_event_intact(found[0]):
        raise StoreCorrupt(corrupt("events", number))
    row = _decode_event(found[0])
    row["runs"] = [*runs(connection, event=number, limit=1000), *_joined_runs(connection, number)]
    row["verdicts"] = [_current_verdict(connection, row, said) for said in row["verdicts"]]
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
    """The runs of other events that this one joined."""
    asked = "SELECT run FROM run_events WHERE event = ? ORDER BY run DESC LIMIT 1000"
    return [
        _without(run(connection, ident), "params", "result")
        for (ident,) in connection.execute(asked, (event,))
    ]


def _current_verdict(connection: sqlite3.Connection, row: dict[str, Any], said: list[Any]) -> list[Any]:
    """What has become of an event that waited in a pattern when it was recorded."""
    name, fate, _ = said
    if fate != "waiting":
        return said
    asked = "SELECT expired FROM pattern_events WHERE event = ? AND subscription = ?"
    found = connection.execute(asked, (row["id"], name)).fetchone()
    if found is not None:
        return said if found[0] is None else [name, "expired", found[0]]
    runs = [each["id"] for each in row["runs"] if each["subscription"] == name]
    return [name, "batched", runs[0]] if runs else [name, "matched", "its run is past its retention"]


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
"""Verdicts that an earlier version stored under another name. The stored text is covered by the event's checksum, so it stays."""


def _event_id(connection: sqlite3.Connection, ident: str | int) -> int:
    if isinstance(ident, int):
        return ident
    number = _find_exact(connection, "events", ident)
    if number is not None:
        return number
    begun = "substr(event_id, 1, 16) = substr(?, 1, 16)"  # what the index begins with
    # The + keeps SQLite from writing the id for event_id in `begun` too, after which it would not know the index again.
    asked = f"SELECT id FROM events INDEXED BY events_key WHERE {begun} AND +event_id = ? ORDER BY id DESC LIMIT 2"
    found = [number for (number,) in connection.execute(asked, (ident, ident))]
    return _single(found, ident, "event") if found else _find_by_part(connection, "events", ident, "event")


# --------------------------------------------------------------------------- runs


def runs(
    connection: sqlite3.Connection, *, event: int | None = None, flow: str | None = None, state: State | None = None,
    parent: int | None = None, limit: int = 50, after: int | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Without parameters and results."""
    where, values = _where(("event = ?", event), ("flow = ?", flow), ("state = ?", state), ("parent = ?", parent),
                           ("id < ?", after))  # fmt: skip
    where += _index_condition(state)
    if state is not None and state.live and event is None and parent is None:
        ids, asked = _live_run_ids(flow, state)
        (n,) = connection.execute(f"SELECT count(*) FROM ({ids} LIMIT {MAX_INDEXED_RUNS + 1})", asked).fetchone()
        if n <= MAX_INDEXED_RUNS:
            where, values = f"{where} AND id IN ({ids})", [*values, *asked]
    found = fetch_dicts(
        connection, f"SELECT {_RUN} FROM runs {where} ORDER BY id DESC LIMIT ?", (*values, limit)
    )
    return [
        _without(_decode_run(row), "params", "result")
        for row in found
        if _is_run_intact(row) or _log_corrupt("runs", row)
    ]


def _live_run_ids(flow: str | None, state: State) -> tuple[str, list[Any]]:
    """The ids of a state's live runs, and of those that wait in a lane, whose state is not in their index."""
    which, values = _where(("flow = ?", flow))
    which = which.replace("WHERE", "AND")
    ids = (
        f"SELECT id FROM runs INDEXED BY runs_live WHERE state < 4 AND blocked = 0 AND state = ? {which} UNION ALL"
        f" SELECT id FROM runs INDEXED BY runs_ordering WHERE ordering_key IS NOT NULL AND state < 4 AND blocked = 1 {which}"
    )
    return ids, [int(state), *values, *values]


def _index_condition(state: State | None) -> str:
    """Says again what the partial indexes say, for SQLite matches their conditions word by word."""
    return " AND state > 4" if state is not None and state > State.COMPLETED else ""


def run(connection: sqlite3.Connection, ident: str | int) -> dict[str, Any]:
    number = ident if isinstance(ident, int) else _find_exact(connection, "runs", ident)
    if number is None:
        number = _find_by_part(connection, "runs", str(ident), "run")
    found = fetch_dicts(connection, f"SELECT {_RUN} FROM runs WHERE id = ?", (number,))
    if not found:
        raise NotFound("run", str(ident))
    if not _is_run_intact(found[0]):
        raise StoreCorrupt(corrupt("runs", number))
    row = _decode_run(found[0])
    asked = "SELECT event FROM run_events WHERE run = ? ORDER BY event LIMIT 1000"
    row["joined"] = [event for (event,) in connection.execute(asked, (number,))]
    return row


def _is_run_intact(row: dict[str, Any]) -> bool:
    fine = row["crc"] == rows.run_crc(
        *(row[name] for name in ("id", "flow", "subscription", "event", "ordering_key", "params"))
    )
    outcome = row["outcome_crc"]
    return fine and (
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
    asked = f"SELECT {_DEAD} {where} {'AND' if where else 'WHERE'} d.redriven_at IS NULL ORDER BY d.id DESC LIMIT ?"
    return [_without(row, "body", "headers") for row in fetch_dicts(connection, asked, (*values, limit))]


def dead_letter(connection: sqlite3.Connection, ident: str | int) -> dict[str, Any]:
    number = _parse_number(str(ident))
    found = [] if number is None else fetch_dicts(connection, f"SELECT {_DEAD} WHERE d.id = ?", (number,))
    if not found:
        raise NotFound("dead letter", str(ident))
    return found[0]


# --------------------------------------------------------------------------- asking


def _where(*conditions: tuple[str, Any]) -> tuple[str, list[Any]]:
    given = [(text, value) for text, value in conditions if value is not None]
    return ("WHERE " + " AND ".join(text for text, _ in given) if given else ""), [
        value for _, value in given
    ]


def _log_corrupt(table: str, row: dict[str, Any]) -> bool:
    """False, having said so: the row is there, its content is not what was recorded."""
    log.error("store.row_corrupt", table=table, row=format_id(row["id"]))
    return False


def _without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _find_exact(connection: sqlite3.Connection, table: str, ident: str) -> int | None:
    """A whole id, in base 32 or as a number."""
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
    low, high = parse_id(part.ljust(13, "0")), parse_id(part.ljust(13, "z")) or (1 << 63) - 1
    if len(part) > 12 or not part or parse_id(part.rjust(13, "0")) is None:
        raise NotFound(noun, part)
    found: set[int] = set()
    if low is not None:
        found.update(
            n
            for (n,) in connection.execute(
                f"SELECT id FROM {table} WHERE id BETWEEN ? AND ? LIMIT 2", (low, high)
            )
        )
    if (
        len(found) < 2
    ):  # the end of an id is looked for by walking: over the smaller index, for rows may be long
        tail, bits = parse_id(part.rjust(13, "0")), (1 << 5 * len(part)) - 1
        asked = f"SELECT id FROM {table} INDEXED BY {_SMALL_INDEXES[table]} WHERE id & ? = ? LIMIT 2"
        found.update(n for (n,) in connection.execute(asked, (bits, tail)))
    if not found:
        raise NotFound(noun, part)
    return _single(sorted(found), part, noun)


def _single(found: Sequence[int], ident: str, noun: str) -> int:
    if len(found) > 1:
        raise UsageError(
            f"several {noun}s match {ident!r}: {', '.join(format_id(n) for n in found)}, …; give more letters"
        )
    return found[0]
