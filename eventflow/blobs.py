"""Files beside the store for values too large for a row, named by their content.

The executor calls `offload` on what it journals and `fetch` on what it replays, in a thread: everything here blocks. A blob
is complete and on disk before `put` returns, hence before any row names it; `get` verifies what it reads. `prune` removes what
no row names any more. Next room: `store/`, which carries the references.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Collection
from pathlib import Path

from eventflow.errors import StoreCorrupt, StoreFailed

LARGE = 256 * 1024
"""Bytes of one value above which it goes to a file: the rows of a journal stay quick to read past (fault 36)."""

_REF = re.compile(r"[0-9a-f]{64}\Z")


class Blobs:
    """Content-addressed files beside the store: `directory/ab/cd/abcd…`, named by SHA-256, mode 0600, fsynced. Blocking.

    A blob is on disk before `put` returns, hence before any row that names it. `get` verifies the content.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def put(self, data: bytes) -> str:
        """The reference of `data`, durable. Raises StoreFailed when the disk refuses."""
        ref = hashlib.sha256(data).hexdigest()
        path = self._path(ref)
        try:
            if path.exists() and path.stat().st_size == len(data):
                os.utime(path)  # young again: `prune` leaves it to the row that is about to name it
            else:
                self._write(path, data)
        except OSError as error:
            raise StoreFailed(f"cannot write the blob {path}: {error}; check free space and the directory's owner") from error
        return ref

    def get(self, ref: str) -> bytes:
        """The bytes of a reference; StoreCorrupt when they are missing or are not those."""
        path = self._path(ref)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise StoreCorrupt(f"the blob {path} is missing; restore it from a backup, or retry the run afresh") from None
        if hashlib.sha256(data).hexdigest() != ref:
            raise StoreCorrupt(f"the blob {path} does not match its name; restore it from a backup, or retry the run afresh")
        return data

    def offload(self, codec: str, data: bytes) -> tuple[str, bytes]:
        """`(codec + "@blob", reference)` of a value larger than LARGE; a smaller one as it is."""
        return (codec, data) if len(data) <= LARGE else (f"{codec}@blob", self.put(data).encode())

    def fetch(self, codec: str, data: bytes) -> tuple[str, bytes]:
        """Undoes `offload`."""
        return (codec.removesuffix("@blob"), self.get(data.decode("latin-1"))) if codec.endswith("@blob") else (codec, data)

    def prune(self, keep: Collection[str], *, before: int) -> int:
        """Removes blobs not in `keep` and last put before the instant `before` (microseconds). Returns how many.

        Leave an hour: a blob is on disk before the row that names it.
        """
        removed = 0
        for path in self._directory.glob("??/??/*"):
            if path.name not in keep and path.stat().st_mtime_ns // 1000 < before:
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def _path(self, ref: str) -> Path:
        if not _REF.match(ref):  # S16: a reference read from a row never leads out of the directory
            raise StoreCorrupt(f"expected a blob reference of 64 hex digits, found {ref[:80]!r}")
        return self._directory / ref[:2] / ref[2:4] / ref

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        for folder in (path.parent, path.parent.parent, self._directory):
            _sync_directory(folder)


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
