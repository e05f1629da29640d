"""The directory as it is: looks at paths and walks the tree, on bytes, in steps small enough for a thread.

`Tree` answers for single paths (what a hint named, what is about to ripen); `Walk` reconciles a whole tree, or parts of it,
with `Known`, and reports only what differs. Called by `listener.py` in a worker thread, one call at a time, never on the loop.
Promises: symlinks are not followed unless asked, and never out of the root; a directory that cannot be read makes nothing in
it count as gone. Does not promise a snapshot: what moves during a walk is found by the next one.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

from triggers._files.names import Names
from triggers._files.settling import Known, Sight, is_owed, same_file

STEP = 2_000
"""Directory entries looked at in one step: about 10 ms in the thread."""

Observation: TypeAlias = tuple[bytes, Sight | None]


@dataclass(frozen=True, slots=True)
class Tree:
    """A root and what counts in it. Paths are relative to the root; the root itself is `b""`."""

    root: bytes
    names: Names
    recursive: bool = True
    follow_symlinks: bool = False
    inodes: bool = True
    apart: bytes | None = None
    """A directory below the root that is not part of it (where `move` puts things)."""

    def full(self, path: bytes) -> bytes:
        return os.path.join(self.root, path) if path else self.root

    def relative(self, full: bytes) -> bytes | None:
        """The path of `full` below the root; None when it is elsewhere or apart."""
        prefix = self.root.rstrip(b"/") + b"/"
        path = full[len(prefix) :] if full.startswith(prefix) else None
        return None if path is None or self._is_apart(path) else path

    def _is_apart(self, path: bytes) -> bool:
        return self.apart is not None and (path + b"/").startswith(self.apart + b"/")

    def sight(self, found: os.stat_result) -> Sight:
        return Sight(found.st_size, found.st_mtime_ns, found.st_ino if self.inodes else 0)

    def stat(self, path: bytes) -> os.stat_result | None:
        """What is at `path`, following only links that may be followed; None when nothing is. Raises other OSErrors."""
        full = self.full(path)
        try:
            found = os.lstat(full)
            if stat.S_ISLNK(found.st_mode):
                return os.stat(full) if self.follow_symlinks and self.holds(full) else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found

    def look(self, path: bytes) -> Sight | None:
        """The regular file at `path`, or None when there is none. Raises OSError when that cannot be told."""
        found = self.stat(path)
        return self.sight(found) if found is not None and stat.S_ISREG(found.st_mode) else None

    def holds(self, full: bytes) -> bool:
        """Whether a link leads to something below the root."""
        return os.path.realpath(full).startswith(os.path.realpath(self.root).rstrip(b"/") + b"/")

    def look_again(self, paths: Iterable[bytes]) -> list[Observation]:
        """One look at each path; those of which nothing can be told are left out."""
        found: list[Observation] = []
        for path in paths:
            try:
                found.append((path, self.look(path)))
            except OSError:
                continue  # not gone, not there: unreadable for now
        return found

    def examine(self, hinted: Iterable[bytes]) -> tuple[list[Observation], list[bytes]]:
        """What hinted paths are now: files (or nothing) among those that count, and directories to walk into."""
        files: list[Observation] = []
        directories: list[bytes] = []
        for path in hinted:
            try:
                found = self.stat(path)
            except OSError:
                continue
            if found is not None and stat.S_ISDIR(found.st_mode):
                if self.recursive and self.names.admits(path, directory=True):
                    directories.append(path)
            elif self.names.admits(path):
                files.append(
                    (
                        path,
                        self.sight(found)
                        if found is not None and stat.S_ISREG(found.st_mode)
                        else None,
                    )
                )
        return files, directories

    def identity(self) -> tuple[int, int] | None:
        """Which directory the root is right now; None when it is none, or is not there."""
        try:
            found = os.stat(self.root)
        except OSError:
            return None
        return (found.st_dev, found.st_ino) if stat.S_ISDIR(found.st_mode) else None


class RootMissing(Exception):
    """The root is not there, or is no directory. Says nothing about the files that were in it."""


@dataclass(slots=True)
class Step:
    """What one step of a walk found. `old`: files from before the walk's `skip_until`. `owed`: known, and due for removal."""

    seen: list[Observation] = field(default_factory=list[Observation])
    old: list[tuple[bytes, Sight]] = field(default_factory=list[tuple[bytes, Sight]])
    owed: list[tuple[bytes, Sight]] = field(default_factory=list[tuple[bytes, Sight]])
    denied: list[tuple[bytes, str]] = field(default_factory=list[tuple[bytes, str]])
    done: bool = False


