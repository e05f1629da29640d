"""How many events make a run: the delivery modes of a subscription.

    Each()                   one event, one run (the default)
    Batch(100, within=5)     a run for every 100 events, or for what came within 5 s of the first
    Debounce(5, max_wait=30) one run once nothing has come for 5 s, at the latest 30 s after the first event
    Latest()                 one run at a time; of what comes meanwhile the next one takes the newest as its event
    Singleflight()           one run at a time; what comes meanwhile is gathered into one successor

With `key=` each key has windows of its own. A window is a run that is recorded with its first event and has not begun: later
events join it in the transaction that records them, so windows and their due times survive a crash like any run. The run gets
all its events. `app.on(deliver=)` takes one of these, routing.py asks it for a `Gather`, the store (ops.py) does the joining.
"""

from typing import Final, Protocol, runtime_checkable

import msgspec

from eventflow.core.clock import Duration, microseconds
from eventflow.core.errors import UsageError
from eventflow.store.protocol import Gather

MAX_EVENTS_PER_RUN: Final = 10_000
"""Events in one run, whatever its mode: all of them are in memory at once while it runs."""


@runtime_checkable
class Delivery(Protocol):
    """A mode. `one_at_a_time`: its runs follow one another, per key."""

    @property
    def one_at_a_time(self) -> bool: ...

    def batch_policy(self) -> Gather | None:
        """What the store does with an event; None: a run of its own."""
        ...


class Each(msgspec.Struct, frozen=True):
    """One event, one run."""

    one_at_a_time = False

    def batch_policy(self) -> Gather | None:
        return None


class Batch(msgspec.Struct, frozen=True):
    """A run for every `size` events, or for those that came within `within` of the first."""

    size: int
    within: Duration
    one_at_a_time = False

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_EVENTS_PER_RUN:
            raise UsageError(
                f"Batch: size expected from 1 to {MAX_EVENTS_PER_RUN:,}, found {self.size}"
            )
        _positive("Batch: within", self.within)

    def batch_policy(self) -> Gather:
        return Gather(
            "batch",
            size=self.size,
            wait=microseconds(self.within),
            longest=microseconds(self.within),
        )


class Debounce(msgspec.Struct, frozen=True):
    """One run for a burst: once nothing has come for `quiet`, at the latest `max_wait` after its first event."""

    quiet: Duration
    max_wait: Duration
    one_at_a_time = False

    def __post_init__(self) -> None:
        _positive("Debounce: quiet", self.quiet)
        if microseconds(self.max_wait) < microseconds(self.quiet):
            raise UsageError(
                f"Debounce: max_wait expected at least quiet ({self.quiet}), found {self.max_wait}"
            )

    def batch_policy(self) -> Gather:
        return Gather(
            "debounce",
            size=MAX_EVENTS_PER_RUN,
            wait=microseconds(self.quiet),
            longest=microseconds(self.max_wait),
            renewed=True,
        )


class Latest(msgspec.Struct, frozen=True):
    """One run at a time; the next one's event is the newest of those that came meanwhile."""

    one_at_a_time = True

    def batch_policy(self) -> Gather:
        return Gather("latest", size=MAX_EVENTS_PER_RUN)


class Singleflight(msgspec.Struct, frozen=True):
    """One run at a time; everything that comes meanwhile makes one successor, which gets all of it."""

    one_at_a_time = True

    def batch_policy(self) -> Gather:
        return Gather("singleflight", size=MAX_EVENTS_PER_RUN)


def _positive(what: str, duration: Duration) -> None:
    if microseconds(duration) <= 0:
        raise UsageError(f"{what} expected a positive duration, found {duration}")
