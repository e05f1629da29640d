"""`DriftMonitor`: a trigger that detects drift in the events of another trigger.

    monitor = DriftMonitor(Kafka("scores"), features=["amount"], reference="reference.csv")
    app.on(monitor, retrain)

It runs the source's `listen` with a CountingIntake (_drift/counting_intake.py), which counts events
instead of recording them and commits the counts with the source's position. It records only the
few events of an episode, `Drift` as from `DriftAlert`: detected, perhaps escalated, resolved. Needs
`pip install 'eventflow-reactor[drift]'`.

CountingIntake.accept ─► Engine (reference, windows) ─► Evaluator (statistics, episodes) ─► event

`simulate` gives the events that other thresholds would have made (_drift/dry_run.py).
"""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from eventflow.core.clock import (
    SECOND,
    Clock,
    Duration,
    SystemClock,
    microseconds,
    sleep_for,
)
from eventflow.core.declarations import declaration, duration, whole_number
from eventflow.core.errors import UsageError
from eventflow.events.event import Gauge, HasGauges, Intake, Json, Simulation, Trigger
from triggers._drift import arrays
from triggers._drift.baseline import (
    Baseline,
    Reference,
    check_baseline,
    make_baseline,
    read_table,
)
from triggers._drift.config import MonitorConfig, WindowKind
from triggers._drift.counting_intake import CountingIntake, UncertainCommit
from triggers._drift.drift_events import SEVERITIES
from triggers._drift.dry_run import RowSimulation, WindowSimulation
from triggers._drift.episodes import EpisodeRules
from triggers._drift.evaluation import MIN_VALUES
from triggers._drift.features import (
    SAMPLED,
    Categorical,
    Feature,
    FeatureSpec,
    Numeric,
    feature_specs,
    infer_kinds,
)
from triggers._drift.samples import RowsOf, data_rows, file_rows
from triggers._drift.schema import DETECTED
from triggers._drift.values import check_numbers
from triggers.concurrency import run_until_first_ends

__all__ = ["Categorical", "DriftMonitor", "Numeric", "file_rows"]

MIN_SAMPLES = 500
"""Rows a window needs: the noise of PSI over ten bins is then about 0.03, far below its
threshold.
"""

LEARN_ROWS = 2000
"""Rows of a reference that is learned from the stream."""

_SYSTEM_CLOCK = SystemClock()


