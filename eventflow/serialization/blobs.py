"""Files beside the store for values too large for a row, named by their content; or objects elsewhere, with files as a cache.

The executor calls `offload` on what it journals and `fetch` on what it replays, in a thread: everything here blocks. A blob
is complete and durable before `put` returns, hence before any row names it; `get` verifies what it reads. `prune` removes what
no row names any more. Next rooms: `bucket.py` for the place elsewhere, `store/`, which carries the references.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

from eventflow.core.errors import ResultsUnavailable, StoreCorrupt, StoreFailed

LOG_EVENTS = {
    "result.not_stored": (
        "A large result could not be stored where `results=` says; it is tried again, nothing "
        "is lost."
    ),
}

LARGE = 256 * 1024
"""Bytes of one value above which it goes to a file: the rows of a journal stay quick to read past (fault 36)."""

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds between the tries to put a result that is computed already; after them the attempt, or the run's end, failed."""

_REF = re.compile(r"[0-9a-f]{64}\Z")


class Place(Protocol):
    """Where blobs are kept for good, if not beside the store. Blocking, called from threads; all raise ResultsUnavailable."""

    def put(self, ref: str, data: bytes) -> None:
        """Durable when it returns."""
        ...

    def get(self, ref: str) -> bytes | None:
        """The bytes as they are there, None when they are not."""
        ...

    def has(self, ref: str) -> bool: ...


class Blobs:
    """Content-addressed files beside the store: `directory/ab/cd/abcd…`, named by SHA-256, mode 0600, fsynced. Blocking.

    A blob is durable before `put` returns, hence before any row that names it. `get` verifies the content. With a `place`, that
    is where blobs are, and the files are a cache of it (and whatever was here before it was given, until `prune` moves it).
    """

    def __init__(self, directory: Path, place: Place | None = None) -> None:
        self._directory, self._place = directory, place

    @property
    def is_far(self) -> bool:
        """Whether putting may take long."""
        return self._place is not None

    def put(self, data: bytes) -> str:
        """The reference of `data`, durable. Raises StoreFailed if the disk refuses, ResultsUnavailable if the place does."""
        ref = hashlib.sha256(data).hexdigest()
        if self._place is None:
            self._put_here(ref, data)
        else:
            self._place.put(ref, data)
            with contextlib.suppress(StoreFailed):  # a cache may be refused
                self._put_here(ref, data)
        return ref

    def _put_here(self, ref: str, data: bytes) -> None:
        path = self._path(ref)
        try:
            if path.exists() and path.stat().st_size == len(data):
                os.utime(path)  # young again: `prune` leaves it to the row that is about to name it
            else:
                self._write(path, data)
        except OSError as error:
            raise StoreFailed(
                f"cannot write the blob {path}: {error}; check free space and the directory's owner"
            ) from error

    def get(self, ref: str) -> bytes:
        """The bytes of a reference; StoreCorrupt when they are missing or are not those, here and in the place."""
        path, wrong = self._path(ref), "is missing"
        with contextlib.suppress(FileNotFoundError):
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == ref:
                return data
            wrong = "does not match its name"
        if self._place is not None and (data := self._place.get(ref)) is not None:
            if hashlib.sha256(data).hexdigest() == ref:
                with contextlib.suppress(StoreFailed):
                    self._put_here(ref, data)
                return data
            wrong = "does not match its name in the bucket either"
        raise StoreCorrupt(
            f"the blob {path} {wrong}; restore it from a backup, or retry the run afresh"
        )

    def offload(self, codec: str, data: bytes) -> tuple[str, bytes]:
        """`(codec + "@blob", reference)` of a value larger than LARGE; a smaller one as it is."""
        return (codec, data) if len(data) <= LARGE else (f"{codec}@blob", self.put(data).encode())

    def fetch(self, codec: str, data: bytes) -> tuple[str, bytes]:
        """Undoes `offload`."""
        return (
            (codec.removesuffix("@blob"), self.get(data.decode("latin-1")))
            if codec.endswith("@blob")
            else (codec, data)
        )

    def prune(self, keep: Collection[str], *, before: int) -> int:
        """Removes blobs not in `keep` and last put before the instant `before` (microseconds). Returns how many.

        Leave an hour: a blob is on disk before the row that names it. With a place, files that are named are removed too, once
        they are there.
        """
        removed = 0
        for path in self._directory.glob("??/??/*"):
            if path.stat().st_mtime_ns // 1000 < before and (
                path.name not in keep or self._is_kept_elsewhere(path)
            ):
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def _is_kept_elsewhere(self, path: Path) -> bool:
        """Whether the place has this blob; what was here before there was a place is moved to it."""
        if self._place is None:
            return False
        try:
            if not self._place.has(path.name):
                self._place.put(path.name, self.get(path.name))
        except (ResultsUnavailable, StoreCorrupt):
            return False  # the file stays, and is looked at again
        return True

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


async def offload(blobs: Blobs, codec: str, data: bytes, log: Any) -> tuple[str, bytes]:
    """`Blobs.offload` off the loop. A place that does not answer is asked again for about a minute."""
    for pause in PAUSES:
        try:
            return await asyncio.to_thread(blobs.offload, codec, data)
        except ResultsUnavailable as error:
            log.warning("result.not_stored", error=str(error), retry_in=pause)
        await asyncio.sleep(pause)
    return await asyncio.to_thread(blobs.offload, codec, data)


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
