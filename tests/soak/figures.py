"""What the soak reads of the server, and how it decides whether a figure grows.

`read` takes one sample from outside the process (/proc, the files of the store) and from what
app.py says of itself. `judge` fits a line through the second part of each series (Theil and Sen:
the median of the slopes between all pairs of samples, which up to 29 % of outliers do not move) and
compares its rise over that part with what is allowed.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

MB = 1 << 20


@dataclass(frozen=True)
class Sample:
    """`at`: seconds since the traffic began. `values`: by the name of the figure. `kinds`: what a
    figure counts: objects by class, threads by name, descriptors by what they refer to.
    """

    at: float
    values: Mapping[str, float]
    kinds: Mapping[str, Mapping[str, int]]


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
    # Descriptors open and close with each effect, file and request; their median does not move. The
    # senders keep one connection each.
    Figure(name="descriptors", what="open descriptors", allowed=2),
    # The app fills each pool at its start. A few threads come and go.
    Figure(name="threads", what="threads", allowed=2),
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


@dataclass(frozen=True)
class Change:
    """Medians of the first and the last tenth of the judged samples."""

    kind: str
    first: float
    last: float

    def __str__(self) -> str:
        change = f" ({self.last - self.first:+,g})" if self.last != self.first else ""
        return f"{self.kind} {self.last:,g}{change}"


def changes(samples: Sequence[Sample], warm_up: float, figure: str) -> list[Change]:
    """The change of each kind that the figure counts, the largest rise first. Kinds that most
    samples do not have are left out.
    """
    judged = [sample.kinds.get(figure, {}) for sample in samples if sample.at >= warm_up]
    tenth = max(3, len(judged) // 10)
    found = [
        Change(
            kind,
            first=median(each.get(kind, 0) for each in judged[:tenth]),
            last=median(each.get(kind, 0) for each in judged[-tenth:]),
        )
        for kind in {kind for each in judged for kind in each}
    ]
    kept = [each for each in found if each.first or each.last]
    return sorted(kept, key=lambda each: (each.first - each.last, -each.last, each.kind))


# ------------------------------------------------------------------ reading

TCP_STATES = {"01": "connection", "08": "connection closed by the peer", "0A": "listening socket"}
"""By the number in /proc/net/tcp."""


@dataclass(frozen=True)
class Observed:
    """Where to read. `ports`: names of what listens on them, the server itself included."""

    pid: int
    store: Path
    stats: Path
    ports: Mapping[int, str]


def read(server: Observed, at: float, pending: int) -> Sample:
    """One sample. Raises FileNotFoundError when the process is gone."""
    counted: dict[str, Any] = json.loads(server.stats.read_text())
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{server.pid}/status").read_text().splitlines()
    )
    descriptors = descriptors_of(server)
    values = {
        "memory": int(status["VmRSS"].split()[0]) * 1024 - counted["page_caches"],
        "descriptors": descriptors.total(),
        "threads": int(status["Threads"]),
        "tasks": counted["tasks"],
        "objects": counted["objects"],
        "store": store_size(server.store),
        "backlog": pending,
    }
    return Sample(at, values, {**counted["kinds"], "descriptors": dict(descriptors)})


def descriptors_of(server: Observed) -> Counter[str]:
    """How many refer to each file, each peer, and each kind of what has no name."""
    proc = Path(f"/proc/{server.pid}")
    sockets = sockets_of(proc / "net", server.ports)
    found: Counter[str] = Counter()
    for each in os.listdir(proc / "fd"):
        try:
            target = os.readlink(proc / "fd" / each)
        except FileNotFoundError:  # closed since
            continue
        kind, _, number = target.partition(":")
        if kind == "socket":
            found[sockets.get(number.strip("[]"), "socket without an address")] += 1
        elif kind == "anon_inode":
            found[number.strip("[]")] += 1
        else:
            found[name_of(target, server.store) if target.startswith("/") else kind] += 1
    return found


def name_of(path: str, store: Path) -> str:
    """Of a file beside the store: its name, or that of the folder it is in."""
    folder = f"{store.parent}/"
    if not path.startswith(folder):
        return path
    first, slash, _ = path.removeprefix(folder).partition("/")
    return first + slash


def sockets_of(net: Path, ports: Mapping[int, str]) -> dict[str, str]:
    """What each socket is for, by its inode; those without an address are missing."""
    found: dict[str, str] = {}
    for table in net.glob("tcp*"):  # tcp6 only where there is IPv6
        for line in table.read_text().splitlines()[1:]:
            _, local, peer, state, *_ = fields = line.split()
            own = ports.get(int(local.rpartition(":")[2], 16))
            other = int(peer.rpartition(":")[2], 16)
            if own is None:
                name = f"connection to {ports.get(other, f'port {other}')}"
            else:
                name = f"{TCP_STATES.get(state, f'connection in state {state}')} of {own}"
            found[fields[9]] = name
    unix = (net / "unix").read_text().splitlines()[1:]
    return found | {line.split()[6]: "unix socket" for line in unix}


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
