"""Tools to test flows with: a virtual clock, a trigger fed by the test, and waits for completion.

Only time is simulated: the App, its worker and its SQLite file are the real ones.

    async def test_a_day_of_backoff_passes_in_milliseconds():
        orders = MemoryTrigger("orders")
        app = App("shop")
        app.on(orders, handle)
        async with running(app):
            await orders.send(data={"order": {"id": 7}})
            assert (await drain(app))["completed"] == 1

Works with any test runner that can run a coroutine. Nothing in eventflow imports this package.
Authors of triggers: trigger_contract.py checks that a trigger keeps the contract of all triggers.
"""

from eventflow.testing.apps import MemoryTrigger, running
from eventflow.testing.clock import VirtualClock
from eventflow.testing.drain import drain, result_of
from eventflow.testing.idle import Stuck
from eventflow.testing.journal import JournalCall, events_of, journal_of

__all__ = [
    "JournalCall",
    "MemoryTrigger",
    "Stuck",
    "VirtualClock",
    "drain",
    "events_of",
    "journal_of",
    "result_of",
    "running",
]
