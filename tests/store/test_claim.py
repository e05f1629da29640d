"""Which due runs a claim gives: fair between flows, by priority then age within one, heads of
ordering keys only, within caps.
"""

import pytest

from eventflow.runs.run import Cancelled, Completed, Failed, NeedsAttention, Run, Suspended
from eventflow.store.claim import due_groups
from eventflow.store.protocol import Claim, Claimed
from tests.store.ledger import SECOND, Ledger, Reopen

pytestmark = pytest.mark.anyio


async def test_round_robin_over_flows(ledger: Ledger):
    """A flow with a long backlog does not hold up the others."""
    await ledger.recorded(
        *[ledger.run("busy") for _ in range(20)], ledger.run("b"), ledger.run("c")
    )
    flows = [run.flow for run in await ledger.claimed(6)]
    assert sorted(flows[:3]) == ["b", "busy", "c"] and flows[3:] == ["busy"] * 3


async def test_priority_then_age(ledger: Ledger):
    """Within a flow the higher priority goes first, among equals the older."""
    runs = [ledger.run(priority=priority) for priority in (0, 5, 0, -1, 5)]
    await ledger.recorded(*reversed(runs))
    claimed = [run.id for run in await ledger.claimed()]
    assert claimed == [runs[n].id for n in (1, 4, 0, 2, 3)]


async def test_a_waiting_run_that_is_due_takes_its_turn(ledger: Ledger):
    """WAITING and PENDING runs that are due are one queue."""
    slept = await ledger.running(priority=1)
    await ledger.settle(slept, Suspended(ledger.clock.now() + SECOND, 10**9))
    low, high = await ledger.recorded(ledger.run(priority=0), ledger.run(priority=2))
    ledger.clock.forward(1)
    assert [run.id for run in await ledger.claimed()] == [high.id, slept.id, low.id]


async def test_caps_bound_a_flow(ledger: Ledger):
    """`caps` bounds how many of a flow one claim gives; 0 gives none, absent means no bound; `more`
    reports the rest.
    """
    await ledger.recorded(*[ledger.run(flow) for flow in "aaabbbccc"])
    reply: Claimed = await ledger.do(Claim(100, {"a": 1, "b": 0}))
    assert sorted(run.flow for run in reply.runs) == ["a", "c", "c", "c"] and reply.has_more
    reply = await ledger.do(Claim(100, {}))
    assert (
        sorted(run.flow for run in reply.runs) == ["a", "a", "b", "b", "b"] and not reply.has_more
    )


async def test_more_and_next_due(ledger: Ledger):
    """`more` when the limit left due runs behind; `next_due` is the earliest instant at which
    another run becomes due.
    """
    now = ledger.clock.now()
    await ledger.recorded(ledger.run(), ledger.run(), ledger.run("g", due_at=now + 9 * SECOND))
    reply: Claimed = await ledger.do(Claim(1, {}))
    assert (reply.has_more, reply.next_due) == (True, now + 9 * SECOND)
    (run,) = await ledger.claimed()
    await ledger.settle(run, Suspended(now + 5 * SECOND, 10**9))
    reply = await ledger.do(Claim(5, {}))
    assert (reply.has_more, reply.next_due) == (False, now + 5 * SECOND)
    ledger.clock.forward(5)
    assert len(await ledger.claimed()) == 1
    ledger.clock.forward(4)
    reply = await ledger.do(Claim(5, {}))
    assert [run.flow for run in reply.runs] == ["g"]
    assert (reply.has_more, reply.next_due) == (False, None)


async def test_p6_not_before_it_is_due(ledger: Ledger):
    """A run recorded for later is claimed at its instant, not a microsecond before."""
    (run,) = await ledger.recorded(ledger.run(due_at=ledger.clock.now() + SECOND))
    ledger.clock.time += SECOND - 1
    assert await ledger.claimed() == []
    ledger.clock.time += 1
    assert [claimed.id for claimed in await ledger.claimed()] == [run.id]


# --------------------------------------------------------------------------- ordering keys


async def test_a_lane_moves_when_its_run_settles(ledger: Ledger):
    """Of an ordering key one run at a time, in order; other keys and flows do not wait."""
    a1, a2, b1, _, other = await ledger.recorded(
        *(ledger.run(ordering_key=key) for key in ("a", "a", "b", "b")),
        ledger.run("g", ordering_key="a"),
    )
    first = await ledger.claimed()
    assert {run.id for run in first} == {a1.id, b1.id, other.id}
    assert await ledger.claimed() == []
    await ledger.settle(next(run for run in first if run.id == a1.id))
    assert [run.id for run in await ledger.claimed()] == [a2.id]


@pytest.mark.parametrize("outcome", [Failed(b"{}"), Completed(b"1")])
async def test_failure_frees_a_lane(ledger: Ledger, outcome: Failed | Completed):
    """Whatever the end, the next one goes."""
    await ledger.recorded(ledger.run(ordering_key="a"), ledger.run(ordering_key="a"))
    (head,) = await ledger.claimed()
    await ledger.settle(head, outcome)
    assert len(await ledger.claimed()) == 1


