"""From an event to what the engine counts: its rows, read as `rows=` says, each the values of the features.

desk.py reads what comes, foresight.py what came. Large events are worked on in a thread, so that the loop stays free.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from inspect import isawaitable
from typing import Any, TypeAlias

from eventflow.core.clock import to_us
from eventflow.events.event import Event
from triggers._drift.config import Sample, compact
from triggers._drift.drift_events import Told
from triggers._drift.engine import Engine
from triggers._drift.features import Watched

Row: TypeAlias = Mapping[str, Any]
RowsOf: TypeAlias = Callable[[Event], Iterable[Row] | Awaitable[Iterable[Row]]]

MANY = 2000
"""Rows from which on work goes to a thread."""

UNREADABLE = (ValueError, TypeError, LookupError, OSError)
"""What `sample` raises of an event whose rows cannot be read."""


async def sample(event: Event, rows_of: RowsOf, watched: Sequence[Watched], now: int) -> Sample:
    """The rows of an event; without a time of its own it happened now."""
    found = rows_of(event)
    rows = list(await found if isawaitable(found) else found)
    values = (
        _values(rows, watched)
        if len(rows) < MANY
        else await asyncio.to_thread(_values, rows, watched)
    )
    return Sample(values, now if event.time is None else to_us(event.time))


def _values(rows: Sequence[Row], watched: Sequence[Watched]) -> list[list[Any]]:
    return [[compact(each, each.value(row)) for each in watched] for row in rows]


async def take(engine: Engine, samples: Sequence[Sample], now: int) -> list[Told]:
    """Counts them; what is to be told."""
    if sum(len(each.rows) for each in samples) < MANY:
        return engine.take(samples, now)
    return await asyncio.to_thread(engine.take, samples, now)
