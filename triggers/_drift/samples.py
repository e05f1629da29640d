"""From an event to what the engine counts: its rows, each as the values of the features.

counting_intake.py reads events as they arrive, dry_run.py recorded ones. Large events are worked on
in a thread, so that the event loop is not blocked.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from inspect import isawaitable
from typing import Any, TypeAlias

from eventflow.core.clock import to_us
from eventflow.events.event import Event
from triggers._drift.config import Sample, stored_value
from triggers._drift.drift_events import DriftEvent
from triggers._drift.engine import Engine
from triggers._drift.features import FeatureSpec

Row: TypeAlias = Mapping[str, Any]
RowsOf: TypeAlias = Callable[[Event], Iterable[Row] | Awaitable[Iterable[Row]]]

THREAD_ROWS = 2000
"""From this many rows on, work is done in a thread."""

UNREADABLE = (ValueError, TypeError, LookupError, OSError)
"""What `read_sample` raises for an event whose rows cannot be read."""


async def read_sample(
    event: Event, rows_of: RowsOf, features: Sequence[FeatureSpec], now: int
) -> Sample:
    """The rows of an event. `now` (microseconds) is its time where it has none."""
    found = rows_of(event)
    rows = list(await found if isawaitable(found) else found)
    values = (
        _values(rows, features)
        if len(rows) < THREAD_ROWS
        else await asyncio.to_thread(_values, rows, features)
    )
    return Sample(values, now if event.time is None else to_us(event.time))


def _values(rows: Sequence[Row], features: Sequence[FeatureSpec]) -> list[list[Any]]:
    return [[stored_value(spec, spec.value(row)) for spec in features] for row in rows]


async def count_samples(engine: Engine, samples: Sequence[Sample], now: int) -> list[DriftEvent]:
    """`engine.add_samples`, in a thread if there are many rows."""
    if sum(len(each.rows) for each in samples) < THREAD_ROWS:
        return engine.add_samples(samples, now)
    return await asyncio.to_thread(engine.add_samples, samples, now)
