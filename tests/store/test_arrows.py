"""Each arrow of the state machine in the head of run.py, by the store method that is that arrow;
and the fence (P7).
"""

import pytest

from eventflow.core.errors import UsageError
from eventflow.runs.journal import Entry, Kind
from eventflow.runs.run import (
    Cancelled,
    Completed,
    Failed,
    Interrupted,
    NeedsAttention,
    Outcome,
    Restarted,
    State,
    Suspended,
)
from eventflow.store.protocol import Append, Appended, Fenced, MarkStarted, Settle, Settled
from tests.store.ledger import SECOND, Ledger, Reopen, error, value

pytestmark = pytest.mark.anyio


async def test_claim_makes_a_pending_run_running(ledger: Ledger):
    """PENDING → RUNNING: the run comes with its event's body, a new token and its first start."""
    (run,) = await ledger.recorded(ledger.run(params=b'{"p":1}', priority=3, depth=2))
    ledger.clock.forward(2)
    (claimed,) = await ledger.claimed()
    assert (claimed.id, claimed.state, claimed.token, claimed.started_at) == (
        run.id,
        State.RUNNING,
        1,
        ledger.clock.now(),
    )
    assert (claimed.payload, claimed.params, claimed.priority, claimed.depth) == (
        b'{"n":1}',
        b'{"p":1}',
        3,
        2,
    )
    assert await ledger.claimed() == []


@pytest.mark.parametrize(
    ("outcome", "label", "column"),
    [
        (Completed(b"[1]", "json", unclaimed_entries=2), "completed", "completed"),
        (Failed(b'{"type":"E"}'), "failed", "failed"),
        (Cancelled("user"), "cancelled", "cancelled"),
        (NeedsAttention("diverged"), "held", "pending"),
    ],
)
async def test_an_outcome_ends_the_claim(ledger: Ledger, outcome: Outcome, label: str, column: str):
    """RUNNING → COMPLETED, FAILED, CANCELLED or HELD, with what the outcome says; the delivery
    moves in P9's sum.
    """
    run = await ledger.running()
    assert isinstance(await ledger.settle(run, outcome), Settled)
    row = await ledger.store.run(run.id)
    assert row["state"] == label
    match outcome:
        case Completed():
            assert (row["result"], row["codec"], row["unclaimed_entries"]) == (b"[1]", "json", 2)
        case Failed():
            assert row["error"] == b'{"type":"E"}'
        case _:
            assert row["reason"] == outcome.reason  # type: ignore[union-attr]
    assert (row["finished_at"] is None) == (label == "held")
    assert (await ledger.store.counts())[column] == 1


async def test_suspended_until_an_instant(ledger: Ledger):
    """RUNNING → WAITING → PENDING: not claimable before its instant, claimable from it on, by a
    later token (P6).
    """
    run = await ledger.running()
    await ledger.settle(run, Suspended(ledger.clock.now() + 60 * SECOND, 0))
    assert await ledger.state(run) == "waiting"
    ledger.clock.forward(59.9)
    assert await ledger.claimed() == []
    ledger.clock.forward(0.1)
    (again,) = await ledger.claimed()
    assert (again.id, again.token, again.crash_suspect) == (run.id, 2, False)
    assert again.started_at == run.started_at


async def test_suspended_until_woken(ledger: Ledger):
    """A run that waits for no instant is never due by itself."""
    run = await ledger.running()
    await ledger.settle(run, Suspended(None, 0))
    ledger.clock.forward(10 * 365 * 86_400)
    assert await ledger.claimed() == []
    assert (await ledger.store.run(run.id))["due_at"] is None


async def test_suspended_with_something_unseen_is_due_at_once(ledger: Ledger):
    """When the journal holds a batch the flow has not seen, the run does not sleep."""
    run = await ledger.running()
    appended: Appended = await ledger.append(run, value())
    await ledger.settle(run, Suspended(None, appended.batch - 1))
    (again,) = await ledger.claimed()
    await ledger.settle(again, Suspended(None, appended.batch))
    assert await ledger.state(run) == "waiting"


