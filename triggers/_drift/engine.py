"""Counts the rows of a monitor: rows go in, drift events come out, changed parts go to the cursor.

add_samples ─► reference (given, or the first rows) ─► open window ─► closed ─► Evaluator ─► events

`counting_intake.py` and `dry_run.py` call it, one call at a time. Deterministic in rows and clock:
the same state and the same rows give the same events with the same ids, however the rows are
batched, so a batch whose transaction failed is counted again. What happens to a closed window is in
evaluator.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from eventflow.events.event import Json
from triggers._drift.baseline import Baseline, make_baseline
from triggers._drift.config import MonitorConfig, Sample
from triggers._drift.drift_events import DriftEvent, nodata_event
from triggers._drift.evaluation import MetricResult
from triggers._drift.evaluator import Evaluator, MonitorState, new_episodes
from triggers._drift.history import History
from triggers._drift.window import OpenWindow, Rows


class Engine:
    """The state of a monitor, in memory.

    `parts`: the cursor that earlier calls of `changes` have written. `since`: when it began to
    listen, in microseconds.
    """

    def __init__(self, config: MonitorConfig, parts: Mapping[str, Any], since: int) -> None:
        self.config: MonitorConfig = config
        self.since: int = since
        self.state: MonitorState = MonitorState(config.state_hash(), episodes=new_episodes(config))
        self.baselines: list[Baseline] = list(config.baselines)  # empty while it learns them
        self.learning: Rows = Rows("drift:l/")
        self.windows: dict[int, OpenWindow] = {}
        self._history = History(config.history, parts)
        self._changed: dict[str, Json] = {}
        if "drift:meta" in parts:
            self._load(parts)
        self._evaluator = self._new_evaluator()
        self._evaluator.load(parts)

    # ------------------------------------------------------------------------- parts

    def _load(self, parts: Mapping[str, Any]) -> None:
        state = msgspec.convert(parts["drift:meta"], MonitorState)
        if state.config_hash != self.state.config_hash:
            # Other features, reference or windows: earlier counts cannot be compared with new ones.
            outdated = [key for key in parts if key.startswith("drift:") and key[6] in "lrwxs"]
            self._changed = dict.fromkeys(outdated)
            self.state.version = state.version + 1
            return
        self.state = state
        self.learning = Rows.loaded("drift:l/", parts)
        if state.learns:
            self.baselines = []
        if state.learned:
            self.baselines = [
                msgspec.convert(parts[f"drift:r/{index}"], Baseline)
                for index in range(len(self.config.features))
            ]
        self.windows = {
            number: OpenWindow.loaded(number, self.config.features, parts)
            for number in state.windows
        }

    def changes(self) -> dict[str, Json]:
        """The cursor's parts that changed since the last call; None deletes one."""
        found = self._changed
        self._changed = {}
        found.update(self.learning.changes())
        for window in self.windows.values():
            found.update(window.changes())
        found.update(self._evaluator.changes())
        found.update(self._history.changes())
        self.state.windows = list(self.windows)
        found["drift:meta"] = msgspec.to_builtins(self.state)
        return found

    @property
    def results(self) -> Sequence[MetricResult]:
        """Those of the last evaluated window, for gauges."""
        return self._evaluator.results

    def _new_evaluator(self) -> Evaluator:
        return Evaluator(self.config, self.state, self.baselines, self._history)

    # ------------------------------------------------------------------------- rows

    def add_samples(self, samples: Sequence[Sample], now: int) -> list[DriftEvent]:
        """Counts the rows of these events, in order."""
        if not samples:
            return []
        events = self._end_nodata(now)
        if self.config.window == "batch":
            for sample in samples:
                events += self._add_batch(sample, now)
            return events
        rows = [row for sample in samples for row in sample.rows]
        # A sender's clock that is ahead would make all other rows late.
        times = [min(sample.at, now) for sample in samples for _ in sample.rows]
        first = self._learn(rows) if not self.baselines else 0
        if self.config.span:
            return events + self._add_by_time(rows[first:], times[first:], now)
        return events + self._add_by_count(rows[first:], times[first:], now)

    def _end_nodata(self, now: int) -> list[DriftEvent]:
        """A sample has arrived, which ends a time without data."""
        since = self.state.nodata_since
        self.state.nodata_since = None
        self.state.last_at = now
        if since is None:
            return []
        return [nodata_event(self.config, self.state.version, since, ended_at=now)]

    def _learn(self, rows: Sequence[Sequence[Any]], *, whole: bool = False) -> int:
        """Adds rows to the reference that is being learned; how many it used."""
        used = len(rows)
        if not whole:
            used = min(self.config.learn_rows - len(self.learning), used)
        self.learning.extend(rows[:used])
        if len(self.learning) >= self.config.learn_rows:
            columns = zip(*self.learning.rows, strict=True)
            pairs = zip(self.config.features, columns, strict=True)
            self.baselines = [make_baseline(spec, column) for spec, column in pairs]
            self.state.learned = True
            for index, baseline in enumerate(self.baselines):
                self._changed[f"drift:r/{index}"] = msgspec.to_builtins(baseline)
            self.learning.clear()
            self._evaluator = self._new_evaluator()
        return used

    def relearn(self) -> None:
        """Forgets the reference and the open windows: the next rows are the new reference."""
        for index in range(len(self.config.features)):
            self._changed[f"drift:r/{index}"] = None
        for window in self.windows.values():
            self._changed.update(window.removal())
        self.windows = {}
        self.baselines = []
        for episode in self.state.episodes:
            episode.reset()
        self.state.version += 1
        self.state.learned = False
        self.state.learns = True
        self._evaluator = self._new_evaluator()

    # ------------------------------------------------------------------------- windows

    def _add_batch(self, sample: Sample, now: int) -> list[DriftEvent]:
        """The rows of one event are a window."""
        if not self.baselines:
            self._learn(sample.rows, whole=True)
            return []
        if not sample.rows:
            return []
        window = self._window(self.state.first_open)
        times = [min(sample.at, now)] * len(sample.rows)
        return self._add_to_window(window, sample.rows, times, now) + self._close(window, now)

    def _add_by_count(
        self, rows: Sequence[Sequence[Any]], times: Sequence[int], now: int
    ) -> list[DriftEvent]:
        events = list[DriftEvent]()
        first = 0
        size = self.config.window
        assert isinstance(size, int)
        while first < len(rows):
            window = self._window(self.state.first_open)
            last = first + size - window.n
            events += self._add_to_window(window, rows[first:last], times[first:last], now)
            first = last
            if window.n == size:
                events += self._close(window, now)
        return events

    def _add_by_time(
        self, rows: Sequence[Sequence[Any]], times: Sequence[int], now: int
    ) -> list[DriftEvent]:
        """Row by row, so that batching does not decide what is late; added to windows in runs."""
        events = list[DriftEvent]()
        state = self.state
        waiting: dict[int, tuple[list[Sequence[Any]], list[int]]] = {}  # by window number
        for row, at in zip(rows, times, strict=True):
            number = at // self.config.span
            if number < state.first_open:
                state.late_rows += 1
                continue
            run = waiting.setdefault(number, ([], []))
            run[0].append(row)
            run[1].append(at)
            if state.watermark is None or at > state.watermark:
                state.watermark = at
                oldest = (at - self.config.lateness) // self.config.span
                if oldest > state.first_open:
                    events += self._flush(waiting, now) + self._close_before(oldest, now)
        return events + self._flush(waiting, now)

    def _flush(
        self, waiting: dict[int, tuple[list[Sequence[Any]], list[int]]], now: int
    ) -> list[DriftEvent]:
        events = list[DriftEvent]()
        for number in sorted(waiting):
            events += self._add_to_window(self._window(number), *waiting[number], now)
        waiting.clear()
        return events

    def _add_to_window(
        self,
        window: OpenWindow,
        rows: Sequence[Sequence[Any]],
        times: Sequence[int],
        now: int,
    ) -> list[DriftEvent]:
        """Adds rows. At a change that a detector sees, the rows up to it first: the event shows
        the window as it was then.
        """
        events = list[DriftEvent]()
        first = 0
        for position, changed in self._evaluator.changes_in(rows):
            last = position + 1
            window.add(rows[first:last], times[first:last], self.baselines)
            first = last
            events += self._evaluator.report_changes(changed, window, now)
        if first < len(rows):
            window.add(rows[first:], times[first:], self.baselines)
        return events

    def _window(self, number: int) -> OpenWindow:
        window = self.windows.get(number)
        if window is None:
            window = self.windows[number] = OpenWindow(number, self.config.features)
        return window

    def _close(self, window: OpenWindow, now: int) -> list[DriftEvent]:
        """Evaluates a complete window, unless it is too small, and removes it."""
        events = self._evaluator.evaluate_window(window, now)
        del self.windows[window.number]
        self._changed.update(window.removal())
        self.state.first_open = max(self.state.first_open, window.number + 1)
        return events

    def _close_before(self, number: int, now: int) -> list[DriftEvent]:
        events = list[DriftEvent]()
        for each in sorted(each for each in self.windows if each < number):
            events += self._close(self.windows[each], now)
        self.state.first_open = max(self.state.first_open, number)
        return events

    # ------------------------------------------------------------------------- time

    @property
    def due(self) -> int | None:
        """When `tick` has something to do, if no sample arrives before."""
        config = self.config
        last = max(self.state.last_at or 0, self.since)
        waits = list[int]()
        if config.span and self.windows:
            waits.append(config.span + config.lateness)
        if config.nodata_after is not None and self.state.nodata_since is None:
            waits.append(config.nodata_after)
        return last + min(waits) if waits else None

    def tick(self, now: int) -> list[DriftEvent]:
        """Closes time windows that no later row closes, and notices that no data arrives."""
        config = self.config
        last = max(self.state.last_at or 0, self.since)
        events = list[DriftEvent]()
        if config.span and self.windows and now - last >= config.span + config.lateness:
            events += self._close_before((now - config.lateness) // config.span, now)
        is_due = config.nodata_after is not None and now - last >= config.nodata_after
        if is_due and self.state.nodata_since is None:
            self.state.nodata_since = last
            events.append(nodata_event(config, self.state.version, last))
        return events
