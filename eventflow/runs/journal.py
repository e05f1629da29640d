"""What a run remembers: entries, each claimed by the place in the flow that made it.

A claim is text, `scope/task#ordinal` (see `lineage.py`); an entry is what became of it. The executor appends entries, the
store gives each commit a batch number and a time, and `Journal` hands a resumed run its entries back by claim.
"""

from collections.abc import Iterable
from enum import IntEnum

import msgspec


class Kind(IntEnum):
    """What an entry records."""

    VALUE = 0  # the call ended with a value (attempt: which try succeeded)
    ERROR = 1  # the call ended with an error that the flow receives
    FAILED = 2  # one attempt failed; the next is due at `due_at`
    CLEARED = (
        3  # an ERROR that `retry` dropped: attempt numbers continue from it, the budget begins anew
    )
    TIMER = 4  # a sleep or timeout fired
    EMIT = 5  # an event was emitted; `value` is its ledger id
    CHILD = 6  # a child run was started; `value` is its id (its result comes as VALUE or ERROR of attempt 1)
    CANCEL = 7  # a cancel was asked for; `value` is the reason as JSON
    NOTE = 8  # what the executor must know of earlier lives: see START, RAN, AFRESH

    @property
    def final(self) -> bool:
        """Whether the flow receives this entry as the end of its call."""
        return self in _FINAL


_FINAL = {Kind.VALUE, Kind.ERROR, Kind.TIMER, Kind.EMIT, Kind.CANCEL}


class Entry(msgspec.Struct, kw_only=True, gc=False):
    """One journal row. `batch`, `pos` and `at` are the store's: group commit, place in it, its time in microseconds.

    `(run, claim, attempt, kind)` is unique. `fingerprint` is the JSON of the call's arguments (long ones hashed), or None
    where they cannot be compared. `error` is JSON `{"type", "message", "args", "traceback"}`.
    """

    call_key: str
    kind: Kind
    attempt: int = 0
    batch: int = 0
    position: int = 0
    at: int = 0
    due_at: int | None = None
    fingerprint: bytes | None = None
    codec: str | None = None
    value: bytes | None = None
    error: bytes | None = None


STARTED, RUNNING_TIME, RESTARTED = "@start", "@ran", "@afresh"
"""Claims of the notes. START: the instant the run first started, in `due_at`, kept when a wait or a clock reading counts from
it. RAN: microseconds spent in memory before the attempt-th suspension, in `due_at`, for timeouts that count only those. AFRESH:
the journal before this one was dropped, for the attempt-th time; it is the first entry of the new one."""

CANCEL, TIMEOUT = "@cancel", "@timeout"
"""Claims of the orders that reach a run from outside."""


def restart_entry(generation: int) -> Entry:
    """The first entry of a journal that replaces another of the same run."""
    return Entry(call_key=RESTARTED, kind=Kind.NOTE, attempt=generation)


class Journal:
    """A run's entries by claim. Built once per resume from `Store.load`, or empty; grows as commits come back.

    `last_batch` is the last commit known here, `last_own` the last one with an answer that is no child run's: what a run that
    was suspended has certainly been given; `first_at` is the time of the first answer. `generation` counts how often the run
    was begun afresh.
    """

    __slots__ = (
        "children", "count", "failures", "finals", "first_at", "generation", "last_batch", "last_own_batch", "unclaimed", "running_time",
        "running_time_notes", "started_at",
    )  # fmt: skip

    def __init__(self, entries: Iterable[Entry] = (), *, started_at: int | None = None) -> None:
        self.finals: dict[str, Entry] = {}
        self.failures: dict[str, list[Entry]] = {}
        self.children: dict[str, Entry] = {}
        self.started_at = started_at
        self.last_batch = self.last_own_batch = 0
        self.first_at = self.count = self.generation = self.running_time = self.running_time_notes = 0
        for entry in entries:
            self.add(entry)
        self.unclaimed = set(self.finals)

    def add(self, entry: Entry) -> None:
        """Takes in one committed entry."""
        self.count += 1
        if entry.batch > self.last_batch:
            self.last_batch = entry.batch
        kind = entry.kind
        if kind is Kind.VALUE or kind.final:
            known = self.finals.get(entry.call_key)
            if known is None or known.attempt <= entry.attempt:
                self.finals[entry.call_key] = entry
            self.first_at = self.first_at or entry.at
            if entry.batch > self.last_own_batch and entry.call_key not in self.children:
                self.last_own_batch = entry.batch
        elif kind is Kind.CHILD:
            self.children[entry.call_key] = entry
        elif kind is Kind.NOTE:
            self._note(entry)
        else:
            self.failures.setdefault(entry.call_key, []).append(entry)

    def _note(self, entry: Entry) -> None:
        if entry.call_key == STARTED:
            self.started_at = entry.due_at
        elif entry.call_key == RUNNING_TIME:
            self.running_time_notes = max(self.running_time_notes, entry.attempt)
            self.running_time = max(self.running_time, entry.due_at or 0)
        elif entry.call_key == RESTARTED:
            self.generation = entry.attempt

    def attempts(self, call_key: str) -> tuple[int, int, int | None]:
        """`(last attempt number, attempts since the last retry by hand, due_at of the next)` of an unfinished call."""
        rows = self.failures.get(call_key)
        if not rows:
            return 0, 0, None
        rows.sort(key=lambda row: row.attempt)
        spent = 0
        for row in reversed(rows):
            if row.kind is Kind.CLEARED:
                break
            spent += 1
        return rows[-1].attempt, spent, rows[-1].due_at
