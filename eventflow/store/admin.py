"""The verbs of administration: retry, cancel, redrive, replay, pausing a trigger; and recovery when
the store opens.

Each runs in a transaction of its own, in the writer's thread; sqlite.py calls them. A state changes
by `RunRows.move` here as in apply.py, so that the sum of P9 and the order of each ordering key hold
whoever asks.
"""

from collections.abc import Callable, Sequence

import msgspec
import orjson

from eventflow.core.errors import (
    NotFound,
    RunCancelled,
    RunDead,
    RunError,
    StoreCorrupt,
    UsageError,
)
from eventflow.core.secrets import KNOWN_SECRETS
from eventflow.events.event import Receipt
from eventflow.runs.journal import CANCEL_KEY, RESTARTED_NOTE, Entry, Kind, restart_entry
from eventflow.runs.run import MAX_CRASHES, Run, State, format_id
from eventflow.serialization.errors import encode_error
from eventflow.store import rows
from eventflow.store.apply import deliver, drop_journal
from eventflow.store.late_runs import note_retry
from eventflow.store.patterns import make_due
from eventflow.store.protocol import Arrival
from eventflow.store.rerun import end_wait, live_child, rerun
from eventflow.store.retries import (
    RETRYABLE,
    answer_parent,
    children,
    clear_execution,
    record_cancel,
    retry_with_values,
)
from eventflow.store.rows import BY_A_PERSON, BY_ITS_PARENTS_CANCEL, RunRow
from eventflow.store.transaction import Transaction

_RETRY_HINT = (
    "only a failed, cancelled, paused, held or dead run can be retried, or one that waits for its "
    "next attempt; --from CALL (API: from) repeats a run that has ended, as a new run"
)


# --------------------------------------------------------------------------- retry


def retry(tx: Transaction, run: int, *, discard_journal: bool) -> Callable[[], Run]:
    """Makes the run PENDING, due now. Returns how to read it once its rows are written."""
    row = tx.runs.need(run)
    if row.state is State.WAITING and not discard_journal:
        end_wait(tx, row)
        return lambda: _load_run(tx, row)
    if row.state not in RETRYABLE:
        child = live_child(tx, row)
        also = f", with its child run {child} (eventflow show {child})" if child else ""
        raise UsageError(f"run {format_id(run)} is {row.state.label}{also}; {_RETRY_HINT}")
    _make_pending(tx, row, discard_journal=discard_journal)
    return lambda: _load_run(tx, row)


def _load_run(tx: Transaction, row: RunRow) -> Run:
    for run in tx.runs.load([row]):
        return run
    raise StoreCorrupt(row.reason or "")


def retry_from(tx: Transaction, run: int, call: str, new: int) -> Callable[[], Run]:
    """A new run of this id on the run's event, from a call on (rerun.py)."""
    read = rerun(tx, run, call, new)
    made = read()
    assert made.event is not None
    arrival = Arrival(
        id=made.event,
        trigger="",
        key=b"",
        digest=b"",
        event_id="",
        source="",
        type="",
        body=made.payload or b"",
        verdicts=orjson.dumps([[made.subscription, "run", new]]),
        received_at=tx.commit.at,
        counts={"pending": 1},
        runs=[made],
    )
    _add_to_event(tx, made.event, arrival, None)
    return read


def _make_pending(tx: Transaction, row: RunRow, *, discard_journal: bool) -> None:
    if not discard_journal:
        retry_with_values(tx, row)
        return
    if not row.state.is_live:
        note_retry(tx, row.id)
    _discard_journal(tx, row.id)
    clear_execution(row)
    tx.runs.wake(row)


def _discard_journal(tx: Transaction, run: int) -> None:
    """Deletes the journal and cancels the child runs that it started.

    What the run emits and starts from now on is new.
    """
    for child, *_ in children(tx, run):
        cancel(tx, child, "its parent was retried from scratch")
    (restarts,) = tx.connection.execute(
        "SELECT max(attempt) FROM journal WHERE run = ? AND call_key = ?", (run, RESTARTED_NOTE)
    ).fetchone()
    drop_journal(tx, run)
    tx.journal.add(run, [restart_entry((restarts or 0) + 1)])


# --------------------------------------------------------------------------- cancel


