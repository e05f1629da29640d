"""The one thread that writes: group commit, order, the hand-over to the worker, and callers who
went away.
"""

import asyncio
import threading
from typing import Any

import pytest

from eventflow.core.errors import StoreError
from eventflow.events.event import Receipt
from eventflow.runs.run import Completed, NeedsAttention, State, Suspended
from eventflow.store.protocol import (
    Append,
    Claim,
    Fenced,
    OpList,
    RecordEvents,
    Settle,
    Settled,
)
from tests.conftest import eventually, wait_until
from tests.store.ledger import SECOND, Ledger, RecordingWorker, Reopen, value

pytestmark = pytest.mark.anyio


def attach_worker(ledger: Ledger, capacity: int = 1_000_000) -> RecordingWorker:
    worker = RecordingWorker(asyncio.get_running_loop(), capacity)
    ledger.store.attach_worker(worker)
    return worker


def commits(ledger: Ledger) -> int:
    writer = ledger.store._writer
    assert writer is not None
    return writer.last.batch


async def test_concurrent_calls_share_commits(ledger: Ledger):
    """A thousand calls of one event each cost far fewer commits, and each gets its own receipt."""
    before = commits(ledger)
    arrivals = [ledger.arrival(f"e{n}", ledger.run()) for n in range(1000)]
    replies = await asyncio.gather(*[ledger.store.record([arrival]) for arrival in arrivals])
    assert [receipt.ledger_id for (receipt,) in replies] == [arrival.id for arrival in arrivals]
    assert commits(ledger) - before <= 100


async def test_ops_of_a_loop_are_applied_in_order(ledger: Ledger):
    """Append, settle and the refused rest, posted in one go, hundreds of times over."""
    await ledger.recorded(*[ledger.run() for _ in range(200)])
    runs = await ledger.claimed(200)
    ops = [
        op
        for run in runs
        for op in (
            Append(run.id, run.token, [value()]),
            Settle(run.id, run.token, Completed(b"1")),
            Append(run.id, run.token, [value("late")]),
        )
    ]
    replies = await ledger.together(*ops)
    assert [type(reply).__name__ for reply in replies] == ["Appended", "Settled", "Fenced"] * 200


async def test_a_list_of_ops_has_one_reply(ledger: Ledger):
    """Operations posted in one piece are applied in order, between those posted before and after;
    each is refused on its own, and the one reply has theirs in order.
    """
    one, two = await ledger.recorded(ledger.run(), ledger.run())
    one, two = await ledger.claimed(2)
    listed = OpList(
        [
            Append(one.id, one.token, [value()]),
            Settle(one.id, one.token, Completed(b"1")),
            Append(one.id, one.token, [value("late")]),
            Settle(two.id, two.token, Completed(b"2")),
        ]
    )
    replies, after, empty = await ledger.together(
        listed, Append(two.id, two.token, [value("later")]), OpList([])
    )
    names = [type(reply).__name__ for reply in (*replies, after)]
    assert names == ["Appended", "Settled", "Fenced", "Settled", "Fenced"]
    assert empty == []
    assert [await ledger.state(run) for run in (one, two)] == ["completed", "completed"]


async def test_an_op_of_a_list_fails_alone(ledger: Ledger):
    """Bad content, or an entry recorded before, is the reply of that operation only."""
    await ledger.recorded(*[ledger.run() for _ in range(3)])
    one, two, three = await ledger.claimed(3)
    await ledger.append(one, value())
    listed = OpList(
        [
            Append(one.id, one.token, [value()]),
            Append(two.id, two.token, [value(data=object())]),  # type: ignore[arg-type]
            Settle(three.id, three.token, Completed(b"1")),
        ]
    )
    receipts, (again, bad, good) = await ledger.together(
        RecordEvents([ledger.arrival("a")]), listed
    )
    assert len(receipts) == 1
    assert isinstance(again, Fenced) and isinstance(bad, StoreError) and isinstance(good, Settled)
    (alone,) = await ledger.do(OpList([Append(one.id, one.token, [value()])]))
    assert isinstance(alone, Fenced)


async def test_cancelling_the_wait_does_not_reach_the_transaction(ledger: Ledger):
    """The caller may go; what it posted is recorded all the same, and a second attempt is a
    duplicate.
    """
    arrival = ledger.arrival("a", ledger.run())
    waiting = asyncio.create_task(ledger.store.record([arrival]))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    (receipt,) = await ledger.store.record([ledger.arrival("a", ledger.run())])
    assert receipt == Receipt(arrival.id, "a", duplicate=True, matched=1)


