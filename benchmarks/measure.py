"""What a measure is made of, and how its verdict is found. The modules `w*.py` give values,
`__main__.py` runs and prints them.

A measure module has FIGURES, and SIDES: by name, a coroutine function that takes one sample and
returns a value per figure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

GATE = 0.7
"""`--gate` lets a figure fall to this part of its floor: shared machines are noisy, and a real
regression is larger.
"""


def ratio(ours: float, limit: float) -> float:
    return ours / limit


def difference(ours: float, limit: float) -> float:
    return ours - limit


def alone(ours: float, _: float) -> float:
    return ours


def format_number(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One row of the table: `combine(eventflow's value, the limit's)` against a floor and a
    goal.

    `gated_floor`: an earlier floor. The gate is 0.7 of it, as long as the figure does not reach 0.7
    of `floor`; without it the gate is 0.7 of `floor` (for times: divided by 0.7).
    """

    key: str
    what: str
    unit: str
    floor: float
    goal: float
    combine: Callable[[float, float], float] = ratio
    lower_is_better: bool = False
    gated_floor: float | None = None

    @property
    def gate(self) -> float:
        """The worst value that passes `--gate`."""
        floor = self.floor if self.gated_floor is None else self.gated_floor
        return floor / GATE if self.lower_is_better else floor * GATE

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
        return self.meets(value, self.gate)

    def meets(self, value: float, bound: float) -> bool:
        return value <= bound if self.lower_is_better else value >= bound
