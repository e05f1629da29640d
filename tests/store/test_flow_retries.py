"""`@flow(retries=)` in the ledger: one transaction from a failed attempt to the wait for the next
one, and what may happen during that wait.
"""

import sqlite3
from contextlib import closing
from itertools import permutations

import pytest

from eventflow.core.errors import UsageError
from eventflow.runs.journal import CANCEL_KEY, RETRY_NOTE, Entry, Kind, retry_note
from eventflow.runs.run import (
    MAX_CRASHES,
    Cancelled,
    Completed,
    Failed,
    Retried,
    Run,
    State,
    Suspended,
)
from eventflow.store.protocol import Append, Fenced, Settle
from tests.store.ledger import SECOND, Ledger, Reopen, error, value

pytestmark = pytest.mark.anyio

WAIT = 30


def retried(ledger: Ledger, attempt: int = 1, wait: float = WAIT) -> Retried:
    note = retry_note(attempt, attempt, 4, b'{"type":"ValueError","message":"no"}')
    return Retried(note, f"attempt {attempt} of 4 failed: ValueError: no", int(wait * SECOND))


async def start_child(ledger: Ledger, parent: Run, call: str = "c#1") -> Run:
    """Starts and claims a child of a running parent."""
    child = ledger.run("child", parent=parent.id, parent_call_key=call)
    entry = Entry(call_key=call, kind=Kind.CHILD, value=str(child.id).encode())
    await ledger.append(parent, entry, children=[child])
    (claimed,) = await ledger.claimed()
    assert claimed.id == child.id
    return claimed


async def kinds(ledger: Ledger, run: Run) -> list[tuple[str, str]]:
    return [(entry.call_key, entry.kind.name) for entry in await ledger.store.load(run.id)]


async def test_a_failed_execution_is_one_transaction(ledger: Ledger, reopen: Reopen):
    """The run waits until the due time with its values, its errors cleared and a note of the
    failure; it counts as pending, nothing ends, and it is claimed at its due time and not before,
    also by the next process.
    """
    run = await ledger.running(ordering_key="k")
    await ledger.recorded(ledger.run(ordering_key="k"))
    await ledger.append(run, value("a#1"))
    await ledger.together(
        Append(run.id, run.token, [error("b#1")]),
        Settle(run.id, run.token, retried(ledger), entries=[value("c#1")]),
    )
    for life in range(2):
        assert await kinds(ledger, run) == [
            ("a#1", "VALUE"),
            ("b#1", "CLEARED"),
            ("c#1", "VALUE"),
            (RETRY_NOTE, "NOTE"),
        ]
        row = await ledger.store.run(run.id)
        assert (row["state"], row["reason"]) == ("waiting", "attempt 1 of 4 failed: ValueError: no")
        assert (row["error"], row["finished_at"], row["started_at"]) == (None, None, None)
        counts = await ledger.store.counts()
        assert (counts["pending"], counts["failed"]) == (2, 0)
        assert await ledger.store.check() == []
        ledger.clock.forward(WAIT / 2 - 0.001)
        assert await ledger.claimed() == []
        if life == 0:
            ledger = reopen()
    ledger.clock.forward(0.002)
    (again,) = await ledger.claimed()
    assert again.id == run.id and again.started_at == ledger.clock.now()
    await ledger.settle(again)
    (other,) = await ledger.claimed()  # of the same ordering key
    await ledger.settle(other)


async def test_a_stale_claim_retries_nothing(ledger: Ledger):
    """An outcome with an older token is refused, and leaves no note and no cleared error."""
    run = await ledger.running()
    await ledger.append(run, error("b#1"))
    assert isinstance(await ledger.do(Settle(run.id, run.token - 1, retried(ledger))), Fenced)
    assert await kinds(ledger, run) == [("b#1", "ERROR")]
    await ledger.settle(run)


