"""From a settled file to its event: the last stat, a sample of its content, its final path, its id.

`FileRecorder` calls `FileClassifier.classify` in a worker thread just before `accept`. It decides
what each settled path is (an event, only touched, missing, still waiting), and does the first half
of `after=move`. Files that change meanwhile stay pending. `to_event` builds the CloudEvent.
"""

import base64
import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from io import FileIO

from eventflow.core.clock import to_datetime
from eventflow.core.errors import SourceError, value_or_none
from eventflow.events.event import Event, Json
from eventflow.logs.progress import Progress
from triggers._files.names import is_utf8, printable
from triggers._files.post_actions import (
    BLOCK_BYTES,
    ListenerStopped,
    link_or_copy,
    sync_directories,
    unlink_if_present,
)
from triggers._files.settling import FileStat, KnownFiles, SettledFile
from triggers._files.tree import Tree

SAMPLE_WHOLE_BYTES = 256 * 1024
"""Up to this size the sample is the whole content."""

SAMPLE_PIECES = 16
"""Above it, so many equal pieces from the beginning to the end."""


class Disposition(Enum):
    """What a settled path is."""

    CREATED = "created"
    MODIFIED = "modified"
    DELETED = "deleted"
    TOUCHED = "touched"  # other times, same size and content
    WAITING = "waiting"  # its marker is missing, or the root is
    CHANGED = "changed"  # it changed during the last stat


@dataclass(frozen=True, slots=True)
class LandedFile:
    """A settled path and its disposition.

    `final_path`: where the flow finds the file. `sample` distinguishes a touch from a rewrite.
    `problem`: the error for which a WAITING one waits. `is_unreadable`: it may not be read yet.
    """

    path: bytes
    stat: FileStat | None
    first_seen_at: int  # microseconds
    disposition: Disposition
    event_id: str = ""
    final_path: bytes = b""
    sample: int | None = None
    sha256: str | None = None
    problem: str | None = None
    is_unreadable: bool = False

    @property
    def is_file(self) -> bool:
        """Whether it is an event about an existing file."""
        return self.disposition in (Disposition.CREATED, Disposition.MODIFIED)


class FileClassifier:
    """Classifies settled files, in a worker thread. `stop` ends long reads and copies; `progress`
    counts the classified files.
    """

    def __init__(
        self, tree: Tree, known: KnownFiles, move_to: bytes | None, *, sha256: bool, touch: bool
    ) -> None:
        self._tree: Tree = tree
        self._known: KnownFiles = known
        self._move_to: bytes | None = move_to
        self._sha256: bool = sha256
        self._touch: bool = touch
        self.stop = threading.Event()
        self.progress = Progress("", None, show=None)

    def classify(self, settled: Sequence[SettledFile], now_us: int) -> list[LandedFile]:
        """Classifies each file. The names that `after=move` gives are durable when it returns."""
        landed: list[LandedFile] = []
        done = self.progress.done
        for number, each in enumerate(settled, 1):
            landed.append(self._classify_one(each, now_us))
            self.progress.move_to(done + number)
        if self._move_to is None:
            return landed
        moved = [each.final_path for each in landed if each.is_file]
        failed = sync_directories(moved, self._move_to)
        return [self._unless_failed(each, failed) for each in landed]

    @staticmethod
    def _unless_failed(landed: LandedFile, failed: Mapping[bytes, str]) -> LandedFile:
        """A file whose new name is not durable waits; the others are recorded."""
        reason = failed.get(landed.final_path) if landed.is_file else None
        if reason is None:
            return landed
        return replace(landed, disposition=Disposition.WAITING, problem=reason)

    def _classify_one(self, settled: SettledFile, now_us: int) -> LandedFile:
        path, stat, first_seen_at = settled
        if stat is None:
            disposition = (
                Disposition.WAITING if self._tree.identity() is None else Disposition.DELETED
            )
            return LandedFile(
                path,
                None,
                first_seen_at,
                disposition,
                version_id(path, now_us),
                self._tree.full(path),
            )
        markers = self._tree.names.markers(path)
        if markers and not any(os.path.exists(self._tree.full(marker)) for marker in markers):
            return LandedFile(path, stat, first_seen_at, Disposition.WAITING)
        try:
            sample, sha256 = self._read(path)
        except OSError as error:  # it may not be read yet: tried again
            problem = error.strerror or str(error)
            waiting = LandedFile(path, stat, first_seen_at, Disposition.WAITING)
            return replace(waiting, problem=problem, is_unreadable=True)
        if not self._is_unchanged(path, stat):
            return LandedFile(path, stat, first_seen_at, Disposition.CHANGED)
        if not self._touch and self._known.is_only_touched(path, stat, sample):
            return LandedFile(path, stat, first_seen_at, Disposition.TOUCHED, sample=sample)
        disposition = Disposition.MODIFIED if path in self._known else Disposition.CREATED
        landed = LandedFile(
            path,
            stat,
            first_seen_at,
            disposition,
            version_id(path, *stat),
            self._tree.full(path),
            sample,
            sha256,
        )
        return landed if self._move_to is None else self._move(landed, stat, self._move_to)

    def _move(self, landed: LandedFile, stat: FileStat, directory: bytes) -> LandedFile:
        """Places the file below `directory`; it waits when that fails."""
        try:
            final_path, is_new = link_or_copy(
                self._tree.full(landed.path),
                directory,
                landed.path,
                landed.event_id,
                self.stop,
                self.progress,
            )
        except (OSError, SourceError) as error:  # tried again: the target may become writable
            return replace(landed, disposition=Disposition.WAITING, problem=str(error))
        if self._is_unchanged(landed.path, stat):
            return replace(landed, final_path=final_path)
        if is_new:
            unlink_if_present(final_path)
        return replace(landed, disposition=Disposition.CHANGED)

    def _is_unchanged(self, path: bytes, stat: FileStat) -> bool:
        try:
            return self._tree.file_stat(path) == stat
        except OSError:  # unreadable: not the settled version any more
            return False

    def samples(self, paths: Sequence[bytes]) -> list[int | None]:
        """The sample of each file's content, for `LandedFile.sample`; None for unreadable ones."""
        return [(value_or_none(self._read, path) or (None, None))[0] for path in paths]

    def _read(self, path: bytes) -> tuple[int | None, str | None]:
        """`(sample, sha256)` of the content; None for what is not requested, or when the file is
        missing. Raises OSError when it may not be read.
        """
        try:
            handle = os.open(self._tree.full(path), os.O_RDONLY | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):  # removed: the next stat decides
            return None, None
        with open(handle, "rb", buffering=0) as file:
            if self._sha256:
                whole = self._hash(file)
                return int(whole[:12], 16), whole
            return (None if self._touch else _sample(file)), None

    def _hash(self, file: FileIO) -> str:
        found = hashlib.sha256()
        while block := file.read(BLOCK_BYTES):
            if self.stop.is_set():
                raise ListenerStopped
            found.update(block)
        return found.hexdigest()


