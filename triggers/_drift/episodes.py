"""Episodes: one drift is detected once, perhaps escalated, and resolved once.

    ok ──── `confirm` bad windows in a row, cool-down over ────► drifting      drift.detected
    drifting ── `confirm` windows at alert, so far a warning ──► drifting      drift.escalated
    drifting ── `clear` clean windows in a row ────────────────► ok            drift.resolved

A window is bad when a statistic is at or over its threshold, and clean when all are below
`evaluation.CLEAN_SHARE` of it; between the two, neither row of windows grows. A window that is too
small to evaluate changes nothing. `drift.nodata` is not part of an episode (engine.py). Decisions
only: evaluator.py brings the results and the time.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

from triggers._drift.evaluation import MetricResult

Move: TypeAlias = Literal["detected", "escalated", "resolved"]


class EpisodeRules(msgspec.Struct, frozen=True, kw_only=True):
    """How quickly an episode begins and ends.

    `cooldown` in microseconds. `min_level`: the lowest level that makes events.
    """

    confirm: int
    clear: int
    cooldown: int
    min_level: int


class Episode(msgspec.Struct):
    """The state machine of a monitor, or of one feature. Times in microseconds.

    `level`: 0 ok, 1 a warning was reported, 2 an alert; `reported_level` keeps it after the end.
    `bad`, `worse`, `clean`: windows in a row. `reported_at`: time of the last event, `since`: when
    the episode began, `features`: the drifted ones. Stored; the names in the store are those of the
    first version.
    """

    number: int = 0
    level: int = 0
    reported_level: int = msgspec.field(name="told", default=0)
    bad: int = 0
    worse: int = 0
    clean: int = 0
    reported_at: int | None = msgspec.field(name="told_at", default=None)
    since: int | None = None
    features: list[str] = []

    def reset(self) -> None:
        """Ends the episode without an event, as for a new reference. The cool-down continues."""
        self.level = 0
        self.bad = 0
        self.worse = 0
        self.clean = 0

    def step(self, results: Sequence[MetricResult], rules: EpisodeRules, now: int) -> Move | None:
        """The move that an evaluated window causes."""
        level = max((result.level for result in results), default=0)
        self.bad = self.bad + 1 if level >= rules.min_level else 0
        self.worse = self.worse + 1 if level >= 2 else 0
        self.clean = self.clean + 1 if all(result.clean for result in results) else 0
        if self.level:
            return self._step_drifting(rules, now)
        if self.bad < rules.confirm or not self._is_cooled_down(rules, now):
            return None
        return self._begin(2 if self.worse >= rules.confirm else max(1, rules.min_level), now)

    def burst(self, result: MetricResult, rules: EpisodeRules, now: int) -> Move | None:
        """The move that a streaming detector causes in the middle of a window. It needs no second
        window: the detector has seen enough rows.
        """
        if self.level or result.level < rules.min_level or not self._is_cooled_down(rules, now):
            return None
        self.bad = max(self.bad, rules.confirm)
        return self._begin(result.level, now)

    def _is_cooled_down(self, rules: EpisodeRules, now: int) -> bool:
        return self.reported_at is None or now - self.reported_at >= rules.cooldown

    def _begin(self, level: int, now: int) -> Move:
        self.number += 1
        self.level = level
        self.reported_level = level
        self.clean = 0
        self.reported_at = now
        self.since = now
        return "detected"

    def _step_drifting(self, rules: EpisodeRules, now: int) -> Move | None:
        if self.clean >= rules.clear:
            self.reset()
            return "resolved"
        if self.level == 1 and self.worse >= rules.confirm:
            self.level = 2
            self.reported_level = 2
            self.reported_at = now
            return "escalated"
        return None