async def test_a_damaged_journal_holds_the_run_and_harms_no_other(ledger: Ledger, path: str):
    """Errors of a journal that cannot be read are not dropped: the run is held, and the other
    operations of the batch are recorded.
    """
    run, other = await ledger.running(), await ledger.running()
    await ledger.append(run, value("a#1"))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE journal SET value = 'x'")
    await ledger.together(
        Settle(other.id, other.token, Completed(b"1")),
        Settle(run.id, run.token, retried(ledger)),
    )
    assert await ledger.state(other) == "completed"
    row = await ledger.store.run(run.id)
    assert row["state"] == "held" and "checksum" in row["reason"]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE journal SET value = X'31' WHERE call_key = 'a#1'")


@pytest.mark.parametrize("order", [*permutations(range(3))], ids=str)
async def test_a_child_that_fails_with_its_parent_is_due_with_it(
    ledger: Ledger, order: tuple[int, ...]
):
    """Whether the child ends before its parent's execution, after it, or in the same batch: it
    waits until its parent is due, gives no error, and keeps its values.
    """
    parent = await ledger.running()
    failing = [await start_child(ledger, parent, f"c#{n}") for n in (1, 2)]
    for child in failing:
        await ledger.append(child, value("v#1"), error("x#1"))
    ops = [
        Settle(failing[0].id, failing[0].token, Failed(b"{}"), error("c#1"), parent.id),
        Settle(parent.id, parent.token, retried(ledger)),
        Settle(failing[1].id, failing[1].token, Failed(b"{}"), error("c#2"), parent.id),
    ]
    await ledger.together(*(ops[n] for n in order))
    assert not [kind for _, kind in await kinds(ledger, parent) if kind == "ERROR"]
    for child in failing:
        kept = [("v#1", "VALUE"), ("x#1", "CLEARED"), (RETRY_NOTE, "NOTE")]
        assert sorted(await kinds(ledger, child)) == sorted(kept)
        row = await ledger.store.run(child.id)
        assert (row["state"], row["error"]) == ("waiting", None)
        assert row["reason"].startswith("retried with its parent")
    assert await ledger.claimed() == []
    ledger.clock.forward(WAIT)
    again = {run.id: run for run in await ledger.claimed()}
    assert again.keys() == {parent.id, *(child.id for child in failing)}
    for child, call in zip(failing, ("c#1", "c#2"), strict=True):
        await ledger.settle(again[child.id], answer=value(call), parent=parent.id)
    await ledger.settle(again[parent.id])


@pytest.mark.parametrize("outcome", [Completed(b"1"), Cancelled("by a person")])
async def test_an_answer_in_the_wait_is_recorded_and_wakes_nobody(
    ledger: Ledger, outcome: Completed | Cancelled
):
    """The value of a child that continued, and the error of one that a person cancelled, are
    recorded when the parent is due, which is not earlier.
    """
    parent = await ledger.running()
    child = await start_child(ledger, parent)
    await ledger.settle(parent, retried(ledger))
    if isinstance(outcome, Cancelled):
        await ledger.store.cancel(child.id, outcome.reason)
    answer = value("c#1") if isinstance(outcome, Completed) else error("c#1")
    await ledger.settle(child, outcome, answer=answer, parent=parent.id)
    assert (await kinds(ledger, parent))[-1] == ("c#1", answer.kind.name)
    assert await ledger.state(parent) == "waiting" and await ledger.claimed() == []
    ledger.clock.forward(WAIT)
    (again,) = await ledger.claimed()
    assert again.id == parent.id
    await ledger.settle(again)


async def test_the_cancel_of_a_call_that_is_made_again_comes_too_late(ledger: Ledger):
    """A failing attempt cancels its children just before it ends, and the cancel may arrive after
    its end: then the child continues. The cancel by an attempt that continues, or by a run that has
    ended, is carried out.
    """
    parent = await ledger.running()
    child = await start_child(ledger, parent)
    await ledger.settle(parent, retried(ledger))
    await ledger.store.cancel(child.id, "given up", parent.token)
    assert not (await ledger.store.run(child.id))["cancel_requested"]
    ledger.clock.forward(WAIT)
    (again,) = await ledger.claimed()
    await ledger.store.cancel(child.id, "given up", parent.token)
    assert not (await ledger.store.run(child.id))["cancel_requested"]
    await ledger.store.cancel(child.id, "given up", again.token)
    assert (await ledger.store.run(child.id))["cancel_requested"]
    await ledger.settle(child, Cancelled("given up"), answer=error("c#1"), parent=parent.id)
    assert await ledger.state(child) == "cancelled"
    await ledger.settle(again)