async def test_suspended_sees_an_entry_of_its_own_batch(ledger: Ledger):
    """Append and Settle in one transaction: the entry counts as unseen."""
    run = await ledger.running()
    await ledger.together(
        Append(run.id, run.token, [value()]), Settle(run.id, run.token, Suspended(None, 10**9))
    )
    assert await ledger.state(run) == "pending"


async def test_suspended_with_a_cancel_pending_is_due_at_once(ledger: Ledger):
    """A cancel that came while it ran is not slept over."""
    run = await ledger.running()
    await ledger.store.cancel(run.id, "stop")
    await ledger.settle(run, Suspended(None, 10**9))
    (again,) = await ledger.claimed()
    assert again.cancel_requested


async def test_interrupted_goes_back_as_it_was(ledger: Ledger):
    """RUNNING → PENDING by a drain: due now, no suspicion, and the token grows so that the old
    one is stale (P7).
    """
    run = await ledger.running()
    await ledger.mark(run)
    await ledger.settle(run, Interrupted())
    (again,) = await ledger.claimed()
    assert (again.token, again.crash_suspect, again.crash_count) == (2, False, 0)
    assert isinstance(await ledger.settle(run), Fenced)


async def test_a_restart_keeps_the_id(ledger: Ledger):
    """RUNNING → PENDING with other parameters: the journal is the one entry given, start and
    children are let go.
    """
    run = await ledger.running(params=b'{"old":1}')
    child = ledger.run("child", parent=run.id, parent_call_key="c#1")
    await ledger.append(run, value(), children=[child])
    (child,) = await ledger.claimed()
    first = Entry(call_key="begun", kind=Kind.NOTE, attempt=1)
    ledger.clock.forward(5)
    *_, settled = await ledger.together(
        Append(run.id, run.token, [value("b#1")]),
        Settle(run.id, run.token, Restarted(b'{"new":12}', first)),
        Settle(child.id, child.token, Completed(b"1"), value("c#1"), run.id),
    )
    assert isinstance(settled, Settled) and settled.answer is None
    assert [entry.call_key for entry in await ledger.store.load(run.id)] == ["begun"]
    (again,) = await ledger.claimed()
    assert (again.id, again.token, again.params, again.started_at) == (
        run.id,
        2,
        b'{"new":12}',
        ledger.clock.now(),
    )
    again_child = ledger.run("child", parent=run.id, parent_call_key="c#1")
    assert isinstance(await ledger.append(again, value(), children=[again_child]), Appended)
    assert {row["id"] for row in await ledger.store.runs(parent=run.id)} == {
        child.id,
        again_child.id,
    }


async def test_a_crash_leaves_a_suspect(ledger: Ledger, reopen: Reopen):
    """RUNNING → PENDING by the next epoch, at once and without waiting for a timeout; a second
    crash changes nothing more.
    """
    run = await ledger.running()
    suspended = await ledger.running()
    await ledger.settle(suspended, Suspended(None, 0))
    reopen()
    ledger = reopen()
    (again,) = await ledger.claimed()
    assert (again.id, again.token, again.crash_suspect, again.crash_count) == (run.id, 2, True, 0)
    assert await ledger.state(suspended) == "waiting"


async def test_the_third_death_quarantines(ledger: Ledger, reopen: Reopen):
    """RUNNING → DEAD when three attempts were started and nothing was recorded after: the run
    counts as dead, others stay pending.
    """
    run = await ledger.running()
    for crashes in (1, 2):
        await ledger.mark(run)
        ledger = reopen()
        (run,) = await ledger.claimed()
        assert run.crash_count == crashes
    await ledger.mark(run)
    ledger = reopen()
    assert await ledger.claimed() == []
    row = await ledger.store.run(run.id)
    assert row["state"] == "dead" and "crashed 3 times" in row["reason"]
    counts = await ledger.store.counts()
    assert (counts["dead"], counts["pending"]) == (1, 0)


