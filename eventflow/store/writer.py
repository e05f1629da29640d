"""The one thread that writes the store, and its group commit.

    post ─► queue ─► BEGIN ─► read ─► decide ─► write ─► COMMIT (one fsync) ─► one wake-up per loop

Everything queued when a transaction begins shares it, up to `MAX_BATCH_OPERATIONS`; while one batch
is synced the next one is queued. Called by sqlite.py. Guarantees: operations are applied in the
order posted; every reply runs, also when the batch failed; an operation that cannot be applied
fails alone; a storage error is final (P10). What operations do is in apply.py, claim.py and
admin.py.
"""

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, TypeAlias

import msgspec

from eventflow.core.clock import Clock, Moment, read_moment
from eventflow.core.errors import EventflowError, StoreCorrupt, StoreError, StoreFailed, StoreFull
from eventflow.store.apply import ServeAlone, apply, record_run_events
from eventflow.store.claim import claim
from eventflow.store.file_guards import (
    ALL_FILES_CHECK_SECONDS,
    DiskSpaceGuard,
    HighWater,
    OpenFiles,
    lock_holder_pid,
)
from eventflow.store.protocol import (
    Claim,
    Op,
    OpList,
    OutboxListener,
    PatternAdvancer,
    RecordEvents,
    RunEventSource,
    RunReceiver,
    WriteOp,
)
from eventflow.store.rows import NEVER, RunRow
from eventflow.store.set_clock import shift_waits, step_between
from eventflow.store.tables import TOTALS, Commit
from eventflow.store.transaction import Transaction

MAX_BATCH_OPERATIONS = 4096
"""Operations in one transaction: bounds the wait of the first one for the rows of the last one, not
throughput.
"""

_HIGH_WATER_INTERVAL_SECONDS = 0.1
"""Between two high-water marks: what a torn WAL may lose unseen, against a second fsync for each
batch.
"""

_SAVE_TIMEOUT_MILLISECONDS = 300
"""For readers to end when the commits are saved at once: the promise is to stop within a second."""

_BAD_INPUT = (
    sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError, sqlite3.DataError,
    TypeError, ValueError, AttributeError, LookupError, OverflowError,
)  # fmt: skip
"""What an operation with wrong content raises; anything else from SQLite is a failure of the
storage.
"""

_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class TransactionCall:
    """A verb with a transaction of its own (admin.py, retention.py …).

    The reply is the value of `call`; if that is callable, the value that it returns once the rows
    are written.
    """

    __slots__ = ("call",)

    def __init__(self, call: Callable[[Transaction], Any]) -> None:
        self.call = call


class ConnectionJob:
    """Work on the writer's connection outside of any transaction: a backup, a checkpoint."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[sqlite3.Connection], Any]) -> None:
        self.call = call


_SOLITARY = (TransactionCall, ConnectionJob)
"""What has no other operation in its transaction."""


class QueuedOperation(msgspec.Struct, gc=False):
    """An operation, and the callback that gets its reply on a loop."""

    op: "Op | TransactionCall | ConnectionJob"
    reply: Callable[[Any], None]
    loop: asyncio.AbstractEventLoop

    def replied(self, value: Any) -> "LoopCallback":
        return (self.loop, self.reply, (value,))


LoopCallback: TypeAlias = tuple[asyncio.AbstractEventLoop, Callable[..., None], tuple[Any, ...]]
"""A call to make on a loop once a batch is over."""


class Listeners:
    """What is attached to the store, or None.

    `run_events` and `patterns` stay attached when the store is closed.
    """

    def __init__(self) -> None:
        self.run_events: RunEventSource | None = None
        self.patterns: PatternAdvancer | None = None
        self.receiver: RunReceiver | None = None
        self.outbox: OutboxListener | None = None
        self.new_runs: Callable[[bool], None] | None = None

    def detach(self) -> None:
        self.receiver = None
        self.outbox = None
        self.new_runs = None


class LastCommit:
    """What the last commit left: its number, its time (microseconds), the counts, and the rows of
    running runs.

    Nobody else writes the rows of running runs, so that they need no reading. `reported_due`: the
    next due time that the worker was given. `read_at`: when its transaction began.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        columns = ",".join(TOTALS)
        row = connection.execute(f"SELECT batch, at, {columns} FROM ledger").fetchone()
        self.batch: int = row[0]
        self.at: int = row[1]
        self.totals: dict[str, int] = dict(zip(TOTALS, row[2:], strict=True))
        self.running: dict[int, RunRow] = {}
        self.reported_due: int | None = None
        self.read_at: Moment | None = None


