"""What the queued operations decide in a transaction, and their replies.

`Writer` calls `apply` once per batch, with its operations in the order posted. Events are inserted
first, so that the ledger itself shows which are new; a decision is a row in a table of the
transaction, which `Transaction.flush` writes. Operations of one type are decided as a list: plain
events in `record_arrivals`, the ends of runs in `_settle`. Claims come last in a batch; they are in
claim.py. Admin verbs (admin.py) use `deliver` too.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, groupby, islice
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
from eventflow.store.tables import COMPLETED, FAILED, RUNNING
from eventflow.store.transaction import Transaction


class ServeAlone(Exception):
    """An operation is refused whose events are inserted already: the transaction is undone, and
    each of its operations gets one of its own.
    """


def apply(tx: Transaction, ops: Sequence[WriteOp], *, must_probe: bool) -> list[Any]:
    """Decides these operations, in their order; returns their replies.

    `must_probe`: journal entries may be recorded already; look for them.
    """
    tx.is_shared = len(ops) > 1
    tx.journal.must_probe = must_probe
    groups = [(kind, list(group)) for kind, group in groupby(ops, type)]
    _prefetch(tx, groups)
    replies: list[Any] = []
    for kind, group in groups:
        replies += _DECIDE[kind](tx, group)
    return replies


def _prefetch(tx: Transaction, groups: Sequence[tuple[type, Sequence[Any]]]) -> None:
    """Inserts the events of all operations, and reads what their decisions need, in one statement
    each.

    An `Append` alone in its transaction inserts its events itself, once it is not refused.
    """
    runs: list[int] = []
    arrivals: list[Arrival] = []
    children: list[Run] = []
    answers: list[tuple[int, str]] = []
    suspensions: list[tuple[int, int, int]] = []
    for kind, group in groups:
        if kind is not RecordEvents:
            runs += [op.run for op in group]
        if kind is RecordEvents or (kind is Append and tx.is_shared):
            for op in group:
                arrivals += op.arrivals
        if kind is Append:
            for op in group:
                children += op.children
        elif kind is Settle:
            _note_reads(group, answers, suspensions)
    runs += [parent for parent, _ in answers]
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


def _note_reads(
    ops: Sequence[Settle],
    answers: list[tuple[int, str]],
    suspensions: list[tuple[int, int, int]],
) -> None:
    """Adds the calls of parents that these operations answer, and what suspended runs have seen."""
    for op in ops:
        if op.answer is not None and op.parent is not None:
            answers.append((op.parent, op.answer.call_key))
        if type(op.outcome) is Suspended:
            suspensions.append((op.run, op.outcome.seen_batch, op.outcome.entries))


def load_arrivals(tx: Transaction, arrivals: Sequence[Arrival]) -> None:
    """Inserts these events and reads what `record_arrivals` needs of them."""
    tx.events.insert(arrivals)
    if joining := [each for each in arrivals if each.batch_policies or each.pattern_events]:
        tx.events.are_plain = False
        if batched := [each for each in joining if each.batch_policies]:
            tx.windows.load(batched)
        if wanted := [each for each in joining if each.pattern_events]:
            tx.patterns.load(wanted)


# --------------------------------------------------------------------------- events


def _record(tx: Transaction, op: RecordEvents) -> list[Receipt]:
    if op.cursor:
        tx.events.put_cursors(op.trigger, op.cursor)
    receipts = record_arrivals(tx, op.arrivals)
    if op.route_conflict is not None:
        conflicts = [
            op.route_conflict(arrival, receipt)
            for arrival, receipt in zip(op.arrivals, receipts, strict=True)
            if receipt.conflict
        ]
        if conflicts:
            load_arrivals(tx, conflicts)
            record_arrivals(tx, conflicts)
    return receipts


def record_arrivals(tx: Transaction, arrivals: Sequence[Arrival]) -> list[Receipt]:
    """Records events that `load_arrivals` has inserted, with their verdicts, runs and dead letters;
    counts those that are not the first of their identity as duplicates.
    """
    if not tx.events.are_plain:  # each may join what the ones before it have opened
        return [_record_one(tx, arrival) for arrival in arrivals]
    deliver(tx, arrivals)
    return [Receipt(a.id, a.event_id, False, False, len(a.runs)) for a in arrivals]


def _record_one(tx: Transaction, arrival: Arrival) -> Receipt:
    if (first := tx.events.firsts.get(arrival.id)) is not None:
        return _count_duplicate(tx, arrival, first)
    verdicts = None
    if arrival.batch_policies or arrival.pattern_events:
        arrival = _join_others(tx, arrival)
        verdicts = arrival.verdicts
    deliver(tx, [arrival])
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


def deliver(tx: Transaction, arrivals: Sequence[Arrival]) -> None:
    """Adds the runs, dead letters, outbox messages and counts of arrivals, each for the event with
    its id.
    """
    runs: list[Run] = []
    sizes: list[int] = []
    for arrival in arrivals:
        size = len(arrival.body)
        for run in arrival.runs:
            run.event = arrival.id
            if arrival.matches and run.id in arrival.matches:
                continue  # added by Patterns.advance
            if arrival.batch_policies and run.id in arrival.batch_policies:
                tx.windows.open(run, arrival.body)
                continue
            if run.payload is None:
                run.payload = arrival.body
            runs.append(run)
            sizes.append(size if run.params is None else size + len(run.params))
        if arrival.dead_letters or arrival.outbox:
            tx.events.add_messages(arrival)
    if runs:
        tx.runs.add(runs, sizes)
    tx.commit.add_deliveries(chain.from_iterable([each.counts.items() for each in arrivals]))


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
        result, codec, error, _ = rows.outcome_columns(row)
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
            result=result,
            codec=codec,
            error=error,
        )
        if (arrival := source.route_ended(run)) is not None:
            arrivals.append(arrival)
    if arrivals:
        load_arrivals(tx, arrivals)
        record_arrivals(tx, arrivals)
    if tx.commit.own_events:
        record_run_events(tx, source)


# --------------------------------------------------------------------------- runs


def _owned(tx: Transaction, op: Append | MarkStarted | Settle) -> RunRow | None:
    """The run, if the operation's token still owns it (P7)."""
    row = tx.runs.known.get(op.run)
    if row is not None and row.state is RUNNING and row.token == op.token:
        return row
    return None