def cancel(
    tx: Transaction,
    run: int,
    reason: str,
    *,
    by: int = BY_A_PERSON,
    answers_parent: bool = True,
) -> State:
    """Asks a run that has begun to end, and cancels any other at once; its children likewise.
    Returns the state that it was in.

    A run that has begun may clean up, also when it sleeps: then it is woken with the cancel in its
    journal. It gets no answer of a child that is cancelled with it: its own cancel comes first, and
    would otherwise be recorded behind the errors that are its consequences. One that was asked
    before and does not run is cancelled at once: perhaps nothing can execute it. `by`: as in
    `RunRow.cancel_requested`; it does not replace a person's cancel.
    """
    row = tx.runs.need(run)
    before = row.state
    reason = KNOWN_SECRETS.remove_from(reason)
    is_asked = before is State.RUNNING or _may_clean_up(row)
    if before.is_live and row.cancel_requested != BY_A_PERSON and (is_asked or by != BY_A_PERSON):
        row.cancel_requested = by
    if is_asked:
        row.reason = reason
        if before is State.RUNNING:
            tx.runs.change(row)
            tx.commit.cancels[run] = reason
        else:
            entry = Entry(call_key=CANCEL_KEY, kind=Kind.CANCEL, value=orjson.dumps(reason))
            tx.journal.add(run, [entry])
            tx.runs.wake(row)
    elif before.is_live:
        row.reason = reason
        tx.runs.move(row, State.CANCELLED)
        if answers_parent:
            notify_parent(tx, row, RunCancelled(reason))
    if before.is_live:
        for child, *_ in children(tx, run):
            cancel(tx, child, reason, by=BY_ITS_PARENTS_CANCEL, answers_parent=not is_asked)
    return before


def cancel_call(tx: Transaction, child: int, reason: str, caller_token: int) -> State:
    """`cancel` for a flow that gave up its call of a child; `caller_token` is that of the flow's
    claim. Does nothing if that execution has ended and the next one makes the call again: the flow,
    or a flow above it, has retries, or a person retried one of them.
    """
    row = tx.runs.need(child)
    parent = None if row.parent is None else tx.runs.get(row.parent)
    if (
        parent is not None
        and parent.state.is_live
        and row.parent_call_key is not None
        and (parent.awaits_retry or parent.token != caller_token)
    ):
        return row.state
    return cancel(tx, child, reason, by=caller_token + 1)


def _may_clean_up(row: RunRow) -> bool:
    """Whether the run does not run now, but has begun and can go on."""
    return (
        row.state in (State.PENDING, State.WAITING)
        and (row.started_at is not None or row.awaits_retry)
        and not row.blocked
        and not row.cancel_requested
    )


def notify_parent(tx: Transaction, row: RunRow, error: RunError) -> None:
    """A run ended without a worker: the parent gets an ERROR of its call."""
    if row.parent is None or row.parent_call_key is None:
        return
    tx.journal.load_finals([(row.parent, row.parent_call_key)])
    answer_parent(
        tx,
        row,
        Entry(call_key=row.parent_call_key, kind=Kind.ERROR, attempt=1, error=encode_error(error)),
    )


# --------------------------------------------------------------------------- redrive, replay

_EVENT = """SELECT key, digest, trigger, event_id, verdicts, headers, body, kept
    FROM events WHERE id = ?"""


def redrive(tx: Transaction, dead_letter: int, arrival: Arrival) -> Receipt:
    """Delivers a dead letter again, once: its delivery leaves the sum of P9, and the new arrival's
    deliveries are added.
    """
    found = tx.connection.execute(
        "SELECT event, redriven_at FROM dead_letters WHERE id = ?", (dead_letter,)
    ).fetchone()
    if found is None:
        raise NotFound("dead letter", str(dead_letter))
    event, redriven_at = found
    if redriven_at is not None:
        raise UsageError(
            f"dead letter {dead_letter} was redriven already; "
            f"replay its event {format_id(event)} to run it once more"
        )
    tx.commit.count("dead", -1)
    tx.commit.count("accepted", -1)
    tx.connection.execute(
        "UPDATE dead_letters SET redriven_at = ? WHERE id = ?", (tx.commit.at, dead_letter)
    )
    return _add_to_event(tx, event, arrival, dead_letter)


def replay(tx: Transaction, event: int, arrival: Arrival) -> Receipt:
    """Delivers a recorded event again."""
    return _add_to_event(tx, event, arrival, None)