@pytest.mark.parametrize("outcome", [Suspended(None, 10**9), NeedsAttention("look")])
async def test_sleep_and_hold_keep_a_lane(ledger: Ledger, outcome: Suspended | NeedsAttention):
    """A live run keeps its place, whether it runs or not; the end of its cancel lets the next one
    go.
    """
    _, second = await ledger.recorded(*(ledger.run(ordering_key="a") for _ in range(2)))
    (head,) = await ledger.claimed()
    await ledger.settle(head, outcome)
    assert await ledger.claimed() == []
    await ledger.store.cancel(head.id, "x")
    if isinstance(outcome, Suspended):  # it may clean up first
        (again,) = await ledger.claimed()
        assert again.id == head.id
        await ledger.settle(again, Cancelled("x"))
    assert [run.id for run in await ledger.claimed()] == [second.id]


async def test_cancelling_one_that_waits_for_its_lane(ledger: Ledger):
    """It leaves the queue; the head stays the head."""
    _, second, third = await ledger.recorded(*(ledger.run(ordering_key="a") for _ in range(3)))
    (head,) = await ledger.claimed()
    await ledger.store.cancel(second.id, "x")
    assert await ledger.claimed() == []
    await ledger.settle(head)
    assert [run.id for run in await ledger.claimed()] == [third.id]


async def test_a_retried_run_gets_back_in_line(ledger: Ledger):
    """A run retried under a busy ordering key waits for the one that runs, then goes before the
    younger ones.
    """
    old, _, young = await ledger.recorded(*(ledger.run(ordering_key="a") for _ in range(3)))
    (head,) = await ledger.claimed()
    await ledger.settle(head, Failed(b"{}"))
    (busy,) = await ledger.claimed()
    await ledger.store.retry(old.id)
    assert await ledger.claimed() == []
    await ledger.settle(busy)
    (again,) = await ledger.claimed()
    assert again.id == old.id
    await ledger.settle(again)
    assert [run.id for run in await ledger.claimed()] == [young.id]


async def test_lanes_survive_a_crash(ledger: Ledger, reopen: Reopen):
    """The head that was running is the head that is claimed again."""
    head, _ = await ledger.recorded(ledger.run(ordering_key="a"), ledger.run(ordering_key="a"))
    await ledger.claimed()
    ledger = reopen()
    assert [run.id for run in await ledger.claimed()] == [head.id]


async def test_recording_late_into_a_lane_does_not_run_two(ledger: Ledger):
    """A run with a smaller id that arrives later (made earlier, committed later) waits for the one
    under way.
    """
    early = ledger.run(ordering_key="a")
    late = ledger.run(ordering_key="a")
    await ledger.recorded(late)
    await ledger.claimed()
    await ledger.recorded(early)
    assert await ledger.claimed() == []


async def test_a_long_lane_costs_what_a_short_one_does(ledger: Ledger):
    """Claims of other runs do not walk through runs that wait for an ordering key: the plan
    looks at claimable runs only.
    """
    runs: list[Run] = [ledger.run(ordering_key="a") for _ in range(3000)]
    await ledger.recorded(*runs, ledger.run("g"))
    assert {run.flow for run in await ledger.claimed(10)} == {"f", "g"}
    assert await ledger.claimed(10) == []


async def test_a_corrupt_run_is_held_not_run(ledger: Ledger, path: str):
    """A run whose event does not match its checksum is set aside with the reason; the others are
    given.
    """
    bad, good = (
        ledger.arrival("bad", ledger.run(), body=b'{"n":1}'),
        ledger.arrival("good", ledger.run()),
    )
    await ledger.store.record([bad, good])
    connection = ledger.store._connection
    assert connection is not None
    connection.execute("UPDATE events SET body = ? WHERE id = ?", (b'{"n":2}', bad.id))
    assert [run.id for run in await ledger.claimed()] == [good.runs[0].id]
    row = await ledger.store.run(bad.runs[0].id)
    assert row["state"] == "held" and "checksum" in row["reason"]
    connection.execute("UPDATE events SET body = ? WHERE id = ?", (b'{"n":1}', bad.id))


async def test_a_long_backlog_of_a_capped_flow_is_not_read_at_each_claim(ledger: Ledger):
    """Of a flow that may begin one run, a claim reads two, however many wait; of the others as many
    as it may take.
    """
    await ledger.recorded(
        *(ledger.run("capped") for _ in range(50)), *(ledger.run("free") for _ in range(5))
    )
    op = Claim(20, {"capped": 1, "free": 1 << 30})
    found = await ledger.store._read(due_groups, ledger.clock.now(), op)  # pyright: ignore[reportPrivateUsage]
    assert {group.flow: len(group.due) for group in found} == {"capped": 2, "free": 5}