def _sample(file: FileIO) -> int:
    """48 bits (exact in a JSON number) over a small file, or over SAMPLE_PIECES of a large one."""
    size = os.fstat(file.fileno()).st_size
    found = hashlib.blake2b(digest_size=6)
    if size <= SAMPLE_WHOLE_BYTES:
        found.update(file.read(SAMPLE_WHOLE_BYTES))
    else:
        length = SAMPLE_WHOLE_BYTES // SAMPLE_PIECES
        for piece in range(SAMPLE_PIECES):
            found.update(
                os.pread(file.fileno(), length, piece * (size - length) // (SAMPLE_PIECES - 1))
            )
    return int.from_bytes(found.digest())


def version_id(path: bytes, *version: int) -> str:
    """An event id: 128 bits over the relative path and its version."""
    return hashlib.blake2b(
        path + b"\0" + ":".join(map(str, version)).encode(), digest_size=16
    ).hexdigest()


def to_event(landed: LandedFile, source: str, now_us: int) -> Event:
    """The CloudEvent about one landed (or deleted) file.

    `data` depends only on the version, so that the same version accepted again is a duplicate and
    not a conflict. The times are attributes: `time` is when it had settled, the extension
    `firstseen` when it was first seen.
    """
    data: dict[str, Json] = {
        "path": printable(landed.final_path),
        "relpath": printable(landed.path),
        "name": printable(landed.path.rpartition(b"/")[2]),
    }
    if (stat := landed.stat) is not None:
        data |= {
            "size": stat.size,
            "mtime": to_datetime(stat.mtime_ns // 1000).isoformat() if stat.has_mtime else None,
            "mtime_ns": stat.mtime_ns if stat.has_mtime else None,
            "inode": stat.inode or None,
        }
    if landed.sha256 is not None:
        data["sha256"] = landed.sha256
    if not is_utf8(landed.final_path):
        data["path_b64"] = base64.b64encode(landed.final_path).decode()
    return Event(
        id=landed.event_id,
        source=source,
        type=f"io.eventflow.file.{landed.disposition.value}",
        subject=printable(landed.path),
        time=to_datetime(now_us),
        data=data,
        extensions={"firstseen": to_datetime(landed.first_seen_at).isoformat()},
    )
