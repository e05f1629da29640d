"""Executes a run again with its recorded values: by hand after its end, or automatically by the
`retries=` of its flow.

apply.py and admin.py call these functions in the writer's thread. Values are kept, errors become
CLEARED, and the children whose errors were cleared are executed again too. A run that waits for its
next execution has a reason (`RunRow.awaits_retry`): answers of its children are recorded meanwhile,
and do not wake it.
"""

from collections.abc import Collection, Sequence

import orjson

from eventflow.core.errors import StoreCorrupt
from eventflow.runs.journal import (
    CANCEL_KEY,
    RETRY_NOTE,
    RUNNING_TIME_NOTE,
    TIMEOUT_KEY,
    Entry,
    Kind,
    is_time_limit,
)
from eventflow.runs.run import Retried, State, format_id
from eventflow.store import rows
from eventflow.store.late_runs import note_retry
from eventflow.store.load import load_journal
from eventflow.store.rows import BY_A_PERSON, BY_ITS_PARENTS_CANCEL, RunRow
from eventflow.store.transaction import Transaction

RETRYABLE = (State.FAILED, State.CANCELLED, State.PAUSED, State.HELD, State.DEAD)


# --------------------------------------------------------------------------- retries of a flow


def await_retry(tx: Transaction, row: RunRow, outcome: Retried) -> None:
    """Makes a run whose execution failed wait for `outcome.delay`, and its failed children with it.
    If a cancel was requested meanwhile, the run is due now, with the cancel.
    """
    due_at = outcome.note.due_at = tx.commit.now + outcome.delay
    tx.journal.add(row.id, [outcome.note])
    tx.flush()
    try:
        cleared = _clear_errors(tx, row.id, has_failed=True, kept=_final_calls(tx, row.id))
    except StoreCorrupt as error:
        _hold(tx, row, error)
        return
    if row.cancel_requested:
        row.clear_crashes()
        record_cancel(tx, row)
        tx.runs.wake(row)
    else:
        _make_due(tx, row, due_at, outcome.reason)
    for child, call_key, _, _ in children(tx, row.id):
        if call_key in cleared:
            _retry_with_parent(tx, tx.runs.need(child), due_at)


def _final_calls(tx: Transaction, run: int) -> set[str]:
    """The calls of children that are dead or that a person cancelled: no retry repeats them."""
    return {
        call_key
        for _, call_key, state, cancel_requested in children(tx, run)
        if call_key is not None
        and (
            state == State.DEAD
            or (state == State.CANCELLED and cancel_requested in (0, BY_A_PERSON))
        )
    }


def is_called_again(tx: Transaction, child: RunRow) -> bool:
    """Whether a child that failed or was cancelled is executed again, and gives no answer: the
    execution of its parent that called it has ended, and the next one makes the call again.
    """
    parent = None if child.parent is None else tx.runs.get(child.parent)
    if parent is None or child.parent_call_key is None or not parent.state.is_live:
        return False
    if child.state is not State.CANCELLED:
        has_failed = child.state is State.FAILED and not child.cancel_requested
        return has_failed and parent.awaits_retry
    if child.cancel_requested == BY_ITS_PARENTS_CANCEL:
        return not parent.cancel_requested
    cancelled_in = child.cancel_requested - 1  # the token of a claim of its parent; 0: a person
    return cancelled_in > 0 and (parent.awaits_retry or parent.token != cancelled_in)


def execute_with_parent(tx: Transaction, child: RunRow) -> None:
    """Makes an ended child that `is_called_again` due when its parent is."""
    parent = tx.runs.need(child.parent or 0)
    tx.flush()
    _retry_with_parent(tx, child, parent.due_at if parent.awaits_retry else 0)


def _retry_with_parent(tx: Transaction, child: RunRow, due_at: int) -> None:
    if child.state is State.COMPLETED:
        answer_with_result(tx, child)
    elif child.state in RETRYABLE:
        try:
            parent = format_id(child.parent or 0)
            retry_with_values(tx, child, due_at, f"retried with its parent {parent}")
        except StoreCorrupt as error:  # others share the transaction
            _hold(tx, child, error)