async def test_an_entry_with_proof_clears_suspicion(ledger: Ledger, reopen: Reopen):
    """An entry of a crash suspect shows progress: its crash count is 0 again."""
    run = await ledger.running()
    await ledger.mark(run)
    ledger = reopen()
    (run,) = await ledger.claimed()
    await ledger.append(run, value(), clears_suspicion=True)
    ledger = reopen()
    (run,) = await ledger.claimed()
    assert (run.crash_suspect, run.crash_count) == (True, 0)


@pytest.mark.parametrize("state", ["failed", "cancelled", "held", "dead"])
async def test_retry_is_an_arrow_back(ledger: Ledger, reopen: Reopen, state: str):
    """FAILED, CANCELLED, HELD, DEAD → PENDING: values stay, errors become CLEARED, the outcome and
    the crash count are cleared.
    """
    run = await ledger.running()
    await ledger.append(run, value("a#1"), error("b#1", attempt=2))
    if state == "dead":
        for _ in range(3):
            await ledger.mark(run)
        ledger = reopen()
    else:
        outcomes: dict[str, Outcome] = {
            "failed": Failed(b"{}"),
            "cancelled": Cancelled("x"),
            "held": NeedsAttention("x"),
        }
        await ledger.settle(run, outcomes[state])
    assert await ledger.state(run) == state
    again = await ledger.store.retry(run.id)
    assert (again.id, again.state, again.crash_count, again.crash_suspect) == (
        run.id,
        State.PENDING,
        0,
        False,
    )
    row = await ledger.store.run(run.id)
    assert (row["reason"], row["error"], row["finished_at"]) == (None, None, None)
    entries = {entry.call_key: entry for entry in await ledger.store.load(run.id)}
    assert (entries["a#1"].kind, entries["a#1"].value) == (Kind.VALUE, b"1")
    assert (entries["b#1"].kind, entries["b#1"].attempt) == (Kind.CLEARED, 2)
    assert (await ledger.store.counts())["pending"] == 1
    assert [claimed.id for claimed in await ledger.claimed()] == [run.id]


@pytest.mark.parametrize("state", ["pending", "running", "waiting", "completed"])
async def test_there_is_no_retry_from_elsewhere(ledger: Ledger, state: str):
    """A run that is live or completed is left alone, and the message says in which state it is."""
    (run,) = await ledger.recorded(ledger.run())
    if state != "pending":
        (run,) = await ledger.claimed()
    if state == "waiting":
        await ledger.settle(run, Suspended(None, 0))
    if state == "completed":
        await ledger.settle(run)
    with pytest.raises(UsageError, match=state):
        await ledger.store.retry(run.id)


async def test_cancel_ends_what_has_not_begun(ledger: Ledger):
    """PENDING before its start, PAUSED, HELD → CANCELLED at once, with the reason."""
    (paused,) = await ledger.recorded(ledger.run(state=State.PAUSED))
    (pending,) = await ledger.recorded(ledger.run(due_at=ledger.clock.now() + SECOND))
    held = await ledger.running()
    await ledger.settle(held, NeedsAttention("look"))
    for run, before in ((pending, State.PENDING), (paused, State.PAUSED), (held, State.HELD)):
        assert await ledger.store.cancel(run.id, "not wanted") is before
        row = await ledger.store.run(run.id)
        assert (row["state"], row["reason"]) == ("cancelled", "not wanted")
    assert (await ledger.store.counts())["cancelled"] == 3


