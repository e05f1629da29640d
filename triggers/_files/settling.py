"""What is known of a landing directory and what still moves in it: the state machine between a sighting and an event.

                     ┌──────── another size, mtime or inode: the wait begins anew ───────┐
                     ▼                                                                   │
    see(new) ──► PENDING ── looked at again, the same, `settle` later ──► ripe ── accepted ──► KNOWN ── see(other) ──┘
                     │                                                     ▲
    see(gone) ───────┴── a known file missing for `settle` ────────────────┘ (forgotten, or a deletion)

No I/O and no clock: whoever looked says what was there and when. `listener.py` drives it; `tree.py` reads `Known` as it walks.
`Known` is the trigger's cursor in memory: 1,000,000 files take about 140 MB, so a mark is one integer, not a tuple.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

from eventflow.events.event import Json
from triggers._files.names import from_key

WINDOW = 20_000
"""Pending files held at once (about 8 MB); a walk pauses while the window is full, so a flood streams at WINDOW / settle."""


class Sight(NamedTuple):
    """A regular file as one stat showed it. `inode` is 0 where inodes mean nothing (network file systems)."""

    size: int
    mtime_ns: int
    inode: int


# --------------------------------------------------------------------------- known

_HALF = (1 << 60) - 1  # four 30-bit digits hold two halves: the integer stays at 44 bytes
_OWED = 1 << 120


def mark(sight: Sight, sample: int | None, owed: bool = False) -> int:
    """A known version of a file in one integer: who it is, what is in it, and whether its move or removal is still owed."""
    return _OWED * owed | (hash(sight) & _HALF) << 60 | _content(sight, sample)


def _content(sight: Sight, sample: int | None) -> int:
    return 0 if sample is None else hash((sight.size, sight.inode, sample)) & _HALF


class Known:
    """Every file whose last version is in the ledger, by directory and name. Changes only after a commit."""

    def __init__(self) -> None:
        self._marks: dict[bytes, dict[bytes, int]] = {}

    def load(self, cursor: Mapping[str, Json]) -> None:
        """Takes in the cursor: `{relative path: [size, mtime_ns, inode, sample, owed]}`."""
        for key, value in cursor.items():
            if key.startswith("/") and not key.startswith("//"):
                continue  # the trigger's own notes, not a path
            size, mtime_ns, inode, sample, owed = cast(
                "tuple[int, int, int, int | None, int]", value
            )
            self.add(from_key(key), mark(Sight(size, mtime_ns, inode), sample, bool(owed)))

    def __contains__(self, path: bytes) -> bool:
        directory, _, name = path.rpartition(b"/")
        return name in self._marks.get(directory, ())

    def __len__(self) -> int:
        return sum(map(len, self._marks.values()))

    def directories(self) -> list[bytes]:
        return list(self._marks)

    def within(self, directory: bytes) -> dict[bytes, int]:
        """The marks of one directory by name. Read only."""
        return self._marks.get(directory) or {}

    def add(self, path: bytes, value: int) -> None:
        directory, _, name = path.rpartition(b"/")
        self._marks.setdefault(directory, {})[name] = value

    def forget(self, path: bytes) -> None:
        directory, _, name = path.rpartition(b"/")
        if (marks := self._marks.get(directory)) is not None:
            marks.pop(name, None)
            if not marks:
                del self._marks[directory]

    def _mark(self, path: bytes) -> int | None:
        directory, _, name = path.rpartition(b"/")
        return self.within(directory).get(name)

    def unchanged(self, path: bytes, sight: Sight) -> bool:
        value = self._mark(path)
        return value is not None and same_file(value, sight)

    def only_touched(self, path: bytes, sight: Sight, sample: int | None) -> bool:
        """Whether the known version had this size, inode and content, so that at most its times differ."""
        value = self._mark(path)
        return value is not None and sample is not None and value & _HALF == _content(sight, sample)

    def owes(self, path: bytes) -> bool:
        value = self._mark(path)
        return value is not None and is_owed(value)


def same_file(value: int, sight: Sight) -> bool:
    return value >> 60 & _HALF == hash(sight) & _HALF


def is_owed(value: int) -> bool:
    return value >= _OWED


# --------------------------------------------------------------------------- pending


@dataclass(slots=True)
class _Pending:
    sight: Sight | None  # None: a known file is gone
    first_at: int  # microseconds, wall clock
    due: float  # monotonic: still at or after this, it is ripe
    last: float  # monotonic: a moment before the latest look that found `sight`


class Ripe(NamedTuple):
    """A path that held still long enough. `sight` None: a known file that is gone. `first_at`: microseconds."""

    path: bytes
    sight: Sight | None
    first_at: int


class Settling:
    """The files that still move, and when each will have held still."""

    def __init__(self, known: Known, settle: float, zero_byte_grace: float) -> None:
        self._known, self._settle, self._grace = known, settle, max(settle, zero_byte_grace)
        self._pending: dict[bytes, _Pending] = {}

    @property
    def room(self) -> int:
        return max(0, WINDOW - len(self._pending))

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, path: bytes) -> bool:
        return path in self._pending

    def see(
        self, path: bytes, sight: Sight | None, *, before: float, after: float, now_us: int
    ) -> None:
        """Takes in one look at `path`, made between the monotonic instants `before` and `after`.

        The wait of a new sight counts from `after`, its confirmation from `before`: slowness never shortens it.
        """
        held = self._pending.get(path)
        if held is not None and held.sight == sight:
            held.last = before
        elif (path not in self._known) if sight is None else self._known.unchanged(path, sight):
            self._pending.pop(path, None)
        else:
            first_at = held.first_at if held is not None else now_us
            self._pending[path] = _Pending(sight, first_at, after + self._needed(sight), before)

    def _needed(self, sight: Sight | None) -> float:
        return self._grace if sight is not None and sight.size == 0 else self._settle

    def due(self, now: float) -> list[bytes]:
        """The paths to look at once more: if nothing has changed, they are ripe."""
        return [path for path, held in self._pending.items() if held.due <= now]

    def older_than(self, instant_us: int) -> list[bytes]:
        """The paths first seen before an instant and still not ripe."""
        return [path for path, held in self._pending.items() if held.first_at < instant_us]

    def next_due(self) -> float | None:
        return min((held.due for held in self._pending.values()), default=None)

    def ripe(self, paths: Iterable[bytes]) -> list[Ripe]:
        """Those of `paths` whose latest look came at or after their due time, oldest file first."""
        found = list(self._ripe(paths))
        found.sort(key=lambda each: (each.sight.mtime_ns if each.sight else 0, each.path))
        return found

    def _ripe(self, paths: Iterable[bytes]) -> Iterator[Ripe]:
        for path in paths:
            held = self._pending.get(path)
            if held is not None and held.last >= held.due:
                yield Ripe(path, held.sight, held.first_at)

    def postpone(self, path: bytes, until: float) -> None:
        """Leaves a ripe path pending (its marker is missing); it is looked at again at `until`."""
        if (held := self._pending.get(path)) is not None:
            held.due = until

    def done(self, path: bytes) -> None:
        self._pending.pop(path, None)
