"""What each posted op does to a transaction, and what it answers.

The writer calls `prefetch` once per batch and `apply` for each op in the order posted. Nothing here writes: a decision is a row
in the transaction, which `Transaction.flush` writes. Claims come last in a batch; they are in claim.py.
"""

from collections.abc import Iterable, Sequence
from typing import Any, assert_never

from eventflow.events.event import Receipt
from eventflow.runs.journal import Entry, Kind
from eventflow.runs.run import (
    Cancelled,
    Completed,
    Failed,
    NeedsAttention,
    Interrupted,
    Outcome,
    Restarted,
    Run,
    State,
    Suspended,
    format_id,
)
from eventflow.store import rows
from eventflow.store.patterns import know_patterns, weave
from eventflow.store.protocol import (
    Append,
    Appended,
    Arrival,
    RunEnded,
    RunEventSource,
    MarkStarted,
    RecordEvents,
    Fenced,
    Settle,
    Settled,
)  # fmt: skip
from eventflow.store.rows import KnownEvent, RunRow
from eventflow.store.transaction import Transaction
from eventflow.store.windows import gathered, know_windows

WriteOp = RecordEvents | Append | MarkStarted | Settle


def prefetch(tx: Transaction, ops: Sequence[WriteOp], *, probe: bool) -> None:
    """Reads what `apply` will ask for, in one statement each. `probe` also looks for journal entries that already exist."""
    wanted: list[int] = []
    arrivals: list[Arrival] = []
    children: list[Run] = []
    answers: list[tuple[int, str]] = []
    for op in ops:
        if not isinstance(op, RecordEvents):
            wanted.append(op.run)
        if isinstance(op, RecordEvents | Append):
            arrivals.extend(op.arrivals)
        if isinstance(op, Append):
            children.extend(op.children)
        if isinstance(op, Settle) and op.parent is not None and op.answer is not None:
            wanted.append(op.parent)
            answers.append((op.parent, op.answer.call_key))
    know_events(tx, arrivals)
    know_windows(tx, arrivals)
    know_patterns(tx, arrivals)
    tx.fetch(wanted)
    asked = [(run.parent, run.parent_call_key) for run in children]
    for text in rows.known_children.read(tx.connection, asked):
        tx.children.update(rows.decode_pairs(text))
    for text in rows.finals.read(tx.connection, answers):
        tx.finals.update(rows.decode_pairs(text))
    _fetch_later(tx, [op for op in ops if isinstance(op, Settle)])
    tx.probe = probe


def know_events(tx: Transaction, arrivals: Iterable[Arrival]) -> None:
    """Finds which of these events are already in the ledger."""
    for text in rows.known_events.read(
        tx.connection, [(arrival.event_id, arrival.key) for arrival in arrivals]
    ):
        tx.known.update((bytes.fromhex(known.key), known) for known in rows.decode_known(text))


def _fetch_later(tx: Transaction, settles: Iterable[Settle]) -> None:
    """Which suspending runs have entries that their flow has not seen."""
    asked = [
        (op.run, op.outcome.seen_batch, op.outcome.entries)
        for op in settles
        if isinstance(op.outcome, Suspended)
    ]
    for text in rows.later_entries.read(tx.connection, asked):
        tx.appended.update(rows.decode_ids(text))


def apply(tx: Transaction, op: WriteOp) -> Any:
    """Decides one op; returns its reply."""
    match op:
        case RecordEvents():
            return _record(tx, op)
        case Append():
            return _append(tx, op)
        case MarkStarted():
            return _mark(tx, op)
        case Settle():
            return _settle(tx, op)
        case _:
            assert_never(op)


# --------------------------------------------------------------------------- way in


def _record(tx: Transaction, op: RecordEvents) -> list[Receipt]:
    if op.cursor:
        tx.put_cursors(op.trigger, op.cursor)
    return [arrive(tx, arrival) for arrival in op.arrivals]


