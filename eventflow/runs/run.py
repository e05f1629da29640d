"""A run, one durable execution of a flow: its states, its outcomes, and the ids of the ledger.

    (recorded)                ─► PENDING, or PAUSED while the trigger of its event is paused
    PENDING  claim            ─► RUNNING
    RUNNING  Completed        ─► COMPLETED
             Failed           ─► FAILED
             Cancelled        ─► CANCELLED
             third crash      ─► DEAD
             NeedsAttention   ─► HELD
             Suspended(until) ─► WAITING
             Retried (raised, and `@flow(retries=)` has retries left) ─► WAITING, or PENDING
             Interrupted (drain), Restarted, a crash (at the next start) ─► PENDING
    WAITING  due, woken       ─► PENDING
    PAUSED   resume, retry    ─► PENDING
    FAILED, CANCELLED, DEAD, HELD  retry (keeps values, drops errors) ─► PENDING

`cancel` moves a run that has not begun, or is PAUSED or HELD, to CANCELLED at once. A RUNNING run
is notified; a begun run that is WAITING or PENDING becomes PENDING, due now, with the cancel in its
journal. Both end in the outcome that they reach. Each arrow is one method of the store
(store/protocol.py). Leaving RUNNING needs the token of the claim: a stale token writes nothing.
"""

import threading
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, TypeAlias

import msgspec

from eventflow.events.event import ALPHABET
from eventflow.events.event import format_id as format_id  # noqa: PLC0414  (re-exported)
from eventflow.runs.journal import Entry

MAX_CRASHES = 3
"""Attempt starts in the journal that no entry followed, before a run becomes DEAD."""


class State(IntEnum):
    """The state of a run. The first five are live: the run has not ended.

    The numbers are stored. The partial indexes of live runs say `state < 4`, so PAUSED, which was
    added last, is negative.
    """

    PENDING = 0
    RUNNING = 1
    WAITING = 2
    PAUSED = -1  # its trigger is paused; resuming the trigger makes it PENDING
    HELD = 3  # a person must look; the reason is in the run's row
    COMPLETED = 4
    FAILED = 5
    CANCELLED = 6
    DEAD = 7

    @property
    def label(self) -> str:
        return self.name.lower()

    @property
    def is_live(self) -> bool:
        return self < State.COMPLETED


class Run(msgspec.Struct, kw_only=True):
    """One row of `runs`, as the worker holds it. Instants are microseconds.

    `params` is a JSON object of bound arguments, or None: bind from the event, whose CloudEvents
    JSON is `payload`. `token` grows with every claim and fences writes of earlier claims.
    `crash_suspect`: a crash left the run in flight; `crash_count` counts its attempt starts in the
    journal after which nothing was recorded. `parent` and `parent_call_key` name the run and the
    call that a child run answers. `mode` is the delivery mode that batched its events, None for one
    event per run; the run has `deliveries` events, and while it runs their `payloads` in the order
    recorded. `begins`: this claim is the first since the run was recorded, restarted or retried, so
    no earlier execution has begun to wait. `given` is never stored: the arguments as the router
    bound them, equal to those of the recorded event, for the run's first start in this process;
    None: bind them.
    """

    id: int
    flow: str
    created_at: int
    due_at: int
    event: int | None = None
    subscription: str = ""
    state: State = State.PENDING
    started_at: int | None = None
    begins: bool = False
    token: int = 0
    ordering_key: str | None = None
    priority: int = 0
    parent: int | None = None
    parent_call_key: str | None = None
    depth: int = 0
    params: bytes | None = None
    payload: bytes | None = None
    crash_suspect: bool = False
    crash_count: int = 0
    cancel_requested: bool = False
    cancel_reason: str | None = None
    mode: str | None = None
    deliveries: int = 1
    payloads: Sequence[bytes] = ()
    given: dict[str, Any] | None = None


class Completed(msgspec.Struct, frozen=True):
    """The flow returned; `value` is its encoded result under `codec`."""

    value: bytes
    codec: str = "json"
    unclaimed_entries: int = 0


class Failed(msgspec.Struct, frozen=True):
    """The flow raised; `error` is JSON: type, message, args, traceback."""

    error: bytes


class Suspended(msgspec.Struct, frozen=True):
    """Every branch waits durably: out of memory until `until` (None: until an answer wakes it).

    `seen_batch` is the last batch and `entries` the number of journal entries that the run knows
    of. With a later batch or more entries in the journal the run is due at once: the answer of a
    child may commit before an entry of the run itself without being delivered to it.
    """

    until: int | None
    seen_batch: int
    entries: int = 0


class Cancelled(msgspec.Struct, frozen=True):
    reason: str


class NeedsAttention(msgspec.Struct, frozen=True):
    """The run becomes HELD: a person must look; `reason` says at what."""

    reason: str


class Interrupted(msgspec.Struct, frozen=True):
    """The claim ended and not the run: it becomes PENDING again, with its journal (drain)."""


class Restarted(msgspec.Struct, frozen=True):
    """`restart_with`: the run starts again under its id, PENDING and due now, with these
    parameters.

    Its journal is replaced by the one entry `first`; its children answer no call any more; its
    start time is cleared.
    """

    params: bytes
    first: Entry


class Retried(msgspec.Struct, frozen=True):
    """The flow raised, and its `retries` allow another attempt: the run waits for `delay`
    (microseconds), with its recorded values and without its errors.

    `note` is the entry of the failed attempt (journal.RETRY_NOTE); `reason` is the text that people
    see while the run waits.
    """

    note: Entry
    reason: str
    delay: int


Outcome: TypeAlias = (
    Completed | Failed | Retried | Suspended | Cancelled | NeedsAttention | Interrupted | Restarted
)


COUNTER_MASK = (1 << 20) - 1
ID_STEP = 0x9E377
"""The golden ratio of 2^20: odd, so that 2^20 steps repeat no counter, and the values of any few
steps lie far apart.
"""


class Ids:
    """63-bit ids that only grow: milliseconds << 20 | counter. Thread-safe.

    In each new millisecond the counter advances by `ID_STEP`, so that the last four letters of
    neighbours differ. `floor` is the largest id that may be in use (read from the store at open),
    so that no id repeats when the clock is set back.
    """

    def __init__(self, floor: int = 0) -> None:
        self._last = floor
        self._lock = threading.Lock()

    def next(self, now_us: int, count: int = 1) -> int:
        """A new id; with `count` the first of so many in a row."""
        floor = now_us // 1000 << 20
        with self._lock:
            first = self._last + 1
            if first < floor:
                first = floor | (first + ID_STEP) & COUNTER_MASK
            self._last = first + count - 1
        return first

    def raise_floor(self, floor: int) -> None:
        with self._lock:
            self._last = max(self._last, floor)


_VALUE = {letter: value for value, letter in enumerate(ALPHABET)}


def parse_id(text: str) -> int | None:
    """The id that `format_id` wrote; None when `text` is not 13 of its letters."""
    if len(text) != 13:
        return None
    number = 0
    for letter in text.lower():
        value = _VALUE.get(letter)
        if value is None:
            return None
        number = number << 5 | value
    return number if number < 1 << 63 else None
