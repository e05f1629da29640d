"""What each queued operation decides in a transaction, and its reply.

`Writer` calls `prefetch` once per batch and `apply` for each operation in the order posted. Events
are inserted by `prefetch`, so that the ledger itself tells which are new; a decision is a row in a
table of the transaction, which `Transaction.flush` writes.
Claims come last in a batch; they are in claim.py. Admin verbs (admin.py) use `deliver` too.
"""

from collections.abc import Sequence
from typing import Any, assert_never, cast

import orjson

from eventflow.core.errors import value_or_none
from eventflow.core.hashing import digest
from eventflow.core.secrets import KNOWN_SECRETS
from eventflow.events.event import Receipt
from eventflow.runs.journal import Kind
from eventflow.runs.run import (
    Cancelled,
    Completed,
    Failed,
    Interrupted,
    NeedsAttention,
    Outcome,
    Restarted,
    Retried,
    Run,
    State,
    Suspended,
    format_id,
)
from eventflow.store import rows
from eventflow.store.protocol import (
    Append,
    Appended,
    Arrival,
    Fenced,
    MarkStarted,
    RecordEvents,
    RunEnded,
    RunEventSource,
    Settle,
    Settled,
    WriteOp,
)
from eventflow.store.retries import (
    answer_parent,
    await_retry,
    ends_before_its_parents_cancel,
    execute_with_parent,
    is_called_again,
    record_cancel,
)
from eventflow.store.rows import KnownEvent, RunRow
from eventflow.store.tables import COMPLETED, RUNNING
from eventflow.store.transaction import Transaction


class ServeAlone(Exception):
    """An operation is refused whose events are inserted already: the transaction is undone, and
    each of its operations gets one of its own.
    """


def prefetch(tx: Transaction, ops: Sequence[WriteOp], *, must_probe: bool) -> None:
    """Inserts the events of all operations, and reads what `apply` needs, in one statement each.

    An `Append` alone in its transaction inserts its events itself, once it is not refused.
    `must_probe`: journal entries may be recorded already; look for them.
    """
    runs: list[int] = []
    arrivals: list[Arrival] = []
    children: list[Run] = []
    answers: list[tuple[int, str]] = []
    suspensions: list[tuple[int, int, int]] = []
    tx.is_shared = len(ops) > 1
    for op in ops:
        if isinstance(op, Settle):
            runs.append(op.run)
            if op.parent is not None and op.answer is not None:
                runs.append(op.parent)
                answers.append((op.parent, op.answer.call_key))
            if isinstance(op.outcome, Suspended):
                suspensions.append((op.run, op.outcome.seen_batch, op.outcome.entries))
        elif isinstance(op, RecordEvents):
            arrivals.extend(op.arrivals)
        elif isinstance(op, Append):
            runs.append(op.run)
            children.extend(op.children)
            if tx.is_shared:
                arrivals.extend(op.arrivals)
        else:
            runs.append(op.run)
    if arrivals:
        load_arrivals(tx, arrivals)
    if runs:
        tx.runs.fetch(runs)
    if children:
        tx.journal.load_children(children)
    if answers:
        tx.journal.load_finals(answers)
    if suspensions:
        tx.journal.load_unseen(suspensions)
    tx.journal.must_probe = must_probe


def load_arrivals(tx: Transaction, arrivals: Sequence[Arrival]) -> None:
    """Inserts these events and reads what `record_arrival` needs of them."""
    tx.events.insert(arrivals)
    if batched := [arrival for arrival in arrivals if arrival.batch_policies]:
        tx.windows.load(batched)
    if wanted := [arrival for arrival in arrivals if arrival.pattern_events]:
        tx.patterns.load(wanted)


def apply(tx: Transaction, op: WriteOp) -> Any:
    """Decides one operation; returns its reply."""
    match op:
        case Settle():
            return _settle(tx, op)
        case RecordEvents():
            return _record(tx, op)
        case Append():
            return _append(tx, op)
        case MarkStarted():
            return _mark_started(tx, op)
        case _:
            assert_never(op)


# --------------------------------------------------------------------------- events


def _record(tx: Transaction, op: RecordEvents) -> list[Receipt]:
    if op.cursor:
        tx.events.put_cursors(op.trigger, op.cursor)
    receipts = [record_arrival(tx, arrival) for arrival in op.arrivals]
    if op.route_conflict is not None:
        conflicts = [
            op.route_conflict(arrival, receipt)
            for arrival, receipt in zip(op.arrivals, receipts, strict=True)
            if receipt.conflict
        ]
        if conflicts:
            load_arrivals(tx, conflicts)
            for arrival in conflicts:
                record_arrival(tx, arrival)
    return receipts