@pytest.mark.parametrize("outcome", [Suspended(None, 0), Interrupted()], ids=["asleep", "pending"])
async def test_cancel_wakes_what_has_begun(ledger: Ledger, reopen: Reopen, outcome: Outcome):
    """WAITING, PENDING after its start → PENDING, due now, with the cancel in its journal, also
    after a crash: its flow may clean up. A second cancel ends it at once.
    """
    run, forced = await ledger.running(), await ledger.running()
    for each in (run, forced):
        await ledger.settle(each, outcome)
        await ledger.store.cancel(each.id, "not wanted")
        assert await ledger.state(each) == "pending"
    assert await ledger.store.cancel(forced.id, "now") is State.PENDING
    assert await ledger.state(forced) == "cancelled"
    ledger = reopen()
    (again,) = await ledger.claimed()
    assert (again.id, again.cancel_requested) == (run.id, True)
    (entry,) = await ledger.store.load(run.id)
    assert (entry.kind, entry.value) == (Kind.CANCEL, b'"not wanted"')
    await ledger.settle(again, Cancelled("not wanted"))
    counts = await ledger.store.counts()
    assert (counts["cancelled"], counts["pending"]) == (2, 0)


async def test_a_paused_run_waits_for_its_trigger(ledger: Ledger, reopen: Reopen):
    """Recorded as PAUSED it is pending in P9's sum, is not claimed, also after a restart; `resume`
    → PENDING, due now.
    """
    await ledger.store.set_paused("t", True)
    (paused,) = await ledger.recorded(ledger.run(state=State.PAUSED))
    assert await ledger.claimed() == [] and await ledger.state(paused) == "paused"
    ledger = reopen()
    assert await ledger.claimed() == [] and await ledger.state(paused) == "paused"
    assert (await ledger.store.counts())["pending"] == 1
    await ledger.store.set_paused("t", False)
    assert await ledger.state(paused) == "pending"
    assert [run.id for run in await ledger.claimed()] == [paused.id]
    assert await ledger.store.check() == []


async def test_resume_releases_paused_runs_alone(ledger: Ledger):
    """Those of its own trigger, in the order of their key; a run that a person must look at
    stays HELD, whatever it was before.
    """
    other = ledger.run(state=State.PAUSED)
    await ledger.store.record([ledger.arrival("other", other, trigger="u")], trigger="u")
    first, second = await ledger.recorded(
        ledger.run(ordering_key="x", state=State.PAUSED),
        ledger.run(ordering_key="x", state=State.PAUSED),
    )
    diverged = await ledger.store.retry(first.id)
    (diverged,) = await ledger.claimed()
    await ledger.settle(diverged, NeedsAttention("diverged"))
    await ledger.store.set_paused("t", False)
    states = [await ledger.state(run) for run in (other, first, second)]
    assert states == ["paused", "held", "pending"]
    assert await ledger.claimed() == []  # the held one is the head of their ordering key
    await ledger.store.cancel(first.id, "not wanted")
    assert [run.id for run in await ledger.claimed()] == [second.id]
    assert await ledger.store.check() == []


async def test_retry_releases_one_paused_run(ledger: Ledger):
    """PAUSED → PENDING of one run; the others wait for their trigger."""
    first, second = await ledger.recorded(*(ledger.run(state=State.PAUSED) for _ in range(2)))
    assert (await ledger.store.retry(first.id)).state is State.PENDING
    assert [run.id for run in await ledger.claimed()] == [first.id]
    assert await ledger.state(second) == "paused"


async def test_cancel_of_a_settled_run_changes_nothing(ledger: Ledger):
    """What has ended stays as it ended."""
    run = await ledger.running()
    await ledger.settle(run)
    assert await ledger.store.cancel(run.id, "late") is State.COMPLETED
    assert await ledger.state(run) == "completed"


# --------------------------------------------------------------------------- the fence


@pytest.mark.parametrize("label", ["stale token", "settled", "unknown"])
async def test_p7_a_stale_claim_writes_nothing(ledger: Ledger, reopen: Reopen, label: str):
    """Append with its arrivals and children, Mark and Settle are refused whole when the token does
    not own the run.
    """
    run = await ledger.running()
    if label == "stale token":
        ledger = reopen()
        await ledger.claimed()
    elif label == "settled":
        await ledger.settle(run)
    else:
        run.id += 1000
    before = await ledger.store.counts()
    child = ledger.run(parent=run.id, parent_call_key="c#1")
    op = Append(run.id, run.token, [value()], [ledger.arrival("emitted", ledger.run())], [child])
    replies = await ledger.together(
        op, MarkStarted(run.id, run.token), Settle(run.id, run.token, Completed(b"2"))
    )
    assert [type(reply) for reply in replies] == [Fenced, Fenced, Fenced]
    assert await ledger.store.counts() == before
    assert await ledger.store.load(run.id) == []


