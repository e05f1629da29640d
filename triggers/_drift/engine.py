"""The monitor without its source: rows go in, drifts come out, and what must be remembered between is told in parts.

    take ─► reference (given, or the first N) ─► window ─► over? judge ─► episode ─► Drift

Deterministic in rows and clock: the same state and the same rows give the same drifts under the same ids, however the rows are
batched, so that a batch whose transaction failed is simply taken again. `desk.py` calls it, one call at a time; `telling.py`
words the drifts.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import msgspec

from eventflow.events.event import Json
from triggers._drift.baseline import Baseline, make_baseline
from triggers._drift.config import Sample, Setting
from triggers._drift.drift_events import Told, tell, tell_silence
from triggers._drift.episodes import Episode, Move
from triggers._drift.evaluation import Verdict, judge, measure, measured_then
from triggers._drift.features import STREAMING
from triggers._drift.history import History
from triggers._drift.streaming import Adwin, Detector, PageHinkley
from triggers._drift.window import Judged, Rows, Window

FIRST_LOOK = 16
"""Rows after a change from which on their mean is looked at; a power of two, as all later looks are."""

AGAIN = 64
"""Rows after which a change is another one: a detector tells the same change several times while it adapts."""


class Memory(msgspec.Struct):
    """The small part that every batch writes. Times in microseconds.

    `learned`: the reference is in the parts; `own`: it is to be learned, whatever the app gives. `opened`: the first window
    that still takes rows. `watermark`: the latest time seen. `silent`: since when no sample came, once that was told. `late`
    counts rows, `insufficient` and `judged` windows.
    """

    digest: str
    version: int = 1
    learned: bool = False
    own: bool = False
    opened: int = 0
    windows: list[int] = []
    watermark: int | None = None
    last_at: int | None = None
    silent: int | None = None
    late: int = 0
    insufficient: int = 0
    judged: int = 0
    episodes: list[Episode] = []


class Engine:
    """All that a monitor knows. `parts` are what earlier calls of `changes` said; `since` is when it began to listen."""

    def __init__(self, setting: Setting, parts: Mapping[str, Any], since: int) -> None:
        self.setting, self.since = setting, since
        self.baselines: list[Baseline] = list(setting.given)
        self.learning = Rows("drift:l/")
        self.windows: dict[int, Window] = {}
        self.verdicts: Sequence[Verdict] = ()
        self._history, self._measured_by = History(setting.history, parts), setting.measured()
        self._changed: dict[str, Json] = {}
        self.memory = Memory(setting.digest(), episodes=self._episodes())
        self._detectors = self._new_detectors()
        if "drift:meta" in parts:
            self._load(parts)

    def _episodes(self) -> list[Episode]:
        return [Episode() for _ in (self.setting.watched if self.setting.per_feature else [None])]

    # ------------------------------------------------------------------------- parts

    def _load(self, parts: Mapping[str, Any]) -> None:
        memory = msgspec.convert(parts["drift:meta"], Memory)
        if (
            memory.digest != self.memory.digest
        ):  # other features, reference or windows: what was counted is void
            self._changed = {
                key: None for key in parts if key.startswith("drift:") and key[6] in "lrwxs"
            }
            self.memory.version = memory.version + 1
            return
        self.memory = memory
        self.learning = Rows.loaded("drift:l/", parts)
        if memory.own:
            self.baselines = []
        if memory.learned:
            places = range(len(self.setting.watched))
            self.baselines = [
                msgspec.convert(parts[f"drift:r/{place}"], Baseline) for place in places
            ]
        self.windows = {
            number: Window.loaded(number, self.setting.watched, parts) for number in memory.windows
        }
        self._detectors = self._new_detectors()
        for place, detector in self._detectors.items():
            if (state := parts.get(f"drift:s/{place}")) is not None:
                detector.load(state)

    def changes(self) -> dict[str, Json]:
        """The parts that have another value than at the last call; None takes one out."""
        found, self._changed = self._changed, {}
        found.update(self.learning.changes())
        for window in self.windows.values():
            found.update(window.changes())
        for place, detector in self._detectors.items():
            found[f"drift:s/{place}"] = detector.state()
        found.update(self._history.changes())
        self.memory.windows = list(self.windows)
        found["drift:meta"] = msgspec.to_builtins(self.memory)
        return found

    # ------------------------------------------------------------------------- rows in

    def take(self, samples: Sequence[Sample], now: int) -> list[Told]:
        """Counts the rows of these events, in order; what is to be told of them."""
        if not samples:
            return []
        told = self._heard(now)
        if self.setting.window == "batch":
            for sample in samples:
                told += self._whole(sample, now)
            return told
        rows = [row for sample in samples for row in sample.rows]
        times = [
            min(sample.at, now) for sample in samples for _ in sample.rows
        ]  # a clock ahead would make all others late
        first = self._learn(rows) if not self.baselines else 0
        if self.setting.span:
            return told + self._by_time(rows[first:], times[first:], now)
        return told + self._by_count(rows[first:], times[first:], now)

    def _heard(self, now: int) -> list[Told]:
        """A sample came: if it was silent, it no longer is."""
        told = [tell_silence(self, now, over=True)] if self.memory.silent is not None else []
        self.memory.silent, self.memory.last_at = None, now
        return told

    def _learn(self, rows: Sequence[Sequence[Any]], *, whole: bool = False) -> int:
        """Adds to the reference to be; how many rows it took."""
        taken = len(rows) if whole else min(self.setting.learn - len(self.learning), len(rows))
        self.learning.extend(rows[:taken])
        if len(self.learning) >= self.setting.learn:
            columns = list(zip(*self.learning.rows, strict=True))
            pairs = zip(self.setting.watched, columns, strict=True)
            self.baselines = [make_baseline(watched, column) for watched, column in pairs]
            self.memory.learned = True
            self._changed |= {
                f"drift:r/{place}": msgspec.to_builtins(each)
                for place, each in enumerate(self.baselines)
            }
            self.learning.clear()
            self._detectors = self._new_detectors()
        return taken

    def relearn(self) -> None:
        """Forgets the reference and what was compared with it: the next rows are the new one."""
        self._changed |= {f"drift:r/{place}": None for place in range(len(self.setting.watched))}
        for window in self.windows.values():
            self._changed.update(window.removal())
        self.windows, self.baselines, self.verdicts = {}, [], ()
        for episode in self.memory.episodes:
            episode.reset()
        self.memory.version += 1
        self.memory.learned, self.memory.own = False, True
        self._detectors = self._new_detectors()

    # ------------------------------------------------------------------------- windows

    def _whole(self, sample: Sample, now: int) -> list[Told]:
        """A batch is a window."""
        if not self.baselines:
            self._learn(sample.rows, whole=True)
            return []
        if not sample.rows:
            return []
        window = self._window(self.memory.opened)
        told = self._add(window, sample.rows, [min(sample.at, now)] * len(sample.rows), now)
        return told + self._close(window, now)

    def _by_count(
        self, rows: Sequence[Sequence[Any]], times: Sequence[int], now: int
    ) -> list[Told]:
        told, first, size = list[Told](), 0, self.setting.window
        assert isinstance(size, int)
        while first < len(rows):
            window = self._window(self.memory.opened)
            last = first + size - window.n
            told += self._add(window, rows[first:last], times[first:last], now)
            first = last
            if window.n == size:
                told += self._close(window, now)
        return told

    def _by_time(self, rows: Sequence[Sequence[Any]], times: Sequence[int], now: int) -> list[Told]:
        """Row by row, so that what is late does not hang on how rows are batched; added to windows in runs."""
        told, memory = list[Told](), self.memory
        waiting: dict[int, tuple[list[Sequence[Any]], list[int]]] = {}
        for row, at in zip(rows, times, strict=True):
            number = at // self.setting.span
            if number < memory.opened:
                memory.late += 1
                continue
            kept = waiting.setdefault(number, ([], []))
            kept[0].append(row)
            kept[1].append(at)
            if memory.watermark is None or at > memory.watermark:
                memory.watermark = at
                over = (at - self.setting.lateness) // self.setting.span
                if over > memory.opened:
                    told += self._flush(waiting, now) + self._close_before(over, now)
        return told + self._flush(waiting, now)

    def _flush(
        self, waiting: dict[int, tuple[list[Sequence[Any]], list[int]]], now: int
    ) -> list[Told]:
        told = [
            each
            for number in sorted(waiting)
            for each in self._add(self._window(number), *waiting[number], now)
        ]
        waiting.clear()
        return told

    def _close_before(self, number: int, now: int) -> list[Told]:
        told = [each for window in self._before(number) for each in self._close(window, now)]
        self.memory.opened = max(self.memory.opened, number)
        return told

    def _before(self, number: int) -> list[Window]:
        return [self.windows[each] for each in sorted(self.windows) if each < number]

    def _window(self, number: int) -> Window:
        window = self.windows.get(number)
        if window is None:
            window = self.windows[number] = Window(number, self.setting.watched)
        return window

    def _close(self, window: Window, now: int) -> list[Told]:
        """The window is over: judged, unless it is too small, and gone."""
        told = self._judge(window, now)
        del self.windows[window.number]
        self._changed.update(window.removal())
        self.memory.opened = max(self.memory.opened, window.number + 1)
        return told

    def _judge(self, window: Window, now: int) -> list[Told]:
        if window.n < self.setting.min_samples:
            self.memory.insufficient += 1
            return []
        changed = [
            place in self._detectors and self._detectors[place].changed
            for place in range(len(self.setting.watched))
        ]
        measured = measure(window, self.setting.watched, self.baselines, changed)
        self._keep(measured, window, now)
        return self._decide(measured, window, now)

    def again(self, judged: Judged) -> list[Told]:
        """A window that was measured before, by the thresholds and rules of now."""
        measured = measured_then(judged, self.setting.watched)
        if judged.midway:
            told = [self._spring(each, judged, judged.at) for each in measured]
            return [each for each in told if each is not None]
        return (
            self._decide(measured, judged, judged.at)
            if judged.n >= self.setting.min_samples
            else []
        )

    def _keep(
        self, measured: Sequence[Verdict], window: Window, now: int, *, midway: bool = False
    ) -> None:
        found = [
            (each.place, each.metric, each.statistic, each.p_value)
            for each in measured
            if isfinite(each.statistic)
        ]
        self._history.add(
            Judged(self._measured_by, now, window.n, window.start, window.end, found, midway)
        )

    def _decide(self, measured: Sequence[Verdict], window: Window | Judged, now: int) -> list[Told]:
        self.verdicts = judge(measured, self.setting.alpha)
        self.memory.judged += 1
        told = [self._step(unit, window, now) for unit in range(len(self.memory.episodes))]
        return [each for each in told if each is not None]

    def _step(self, unit: int, window: Window | Judged, now: int) -> Told | None:
        verdicts = self.of_unit(unit)
        move = self.memory.episodes[unit].step(verdicts, self.setting.rules, now)
        if not self.memory.episodes[unit].level:
            self._forget_changes(verdicts)
        return tell(self, unit, move, verdicts, window) if move else None

    def _forget_changes(self, verdicts: Sequence[Verdict]) -> None:
        """All is well: a change that did not matter, or no longer does, is none."""
        for verdict in verdicts:
            if verdict.metric in STREAMING and verdict.clean:
                self._detectors[verdict.place].changed = False

    def of_unit(self, unit: int) -> list[Verdict]:
        """The last window's verdicts that an episode is about."""
        return [
            verdict
            for verdict in self.verdicts
            if not self.setting.per_feature or verdict.place == unit
        ]

    # ------------------------------------------------------------------------- streaming detectors

    def _new_detectors(self) -> "dict[int, _Watch]":
        """One for each feature that has one, on the reference as if it had gone before."""
        watched = [
            (place, each)
            for place, each in enumerate(self.setting.watched)
            if each.metric in STREAMING
        ]
        delta = self.setting.alpha / max(len(watched), 1)
        return {
            place: _Watch(each.metric, delta, self.baselines[place] if self.baselines else None)
            for place, each in watched
        }

    def _add(
        self, window: Window, rows: Sequence[Sequence[Any]], times: Sequence[int], now: int
    ) -> list[Told]:
        """Adds rows to a window; up to each change that a detector sees first, so that it is told as it stood then."""
        told, first = list[Told](), 0
        for place, row in enumerate(rows) if self._detectors else ():
            seen = [each for each, detector in self._detectors.items() if detector.look(row[each])]
            if seen:
                window.add(rows[first : place + 1], times[first : place + 1], self.baselines)
                first = place + 1
                told += [
                    each
                    for feature in seen
                    if (each := self._burst(feature, window, now)) is not None
                ]
        if first < len(rows):
            window.add(rows[first:], times[first:], self.baselines)
        return told

    def _burst(self, place: int, window: Window, now: int) -> Told | None:
        """A change in the middle of a window, told at once if it is large enough to matter."""
        ((metric, warn, alert), *_) = self.setting.watched[place].checks
        seen = Verdict(place, metric, self._detectors[place].shift, 0.0, warn, alert)
        self._keep([seen], window, now, midway=True)
        return self._spring(seen, window, now)

    def _spring(self, seen: Verdict, window: Window | Judged, now: int) -> Told | None:
        place, level = (
            seen.place,
            2 if seen.statistic >= seen.alert else 1 if seen.statistic >= seen.warn else 0,
        )
        verdict = msgspec.structs.replace(seen, level=level, clean=level == 0)
        unit = place if self.setting.per_feature else 0
        move: Move | None = self.memory.episodes[unit].burst(verdict, self.setting.rules, now)
        return tell(self, unit, move, [verdict], window) if move else None

    # ------------------------------------------------------------------------- time alone

    @property
    def due(self) -> int | None:
        """When `tick` has something to do, if no sample comes before."""
        setting, last = self.setting, max(self.memory.last_at or 0, self.since)
        waits = [setting.span + setting.lateness] if setting.span and self.windows else []
        waits += (
            [setting.nodata] if setting.nodata is not None and self.memory.silent is None else []
        )
        return last + min(waits) if waits else None

    def tick(self, now: int) -> list[Told]:
        """What the passing of time does: windows of time that nothing more will end, and silence."""
        last = max(self.memory.last_at or 0, self.since)
        told = list[Told]()
        if self.setting.span and now - last >= self.setting.span + self.setting.lateness:
            told += (
                self._close_before((now - self.setting.lateness) // self.setting.span, now)
                if self.windows
                else []
            )
        if (
            self.setting.nodata is not None
            and self.memory.silent is None
            and now - last >= self.setting.nodata
        ):
            self.memory.silent = last
            told.append(tell_silence(self, now, over=False))
        return told


class _Watch:
    """A streaming detector on one feature, in standard deviations of its reference.

    A change that was seen may be small, or nothing. The rows after it tell: `look` says when there are twice as many of them as
    at the last look, and `shift` how far their mean is from the reference's.
    """

    def __init__(self, metric: str, delta: float, baseline: Baseline | None) -> None:
        self._metric, self._delta, self._baseline = metric, delta, baseline
        self._detector = self._make(None)
        self.changed = False
        self.rows, self.sum = 0, 0.0
        for value in baseline.sample if baseline else ():
            self._detector.update(self._scaled(value))

    def _make(self, state: Any) -> Detector:
        return Adwin(self._delta, state) if self._metric == "adwin" else PageHinkley(state=state)

    def _scaled(self, value: float) -> float:
        assert self._baseline is not None
        return (value - self._baseline.mean) / self._baseline.deviation

    def load(self, state: Any) -> None:
        self.changed, self.rows, self.sum, inner = state
        self._detector = self._make(inner)

    def state(self) -> list[Any]:
        return [self.changed, self.rows, self.sum, self._detector.state()]

    @property
    def shift(self) -> float:
        """From the reference's mean to that of the rows since the change; 0 while four standard errors could explain it."""
        found = abs(self.sum / self.rows)
        return found if found >= 4 / self.rows**0.5 else 0.0

    def look(self, value: Any) -> bool:
        """Takes a value; whether now is the time to see how far the mean has moved."""
        if self._baseline is None or not isinstance(value, int | float):
            return False
        scaled = self._scaled(value)
        if self._detector.update(scaled) and (not self.changed or self.rows >= AGAIN):
            self.changed, self.rows, self.sum = True, 0, 0.0
        if not self.changed:
            return False
        self.rows += 1
        self.sum += scaled
        return self.rows >= FIRST_LOOK and self.rows & (self.rows - 1) == 0