def _add_to_event(
    tx: Transaction, event: int, arrival: Arrival, dead_letter: int | None
) -> Receipt:
    """New runs on a recorded event.

    A redrive may bring a corrected body: the runs get it, the dead letter keeps the first.
    """
    found = tx.connection.execute(_EVENT, (event,)).fetchone()
    if found is None:
        raise NotFound("event", format_id(event))
    key, digest, trigger, event_id, verdicts, headers, body, kept = found
    if not kept:
        raise UsageError(
            f"event {format_id(event)} is past its retention: its body is gone; "
            "send it again under a new id"
        )
    if dead_letter is not None and body != arrival.body:
        tx.connection.execute("UPDATE dead_letters SET body = ? WHERE id = ?", (body, dead_letter))
        body = arrival.body
    if arrival.batch_policies:
        tx.windows.load([arrival])
        arrival = tx.windows.assign(arrival, event, is_replay=True)
    if arrival.pattern_events:
        tx.patterns.load([arrival])
        arrival = tx.patterns.advance(arrival, event, is_replay=True)
    verdicts = orjson.dumps([*orjson.loads(verdicts), *orjson.loads(arrival.verdicts)])
    crc = rows.event_crc(event, key, digest, trigger, event_id, verdicts, headers, body)
    tx.connection.execute(
        "UPDATE events SET verdicts = ?, body = ?, crc = ?, matched = matched + ? WHERE id = ?",
        (verdicts, body, crc, len(arrival.runs), event),
    )
    deliver(tx, [msgspec.structs.replace(arrival, id=event, body=body)])
    return Receipt(event, event_id, matched=len(arrival.runs))


# --------------------------------------------------------------------------- pause, resume


def set_paused(tx: Transaction, trigger: str, paused: bool) -> None:
    """Pauses a trigger, or resumes it and its paused runs."""
    if paused:
        tx.connection.execute(
            "INSERT OR IGNORE INTO paused_triggers (trigger, at) VALUES (?, ?)",
            (trigger, tx.commit.at),
        )
    else:
        tx.connection.execute("DELETE FROM paused_triggers WHERE trigger = ?", (trigger,))
        released = tx.connection.execute(_RELEASE, (trigger,)).rowcount
        tx.commit.has_due |= released > 0


_RELEASE = """UPDATE runs SET state = 0, due_at = 0 WHERE id IN (
        SELECT id FROM runs INDEXED BY runs_live WHERE state < 4 AND blocked = 0 AND state = -1
        UNION ALL
        SELECT id FROM runs INDEXED BY runs_ordering
        WHERE ordering_key IS NOT NULL AND state < 4 AND blocked = 1)
    AND state = -1
    AND EXISTS (SELECT 1 FROM events e WHERE e.id = runs.event AND e.trigger = ?)"""
"""Makes the paused runs of a trigger PENDING.

Both states count as pending in P9's sum and the order of an ordering key stays, so no other column
changes.
"""


# --------------------------------------------------------------------------- at start

_IN_FLIGHT = "state < 4 AND blocked = 0 AND state = 1"


def recover(tx: Transaction, time_driven: Sequence[str] | None) -> None:
    """Begins a new epoch.

    Runs that an older one left RUNNING become PENDING and crash suspects; those that crashed
    `MAX_CRASHES` times become DEAD. `time_driven`: the app's patterns that time alone may make
    match; None without an app.
    """
    tx.connection.execute("UPDATE ledger SET epoch = epoch + 1")
    if time_driven is not None:
        make_due(tx.connection, time_driven)
    cancelled = tx.connection.execute(
        f"SELECT id FROM runs WHERE {_IN_FLIGHT} AND cancel_requested <> 0"
    ).fetchall()
    for (ident,) in cancelled:
        record_cancel(tx, tx.runs.need(ident))
    crashed = tx.connection.execute(
        f"SELECT id FROM runs WHERE {_IN_FLIGHT} AND crash_count >= ?", (MAX_CRASHES,)
    ).fetchall()
    tx.connection.execute(
        f"UPDATE runs SET state = 0, due_at = 0, crash_suspect = 1 WHERE {_IN_FLIGHT}"
    )
    for (ident,) in crashed:
        row = tx.runs.need(ident)
        row.reason = (
            f"the process crashed {row.crash_count} times during an attempt of this run; fix the "
            "cause, then retry the run"
        )
        tx.runs.move(row, State.DEAD)
        notify_parent(tx, row, RunDead(row.reason))