class HighWaterSchedule:
    """Writes high-water marks, `_HIGH_WATER_INTERVAL_SECONDS` apart at least, off the path of any
    reply. Without `high_water` every batch counts as marked.
    """

    def __init__(
        self, high_water: HighWater | None, space: DiskSpaceGuard, clock: Clock, batch: int
    ) -> None:
        self.marked: float = batch if high_water is not None else float("inf")
        self._high_water = high_water
        self._space = space
        self._clock = clock
        self._marked_at = float("-inf")

    def mark(self, batch: int, *, at_once: bool = False) -> None:
        """Marks the batch if that is due, or `at_once`."""
        if self._high_water is None or self.marked >= batch:
            return
        now = self._clock.monotonic()
        if at_once or now - self._marked_at >= _HIGH_WATER_INTERVAL_SECONDS:
            self._high_water.write(batch)
            self.marked = batch
            self._marked_at = now
            self._space.restore_ballast()


class OperationQueue:
    """Operations on their way from any thread to the writer thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: list[QueuedOperation] = []
        self._posted = threading.Event()
        self.is_closed = False

    def post(self, item: QueuedOperation) -> bool:
        """False: the queue is closed."""
        with self._lock:
            if self.is_closed:
                return False
            self._items.append(item)
        # `set` takes a lock each time, and a busy writer is posted to thousands of times.
        if not self._posted.is_set():
            self._posted.set()
        return True

    def take(self, timeout: float | None) -> list[QueuedOperation]:
        """What is queued, at most `MAX_BATCH_OPERATIONS`; waits for it. Empty after `timeout`
        seconds, and when the queue is closed and empty.
        """
        if not self._posted.wait(timeout):
            return []
        with self._lock:
            items = self._items
            if len(items) <= MAX_BATCH_OPERATIONS:
                self._items = []
                if not self.is_closed:
                    self._posted.clear()
            else:
                self._items = items[MAX_BATCH_OPERATIONS:]
                items = items[:MAX_BATCH_OPERATIONS]
        return items

    def put_first(self, items: Sequence[QueuedOperation]) -> None:
        """Before everything that is queued."""
        if items:
            with self._lock:
                self._items[:0] = items
            self._posted.set()

    def close(self) -> list[QueuedOperation]:
        """No operation is taken from now on. Returns what is queued; it stays queued."""
        with self._lock:
            self.is_closed = True
            items = list(self._items)
        self._posted.set()
        return items

    def clear(self) -> None:
        with self._lock:
            self._items = []


class Writer:
    """Owns the connection from `start` to `stop`."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        files: OpenFiles,
        clock: Clock,
        high_water: HighWater | None,
        space: DiskSpaceGuard,
        listeners: Listeners,
    ) -> None:
        self.connection = connection
        self.last = LastCommit(connection)
        self.listeners = listeners
        self.failed: StoreError | None = None
        self.busy_since: float | None = None
        """When the transaction under way began, by the monotonic clock."""
        self.commits: dict[str, float] = {"batches": 0, "ops": 0, "seconds": 0.0}
        self.high_water = HighWaterSchedule(high_water, space, clock, self.last.batch)
        self._files = files
        self._clock = clock
        self._space = space
        self._queue = OperationQueue()
        self._on_failure: list[Callable[[StoreError], None]] = []
        self._failure_lock = threading.Lock()
        self._waiting_for_lock: list[QueuedOperation] = []
        self._thread = threading.Thread(target=self._work, name="eventflow-store", daemon=True)

    # ------------------------------------------------------------------- any thread

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Commits what was posted and ends the thread."""
        self._queue.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def post(self, item: QueuedOperation) -> None:
        if not self._queue.post(item):
            closed = self.failed or StoreError(f"the store {self._files.path} is closed")
            _call_back([item.replied(closed)])

    def on_failure(self, call: Callable[[StoreError], None]) -> None:
        """`call` runs once, when storage fails; at once if it has."""
        with self._failure_lock:
            failed = self.failed
            if failed is None:
                self._on_failure.append(call)
        if failed is not None:
            call(failed)

    # ------------------------------------------------------------------- the thread

    def _work(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:  # whatever broke, callers who wait get an answer
            self._fail(error, ())

    def _step(self) -> bool:
        """Waits for operations and commits them. False: stopped, and nothing is left."""
        high_water = self.high_water
        is_marked = high_water.marked >= self.last.batch
        timeout = ALL_FILES_CHECK_SECONDS if is_marked else _HIGH_WATER_INTERVAL_SECONDS
        if items := self._queue.take(timeout):
            self._commit(items)
            high_water.mark(self.last.batch)
            return True
        if self.failed is None:
            high_water.mark(self.last.batch, at_once=True)
            self._files.check(all_files=is_marked)
        return not self._queue.is_closed

    def _commit(self, items: list[QueuedOperation]) -> None:
        """Commits these, in order. A `TransactionCall` has its own transaction."""
        while items:
            n = 1
            if not isinstance(items[0].op, _SOLITARY):
                n = next(
                    (n for n, item in enumerate(items) if isinstance(item.op, _SOLITARY)),
                    len(items),
                )
            if isinstance(items[0].op, ConnectionJob):
                self._queue.put_first(items[1:])  # served between the steps of the job
                self._serve(items[:1])
                return
            self._serve(items[:n])
            items = items[n:]
            if self._waiting_for_lock:  # the file is locked: these go first, once it is free
                self._queue.put_first([*self._waiting_for_lock, *items])
                self._waiting_for_lock = []
                return

    def serve_others(self) -> None:
        """Between two steps of a ConnectionJob: commits what is queued.

        Raises if storage failed, which ends the job.
        """
        self._commit(self._queue.take(0))
        if self.failed is not None:
            raise self.failed

    def _serve(self, items: Sequence[QueuedOperation]) -> None:
        """One transaction, and its replies; on bad input one transaction for each operation."""
        if self.failed is not None:
            _call_back([item.replied(self.failed) for item in items])
            return
        began = self._clock.monotonic()
        if not isinstance(items[0].op, ConnectionJob):
            self.busy_since = began
        try:
            replies = self._transact(items)
            self._files.check()
            _call_back(replies)
            self.commits["batches"] += 1
            self.commits["seconds"] += self._clock.monotonic() - began
        except (*_BAD_INPUT, ServeAlone) as error:
            if len(items) == 1 and isinstance(ops := items[0].op, OpList) and ops.ops:
                items = _unlisted(items[0], ops)
            if len(items) == 1:
                self._reject(items[0], error)
            else:
                for n, item in enumerate(items, 1):
                    self._serve([item])
                    if self._waiting_for_lock:
                        self._waiting_for_lock.extend(items[n:])
                        break
        except sqlite3.Error as error:
            self._storage_error(error, items)
        except (OSError, StoreFailed) as error:  # the files beside the store, or the store's own
            self._fail(error, items)
        self.busy_since = None

    def _reject(self, item: QueuedOperation, error: BaseException) -> None:
        """One operation, tried alone, cannot be applied.

        A journal entry may exist already: then the reply is `Fenced`.
        """
        try:
            _call_back(self._transact([item], must_probe=True))
        except _BAD_INPUT:
            rejection = StoreError(f"{type(item.op).__name__} was not recorded: {error}")
            rejection.__cause__ = error
            _call_back([item.replied(rejection)])

    # ------------------------------------------------------------------- one transaction

    def _transact(
        self, items: Sequence[QueuedOperation], *, must_probe: bool = False
    ) -> list[LoopCallback]:
        """The transaction itself; returns the replies and reports, to be delivered now that it is
        durable.
        """
        if isinstance(job := items[0].op, ConnectionJob):
            return [items[0].replied(_run_job(self.connection, job))]
        tx = self._begin()
        try:
            replies = self._decide(tx, items, must_probe=must_probe)
            self._finish(tx)
            self.connection.execute("COMMIT")
        except EventflowError as error:  # the verb refused: NotFound, UsageError
            self._undo(tx)
            return [item.replied(error) for item in items]
        except BaseException:
            self._undo(tx)
            raise
        self.commits["ops"] += tx.operations
        return replies + self._committed(tx)

    def apply(self, verb: Callable[[Transaction], None]) -> None:
        """One verb in a transaction of its own, in the caller's thread: before `start` only."""
        tx = self._begin()
        verb(tx)
        self._finish(tx)
        self.connection.execute("COMMIT")
        self._committed(tx)

    def _begin(self) -> Transaction:
        self.connection.execute("BEGIN IMMEDIATE")
        now = read_moment(self._clock)
        if step := step_between(self.last.read_at, now):
            shift_waits(self.connection, step)
        return Transaction(
            self.connection,
            batch=self.last.batch + 1,
            at=max(now.wall, self.last.at),
            read_at=now,
            totals=self.last.totals,
            receiver=self.listeners.receiver,
            running=self.last.running,
            advancer=self.listeners.patterns,
        )

    def _decide(
        self, tx: Transaction, items: Sequence[QueuedOperation], *, must_probe: bool
    ) -> list[LoopCallback]:
        if isinstance(verb := items[0].op, TransactionCall):
            value = verb.call(tx)
            tx.flush()
            return [items[0].replied(value() if callable(value) else value)]
        writes: list[QueuedOperation] = []
        claims: list[tuple[QueuedOperation, Claim]] = []
        ops: list[WriteOp] = []
        for item in items:
            op = item.op
            if isinstance(op, Claim):
                claims.append((item, op))
            elif isinstance(op, OpList):
                writes.append(item)
                ops.extend(op.ops)
            elif not isinstance(op, _SOLITARY):
                writes.append(item)
                ops.append(op)
        tx.operations = len(ops) + len(claims)
        applied = iter(apply(tx, ops, must_probe=must_probe))
        replies = [
            item.replied(
                list(islice(applied, len(item.op.ops)))
                if isinstance(item.op, OpList)
                else next(applied)
            )
            for item in writes
        ]
        if claims:
            tx.flush()
        for item, op in claims:
            claimed = claim(tx, op)
            self.last.reported_due = claimed.next_due
            replies.append(item.replied(claimed))
        return replies

    def _finish(self, tx: Transaction) -> None:
        source = self.listeners.run_events
        if source is not None and (tx.runs.ended or tx.commit.own_events):
            record_run_events(tx, source)
        tx.finish()

    def _undo(self, tx: Transaction) -> None:
        tx.runs.undo()
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")

    def _committed(self, tx: Transaction) -> list[LoopCallback]:
        """Takes over what the commit left; returns the reports to the worker and the outbox's
        listener.
        """
        commit = tx.commit
        last = self.last
        has_new_runs = commit.totals["runs"] > last.totals["runs"]
        last.batch = commit.batch
        last.at = commit.at
        last.totals = commit.totals
        last.read_at = commit.read_at
        tx.runs.forget_ended()
        new_runs = self.listeners.new_runs
        if new_runs is not None and (commit.reserved or commit.has_due or has_new_runs):
            new_runs(False)
        if commit.next_due < (last.reported_due or NEVER):
            last.reported_due = commit.next_due
            commit.has_due = True
        return _reports(commit, self.listeners)

    # ------------------------------------------------------------------- when storage fails

    def _storage_error(self, error: sqlite3.Error, items: Sequence[QueuedOperation]) -> None:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL and self._space.release_ballast():
            self._serve(items)
        elif code == sqlite3.SQLITE_BUSY:
            # Another process holds the file. Intake slows down; what the worker posted waits.
            pid = lock_holder_pid(self._files.path)
            holder = f"process {pid}" if pid else "another process"
            full = StoreFull(f"the store {self._files.path} is locked by {holder}", 2.0)
            refused = (RecordEvents, TransactionCall)
            _call_back([item.replied(full) for item in items if isinstance(item.op, refused)])
            self._waiting_for_lock = [item for item in items if not isinstance(item.op, refused)]
        else:
            self._fail(error, items)

    def _fail(self, error: BaseException, items: Sequence[QueuedOperation]) -> None:
        """Fail-stop: this batch is unknown, nothing later is done, every caller that waits gets the
        failure.
        """
        if isinstance(error, StoreFailed):
            self._save_commits()
            failed = error
        else:
            failed = self._storage_failure(error)
        with self._failure_lock:
            self.failed = failed
            calls = self._on_failure
            self._on_failure = []
        left = self._queue.close()
        self._queue.clear()
        _call_back([item.replied(failed) for item in (*items, *left)])
        for call in calls:
            call(failed)

    def _storage_failure(self, error: BaseException) -> StoreError:
        is_corrupt = getattr(error, "sqlite_errorcode", 0) & 0xFF in _CORRUPT
        what = f"{getattr(error, 'sqlite_errorname', type(error).__name__)}: {error}"
        failed = (StoreCorrupt if is_corrupt else StoreFailed)(
            f"the store {self._files.path} failed ({what}); "
            "what was being committed is unknown, nothing more is"
        )
        failed.__cause__ = error
        return failed

    def _save_commits(self) -> None:
        """A file of the store is not at its path any more: complete the one that is open.

        What was acknowledged is then whole in it if it was only moved, or if only its WAL was
        removed; and a WAL of this ledger does not meet another one that was put in its place. A
        file that was overwritten stays as it is.
        """
        self._files.abandon()
        if self._files.is_overwritten:
            return
        with suppress(sqlite3.Error):
            self.connection.execute(f"PRAGMA busy_timeout = {_SAVE_TIMEOUT_MILLISECONDS}")
            self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _unlisted(item: QueuedOperation, listed: OpList) -> list[QueuedOperation]:
    """The operations of a list as items of their own; the last reply completes the list's."""
    replies: list[Any] = []

    def collect(reply: Any) -> None:
        replies.append(reply)
        if len(replies) == len(listed.ops):
            item.reply(replies)

    return [QueuedOperation(op, collect, item.loop) for op in listed.ops]