async def test_one_wake_up_for_a_batch(ledger: Ledger):
    """Replies of one commit reach a loop in one call, the worker's reports among them."""
    attach_worker(ledger)
    loop = asyncio.get_running_loop()
    woken: list[Any] = []
    original = loop.call_soon_threadsafe

    def counted(call: Any, *args: Any, **options: Any) -> asyncio.Handle:
        woken.append(call)
        return original(call, *args, **options)

    loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
    before = commits(ledger)
    await asyncio.gather(
        *[ledger.store.record([ledger.arrival(f"e{n}", ledger.run())]) for n in range(500)]
    )
    assert len(woken) == commits(ledger) - before


async def test_a_failing_callback_does_not_starve_the_others(ledger: Ledger):
    """What one reply raises goes to its loop's exception handler; the replies after it still
    run.
    """
    loop = asyncio.get_running_loop()
    called: list[Any] = []
    raised: list[Any] = []
    loop.set_exception_handler(lambda _, context: raised.append(context["exception"]))

    def broken(reply: Any) -> None:
        raise LookupError("broken callback")

    for call in (broken, called.append, broken, called.append):
        ledger.store.post(RecordEvents([]), call, loop)
    await eventually(lambda: len(called) == 2, "both good callbacks have run")
    assert [str(error) for error in raised] == ["broken callback"] * 2
    loop.set_exception_handler(None)


def test_a_closed_loop_hurts_nobody(ledger: Ledger):
    """A caller whose loop was closed meanwhile: its event is recorded, the writer goes on."""
    gone = asyncio.new_event_loop()
    gone.close()
    for n in range(3):
        ledger.store.post(
            RecordEvents([ledger.arrival(f"gone{n}", ledger.run())]), lambda _: None, gone
        )
    asyncio.run(ledger.store.record([ledger.arrival("here", ledger.run())]))
    assert asyncio.run(ledger.store.counts())["events"] == 4


def test_two_loops_are_served(ledger: Ledger):
    """Callers on loops in different threads each get their replies on their own loop."""

    async def many(name: str) -> set[int]:
        replies = await asyncio.gather(
            *[ledger.store.record([ledger.arrival(f"{name}{n}")]) for n in range(200)]
        )
        return {receipt.ledger_id for (receipt,) in replies}

    found: list[set[int]] = []
    threads = [
        threading.Thread(target=lambda name=name: found.append(asyncio.run(many(name))))
        for name in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found[0] | found[1]) == 400


async def test_closing_commits_what_was_posted(ledger: Ledger, reopen: Reopen):
    """`close` loses nothing that was posted before it; what is posted after is answered with an
    error.
    """
    loop = asyncio.get_running_loop()
    replies: list[Any] = []
    for n in range(300):
        ledger.store.post(RecordEvents([ledger.arrival(f"e{n}")]), replies.append, loop)
    ledger.store.close()
    ledger.store.close()
    ledger.store.post(RecordEvents([]), replies.append, loop)
    await eventually(lambda: len(replies) == 301, "every reply has come")
    assert isinstance(replies[-1], StoreError) and "closed" in str(replies[-1])
    with pytest.raises(StoreError):
        await ledger.store.events()
    assert (await reopen().store.counts())["events"] == 300


# --------------------------------------------------------------------------- the hand-over


async def test_a_fresh_run_is_handed_over_running(ledger: Ledger):
    """What the worker takes is RUNNING under token 1 in the file and in its hands, body and all; no
    claim gives it again.
    """
    worker = attach_worker(ledger)
    (run,) = await ledger.recorded(ledger.run(params=b"{}"))
    await eventually(lambda: worker.runs, "the run is received")
    (given,) = worker.runs
    assert (given.id, given.state, given.token, given.payload) == (
        run.id,
        State.RUNNING,
        1,
        b'{"n":1}',
    )
    assert given.started_at == ledger.clock.now()
    row = await ledger.store.run(run.id)
    assert (row["state"], row["token"], row["started_at"]) == ("running", 1, given.started_at)
    assert await ledger.claimed() == [] and worker.due_reports == 0
    assert await ledger.settle(given) is not None


