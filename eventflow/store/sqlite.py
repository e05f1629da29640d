"""The store in one SQLite file: `SqliteStore` implements the `Store` of protocol.py.

`open` takes the lock, checks the file, migrates it and recovers; then one thread writes (writer.py)
and two read (readers.py). Nothing is decided here: operations are in apply.py and claim.py, verbs
of administration in admin.py and retention.py, late_runs.py and outbox.py, lists in queries.py.
"""

import asyncio
import math
import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import msgspec

from eventflow.core.clock import Clock
from eventflow.core.errors import StoreCorrupt, StoreError, StoreFull, StoreLocked, StoreUnwritable
from eventflow.events.event import EventOutcome, Json, OutboxMessage, Receipt
from eventflow.events.storable import storable_text
from eventflow.runs.journal import Entry
from eventflow.runs.run import Run, State
from eventflow.store import admin, late_runs, outbox, queries, retention
from eventflow.store.file_guards import (
    DiskSpaceGuard,
    HighWater,
    Lock,
    OpenFiles,
    check_first_name,
    lock_holder_pid,
    make_store_folder,
    remove_temporary_copies,
    sync_folder,
)
from eventflow.store.load import load_journal, load_payloads
from eventflow.store.migrate import current_schema, migrate, migrations, newest_schema
from eventflow.store.protocol import (
    Arrival,
    Op,
    OutboxListener,
    PatternAdvancer,
    RecordEvents,
    RunEventSource,
    RunReceiver,
)
from eventflow.store.readers import QUERY_TIMEOUT_SECONDS, Readers, last_batch
from eventflow.store.rows import skip_adapters
from eventflow.store.run_events import LateRuns
from eventflow.store.transaction import Transaction
from eventflow.store.writer import (
    ConnectionJob,
    Listeners,
    QueuedOperation,
    TransactionCall,
    Writer,
)

T = TypeVar("T")

_CHECKPOINT = 4000
"""Pages in the WAL at which the writer checkpoints it (16 MiB): rare enough that thousands of runs
share one fsync of the file, often enough that a restart reads the WAL in well under a second.
"""

_PRAGMAS = (
    "PRAGMA busy_timeout = 5000",
    "PRAGMA journal_mode = WAL",
    f"PRAGMA wal_autocheckpoint = {_CHECKPOINT}",
    f"PRAGMA journal_size_limit = {64 << 20}",
    "PRAGMA cache_size = -32768",
    "PRAGMA temp_store = MEMORY",
    "PRAGMA secure_delete = FAST",
)

SCAN_SECONDS = 20.0
"""Time limit of reads that walk up to a million rows: late runs, payloads that retention may drop.
"""

REQUIRED_READ_SECONDS = 600.0
"""Time limit of reads that a trigger needs to start, or a run to continue: its cursor, its journal,
its events.
"""

_LAST_ID = (
    "SELECT max(ifnull((SELECT max(id) FROM events), 0), ifnull((SELECT max(id) FROM runs), 0))"
)

_SIZE = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"


class _Limits(msgspec.Struct, frozen=True):
    pending: int
    pending_bytes: int


