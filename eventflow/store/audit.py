"""Whether the ledger is what it says: the sum of P9 against the rows, the lanes, the backlog, every checksum; by slices.

`eventflow doctor` prints what `SqliteStore.check` finds, and the tests ask it after each test. An empty list is a sound ledger.
Each table is walked once, by its key, `SLICE` seconds in one read transaction, so that the WAL can be reset between two. What
holds within a row and what belongs to it is judged where it stands. The sums are of one commit all the same: what the writer
moves meanwhile in what was walked already comes from moves.py, and `heed` adds it. `audit` is all of it in one transaction.
"""

import math
import sqlite3
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from eventflow.core.clock import Clock
from eventflow.store import rows
from eventflow.store.change_log import WEIGHED, Move
from eventflow.store.commit import COLUMN
from eventflow.store.load import corrupt
from eventflow.store.readers import fetch_dicts

SLICE = 0.5
"""Seconds of one slice: a quarter of what a read transaction may take, for machines that have more to do."""

_SUM = ("completed", "failed", "dead", "cancelled", "suppressed", "pending")
_WAITING = "pattern_events WHERE expired IS NULL"
_END = (math.inf, "")

_ODD = {
    "gathered": "runs do not have as many events as they say",
    "lost": "journal entries belong to no run",
    "blocked": "runs without an ordering key are blocked",
    "astray": "events wait in no pattern",
}
"""Sentences that are told once, with how many they are true of."""

Key = tuple[Any, ...]
Row = Sequence[Any]


def audit(connection: sqlite3.Connection) -> list[str]:
    """What does not hold, one sentence each; in the transaction of the caller, however long that takes."""
    made = Audit()
    while made.step(connection, lambda: False):
        pass
    return made.conclude(ledger(connection))


def ledger(connection: sqlite3.Connection) -> dict[str, Any]:
    """The ledger's one row."""
    return fetch_dicts(connection, "SELECT * FROM ledger", ())[0]


class Audit:
    """One look at everything: `step` until it says False, `heed` after each, then `conclude`."""

    def __init__(self) -> None:
        self._wrong: list[str] = []
        self._left = list(_WALKS)
        self._after = self._left[0].start
        self._first: int | None = None  # the commit that the first slice saw
        # By table, the last key at that time: what comes behind it is not walked, only heeded.
        self._bounds: dict[str, int] = {}
        # By table, of each slice: its last key, and the commit it saw.
        self._walked: dict[str, tuple[list[Key], list[int]]] = {}
        self._sums: Counter[str] = Counter()
        self._odd: Counter[str] = Counter()
        self._unread = False

    def step(self, connection: sqlite3.Connection, over: Callable[[], bool]) -> bool:
        """The next slice, until it is `over`, in one read transaction. False: there is nothing left."""
        walk = self._left[0]
        (batch,) = connection.execute("SELECT batch FROM ledger").fetchone()
        if self._first is None:
            self._first = batch
            self._bounds = {
                table: connection.execute(_BOUND[table]).fetchone()[0] for table in _BOUND
            }
        last: Key = _END
        asked = (
            self._after if walk.table not in _BOUND else (*self._after, self._bounds[walk.table])
        )
        try:
            with closing(
                connection.execute(walk.query, asked)
            ) as found:  # an open cursor keeps its transaction
                for row in found:
                    self._judge(walk, row)
                    if over():
                        last = row[: len(walk.start)]
                        break
        except (
            sqlite3.OperationalError
        ):  # interrupted, or the file is not to be had: no fault of the rows
            raise
        except sqlite3.DatabaseError as error:
            self._wrong.append(f"table {walk.table} cannot be read on after {self._after}: {error}")
            self._unread = True
        keys, batches = self._walked.setdefault(walk.table, ([], []))
        keys.append(_place(last))
        batches.append(batch)
        self._after = last
        if last is _END:
            self._left.pop(0)
            self._after = self._left[0].start if self._left else ()
        return bool(self._left)

    def within(self, connection: sqlite3.Connection, clock: Clock, seconds: float) -> bool:
        """`step`, for so many seconds."""
        until = clock.monotonic() + seconds
        return self.step(connection, lambda: clock.monotonic() > until)

    def _judge(self, walk: "_Walk", row: Row) -> None:
        for found in walk.judge(self._odd, row):
            self._wrong.append(found)
        if walk.table in WEIGHED:
            self._weigh(walk.table, row[-len(WEIGHED[walk.table]) :], 1)

    def _weigh(self, table: str, values: Row, sign: int) -> None:
        for name, n in _WEIGHTS[table](*values):
            self._sums[name] += sign * n

    def heed(self, moves: Iterable[Move]) -> None:
        """What the writer changed since the last call: it counts where the rows were read before it. In the rows that are still
        to be read it is seen.
        """
        for move in moves:
            seen = self._seen(move)
            if seen is not None and move.after >= seen:
                self._weigh(move.table, move.values, move.sign)

    def _seen(self, move: Move) -> int | None:
        """The commit at which the place of this row was read; None: it is still to be."""
        if move.key[0] > self._bounds[move.table]:
            return self._first
        keys, batches = self._walked.get(move.table, ((), ()))
        slice_ = bisect_left(keys, _place(move.key))
        return batches[slice_] if slice_ < len(keys) else None

    def conclude(self, ledger: dict[str, Any]) -> list[str]:
        """What does not hold, at the commit of this ledger's row: the moves of every commit up to it must have been heeded."""
        self._wrong += [
            f"{self._odd[name]} {said}" for name, said in _ODD.items() if self._odd[name]
        ]
        if not self._unread:
            self._wrong[:0] = _against(ledger, self._sums)
        return self._wrong


