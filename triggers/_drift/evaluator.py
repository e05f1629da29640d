"""Decides what a window means: statistics against thresholds, an episode's step, the drift event.

    evaluate_window ─► measure ─► evaluate (evaluation.py) ─► Episode.step (episodes.py) ─► event

engine.py makes one for each reference and calls it with complete windows and with the changes that
streaming detectors see in the middle of one. dry_run.py calls `reevaluate` with the statistics of
past windows. The episodes live in `MonitorState`, which the engine stores.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

import msgspec

from eventflow.events.event import Json
from triggers._drift.baseline import Baseline
from triggers._drift.config import MonitorConfig
from triggers._drift.drift_events import DriftEvent, episode_event
from triggers._drift.episodes import Episode
from triggers._drift.evaluation import MetricResult, evaluate, level_of, measure, remeasure
from triggers._drift.features import STREAMING
from triggers._drift.history import History
from triggers._drift.streaming import FeatureDetector
from triggers._drift.window import EvaluatedWindow, OpenWindow


class MonitorState(msgspec.Struct):
    """The small part of the cursor, written with every batch. Times in microseconds.

    `learned`: the reference is in the cursor. `learns`: it is learned from the stream, even where
    the app gives one. `first_open`: number of the first window that still accepts rows.
    `watermark`: the latest time of a row. `nodata_since`: when the last sample arrived before the
    current `drift.nodata`. `late_rows` counts rows, `too_small` and `evaluated` count windows.
    The names in the store are those of the first version.
    """

    config_hash: str = msgspec.field(name="digest")
    version: int = 1
    learned: bool = False
    learns: bool = msgspec.field(name="own", default=False)
    first_open: int = msgspec.field(name="opened", default=0)
    windows: list[int] = []
    watermark: int | None = None
    last_at: int | None = None
    nodata_since: int | None = msgspec.field(name="silent", default=None)
    late_rows: int = msgspec.field(name="late", default=0)
    too_small: int = msgspec.field(name="insufficient", default=0)
    evaluated: int = msgspec.field(name="judged", default=0)
    episodes: list[Episode] = []


def new_episodes(config: MonitorConfig) -> list[Episode]:
    """One for the monitor, or one for each feature (`per="feature"`)."""
    return [Episode() for _ in (config.features if config.per_feature else [None])]


class Evaluator:
    """Evaluates windows against one reference. `results` are those of the last window."""

    def __init__(
        self,
        config: MonitorConfig,
        state: MonitorState,
        baselines: Sequence[Baseline],
        history: History,
    ) -> None:
        self.results: Sequence[MetricResult] = ()
        self._config: MonitorConfig = config
        self._state: MonitorState = state
        self._baselines: Sequence[Baseline] = baselines
        self._history: History = history
        self._measurement_hash: str = config.measurement_hash()
        self._detectors: dict[int, FeatureDetector] = {}  # by the feature's index
        streaming = [
            (index, spec) for index, spec in enumerate(config.features) if spec.metric in STREAMING
        ]
        delta = config.alpha / max(len(streaming), 1)
        for index, spec in streaming:
            baseline = baselines[index] if baselines else None
            self._detectors[index] = FeatureDetector(spec.metric, delta, baseline)

    def load(self, parts: Mapping[str, Any]) -> None:
        """Takes the detectors' states from the cursor, if it is of this configuration."""
        meta = parts.get("drift:meta")
        if meta is None or meta["digest"] != self._state.config_hash:
            return
        for index, detector in self._detectors.items():
            if (state := parts.get(f"drift:s/{index}")) is not None:
                detector.load(state)

    def changes(self) -> Iterator[tuple[str, Json]]:
        for index, detector in self._detectors.items():
            yield f"drift:s/{index}", detector.state()

    # ------------------------------------------------------------------------- whole windows

    def evaluate_window(self, window: OpenWindow, now: int) -> list[DriftEvent]:
        """The events of a complete window."""
        config = self._config
        if window.n < config.min_samples:
            self._state.too_small += 1
            return []
        changed = [
            index in self._detectors and self._detectors[index].changed
            for index in range(len(config.features))
        ]
        measured = measure(window, config.features, self._baselines, changed)
        self._add_to_history(measured, window, now)
        return self._evaluate(measured, window, now)

    def reevaluate(self, past: EvaluatedWindow) -> list[DriftEvent]:
        """The events of a window that was measured before, by the present thresholds and rules."""
        measured = remeasure(past, self._config.features)
        if past.is_burst:
            return [event for each in measured for event in self._burst(each, past, past.at)]
        if past.n < self._config.min_samples:
            return []
        return self._evaluate(measured, past, past.at)

    def _evaluate(
        self, measured: Sequence[MetricResult], window: OpenWindow | EvaluatedWindow, now: int
    ) -> list[DriftEvent]:
        self.results = evaluate(measured, self._config.alpha)
        self._state.evaluated += 1
        events = list[DriftEvent]()
        for unit, episode in enumerate(self._state.episodes):
            results = [
                each
                for each in self.results
                if not self._config.per_feature or each.feature_index == unit
            ]
            move = episode.step(results, self._config.rules, now)
            if not episode.level:
                self._forget_changes(results)
            if move:
                events.append(
                    episode_event(
                        self._config,
                        self._baselines,
                        self._state.version,
                        unit,
                        episode,
                        move,
                        results,
                        window,
                    )
                )
        return events

    def _forget_changes(self, results: Sequence[MetricResult]) -> None:
        """No episode is open: a change that is below the thresholds is none."""
        for result in results:
            if result.metric in STREAMING and result.clean:
                self._detectors[result.feature_index].changed = False

    def _add_to_history(
        self,
        measured: Sequence[MetricResult],
        window: OpenWindow,
        now: int,
        *,
        is_burst: bool = False,
    ) -> None:
        found = [
            (each.feature_index, each.metric, each.statistic, each.p_value)
            for each in measured
            if isfinite(each.statistic)
        ]
        self._history.add(
            EvaluatedWindow(
                self._measurement_hash, now, window.n, window.start, window.end, found, is_burst
            )
        )

    # ------------------------------------------------------------------------- streaming detectors

    def changes_in(self, rows: Sequence[Sequence[Any]]) -> Iterator[tuple[int, list[int]]]:
        """Feeds the detectors. Yields the position of a row after which the size of a change is to
        be looked at, and the indexes of the features that changed.
        """
        if not self._detectors:
            return
        for position, row in enumerate(rows):
            changed = [
                index for index, detector in self._detectors.items() if detector.update(row[index])
            ]
            if changed:
                yield position, changed

    def report_changes(
        self, changed: Sequence[int], window: OpenWindow, now: int
    ) -> list[DriftEvent]:
        """The events of changes in the middle of a window, where they are large enough."""
        events = list[DriftEvent]()
        for index in changed:
            ((metric, warn, alert), *_) = self._config.features[index].checks
            shift = self._detectors[index].shift
            result = MetricResult(index, metric, shift, 0.0, warn, alert)
            self._add_to_history([result], window, now, is_burst=True)
            events += self._burst(result, window, now)
        return events

    def _burst(
        self, measured: MetricResult, window: OpenWindow | EvaluatedWindow, now: int
    ) -> list[DriftEvent]:
        level = level_of(measured)
        result = msgspec.structs.replace(measured, level=level, clean=level == 0)
        unit = result.feature_index if self._config.per_feature else 0
        episode = self._state.episodes[unit]
        move = episode.burst(result, self._config.rules, now)
        if not move:
            return []
        return [
            episode_event(
                self._config,
                self._baselines,
                self._state.version,
                unit,
                episode,
                move,
                [result],
                window,
            )
        ]
