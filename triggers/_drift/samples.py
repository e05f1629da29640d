"""From an event to what the engine counts: its rows, each as the values of the features.

counting_intake.py reads events as they arrive, dry_run.py recorded ones. Large events are worked on
in a thread, so that the event loop is not blocked.
"""

import asyncio
import os
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from inspect import isawaitable
from pathlib import Path
from typing import Any, TypeAlias, cast

from eventflow.core.clock import to_us
from eventflow.core.errors import ANY_FAILURE
from eventflow.events.event import Event
from triggers._drift.config import Sample, stored_value
from triggers._drift.drift_events import DriftEvent
from triggers._drift.engine import Engine
from triggers._drift.features import FeatureSpec
from triggers._drift.row_files import read_rows
from triggers._drift.values import check_numbers

Row: TypeAlias = Mapping[str, Any]
RowsOf: TypeAlias = Callable[[Event], Iterable[Row] | Awaitable[Iterable[Row]]]

TABLE_ROWS = 100
"""Rows of one event from which on they are a table: of so many, at least one has an optional
field.
"""

THREAD_ROWS = 2000
"""From this many rows on, work is done in a thread."""

UNREADABLE = ANY_FAILURE
"""What `read_sample` raises for an event whose rows cannot be read: `rows=` is the user's."""


async def read_sample(
    event: Event, rows_of: RowsOf, features: Sequence[FeatureSpec], now: int
) -> Sample:
    """The rows of an event. `now` (microseconds) is its time where it has none.

    Raises one of `UNREADABLE`. A table that lacks the column of a feature, or has no number in a
    column of numbers, is an error of whoever wrote it: missing values would be taken for drift.
    """
    found = rows_of(event)
    rows = list(await found if isawaitable(found) else found)
    is_table = len(rows) >= TABLE_ROWS or (bool(rows) and rows_of is file_rows)
    values = (
        _values(rows, features, is_table)
        if len(rows) < THREAD_ROWS
        else await asyncio.to_thread(_values, rows, features, is_table)
    )
    return Sample(values, now if event.time is None else to_us(event.time))


def data_rows(event: Event) -> Iterable[Row]:
    """An event whose data is a row, or a list of rows."""
    data: Any = event.data
    rows = cast(list[Any], data) if isinstance(data, list) else [data]
    if not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(
            "expected data that is an object or a list of objects, found other data; "
            "give the rows with rows="
        )
    return rows


async def file_rows(event: Event) -> Iterable[Row]:
    """The rows of the file of a `Directory`'s event: CSV, JSON Lines, JSON or Parquet."""
    encoded = event.data.get("path_b64")  # of a name that is not UTF-8
    path = os.fsdecode(b64decode(encoded)) if encoded else event.data["path"]
    return await asyncio.to_thread(read_rows, Path(path))


def _check_columns(rows: Sequence[Row], features: Sequence[FeatureSpec]) -> None:
    for spec in features:
        if not any(spec.is_in(row) for row in rows):
            raise ValueError(
                f"expected the column {spec.at!r} in at least one of {len(rows)} rows, "
                f"found {', '.join(map(str, list(rows[0])[:8]))}"
            )


def _values(
    rows: Sequence[Row], features: Sequence[FeatureSpec], is_table: bool
) -> list[list[Any]]:
    if is_table:
        _check_columns(rows, features)
        for spec in features:
            if spec.numeric:
                check_numbers(spec.at, map(spec.value, rows))
    return [[stored_value(spec, spec.value(row)) for spec in features] for row in rows]


async def count_samples(engine: Engine, samples: Sequence[Sample], now: int) -> list[DriftEvent]:
    """`engine.add_samples`, in a thread if there are many rows."""
    if sum(len(each.rows) for each in samples) < THREAD_ROWS:
        return engine.add_samples(samples, now)
    return await asyncio.to_thread(engine.add_samples, samples, now)
