"""The journal of a run: the results of its calls, by call key.

A call key is text, `scope/task#ordinal`, that names a call by its place in the flow
(loop/scopes.py). An `Entry` records what happened to a call. engine/execution.py appends entries,
the store numbers them by commit, and a run that is resumed gets them back as a `Journal`.
"""

from collections.abc import Iterable
from enum import IntEnum

import msgspec

from eventflow.core.clock import SECOND


class Kind(IntEnum):
    """What an entry records."""

    VALUE = 0  # the call ended with a value (attempt: which try succeeded)
    ERROR = 1  # the call ended with an error that the flow receives
    FAILED = 2  # one attempt failed; the next is due at `due_at`
    CLEARED = (
        3  # an ERROR that `retry` dropped: attempt numbers continue, the retry budget restarts
    )
    TIMER = 4  # a sleep or timeout fired
    EMIT = 5  # an event was emitted; `value` is its ledger id
    CHILD = (
        6  # a child run was started; `value` is its id; its result is a VALUE or ERROR of attempt 1
    )
    CANCEL = 7  # a cancel was requested; `value` is the reason as JSON
    NOTE = 8  # state of the run between its claims: see the notes below

    @property
    def is_final(self) -> bool:
        """Whether the flow receives this entry as the end of its call."""
        return self in _FINAL


_FINAL = {Kind.VALUE, Kind.ERROR, Kind.TIMER, Kind.EMIT, Kind.CANCEL}


class Entry(msgspec.Struct, kw_only=True, gc=False):
    """One row of the journal.

    The store sets `batch` (the group commit), `position` (in the batch) and `at` (its time,
    microseconds). `(run, call_key, attempt, kind)` is unique. `fingerprint` is the JSON of the
    call's arguments (long ones hashed), or None where they cannot be compared. `error` is JSON
    `{"type", "message", "args", "traceback"}`. `after`, `waited` and `took` are for timelines: on
    entries that end an attempt, else None (`CallTimes`).

    The fields are in the order of the stored checksum (`entry_crc` of store/rows.py), `at` apart.
    """

    call_key: str
    attempt: int = 0
    kind: Kind
    batch: int = 0
    position: int = 0
    due_at: int | None = None
    codec: str | None = None
    fingerprint: bytes | None = None
    value: bytes | None = None
    error: bytes | None = None
    after: int | None = None
    waited: int | None = None
    took: int | None = None
    at: int = 0


class CallTimes(msgspec.Struct, gc=False):
    """When a task's call and the body of its current attempt began; times by the monotonic clock,
    in seconds.

    `after` is the entry that the flow had received last when it made the call, `asked_at` the time
    of the call, for a later attempt that at which it was due. `began_at` is the start of the body:
    None while it waits for a slot or for its due time.
    """

    after: Entry | None = None
    asked_at: float | None = None
    began_at: float | None = None

    def write_to(self, entry: Entry, now: float) -> float:
        """Sets the times of an attempt that ended at `now`, and forgets them. The seconds that its
        body took.
        """
        began = now if self.began_at is None else self.began_at
        asked = began if self.asked_at is None else self.asked_at
        entry.after = 0 if self.after is None else self.after.batch
        entry.waited = int((began - asked) * SECOND)
        took = now - began
        entry.took = int(took * SECOND)
        self.asked_at = None
        self.began_at = None
        return took


STARTED_NOTE = "@start"
"""Call key of a note: the instant at which the run first started, in `due_at`.

Recorded when a wait or a clock reading counts from it.
"""

RUNNING_TIME_NOTE = "@ran"
"""Call key of a note: microseconds in memory before the attempt-th suspension, in `due_at`, for
timeouts that count running time only.
"""

RESTARTED_NOTE = "@afresh"
"""Call key of the first entry of a journal that replaced another one, for the attempt-th time."""

RERUN_NOTE = "@rerun"
"""Call key of a note in the journal of a run that repeats another one from a call: its value is
`{"run", "from", "seed"}`, the other run, the call, and whose random numbers it draws.
"""

RETRY_NOTE = "@retry"
"""Call key of a note: the flow is executed again from its recorded values. `due_at` is when, and
the start of its timeouts; `error` is that of the execution before, which was number `attempt` of
the run. The value is `{"attempt", "attempts"}`: how many attempts have failed, of how many, since
the last note without a value. A note has no value if a person, or the parent, retried the run: then
all retries are left.
"""

CANCEL_KEY = "@cancel"
TIMEOUT_KEY = "@timeout"
"""Call keys of the signals that reach a run from outside."""


