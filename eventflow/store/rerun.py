"""What `eventflow retry RUN` does for a run that did not fail: it ends the wait for a next attempt,
or repeats an ended run from a call.

admin.py and sqlite.py call these functions in a separate transaction, in the writer's thread.
"""

from collections.abc import Callable, Sequence

import msgspec
import orjson

from eventflow.core.errors import StoreCorrupt, UsageError
from eventflow.runs.journal import (
    RERUN_NOTE,
    RESTARTED_NOTE,
    RETRY_NOTE,
    STARTED_NOTE,
    Entry,
    Kind,
    rerun_entry,
)
from eventflow.runs.run import Run, State, format_id
from eventflow.store import rows
from eventflow.store.load import load_journal, load_runs
from eventflow.store.retries import children
from eventflow.store.rows import NEVER, RunRow
from eventflow.store.transaction import Transaction

MAX_NAMED_CALLS = 10
"""Calls that an error lists."""


# --------------------------------------------------------------------------- end a wait


def end_wait(tx: Transaction, row: RunRow) -> None:
    """Makes a WAITING run's next attempts due now, and the run PENDING.

    Only waits for retries end, not sleeps or waits for a child run. If the run awaits a retry of
    its flow, it is due now, and so are those of its children that await one. Raises UsageError,
    which names the wait, if nothing in the run waits for a retry.
    """
    if row.awaits_retry:
        entries = load_journal(tx.connection, row.id)
        _make_due(tx, row, [entry for entry in entries if entry.call_key == RETRY_NOTE][-1:])
        tx.runs.wake(row)
        for child, *_ in children(tx, row.id):
            found = tx.runs.need(child)
            if found.state is State.WAITING and found.awaits_retry:
                end_wait(tx, found)
        return
    waiting = _waiting_attempts(load_journal(tx.connection, row.id))
    if not waiting:
        raise UsageError(f"run {format_id(row.id)} is waiting {_what_for(tx, row)}")
    _make_due(tx, row, waiting)
    tx.runs.wake(row)


def _make_due(tx: Transaction, row: RunRow, entries: Sequence[Entry]) -> None:
    """Sets the due time of these entries to now."""
    for entry in entries:
        entry.due_at = tx.commit.now
        tx.connection.execute(
            "UPDATE journal SET due_at = ?, crc = ?"
            " WHERE run = ? AND call_key = ? AND attempt = ? AND kind = ?",
            (
                entry.due_at,
                rows.entry_crc(row.id, entry),
                row.id,
                entry.call_key,
                entry.attempt,
                int(entry.kind),
            ),
        )


def _waiting_attempts(entries: Sequence[Entry]) -> list[Entry]:
    """Of each call without an end, the last failed attempt, if another one is due after it."""
    last: dict[str, Entry] = {}
    for entry in entries:
        known = last.get(entry.call_key)
        if known is None or known.attempt <= entry.attempt:
            last[entry.call_key] = entry
    return [
        entry for entry in last.values() if entry.kind is Kind.FAILED and entry.due_at is not None
    ]


def _what_for(tx: Transaction, row: RunRow) -> str:
    """Why a run without a waiting retry cannot start now."""
    if (child := live_child(tx, row)) is not None:
        return f"for its child run {child}, not for a retry; eventflow show {child}"
    if row.due_at == NEVER:
        return "and nothing of it waits for a retry; eventflow cancel ends it"
    return (
        "until its flow's own sleep or timeout is over, not for a retry; sleeps are not cut short"
    )


def live_child(tx: Transaction, row: RunRow) -> str | None:
    """The id of the run's first child that has not ended."""
    found = tx.connection.execute(
        "SELECT id FROM runs WHERE parent = ? AND state < 4 ORDER BY id LIMIT 1", (row.id,)
    ).fetchone()
    return None if found is None else format_id(found[0])


# --------------------------------------------------------------------------- repeat from a call