class DriftMonitor:
    """A trigger that watches the events of another trigger for drift.

    Args:
        source: any trigger. Do not give it to the app as well.
        features: names, or names with `Numeric(...)` or `Categorical(...)`. Bare names are compared
            by PSI; they are categories where the reference has texts.
        reference: a CSV, JSON Lines, JSON or Parquet file; a table (columns as lists or arrays, a
            data frame); or a number: the first that many rows of the stream.
        window: number of rows of a window; or a `timedelta`, by the events' time; or "batch": the
            rows of one event.
        rows: the rows of an event, where its data is neither one row (an object) nor a list of
            rows; may be async. `file_rows` reads the file of a `Directory`'s event. A table in
            which no row has a feature's column is a dead letter, not drift.
        model, segment: what the data is about, for the events.
        alpha: the chance that any feature of an undrifted window seems to differ. A detection takes
            `confirm` such windows in a row, and a statistic over its threshold.
        min_samples: smaller windows are not evaluated; by default 500, or a smaller `window`.
        confirm: bad windows in a row before a drift is detected.
        clear: clean windows in a row before it is resolved.
        cooldown: the least time between two detections.
        min_severity: "warning" or "alert": the level from which on there are events. An alert after
            a warning is `drift.escalated`.
        per: "monitor": one episode, of the worst feature; "feature": one for each feature.
        lateness: how long a time window waits for late events.
        nodata: time without events until `drift.nodata`; by default three time windows, else never.
        remember: how many event ids are known, so that a duplicate is not counted again.
        record: the events are also recorded, for flows with `types=`; by default only counted.
        history: number of evaluated windows whose statistics are stored, for dry runs with other
            thresholds.
        name: by default `drift:` and the source's name.
    """

    default_types = (DETECTED,)

    @declaration
    def __init__(
        self,
        source: Trigger,
        *,
        features: Sequence[str] | Mapping[str, Feature],
        reference: Reference = LEARN_ROWS,
        window: WindowKind = 1000,
        rows: RowsOf | None = None,
        model: str | None = None,
        segment: str | None = None,
        alpha: float = 0.01,
        min_samples: int | None = None,
        confirm: int = 2,
        clear: int = 3,
        cooldown: Duration = 3600.0,
        min_severity: Literal["warning", "alert"] = "warning",
        per: Literal["monitor", "feature"] = "monitor",
        lateness: Duration = 0.0,
        nodata: Duration | None = None,
        remember: int = 10_000,
        record: bool = False,
        history: int = 1000,
        name: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        _check_source(source)
        _check_options(
            window, alpha, confirm, clear, min_severity, per, min(remember, history), min_samples
        )
        _check_durations(lateness, cooldown, nodata)
        span = microseconds(window) if isinstance(window, timedelta) else 0
        specs, baselines = _specs_and_baselines(features, reference)
        self.name = name or f"drift:{source.name}"
        self._config = MonitorConfig(
            name=self.name,
            model=model,
            segment=segment,
            features=specs,
            baselines=baselines,
            learn_rows=reference if isinstance(reference, int) else LEARN_ROWS,
            window=window,
            span=span,
            lateness=microseconds(lateness),
            min_samples=_default_min_samples(window) if min_samples is None else min_samples,
            alpha=alpha,
            rules=_episode_rules(confirm, clear, cooldown, min_severity),
            nodata_after=microseconds(nodata) if nodata is not None else 3 * span or None,
            per_feature=per == "feature",
            history=history,
        )
        self.clock: Clock = clock or _SYSTEM_CLOCK
        self._source: Trigger = source
        self._rows: RowsOf = rows or data_rows
        self._remembered_ids: int = remember
        self.repeats_may_differ: bool = getattr(source, "repeats_may_differ", False)
        self._record: bool = record
        self._uncertain_commit = UncertainCommit()
        self._counting: CountingIntake | None = None  # of the last `listen`
        self._loop: asyncio.AbstractEventLoop | None = None  # while it listens

    def __repr__(self) -> str:
        return f"DriftMonitor({self._source!r}, name={self.name!r})"

    def check_secrets(self) -> None:
        """Raises EmptySecret for a secret of the source; the app calls it before it listens."""
        if (check := getattr(self._source, "check_secrets", None)) is not None:
            check()

    async def listen(self, intake: Intake) -> None:
        """Runs the source until cancelled. The whole state is in the cursor."""
        counting = CountingIntake(
            intake,
            self._config,
            self._rows,
            self._remembered_ids,
            self._record,
            self.clock,
            self._uncertain_commit,
            self.repeats_may_differ,
        )
        await counting.open()
        self._counting = counting
        self._loop = asyncio.get_running_loop()
        try:
            await run_until_first_ends(
                self._source.listen(counting), self._tick_regularly(counting)
            )
        finally:
            self._loop = None
            counting.close()

    async def relearn(self) -> None:
        """Makes the next rows of the stream the new reference, as after a retraining.

        Durable when it returns. Episodes end without an event, the cool-down continues. Works in
        the process in which the monitor listens.
        """
        if self._counting is None or self._loop is None:
            raise UsageError(
                f"{self.name}: expected to be listening, in this process; "
                "a new reference cannot be learned otherwise"
            )
        if self._loop is asyncio.get_running_loop():
            await self._counting.relearn()
        else:  # flows run on another loop than triggers
            await asyncio.wrap_future(
                asyncio.run_coroutine_threadsafe(self._counting.relearn(), self._loop)
            )

    def simulate(
        self, cursor: Mapping[str, Json], since: datetime | None, until: datetime
    ) -> Simulation:
        """The events of that time, had it started then with its present options."""
        if self._record:
            return RowSimulation(self._config, self._rows, cursor, since)
        return WindowSimulation(self._config, cursor, since, until)

    async def _tick_regularly(self, counting: CountingIntake) -> None:
        """Notices a time without data, and time windows that no later event closes."""
        spans = [span for span in (self._config.nodata_after, self._config.span) if span]
        if not spans:
            await asyncio.get_running_loop().create_future()  # until the cancel
        interval = max(min(30 * SECOND, *(span // 4 for span in spans)), SECOND // 10)
        while True:
            await sleep_for(self.clock, interval / SECOND)
            await counting.tick()

    # ------------------------------------------------------------------------- health

    @property
    def is_open(self) -> bool:
        """Whether it listens, and has loaded its state."""
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
        """The source's; else that no data arrives."""
        condition = self._source.condition if isinstance(self._source, HasGauges) else None
        engine = self._counting.engine if self._counting is not None else None
        if condition is None and engine is not None and engine.state.nodata_since is not None:
            condition = "no data arrives"
        return condition

    def gauges(self) -> Sequence[Gauge]:
        """The source's; each feature's last statistics; counts of rows and windows."""
        found = list(self._source.gauges()) if isinstance(self._source, HasGauges) else []
        engine = self._counting.engine if self._counting is not None else None
        if engine is None:
            return found
        state = engine.state
        found += [
            Gauge(
                "drift_statistic",
                each.statistic,
                {"feature": self._config.features[each.feature_index].name, "metric": each.metric},
                "max",
            )
            for each in engine.results
        ]
        return [
            *found,
            Gauge("drift_level", max((each.level for each in state.episodes), default=0)),
            Gauge("drift_windows_judged", state.evaluated),
            Gauge("drift_windows_too_small", state.too_small),
            Gauge("drift_rows_late", state.late_rows),
            Gauge("drift_rows_learning", len(engine.learning)),
        ]


# ----------------------------------------------------------------------------- options


def _specs_and_baselines(
    features: Sequence[str] | Mapping[str, Feature], reference: Reference
) -> tuple[tuple[FeatureSpec, ...], tuple[Baseline, ...]]:
    """The features and their baselines; no baselines if the reference is to be learned."""
    if isinstance(reference, int):
        if reference < 100:
            raise UsageError(
                "DriftMonitor(reference=): expected a file, a table or at least 100 rows to learn, "
                f"found {reference}"
            )
        specs = feature_specs(features, {})
        _warm_up(specs)
        return specs, ()
    table = read_table(reference)
    specs = feature_specs(features, infer_kinds(table, list(features)))
    _warm_up(specs)
    rows = max((len(column) for column in table.values()), default=0)
    columns = [_column(table, spec, rows) for spec in specs]
    for spec, column in zip(specs, columns, strict=True):
        _check_reference(spec, column)
    baselines = tuple(map(make_baseline, specs, columns))
    for spec, baseline in zip(specs, baselines, strict=True):
        check_baseline(spec, baseline, MIN_VALUES)
    return specs, baselines


def _check_reference(spec: FeatureSpec, column: Sequence[Any]) -> None:
    if not spec.numeric:
        return
    try:
        check_numbers(spec.at, column)
    except ValueError as error:
        raise UsageError(f"DriftMonitor(reference=): {error}") from None


def _column(table: Mapping[str, Sequence[Any]], spec: FeatureSpec, rows: int) -> Sequence[Any]:
    """The feature's column of a reference, by its name or by the last name of its pointer."""
    for name in (spec.name, spec.at, spec.at.rpartition("/")[2]):
        if name in table:
            return table[name]
    return [None] * rows


def _warm_up(features: Sequence[FeatureSpec]) -> None:
    if any(each.metric in SAMPLED for each in features):
        arrays.warm_up()


def _check_source(source: object) -> None:
    if not isinstance(source, Trigger):
        raise UsageError(f"DriftMonitor({source!r}): expected a trigger (with a name and listen())")


def _default_min_samples(window: WindowKind) -> int:
    return min(MIN_SAMPLES, window) if isinstance(window, int) else MIN_SAMPLES


def _episode_rules(
    confirm: int, clear: int, cooldown: Duration, min_severity: Literal["warning", "alert"]
) -> EpisodeRules:
    return EpisodeRules(
        confirm=confirm,
        clear=clear,
        cooldown=microseconds(cooldown),
        min_level=SEVERITIES.index(min_severity),
    )


def _check_durations(lateness: Duration, cooldown: Duration, nodata: Duration | None) -> None:
    duration(lateness, "DriftMonitor: lateness=")
    duration(cooldown, "DriftMonitor: cooldown=")
    if nodata is not None:
        duration(nodata, "DriftMonitor: nodata=", positive=True)


def _check_options(
    window: WindowKind,
    alpha: float,
    confirm: int,
    clear: int,
    min_severity: str,
    per: str,
    kept: int,
    min_samples: int | None,
) -> None:
    if isinstance(window, timedelta):
        if duration(window, "DriftMonitor: window=") < 1:
            raise UsageError(f"DriftMonitor(window=): expected at least a second, found {window}")
    elif window != "batch" and not (isinstance(window, int) and window >= MIN_VALUES):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(
            f'DriftMonitor(window=): expected at least {MIN_VALUES} rows, a timedelta or "batch", '
            f"found {window!r}"
        )
    if isinstance(window, int) and min_samples is not None and min_samples > window:
        raise UsageError(
            f"DriftMonitor(min_samples={min_samples}): expected at most the window's {window} rows"
        )
    whole_number(confirm, "DriftMonitor: confirm=")
    whole_number(clear, "DriftMonitor: clear=")
    if min_samples is not None:
        whole_number(min_samples, "DriftMonitor: min_samples=")
    if not 0 < alpha < 1 or kept < 0:
        raise UsageError(
            "DriftMonitor: alpha must be between 0 and 1, remember and history not negative"
        )
    if min_severity not in ("warning", "alert") or per not in ("monitor", "feature"):
        raise UsageError(
            'DriftMonitor: expected min_severity="warning" or "alert", '
            'and per="monitor" or "feature"'
        )
