"""Read-only connections to the ledger, in two threads: lists, one event, one run, journals.

`SqliteStore` and `ReadOnlyStore` run the functions of queries.py, load.py and audit.py here. A
reader never writes or checkpoints, and gives up after two seconds, so that no read transaction
keeps the WAL from being reset for longer. Rows are dicts of what is stored: instants in
microseconds, ids as integers, bytes as bytes.
"""

import asyncio
import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from queue import SimpleQueue
from typing import Any, TypeVar
from urllib.parse import quote

from eventflow.core.clock import Clock
from eventflow.core.errors import StoreError

T = TypeVar("T")

READER_THREADS = 2
QUERY_TIMEOUT_SECONDS = 2.0
"""Of one query, unless its caller sets another."""

_INSTRUCTIONS_PER_CHECK = (
    20_000  # of SQLite's virtual machine between two timeout checks: about 1 ms
)


class Readers:
    """A few read-only connections and the threads that use them."""

    def __init__(self, path: str, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._pool = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="eventflow-read")
        self._idle: SimpleQueue[sqlite3.Connection] = SimpleQueue()
        self._opened: list[sqlite3.Connection] = []
        self._copies: set[sqlite3.Connection] = set()

    async def read(
        self,
        query: Callable[[sqlite3.Connection], T],
        timeout: float = QUERY_TIMEOUT_SECONDS,
    ) -> T:
        """`query(connection)` in a reader's thread, in one read transaction. StoreError after
        `timeout` seconds.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, self._run, query, timeout
        )

    async def read_copy(
        self, copy: sqlite3.Connection, query: Callable[[sqlite3.Connection], T]
    ) -> T:
        """`query(copy)` in a thread of its own, without a timeout, and close the copy. StoreError
        if `close` interrupts it.
        """

        def run() -> T:
            with closing(copy):
                return query(copy)

        self._copies.add(copy)
        try:
            return await asyncio.to_thread(run)
        except sqlite3.OperationalError as error:
            raise StoreError(f"cannot read the copy of {self._path}: {error}") from error
        finally:
            self._copies.discard(copy)
            _interrupt(copy)  # the caller was cancelled

    def _run(self, query: Callable[[sqlite3.Connection], T], timeout: float) -> T:
        connection = self._borrow()
        deadline = self._clock.monotonic() + timeout
        connection.set_progress_handler(
            lambda: self._clock.monotonic() > deadline, _INSTRUCTIONS_PER_CHECK
        )
        try:
            connection.execute("BEGIN")
            return query(connection)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
                raise StoreError(
                    f"the query took longer than {timeout:g} s; narrow it by trigger, type, flow "
                    "or time"
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
        """Wait for running queries; interrupt those on copies. Idempotent."""
        for copy in list(self._copies):
            _interrupt(copy)
        self._pool.shutdown()
        for connection in self._opened:
            connection.close()
        self._opened.clear()


def _connect(path: str) -> sqlite3.Connection:
    where = f"file:{quote(os.fsencode(path))}?mode=ro"
    return sqlite3.connect(where, uri=True, isolation_level=None, check_same_thread=False)


def last_batch(path: str) -> int:
    """The number of the last commit in the file and its WAL; 0 if there is no ledger yet."""
    if not os.path.exists(path) or not os.path.getsize(path):
        return 0
    if os.path.exists(f"{path}-journal"):
        return 0  # the first start was killed before WAL mode; the writer rolls it back
    connection = _connect(path)
    try:
        known = connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'ledger'").fetchone()
        return connection.execute("SELECT batch FROM ledger").fetchone()[0] if known else 0
    finally:
        connection.close()


def schema_version(path: str) -> int:
    """The number of the last schema file applied."""
    with closing(_connect(path)) as connection:
        return connection.execute("PRAGMA user_version").fetchone()[0]


def _interrupt(connection: sqlite3.Connection) -> None:
    with suppress(sqlite3.ProgrammingError):  # it is closed already
        connection.interrupt()


def fetch_dicts(
    connection: sqlite3.Connection, query: str, values: Sequence[Any]
) -> list[dict[str, Any]]:
    cursor = connection.execute(query, values)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]
