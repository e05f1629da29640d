"""What happens to a landed file once its event is recorded: `move` or `delete`.

A move has two halves. `link_or_copy` gives the file its final name (a hard link; across devices a
copy, fsynced and renamed) before the event is recorded, since the event has that path and its flow
may start at once. `remove_source` removes the landing name after `accept` has returned, and only if
it is still the recorded version. A crash between the two leaves both names; the cursor knows that
the removal is pending, and the next walk does it. Both are idempotent. events.py calls
`link_or_copy`, recorder.py calls `remove_source`, each in a worker thread.
"""

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from eventflow.core.declarations import declaration
from eventflow.core.errors import SourceError, UsageError
from eventflow.logs.progress import Progress
from triggers._files.settling import FileStat
from triggers._files.tree import Tree

BLOCK_BYTES = 1 << 20
"""Copied or hashed between two checks of `stop`."""


@dataclass(frozen=True, slots=True)
class MoveAction:
    """Moves to `to`, with the path below the root. A relative `to` is below the root, and excluded
    from the tree.
    """

    to: str


@dataclass(frozen=True, slots=True)
class DeleteAction:
    """Deletes the file."""


@dataclass(frozen=True, slots=True)
class OutcomeAction:
    """Waits for the file's runs to end."""

    completed: MoveAction | DeleteAction | None
    failed: MoveAction | DeleteAction | None


@declaration
def outcome(
    *,
    completed: MoveAction | DeleteAction | None = None,
    failed: MoveAction | DeleteAction | None = None,
) -> OutcomeAction:
    """`after=outcome(completed=move("done"), failed=move("failed"))`: acts once every run of the
    file's event has ended, also after a crash; until then the file stays where it landed.

    `completed`: when all of them completed, or none was to run. `failed`: when one failed, was
    cancelled or quarantined, or when its event is a dead letter. None leaves the file. A held run
    has not ended. Raises UsageError without either.
    """
    if completed is None and failed is None:
        raise UsageError("outcome: expected completed= or failed=, found neither")
    for state, action in (("completed", completed), ("failed", failed)):
        if action is not None and not isinstance(cast(object, action), MoveAction | DeleteAction):
            raise UsageError(f"outcome: {state}={_EXPECTED_ACTION}, found {action!r}")
    return OutcomeAction(completed, failed)


_EXPECTED_ACTION = ' expected move("FOLDER") or delete()'


def check_action(after: object) -> None:
    """Raises UsageError unless `after` is None or was made by `outcome`, `move` or `delete`."""
    if after is not None and not isinstance(after, OutcomeAction | MoveAction | DeleteAction):
        raise UsageError(
            f"Directory: after={_EXPECTED_ACTION}, or outcome(completed=..., failed=...) of these; "
            f"found {after!r}"
        )


@declaration
def move(to: str | os.PathLike[str]) -> MoveAction:
    """`after=move("processed")`: moves each file to that directory, with its path below the root.

    If the name exists, eight letters of the event's id are added before the suffix: `x.csv` →
    `x.1f0c9a2e.csv`.
    """
    return MoveAction(os.fspath(to))


@declaration
def delete() -> DeleteAction:
    """`after=delete()`: deletes the file once its event is recorded, before its flow can read it.

    For signals and markers; a flow that reads the file deletes it itself.
    """
    return DeleteAction()


class ListenerStopped(Exception):
    """The listener ended while a file was copied or hashed."""


def link_or_copy(
    source: bytes,
    directory: bytes,
    path: bytes,
    event_id: str,
    stop: threading.Event,
    progress: Progress,
) -> tuple[bytes, bool]:
    """Gives the file a name below `directory` as well. Returns that name, and whether it is new.
    `progress` moves by one file while a copy is made, which may take long.

    Raises OSError, and SourceError if another file has each of its possible names.
    """
    parent, name = os.path.split(os.path.join(directory, path))
    os.makedirs(parent, exist_ok=True)
    for candidate in _candidate_names(name, event_id, _max_name_bytes(parent)):
        target = os.path.join(parent, candidate)
        if _link(source, target) or _copy(source, target, stop, progress):
            return target, True
        if _is_same_file(source, target, stop):
            return target, False
    raise SourceError(
        f"no free name for {os.fsdecode(path)!r} in {os.fsdecode(directory)!r}; "
        "clear the names it would take"
    )


def _max_name_bytes(directory: bytes) -> int:
    try:
        return os.pathconf(directory, "PC_NAME_MAX")
    except (OSError, ValueError):  # the file system does not say
        return 255


def _candidate_names(name: bytes, event_id: str, limit: int) -> list[bytes]:
    """The name itself, if it has at most `limit` bytes, and with letters of the event's id."""
    stem, suffix = os.path.splitext(name)
    added = [b"." + event_id[:length].encode() for length in (8, len(event_id))]
    longer = [_shortened(stem, suffix, letters, limit) for letters in added]
    return [name, *longer] if len(name) <= limit else longer