def record_arrival(tx: Transaction, arrival: Arrival) -> Receipt:
    """Records an event with its verdicts, runs and dead letters, or counts it as a duplicate of the
    first of its identity.
    """
    if (first := tx.events.firsts.get(arrival.id)) is not None:
        return _count_duplicate(tx, arrival, first)
    verdicts = None
    if arrival.batch_policies or arrival.pattern_events:
        arrival = _join_others(tx, arrival)
        verdicts = arrival.verdicts
    deliver(tx, arrival, arrival.id)
    return Receipt(arrival.id, arrival.event_id, False, False, len(arrival.runs), None, verdicts)


def _count_duplicate(tx: Transaction, arrival: Arrival, first: KnownEvent) -> Receipt:
    digests = (first.digest.lower(), arrival.digest.hex())
    conflict = digests[0] != digests[1] and digests[0] != _digest_in_written_order(arrival)
    tx.events.count_duplicate(first.id, conflict=conflict)
    return Receipt(
        first.id,
        arrival.event_id,
        duplicate=not conflict,
        conflict=conflict,
        matched=first.matched,
        digests=digests if conflict else None,
    )


def _join_others(tx: Transaction, arrival: Arrival) -> Arrival:
    """The event joins the windows and patterns that are open: with the runs and verdicts that this
    leads to.
    """
    decided = arrival
    if arrival.batch_policies:
        decided = tx.windows.assign(decided, arrival.id)
    if arrival.pattern_events:
        decided = tx.patterns.advance(decided, arrival.id)
    if decided.verdicts != arrival.verdicts or len(decided.runs) != len(arrival.runs):
        tx.events.decide(decided)
    return decided


def _digest_in_written_order(arrival: Arrival) -> str | None:
    """The digest of an event's data as an earlier version made it: keys in the order in which they
    were written.
    """
    fields = value_or_none(orjson.loads, arrival.body or b"null")
    if not isinstance(fields, dict):
        return None
    data = cast(dict[str, Any], fields).get("data")
    return digest(arrival.type.encode(), orjson.dumps(data), size=8).hex()


def deliver(tx: Transaction, arrival: Arrival, event: int) -> None:
    """Adds the runs, dead letters, outbox messages and counts of an arrival, for the event with
    this ledger id.
    """
    for run in arrival.runs:
        if run.id in arrival.matches:
            continue  # added by Patterns.advance
        run.event = event
        if run.id in arrival.batch_policies:
            tx.windows.open(run, arrival.body, arrival.received_at)
        else:
            tx.runs.add(run, arrival.body)
    for subscription, reason in arrival.dead_letters:
        tx.events.add_dead_letter(event, subscription, reason)
    for sink, subscription in arrival.outbox:
        tx.events.add_message(sink, event, subscription)
    tx.commit.add_deliveries(arrival.counts)


def record_run_events(tx: Transaction, source: RunEventSource) -> None:
    """Records the events of the runs that this transaction ends (or holds), and the events that the
    ledger itself makes.
    """
    ended = tx.runs.ended
    tx.runs.ended = []
    arrivals = tx.commit.own_events
    tx.commit.own_events = []
    wanted = source.wanted_states
    for row in ended:
        if row.state not in wanted:
            continue
        run = RunEnded(
            run=row.id,
            flow=row.flow,
            state=row.state,
            token=row.token,
            depth=row.depth,
            event=row.event,
            started_at=row.started_at,
            at=tx.commit.at,
            reason=row.reason,
            result=row.result,
            codec=row.codec,
            error=row.error,
        )
        if (arrival := source.route_ended(run)) is not None:
            arrivals.append(arrival)
    if arrivals:
        load_arrivals(tx, arrivals)
        for arrival in arrivals:
            record_arrival(tx, arrival)
    if tx.commit.own_events:
        record_run_events(tx, source)


# --------------------------------------------------------------------------- runs


def _owned(tx: Transaction, op: Append | MarkStarted | Settle) -> RunRow | Fenced:
    """The run, if the operation's token still owns it (P7)."""
    row = tx.runs.get(op.run)
    if row is not None and row.state is RUNNING and row.token == op.token:
        return row
    return Fenced(_why_fenced(op, row))


def _why_fenced(op: Append | MarkStarted | Settle, row: RunRow | None) -> str:
    if row is None:
        return f"run {format_id(op.run)} is not in the store"
    if row.state is not RUNNING:
        return f"run {format_id(op.run)} is {row.state.label}, not running"
    return (
        f"run {format_id(op.run)} was claimed again: its token is {row.token}, "
        f"this one is {op.token}"
    )


def _recorded_already(op: Append | Settle) -> Fenced:
    return Fenced(
        f"run {format_id(op.run)} has an entry of the same call key, attempt and kind already"
    )