def arrive(tx: Transaction, arrival: Arrival) -> Receipt:
    """One event: recorded with all that is its, or counted on the first of its identity."""
    first = tx.known.get(arrival.key)
    if first is None and (earlier := tx.arrived.get(arrival.key)) is not None:
        first = KnownEvent(earlier.id, earlier.key.hex(), earlier.digest.hex(), len(earlier.runs))
    if first is not None:
        digests = (first.digest.lower(), arrival.digest.hex())
        conflict = digests[0] != digests[1]
        tx.bump(first.id, conflict=conflict)
        return Receipt(
            first.id, arrival.event_id, duplicate=not conflict, conflict=conflict, matched=first.matched,
            digests=digests if conflict else None,
        )  # fmt: skip
    tx.arrived[arrival.key] = arrival
    if arrival.batch_policies:
        arrival = gathered(tx, arrival, arrival.id)
    if arrival.pattern_events:
        arrival = weave(tx, arrival, arrival.id)
    tx.add_event(rows.event_row(arrival))
    tx.count("events")
    deliver(tx, arrival, arrival.id)
    return Receipt(arrival.id, arrival.event_id, matched=len(arrival.runs))


def record_run_events(tx: Transaction, herald: RunEventSource) -> None:
    """Records the events that tell of the runs which this transaction ends (or holds), and of what did not come, or is late."""
    ended, tx.ended = tx.ended, []
    arrivals, tx.silences = tx.silences, []
    for row in ended:
        if row.state not in herald.wanted_states:
            continue
        told = RunEnded(
            row.id, row.flow, row.state, row.token, row.depth, row.event, row.started_at, tx.at, row.reason, row.result,
            row.codec, row.error,
        )  # fmt: skip
        if (arrival := herald.route_ended(told)) is not None:
            arrivals.append(arrival)
    if arrivals:
        know_events(tx, arrivals)
        know_windows(tx, arrivals)
        know_patterns(tx, arrivals)
        for arrival in arrivals:
            arrive(tx, arrival)
    if tx.silences:
        record_run_events(tx, herald)


def deliver(tx: Transaction, arrival: Arrival, event: int) -> None:
    """The runs, dead letters, letters and tally of an arrival, on the event with this ledger id."""
    for run in arrival.runs:
        if run.id in arrival.matches:
            continue  # weaving.py has seen to it
        run.event = event
        if run.id in arrival.batch_policies:
            tx.open_window(run, arrival.body, arrival.received_at)
        else:
            tx.add_run(run, arrival.body)
    for subscription, reason in arrival.dead_letters:
        tx.add_dead(event, subscription, reason)
    for outlet, subscription in arrival.outbox:
        tx.add_letter(outlet, event, subscription)
    tx.tally(arrival.counts)


# --------------------------------------------------------------------------- way through


def _fenced(tx: Transaction, op: Append | MarkStarted | Settle) -> RunRow | Fenced:
    """The run if this op's token still owns it (P7)."""
    row = tx.row(op.run)
    if row is None:
        return Fenced(f"run {format_id(op.run)} is not in the store")
    if row.state is not State.RUNNING:
        return Fenced(f"run {format_id(op.run)} is {row.state.label}, not running")
    if row.token != op.token:
        return Fenced(
            f"run {format_id(op.run)} was claimed again: its token is {row.token}, this one is {op.token}"
        )
    return row


def _append(tx: Transaction, op: Append) -> Appended | Fenced:
    row = _fenced(tx, op)
    if isinstance(row, Fenced):
        return row
    if tx.probe and _recorded(tx, op):
        return _again(op)
    entries = [tx.add_entry(op.run, entry) for entry in op.entries]
    receipts = [arrive(tx, arrival) for arrival in op.arrivals]
    for child in op.children:
        _start_child(tx, child)
    if op.clears_suspicion and (row.crash_suspect or row.crash_count):
        row.crash_suspect = row.crash_count = 0
        tx.change(row)
    return Appended(tx.batch, tx.at, entries, receipts)


def _recorded(tx: Transaction, op: Append | Settle) -> bool:
    asked = [(op.run, entry.call_key, entry.attempt, int(entry.kind)) for entry in op.entries]
    return len(set(asked)) < len(asked) or any(rows.known_entries.read(tx.connection, asked))