def _shortened(stem: bytes, suffix: bytes, letters: bytes, limit: int) -> bytes:
    """`stem + letters + suffix` in at most `limit` bytes: the stem loses whole characters at its
    end, and a suffix that is too long for that counts as part of the stem.
    """
    if len(letters) + len(suffix) >= limit:
        stem, suffix = stem + suffix, b""
    left = limit - len(letters) - len(suffix)
    if len(stem) > left:
        end = left
        while end and stem[end] & 0xC0 == 0x80:  # inside a character of UTF-8
            end -= 1
        stem = stem[: end or left]
    return stem + letters + suffix


def _link(source: bytes, target: bytes) -> bool:
    try:
        os.link(source, target, follow_symlinks=True)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in _LINK_UNSUPPORTED:
            return False
        raise
    return True


_LINK_UNSUPPORTED = {
    errno.EXDEV,
    errno.EPERM,
    errno.EACCES,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EMLINK,
    errno.EINVAL,
}
"""Another device, a file system without hard links, or fs.protected_hardlinks: then the file is
copied.
"""


def _is_same_file(source: bytes, target: bytes, stop: threading.Event) -> bool:
    """Whether `target` is this file, linked or copied before a crash. Equal times alone are not
    enough.
    """
    if os.path.realpath(target) == os.path.realpath(source):
        raise SourceError(
            f"{os.fsdecode(target)!r} is the landed file itself; move to another directory"
        )
    target_stat = os.stat(target)
    source_stat = os.stat(source)
    if (target_stat.st_dev, target_stat.st_ino) == (source_stat.st_dev, source_stat.st_ino):
        return True
    if (target_stat.st_size, target_stat.st_mtime_ns) != (
        source_stat.st_size,
        source_stat.st_mtime_ns,
    ):
        return False
    with open(source, "rb") as one, open(target, "rb") as other:
        while (block := one.read(BLOCK_BYTES)) == other.read(BLOCK_BYTES):
            if stop.is_set():
                raise ListenerStopped
            if not block:
                return True
    return False


def _copy(source: bytes, target: bytes, stop: threading.Event, progress: Progress) -> bool:
    """Copies content, times and mode to a hidden name, fsyncs, then renames it; False when `target`
    exists.
    """
    if os.path.lexists(target):
        return False
    directory, name = os.path.split(target)
    hidden = os.path.join(
        directory, _shortened(b"." + name, b"", b".part", _max_name_bytes(directory))
    )
    try:
        with open(source, "rb") as reader, open(hidden, "wb") as writer:
            size = os.fstat(reader.fileno()).st_size
            while block := reader.read(BLOCK_BYTES):
                if stop.is_set():
                    raise ListenerStopped
                writer.write(block)
                progress.step(len(block) / max(size, len(block)))
            writer.flush()
            shutil.copystat(source, hidden)
            os.fsync(writer.fileno())
        os.rename(hidden, target)
    except BaseException:  # a cancel too: no partial copy stays
        unlink_if_present(hidden)
        raise
    return True


def sync_directories(files: Iterable[bytes], top: bytes) -> dict[bytes, str]:
    """Makes new names durable: fsyncs their directories up to `top`, each once. Returns the files
    for which that failed, and why.
    """
    outcomes: dict[bytes, str | None] = {}
    failed: dict[bytes, str] = {}
    for file in files:
        directory = os.path.dirname(file)
        while len(directory) >= len(top):
            if directory not in outcomes:
                outcomes[directory] = _sync_directory(directory)
            if (reason := outcomes[directory]) is not None:
                failed[file] = reason
            directory = os.path.dirname(directory)
    return failed


def _sync_directory(directory: bytes) -> str | None:
    """Why it failed; None when it succeeded, or when the file system cannot do it."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        return None if error.errno in _SYNC_UNSUPPORTED else str(error)
    return None


_SYNC_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
"""Some network file systems do not sync directories."""


def remove_source(tree: Tree, path: bytes, stat: FileStat) -> bool:
    """Removes the landing name of a recorded version, and its marker. False when something else has
    that name since: another version, a directory, a link.

    Raises OSError when it exists and cannot be removed.
    """
    now = tree.file_stat(path)
    if now != stat and (now is not None or os.path.lexists(tree.full(path))):
        return False
    unlink_if_present(tree.full(path))
    if tree.names.marker_is_per_file:
        for marker in tree.names.markers(path):
            unlink_if_present(tree.full(marker))
    return True


def unlink_if_present(full: bytes) -> None:
    """Removes a name, if it exists."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(full)
