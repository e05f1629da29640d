"""The verbs a person asks for: retry, cancel, redrive, replay, hold; and what the store asks of itself at start: recover.

Each runs in a transaction of its own, in the writer's thread; sqlite.py calls them. A state moves by `Transaction.move` here as
in ops.py, so the sum of P9 and the lanes hold whoever asks.
"""

from collections.abc import Callable

import msgspec
import orjson

from eventflow.core.errors import NotFound, StoreCorrupt, UsageError
from eventflow.events.event import Receipt
from eventflow.runs.journal import RESTARTED, RUNNING_TIME, TIMEOUT, Entry, Kind, restart_entry
from eventflow.runs.run import MAX_CRASHES, Run, State, format_id
from eventflow.store import rows
from eventflow.store.apply import answer, deliver, drop_journal
from eventflow.store.late_runs import note_retry
from eventflow.store.load import load_journal
from eventflow.store.patterns import arm, know_patterns, weave
from eventflow.store.protocol import Arrival
from eventflow.store.rows import RunRow
from eventflow.store.transaction import Transaction
from eventflow.store.windows import gathered, know_windows

RETRYABLE = (State.FAILED, State.CANCELLED, State.PAUSED, State.HELD, State.DEAD)


# --------------------------------------------------------------------------- retry


def retry(tx: Transaction, run: int, *, fresh: bool) -> Callable[[], Run]:
    row = tx.need(run)
    if row.state not in RETRYABLE:
        raise UsageError(
            f"run {format_id(run)} is {row.state.label}; only a failed, cancelled, paused, held or dead run can be retried"
        )
    _make_pending(tx, row, fresh=fresh)
    return lambda: _load_run(tx, row)


def _load_run(tx: Transaction, row: RunRow) -> Run:
    for run in tx.load([row]):
        return run
    raise StoreCorrupt(row.reason or "")


def _make_pending(tx: Transaction, row: RunRow, *, fresh: bool) -> None:
    """PENDING, due now. Children whose error the flow is to ask for again are retried with it: their answer must come anew."""
    if not row.state.live:
        note_retry(tx, row.id)
    forgiven = _forget(tx, row.id) if fresh else _clear_errors(tx, row.id)
    row.crash_count = row.crash_suspect = row.cancel_requested = 0
    row.started_at = None  # a person gives it another life: its timeout counts anew
    row.reason = row.result = row.codec = row.error = row.unclaimed_entries = None
    tx.wake(row)
    for child, call_key, state in _children(tx, row.id):
        if call_key in forgiven and State(state) in RETRYABLE:
            _make_pending(tx, tx.need(child), fresh=fresh)
        elif call_key in forgiven and State(state) is State.COMPLETED:
            _answer_again(tx, tx.need(child))


def _clear_errors(tx: Transaction, run: int) -> set[str]:
    """ERROR entries become FORGIVEN; what ended the old life (its cancel, its timeout) is dropped. Returns the claims."""
    entries = load_journal(tx.connection, run)
    tx.connection.execute(
        "DELETE FROM journal WHERE run = ? AND (kind IN (1, 7) OR call_key IN (?, ?))",
        (run, TIMEOUT, RUNNING_TIME),
    )
    before = {(entry.call_key, entry.attempt) for entry in entries if entry.kind is Kind.CLEARED}
    errors = [entry for entry in entries if entry.kind is Kind.ERROR]
    for entry in errors:
        entry.kind = Kind.CLEARED
    fresh = [entry for entry in errors if (entry.call_key, entry.attempt) not in before]
    rows.insert_entries.run(tx.connection, [rows.entry_row(run, entry) for entry in fresh])
    return {entry.call_key for entry in errors}


def _answer_again(tx: Transaction, child: RunRow) -> None:
    """A child that was retried by hand and completed while its parent still held the old error."""
    result, codec = tx.connection.execute(
        "SELECT result, codec FROM runs WHERE id = ?", (child.id,)
    ).fetchone()
    answer(
        tx,
        child,
        Entry(
            call_key=child.parent_call_key or "", kind=Kind.VALUE, attempt=1, codec=codec, value=result
        ),
    )


def _forget(tx: Transaction, run: int) -> set[str]:
    """Drops the journal and ends what the old life started."""
    for child, _, _ in _children(tx, run):
        cancel(tx, child, "its parent was begun afresh")
    lives = tx.connection.execute(
        "SELECT max(attempt) FROM journal WHERE run = ? AND call_key = ?", (run, RESTARTED)
    ).fetchone()
    drop_journal(tx, run)
    tx.add_entry(
        run, restart_entry((lives[0] or 0) + 1)
    )  # what it emits and starts from here on is new
    return set()


def _children(tx: Transaction, run: int) -> list[tuple[int, str | None, int]]:
    return tx.connection.execute(
        "SELECT id, parent_call_key, state FROM runs WHERE parent = ?", (run,)
    ).fetchall()


# --------------------------------------------------------------------------- cancel


def cancel(tx: Transaction, run: int, reason: str) -> State:
    """Ends a run that is not running, asks one that is; its children likewise."""
    row = tx.need(run)
    before = row.state
    if before is State.RUNNING:
        row.cancel_requested = 1
        row.reason = reason
        tx.change(row)
        tx.cancels.append(run)
    elif before.live:
        row.reason = reason
        tx.move(row, State.CANCELLED)
        notify_parent(tx, row, "RunCancelled", reason)
    if before.live:
        for child, _, _ in _children(tx, run):
            cancel(tx, child, reason)
    return before


