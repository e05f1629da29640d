"""How many events make a run: the delivery modes of a subscription.

    Each()                    one run per event (the default)
    Batch(100, within=5)      one run per 100 events, or for the events within 5 s of the first
    Debounce(5, max_wait=30)  one run after 5 s without events, at most 30 s after the first event
    Latest()                  one run at a time; the next one's event is the newest that arrived
    Singleflight()            one run at a time; all events during a run make one successor

With `key=` each key has its own window. A window is a run that is recorded with its first event
and has not started; later events are added to it in the transaction that records them, so windows
and their due times survive a crash like any run. The run gets all its events.

`App.on(deliver=)` takes a mode; subscriptions.py turns it into a `BatchPolicy`, which the store
(store/windows.py) applies.
"""

from typing import Final, Protocol, runtime_checkable

import msgspec

from eventflow.core.clock import Duration, microseconds
from eventflow.core.declarations import Declared, duration, whole_number
from eventflow.core.errors import UsageError
from eventflow.store.protocol import BatchPolicy

MAX_EVENTS_PER_RUN: Final = 10_000
"""Events per run in any mode: a running run has all of them in memory."""


@runtime_checkable
class Delivery(Protocol):
    """A delivery mode. `one_at_a_time`: runs of one key execute one after another."""

    @property
    def one_at_a_time(self) -> bool: ...

    def batch_policy(self) -> BatchPolicy | None:
        """How the store batches events; None: one run per event."""
        ...


class Each(msgspec.Struct, frozen=True, metaclass=Declared):
    """One run per event."""

    one_at_a_time = False

    def batch_policy(self) -> BatchPolicy | None:
        return None


class Batch(msgspec.Struct, frozen=True, metaclass=Declared):
    """One run for every `size` events, or for those within `within` of the first one."""

    size: int
    within: Duration
    one_at_a_time = False

    def __post_init__(self) -> None:
        whole_number(self.size, "Batch: size", maximum=MAX_EVENTS_PER_RUN)
        duration(self.within, "Batch: within", positive=True)

    def batch_policy(self) -> BatchPolicy:
        return BatchPolicy(
            "batch",
            size=self.size,
            wait=microseconds(self.within),
            max_wait=microseconds(self.within),
        )


class Debounce(msgspec.Struct, frozen=True, metaclass=Declared):
    """One run per burst: after `quiet` without events, at most `max_wait` after the first event."""

    quiet: Duration
    max_wait: Duration
    one_at_a_time = False

    def __post_init__(self) -> None:
        duration(self.quiet, "Debounce: quiet", positive=True)
        duration(self.max_wait, "Debounce: max_wait", positive=True)
        if microseconds(self.max_wait) < microseconds(self.quiet):
            raise UsageError(
                f"Debounce: max_wait expected at least quiet ({self.quiet}), found {self.max_wait}"
            )

    def batch_policy(self) -> BatchPolicy:
        return BatchPolicy(
            "debounce",
            size=MAX_EVENTS_PER_RUN,
            wait=microseconds(self.quiet),
            max_wait=microseconds(self.max_wait),
            is_extended=True,
        )


class Latest(msgspec.Struct, frozen=True, metaclass=Declared):
    """One run at a time; the next one's event is the newest that arrived during the run."""

    one_at_a_time = True

    def batch_policy(self) -> BatchPolicy:
        return BatchPolicy("latest", size=MAX_EVENTS_PER_RUN)


class Singleflight(msgspec.Struct, frozen=True, metaclass=Declared):
    """One run at a time; all events that arrive during a run make one successor."""

    one_at_a_time = True

    def batch_policy(self) -> BatchPolicy:
        return BatchPolicy("singleflight", size=MAX_EVENTS_PER_RUN)