def _place(key: Key) -> Key:
    """A key as (id, text), to be compared with those of moves."""
    return (*key, "")[:2]


def _against(ledger: dict[str, Any], sums: Counter[str]) -> Iterator[str]:
    total = sum(ledger[name] for name in _SUM)
    if ledger["accepted"] != total:
        yield f"accepted is {ledger['accepted']}, the sum of its parts {total}"
    counted = [name for name in _SUM if name != "suppressed"] + ["events", "runs", "pending_bytes"]
    if not ledger["pruned_events"]:
        counted += ["duplicates", "conflicts"]
    for name in counted:
        found = sums[name] + ledger.get(f"pruned_{name}", 0)
        if ledger[name] != found:
            yield f"{name} is {ledger[name]}, the rows say {found}"


# --------------------------------------------------------------------------- what a row counts for


def _run_weighs(state: int, deliveries: int, size: int, is_child: int) -> Iterator[tuple[str, int]]:
    yield "runs", 1
    if not is_child:
        yield COLUMN[state], deliveries
    if state < 4:
        yield "pending_bytes", size


def _event_weighs(duplicates: int, conflicts: int) -> Iterator[tuple[str, int]]:
    yield from (("events", 1), ("duplicates", duplicates), ("conflicts", conflicts))


def _dead_weighs(is_open: int) -> Iterator[tuple[str, int]]:
    yield "dead", is_open


def _fact_weighs(waits: int, size: int) -> Iterator[tuple[str, int]]:
    if waits:
        yield from (("pending", 1), ("pending_bytes", size))


_WEIGHTS: dict[str, Callable[..., Iterator[tuple[str, int]]]] = {
    "runs": _run_weighs, "events": _event_weighs, "dead_letters": _dead_weighs, "pattern_events": _fact_weighs
}  # fmt: skip

# --------------------------------------------------------------------------- what must hold of a row


def _event(_: Counter[str], row: Row) -> Iterator[str]:
    *payload, crc = row[:9]
    if crc is not None and rows.checksum(*payload) != crc:
        yield corrupt("events", row[0])


def _run(odd: Counter[str], row: Row) -> Iterator[str]:
    ident, crc, outcome, outcome_crc = row[0], row[6], row[7:10], row[10]
    blocked, ordering_key, members, deliveries = row[11], row[4], row[12], row[14]
    if rows.checksum(*row[:6]) != crc or (
        outcome_crc is not None and rows.checksum(ident, *outcome) != outcome_crc
    ):
        yield corrupt("runs", ident)
    odd["blocked"] += blocked and ordering_key is None
    odd["gathered"] += deliveries != 1 + members


def _entry(odd: Counter[str], row: Row) -> Iterator[str]:
    run, call_key, attempt, kind, *rest, crc, known = row
    if rows.checksum(run, call_key, attempt, kind, *rest) != crc:
        yield corrupt("journal", run)
    odd["lost"] += not known


def _dead(_: Counter[str], row: Row) -> Iterator[str]:
    yield from ()


def _lane(_: Counter[str], row: Row) -> Iterator[str]:
    flow, ordering_key, heads = row
    if heads != 1:
        yield f"ordering key {ordering_key!r} of flow {flow!r} has {heads} heads, expected one"


def _pattern(_: Counter[str], row: Row) -> Iterator[str]:
    subscription, key, state, crc, n, found = row
    if n != found:
        yield f"pattern {subscription!r} has {n} events waiting under key {key!r}, the rows say {found}"
    if rows.checksum(subscription, key, state) != crc:
        yield f"pattern {subscription!r}, key {key!r}: the stored checksum does not match its content"