def notify_parent(tx: Transaction, row: RunRow, error_type: str, message: str) -> None:
    """The parent hears of an end that no worker settled, as an ERROR of its call."""
    if row.parent is None or row.parent_call_key is None:
        return
    name = (row.parent, row.parent_call_key)
    for text in rows.finals.read(tx.connection, [name]):
        tx.finals.update(rows.decode_pairs(text))
    error = {"type": error_type, "message": message, "args": [message], "traceback": ""}
    answer(
        tx,
        row,
        Entry(call_key=row.parent_call_key, kind=Kind.ERROR, attempt=1, error=orjson.dumps(error)),
    )


# --------------------------------------------------------------------------- redrive, replay


def redrive(tx: Transaction, dead: int, arrival: Arrival) -> Receipt:
    """The dead letter's delivery is tried once more: dead - 1, and whatever the new arrival's tally says."""
    found = tx.connection.execute(
        "SELECT event, redriven_at FROM dead_letters WHERE id = ?", (dead,)
    ).fetchone()
    if found is None:
        raise NotFound("dead letter", str(dead))
    event, redriven_at = found
    if redriven_at is not None:
        raise UsageError(
            f"dead letter {dead} was redriven already; replay its event {format_id(event)} to run it once more"
        )
    tx.count("dead", -1)
    tx.count("accepted", -1)
    tx.connection.execute("UPDATE dead_letters SET redriven_at = ? WHERE id = ?", (tx.at, dead))
    return _add_to_event(tx, event, arrival, dead)


def replay(tx: Transaction, event: int, arrival: Arrival) -> Receipt:
    return _add_to_event(tx, event, arrival, None)


def _add_to_event(tx: Transaction, event: int, arrival: Arrival, dead: int | None) -> Receipt:
    """New runs on a recorded event. A redrive may bring a mended body: the runs need it, the dead letter keeps the first."""
    asked = "SELECT key, digest, trigger, event_id, verdicts, headers, body, kept FROM events WHERE id = ?"
    found = tx.connection.execute(asked, (event,)).fetchone()
    if found is None:
        raise NotFound("event", format_id(event))
    key, digest, trigger, event_id, verdicts, headers, body, kept = found
    if not kept:
        raise UsageError(
            f"event {format_id(event)} is past its retention: its body is gone; send it again under a new id"
        )
    if dead is not None and body != arrival.body:
        tx.connection.execute("UPDATE dead_letters SET body = ? WHERE id = ?", (body, dead))
        body = arrival.body
    if arrival.batch_policies:
        tx.replayed.add(event)
        know_windows(tx, [arrival])
        arrival = gathered(tx, arrival, event)
    if arrival.pattern_events:
        know_patterns(tx, [arrival])
        arrival = weave(tx, arrival, event, known=True)
    told = orjson.dumps([*orjson.loads(verdicts), *orjson.loads(arrival.verdicts)])
    crc = rows.event_crc(event, key, digest, trigger, event_id, told, headers, body)
    tx.connection.execute(
        "UPDATE events SET verdicts = ?, body = ?, crc = ?, matched = matched + ? WHERE id = ?",
        (told, body, crc, len(arrival.runs), event),
    )
    deliver(tx, msgspec.structs.replace(arrival, body=body), event)
    return Receipt(event, event_id, matched=len(arrival.runs))


# --------------------------------------------------------------------------- hold


def set_paused(tx: Transaction, trigger: str, paused: bool) -> None:
    if paused:
        tx.connection.execute(
            "INSERT OR IGNORE INTO paused_triggers (trigger, at) VALUES (?, ?)", (trigger, tx.at)
        )
    else:
        tx.connection.execute("DELETE FROM paused_triggers WHERE trigger = ?", (trigger,))
        tx.more |= tx.connection.execute(_RELEASE, (trigger,)).rowcount > 0


_RELEASE = """UPDATE runs SET state = 0, due_at = 0 WHERE id IN (
        SELECT id FROM runs INDEXED BY runs_live WHERE state < 4 AND blocked = 0 AND state = -1 UNION ALL
        SELECT id FROM runs INDEXED BY runs_ordering WHERE ordering_key IS NOT NULL AND state < 4 AND blocked = 1)
    AND state = -1
    AND EXISTS (SELECT 1 FROM events e WHERE e.id = runs.event AND e.trigger = ?)"""
"""Makes the paused runs of a trigger PENDING. Both states count as pending in P9's sum and a lane keeps its order, so no other
column changes."""


# --------------------------------------------------------------------------- at start


def recover(tx: Transaction) -> None:
    """A new epoch: what an older one left RUNNING is PENDING again and suspect; what died three times is quarantined."""
    tx.connection.execute("UPDATE ledger SET epoch = epoch + 1")
    if tx.herald is not None:
        arm(tx, tx.herald)
    died = [
        ident
        for (ident,) in tx.connection.execute(
            f"SELECT id FROM runs WHERE {_IN_FLIGHT} AND crash_count >= ?", (MAX_CRASHES,)
        )
    ]
    tx.connection.execute(f"UPDATE runs SET state = 0, due_at = 0, crash_suspect = 1 WHERE {_IN_FLIGHT}")
    for ident in died:
        row = tx.need(ident)
        row.reason = f"the process died {row.crash_count} times while this run was starting an attempt; retry it once mended"
        tx.move(row, State.DEAD)
        notify_parent(tx, row, "RunDead", row.reason)


_IN_FLIGHT = "state < 4 AND blocked = 0 AND state = 1"
