"""Known and pending files: the state machine between the first stat of a file and its event.

                       ┌──────── another size, mtime or inode: the wait restarts ────────┐
                       ▼                                                                 │
    observe(new) ──► PENDING ── same stat again, `settle` later ──► SETTLED ── accepted ──► KNOWN
                       │                                               ▲
    observe(gone) ─────┴── a known file missing for `settle` ──────────┘ (forgotten, or a deletion)

No I/O and no clock: the caller passes what a stat found and when. walks.py and listener.py call
`observe`, recorder.py takes the settled files; tree.py reads `KnownFiles` during a walk.
`KnownFiles` is the trigger's cursor in memory: 1,000,000 files take about 140 MB, so a mark is one
integer and not a tuple.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

from eventflow.events.event import Json
from triggers._files.names import from_key

MAX_PENDING_FILES = 20_000
"""At the same time (about 8 MB). A walk pauses at the limit, so that a flood streams at
MAX_PENDING_FILES / settle.
"""


MIN_MTIME_NS = -(1 << 63)
MAX_MTIME_NS = (1 << 63) - 1
"""Bounds of an mtime in ns, in the years 1677 and 2262. Some mounts report times beyond them: such
a time is set to the bound, and counts as unknown (`FileStat.has_mtime`).
"""


class FileStat(NamedTuple):
    """The version of a regular file. `inode` is 0 where it does not identify a file (network file
    systems).
    """

    size: int
    mtime_ns: int
    inode: int

    @property
    def has_mtime(self) -> bool:
        return MIN_MTIME_NS < self.mtime_ns < MAX_MTIME_NS


# --------------------------------------------------------------------------- known

_HALF_MASK = (1 << 60) - 1  # two halves in four 30-bit digits: the integer has 44 bytes
_REMOVAL_PENDING = 1 << 120


def pack_mark(stat: FileStat, sample: int | None, removal_pending: bool = False) -> int:
    """A known version in one integer: hashes of the stat and of the content, and whether its source
    is to be removed.
    """
    return (
        _REMOVAL_PENDING * removal_pending
        | (hash(stat) & _HALF_MASK) << 60
        | _content(stat, sample)
    )


def _content(stat: FileStat, sample: int | None) -> int:
    return 0 if sample is None else hash((stat.size, stat.inode, sample)) & _HALF_MASK


class KnownFiles:
    """The files whose last version is recorded, by directory and name. Changes after commits."""

    def __init__(self) -> None:
        self._marks: dict[bytes, dict[bytes, int]] = {}

    def load(self, cursor: Mapping[str, Json]) -> None:
        """Reads the cursor: `{relative path: [size, mtime_ns, inode, sample, state]}`, where the
        state is 1 for a pending removal (others: outcomes.py).
        """
        for key, value in cursor.items():
            if key.startswith("/") and not key.startswith("//"):
                continue  # a key of the trigger, not a path
            size, mtime_ns, inode, sample, state, *_ = cast(
                "tuple[int, int, int, int | None, int]", value
            )
            self.add(
                from_key(key),
                pack_mark(FileStat(size, mtime_ns, inode), sample, state == 1),
            )

    def __contains__(self, path: bytes) -> bool:
        directory, _, name = path.rpartition(b"/")
        return name in self._marks.get(directory, ())

    def __len__(self) -> int:
        return sum(map(len, self._marks.values()))

    def directories(self) -> list[bytes]:
        return list(self._marks)

    def within(self, directory: bytes) -> dict[bytes, int]:
        """The marks of one directory by file name. Read only."""
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

    def is_unchanged(self, path: bytes, stat: FileStat) -> bool:
        value = self._mark(path)
        return value is not None and is_same_version(value, stat)

    def is_only_touched(self, path: bytes, stat: FileStat, sample: int | None) -> bool:
        """Whether the known version has this size, inode and content, so that only its times
        differ.
        """
        value = self._mark(path)
        return (
            value is not None
            and sample is not None
            and value & _HALF_MASK == _content(stat, sample)
        )

    def removal_pending(self, path: bytes) -> bool:
        value = self._mark(path)
        return value is not None and is_removal_pending(value)


def is_same_version(value: int, stat: FileStat) -> bool:
    return value >> 60 & _HALF_MASK == hash(stat) & _HALF_MASK


def is_removal_pending(value: int) -> bool:
    return value >= _REMOVAL_PENDING


# --------------------------------------------------------------------------- pending


@dataclass(slots=True)
class _PendingFile:
    stat: FileStat | None  # None: a known file is missing
    first_seen_at: int  # microseconds, wall clock
    settles_at: float  # monotonic: settled if unchanged at or after this
    confirmed_at: float  # monotonic: just before the last stat that found `stat`


class SettledFile(NamedTuple):
    """A path that did not change for long enough. `stat` None: a known file that is missing.
    `first_seen_at`: microseconds.
    """

    path: bytes
    stat: FileStat | None
    first_seen_at: int


class SettlingFiles:
    """The pending files, and when each one settles. Durations in seconds."""

    def __init__(self, known: KnownFiles, settle: float, zero_byte_grace: float) -> None:
        self._known: KnownFiles = known
        self._settle: float = settle
        self._grace: float = max(settle, zero_byte_grace)  # for empty files
        self._pending: dict[bytes, _PendingFile] = {}

    @property
    def capacity(self) -> int:
        return max(0, MAX_PENDING_FILES - len(self._pending))

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, path: bytes) -> bool:
        return path in self._pending

    def observe(
        self, path: bytes, stat: FileStat | None, *, before: float, after: float, now_us: int
    ) -> None:
        """Takes in one stat of `path`, made between the monotonic instants `before` and `after`.

        The wait for a new stat counts from `after`, its confirmation from `before`: a slow stat
            never shortens the wait.
        """
        pending = self._pending.get(path)
        if pending is not None and pending.stat == stat:
            pending.confirmed_at = before
        elif (path not in self._known) if stat is None else self._known.is_unchanged(path, stat):
            self._pending.pop(path, None)
        else:
            first_seen_at = pending.first_seen_at if pending is not None else now_us
            self._pending[path] = _PendingFile(
                stat, first_seen_at, after + self._settle_seconds(stat), before
            )

    def _settle_seconds(self, stat: FileStat | None) -> float:
        return self._grace if stat is not None and stat.size == 0 else self._settle

    def due(self, now: float) -> list[bytes]:
        """The paths to stat again: those that did not change are settled."""
        return [path for path, file in self._pending.items() if file.settles_at <= now]

    def older_than(self, instant_us: int) -> list[bytes]:
        """The pending paths first seen before an instant."""
        return [path for path, file in self._pending.items() if file.first_seen_at < instant_us]

    def next_due(self) -> float | None:
        return min((file.settles_at for file in self._pending.values()), default=None)

    def settled(self, paths: Iterable[bytes]) -> list[SettledFile]:
        """Those of `paths` that were unchanged at or after their settle time, oldest file first."""
        found = list(self._settled(paths))
        found.sort(key=lambda each: (each.stat.mtime_ns if each.stat else 0, each.path))
        return found

    def _settled(self, paths: Iterable[bytes]) -> Iterator[SettledFile]:
        for path in paths:
            pending = self._pending.get(path)
            if pending is not None and pending.confirmed_at >= pending.settles_at:
                yield SettledFile(path, pending.stat, pending.first_seen_at)

    def postpone(self, path: bytes, until: float) -> None:
        """Leaves a settled path pending until `until` (its marker is missing, for example)."""
        if (pending := self._pending.get(path)) is not None:
            pending.settles_at = until

    def remove(self, path: bytes) -> None:
        self._pending.pop(path, None)
