"""A read-only ledger, also while another process has it open: without its lock, for dry runs.

cli/dry_run.py uses it, so that changed code can be tried on the ledger of a running server. Readers
never write or checkpoint (readers.py), so there is still one writer. The ledger of another version
of eventflow may have other columns: that is a StoreError.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from eventflow.core.clock import Clock
from eventflow.events.event import Json
from eventflow.store import queries
from eventflow.store.readers import Readers


class ReadOnlyLedger:
    """The two methods of `Store` that a dry run needs."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers

    async def past(
        self,
        *,
        triggers: Sequence[str],
        type: str | None,
        since: int,
        until: int,
        after: int,
        limit: int,
    ) -> tuple[list[dict[str, Any]], int | None]:
        query = partial(
            queries.past,
            triggers=triggers,
            type=type,
            since=since,
            until=until,
            after=after,
            limit=limit,
        )
        return await self._readers.read(query)

    async def cursor(self, trigger: str) -> Mapping[str, Json]:
        return await self._readers.read(partial(queries.cursor, trigger=trigger))


@asynccontextmanager
async def open_read_only(path: str, clock: Clock) -> AsyncGenerator[ReadOnlyLedger]:
    """The ledger in this file, until the end of the block."""
    readers = Readers(path, clock)
    try:
        yield ReadOnlyLedger(readers)
    finally:
        await asyncio.to_thread(readers.close)