def rerun(tx: Transaction, run: int, call: str, new: int) -> Callable[[], Run]:
    """A new run, of this id, with the parameters and event of a run that has ended, and with what
    it recorded before `call`: a call key, or the name of a task that was called once.

    The new run executes `call` and what the flow calls after it. The old run stays as it is: a
    recorded value is never computed again in its run, and the new run's events, child runs and
    idempotency keys have new names.
    """
    row = tx.runs.need(run)
    name = format_id(run)
    if row.state.is_live:
        raise UsageError(
            f"run {name} is {row.state.label}; only a run that has ended can be repeated from a "
            "call"
        )
    if row.parent is not None:
        parent = format_id(row.parent)
        raise UsageError(
            f"run {name} is a child of run {parent}; repeat the parent: "
            f"eventflow retry {parent} --from {row.parent_call_key or 'CALL'}"
        )
    ((old, corrupt),) = load_runs(tx.connection, [run])
    if corrupt:
        raise StoreCorrupt(corrupt)
    if old.mode is not None or old.event is None:
        raise UsageError(
            f"run {name} has the events of a delivery window ({old.mode}); only a run of one event "
            "can be repeated from a call"
        )
    entries = load_journal(tx.connection, run)
    kept = entries_before(entries, find_call(entries, call, name))
    made = msgspec.structs.replace(
        old,
        id=new,
        state=State.PENDING,
        created_at=tx.commit.at,
        due_at=0,
        started_at=None,
        token=1,  # as if claimed before: its journal is read
        crash_suspect=False,
        crash_count=0,
        cancel_requested=False,
        cancel_reason=None,
    )
    seed = next((_seed(each) for each in entries if each.call_key == RERUN_NOTE), name)
    rows.insert_entries.execute(tx.connection, rows.entry_rows([(new, entry) for entry in kept]))
    note = Entry(call_key=RETRY_NOTE, kind=Kind.NOTE, attempt=1, due_at=tx.commit.now)
    tx.journal.add(new, [rerun_entry(name, call, seed), note])
    return lambda: made


def _seed(note: Entry) -> str:
    return str(orjson.loads(note.value or b"{}")["seed"])


def find_call(entries: Sequence[Entry], call: str, run: str) -> str:
    """The call key of `call`. UsageError, with the recorded calls, unless exactly one fits."""
    keys = list(
        dict.fromkeys(entry.call_key for entry in entries if not entry.call_key.startswith("@"))
    )
    if call in keys:
        return call
    found = [key for key in keys if _task_name(key) == call]
    if len(found) == 1:
        return found[0]
    shown = ", ".join((found or keys)[:MAX_NAMED_CALLS]) or "none"
    more = ", …" if len(found or keys) > MAX_NAMED_CALLS else ""
    what = f"{len(found)} calls of {call!r}" if found else f"no call {call!r}"
    raise UsageError(f"run {run} recorded {what}; say which call: {shown}{more}")


def _task_name(key: str) -> str:
    return key.partition("[")[0].rpartition("/")[2].partition("#")[0]


def entries_before(entries: Sequence[Entry], call: str) -> list[Entry]:
    """The entries that the flow received before the end of `call`, and the values of calls that it
    had made by then.

    The flow receives whole commits, in order. A call that was made before the flow received the
    commit with the end of `call` cannot depend on it, even if it ended later: its value is kept. Of
    entries that do not say after which commit they were called, those of earlier commits are kept.
    Errors are kept only if the flow had received them, since it continued because of them.
    """
    ends = [entry.batch for entry in entries if entry.call_key == call and entry.kind.is_final]
    first = min(entry.batch for entry in entries if entry.call_key == call)
    end = min(ends, default=None)
    kept = [
        entry
        for entry in entries
        if entry.call_key != call and _is_before(entry, first if end is None else end, end is None)
    ]
    answered = {entry.call_key for entry in kept if entry.kind is not Kind.CHILD}
    return [each for each in kept if each.kind is not Kind.CHILD or each.call_key in answered]


def _is_before(entry: Entry, batch: int, never_ended: bool) -> bool:
    match entry.kind:
        case Kind.NOTE:
            return entry.call_key in (STARTED_NOTE, RESTARTED_NOTE)
        case Kind.CHILD:
            return True
        case Kind.VALUE | Kind.TIMER | Kind.EMIT:
            return (
                never_ended
                or entry.batch < batch
                or (entry.after is not None and entry.after < batch)
            )
        case Kind.ERROR:
            return entry.batch < batch
        case _:
            return False
