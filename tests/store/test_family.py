"""Children answer their parents through the ledger: starting, answering, waking, cancelling,
retrying.
"""

import asyncio

import pytest

from eventflow.core.errors import UsageError
from eventflow.runs.journal import CANCEL_KEY, Entry, Kind, retry_note
from eventflow.runs.run import (
    Cancelled,
    Completed,
    Failed,
    Interrupted,
    Retried,
    Run,
    State,
    Suspended,
)
from eventflow.store.protocol import Append, Appended, Settle, Settled
from tests.store.ledger import Ledger, RecordingWorker, Reopen, error, value

pytestmark = pytest.mark.anyio


async def start_child(ledger: Ledger, parent: Run, claim: str = "c#1") -> Run:
    """A child as the executor starts one: a CHILD entry and the run, in one op."""
    child = ledger.run("child", parent=parent.id, parent_call_key=claim, depth=parent.depth + 1)
    entry = Entry(call_key=claim, kind=Kind.CHILD, value=str(child.id).encode())
    await ledger.append(parent, entry, children=[child])
    return child


async def claim_only(ledger: Ledger, run: Run) -> Run:
    (claimed,) = await ledger.claimed()
    assert claimed.id == run.id
    return claimed


async def test_a_child_is_started_once(ledger: Ledger):
    """A second child for the same claim of the same parent is not inserted, in the same batch or
    later.
    """
    parent = await ledger.running()
    first = ledger.run("child", parent=parent.id, parent_call_key="c#1")
    twin, late = (ledger.run("child", parent=parent.id, parent_call_key="c#1") for _ in range(2))
    replies = await ledger.together(
        Append(parent.id, parent.token, [value("a#1")], children=[first]),
        Append(parent.id, parent.token, [value("a#2")], children=[twin]),
    )
    replies.append(await ledger.append(parent, value("a#3"), children=[late]))
    assert [type(reply) for reply in replies] == [Appended] * 3
    assert [row["id"] for row in await ledger.store.runs(parent=parent.id)] == [first.id]


async def test_a_child_is_no_delivery(ledger: Ledger):
    """P9 counts what events asked for: a child adds to `runs`, to nothing else, whatever happens to
    it.
    """
    parent = await ledger.running()
    child = await claim_only(ledger, await start_child(ledger, parent))
    await ledger.settle(child, Failed(b"{}"))
    counts = await ledger.store.counts()
    assert (counts["accepted"], counts["pending"], counts["failed"], counts["runs"]) == (1, 1, 0, 2)


async def test_the_answer_wakes_a_waiting_parent(ledger: Ledger):
    """One transaction settles the child, writes the parent's entry and makes the WAITING parent
    PENDING, due now.
    """
    parent = await ledger.running()
    child = await claim_only(ledger, await start_child(ledger, parent))
    await ledger.settle(parent, Suspended(None, 10**9))
    settled: Settled = await ledger.settle(child, answer=value("c#1", b"42"), parent=parent.id)
    assert settled.answer is not None and settled.answer.batch == settled.batch
    assert await ledger.state(parent) == "pending"
    entries = await ledger.store.load(parent.id)
    assert [(entry.kind, entry.value) for entry in entries if entry.call_key == "c#1"][1:] == [
        (Kind.VALUE, b"42")
    ]


async def test_the_answer_to_a_running_parent_is_given_back(ledger: Ledger):
    """A RUNNING parent stays RUNNING; who settles the child gets the numbered entry to hand on."""
    parent = await ledger.running()
    child = await claim_only(ledger, await start_child(ledger, parent))
    settled: Settled = await ledger.settle(child, answer=value("c#1"), parent=parent.id)
    assert settled.answer is not None
    assert await ledger.state(parent) == "running"


async def test_an_answer_and_the_parents_sleep_in_one_batch(ledger: Ledger):
    """In either order, the parent does not sleep over the answer."""
    for turn in (1, 2):
        parent = await ledger.running()
        child = await claim_only(ledger, await start_child(ledger, parent))
        ops = [
            Settle(child.id, child.token, Completed(b"1"), value("c#1"), parent.id),
            Settle(parent.id, parent.token, Suspended(None, 10**9)),
        ]
        await ledger.together(*ops[:: 1 if turn == 1 else -1])
        (again,) = await ledger.claimed()
        assert again.id == parent.id
        await ledger.settle(again)


async def test_only_the_first_answer_counts(ledger: Ledger):
    """A child that is retried after its parent took its error cannot change what the parent got
    (P4).
    """
    parent = await ledger.running()
    child = await claim_only(ledger, await start_child(ledger, parent))
    await ledger.settle(child, Failed(b"{}"), answer=error("c#1"), parent=parent.id)
    await ledger.store.retry(child.id)
    (child,) = await ledger.claimed()
    settled: Settled = await ledger.settle(child, answer=value("c#1"), parent=parent.id)
    assert settled.answer is None
    assert [entry.kind for entry in await ledger.store.load(parent.id)] == [Kind.CHILD, Kind.ERROR]


