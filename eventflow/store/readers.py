"""Everything that only looks: lists, one event, one run, journals. Read-only connections in two threads.

A reader never writes, never checkpoints, and gives up after two seconds, so that no read transaction keeps the WAL from being
reset for longer. Rows are plain dicts of what is stored: instants in microseconds, ids as integers, bytes as bytes.
"""

import asyncio
import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar
from urllib.parse import quote

from eventflow.core.clock import Clock
from eventflow.core.errors import StoreError

T = TypeVar("T")

READER_THREADS = 2
QUERY_TIMEOUT_SECONDS = 2.0
"""Seconds one look may take."""

_INSTRUCTIONS_PER_CHECK = 20_000  # of SQLite's virtual machine between two looks at the clock: about 1 ms


class Readers:
    """A few read-only connections and the threads that use them."""

    def __init__(self, path: str, clock: Clock) -> None:
        self._path, self._clock = path, clock
        self._pool = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="eventflow-read")
        self._idle: SimpleQueue[sqlite3.Connection] = SimpleQueue()
        self._opened: list[sqlite3.Connection] = []

    async def read(self, look: Callable[[sqlite3.Connection], T], budget: float = QUERY_TIMEOUT_SECONDS) -> T:
        """`look(connection)` in a reader's thread, in one read transaction. Raises StoreError when it takes too long."""
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, self._run, look, budget
        )

    def _run(self, look: Callable[[sqlite3.Connection], T], budget: float) -> T:
        connection = self._borrow()
        until = self._clock.monotonic() + budget
        connection.set_progress_handler(lambda: self._clock.monotonic() > until, _INSTRUCTIONS_PER_CHECK)
        try:
            connection.execute("BEGIN")
            return look(connection)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
                raise StoreError(
                    f"the query took longer than {budget:g} s; narrow it by trigger, type, flow or time"
                ) from None
            raise StoreError(f"cannot read the store {self._path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"cannot read the store {self._path}: {error}; run `eventflow doctor`"
            ) from error
        finally:
            connection.rollback()
            self._idle.put(connection)

    def _borrow(self) -> sqlite3.Connection:
        if not self._idle.empty():
            return self._idle.get()
        connection = _connect(self._path)
        self._opened.append(connection)
        return connection

    def close(self) -> None:
        """Waits for looks under way. Idempotent."""
        self._pool.shutdown()
        for connection in self._opened:
            connection.close()
        self._opened.clear()


def _connect(path: str) -> sqlite3.Connection:
    where = f"file:{quote(path)}?mode=ro"
    return sqlite3.connect(where, uri=True, isolation_level=None, check_same_thread=False)


def last_batch(path: str) -> int:
    """The number of the last commit in the file and its WAL; 0 where there is no ledger yet."""
    if not os.path.exists(path) or not os.path.getsize(path):
        return 0
    if os.path.exists(
        f"{path}-journal"
    ):  # the first start was killed on its way to WAL; who may write rolls that back
        return 0
    connection = _connect(path)
    try:
        known = connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'ledger'").fetchone()
        return connection.execute("SELECT batch FROM ledger").fetchone()[0] if known else 0
    finally:
        connection.close()


def fetch_dicts(
    connection: sqlite3.Connection, query: str, values: Sequence[Any]
) -> list[dict[str, Any]]:
    cursor = connection.execute(query, values)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]
