"""`retry` of a run that waits, and `retry_from`: what the rows say afterwards."""

from collections.abc import Sequence

import pytest

from eventflow.core.errors import NotFound, UsageError
from eventflow.runs.journal import RERUN_NOTE, RETRY_NOTE, Entry, Kind
from eventflow.runs.run import Run, State, Suspended, format_id
from tests.store.ledger import SECOND, Ledger, Reopen, error, value

pytestmark = pytest.mark.anyio


def failed(call: str, due_at: int, attempt: int = 1) -> Entry:
    return Entry(
        call_key=call, kind=Kind.FAILED, attempt=attempt, due_at=due_at, error=b'{"type":"E"}'
    )


def known(call: str, after: int) -> Entry:
    """A value with the commit that the flow had received when it made the call."""
    return Entry(
        call_key=call,
        kind=Kind.VALUE,
        attempt=1,
        codec="json",
        value=b"1",
        after=after,
        waited=0,
        took=1,
    )


async def test_a_waiting_attempt_is_due_now(ledger: Ledger, reopen: Reopen):
    """WAITING → PENDING at once; the journal says so too, with a checksum that holds."""
    run = await ledger.running()
    later = ledger.clock.now() + 3600 * SECOND
    await ledger.append(run, value("a#1"), failed("b#1", later))
    await ledger.settle(run, Suspended(later, 10**9, 2))
    assert await ledger.claimed() == []
    assert (await ledger.store.retry(run.id)).state is State.PENDING
    ledger = reopen()
    (claimed,) = await ledger.claimed()
    (_, entry) = await ledger.store.load(claimed.id)
    assert entry.call_key == "b#1" and (entry.due_at or 0) <= ledger.clock.now()
    assert await ledger.store.check() == []


async def test_a_sleep_is_not_cut_short(ledger: Ledger):
    """A run that sleeps is refused with the reason, and keeps its due time."""
    run = await ledger.running()
    until = ledger.clock.now() + 3600 * SECOND
    await ledger.settle(run, Suspended(until, 10**9))
    with pytest.raises(UsageError, match="own sleep or timeout"):
        await ledger.store.retry(run.id)
    assert (await ledger.store.run(run.id))["due_at"] == until


async def test_a_wait_for_a_child_names_the_child(ledger: Ledger):
    """A parent cannot start before its child has answered: the child is named."""
    run = await ledger.running()
    child = ledger.run("child", parent=run.id, parent_call_key="c#1")
    await ledger.append(run, children=[child])
    await ledger.settle(run, Suspended(None, 10**9))
    with pytest.raises(UsageError, match=format_id(child.id)):
        await ledger.store.retry(run.id)


async def ended(ledger: Ledger, *commits: Sequence[Entry]) -> Run:
    run = await ledger.running(params=b'{"n":1}')
    for entries in commits:
        await ledger.append(run, *entries)
    await ledger.settle(run)
    return run


async def calls(ledger: Ledger, run: int) -> list[str]:
    return [entry.call_key for entry in await ledger.store.load(run) if entry.kind is not Kind.NOTE]


async def test_a_new_run_keeps_what_came_before_the_call(ledger: Ledger, reopen: Reopen):
    """Values of earlier commits are copied with their places, the call and later ones are not; the
    old run stays; the sum holds after a restart, and the new run is claimed with its journal.
    """
    run = await ended(ledger, [value("a#1")], [value("b#1")], [value("c#1")])
    before = await ledger.store.load(run.id)
    new = ledger.ids.next(ledger.clock.now())
    assert (await ledger.store.retry_from(run.id, "b#1", new)).id == new
    ledger = reopen()
    (claimed,) = await ledger.claimed()
    assert (claimed.id, claimed.token, claimed.params, claimed.payload) == (
        new,
        2,
        b'{"n":1}',
        b'{"n":1}',
    )
    assert (claimed.flow, claimed.event) == (run.flow, run.event)
    kept, note, times = await ledger.store.load(new)
    assert (kept.call_key, kept.batch, kept.at) == ("a#1", before[0].batch, before[0].at)
    assert note.call_key == RERUN_NOTE
    assert (times.call_key, times.due_at) == (RETRY_NOTE, ledger.clock.now())
    assert await ledger.store.load(run.id) == before
    assert (await ledger.store.run(run.id))["state"] == "completed"
    counts = await ledger.store.counts()
    assert (counts["accepted"], counts["completed"], counts["pending"]) == (2, 1, 1)
    assert run.event is not None
    assert (await ledger.store.event(run.event))["verdicts"][-1] == ["s", "run", new]
    assert await ledger.store.check() == []


async def test_concurrent_calls_are_kept(ledger: Ledger):
    """Of calls that ended later, those are kept that the flow had made before it received the end
    of the call; errors that came with it or later are not.
    """
    first = await ended(ledger, [value("a#1")])
    start = (await ledger.store.load(first.id))[0].batch
    run = await ended(
        ledger,
        [known("a#1", 0)],
        [known("b#1", start)],
        [known("other#1", start), error("broken#1")],
        [known("after#1", 10**9), Entry(call_key="~t", kind=Kind.TIMER)],
    )
    new = ledger.ids.next(ledger.clock.now())
    await ledger.store.retry_from(run.id, "b", new)
    assert await calls(ledger, new) == ["a#1", "other#1"]


async def test_what_cannot_be_repeated_is_refused(ledger: Ledger):
    """A live run, a child, an unknown or ambiguous call, no run: each with what to do."""
    run = await ended(ledger, [value("a#1"), value("a#2")])
    new = ledger.ids.next(ledger.clock.now())
    for call, message in (("z#1", "no call 'z#1'; say which call: a#1, a#2"), ("a", "2 calls")):
        with pytest.raises(UsageError, match=message):
            await ledger.store.retry_from(run.id, call, new)
    with pytest.raises(NotFound):
        await ledger.store.retry_from(7, "a#1", new)
    parent = await ledger.running()
    await ledger.append(parent, children=[ledger.run(parent=parent.id, parent_call_key="c#1")])
    (child,) = await ledger.claimed()
    with pytest.raises(UsageError, match="running; only a run that has ended"):
        await ledger.store.retry_from(child.id, "a#1", new)
    await ledger.settle(child)
    with pytest.raises(UsageError, match="--from c#1"):
        await ledger.store.retry_from(child.id, "a#1", new)
    assert (await ledger.store.counts())["runs"] == 3
