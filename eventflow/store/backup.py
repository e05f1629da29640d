"""Consistent copies of the ledger while it is being written: backups, and the copy for an audit.

Both run in the writer's thread on the writer's connection, some pages at a time with commits in
between; SQLite carries these over into the copy. A second connection would start again after each
commit, or hold a read transaction as long as the disk takes.
"""

import os
import sqlite3
import tempfile
from collections.abc import Callable
from urllib.parse import quote

from eventflow.core.errors import UsageError
from eventflow.store.file_guards import TEMPORARY_COPY, sync_folder

PAGES_PER_STEP = 512
"""Between two commits, 2 MiB: a few milliseconds of waiting for others."""


def back_up(connection: sqlite3.Connection, path: str, between: Callable[[], None]) -> None:
    """Copy the store to `path`, which must not exist; durable and complete when it appears there.

    `between` is called after each step, to serve the writer's queue.
    """
    if os.path.exists(path):
        raise UsageError(f"a backup overwrites no file: {path} exists; name another file")
    part = f"{path}.part"
    try:
        os.close(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise UsageError(
            f"cannot write the backup {path}: {error.strerror}; name a file in a writable folder"
        ) from None
    try:
        _copy(connection, part, between)
        os.link(part, path)
    finally:
        os.unlink(part)
    sync_folder(path)


def temporary_copy(
    connection: sqlite3.Connection, store_path: str, between: Callable[[], None]
) -> sqlite3.Connection:
    """A read-only connection to a copy beside the store. Its file has no name any more when this
    returns: closing the connection frees the space.
    """
    folder, name = os.path.split(store_path)
    handle, path = tempfile.mkstemp(prefix=f"{name}{TEMPORARY_COPY}", dir=folder)  # mode 0600
    os.close(handle)
    try:
        _copy(connection, path, between, durable=False)
        # immutable: the copy is in WAL mode, but nobody writes it.
        where = f"file:{quote(os.fsencode(path))}?mode=ro&immutable=1"
        copy = sqlite3.connect(where, uri=True, check_same_thread=False)
        copy.execute("SELECT 1 FROM sqlite_schema").fetchone()  # opens the file
        return copy
    finally:
        os.unlink(path)


def _copy(
    connection: sqlite3.Connection,
    path: str,
    between: Callable[[], None],
    *,
    durable: bool = True,
) -> None:
    target = sqlite3.connect(path)
    try:
        if not durable:
            target.execute("PRAGMA synchronous = OFF")
            target.execute("PRAGMA journal_mode = OFF")
        connection.backup(
            target, pages=PAGES_PER_STEP, progress=lambda status, left, total: between()
        )
    finally:
        target.close()
