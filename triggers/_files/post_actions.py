"""What becomes of a landed file once its event is recorded: `move` it or `delete` it.

A move has two halves. `place` gives the file its final name (a hard link; across devices a copy, fsynced and renamed) before
the event is recorded, since the event names that path and its flow may start at once. `remove` takes the landing name away
after `accept` has returned, and only if it is still the very version that was recorded. A kill between the two leaves both
names; the cursor knows that the removal is owed, and the next walk does it. Both are idempotent. `landing.py` calls `place`,
`listener.py` calls `remove`, each in a worker thread.
"""

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from eventflow.core.errors import SourceError
from triggers._files.settling import Sight
from triggers._files.tree import Tree

BLOCK = 1 << 20
"""Bytes copied or hashed between two looks at `stop`."""


@dataclass(frozen=True, slots=True)
class Move:
    """Moves to `to`, keeping the path below the root. A relative `to` is below the root, and then not part of it."""

    to: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Deletes."""


def move(to: str | os.PathLike[str]) -> Move:
    """`after=move("processed")`: each file goes to that directory, keeping its path below the root.

    A name that is taken gets eight letters of the event's id before its suffix: `x.csv` → `x.1f0c9a2e.csv`.
    """
    return Move(os.fspath(to))


def delete() -> Delete:
    """`after=delete()`: the file goes as soon as its event is recorded, before its flow can read it.

    For signals and markers; a flow that reads the file deletes it itself.
    """
    return Delete()


class Stopped(Exception):
    """The listener ended while a file was being copied or hashed; nothing was decided."""


def place(
    source: bytes, directory: bytes, path: bytes, ident: str, stop: threading.Event
) -> tuple[bytes, bool]:
    """Gives the file a name below `directory` as well: that name, and whether it is new.

    Raises OSError, and SourceError if every name it might have is taken by another file.
    """
    for target in _candidates(os.path.join(directory, path), ident):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if _link(source, target) or _copy(source, target, stop):
            return target, True
        if _same(source, target, stop):
            return target, False
    raise SourceError(
        f"no free name for {os.fsdecode(path)!r} in {os.fsdecode(directory)!r}; clear the names it would take"
    )


def _candidates(target: bytes, ident: str) -> list[bytes]:
    stem, suffix = os.path.splitext(target)
    return [target, *(stem + b"." + ident[:length].encode() + suffix for length in (8, len(ident)))]


def _link(source: bytes, target: bytes) -> bool:
    try:
        os.link(source, target, follow_symlinks=True)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in _NO_LINK:
            return False
        raise
    return True


_NO_LINK = {
    errno.EXDEV,
    errno.EPERM,
    errno.EACCES,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EMLINK,
    errno.EINVAL,
}
"""Another device, a file system without hard links, or the kernel's fs.protected_hardlinks: copy instead."""


def _same(source: bytes, target: bytes, stop: threading.Event) -> bool:
    """Whether `target` is this file already, linked or copied before a crash. Equal times alone do not make it so."""
    if os.path.realpath(target) == os.path.realpath(source):
        raise SourceError(
            f"{os.fsdecode(target)!r} is the landing place itself; move to another directory"
        )
    there, here = os.stat(target), os.stat(source)
    if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
        return True
    if (there.st_size, there.st_mtime_ns) != (here.st_size, here.st_mtime_ns):
        return False
    with open(source, "rb") as one, open(target, "rb") as other:
        while (block := one.read(BLOCK)) == other.read(BLOCK):
            if stop.is_set():
                raise Stopped
            if not block:
                return True
    return False


def _copy(source: bytes, target: bytes, stop: threading.Event) -> bool:
    """Copies content, times and mode under a hidden name, fsyncs, then takes the name; False when it is taken."""
    if os.path.lexists(target):
        return False
    hidden = os.path.join(os.path.dirname(target), b"." + os.path.basename(target)[:200] + b".part")
    try:
        with open(source, "rb") as reader, open(hidden, "wb") as writer:
            while block := reader.read(BLOCK):
                if stop.is_set():
                    raise Stopped
                writer.write(block)
            writer.flush()
            shutil.copystat(source, hidden)
            os.fsync(writer.fileno())
        os.rename(hidden, target)
    except BaseException:
        unlink(hidden)
        raise
    return True


def sync_directories(files: Iterable[bytes], top: bytes) -> None:
    """Makes the names of placed files durable: their directories up to `top`, each once."""
    found: set[bytes] = set()
    for file in files:
        directory = os.path.dirname(file)
        while directory not in found and len(directory) >= len(top):
            found.add(directory)
            directory = os.path.dirname(directory)
    for directory in found:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove(tree: Tree, path: bytes, sight: Sight) -> bool:
    """Takes the landing name of a recorded version away, and its marker's. False when another version has landed since.

    Raises OSError when it is there and cannot be removed.
    """
    now = tree.look(path)
    if now is not None and now != sight:
        return False
    unlink(tree.full(path))
    marker = tree.names.marker(path)
    if marker is not None and tree.names.marker_is_per_file:
        unlink(tree.full(marker))
    return True


def unlink(full: bytes) -> None:
    """Takes a name away; it may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(full)