def _fact(odd: Counter[str], row: Row) -> Iterator[str]:
    odd["astray"] += row[2]
    yield from ()


class _Walk(NamedTuple):
    """`query` begins with the key it is ordered by, and ends with what `WEIGHED` names; `start` is before the first key."""

    table: str
    start: Key
    query: str
    judge: Callable[[Counter[str], Row], Iterator[str]]


def _weighed(table: str) -> str:
    return ", ".join(column.format("") for column in WEIGHED[table])


_MEMBERS = "(SELECT count(*) FROM run_events WHERE run = runs.id)"
_OPEN = f"(SELECT count(*) FROM {_WAITING} AND pattern_events.subscription = p.subscription AND pattern_events.key = p.key)"
_ASTRAY = "expired IS NULL AND NOT EXISTS (SELECT 1 FROM patterns p WHERE p.subscription = pattern_events.subscription AND p.key = pattern_events.key)"
_NEVER = -(1 << 63)

_BOUND = {
    table: f"SELECT ifnull(max({column}), {_NEVER}) FROM {table}"
    for table, column in (
        ("events", "id"),
        ("runs", "id"),
        ("journal", "run"),
        ("dead_letters", "id"),
        ("pattern_events", "event"),
    )
}

_WALKS = (
    _Walk("events", (_NEVER,), f"""SELECT id, key, digest, trigger, event_id, verdicts, headers, body, crc,
        {_weighed("events")} FROM events WHERE id > ? AND id <= ? ORDER BY id""", _event),
    _Walk("runs", (_NEVER,), f"""SELECT id, flow, subscription, event, ordering_key, params, crc, result, codec, error, outcome_crc,
        blocked, {_MEMBERS}, {_weighed("runs")} FROM runs WHERE id > ? AND id <= ? ORDER BY id""", _run),
    _Walk("journal", (_NEVER, "", 0, 0), """SELECT run, call_key, attempt, kind, batch, position, due_at, codec, fingerprint, value,
        error, crc, EXISTS (SELECT 1 FROM runs WHERE id = journal.run) FROM journal
        WHERE (run, call_key, attempt, kind) > (?, ?, ?, ?) AND run <= ? ORDER BY run, call_key, attempt, kind""", _entry),
    _Walk("dead_letters", (_NEVER,), f"SELECT id, {_weighed('dead_letters')} FROM dead_letters WHERE id > ? AND id <= ? ORDER BY id", _dead),
    _Walk("pattern_events", (_NEVER, ""), f"""SELECT event, subscription, {_ASTRAY}, {_weighed("pattern_events")} FROM pattern_events
        WHERE (event, subscription) > (?, ?) AND event <= ? ORDER BY event, subscription""", _fact),
    _Walk("patterns", ("", ""), f"""SELECT subscription, key, state, crc, open, {_OPEN} FROM patterns p
        WHERE (subscription, key) > (?, ?) ORDER BY subscription, key""", _pattern),
    _Walk("lanes", ("", ""), """SELECT flow, ordering_key, sum(blocked = 0) FROM runs WHERE ordering_key IS NOT NULL AND state < 4
        AND (flow, ordering_key) > (?, ?) GROUP BY flow, ordering_key ORDER BY flow, ordering_key""", _lane),
)  # fmt: skip

# --------------------------------------------------------------------------- pages


def pages(connection: sqlite3.Connection, budget: float, table: str = "20") -> list[str] | None:
    """SQLite's own look at the pages of the file, or of one table and its indexes; None when `budget` seconds are not enough.

    It cannot be sliced, and inside it SQLite 3.40 asks no progress handler, so another thread interrupts it.
    """
    over = threading.Event()

    def ring() -> None:
        wait = budget
        while not over.wait(wait):
            connection.interrupt()  # again and again: one that comes before SQLite has begun is not heard
            wait = 0.01

    bell = threading.Thread(target=ring, name="eventflow-bell")
    bell.start()
    try:
        found = [row[0] for row in connection.execute(f"PRAGMA quick_check({table})")]
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            raise
        return None
    finally:
        over.set()
        bell.join()  # a bell that rings later would interrupt somebody else's look
    return [f"page check: {said}" for said in found if said != "ok"]


def tables(connection: sqlite3.Connection) -> list[str]:
    """The names of the ledger's tables."""
    return [
        name
        for (name,) in connection.execute(
            "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
        )
    ]