async def test_what_the_worker_does_not_take_stays_pending(ledger: Ledger):
    """`reserve` refuses: the run is PENDING, and the worker is notified that a run is due."""
    worker = attach_worker(ledger, capacity=1)
    await ledger.recorded(ledger.run(), ledger.run(), ledger.run())
    await eventually(lambda: worker.due_reports, "the worker is notified of a due run")
    assert len(worker.runs) == 1
    assert len(await ledger.claimed()) == 2


async def test_later_runs_and_lanes_are_not_handed_over(ledger: Ledger):
    """A run due later, or one with an ordering key, is for a claim; the worker is notified when
    it is due.
    """
    worker = attach_worker(ledger)
    await ledger.recorded(ledger.run(due_at=ledger.clock.now() + SECOND))
    await eventually(lambda: worker.due_reports == 1, "a due time is reported")
    reply = await ledger.do(Claim(10, {}))
    assert reply.next_due == ledger.clock.now() + SECOND
    await ledger.recorded(ledger.run(due_at=ledger.clock.now() + 9 * SECOND))
    assert worker.due_reports == 1
    await ledger.recorded(ledger.run(ordering_key="a"), ledger.run(ordering_key="a"))
    await eventually(lambda: worker.due_reports == 2, "the head of an ordering key is reported")
    assert worker.runs == [] and len(await ledger.claimed()) == 1


async def test_a_freed_ordering_key_is_reported(ledger: Ledger):
    """The worker is notified of the next run of an ordering key when the one before settles."""
    await ledger.recorded(ledger.run(ordering_key="a"), ledger.run(ordering_key="a"))
    (head,) = await ledger.claimed()
    worker = attach_worker(ledger)
    await ledger.settle(head)
    await eventually(lambda: worker.due_reports == 1, "the next run of the key is reported")


async def test_a_woken_parent_is_handed_over(ledger: Ledger):
    """A child's answer puts its parent into the worker's hands, under a new token."""
    parent = await ledger.running()
    child = ledger.run("child", parent=parent.id, parent_call_key="c#1")
    await ledger.append(parent, children=[child])
    (child,) = await ledger.claimed()
    await ledger.settle(parent, Suspended(None, 10**9))
    worker = attach_worker(ledger)
    await ledger.settle(child, answer=value("c#1"), parent=parent.id)
    await eventually(lambda: worker.runs, "the parent is received")
    assert [(run.id, run.token, run.payload) for run in worker.runs] == [(parent.id, 2, b'{"n":1}')]
    assert await ledger.state(parent) == "running"


async def test_a_retried_run_is_handed_over(ledger: Ledger):
    """So does a retry."""
    run = await ledger.running()
    worker = attach_worker(ledger)
    await ledger.settle(run, NeedsAttention("x"))
    again = await ledger.store.retry(run.id)
    assert (again.state, again.token) == (State.RUNNING, 2)
    assert [given.id for given in worker.runs] == [run.id]


async def test_a_running_run_is_notified_of_its_cancel(ledger: Ledger):
    """The worker is notified which of its runs are to be cancelled; a claim after a crash carries
    the flag.
    """
    worker = attach_worker(ledger)
    (run,) = await ledger.recorded(ledger.run())
    await ledger.store.cancel(run.id, "stop")
    await eventually(lambda: worker.cancels, "the worker is notified of the cancel")
    assert worker.cancels == [run.id]
    assert await ledger.state(run) == "running"


async def test_what_was_taken_goes_back_when_the_batch_fails(ledger: Ledger):
    """Bad content in one op undoes the shared transaction: the runs taken go back, and are recorded
    and given again.
    """
    worker = attach_worker(ledger)
    bad = ledger.arrival("bad", ledger.run())
    bad.body = object()  # type: ignore[assignment]
    good = ledger.arrival("good", ledger.run())
    first, failed = await ledger.together(RecordEvents([good]), RecordEvents([bad]))
    assert isinstance(failed, StoreError) and first[0].ledger_id == good.id
    await eventually(lambda: worker.runs, "the good run is received")
    assert [(run.id, run.token) for run in worker.runs] == [(good.runs[0].id, 1)]


def test_a_worker_whose_loop_is_gone(ledger: Ledger, reopen: Reopen):
    """Runs handed to a loop that was closed are found again by the next epoch."""

    async def attach() -> None:
        attach_worker(ledger)

    asyncio.run(attach())
    (run,) = asyncio.run(ledger.recorded(ledger.run()))
    wait_until(lambda: asyncio.run(ledger.state(run)) == "running", "the run was taken")
    assert [again.id for again in asyncio.run(reopen().claimed())] == [run.id]