async def test_an_answer_to_somebody_else_is_not_written(ledger: Ledger):
    """Only the claim that started the child is answered."""
    parent, other = await ledger.running(), await ledger.running()
    child = await claim_only(ledger, await start_child(ledger, parent))
    settled: Settled = await ledger.settle(child, answer=value("c#1"), parent=other.id)
    assert settled.answer is None
    assert await ledger.store.load(other.id) == []


async def test_a_failed_parent_gets_the_answer_when_it_is_retried(ledger: Ledger):
    """The answer to a settled parent is kept: its retry finds it."""
    parent = await ledger.running()
    child = await claim_only(ledger, await start_child(ledger, parent))
    await ledger.settle(parent, Failed(b"{}"))
    await ledger.settle(child, answer=value("c#1", b"7"), parent=parent.id)
    await ledger.store.retry(parent.id)
    assert [
        entry.value for entry in await ledger.store.load(parent.id) if entry.kind is Kind.VALUE
    ] == [b"7"]


async def test_retry_of_a_parent_retries_the_child_it_failed_on(ledger: Ledger):
    """The cleared error is called for again, so the child that it came from is due again too; any
    number of times.
    """
    parent = await ledger.running()
    child = await claim_only(ledger, await start_child(ledger, parent))
    for _ in range(3):
        await ledger.settle(child, Failed(b"{}"), answer=error("c#1"), parent=parent.id)
        await ledger.settle(parent, Failed(b"{}"))
        await ledger.store.retry(parent.id)
        parent, child = sorted(await ledger.claimed(), key=lambda run: run.id)
    await ledger.settle(child, answer=value("c#1", b"9"), parent=parent.id)
    entries = await ledger.store.load(parent.id)
    assert [entry.kind for entry in entries if entry.kind is not Kind.NOTE] == [
        Kind.CHILD,
        Kind.CLEARED,
        Kind.VALUE,
    ]


async def test_retry_of_a_parent_takes_what_its_child_did_meanwhile(ledger: Ledger):
    """A child that was mended by hand is not run again: its value answers the retried parent."""
    parent = await ledger.running()
    child = await claim_only(ledger, await start_child(ledger, parent))
    await ledger.settle(child, Failed(b"{}"), answer=error("c#1"), parent=parent.id)
    await ledger.settle(parent, Failed(b"{}"))
    await ledger.store.retry(child.id)
    (child,) = await ledger.claimed()
    await ledger.settle(child, Completed(b"5"), answer=value("c#1", b"5"), parent=parent.id)
    await ledger.store.retry(parent.id)
    assert [
        entry.value for entry in await ledger.store.load(parent.id) if entry.kind is Kind.VALUE
    ] == [b"5"]
    assert await ledger.state(child) == "completed"


async def test_a_fresh_retry_starts_its_own_children(ledger: Ledger):
    """`fresh` drops the journal, cancels live children and lets go of all: the same claim may start
    a new child.
    """
    parent = await ledger.running()
    old = await start_child(ledger, parent)
    await ledger.append(parent, value("a#1"))
    await ledger.settle(parent, Failed(b"{}"))
    await ledger.store.retry(parent.id, discard_journal=True)
    assert [entry.call_key for entry in await ledger.store.load(parent.id)] == ["@afresh"]
    assert await ledger.state(old) == "cancelled"
    (parent,) = await ledger.claimed()
    new = await start_child(ledger, parent)
    assert {row["id"] for row in await ledger.store.runs(parent=parent.id)} == {old.id, new.id}


async def test_cancel_goes_down(ledger: Ledger):
    """Children and grandchildren that have not begun end with the run; those that have get a
    request, once, and are due now.
    """
    worker = RecordingWorker(asyncio.get_running_loop(), capacity=0)
    ledger.store.attach_worker(worker)
    parent = await ledger.running()
    child = await claim_only(ledger, await start_child(ledger, parent))
    grandchild = await start_child(ledger, child)
    running = await claim_only(ledger, grandchild)
    waiting = await start_child(ledger, child, "d#1")
    await ledger.settle(parent, Suspended(None, 10**9))
    await ledger.settle(child, Suspended(None, 10**9))
    assert await ledger.store.cancel(parent.id, "stop") is State.WAITING
    states = [await ledger.state(run) for run in (parent, child, waiting, running)]
    assert states == ["pending", "pending", "cancelled", "running"]
    assert worker.cancels == [running.id]
    for each in (parent, child, running):
        assert (await ledger.store.run(each.id))["cancel_requested"]
    entries = [*await ledger.store.load(parent.id), *await ledger.store.load(child.id)]
    assert [each.kind for each in entries if each.kind is not Kind.CHILD] == [Kind.CANCEL] * 2