def restart_entry(generation: int) -> Entry:
    """The first entry of a journal that replaces another of the same run."""
    return Entry(call_key=RESTARTED_NOTE, kind=Kind.NOTE, attempt=generation)


def rerun_entry(run: str, call: str, seed: str) -> Entry:
    """The note of a run that repeats `run` from `call`."""
    value = msgspec.json.encode({"run": run, "from": call, "seed": seed})
    return Entry(call_key=RERUN_NOTE, kind=Kind.NOTE, value=value)


def is_time_limit(timer: str) -> bool:
    """Whether the timer with this call key is that of a timeout: any other than a sleep's
    (loop/flow_loop.py makes these names).
    """
    return timer.rpartition("/")[2].partition("#")[0] != "sleep"


def retry_note(number: int, attempt: int, attempts: int, error: bytes) -> Entry:
    """The note (RETRY_NOTE) of failed execution `number` of the run: `attempt` of `attempts`. The
    store adds when the next one is due.
    """
    value = msgspec.json.encode({"attempt": attempt, "attempts": attempts})
    note = Entry(call_key=RETRY_NOTE, kind=Kind.NOTE, attempt=number)
    note.value = value
    note.error = error
    return note


class Journal:
    """A run's entries by call key.

    Built from `Store.load` when a run is resumed, or empty; grows with its commits.

    `last_batch` is the last commit known here. `last_own_batch` is the last one with the end of a
    call that is no child run: a run that was suspended has received it. `first_at` is the time of
    the first end, `generation` the number of restarts. `running_time_note` and `retry_note` are the
    last notes of these names. `unclaimed`: recorded calls that the flow has not made since it was
    resumed.
    """

    __slots__ = (
        "_is_empty",
        "_scopes",
        "children",
        "count",
        "failures",
        "finals",
        "first_at",
        "generation",
        "last_batch",
        "last_own_batch",
        "retry_note",
        "running_time_note",
        "seed",
        "started_at",
        "unclaimed",
    )  # fmt: skip

    def __init__(self, entries: Iterable[Entry] = (), *, started_at: int | None = None) -> None:
        self.finals: dict[str, Entry] = {}
        self.failures: dict[str, list[Entry]] = {}
        self.children: dict[str, Entry] = {}
        self.started_at = started_at
        self.last_batch = 0
        self.last_own_batch = 0
        self.first_at = 0
        self.count = 0
        self.generation = 0
        self.running_time_note: Entry | None = None
        self.retry_note: Entry | None = None
        self.seed: str | None = None
        for entry in entries:
            self.add(entry)
        self.unclaimed = set(self.finals)
        self._is_empty = not self.count
        self._scopes: set[str] | None = None

    def has_scope(self, path: str) -> bool | None:
        """Whether a call was recorded in the scope of this path (loop/scopes.py), which is without
        its last slash. None: this was empty when it was made.
        """
        if self._is_empty:
            return None
        if self._scopes is None:
            self._scopes = {
                call_key[:end]
                for call_key in (*self.finals, *self.failures, *self.children)
                for end, letter in enumerate(call_key)
                if letter == "/"
            }
        return path in self._scopes

    def add(self, entry: Entry) -> None:
        """Adds one committed entry."""
        self.count += 1
        if entry.batch > self.last_batch:
            self.last_batch = entry.batch
        kind = entry.kind
        if kind is Kind.VALUE or kind.is_final:
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
        if entry.call_key == STARTED_NOTE:
            self.started_at = entry.due_at
        elif entry.call_key == RUNNING_TIME_NOTE:
            self.running_time_note = entry
        elif entry.call_key == RESTARTED_NOTE:
            self.generation = entry.attempt
        elif entry.call_key == RETRY_NOTE:
            self.retry_note = entry
        elif entry.call_key == RERUN_NOTE:
            self.seed = msgspec.json.decode(entry.value or b"{}")["seed"]

    @property
    def running_time(self) -> int:
        """Microseconds in memory before the last suspension, for `timeout_counts="running"`."""
        return 0 if self.running_time_note is None else self.running_time_note.due_at or 0

    @property
    def spent_retries(self) -> int:
        """Failed attempts of the flow since the start, or since the last retry by hand."""
        note = self.retry_note
        return (
            0 if note is None or note.value is None else msgspec.json.decode(note.value)["attempt"]
        )

    @property
    def repeated_at(self) -> int:
        """When the current execution was due, if it is a retry (microseconds); otherwise 0."""
        note = self.retry_note
        return 0 if note is None else note.due_at or note.at

    def attempts(self, call_key: str) -> tuple[int, int, int | None]:
        """`(last attempt, attempts since the last manual retry, due_at of the next)` of a call
        without an end.
        """
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