class SqliteStore:
    """One process, one file. `Store` in protocol.py says what each verb promises.

    `synchronous="NORMAL"` is faster on slow disks; a power cut may then lose the last commits, but
    never half of one. `max_pending` and `max_pending_bytes` bound the backlog. `free_floor` (bytes;
    default 256 MiB or 2 % of the disk, whichever is less) is the free space that the store leaves.
    `accept_loss` opens a store that lost commits it had acknowledged.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        clock: Clock,
        synchronous: str = "FULL",
        max_pending: int = 1_000_000,
        max_pending_bytes: int = 2 << 30,
        free_floor: int | None = None,
        ballast: int = 64 << 20,
        accept_loss: bool = False,
    ) -> None:
        self.path = os.path.realpath(path)  # the files beside it have one name each, too
        self.location: str = storable_text(f"sqlite:///{self.path}")
        self.last_id = 0
        self._clock = clock
        self._synchronous = synchronous
        self._accept_loss = accept_loss
        self._limits = _Limits(max_pending, max_pending_bytes)
        self._lock = Lock(self.path)
        self._high_water = HighWater(self.path)
        self._space = DiskSpaceGuard(self.path, clock, free_floor, ballast)
        self._listeners = Listeners()
        self._writer: Writer | None = None
        self._readers: Readers | None = None
        self._connection: sqlite3.Connection | None = None
        self._payload_search = retention.PayloadSearch()

    # ------------------------------------------------------------------- open and close

    def open(self) -> None:
        try:
            make_store_folder(os.path.dirname(self.path))
            self._lock.acquire()
        except OSError as error:
            raise StoreUnwritable(self.path, error.strerror or str(error)) from error
        try:
            self._open()
        except OSError as error:
            self.close()
            raise StoreUnwritable(self.path, error.strerror or str(error)) from error
        except sqlite3.Error as error:
            self.close()
            raise _open_error(self.path, error) from error
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        check_first_name(self.path)
        last_acknowledged = self._check_high_water()
        remove_temporary_copies(self.path)
        skip_adapters()
        connection = self._connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        for pragma in (*_PRAGMAS, f"PRAGMA synchronous = {self._synchronous}"):
            connection.execute(pragma)
        if connection.execute("PRAGMA user_version").fetchone()[0] != newest_schema():
            migrate(connection, self.path, migrations(), current_schema())
        listeners = self._listeners
        files = OpenFiles(self.path, self._clock, self._lock)
        writer = Writer(connection, files, self._clock, self._marks(), self._space, listeners)
        writer.last.batch = max(writer.last.batch, last_acknowledged)
        self.last_id = connection.execute(_LAST_ID).fetchone()[0]
        if listeners.run_events is not None:
            listeners.run_events.raise_floor(self.last_id)
        patterns = listeners.patterns
        time_driven = None if patterns is None else patterns.time_driven()
        writer.apply(lambda tx: admin.recover(tx, time_driven))
        files.remember(connection)
        sync_folder(self.path)
        self._space.reserve_ballast()
        self._readers = Readers(self.path, self._clock)
        self._writer = writer
        writer.start()

    def _marks(self) -> HighWater | None:
        """Without FULL a power cut may lose commits, so a mark would report a sound file as
        damaged.
        """
        return self._high_water if self._synchronous.upper() in ("FULL", "EXTRA") else None

    def _check_high_water(self) -> int:
        """The last batch that was acknowledged.

        Reads with a read-only connection: a store that is refused must not be changed.
        """
        marked = self._high_water.open()
        found = last_batch(self.path)
        if marked > found and not self._accept_loss:
            raise StoreCorrupt(
                f"the store {self.path} ends at commit {found}, "
                f"but commit {marked} was acknowledged: {found + 1} to {marked} are missing. "
                "Restore them; or continue without them (also after restoring an older backup) "
                "with `eventflow doctor --accept-loss`"
            )
        return max(marked, found)

    def close(self) -> None:
        if not self._lock.is_held:
            return  # closed already; or a forked child, whose parent owns the files
        if self._writer is not None:
            self._writer.stop()
        self._listeners.detach()
        sound = self._readers is not None and self.failed is None
        if self._readers is not None:
            self._readers.close()
            self._readers = None
        if self._connection is not None:
            try:
                if sound:
                    self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._connection.close()
            except sqlite3.Error:
                pass  # everything acknowledged is in the WAL; the next open reads it there
            self._connection = None
        self._high_water.close()
        if self.failed is None:
            self._space.release_ballast()  # a closed store reserves no space
        self._lock.release()

    # ------------------------------------------------------------------- the hot path

    @property
    def failed(self) -> StoreError | None:
        return self._writer.failed if self._writer is not None else None

    @property
    def is_alive(self) -> bool:
        """Whether the writer's thread lives, or has said why not (`failed`)."""
        return self._open_writer().is_alive or self.failed is not None

    @property
    def busy_since(self) -> float | None:
        """When the transaction under way began, by the monotonic clock."""
        return self._open_writer().busy_since

    @property
    def commits(self) -> dict[str, float]:
        """Since the start: group commits, their operations, and their seconds."""
        return dict(self._open_writer().commits)

    def post(self, op: Op, reply: Callable[[Any], None], loop: asyncio.AbstractEventLoop) -> None:
        self._open_writer().post(QueuedOperation(op, reply, loop))

    def attach_run_events(self, source: RunEventSource) -> None:
        self._listeners.run_events = source

    def attach_patterns(self, advancer: PatternAdvancer) -> None:
        self._listeners.patterns = advancer

    def attach_worker(self, receiver: RunReceiver | None) -> None:
        self._listeners.receiver = receiver

    def attach_outbox_listener(self, listener: OutboxListener | None) -> None:
        self._listeners.outbox = listener

    def on_new_runs(self, call: Callable[[bool], None] | None) -> None:
        self._listeners.new_runs = call

    def on_failure(self, call: Callable[[StoreError], None]) -> None:
        self._open_writer().on_failure(call)

    def capacity(self) -> StoreFull | None:
        totals = self._open_writer().last.totals
        if totals["pending"] >= self._limits.pending:
            return StoreFull(
                f"{totals['pending']} deliveries are pending, the bound is {self._limits.pending}",
                5.0,
            )
        if totals["pending_bytes"] >= self._limits.pending_bytes:
            return StoreFull(
                f"{totals['pending_bytes']} bytes are pending, "
                f"the bound is {self._limits.pending_bytes}",
                5.0,
            )
        return self._space.full()

    def _open_writer(self) -> Writer:
        if self._writer is None:
            raise StoreError(f"the store {self.path} is not open")
        if not self._lock.is_held and self._connection is not None:
            raise StoreError(
                f"the store {self.path} belongs to the process that opened it, and this one was "
                "forked from that; use the store there, or start new processes with `spawn`"
            )
        return self._writer

    async def _submit(self, op: Op | TransactionCall | ConnectionJob) -> Any:
        """A posted operation, awaited. A cancel of the caller does not reach the transaction."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        self._open_writer().post(QueuedOperation(op, partial(_resolve, done), loop))
        try:
            return await done
        finally:  # breaks a cycle: the future holds the error, and the error this frame
            del done

    async def _transact(self, verb: Callable[..., T], *args: Any, **options: Any) -> T:
        def call(tx: Transaction) -> T:
            return verb(tx, *args, **options)

        return cast(T, await self._submit(TransactionCall(call)))

    def _check_open(self) -> None:
        self._open_writer()

    async def _read(
        self,
        query: Callable[..., T],
        *args: Any,
        budget: float = QUERY_TIMEOUT_SECONDS,
        **options: Any,
    ) -> T:
        self._check_open()
        if self._readers is None:
            raise StoreError(f"the store {self.path} is not open")
        return await self._readers.read(
            lambda connection: query(connection, *args, **options), budget
        )

    async def record(
        self,
        arrivals: Sequence[Arrival],
        *,
        trigger: str = "",
        cursor: Mapping[str, Json] | None = None,
    ) -> list[Receipt]:
        return await self._submit(RecordEvents(arrivals, trigger, cursor))

    async def cursor(self, trigger: str) -> dict[str, Json]:
        return await self._read(queries.cursor, trigger, budget=REQUIRED_READ_SECONDS)

    async def outcomes(self, keys: Sequence[bytes]) -> list[EventOutcome | None]:
        return await self._read(queries.outcomes, keys)

    async def load(self, run: int) -> list[Entry]:
        return await self._read(load_journal, run, budget=REQUIRED_READ_SECONDS)

    async def payloads(self, run: int) -> list[bytes]:
        return await self._read(load_payloads, run, budget=REQUIRED_READ_SECONDS)

    async def unsent_messages(self, sink: str, limit: int) -> list[OutboxMessage]:
        return await self._read(outbox.unsent, sink, limit)

    async def remove_sent(self, numbers: Sequence[int], rejected: Mapping[int, str]) -> None:
        await self._transact(outbox.remove_sent, numbers, rejected)

    async def outbox_depths(self) -> dict[str, tuple[int, int]]:
        return await self._read(outbox.depths)

    async def queue_heads(self, flows: Sequence[str]) -> dict[str, int]:
        return await self._read(queries.queue_heads, flows)

    async def late_runs(self, wanted: Callable[[str], Mapping[int, bool]], now: int) -> LateRuns:
        return await self._read(late_runs.find, wanted, now, budget=SCAN_SECONDS)

    async def record_late_runs(self, runs: Sequence[int], after: int) -> int:
        return await self._transact(late_runs.record, runs, after, self._listeners.run_events)

    # ------------------------------------------------------------------- administration

    async def retry(self, run: int, *, discard_journal: bool = False) -> Run:
        retried = cast(Run, await self._transact(admin.retry, run, discard_journal=discard_journal))
        if self._listeners.new_runs is not None:
            self._listeners.new_runs(True)
        return retried

    async def retry_from(self, run: int, call: str, new: int) -> Run:
        return cast(Run, await self._transact(admin.retry_from, run, call, new))

    async def cancel(self, run: int, reason: str, caller_token: int = 0) -> State:
        if caller_token:
            return await self._transact(admin.cancel_call, run, reason, caller_token)
        return await self._transact(admin.cancel, run, reason)

    async def set_paused(self, trigger: str, paused: bool) -> None:
        await self._transact(admin.set_paused, trigger, paused)

    async def paused_triggers(self) -> set[str]:
        return await self._read(queries.paused)

    async def redrive(self, dead_letter: int, arrival: Arrival) -> Receipt:
        return await self._transact(admin.redrive, dead_letter, arrival)

    async def replay(self, event: int, arrival: Arrival) -> Receipt:
        return await self._transact(admin.replay, event, arrival)

    async def prune(self, *, payloads_before: int, identities_before: int, step: int = 500) -> int:
        removed = await self._transact(
            retention.prune,
            payloads_before=payloads_before,
            identities_before=identities_before,
            step=step,
        )
        if removed >= step:
            return removed
        search = self._payload_search
        for after in search.starts(self._clock.now(), idle=not removed):
            found: list[int] = await self._read(
                retention.unneeded_payloads,
                before=payloads_before,
                after=after,
                step=step - removed,
                budget=SCAN_SECONDS,
            )
            if found:
                search.after = found[-1]
                dropped = await self._transact(retention.drop_payloads, found, payloads_before)
                return removed + dropped
        return removed

    async def backup(self, path: str) -> None:
        from eventflow.store.backup import back_up  # as audit.py below: only for administration

        writer = self._open_writer()
        await self._submit(
            ConnectionJob(lambda connection: back_up(connection, path, writer.serve_others))
        )

    async def check(self) -> list[str]:
        """What is wrong in the ledger, pages and checksums included, for `eventflow doctor`.

        While a worker is attached, a copy is checked, so that no read transaction keeps the WAL
        from being reset. Raises StoreFull if the disk has no space for the copy.
        """
        from eventflow.store.audit import audit
        from eventflow.store.backup import temporary_copy

        writer = self._open_writer()
        if self._readers is None or self._listeners.receiver is None:
            return await self._read(audit, budget=math.inf)

        def serve_others() -> None:
            writer.serve_others()
            self._space.check_copy(0)  # the ledger grows meanwhile, and the copy with it

        def copy_ledger(connection: sqlite3.Connection) -> sqlite3.Connection:
            (size,) = connection.execute(_SIZE).fetchone()
            self._space.check_copy(size)
            return temporary_copy(connection, self.path, serve_others)

        copy = await self._submit(ConnectionJob(copy_ledger))
        return await self._readers.read_copy(copy, audit)

    async def blob_references(self) -> set[str]:
        """The blobs that a journal entry or a result names."""
        return await self._read(queries.blob_references, budget=60.0)

    # ------------------------------------------------------------------- queries

    async def counts(self) -> dict[str, int]:
        totals = self._open_writer().last.totals
        return {name: totals[name] for name in queries.COUNTS}

    async def events(
        self,
        *,
        trigger: str | None = None,
        type: str | None = None,
        since: int | None = None,
        until: int | None = None,
        limit: int = 50,
        after: int | None = None,
    ) -> list[dict[str, Any]]:
        return await self._read(
            queries.events,
            trigger=trigger,
            type=type,
            since=since,
            until=until,
            limit=limit,
            after=after,
        )

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
        return await self._read(
            queries.past,
            triggers=triggers,
            type=type,
            since=since,
            until=until,
            after=after,
            limit=limit,
        )

    async def event(self, ident: str | int) -> dict[str, Any]:
        return await self._read(queries.event, ident)

    async def runs(
        self,
        *,
        event: int | None = None,
        flow: str | None = None,
        state: State | None = None,
        parent: int | None = None,
        limit: int = 50,
        after: int | None = None,
    ) -> list[dict[str, Any]]:
        return await self._read(
            queries.runs,
            event=event,
            flow=flow,
            state=state,
            parent=parent,
            limit=limit,
            after=after,
        )

    async def run(self, ident: str | int) -> dict[str, Any]:
        return await self._read(queries.run, ident)

    async def dead_letters(
        self, *, limit: int = 50, after: int | None = None
    ) -> list[dict[str, Any]]:
        return await self._read(queries.dead, limit=limit, after=after)

    async def dead_letter(self, ident: str | int) -> dict[str, Any]:
        return await self._read(queries.dead_letter, ident)


def _open_error(path: str, error: sqlite3.Error) -> StoreError:
    """The error to raise for an SQLite error at open."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreCorrupt(f"the store {path} is damaged ({error}); restore a backup")
    if code == sqlite3.SQLITE_BUSY:
        return StoreLocked(path, lock_holder_pid(path))
    if code in (
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_FULL,
    ):
        return StoreUnwritable(path, str(error))
    return StoreError(f"cannot open the store {path}: {error}")


def _resolve(future: asyncio.Future[Any], value: Any) -> None:
    """Sets the result or the error, unless the caller was cancelled."""
    if future.done():
        return
    if isinstance(value, BaseException):
        future.set_exception(value)
    else:
        future.set_result(value)