async def test_p7_nothing_follows_a_settle(ledger: Ledger):
    """Ops of one batch see each other: after Settle, an Append and a second Settle of the same
    claim are refused.
    """
    run = await ledger.running()
    first, second, third = await ledger.together(
        Settle(run.id, run.token, Completed(b"1")),
        Append(run.id, run.token, [value()]),
        Settle(run.id, run.token, Failed(b"{}")),
    )
    assert (type(first), type(second), type(third)) == (Settled, Fenced, Fenced)
    assert await ledger.state(run) == "completed"


async def test_p4_an_entry_is_recorded_once(ledger: Ledger):
    """The same claim, attempt and kind again is refused whole, with the events it would emit; the
    first value stays.
    """
    run = await ledger.running()
    await ledger.append(run, value(data=b"1"))
    refused = await ledger.append(
        run, value("b#1"), value(data=b"2"), arrivals=[ledger.arrival("emitted")]
    )
    assert isinstance(refused, Fenced)
    assert [(entry.call_key, entry.value) for entry in await ledger.store.load(run.id)] == [
        ("a#1", b"1")
    ]
    assert (await ledger.store.counts())["events"] == 1


async def test_p4_a_refused_entry_does_not_harm_its_batch(ledger: Ledger):
    """Others in the same transaction are recorded, those of the same run too."""
    run, other = await ledger.running(), await ledger.running()
    replies = await ledger.together(
        Append(run.id, run.token, [value(data=b"1")]),
        Append(run.id, run.token, [value(data=b"2")]),
        Append(other.id, other.token, [value()]),
        Settle(run.id, run.token, Completed(b"3")),
    )
    assert [type(reply) for reply in replies] == [Appended, Fenced, Appended, Settled]
    assert [entry.value for entry in await ledger.store.load(run.id)] == [b"1"]


async def test_a_journal_comes_back_as_it_went_in(ledger: Ledger, reopen: Reopen):
    """Every field of every kind, in (batch, position) order, with the commit's time; the numbers
    grow over restarts.
    """
    run = await ledger.running()
    given = [
        Entry(
            call_key="z#1",
            kind=kind,
            attempt=n,
            due_at=n * 7 or None,
            fingerprint=b"\0f",
            codec="c",
            value=b"\xff",
            error=b"e",
        )
        for n, kind in enumerate(Kind)
    ]
    first: Appended = await ledger.append(run, *given)
    second: Appended = await ledger.append(run, value("a#1"), value("a#2"))
    assert second.batch > first.batch and first.at == ledger.clock.now()
    assert [(entry.batch, entry.position) for entry in second.entries] == [
        (second.batch, 0),
        (second.batch, 1),
    ]
    ledger = reopen()
    assert await ledger.store.load(run.id) == [*first.entries, *second.entries]
    (run,) = await ledger.claimed()
    third: Appended = await ledger.append(run, value("a#3"))
    assert third.batch > second.batch


async def test_time_in_the_ledger_never_steps_back(ledger: Ledger, reopen: Reopen):
    """A clock set back neither lowers a commit's time nor keeps what is due from being claimed."""
    before = ledger.clock.now()
    run = await ledger.running()
    await ledger.recorded(ledger.run())
    ledger.clock.forward(-86_400)
    ledger = reopen()
    appended: Appended = await ledger.append((await ledger.claimed(1))[0], value())
    assert appended.at >= before
    assert len(await ledger.claimed()) == 1
    assert run.token == 1
