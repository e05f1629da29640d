"""The one thread that writes: group commit, order, the hand-over to the worker, and callers who
went away.
"""

import asyncio
import threading
from typing import Any

import pytest

from eventflow.core.errors import StoreError
from eventflow.events.event import Receipt
from eventflow.runs.run import Completed, State, Suspended
from eventflow.store.protocol import Append, Claim, RecordEvents, Settle
from tests.conftest import eventually, wait_until
from tests.store.ledger import SECOND, Hand, Ledger, Reopen, value

pytestmark = pytest.mark.anyio


def hand(ledger: Ledger, room: int = 1_000_000) -> Hand:
    taker = Hand(asyncio.get_running_loop(), room)
    ledger.store.attach_worker(taker)
    return taker


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
        op for run in runs for op in (
            Append(run.id, run.token, [value()]),
            Settle(run.id, run.token, Completed(b"1")),
            Append(run.id, run.token, [value("late")]),
        )
    ]  # fmt: skip
    replies = await ledger.together(*ops)
    assert [type(reply).__name__ for reply in replies] == ["Appended", "Settled", "Fenced"] * 200


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
    """Replies of one commit reach a loop in one call, the worker's news among them."""
    hand(ledger)
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
    """What one reply raises goes to its loop's exception handler; the replies after it still run."""
    loop = asyncio.get_running_loop()
    heard: list[Any] = []
    said: list[Any] = []
    loop.set_exception_handler(lambda _, context: said.append(context["exception"]))

    def broken(reply: Any) -> None:
        raise LookupError("broken callback")

    for call in (broken, heard.append, broken, heard.append):
        ledger.store.post(RecordEvents([]), call, loop)
    await eventually(lambda: len(heard) == 2, "both good callbacks have run")
    assert [str(error) for error in said] == ["broken callback"] * 2
    loop.set_exception_handler(None)


def test_a_closed_loop_hurts_nobody(ledger: Ledger):
    """A caller whose loop was closed meanwhile: its event is recorded, the writer lives."""
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
    taker = hand(ledger)
    (run,) = await ledger.recorded(ledger.run(params=b"{}"))
    await eventually(lambda: taker.runs, "the run is handed over")
    (given,) = taker.runs
    assert (given.id, given.state, given.token, given.payload) == (
        run.id,
        State.RUNNING,
        1,
        b'{"n":1}',
    )
    assert given.started_at == ledger.clock.now()
    row = await ledger.store.run(run.id)
    assert (row["state"], row["token"], row["started_at"]) == ("running", 1, given.started_at)
    assert await ledger.claimed() == [] and taker.mores == 0
    assert await ledger.settle(given) is not None


async def test_what_the_worker_does_not_take_stays_pending(ledger: Ledger):
    """`take` says no: the run is PENDING, and the worker hears that there is more."""
    taker = hand(ledger, room=1)
    await ledger.recorded(ledger.run(), ledger.run(), ledger.run())
    await eventually(lambda: taker.mores, "the worker hears of more")
    assert len(taker.runs) == 1
    assert len(await ledger.claimed()) == 2


async def test_later_runs_and_lanes_are_not_handed_over(ledger: Ledger):
    """A run due later, or one with a lane, is for a claim; the worker is told to ask when it is
    due.
    """
    taker = hand(ledger)
    await ledger.recorded(ledger.run(due_at=ledger.clock.now() + SECOND))
    await eventually(lambda: taker.mores == 1, "a due time is news")
    reply = await ledger.do(Claim(10, {}))
    assert reply.next_due == ledger.clock.now() + SECOND
    await ledger.recorded(ledger.run(due_at=ledger.clock.now() + 9 * SECOND))
    assert taker.mores == 1
    await ledger.recorded(ledger.run(ordering_key="a"), ledger.run(ordering_key="a"))
    await eventually(lambda: taker.mores == 2, "a lane's head is news")
    assert taker.runs == [] and len(await ledger.claimed()) == 1


async def test_a_lane_that_is_freed_is_news(ledger: Ledger):
    """The worker hears of the next one of a lane when the one before settles."""
    await ledger.recorded(ledger.run(ordering_key="a"), ledger.run(ordering_key="a"))
    (head,) = await ledger.claimed()
    taker = hand(ledger)
    await ledger.settle(head)
    await eventually(lambda: taker.mores == 1, "the lane's next run is news")


async def test_a_woken_parent_is_handed_over(ledger: Ledger):
    """A child's answer puts its parent into the worker's hands, under a new token."""
    parent = await ledger.running()
    child = ledger.run("child", parent=parent.id, parent_call_key="c#1")
    await ledger.append(parent, children=[child])
    (child,) = await ledger.claimed()
    await ledger.settle(parent, Suspended(None, 10**9))
    taker = hand(ledger)
    await ledger.settle(child, answer=value("c#1"), parent=parent.id)
    await eventually(lambda: taker.runs, "the parent is handed over")
    assert [(run.id, run.token, run.payload) for run in taker.runs] == [(parent.id, 2, b'{"n":1}')]
    assert await ledger.state(parent) == "running"


async def test_a_retried_run_is_handed_over(ledger: Ledger):
    """So does a retry."""
    run = await ledger.running()
    taker = hand(ledger)
    await ledger.settle(run, Suspended(None, 10**9))
    await ledger.store.cancel(run.id, "x")
    again = await ledger.store.retry(run.id)
    assert (again.state, again.token) == (State.RUNNING, 2)
    assert [given.id for given in taker.runs] == [run.id]


async def test_a_running_run_hears_of_its_cancel(ledger: Ledger):
    """The worker is told which of its runs a door asked to cancel; a claim after a crash carries
    the flag.
    """
    taker = hand(ledger)
    (run,) = await ledger.recorded(ledger.run())
    await ledger.store.cancel(run.id, "stop")
    await eventually(lambda: taker.cancels, "the worker hears of the cancel")
    assert taker.cancels == [run.id]
    assert await ledger.state(run) == "running"


async def test_what_was_taken_goes_back_when_the_batch_fails(ledger: Ledger):
    """Bad content in one op undoes the shared transaction: the runs taken go back, and are recorded
    and given again.
    """
    taker = hand(ledger)
    bad = ledger.arrival("bad", ledger.run())
    bad.body = object()  # type: ignore[assignment]
    good = ledger.arrival("good", ledger.run())
    first, failed = await ledger.together(RecordEvents([good]), RecordEvents([bad]))
    assert isinstance(failed, StoreError) and first[0].ledger_id == good.id
    await eventually(lambda: taker.runs, "the good run is handed over")
    assert [(run.id, run.token) for run in taker.runs] == [(good.runs[0].id, 1)]


def test_a_worker_whose_loop_is_gone(ledger: Ledger, reopen: Reopen):
    """Runs handed to a loop that was closed are found again by the next epoch."""

    async def attach() -> None:
        hand(ledger)

    asyncio.run(attach())
    (run,) = asyncio.run(ledger.recorded(ledger.run()))
    wait_until(lambda: asyncio.run(ledger.state(run)) == "running", "the run was taken")
    assert [again.id for again in asyncio.run(reopen().claimed())] == [run.id]
