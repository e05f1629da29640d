"""Drift found in a stream of our own.

    app.on(DriftMonitor(Kafka("scores"), features=["amount", "country"], reference="reference.csv"), retrain)

A trigger over another trigger: it runs the source's `listen` with an intake of its own (_drift/desk.py), which counts events
instead of recording them and commits the counts with the source's position. What is told are the few events of an episode,
`Drift` as from `DriftAlert`: detected, perhaps escalated, resolved. Needs `pip install 'eventflow-reactor[drift]'`.

    Desk.accept ─► Engine.take (reference, windows) ─► judge ─► Episode.step ─► tell ─► one transaction

What it would have told with other thresholds, `foresee` says (_drift/foresight.py).
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, cast

from eventflow.core.clock import SECOND, Clock, Duration, SystemClock, microseconds, seconds
from eventflow.core.errors import StoreFull, UsageError
from eventflow.events.event import Event, Foresight, Gauge, Gauged, Intake, Json, Trigger
from triggers._drift import arrays
from triggers._drift.baseline import (
    Baseline,
    Reference,
    check,
    make_baseline,
    read_rows,
    read_table,
)
from triggers._drift.config import Setting, WindowKind
from triggers._drift.counting_intake import Desk, Doubt
from triggers._drift.dry_run import ByRows, ByWindows
from triggers._drift.episodes import Rules
from triggers._drift.evaluation import LEAST
from triggers._drift.features import SAMPLED, Categorical, Feature, Numeric, Watched, kinds, watch
from triggers._drift.samples import Row, RowsOf
from triggers._drift.schema import DETECTED
from triggers.concurrency import together

__all__ = ["Categorical", "DriftMonitor", "Numeric", "file_rows"]

MIN_SAMPLES = 500
"""Rows from which on a window is judged: PSI over ten bins then has a noise of about 0.03, far from its threshold."""

LEARN = 2000
"""Rows of a reference that is learned from the stream."""

_SYSTEM_CLOCK = SystemClock()


class DriftMonitor:
    """A trigger that watches the events of another one for drift.

    Args:
        source: any trigger; it must not be given to the app by itself.
        features: names, or names with `Numeric(...)` or `Categorical(...)`. Bare names are judged by PSI; as categories where
            the reference has texts.
        reference: a CSV, JSON Lines, JSON or Parquet file, a table (columns as lists or arrays, a data frame), or a number: the
            first that many rows of the stream.
        window: how many rows make a window; or a `timedelta`, by the events' time; or "batch": the rows of one event.
        rows: the rows of an event, where its data is not one row (an object) or a list of them; may be async. `file_rows` reads
            the file of a `Directory`'s event.
        model, segment: what the events say it is about.
        alpha: the chance that any feature of an undrifted window seems to differ. It takes `confirm` of them in a row, and a
            statistic over its threshold, to be told.
        min_samples: rows below which a window is not judged; by default 500, or a smaller `window`.
        confirm: bad windows in a row before a drift is detected; clear: clean ones before it is resolved.
        cooldown: the least time between two detections.
        tell: "warning" or "alert": the level from which on there is an event. An alert after a warning is `drift.escalated`.
        per: "monitor": one episode, of the worst feature; "feature": each feature by itself.
        lateness: how long a window of time waits for events that come late.
        nodata: after how long without events `drift.nodata` is told; by default three windows of time, else never.
        remember: how many events' ids are known, so that one that comes again is not counted again.
        record: the events are recorded as well, for flows with `types=`; by default they are only counted.
        history: judged windows whose statistics are kept, so that a dry run can try other thresholds on them.
        name: by default `drift:` and the source's.
    """

    heard = (DETECTED,)

    def __init__(
        self,
        source: Trigger,
        *,
        features: Sequence[str] | Mapping[str, Feature],
        reference: Reference = LEARN,
        window: WindowKind = 1000,
        rows: RowsOf | None = None,
        model: str | None = None,
        segment: str | None = None,
        alpha: float = 0.01,
        min_samples: int | None = None,
        confirm: int = 2,
        clear: int = 3,
        cooldown: Duration = 3600.0,
        tell: Literal["warning", "alert"] = "warning",
        per: Literal["monitor", "feature"] = "monitor",
        lateness: Duration = 0.0,
        nodata: Duration | None = None,
        remember: int = 10_000,
        record: bool = False,
        history: int = 1000,
        name: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        if not isinstance(source, Trigger):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(
                f"DriftMonitor({source!r}): expected a trigger (with a name and listen())"
            )
        _check(window, alpha, confirm, clear, tell, per, min(remember, history), min_samples)
        span = microseconds(window) if isinstance(window, timedelta) else 0
        watched, given = _referenced(features, reference)
        least = min(MIN_SAMPLES, window) if isinstance(window, int) else MIN_SAMPLES
        self.name = name or f"drift:{source.name}"
        self._setting = Setting(
            name=self.name, model=model, segment=segment, watched=watched, given=given,
            learn=reference if isinstance(reference, int) else LEARN, window=window, span=span, lateness=microseconds(lateness),
            min_samples=least if min_samples is None else min_samples, alpha=alpha,
            rules=Rules(confirm=confirm, clear=clear, cooldown=microseconds(cooldown), least=1 if tell == "warning" else 2),
            nodata=microseconds(nodata) if nodata is not None else 3 * span or None, per_feature=per == "feature",
            history=history,
        )  # fmt: skip
        self._source, self._rows, self._remember, self._record = (
            source,
            rows or data_rows,
            remember,
            record,
        )
        self.clock = clock or _SYSTEM_CLOCK
        self._doubt = Doubt()
        self._desk: Desk | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"DriftMonitor({self._source!r}, name={self.name!r})"

    async def listen(self, intake: Intake) -> None:
        """Listens to the source until cancelled. All that is known is in the cursor, so it may be opened again at any time."""
        desk = Desk(
            intake, self._setting, self._rows, self._remember, self._record, self.clock, self._doubt
        )
        await desk.open()
        self._desk, self._loop = desk, asyncio.get_running_loop()
        try:
            await together(self._source.listen(desk), self._watch(desk))
        finally:
            self._loop = None
            desk.close()

    async def relearn(self) -> None:
        """Makes the next rows of the stream the new reference, as after a retraining. Durable when it returns.

        Episodes end without a word, the cool-down goes on. To be called where the monitor listens: in its process.
        """
        if self._desk is None or self._loop is None:
            raise UsageError(
                f"{self.name}: expected to be listening, in this process; a new reference cannot be learned otherwise"
            )
        if self._loop is asyncio.get_running_loop():
            await self._desk.relearn()
        else:  # flows run on another loop than the way in
            await asyncio.wrap_future(
                asyncio.run_coroutine_threadsafe(self._desk.relearn(), self._loop)
            )

    def foresee(
        self, cursor: Mapping[str, Json], since: datetime | None, until: datetime
    ) -> Foresight:
        """What it would have told of that time, had it begun then as it is set now: for `eventflow replay --dry-run`."""
        if self._record:
            return ByRows(self._setting, self._rows, cursor, since)
        return ByWindows(self._setting, cursor, since, until)

    async def _watch(self, desk: Desk) -> None:
        """Notices what only time does: silence, and windows of time that no event ends any more."""
        spans = [span for span in (self._setting.nodata, self._setting.span) if span]
        pause = min(30 * SECOND, *(span // 4 for span in spans)) if spans else 0
        while True:
            await self._sleep(max(pause, SECOND // 10) if pause else None)
            try:
                await desk.tick()
            except StoreFull:
                continue  # the next tick says the same

    async def _sleep(self, duration: int | None) -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        if duration is None:
            await over.wait()  # never: the cancel ends it
            return
        timer = self.clock.timer(loop, self.clock.now() + duration, over.set)
        try:
            await over.wait()
        finally:
            timer.cancel()

    # ------------------------------------------------------------------------- how it fares

    @property
    def is_open(self) -> bool:
        """Whether it listens, and has read what is stored."""
        return self._loop is not None

    @property
    def routes(self) -> Sequence[Any]:
        """The source's, if it serves HTTP."""
        return getattr(self._source, "routes", ())

    @property
    def verified(self) -> bool | None:
        return getattr(self._source, "verified", None)

    @property
    def condition(self) -> str | None:
        """The source's; else whether it is silent."""
        told = self._source.condition if isinstance(self._source, Gauged) else None
        engine = self._desk.engine if self._desk is not None else None
        return told or (
            "no data comes" if engine is not None and engine.memory.silent is not None else None
        )

    def gauges(self) -> Sequence[Gauge]:
        """Each feature's last statistic, and what became of rows and windows; the source's own beside them."""
        found = list(self._source.gauges()) if isinstance(self._source, Gauged) else []
        engine = self._desk.engine if self._desk is not None else None
        if engine is None:
            return found
        memory = engine.memory
        found += [
            Gauge(
                "drift_statistic",
                each.statistic,
                {"feature": self._setting.watched[each.place].name, "metric": each.metric},
                "max",
            )
            for each in engine.verdicts
        ]
        return [
            *found,
            Gauge("drift_level", max((each.level for each in memory.episodes), default=0)),
            Gauge("drift_windows_judged", memory.judged),
            Gauge("drift_windows_too_small", memory.insufficient),
            Gauge("drift_rows_late", memory.late),
            Gauge("drift_rows_learning", len(engine.learning)),
        ]