@pytest.mark.parametrize("when", ["before the end", "in the wait", "in the next execution"])
async def test_a_child_cancelled_by_a_failed_execution_is_executed_again(ledger: Ledger, when: str):
    """A child that a failed attempt cancelled gives no error and is due with its parent, whenever
    its clean-up ends. If a person cancels it meanwhile, it stays cancelled.
    """
    for by_a_person in (False, True):
        parent = await ledger.running()
        child = await start_child(ledger, parent)
        await ledger.store.cancel(child.id, "given up", parent.token)
        if by_a_person:
            await ledger.store.cancel(child.id, "not wanted")
        ends = Settle(child.id, child.token, Cancelled("given up"), error("c#1"), parent.id)
        fails = Settle(parent.id, parent.token, retried(ledger))
        await ledger.together(*([ends, fails] if when == "before the end" else [fails]))
        if when == "in the wait":
            await ledger.do(ends)
        ledger.clock.forward(WAIT)
        again = {run.id: run for run in await ledger.claimed()}
        if when == "in the next execution":
            await ledger.do(ends)
            again |= {run.id: run for run in await ledger.claimed()}
        final = [entry.kind for entry in await ledger.store.load(parent.id) if entry.kind.is_final]
        if by_a_person:
            assert await ledger.state(child) == "cancelled" and final == [Kind.ERROR]
        else:
            assert again[child.id].token == 2 and final == []
            await ledger.settle(again[child.id], answer=value("c#1"), parent=parent.id)
        await ledger.settle(again[parent.id])


async def test_a_dead_child_is_not_executed_again(ledger: Ledger, reopen: Reopen):
    """A retry of its parent keeps the error of a child that is dead."""
    parent = await ledger.running()
    child = await start_child(ledger, parent)
    for _ in range(MAX_CRASHES):
        await ledger.mark(child)
        ledger = reopen()
        again = {run.id: run for run in await ledger.claimed()}
        parent = again[parent.id]
        child = again.get(child.id, child)
    assert await ledger.state(child) == "dead"
    await ledger.settle(parent, retried(ledger))
    assert await ledger.state(child) == "dead"
    assert ("c#1", "ERROR") in await kinds(ledger, parent)
    await ledger.store.cancel(parent.id, "enough")


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_cancel_comes_before_the_retry(ledger: Ledger, when: str):
    """A run that fails while a cancel is being delivered is due at once, with the cancel, like one
    that is cancelled during its wait: its flow may clean up.
    """
    run = await ledger.running()
    if when == "before":
        await ledger.store.cancel(run.id, "enough")
    await ledger.settle(run, retried(ledger))
    if when == "after":
        await ledger.store.cancel(run.id, "enough")
        assert (CANCEL_KEY, "CANCEL") in await kinds(ledger, run)
    (again,) = await ledger.claimed()
    assert again.cancel_requested and again.cancel_reason == "enough"
    await ledger.settle(again, Cancelled("enough"))


