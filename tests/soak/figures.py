"""What the soak reads of the server, and how it decides whether a figure grows.

`read` takes one sample from outside the process (/proc, the files of the store) and from what
app.py says of itself. `judge` fits a line through the second part of each series (Theil and Sen:
the median of the slopes between all pairs of samples, which up to 29 % of outliers do not move) and
compares its rise over that part with what is allowed.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

MB = 1 << 20


@dataclass(frozen=True)
class Sample:
    """`at`: seconds since the traffic began. `values`: by the name of the figure. `kinds`: numbers
    of objects by class, and of threads by name.
    """

    at: float
    values: Mapping[str, float]
    kinds: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """May rise by `allowed`, or by `share` of its median, whichever is more."""

    name: str
    what: str
    allowed: float
    share: float = 0.0
    scale: float = 1.0
    unit: str = ""


FIGURES = (
    # The allocator keeps pages that are partly used; their number settles only slowly. What SQLite
    # caches is limited by its own bounds, and follows the size of the store until then.
    Figure(
        name="memory", what="memory but for page caches", allowed=4 * MB, share=0.03,
        scale=MB, unit=" MB",
    ),
    # Opened and closed with each effect, file and request: the median of many does not move.
    Figure(name="descriptors", what="open descriptors", allowed=2),
    # A pool gets its last threads when some moment has more work than any before.
    Figure(name="threads", what="threads", allowed=3),
    # Follow the number of runs in memory, which varies with the moment.
    Figure(name="tasks", what="asyncio tasks", allowed=20, share=0.1),
    Figure(name="objects", what="Python objects after a collection", allowed=5_000, share=0.02),
    # Pages are reused, but retention works in steps and WAL in checkpoints.
    Figure(
        name="store", what="store, WAL, blobs, checkpoints", allowed=2 * MB, share=0.1,
        scale=MB, unit=" MB",
    ),
    Figure(name="backlog", what="pending deliveries", allowed=20, share=0.1),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """`rise`: of the fitted line over the judged part, in the figure's own unit."""

    figure: Figure
    first: float
    last: float
    rise: float
    allowed: float
    per_hour: float

    @property
    def flat(self) -> bool:
        return self.rise <= self.allowed

    def row(self) -> str:
        numbers = (self.first, self.last, self.rise, self.allowed, self.per_hour)
        cells = "".join(f"{number / self.figure.scale:>12,.1f}" for number in numbers)
        what = self.figure.what + (f",{self.figure.unit}" if self.figure.unit else "")
        return f"{what:<38}{cells}  {'flat' if self.flat else 'GROWS'}"


HEAD = f"{'':<38}{'begin':>12}{'end':>12}{'rise':>12}{'allowed':>12}{'per hour':>12}"


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The median of the slopes between all pairs. Needs two points at different times."""
    return median((b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2))


def judge(samples: Sequence[Sample], warm_up: float, slack: float = 1.0) -> list[Verdict]:
    """One verdict per figure, from the samples after `warm_up` seconds. `slack`: times the allowed
    rise, for a short soak that ends before all caches are full. ValueError for fewer than ten
    samples.
    """
    judged = [sample for sample in samples if sample.at >= warm_up]
    if len(judged) < 10:
        raise ValueError(
            f"expected 10 samples after {warm_up:g} s, found {len(judged)}; run it for longer"
        )
    span = judged[-1].at - judged[0].at
    verdicts: list[Verdict] = []
    for figure in FIGURES:
        points = [(sample.at, sample.values[figure.name]) for sample in judged]
        values = [value for _, value in points]
        tenth = max(3, len(values) // 10)
        steep = slope(points)
        verdicts.append(
            Verdict(
                figure,
                first=median(values[:tenth]),
                last=median(values[-tenth:]),
                rise=steep * span,
                allowed=max(figure.allowed, figure.share * median(values)) * slack,
                per_hour=steep * 3600,
            )
        )
    return verdicts


def grown_kinds(samples: Sequence[Sample], warm_up: float) -> list[str]:
    """The classes and threads whose number rose most: where to look first."""
    judged = [sample for sample in samples if sample.at >= warm_up]
    first, last = judged[0].kinds, judged[-1].kinds
    rises = {name: count - first.get(name, count) for name, count in last.items()}
    ranked = sorted(rises.items(), key=lambda item: -item[1])
    return [f"{name} {rise:+,}" for name, rise in ranked[:8] if rise > 0]


# ------------------------------------------------------------------ reading


def read(pid: int, at: float, store: Path, stats: Path, pending: int) -> Sample:
    """One sample. Raises FileNotFoundError when the process is gone."""
    counted: dict[str, Any] = json.loads(stats.read_text())
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    values = {
        "memory": int(status["VmRSS"].split()[0]) * 1024 - counted["page_caches"],
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "tasks": counted["tasks"],
        "objects": counted["objects"],
        "store": store_size(store),
        "backlog": pending,
    }
    return Sample(at, values, counted["kinds"])


def store_size(store: Path) -> int:
    """Bytes of the ledger and what belongs to it; not of the log lines, which have a quota."""
    files = [f"{store}{end}" for end in ("", "-wal")]
    for kind in ("blobs", "checkpoints"):
        for folder, _, names in os.walk(f"{store}.{kind}"):  # a folder that goes away is left out
            files += [f"{folder}/{name}" for name in names]
    return sum(size_of(path) for path in files)


def size_of(path: str) -> int:
    """0 for a file that is gone."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