# ----------------------------------------------------------------------------- rows


def data_rows(event: Event) -> Iterable[Row]:
    """An event whose data is a row, or a list of rows."""
    data: Any = event.data
    rows = cast(list[Any], data) if isinstance(data, list) else [data]
    if not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(
            "expected data that is an object or a list of objects, found other data; rows= says what the rows are"
        )
    return rows


async def file_rows(event: Event) -> Iterable[Row]:
    """The rows of the file that a `Directory`'s event is about: CSV, JSON Lines, JSON or Parquet. Read in a thread."""
    return await asyncio.to_thread(read_rows, Path(event.data["path"]))


# ----------------------------------------------------------------------------- options


def _referenced(
    features: Sequence[str] | Mapping[str, Feature], reference: Reference
) -> tuple[tuple[Watched, ...], tuple[Baseline, ...]]:
    """The features, and what they are compared with; nothing yet if that is to be learned."""
    if isinstance(reference, int):
        if reference < 100:
            raise UsageError(
                f"DriftMonitor(reference=): expected a file, a table or at least 100 rows to learn, found {reference}"
            )
        watched = watch(features, {})
        _warm_up(watched)
        return watched, ()
    table = read_table(reference)
    watched = watch(features, kinds(table, list(features)))
    _warm_up(watched)
    rows = max((len(column) for column in table.values()), default=0)
    given = tuple(make_baseline(each, _column(table, each, rows)) for each in watched)
    for each, baseline in zip(watched, given, strict=True):
        check(each, baseline, LEAST)
    return watched, given


