"""The one thread that writes the store, and its group commit.

    post ──► queue ──► BEGIN IMMEDIATE ─► read what is needed ─► decide ─► write ─► COMMIT (one fsync) ──► one wake-up per loop

Everything queued when a transaction begins shares it, up to `MOST` ops; the fsync of one batch is the time the next one gathers
in. Called by sqlite.py. Guarantees: ops are applied in the order posted; every reply runs, also when the batch failed; an op
that cannot be applied fails alone; a storage error is final (P10). What ops do is in ops.py, claim.py and doors.py.
"""

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from eventflow.core.clock import Clock
from eventflow.core.errors import EventflowError, StoreCorrupt, StoreError, StoreFailed, StoreFull
from eventflow.store.apply import record_run_events, apply, prefetch
from eventflow.store.claim import claim
from eventflow.store.file_guards import HighWater, Space, holder_of
from eventflow.store.protocol import Claim, RunReceiver, RunEventSource, Op, OutboxListener, RecordEvents
from eventflow.store.rows import NEVER, RunRow
from eventflow.store.transaction import TOTALS, Transaction

MAX_BATCH_OPERATIONS = 4096
"""Ops in one transaction: bounds the wait of the first one for the last one's rows, not throughput."""

_HIGH_WATER_EVERY = 0.1
"""Seconds between two high-water marks: what a torn WAL may lose unseen, against a second fsync for each batch."""

_BAD_INPUT = (
    sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError, sqlite3.DataError,
    TypeError, ValueError, AttributeError, LookupError, OverflowError,
)  # fmt: skip
"""What an op with wrong content raises; anything else from SQLite is the storage's own failure."""


class TransactionCall:
    """A door's verb: `make` runs in a transaction of its own. The reply is its value; if that is callable, what it returns once
    the rows are written."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[Transaction], Any]) -> None:
        self.make = make


class ConnectionJob:
    """Work on the writer's connection outside any transaction: a backup, a checkpoint."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[sqlite3.Connection], Any]) -> None:
        self.make = make


class QueuedOperation(msgspec.Struct, gc=False):
    op: "Op | TransactionCall | ConnectionJob"
    reply: Callable[[Any], None]
    loop: asyncio.AbstractEventLoop


class LoopCallback(msgspec.Struct, gc=False):
    """Something to call on a loop once a batch is over."""

    loop: asyncio.AbstractEventLoop
    call: Callable[..., None]
    args: tuple[Any, ...]


