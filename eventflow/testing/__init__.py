"""What users test their flows with: a clock that stands still, a trigger fed by hand, and the wait
for everything to be done.

Nothing is faked but time: the App, its worker and its SQLite file are the real ones.

    async def test_a_day_of_backoff_passes_in_milliseconds():
        orders = MemoryTrigger("orders")
        app = App("shop")
        app.on(orders, handle)
        async with running(app):
            await orders.send(data={"order": {"id": 7}})
            assert (await drain(app))["completed"] == 1

Called by tests only; nothing in eventflow imports it. Works with any test runner that can run a
coroutine.
"""

from eventflow.testing.apps import MemoryTrigger, running
from eventflow.testing.clock import VirtualClock
from eventflow.testing.drain import drain, result_of
from eventflow.testing.idle import Stuck
from eventflow.testing.journal import JournalCall, events_of, journal_of

__all__ = [
    "MemoryTrigger",
    "JournalCall",
    "Stuck",
    "VirtualClock",
    "drain",
    "events_of",
    "journal_of",
    "result_of",
    "running",
]
