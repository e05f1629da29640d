"""What a measure is made of, and how its verdict is found. The modules `w*.py` give values,
`__main__.py` runs and prints them.

A measure module has FIGURES, and SIDES: by name, a coroutine function that takes one sample and
returns a value per figure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

GATE = 0.7
"""CI lets a figure fall to this part of its floor: shared machines are noisy, and a real regression
is larger.
"""


def ratio(ours: float, limit: float) -> float:
    return ours / limit


def difference(ours: float, limit: float) -> float:
    return ours - limit


def alone(ours: float, _: float) -> float:
    return ours


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One row of the table: `combine(eventflow's value, the limit's)` against a floor and a
    goal.
    """

    key: str
    what: str
    unit: str
    floor: float
    goal: float
    combine: Callable[[float, float], float] = ratio
    lower_is_better: bool = False

    def value(self, ours: list[float], limit: list[float]) -> float:
        """The median over pairs; a side without samples counts as nothing to compare with."""
        pairs = zip(ours, limit or [float("nan")] * len(ours), strict=True)
        return median(self.combine(mine, its) for mine, its in pairs)

    def verdict(self, value: float) -> str:
        if self.meets(value, self.goal):
            return "goal"
        if self.meets(value, self.floor):
            return "ok"
        return "below the floor" if self.passes_gate(value) else "FAILS"

    def passes_gate(self, value: float) -> bool:
        return self.meets(value, self.floor / GATE if self.lower_is_better else self.floor * GATE)

    def meets(self, value: float, bound: float) -> bool:
        return value <= bound if self.lower_is_better else value >= bound
