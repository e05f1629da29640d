"""From a file that holds still to an event: the last look at it, its content's sample, its final path, its identity.

`Desk.prepare` runs in a worker thread, just before `accept`; it decides for each ripe path what it is (a `Landed` event, only
touched, gone, still waiting) and does the part of `after=move` that must come first. Files that changed under it go back to
settling. `to_event` makes the CloudEvent. Both are called by `listener.py`.
"""

import base64
import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from io import FileIO

from eventflow.core.clock import to_datetime
from eventflow.core.errors import SourceError
from eventflow.events.event import Event, Json
from triggers._files.names import is_utf8, printable
from triggers._files.post_actions import BLOCK, Stopped, place, sync_directories, unlink
from triggers._files.settling import Known, Ripe, Sight
from triggers._files.tree import Tree

SAMPLED, PIECES = 256 * 1024, 16
"""A file is sampled whole up to SAMPLED bytes, beyond that in PIECES equal pieces from its beginning to its end."""


class Fate(Enum):
    """What a ripe path turned out to be."""

    CREATED = "created"
    MODIFIED = "modified"
    DELETED = "deleted"
    TOUCHED = "touched"  # other times, same size and content
    WAITING = "waiting"  # its marker is missing, or the root is
    CHANGED = "changed"  # it moved again under the last look


@dataclass(frozen=True, slots=True)
class Landed:
    """A ripe path, judged.

    `place` is where the file will be found; `sample` tells a touch from a rewrite; `problem` says why a WAITING one waits when
    that is nothing ordinary.
    """

    path: bytes
    sight: Sight | None
    first_at: int
    fate: Fate
    ident: str = ""
    place: bytes = b""
    sample: int | None = None
    sha256: str | None = None
    problem: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether there is an event about a file that is there."""
        return self.fate in (Fate.CREATED, Fate.MODIFIED)


class Desk:
    """Judges ripe files, in a worker thread. `stop` ends long reads and copies."""

    def __init__(
        self, tree: Tree, known: Known, move_to: bytes | None, *, sha256: bool, touch: bool
    ) -> None:
        self._tree, self._known, self._move_to = tree, known, move_to
        self._sha256, self._touch = sha256, touch
        self.stop = threading.Event()

    def prepare(self, ripe: Sequence[Ripe], now_us: int) -> list[Landed]:
        """Judges each; what `after=move` placed has a durable name when it returns."""
        landed = [self._judge(each, now_us) for each in ripe]
        if self._move_to is not None:
            sync_directories([each.place for each in landed if each.is_file], self._move_to)
        return landed

    def _judge(self, ripe: Ripe, now_us: int) -> Landed:
        path, sight, first_at = ripe
        if sight is None:
            fate = Fate.WAITING if self._tree.identity() is None else Fate.DELETED
            return Landed(path, None, first_at, fate, digest(path, now_us), self._tree.full(path))
        marker = self._tree.names.marker(path)
        if marker is not None and not os.path.exists(self._tree.full(marker)):
            return Landed(path, sight, first_at, Fate.WAITING)
        sample, sha256 = self._read(path)
        if not self._still(path, sight):
            return Landed(path, sight, first_at, Fate.CHANGED)
        if not self._touch and self._known.only_touched(path, sight, sample):
            return Landed(path, sight, first_at, Fate.TOUCHED, sample=sample)
        fate = Fate.MODIFIED if path in self._known else Fate.CREATED
        judged = Landed(
            path, sight, first_at, fate, digest(path, *sight), self._tree.full(path), sample, sha256
        )
        return judged if self._move_to is None else self._placed(judged, sight, self._move_to)

    def _placed(self, judged: Landed, sight: Sight, directory: bytes) -> Landed:
        """The same, found below `directory`; it waits when it cannot be put there."""
        try:
            found, new = place(
                self._tree.full(judged.path), directory, judged.path, judged.ident, self.stop
            )
        except (OSError, SourceError) as error:
            return replace(judged, fate=Fate.WAITING, problem=str(error))
        if self._still(judged.path, sight):
            return replace(judged, place=found)
        if new:
            unlink(found)
        return replace(judged, fate=Fate.CHANGED)

    def _still(self, path: bytes, sight: Sight) -> bool:
        try:
            return self._tree.look(path) == sight
        except OSError:
            return False

    def samples(self, paths: Sequence[bytes]) -> list[int | None]:
        """What tells a later touch of these files from a rewrite."""
        return [self._read(path)[0] for path in paths]

    def _read(self, path: bytes) -> tuple[int | None, str | None]:
        """`(sample, sha256)` of the content as far as they are asked for; None when it cannot be read."""
        if self._touch and not self._sha256:
            return None, None
        try:
            handle = os.open(self._tree.full(path), os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return None, None
        with open(handle, "rb", buffering=0) as file:
            try:
                if not self._sha256:
                    return _sample(file), None
                whole = self._hash(file)
                return int(whole[:12], 16), whole
            except OSError:
                return None, None

    def _hash(self, file: FileIO) -> str:
        found = hashlib.sha256()
        while block := file.read(BLOCK):
            if self.stop.is_set():
                raise Stopped
            found.update(block)
        return found.hexdigest()


def _sample(file: FileIO) -> int:
    """48 bits of the content (a JSON number keeps them): all of a small file, PIECES of a large one."""
    size = os.fstat(file.fileno()).st_size
    found = hashlib.blake2b(digest_size=6)
    if size <= SAMPLED:
        found.update(file.read(SAMPLED))
    else:
        length = SAMPLED // PIECES
        for piece in range(PIECES):
            found.update(os.pread(file.fileno(), length, piece * (size - length) // (PIECES - 1)))
    return int.from_bytes(found.digest())


def digest(path: bytes, *version: int) -> str:
    """An event id: 128 bits over the relative path and what makes its version."""
    return hashlib.blake2b(
        path + b"\0" + ":".join(map(str, version)).encode(), digest_size=16
    ).hexdigest()


def to_event(landed: Landed, source: str, now_us: int) -> Event:
    """The CloudEvent about one landed (or deleted) file.

    `data` depends on the version alone, so that the same version offered again is a duplicate and no conflict; when it was
    looked at stands beside it: `time` is when it was found still, the extension `firstseen` when it was first seen.
    """
    data: dict[str, Json] = {
        "path": printable(landed.place),
        "relpath": printable(landed.path),
        "name": printable(landed.path.rpartition(b"/")[2]),
    }
    if (sight := landed.sight) is not None:
        data |= {
            "size": sight.size,
            "mtime": to_datetime(sight.mtime_ns // 1000).isoformat(),
            "mtime_ns": sight.mtime_ns,
            "inode": sight.inode or None,
        }
    if landed.sha256 is not None:
        data["sha256"] = landed.sha256
    if not is_utf8(landed.place):
        data["path_b64"] = base64.b64encode(landed.place).decode()
    return Event(
        id=landed.ident,
        source=source,
        type=f"io.eventflow.file.{landed.fate.value}",
        subject=printable(landed.path),
        time=to_datetime(now_us),
        data=data,
        extensions={"firstseen": to_datetime(landed.first_at).isoformat()},
    )