async def test_a_cancelled_child_answers_its_parent(ledger: Ledger):
    """A waiting parent is woken with an ERROR entry that says who was cancelled and why."""
    parent = await ledger.running()
    child = await start_child(ledger, parent)
    await ledger.settle(parent, Suspended(None, 10**9))
    await ledger.store.cancel(child.id, "no longer needed")
    assert await ledger.state(parent) == "pending"
    (entry,) = [entry for entry in await ledger.store.load(parent.id) if entry.kind is Kind.ERROR]
    assert (
        entry.call_key == "c#1"
        and b"RunCancelled" in (entry.error or b"")
        and b"no longer needed" in (entry.error or b"")
    )


async def test_a_dead_child_answers_its_parent(ledger: Ledger, reopen: Reopen):
    """Quarantine is an end like another: the parent does not wait for ever."""
    parent = await ledger.running()
    child = await claim_only(ledger, await start_child(ledger, parent))
    await ledger.settle(parent, Suspended(None, 10**9))
    for _ in range(3):
        await ledger.mark(child)
    ledger = reopen()
    assert (await ledger.state(child), await ledger.state(parent)) == ("dead", "pending")
    assert b"RunDead" in ((await ledger.store.load(parent.id))[-1].error or b"")


async def test_emitted_events_are_recorded_with_the_entry(ledger: Ledger):
    """An Append's arrivals commit with its entries and report their receipts; a known identity is a
    duplicate.
    """
    run = await ledger.running()
    arrivals = [
        ledger.arrival("emitted", ledger.run("g")),
        ledger.arrival("emitted", ledger.run("g")),
    ]
    appended = await ledger.append(run, value(), arrivals=arrivals)
    assert [receipt.duplicate for receipt in appended.receipts] == [False, True]
    assert [row["flow"] for row in await ledger.store.runs(event=arrivals[0].id)] == ["g"]


async def test_a_child_cannot_be_retried_while_live(ledger: Ledger):
    """A live child is refused like any live run."""
    parent = await ledger.running()
    child = await start_child(ledger, parent)
    with pytest.raises(UsageError, match="pending"):
        await ledger.store.retry(child.id)


async def test_a_child_that_ends_before_its_parent_records_its_cancel(ledger: Ledger):
    """The parent gets its own cancel, and no error of the child that was cancelled with it; a retry
    executes both again.
    """
    parent = await ledger.running()
    child = await claim_only(ledger, await start_child(ledger, parent))
    await ledger.store.cancel(parent.id, "stop")
    await ledger.settle(child, Cancelled("stop"), answer=error("c#1"), parent=parent.id)
    assert [entry.kind for entry in await ledger.store.load(parent.id)] == [Kind.CHILD]
    await ledger.append(parent, Entry(call_key=CANCEL_KEY, kind=Kind.CANCEL, value=b'"stop"'))
    await ledger.settle(parent, Cancelled("stop"))
    await ledger.store.retry(parent.id)
    assert {run.id for run in await ledger.claimed()} == {parent.id, child.id}


@pytest.mark.parametrize("by", ["a crash", "a drain", "a suspension", "a retry"])
async def test_a_cancel_is_recorded_before_its_consequences(
    ledger: Ledger, reopen: Reopen, by: str
):
    """A running parent was cancelled, and its claim ends before it has recorded that: its next
    execution gets the cancel, and then the error of its child that was cancelled with it.
    """
    parent = await ledger.running()
    child = await claim_only(ledger, await start_child(ledger, parent))
    await ledger.store.cancel(parent.id, "stop")
    match by:
        case "a crash":
            ledger = reopen()
        case "a drain":
            await ledger.settle(parent, Interrupted())
        case "a suspension":
            await ledger.settle(parent, Suspended(None, 10**9))
        case _:
            note = retry_note(1, 1, 4, b'{"type":"ValueError","message":"no"}')
            await ledger.settle(parent, Retried(note, "attempt 1 of 4 failed", 10**15))
    if by == "a crash":
        claimed = {run.id: run for run in await ledger.claimed()}
        child = claimed[child.id]
        parent = claimed[parent.id]
    await ledger.settle(child, Cancelled("stop"), answer=error("c#1"), parent=parent.id)
    kinds = [entry.kind for entry in await ledger.store.load(parent.id)]
    assert [kind for kind in kinds if kind in (Kind.CANCEL, Kind.ERROR)] == [
        Kind.CANCEL,
        Kind.ERROR,
    ]