class Writer:
    """Owns the connection from `start` to `stop`."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        path: str,
        clock: Clock,
        high_water: HighWater | None,
        space: Space,
    ) -> None:
        self.connection, self._path, self._clock = connection, path, clock
        self._high_water, self._space = high_water, space
        self.batch, self.at, *counted = connection.execute(
            f"SELECT batch, at, {','.join(TOTALS)} FROM ledger"
        ).fetchone()
        self.totals: dict[str, int] = dict(zip(TOTALS, counted, strict=True))
        self.handover: RunReceiver | None = None
        self.relay: OutboxListener | None = None
        self.herald: RunEventSource | None = None
        self.lookout: Callable[[bool], None] | None = None
        self.failed: StoreError | None = None
        self.commits: dict[str, float] = {"batches": 0, "ops": 0, "seconds": 0.0}
        self._on_failure: list[Callable[[StoreError], None]] = []
        self._running: dict[
            int, RunRow
        ] = {}  # the rows of running runs: nobody else writes them, so they need no reading
        self._told_due: int | None = None
        self._lock = threading.Lock()
        self._queue: list[QueuedOperation] = []
        self._posted = threading.Event()
        self._stopping = False
        self._held_back: list[QueuedOperation] = []
        self._marked, self._marked_at = self.batch, float("-inf")
        self._thread = threading.Thread(target=self._work, name="eventflow-store", daemon=True)

    # ------------------------------------------------------------------- any thread

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Commits what was posted and ends the thread."""
        with self._lock:
            self._stopping = True
        self._posted.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def post(self, item: QueuedOperation) -> None:
        with self._lock:
            closed = self._stopping or self.failed is not None
            if not closed:
                self._queue.append(item)
        if not closed:
            if (
                not self._posted.is_set()
            ):  # `set` takes a lock each time, and a busy writer is posted to thousands of times
                self._posted.set()
        else:
            _send(
                [
                    LoopCallback(
                        item.loop,
                        item.reply,
                        (self.failed or StoreError(f"the store {self._path} is closed"),),
                    )
                ]
            )

    def on_failure(self, call: Callable[[StoreError], None]) -> None:
        with self._lock:
            failed = self.failed
            if failed is None:
                self._on_failure.append(call)
        if failed is not None:
            call(failed)

    # ------------------------------------------------------------------- the thread

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        except (
            Exception
        ) as error:  # whatever broke, callers who wait must hear of it rather than hang
            self._fail(error, ())

    def _turn(self) -> bool:
        """Waits for work and does it. False: stopped and nothing left."""
        stale = self._high_water is not None and self._marked < self.batch
        if not self._posted.wait(_HIGH_WATER_EVERY if stale else None):
            self._mark()
            return True
        self.commit_queued()
        if self._clock.monotonic() - self._marked_at >= _HIGH_WATER_EVERY:
            self._mark()
        with self._lock:
            if self._queue:
                return True
            self._posted.clear()
            if not self._stopping:
                return True
        if self.failed is None:
            self._mark()
        return False

    def commit_queued(self) -> None:
        """Commits what is queued now, in order; a door's verb has a transaction of its own."""
        with self._lock:
            items, self._queue = self._queue[:MAX_BATCH_OPERATIONS], self._queue[MAX_BATCH_OPERATIONS:]
        while items:
            n = 1
            if not isinstance(items[0].op, TransactionCall | ConnectionJob):
                n = next(
                    (n for n, item in enumerate(items) if isinstance(item.op, TransactionCall | ConnectionJob)),
                    len(items),
                )
            if isinstance(items[0].op, ConnectionJob):  # what came after it is served between its steps
                with self._lock:
                    self._queue[:0] = items[1:]
                self._serve(items[:1])
                return
            self._serve(items[:n])
            items = items[n:]
            if self._held_back:  # the file is locked: these go first, once it is free
                with self._lock:
                    self._queue[:0] = [*self._held_back, *items]
                self._held_back = []
                return

    def between(self) -> None:
        """Between two steps of an errand: others are served; a failure ends the errand."""
        self.commit_queued()
        if self.failed is not None:
            raise self.failed

    def _serve(self, items: Sequence[QueuedOperation]) -> None:
        """One transaction, and its replies; on bad input one transaction for each op."""
        if self.failed is not None:
            _send([_word(item, self.failed) for item in items])
            return
        began = self._clock.monotonic()
        try:
            _send(self._do(items))
            self._measure(len(items), began)
        except _BAD_INPUT as error:
            if len(items) == 1:
                self._refuse(items[0], error)
            else:
                for n, item in enumerate(items, 1):
                    self._serve([item])
                    if self._held_back:
                        self._held_back.extend(items[n:])
                        break
        except sqlite3.Error as error:
            self._storage_error(error, items)
        except OSError as error:
            self._fail(error, items)

    def _measure(self, ops: int, began: float) -> None:
        commits = self.commits
        commits["batches"] += 1
        commits["ops"] += ops
        commits["seconds"] += self._clock.monotonic() - began

    def _refuse(self, item: QueuedOperation, error: BaseException) -> None:
        """One op, tried alone, cannot be applied. It may be that a journal entry exists: then it is answered as refused."""
        try:
            _send(self._do([item], probe=True))
        except _BAD_INPUT:
            refusal = StoreError(f"{type(item.op).__name__} was not recorded: {error}")
            refusal.__cause__ = error
            _send([_word(item, refusal)])

    def _do(self, items: Sequence[QueuedOperation], *, probe: bool = False) -> list[LoopCallback]:
        """The transaction itself; returns what is to be said once it is durable."""
        if isinstance(errand := items[0].op, ConnectionJob):
            return [_word(items[0], self._run_errand(errand))]
        tx = self._begin()
        try:
            words = self._decide(tx, items, probe=probe)
            self._finish(tx)
            self.connection.execute("COMMIT")
        except EventflowError as error:  # a door's verb said no: NotFound, UsageError
            self._undo(tx)
            return [_word(item, error) for item in items]
        except BaseException:
            self._undo(tx)
            raise
        return words + self._committed(tx)

    def _begin(self) -> Transaction:
        self.connection.execute("BEGIN IMMEDIATE")
        now = self._clock.now()
        return Transaction(
            self.connection,
            batch=self.batch + 1,
            at=max(now, self.at),
            now=now,
            totals=self.totals,
            handover=self.handover,
            running=self._running,
            herald=self.herald,
        )

    def apply(self, verb: Callable[[Transaction], None]) -> None:
        """One verb in a transaction of its own, in the caller's thread: before `start` only."""
        tx = self._begin()
        verb(tx)
        self._finish(tx)
        self.connection.execute("COMMIT")
        self._committed(tx)

    def _finish(self, tx: Transaction) -> None:
        if self.herald is not None and (tx.ended or tx.silences):
            record_run_events(tx, self.herald)
        tx.finish()

    def _run_errand(self, errand: ConnectionJob) -> Any:
        try:
            return errand.make(self.connection)
        except EventflowError as error:
            return error
        except (
            sqlite3.Error,
            OSError,
        ) as error:  # the errand's own files: the store itself is not touched
            return StoreError(str(error))

    def _decide(self, tx: Transaction, items: Sequence[QueuedOperation], *, probe: bool) -> list[LoopCallback]:
        if isinstance(call := items[0].op, TransactionCall):
            value = call.make(tx)
            tx.flush()
            return [_word(items[0], value() if callable(value) else value)]
        writes = [
            (item, item.op) for item in items if not isinstance(item.op, Claim | TransactionCall | ConnectionJob)
        ]
        prefetch(tx, [op for _, op in writes], probe=probe)
        words = [_word(item, apply(tx, op)) for item, op in writes]
        claims = [(item, item.op) for item in items if isinstance(item.op, Claim)]
        if claims:
            tx.flush()
        for item, op in claims:
            claimed = claim(tx, op)
            self._told_due = claimed.next_due
            words.append(_word(item, claimed))
        return words

    def _undo(self, tx: Transaction) -> None:
        tx.undo()
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")

    def _committed(self, tx: Transaction) -> list[LoopCallback]:
        """Takes over the new numbers; returns what the worker and the relay must hear."""
        if self.lookout is not None and (
            tx.taken or tx.more or tx.totals["runs"] > self.totals["runs"]
        ):
            self.lookout(False)
        self.batch, self.at, self.totals = tx.batch, tx.at, tx.totals
        tx.remember()
        if tx.soonest < (self._told_due or NEVER):
            self._told_due, tx.more = tx.soonest, True
        words: list[LoopCallback] = []
        if tx.outlets and (relay := self.relay) is not None:
            words.append(LoopCallback(relay.loop, relay.notify, (tuple(tx.outlets),)))
        handover = tx.handover
        if handover is None:
            return words
        if tx.taken or tx.more or tx.cancels:
            words.append(LoopCallback(handover.loop, handover.receive_runs, (tx.taken, tx.more, tx.cancels)))
        if tx.answers:
            words.append(LoopCallback(handover.loop, handover.receive_answers, (tx.answers,)))
        return words

    def _mark(self) -> None:
        """Writes the high-water mark, after the fact and off the path of any reply."""
        if self._high_water is not None and self._marked < self.batch:
            self._high_water.write(self.batch)
            self._marked, self._marked_at = self.batch, self._clock.monotonic()
            self._space.reload()

    # ------------------------------------------------------------------- when storage fails

    def _storage_error(self, error: sqlite3.Error, items: Sequence[QueuedOperation]) -> None:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL and self._space.release():
            self._serve(items)
        elif code == sqlite3.SQLITE_BUSY:
            self._wait_for_lock(items)
        else:
            self._fail(error, items)

    def _wait_for_lock(self, items: Sequence[QueuedOperation]) -> None:
        """Another process holds the store's file. Intake slows down; the way through waits, nothing of it is lost."""
        holder = holder_of(self._path)
        full = StoreFull(
            f"the store {self._path} is locked by {f'process {holder}' if holder else 'another process'}",
            2.0,
        )
        _send([_word(item, full) for item in items if isinstance(item.op, RecordEvents | TransactionCall)])
        self._held_back = [item for item in items if not isinstance(item.op, RecordEvents | TransactionCall)]

    def _fail(self, error: BaseException, items: Sequence[QueuedOperation]) -> None:
        """Fail-stop: this batch is unknown, nothing later is done, everyone who waits is told."""
        kind = (
            StoreCorrupt
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _CORRUPT
            else StoreFailed
        )
        failed = kind(
            f"the store {self._path} failed ({_name(error)}); what was being committed is unknown, nothing more is"
        )
        failed.__cause__ = error
        with self._lock:
            self.failed = failed
            left, self._queue = self._queue, []
            calls, self._on_failure = self._on_failure, []
        _send([_word(item, failed) for item in (*items, *left)])
        for call in calls:
            call(failed)


_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _name(error: BaseException) -> str:
    return f"{getattr(error, 'sqlite_errorname', type(error).__name__)}: {error}"


def _word(item: QueuedOperation, value: Any) -> LoopCallback:
    return LoopCallback(item.loop, item.reply, (value,))


def _send(words: Sequence[LoopCallback]) -> None:
    """One wake-up per loop, whatever the number of words for it. A loop that is gone needs none."""
    by_loop: dict[asyncio.AbstractEventLoop, list[LoopCallback]] = {}
    for word in words:
        by_loop.setdefault(word.loop, []).append(word)
    for loop, said in by_loop.items():
        try:
            loop.call_soon_threadsafe(_run, said)
        except RuntimeError:
            continue  # closed: its callers went with it, what they posted is durable all the same


def _run(words: Sequence[LoopCallback]) -> None:
    """On the loop: every word runs, whatever one of them raises."""
    for at, word in enumerate(words):
        try:
            word.call(*word.args)
        except BaseException:
            word.loop.call_soon(_run, words[at + 1 :])
            raise
