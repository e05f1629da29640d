"""Blobs: values too large for a row, in files or in a remote store with files as its cache.

The engine calls `offload` for what it journals and `fetch` for what it replays, in threads:
everything here blocks. A blob is complete and durable before `put` returns, so before any row
references it; `get` verifies what it reads. `prune` removes blobs without a reference. Read on in
s3_blobs.py (the remote store) and store/ (the references).
"""

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from eventflow.core.errors import ResultsUnavailable, StoreCorrupt, StoreFailed
from eventflow.core.retry import Backoff

LOG_EVENTS = {
    "result.not_stored": (
        "A large result could not be stored where `results=` says; it is tried again, nothing "
        "is lost."
    ),
}

OFFLOAD_BYTES = 256 * 1024
"""Size of a value above which it becomes a blob, so that a journal is quick to read (fault 36)."""

OFFLOAD_RETRIES = 7
"""After the first try to store a computed result; with the delays of `offload` about a minute. Then
the attempt, or the end of the run, fails.
"""

_HEX_DIGITS = frozenset("0123456789abcdef")


class BlobStore(Protocol):
    """A remote store of blobs (`S3BlobStore`). Blocking, called from threads; all raise
    ResultsUnavailable.
    """

    def put(self, ref: str, data: bytes) -> None:
        """Durable when it returns."""
        ...

    def get(self, ref: str) -> bytes | None:
        """The bytes, unverified, or None if there are none."""
        ...

    def has(self, ref: str) -> bool: ...


class Blobs:
    """Content-addressed files beside the store: `directory/ab/cd/abcd…`, named by SHA-256, mode
    0600, fsynced. Blocking.

    A blob is durable before `put` returns. `get` verifies the content. With a `remote` store the
    blobs are there, and the files are its cache; files from before `remote` was set are moved by
    `prune`.
    """

    def __init__(self, directory: Path, remote: BlobStore | None = None) -> None:
        self._directory = directory
        self._remote = remote

    @property
    def is_remote(self) -> bool:
        """Whether `put` may take long."""
        return self._remote is not None

    def put(self, data: bytes) -> str:
        """Store `data`; its reference. Raises StoreFailed if the disk refuses, ResultsUnavailable
        if the remote store does.
        """
        ref = hashlib.sha256(data).hexdigest()
        if self._remote is None:
            self._put_file(ref, data)
        else:
            self._remote.put(ref, data)
            with contextlib.suppress(StoreFailed):  # the cache is not needed
                self._put_file(ref, data)
        return ref

    def _put_file(self, ref: str, data: bytes) -> None:
        path = self._path(ref)
        try:
            if path.exists() and path.stat().st_size == len(data):
                os.utime(path)  # `prune` must leave it for the row that is about to reference it
            else:
                self._write(path, data)
        except OSError as error:
            raise StoreFailed(
                f"cannot write the blob {path}: {error}; check free space and the directory's owner"
            ) from error

    def get(self, ref: str) -> bytes:
        """The bytes of a reference. Raises StoreCorrupt if they are missing or damaged, also in the
        remote store.
        """
        path = self._path(ref)
        wrong = "is missing"
        with contextlib.suppress(FileNotFoundError):
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == ref:
                return data
            wrong = "does not match its name"
        if self._remote is not None and (data := self._remote.get(ref)) is not None:
            if hashlib.sha256(data).hexdigest() == ref:
                with contextlib.suppress(StoreFailed):
                    self._put_file(ref, data)
                return data
            wrong = "does not match its name in the bucket either"
        raise StoreCorrupt(
            f"the blob {path} {wrong}; restore it from a backup, or discard what the run recorded: "
            "eventflow retry RUN --from-scratch"
        )

    def offload(self, codec: str, data: bytes) -> tuple[str, bytes]:
        """`(codec + "@blob", reference)` of a value larger than OFFLOAD_BYTES; a smaller one
        unchanged.
        """
        return (
            (codec, data)
            if len(data) <= OFFLOAD_BYTES
            else (f"{codec}@blob", self.put(data).encode())
        )

    def fetch(self, codec: str, data: bytes) -> tuple[str, bytes]:
        """The inverse of `offload`."""
        return (
            (codec.removesuffix("@blob"), self.get(data.decode("latin-1")))
            if codec.endswith("@blob")
            else (codec, data)
        )

    def prune(self, keep: Collection[str], *, before: int) -> int:
        """Remove blobs that are not in `keep` and were last put before `before` (microseconds).
        Returns how many.

        Leave an hour: a blob is on disk before the row that references it. With a remote store,
        referenced files are removed too, once they are there.
        """
        removed = 0
        for path in self._directory.glob("??/??/*"):
            if path.stat().st_mtime_ns // 1000 < before and (
                path.name not in keep or self._is_in_remote(path)
            ):
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def _is_in_remote(self, path: Path) -> bool:
        """Whether the remote store has this blob. A file from before there was one is moved
        to it.
        """
        if self._remote is None:
            return False
        try:
            if not self._remote.has(path.name):
                self._remote.put(path.name, self.get(path.name))
        except (ResultsUnavailable, StoreCorrupt):
            return False  # the file stays; the next `prune` tries again
        return True

    def _path(self, ref: str) -> Path:
        # S16: a reference from a row must not leave the directory
        if len(ref) != 64 or not _HEX_DIGITS.issuperset(ref):
            raise StoreCorrupt(f"expected a blob reference of 64 hex digits, found {ref[:80]!r}")
        return self._directory / ref[:2] / ref[2:4] / ref

    def _write(self, path: Path, data: bytes) -> None:
        from tempfile import mkstemp  # takes 2 ms to import; most processes write no large value

        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = mkstemp(dir=path.parent, prefix=".")  # mode 0600
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
    """`Blobs.offload` in a thread. A remote store that does not answer is tried again for about a
    minute.
    """
    for retry_in in islice(Backoff(0.5, max_delay=30.0, jitter=0.0), OFFLOAD_RETRIES):
        try:
            return await asyncio.to_thread(blobs.offload, codec, data)
        except ResultsUnavailable as error:
            log.warning("result.not_stored", error=str(error), retry_in=retry_in)
        await asyncio.sleep(retry_in)
    return await asyncio.to_thread(blobs.offload, codec, data)


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