class Walk:
    """One pass over the tree (`whole`) or over the directories given with `into`, in steps.

    `directories` maps each directory entered to its inode. A whole walk also reports, as `(path, None)`, known files that
    are not there any more. `skip_until` (nanoseconds of the file system's clock) sorts out what was there before.
    """

    def __init__(
        self, tree: Tree, known: Known, *, whole: bool, skip_until: int | None = None
    ) -> None:
        self.whole = whole
        self.directories: dict[bytes, int] = {}
        self._tree, self._known, self._skip_until = tree, known, skip_until
        self._stack: list[bytes] = [b""] if whole else []
        self._denied: list[bytes] = []
        self._reals: set[bytes] = set()
        self._now = Step()
        self._entries = self._run()

    def into(self, directories: Iterable[bytes]) -> None:
        """Adds directories to be walked next, again if they were walked already."""
        for directory in directories:
            self.directories.pop(directory, None)
            self._stack.append(directory)

    def step(self) -> Step:
        """The next STEP entries. Raises RootMissing. Blocking."""
        self._now = Step()
        looked = sum(1 for _ in islice(self._entries, STEP))
        self._now.done = looked < STEP
        return self._now

    def _run(self) -> Iterator[None]:
        yield from self._stacked()
        if self.whole:
            yield from self._unvisited()
        yield from self._stacked()  # what `into` added meanwhile

    def _stacked(self) -> Iterator[None]:
        while self._stack:
            directory = self._stack.pop()
            if directory not in self.directories:
                yield  # an empty directory is work too
                yield from self._directory(directory)

    def _directory(self, directory: bytes) -> Iterator[None]:
        known_before = len(self._known.within(directory))
        known_here = 0
        try:
            with os.scandir(self._tree.full(directory)) as entries:
                self.directories[directory] = os.stat(self._tree.full(directory)).st_ino
                for entry in entries:
                    known_here += self._entry(directory, entry)
                    yield
        except (FileNotFoundError, NotADirectoryError) as error:
            if not directory:
                raise RootMissing(str(error)) from error
            self.directories.pop(directory, None)
            return
        except OSError as error:
            self._deny(directory, error.strerror or str(error))
            return
        if known_here < known_before:
            yield from self._missing(directory)

    def _deny(self, directory: bytes, why: str) -> None:
        self.directories.pop(directory, None)
        self._denied.append(directory)
        self._now.denied.append((directory, why))

    def _entry(self, directory: bytes, entry: os.DirEntry[bytes]) -> bool:
        """Looks at one entry; whether it is a known file."""
        path = directory + b"/" + entry.name if directory else entry.name
        try:
            if entry.is_dir(follow_symlinks=self._tree.follow_symlinks):
                self._enter(path, entry)
                return False
            return entry.is_file(follow_symlinks=self._tree.follow_symlinks) and self._file(
                directory, path, entry
            )
        except OSError:
            return False  # vanished since it was listed, or a link in a loop

    def _enter(self, path: bytes, entry: os.DirEntry[bytes]) -> None:
        tree = self._tree
        if (
            not tree.recursive
            or not tree.names.enters(path)
            or tree.relative(tree.full(path)) is None
        ):
            return
        if tree.follow_symlinks:
            real = os.path.realpath(entry.path)
            if real in self._reals:
                return
            if entry.is_symlink() and not tree.holds(entry.path):
                return self._deny(path, "the link leads out of the root")
            self._reals.add(real)
        self._stack.append(path)

    def _file(self, directory: bytes, path: bytes, entry: os.DirEntry[bytes]) -> bool:
        tree = self._tree
        if entry.is_symlink() and not tree.holds(entry.path):
            return False
        value = self._known.within(directory).get(entry.name)
        found = entry.stat(follow_symlinks=tree.follow_symlinks)
        sight = tree.sight(found)
        if value is not None and same_file(value, sight):
            if is_owed(value):
                self._now.owed.append((path, sight))
        elif tree.names.wants(path):
            if self._skip_until is not None and found.st_ctime_ns <= self._skip_until:
                self._now.old.append((path, sight))
            else:
                self._now.seen.append((path, sight))
        return value is not None

    def _missing(self, directory: bytes) -> Iterator[None]:
        prefix = directory + b"/" if directory else b""
        for name in list(self._known.within(directory)):
            for path, sight in self._tree.look_again([prefix + name]):
                if sight is None:
                    self._now.seen.append((path, None))
            yield

    def _unvisited(self) -> Iterator[None]:
        """Known files of directories that are no longer there. An unreadable directory keeps what is below it."""
        for directory in self._known.directories():
            if directory not in self.directories and not any(
                _below(directory, denied) for denied in self._denied
            ):
                yield from self._missing(directory)


def _below(path: bytes, ancestor: bytes) -> bool:
    return not ancestor or (path + b"/").startswith(ancestor + b"/")