def _column(table: Mapping[str, Sequence[Any]], watched: Watched, rows: int) -> Sequence[Any]:
    """A reference's columns have the features' names, or those that the pointers end in."""
    for name in (watched.name, watched.at, watched.at.rpartition("/")[2]):
        if name in table:
            return table[name]
    return [None] * rows


def _warm_up(watched: Sequence[Watched]) -> None:
    if any(each.metric in SAMPLED for each in watched):
        arrays.warm_up()


def _check(
    window: WindowKind,
    alpha: float,
    confirm: int,
    clear: int,
    tell: str,
    per: str,
    kept: int,
    min_samples: int | None,
) -> None:
    if isinstance(window, timedelta):
        if seconds(window) < 1:
            raise UsageError(f"DriftMonitor(window=): expected at least a second, found {window}")
    elif window != "batch" and not (isinstance(window, int) and window >= LEAST):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(
            f'DriftMonitor(window=): expected at least {LEAST} rows, a timedelta or "batch", found {window!r}'
        )
    if isinstance(window, int) and min_samples is not None and min_samples > window:
        raise UsageError(
            f"DriftMonitor(min_samples={min_samples}): expected at most the window's {window} rows"
        )
    if not 0 < alpha < 1 or confirm < 1 or clear < 1 or kept < 0:
        raise UsageError(
            "DriftMonitor: alpha must be between 0 and 1, confirm and clear at least 1, remember and history not negative"
        )
    if tell not in ("warning", "alert") or per not in ("monitor", "feature"):
        raise UsageError(
            'DriftMonitor: expected tell="warning" or "alert", and per="monitor" or "feature"'
        )
