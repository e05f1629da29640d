"""A read-only ledger, also while another process has it open: without its lock, for dry runs.

cli/dry_run.py uses `open_read_only`, so that changed code can be tried on the ledger of a running
server; cli/client.py opens an App with a `ReadOnlyStore` beside a program that embeds eventflow.
Readers never write or checkpoint (readers.py), so there is still one writer. A ledger with the
schema of another version of eventflow is a StoreError.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from eventflow.core.clock import Clock
from eventflow.core.errors import StoreError, StoreFull
from eventflow.store import queries
from eventflow.store.migrate import newest_schema
from eventflow.store.readers import Readers, fetch_dicts, schema_version
from eventflow.store.sqlite import SqliteStore
from eventflow.store.writer import Writer


class ReadOnlyStore(SqliteStore):
    """The store of another process, without its lock. Verbs that write raise StoreError."""

    def open(self) -> None:
        """Raises StoreError for a ledger of another version of eventflow."""
        newest = newest_schema()
        found = schema_version(self.path)
        if found != newest:
            raise StoreError(
                f"the store {self.path} has schema {found}, this eventflow reads {newest}: use the "
                "version that opened it last"
            )
        self._readers = Readers(self.path, self._clock)

    def close(self) -> None:
        if self._readers is not None:
            self._readers.close()
            self._readers = None

    def on_failure(self, call: Callable[[StoreError], None]) -> None:
        """Nothing is written, so no write fails."""

    def capacity(self) -> StoreFull | None:
        return None

    def _check_open(self) -> None:
        """Readers are all that it has."""

    async def counts(self) -> dict[str, int]:
        query = f"SELECT {', '.join(queries.COUNTS)} FROM ledger"
        (totals,) = await self._read(fetch_dicts, query, ())
        return totals

    def _open_writer(self) -> Writer:
        raise StoreError(f"the store {self.path} is open for reading only")


@asynccontextmanager
async def open_read_only(path: str, clock: Clock) -> AsyncGenerator[ReadOnlyStore]:
    """The ledger in this file, until the end of the block."""
    store = ReadOnlyStore(path, clock=clock)
    store.open()
    try:
        yield store
    finally:
        await asyncio.to_thread(store.close)
