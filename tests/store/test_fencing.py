"""P7: whoever lost a run can write nothing of it, also while another works on the run."""

import pytest

from eventflow.runs.run import Completed, Suspended
from eventflow.store.protocol import Append, Appended, Fenced, MarkStarted, Settle
from tests.store.ledger import SECOND, Ledger, value

pytestmark = pytest.mark.anyio


async def test_p7_an_earlier_claim_of_a_running_run_is_fenced(ledger: Ledger):
    """A run that was claimed again has a higher token. Marks, values and outcomes under the earlier
    one are refused, with both tokens named; those of the present owner are recorded.
    """
    first = await ledger.running()
    await ledger.settle(first, Suspended(ledger.clock.now(), seen_batch=1 << 40))
    (second,) = await ledger.claimed()
    assert second.id == first.id and second.token > first.token
    for op in (
        MarkStarted(first.id, first.token),
        Append(first.id, first.token, [value("step#0", b'"stolen"')]),
        Settle(first.id, first.token, Completed(b'"stolen"')),
    ):
        reply = await ledger.do(op)
        assert isinstance(reply, Fenced)
        assert f"its token is {second.token}, this one is {first.token}" in reply.reason
    assert await ledger.state(second) == "running"
    assert isinstance(await ledger.append(second, value("step#0", b'"mine"')), Appended)
    await ledger.settle(second, Completed(b'"mine"'))
    assert (await ledger.store.run(second.id))["result"] in (b'"mine"', "mine")


async def test_a_run_that_is_claimed_again_keeps_its_start(ledger: Ledger):
    """`started_at` is the time of the first claim: a timeout counts from there."""
    first = await ledger.running()
    await ledger.settle(first, Suspended(ledger.clock.now() + 5 * SECOND, seen_batch=1 << 40))
    ledger.clock.forward(60)
    (second,) = await ledger.claimed()
    assert second.started_at == first.started_at is not None
