"""A manual retry gives a run its whole timeout again, and from scratch new identities."""

import pytest

from eventflow import App, flow, sleep
from eventflow.core.errors import RunTimedOut
from eventflow.runs.journal import RESTARTED_NOTE, RETRY_NOTE, TIMEOUT_KEY, Entry, Kind
from eventflow.runs.run import Failed, State, Suspended
from eventflow.testing import VirtualClock, drain, running
from tests.store.ledger import Ledger, value

pytestmark = pytest.mark.anyio


async def test_a_retry_gives_a_timed_out_run_its_time_anew(ledger: Ledger):
    """The recorded timeout is dropped with the error, and the clock of the timeout starts with the
    new claim.
    """
    run = await ledger.running()
    await ledger.append(run, value(), Entry(call_key=TIMEOUT_KEY, kind=Kind.TIMER))
    await ledger.settle(run, Failed(b'{"type":"RunTimedOut"}'))
    ledger.clock.forward(3600)
    await ledger.store.retry(run.id)
    (again,) = await ledger.claimed()
    assert [entry.call_key for entry in await ledger.store.load(run.id)] == [
        "a#1",
        RETRY_NOTE,
    ]
    assert again.started_at == ledger.clock.now()


async def test_a_fresh_retry_is_another_generation(ledger: Ledger):
    """Its first entry counts the restarts, so that what it emits is not taken for what the run
    before emitted.
    """
    run = await ledger.running()
    for restart in (1, 2):
        await ledger.append(run, value())
        await ledger.settle(run, Failed(b"{}"))
        await ledger.store.retry(run.id, discard_journal=True)
        (run,) = await ledger.claimed()
        entries = await ledger.store.load(run.id)
        assert [(entry.call_key, entry.attempt) for entry in entries] == [(RESTARTED_NOTE, restart)]


async def test_p6_a_suspended_run_with_an_entry_it_does_not_know_is_due_at_once(ledger: Ledger):
    """An answer may commit before one of the run's own entries without being delivered: the count
    gives it away.
    """
    run = await ledger.running()
    await ledger.append(run, value("child#0"))
    own = await ledger.append(run, value("own#0"))
    await ledger.settle(run, Suspended(None, own.batch, 1))
    assert await ledger.state(run) == State.PENDING.label
    (again,) = await ledger.claimed()
    await ledger.settle(again, Suspended(None, own.batch, 2))
    assert await ledger.state(run) == State.WAITING.label


@flow(timeout=60)
async def patient(naps: int) -> str:
    for _ in range(naps):
        await sleep(40)
    return "rested"


async def test_p6_a_run_that_timed_out_completes_when_it_is_retried():
    """Retried, a run whose flow took too long continues from its journal with its whole timeout
    before it.
    """
    async with running(App("naps", clock=VirtualClock())) as app:
        handle = await app.start(patient, naps=2)
        await drain(app)
        with pytest.raises(RunTimedOut):
            await handle.result()
        await app.store.retry(handle.number)
        await drain(app)
        assert await handle.result() == "rested"