@pytest.mark.parametrize("again", ["retries", "by hand"])
async def test_what_was_cancelled_with_its_parent_is_executed_with_it(ledger: Ledger, again: str):
    """A run whose clean-up lasts longer than that of its cancelled parent is executed again with
    it, by the retries of a flow above or by hand, and gives no error of the old cancel.
    """
    top = await ledger.running()
    holder = await start_child(ledger, top)
    slow = await start_child(ledger, holder, "s#1")
    cancelled = Cancelled("given up")
    await ledger.store.cancel(holder.id, "given up", top.token if again == "retries" else 0)
    if again == "retries":
        await ledger.settle(top, retried(ledger))
        await ledger.settle(holder, cancelled, answer=error("c#1"), parent=top.id)
        await ledger.settle(slow, cancelled, answer=error("s#1"), parent=holder.id)
        assert (await ledger.store.run(slow.id))["reason"].startswith("retried with its parent")
        ledger.clock.forward(WAIT)
    else:
        await ledger.settle(holder, cancelled, answer=error("c#1"), parent=top.id)
        await ledger.settle(top, Failed(b"{}"))
        await ledger.store.retry(top.id)
        await ledger.settle(slow, cancelled, answer=error("s#1"), parent=holder.id)
    assert {run.id for run in await ledger.claimed()} == {top.id, holder.id, slow.id}
    assert "ERROR" not in [kind for _, kind in await kinds(ledger, holder)]


async def test_retry_by_hand_starts_the_run_and_its_waiting_children(ledger: Ledger):
    """During the wait for its retry, `retry` makes a run due now, with the children that wait with
    it; when it is executed, it waits for its child and not for a retry.
    """
    parent = await ledger.running()
    child = await start_child(ledger, parent)
    await ledger.settle(child, Failed(b"{}"), answer=error("c#1"), parent=parent.id)
    await ledger.settle(parent, retried(ledger))
    assert await ledger.claimed() == []
    await ledger.store.retry(parent.id)
    again = {run.id: run for run in await ledger.claimed()}
    assert again.keys() == {parent.id, child.id}
    await ledger.settle(again[parent.id], Suspended(None, 10**9))
    assert (await ledger.store.run(parent.id))["reason"] is None
    with pytest.raises(UsageError, match="for its child run"):
        await ledger.store.retry(parent.id)
    await ledger.settle(again[child.id], answer=value("c#1"), parent=parent.id)
    (again_parent,) = await ledger.claimed()
    await ledger.settle(again_parent)


async def test_a_retry_by_hand_after_the_end_is_noted(ledger: Ledger):
    """The note has the time from which timeouts count; if retries of the flow were used, it has the
    last error too.
    """
    plain, run = await ledger.running(), await ledger.running()
    await ledger.settle(plain, Failed(b'{"type":"OSError"}'))
    await ledger.store.retry(plain.id)
    (note,) = await ledger.store.load(plain.id)
    assert (note.call_key, note.due_at, note.value) == (RETRY_NOTE, ledger.clock.now(), None)
    assert note.error is None
    await ledger.settle(run, retried(ledger, wait=0))
    again = {one.id: one for one in await ledger.claimed()}
    await ledger.settle(again[plain.id])
    await ledger.settle(again[run.id], Failed(b'{"type":"OSError"}'))
    await ledger.store.retry(run.id)
    notes = [(e.attempt, e.value is None, e.error) for e in await ledger.store.load(run.id)]
    assert notes[1] == (2, True, b'{"type":"OSError"}') and len(notes) == 2
    assert await ledger.state(run) == State.PENDING.label
    (again_run,) = await ledger.claimed()
    await ledger.settle(again_run)


async def test_a_damaged_child_is_held_and_harms_no_other(ledger: Ledger, path: str):
    """A child whose journal cannot be read is held; its parent awaits its retry, and the other
    operations of the batch are recorded.
    """
    parent, other = await ledger.running(), await ledger.running()
    child = await start_child(ledger, parent)
    await ledger.append(child, value("v#1"))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE journal SET value = 'x' WHERE call_key = 'v#1'")
    await ledger.together(
        Settle(child.id, child.token, Failed(b"{}"), error("c#1"), parent.id),
        Settle(other.id, other.token, Completed(b"1")),
        Settle(parent.id, parent.token, retried(ledger)),
    )
    states = [await ledger.state(run) for run in (child, other, parent)]
    assert states == ["held", "completed", "waiting"]
    assert "checksum" in (await ledger.store.run(child.id))["reason"]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE journal SET value = X'31' WHERE call_key = 'v#1'")
    await ledger.store.cancel(parent.id, "enough")
