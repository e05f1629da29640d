"""A consistent copy of the ledger while it is being written.

Runs in the writer's thread, on the writer's connection, a few pages at a time with commits in between: SQLite carries those
over into the copy. A second connection would restart at each commit, or hold a read transaction for as long as the disk takes.
"""

import os
import sqlite3
from collections.abc import Callable

from eventflow.core.errors import UsageError
from eventflow.store.file_guards import sync_folder

_PAGES = 512
"""Between two commits, 2 MiB: a few milliseconds of somebody's wait."""


def back_up(connection: sqlite3.Connection, path: str, between: Callable[[], None]) -> None:
    """Copies the whole store to `path`, which must not exist; durable and complete when it appears there."""
    if os.path.exists(path):
        raise UsageError(
            f"a backup is never written over something: {path} exists; name another file"
        )
    part = f"{path}.part"
    try:
        os.close(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise UsageError(
            f"cannot write the backup {path}: {error.strerror}; name a file in a folder that takes one"
        ) from None
    try:
        _copy(connection, part, between)
        os.link(part, path)
    finally:
        os.unlink(part)
    sync_folder(path)


def _copy(connection: sqlite3.Connection, path: str, between: Callable[[], None]) -> None:
    target = sqlite3.connect(path)
    try:
        connection.backup(target, pages=_PAGES, progress=lambda status, left, total: between())
    finally:
        target.close()