def _fenced(tx: Transaction, op: Append | MarkStarted | Settle) -> Fenced:
    """Why the run is not owned."""
    name = format_id(op.run)
    row = tx.runs.known.get(op.run)
    if row is None:
        return Fenced(f"run {name} is not in the store")
    if row.state is not RUNNING:
        return Fenced(f"run {name} is {row.state.label}, not running")
    return Fenced(f"run {name} was claimed again: its token is {row.token}, this one is {op.token}")


def _recorded_already(op: Append | Settle) -> Fenced:
    return Fenced(
        f"run {format_id(op.run)} has an entry of the same call key, attempt and kind already"
    )


def _append(tx: Transaction, ops: Sequence[Append]) -> list[Appended | Fenced]:
    journal = tx.journal
    replies: list[Appended | Fenced] = []
    emitting: list[tuple[Appended, Sequence[Arrival]]] = []
    children: list[Run] = []
    for op in ops:
        row = _owned(tx, op)
        if row is None:
            if op.arrivals and tx.is_shared:
                raise ServeAlone
            replies.append(_fenced(tx, op))
            continue
        if journal.must_probe and journal.has_any(op.run, op.entries):
            replies.append(_recorded_already(op))
            continue
        journal.add(op.run, op.entries)
        if op.children:
            children += [child for child in op.children if _is_new_call(tx, child)]
        if op.clears_suspicion and (row.crash_suspect or row.crash_count):
            row.clear_crashes()
            tx.runs.change(row)
        reply = Appended(tx.commit.batch, tx.commit.at, op.entries)
        replies.append(reply)
        if op.arrivals:
            emitting.append((reply, op.arrivals))
    if children:
        tx.runs.add(children, [len(child.params or b"") for child in children])
    arrivals = [each for _, emitted in emitting for each in emitted]
    if arrivals and not tx.is_shared:
        load_arrivals(tx, arrivals)
    receipts = iter(record_arrivals(tx, arrivals) if arrivals else ())
    for reply, emitted in emitting:
        reply.receipts = list(islice(receipts, len(emitted)))
    return replies


def _is_new_call(tx: Transaction, child: Run) -> bool:
    """Whether the call that this run answers has no child yet; from now on it has."""
    if child.parent is None or child.parent_call_key is None:
        raise ValueError(
            f"child run {format_id(child.id)}: expected a parent and its call key, found none"
        )
    call = (child.parent, child.parent_call_key)
    if call in tx.journal.children:
        return False
    tx.journal.children.add(call)
    return True


def _mark_started(tx: Transaction, op: MarkStarted) -> Appended | Fenced:
    row = _owned(tx, op)
    if row is None:
        return _fenced(tx, op)
    row.crash_count += 1
    tx.runs.change(row)
    return Appended(tx.commit.batch, tx.commit.at)


def _settle(tx: Transaction, ops: Sequence[Settle]) -> list[Settled | Fenced]:
    """Ends claims. Runs that complete and answer no parent are counted together."""
    journal = tx.journal
    settled = tx.settled
    completed: list[tuple[RunRow, Completed]] = []
    replies: list[Settled | Fenced] = []
    for op in ops:
        row = _owned(tx, op)
        if row is None:
            replies.append(_fenced(tx, op))
            continue
        if op.entries:
            if journal.must_probe and journal.has_any(op.run, op.entries):
                replies.append(_recorded_already(op))
                continue
            journal.add(op.run, op.entries)
        outcome = op.outcome
        if type(outcome) is Completed and row.parent is None:
            row.state = COMPLETED  # fences a second end
            completed.append((row, outcome))
            replies.append(settled)
        else:
            _end_claim(tx, row, outcome)
            replies.append(_answer(tx, row, op))
    tx.runs.end(completed, COMPLETED)
    return replies


def _answer(tx: Transaction, row: RunRow, op: Settle) -> Settled:
    """Answers the parent of a run whose claim ended, if it has one."""
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
        case Completed():
            tx.runs.end([(row, outcome)], COMPLETED)
        case Failed():
            tx.runs.end([(row, outcome)], FAILED)
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
            tx.journal.add(row.id, [first])
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


def _each(decide: Callable[[Transaction, Any], Any]) -> Callable[[Transaction, Sequence[Any]], Any]:
    return lambda tx, ops: [decide(tx, op) for op in ops]


_DECIDE: Mapping[type, Callable[[Transaction, Sequence[Any]], list[Any]]] = {
    RecordEvents: _each(_record),
    Append: _append,
    MarkStarted: _each(_mark_started),
    Settle: _settle,
}
"""By the type of operations, what decides a list of them and returns their replies."""
