"""A trigger under test, as its tests see it: what its ledger recorded, and what it logged."""

from typing import Any

import structlog
from structlog.testing import LogCapture

from eventflow.events.event import Event, Undecodable
from eventflow.testing.trigger_contract import ContractLedger


class ObservedTrigger:
    """The base of the helpers for one source: an inbox, a bucket, a topic."""

    def __init__(self, ledger: ContractLedger) -> None:
        self.ledger = ledger
        self._capture = LogCapture()
        ledger.log = structlog.wrap_logger(structlog.ReturnLogger(), processors=[self._capture])

    @property
    def events(self) -> list[Event]:
        return self.ledger.events

    @property
    def dead_letters(self) -> list[Undecodable]:
        return self.ledger.dead_letters

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The log lines of this event name, as fields."""
        return [dict(entry) for entry in self._capture.entries if entry["event"] == event]