def _append(tx: Transaction, op: Append) -> Appended | Fenced:
    row = _owned(tx, op)
    if isinstance(row, Fenced):
        if op.arrivals and tx.is_shared:
            raise ServeAlone
        return row
    if tx.journal.must_probe and tx.journal.has_any(op.run, op.entries):
        return _recorded_already(op)
    if op.arrivals and not tx.is_shared:
        load_arrivals(tx, op.arrivals)
    entries = [tx.journal.add(op.run, entry) for entry in op.entries]
    receipts = [record_arrival(tx, arrival) for arrival in op.arrivals]
    for child in op.children:
        _start_child(tx, child)
    if op.clears_suspicion and (row.crash_suspect or row.crash_count):
        row.clear_crashes()
        tx.runs.change(row)
    return Appended(tx.commit.batch, tx.commit.at, entries, receipts)


def _start_child(tx: Transaction, child: Run) -> None:
    if child.parent is None or child.parent_call_key is None:
        raise ValueError(
            f"child run {format_id(child.id)}: expected a parent and its call key, found none"
        )
    call = (child.parent, child.parent_call_key)
    if call not in tx.journal.children:
        tx.journal.children.add(call)
        tx.runs.add(child, None)


def _mark_started(tx: Transaction, op: MarkStarted) -> Appended | Fenced:
    row = _owned(tx, op)
    if isinstance(row, Fenced):
        return row
    row.crash_count += 1
    tx.runs.change(row)
    return Appended(tx.commit.batch, tx.commit.at)


def _settle(tx: Transaction, op: Settle) -> Settled | Fenced:
    row = _owned(tx, op)
    if isinstance(row, Fenced):
        return row
    if op.entries and tx.journal.must_probe and tx.journal.has_any(op.run, op.entries):
        return _recorded_already(op)
    for entry in op.entries:
        tx.journal.add(op.run, entry)
    _end_claim(tx, row, op.outcome)
    if op.answer is None or op.parent != row.parent:
        return tx.settled
    if op.answer.kind is Kind.ERROR:
        if is_called_again(tx, row):
            execute_with_parent(tx, row)
            return tx.settled
        if ends_before_its_parents_cancel(tx, row):
            return tx.settled
    return Settled(tx.commit.batch, tx.commit.at, answer_parent(tx, row, op.answer))


def _end_claim(tx: Transaction, row: RunRow, outcome: Outcome) -> None:
    """The one place where an outcome becomes a state."""
    match outcome:
        case Completed(value, codec, unclaimed_entries):
            row.result = value
            row.codec = codec
            row.unclaimed_entries = unclaimed_entries
            row.reason = None
            tx.runs.move(row, COMPLETED)
        case Failed(error):
            row.error = error
            row.reason = None
            tx.runs.move(row, State.FAILED)
        case Cancelled(reason):
            row.reason = KNOWN_SECRETS.remove_from(reason)
            tx.runs.move(row, State.CANCELLED)
        case NeedsAttention(reason):
            row.reason = KNOWN_SECRETS.remove_from(reason)
            tx.runs.move(row, State.HELD)
        case Suspended(until):
            if row.cancel_requested:
                record_cancel(tx, row)
                tx.runs.wake(row)
            elif row.id in tx.journal.unseen:
                tx.runs.wake(row)
            else:
                row.reason = None
                tx.runs.sleep(row, until)
        case Retried():
            await_retry(tx, row, outcome)
        case Interrupted():
            row.clear_crashes()
            if row.cancel_requested:
                record_cancel(tx, row)
            tx.runs.wake(row)
        case Restarted(params, first):
            _restart(tx, row, params)
            tx.journal.add(row.id, first)
        case _:
            assert_never(outcome)


def _restart(tx: Transaction, row: RunRow, params: bytes) -> None:
    """The same run with other parameters, an empty journal and no start time."""
    drop_journal(tx, row.id)
    subscription, before = tx.connection.execute(
        "SELECT subscription, params FROM runs WHERE id = ?", (row.id,)
    ).fetchone()
    grown = len(params) - len(before or b"")
    row.size += grown
    tx.commit.count("pending_bytes", grown)
    crc = rows.run_crc(row.id, row.flow, subscription, row.event, row.ordering_key, params)
    tx.connection.execute(
        "UPDATE runs SET params = ?, crc = ?, size = ? WHERE id = ?",
        (params, crc, row.size, row.id),
    )
    row.clear_crashes()
    row.started_at = None
    tx.runs.wake(row)


def drop_journal(tx: Transaction, run: int) -> None:
    """Deletes the run's journal, also what this batch added to it, and releases its children: the
    run starts new ones.
    """
    tx.flush()
    tx.connection.execute("DELETE FROM journal WHERE run = ?", (run,))
    tx.journal.forget_calls(run)
    tx.runs.release_children(run)