def _hold(tx: Transaction, row: RunRow, error: StoreCorrupt) -> None:
    row.reason = str(error)
    tx.runs.move(row, State.HELD)


# --------------------------------------------------------------------------- any retry


def retry_with_values(
    tx: Transaction, row: RunRow, due_at: int = 0, reason: str | None = None
) -> None:
    """Makes the run due again with its recorded values and without its errors: now, or at `due_at`
    (microseconds), until when it waits for `reason`. So are its children whose errors were cleared,
    because it calls them again. The caller has flushed the transaction's journal entries.
    """
    was_cancelled = row.state is State.CANCELLED
    if not row.state.is_live:
        note_retry(tx, row.id)
    cleared = _clear_errors(tx, row.id, has_failed=row.state is State.FAILED)
    _renew_retries(tx, row, max(due_at, tx.commit.now))
    _make_due(tx, row, due_at, reason)
    for child, call_key, state, _ in children(tx, row.id):
        # A child that was cancelled with its running parent has left no error there.
        was_cancelled_too = was_cancelled and state == State.CANCELLED
        if (call_key in cleared or was_cancelled_too) and state in RETRYABLE:
            retry_with_values(tx, tx.runs.need(child), due_at, reason)
        elif call_key in cleared and state == State.COMPLETED:
            answer_with_result(tx, tx.runs.need(child))


def _make_due(tx: Transaction, row: RunRow, due_at: int, reason: str | None) -> None:
    clear_execution(row)
    row.reason = reason
    if due_at > tx.commit.now:
        tx.runs.sleep(row, due_at)
    else:
        tx.runs.wake(row)


def clear_execution(row: RunRow) -> None:
    """Clears what executions left in the row; the run's timeout counts from its next start."""
    row.clear_crashes()
    row.cancel_requested = 0
    row.started_at = None
    row.clear_outcome()


def _renew_retries(tx: Transaction, row: RunRow, due_at: int) -> None:
    """Gives the run all retries of its flow again. Keeps its last error, if it has used any.

    A run that was held or is dead, and has used none, continues its waits where they were.
    """
    asked = "SELECT max(attempt) FROM journal WHERE run = ? AND call_key = ?"
    (last,) = tx.connection.execute(asked, (row.id, RETRY_NOTE)).fetchone()
    if last is None and row.state not in (State.FAILED, State.CANCELLED):
        return
    note = Entry(call_key=RETRY_NOTE, kind=Kind.NOTE, attempt=(last or 0) + 1, due_at=due_at)
    if last is not None:
        asked = "SELECT error FROM runs WHERE id = ?"
        (note.error,) = tx.connection.execute(asked, (row.id,)).fetchone()
    tx.journal.add(row.id, [note])


def _clear_errors(
    tx: Transaction, run: int, *, has_failed: bool, kept: Collection[str] = ()
) -> set[str]:
    """ERROR entries become CLEARED, except those of the `kept` calls. The entries of a cancel, of
    the run's timeout and of the running time are deleted; if the run `has_failed`, also those of
    `_last_timeouts`. Returns the call keys of the cleared errors.
    """
    entries = load_journal(tx.connection, run)
    errors = [e for e in entries if e.kind is Kind.ERROR and e.call_key not in kept]
    cleared = {entry.call_key for entry in errors}
    if has_failed:
        tx.connection.executemany(
            "DELETE FROM journal WHERE run = ? AND kind = 4 AND call_key = ?",
            [(run, call_key) for call_key in _last_timeouts(entries)],
        )
    tx.connection.execute(
        "DELETE FROM journal WHERE run = ? AND (kind = 7 OR call_key IN (?, ?))",
        (run, TIMEOUT_KEY, RUNNING_TIME_NOTE),
    )
    tx.connection.executemany(
        "DELETE FROM journal WHERE run = ? AND kind = 1 AND call_key = ?",
        [(run, call_key) for call_key in cleared],
    )
    before = {(entry.call_key, entry.attempt) for entry in entries if entry.kind is Kind.CLEARED}
    for entry in errors:
        entry.kind = Kind.CLEARED
    new = [entry for entry in errors if (entry.call_key, entry.attempt) not in before]
    rows.insert_entries.execute(tx.connection, rows.entry_rows([(run, entry) for entry in new]))
    tx.journal.finals.difference_update((run, call_key) for call_key in cleared)
    return cleared