def _again(op: Append | Settle) -> Fenced:
    return Fenced(
        f"run {format_id(op.run)} has an entry of the same call key, attempt and kind already"
    )


def _start_child(tx: Transaction, child: Run) -> None:
    if child.parent is None or child.parent_call_key is None:
        raise ValueError(
            f"child run {format_id(child.id)}: expected a parent and its call key, found none"
        )
    name = (child.parent, child.parent_call_key)
    if name not in tx.children:
        tx.children.add(name)
        tx.add_run(child, None)


def _mark(tx: Transaction, op: MarkStarted) -> Appended | Fenced:
    row = _fenced(tx, op)
    if isinstance(row, Fenced):
        return row
    row.crash_count += 1
    tx.change(row)
    return Appended(tx.batch, tx.at)


def _settle(tx: Transaction, op: Settle) -> Settled | Fenced:
    row = _fenced(tx, op)
    if isinstance(row, Fenced):
        return row
    if op.entries and tx.probe and _recorded(tx, op):
        return _again(op)
    for entry in op.entries:
        tx.add_entry(op.run, entry)
    _end_claim(tx, row, op.outcome)
    taken = (
        answer(tx, row, op.answer) if op.answer is not None and op.parent == row.parent else None
    )
    return Settled(tx.batch, tx.at, taken)


def _end_claim(tx: Transaction, row: RunRow, outcome: Outcome) -> None:
    """The one place where an outcome becomes a state."""
    match outcome:
        case Completed(value, codec, unclaimed_entries):
            row.result, row.codec, row.unclaimed_entries, row.reason = value, codec, unclaimed_entries, None
            tx.move(row, State.COMPLETED)
        case Failed(error):
            row.error, row.reason = error, None
            tx.move(row, State.FAILED)
        case Cancelled(reason):
            row.reason = reason
            tx.move(row, State.CANCELLED)
        case NeedsAttention(reason):
            row.reason = reason
            tx.move(row, State.HELD)
        case Suspended(until):
            if row.cancel_requested or row.id in tx.appended:
                tx.wake(row)
            else:
                tx.sleep(row, until)
        case Interrupted():
            row.crash_suspect = row.crash_count = 0
            tx.wake(row)
        case Restarted(params, first):
            _begin_afresh(tx, row, params)
            tx.add_entry(row.id, first)
        case _:
            assert_never(outcome)


def _begin_afresh(tx: Transaction, row: RunRow, params: bytes) -> None:
    """The same run with other parameters and no past."""
    drop_journal(tx, row.id)
    asked = "SELECT subscription, params FROM runs WHERE id = ?"
    subscription, before = tx.connection.execute(asked, (row.id,)).fetchone()
    grown = len(params) - len(before or b"")
    row.size += grown
    tx.count("pending_bytes", grown)
    crc = rows.run_crc(row.id, row.flow, subscription, row.event, row.ordering_key, params)
    tx.connection.execute(
        "UPDATE runs SET params = ?, crc = ?, size = ? WHERE id = ?",
        (params, crc, row.size, row.id),
    )
    row.crash_suspect = row.crash_count = 0
    row.started_at = None
    tx.wake(row)


def drop_journal(tx: Transaction, run: int) -> None:
    """Drops the journal, also what this batch added to it, and lets go of the children: the new life starts its own."""
    tx.flush()
    tx.connection.execute("DELETE FROM journal WHERE run = ?", (run,))
    tx.disown(run)


def answer(tx: Transaction, child: RunRow, entry: Entry) -> Entry | None:
    """Writes a child's end into its parent's journal and wakes the parent; None when the parent has heard already."""
    if (
        child.parent is None
        or child.parent_call_key != entry.call_key
        or entry.kind not in (Kind.VALUE, Kind.ERROR)
    ):
        return None
    parent = tx.row(child.parent)
    name = (child.parent, entry.call_key)
    if parent is None or name in tx.finals:
        return None
    tx.finals.add(name)
    tx.add_entry(parent.id, entry)
    if parent.state is State.WAITING:
        tx.wake(parent)
    elif parent.state is State.RUNNING:
        tx.answers.append((parent.id, entry))
    return entry