def _run_job(connection: sqlite3.Connection, job: ConnectionJob) -> Any:
    try:
        return job.call(connection)
    except EventflowError as error:
        return error
    except (sqlite3.Error, OSError) as error:  # of the job's own files: the store is intact
        return StoreError(str(error))


def _reports(commit: Commit, listeners: Listeners) -> list[LoopCallback]:
    """What the worker and the outbox's listener get to know of a commit."""
    reports: list[LoopCallback] = []
    if commit.sinks and (outbox := listeners.outbox) is not None:
        reports.append((outbox.loop, outbox.notify, (tuple(commit.sinks),)))
    if (receiver := listeners.receiver) is None:
        return reports
    if commit.reserved or commit.has_due or commit.cancels:
        runs = (commit.reserved, commit.has_due, commit.cancels)
        reports.append((receiver.loop, receiver.receive_runs, runs))
    if commit.answers:
        reports.append((receiver.loop, receiver.receive_answers, (commit.answers,)))
    return reports


def _call_back(callbacks: Sequence[LoopCallback]) -> None:
    """One wake-up per loop, whatever the number of callbacks for it.

    A loop that is closed needs none.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[LoopCallback]] = {}
    for callback in callbacks:
        loop = callback[0]
        if loop in by_loop:
            by_loop[loop].append(callback)
        else:
            by_loop[loop] = [callback]
    for loop, its_callbacks in by_loop.items():
        try:
            loop.call_soon_threadsafe(run_callbacks, its_callbacks)
        except RuntimeError:
            continue  # closed: its callers went with it, what they posted is durable all the same


def run_callbacks(callbacks: Sequence[LoopCallback]) -> None:
    """On the loop: every callback runs, whatever one of them raises."""
    for n, (loop, call, args) in enumerate(callbacks):
        try:
            call(*args)
        except BaseException:
            loop.call_soon(run_callbacks, callbacks[n + 1 :])
            raise
