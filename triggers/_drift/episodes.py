"""From windows to the few events that matter: an episode is one drift, detected once, perhaps escalated, and resolved once.

    ok ──── `confirm` bad windows in a row, cool-down over ───► drifting      drift.detected
    drifting ── `confirm` windows at alert, so far a warning ──► drifting      drift.escalated
    drifting ── `clear` clean windows in a row ────────────────► ok            drift.resolved

Bad is a statistic at or over its threshold, clean one below `judge.LEAVE` of it; between the two, neither row of windows goes
on. A window that is too small to judge changes nothing. Silence is told by the engine, beside all of this. Pure decisions:
`engine.py` gives verdicts and the time.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

from triggers._drift.evaluation import Verdict

Move: TypeAlias = Literal["detected", "escalated", "resolved"]


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How quickly an episode begins and ends. `cooldown` in microseconds; `least`: the lowest level that is told of."""

    confirm: int
    clear: int
    cooldown: int
    least: int


class Episode(msgspec.Struct):
    """The machine of a monitor, or of one feature. Times are microseconds.

    `level`: 0 ok, 1 a warning was told, 2 an alert; `told` keeps it after the end. `bad`, `worse`, `clean`: windows in a row.
    `told_at`: when something was told last, `since`: when the episode began, `features`: those it was told of.
    """

    number: int = 0
    level: int = 0
    told: int = 0
    bad: int = 0
    worse: int = 0
    clean: int = 0
    told_at: int | None = None
    since: int | None = None
    features: list[str] = []

    def reset(self) -> None:
        """All is well, as far as anybody knows: the reference is another. The cool-down stays."""
        self.level, self.bad, self.worse, self.clean = 0, 0, 0, 0

    def step(self, verdicts: Sequence[Verdict], rules: Rules, now: int) -> Move | None:
        """What a judged window does."""
        level = max((verdict.level for verdict in verdicts), default=0)
        self.bad = self.bad + 1 if level >= rules.least else 0
        self.worse = self.worse + 1 if level >= 2 else 0
        self.clean = self.clean + 1 if all(verdict.clean for verdict in verdicts) else 0
        return self._drifting(rules, now) if self.level else self._ok(rules, now)

    def burst(self, verdict: Verdict, rules: Rules, now: int) -> Move | None:
        """What a streaming detector does in the middle of a window: it has seen enough to need no second one."""
        if self.level or verdict.level < rules.least or not self._cool(rules, now):
            return None
        self.bad = max(self.bad, rules.confirm)
        return self._detected(verdict.level, now)

    def _ok(self, rules: Rules, now: int) -> Move | None:
        if self.bad < rules.confirm or not self._cool(rules, now):
            return None
        return self._detected(2 if self.worse >= rules.confirm else max(1, rules.least), now)

    def _cool(self, rules: Rules, now: int) -> bool:
        return self.told_at is None or now - self.told_at >= rules.cooldown

    def _detected(self, level: int, now: int) -> Move:
        self.number += 1
        self.level, self.told, self.clean, self.told_at, self.since = level, level, 0, now, now
        return "detected"

    def _drifting(self, rules: Rules, now: int) -> Move | None:
        if self.clean >= rules.clear:
            self.reset()
            return "resolved"
        if self.level == 1 and self.worse >= rules.confirm:
            self.level, self.told, self.told_at = 2, 2, now
            return "escalated"
        return None
