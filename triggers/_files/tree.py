"""Stats paths and walks the tree, on bytes, in steps that are short enough for a worker thread.

`Tree` stats single paths (from notifications, or about to settle). `Walk` compares a whole tree, or
parts of it, with `KnownFiles` and reports only the differences. Called in a worker thread, one call
at a time. Promises: symlinks are not followed unless requested, and never out of the root; in an
unreadable directory no file counts as deleted. A walk is not a snapshot: the next one finds what
changed meanwhile.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

from triggers._files.names import NameFilter
from triggers._files.settling import (
    MAX_MTIME_NS,
    MIN_MTIME_NS,
    FileStat,
    KnownFiles,
    is_removal_pending,
    is_same_version,
)

ENTRIES_PER_STEP = 2_000
"""About 10 ms in the thread."""

Observation: TypeAlias = tuple[bytes, FileStat | None]


@dataclass(frozen=True, slots=True)
class Tree:
    """A root directory and the selection of its files. Paths are relative to the root, which is
    `b""`.
    """

    root: bytes
    names: NameFilter
    recursive: bool = True
    follow_symlinks: bool = False
    inodes: bool = True
    excluded: tuple[bytes, ...] = ()
    """Directories below the root that are not part of the tree (the targets of `move`)."""

    def full(self, path: bytes) -> bytes:
        return os.path.join(self.root, path) if path else self.root

    def relative(self, full: bytes) -> bytes | None:
        """The path of `full` below the root; None when it is elsewhere or excluded."""
        prefix = self.root.rstrip(b"/") + b"/"
        path = full[len(prefix) :] if full.startswith(prefix) else None
        return None if path is None or self._is_excluded(path) else path

    def _is_excluded(self, path: bytes) -> bool:
        return any((path + b"/").startswith(each + b"/") for each in self.excluded)

    def to_file_stat(self, found: os.stat_result) -> FileStat:
        mtime_ns = min(max(found.st_mtime_ns, MIN_MTIME_NS), MAX_MTIME_NS)
        return FileStat(found.st_size, mtime_ns, found.st_ino if self.inodes else 0)

    def os_stat(self, path: bytes) -> os.stat_result | None:
        """The stat of `path`, following only permitted links; None when it does not exist. Raises
        other OSErrors.
        """
        full = self.full(path)
        try:
            found = os.lstat(full)
            if stat.S_ISLNK(found.st_mode):
                return os.stat(full) if self.follow_symlinks and self.contains(full) else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found

    def file_stat(self, path: bytes) -> FileStat | None:
        """The regular file at `path`; None when there is none. Raises OSError when it cannot be
        read.
        """
        found = self.os_stat(path)
        return (
            self.to_file_stat(found) if found is not None and stat.S_ISREG(found.st_mode) else None
        )

    def contains(self, full: bytes) -> bool:
        """Whether a link leads to a path below the root."""
        return os.path.realpath(full).startswith(os.path.realpath(self.root).rstrip(b"/") + b"/")

    def file_stats(self, paths: Iterable[bytes]) -> list[Observation]:
        """The stat of each path; unreadable ones are left out."""
        found: list[Observation] = []
        for path in paths:
            try:
                found.append((path, self.file_stat(path)))
            except OSError:
                continue  # unreadable: neither missing nor present
        return found

    def sort_paths(self, paths: Iterable[bytes]) -> tuple[list[Observation], list[bytes]]:
        """Selected files (or None for missing ones), and directories to walk, among these paths."""
        files: list[Observation] = []
        directories: list[bytes] = []
        for path in paths:
            try:
                found = self.os_stat(path)
            except OSError:
                continue
            if found is not None and stat.S_ISDIR(found.st_mode):
                if self.recursive and self.names.matches_path(path, directory=True):
                    directories.append(path)
            elif self.names.matches_path(path):
                files.append(
                    (
                        path,
                        self.to_file_stat(found)
                        if found is not None and stat.S_ISREG(found.st_mode)
                        else None,
                    )
                )
        return files, directories

    def identity(self) -> tuple[int, int] | None:
        """Device and inode of the root; None when it is missing or not a directory."""
        try:
            found = os.stat(self.root)
        except OSError:  # missing or unreadable
            return None
        return (found.st_dev, found.st_ino) if stat.S_ISDIR(found.st_mode) else None


class RootMissing(Exception):
    """The root is missing or not a directory. Its files do not count as deleted."""


@dataclass(slots=True)
class WalkStep:
    """The results of one step. `preexisting`: files up to the walk's `skip_until`.
    `pending_removal`: known files.
    """

    observations: list[Observation] = field(default_factory=list[Observation])
    preexisting: list[tuple[bytes, FileStat]] = field(default_factory=list[tuple[bytes, FileStat]])
    pending_removal: list[tuple[bytes, FileStat]] = field(
        default_factory=list[tuple[bytes, FileStat]]
    )
    denied: list[tuple[bytes, str]] = field(default_factory=list[tuple[bytes, str]])
    done: bool = False


class Walk:
    """One pass over the tree (`whole`) or over the directories from `add_directories`, in steps.

    `directories` maps each entered directory to its inode. A whole walk also reports missing known
    files, as `(path, None)`. `skip_until` (nanoseconds of the file system's clock): files up to
    then are `preexisting`.
    """

    def __init__(
        self, tree: Tree, known: KnownFiles, *, whole: bool, skip_until: int | None = None
    ) -> None:
        self.whole: bool = whole
        self.directories: dict[bytes, int] = {}
        self._tree: Tree = tree
        self._known: KnownFiles = known
        self._skip_until: int | None = skip_until
        self._stack: list[bytes] = [b""] if whole else []
        self._denied: list[bytes] = []
        self._real_paths: set[bytes] = set()
        self._current = WalkStep()
        self._entries = self._run()

    def add_directories(self, directories: Iterable[bytes]) -> None:
        """Walks these directories next, also those that were walked already."""
        for directory in directories:
            self.directories.pop(directory, None)
            self._stack.append(directory)

    def step(self) -> WalkStep:
        """Visits the next ENTRIES_PER_STEP entries. Raises RootMissing. Blocks."""
        self._current = WalkStep()
        visited = sum(1 for _ in islice(self._entries, ENTRIES_PER_STEP))
        self._current.done = visited < ENTRIES_PER_STEP
        return self._current

    def _run(self) -> Iterator[None]:
        yield from self._stacked()
        if self.whole:
            yield from self._unvisited()
        yield from self._stacked()  # added meanwhile

    def _stacked(self) -> Iterator[None]:
        while self._stack:
            directory = self._stack.pop()
            if directory not in self.directories:
                yield  # an empty directory counts as an entry
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
        except OSError as error:  # its files do not count as deleted
            self._deny(directory, error.strerror or str(error))
            return
        if known_here < known_before:
            yield from self._missing(directory)

    def _deny(self, directory: bytes, reason: str) -> None:
        self.directories.pop(directory, None)
        self._denied.append(directory)
        self._current.denied.append((directory, reason))

    def _entry(self, directory: bytes, entry: os.DirEntry[bytes]) -> bool:
        """Visits one entry; whether it is a known file."""
        path = directory + b"/" + entry.name if directory else entry.name
        try:
            if entry.is_dir(follow_symlinks=self._tree.follow_symlinks):
                self._enter(path, entry)
                return False
            return entry.is_file(follow_symlinks=self._tree.follow_symlinks) and self._file(
                directory, path, entry
            )
        except OSError:
            return False  # removed since it was listed, or a loop of links

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
            if real in self._real_paths:
                return
            if entry.is_symlink() and not tree.contains(entry.path):
                return self._deny(path, "the link leads out of the root")
            self._real_paths.add(real)
        self._stack.append(path)

    def _file(self, directory: bytes, path: bytes, entry: os.DirEntry[bytes]) -> bool:
        tree = self._tree
        if entry.is_symlink() and not tree.contains(entry.path):
            return False
        value = self._known.within(directory).get(entry.name)
        found = entry.stat(follow_symlinks=tree.follow_symlinks)
        file_stat = tree.to_file_stat(found)
        if value is not None and is_same_version(value, file_stat):
            if is_removal_pending(value):
                self._current.pending_removal.append((path, file_stat))
        elif tree.names.matches(path):
            if self._skip_until is not None and found.st_ctime_ns <= self._skip_until:
                self._current.preexisting.append((path, file_stat))
            else:
                self._current.observations.append((path, file_stat))
        return value is not None

    def _missing(self, directory: bytes) -> Iterator[None]:
        prefix = directory + b"/" if directory else b""
        for name in list(self._known.within(directory)):
            for path, file_stat in self._tree.file_stats([prefix + name]):
                if file_stat is None:
                    self._current.observations.append((path, None))
            yield

    def _unvisited(self) -> Iterator[None]:
        """Known files of missing directories. Files below an unreadable directory are left out."""
        for directory in self._known.directories():
            if directory not in self.directories and not any(
                _is_below(directory, denied) for denied in self._denied
            ):
                yield from self._missing(directory)


def _is_below(path: bytes, ancestor: bytes) -> bool:
    return not ancestor or (path + b"/").startswith(ancestor + b"/")