def _last_timeouts(entries: Sequence[Entry]) -> list[str]:
    """The call keys of the blocks' timeouts after which the flow has received no value, so that
    they may have ended the failed attempt.
    """
    received = [entry for entry in entries if entry.kind.is_final and entry.kind is not Kind.ERROR]
    last = max((entry.batch for entry in received), default=0)
    return [
        entry.call_key
        for entry in received
        if entry.batch == last and entry.kind is Kind.TIMER and is_time_limit(entry.call_key)
    ]


def children(tx: Transaction, run: int) -> list[tuple[int, str | None, int, int]]:
    """The child runs of a run, as in the database: id, call key, state, `cancel_requested`."""
    return tx.connection.execute(
        "SELECT id, parent_call_key, state, cancel_requested FROM runs WHERE parent = ?", (run,)
    ).fetchall()


def answer_with_result(tx: Transaction, child: RunRow) -> None:
    """Answers with the result of a child that was retried while its parent had the old error."""
    result, codec = tx.connection.execute(
        "SELECT result, codec FROM runs WHERE id = ?", (child.id,)
    ).fetchone()
    key = child.parent_call_key or ""
    answer_parent(
        tx, child, Entry(call_key=key, kind=Kind.VALUE, attempt=1, codec=codec, value=result)
    )


# --------------------------------------------------------------------------- parents


def record_cancel(tx: Transaction, row: RunRow) -> None:
    """Writes the cancel of a run into its journal, when the claim in which it was cancelled has
    ended: before the consequences, such as the errors of children that were cancelled with it.
    """
    if not _has_cancel(tx, row.id):
        value = orjson.dumps(row.reason or "cancel requested")
        tx.journal.add(row.id, [Entry(call_key=CANCEL_KEY, kind=Kind.CANCEL, value=value)])


def _has_cancel(tx: Transaction, run: int) -> bool:
    tx.flush()
    asked = "SELECT 1 FROM journal WHERE run = ? AND kind = 7"
    return tx.connection.execute(asked, (run,)).fetchone() is not None


def ends_before_its_parents_cancel(tx: Transaction, child: RunRow) -> bool:
    """Whether a child was cancelled with its parent, and has ended before the parent's cancel is
    recorded. That cancel comes first, so the child gives no answer, like one that had not begun.
    """
    if child.state is not State.CANCELLED or child.cancel_requested != BY_ITS_PARENTS_CANCEL:
        return False
    parent = None if child.parent is None else tx.runs.get(child.parent)
    return parent is not None and bool(parent.cancel_requested) and not _has_cancel(tx, parent.id)


def answer_parent(tx: Transaction, child: RunRow, entry: Entry) -> Entry | None:
    """Writes a child's end into its parent's journal and wakes the parent, unless it awaits a
    retry.

    None when the call has an end already.
    """
    if (
        child.parent is None
        or child.parent_call_key != entry.call_key
        or entry.kind not in (Kind.VALUE, Kind.ERROR)
    ):
        return None
    parent = tx.runs.get(child.parent)
    call = (child.parent, entry.call_key)
    if parent is None or call in tx.journal.finals:
        return None
    tx.journal.finals.add(call)
    tx.journal.add(parent.id, [entry])
    if parent.state is State.WAITING and not parent.awaits_retry:
        tx.runs.wake(parent)
    elif parent.state is State.RUNNING:
        tx.commit.answers.append((parent.id, entry))
    return entry
