"""A run: one durable execution of a flow, its states, its outcomes, and the ids everything in the ledger is known by.

                      ┌──────────── retry (keeps values, drops errors) ───────────────┐
                      ▼                                                               │
    record ──► PENDING ──claim──► RUNNING ──Completed──► COMPLETED                    │
                 ▲ ▲                │ ├──Failed──────► FAILED ────────────────────────┤
                 │ │                │ ├──Cancelled───► CANCELLED ─────────────────────┤
                 │ └─due / woken────┤ └──third death─► DEAD ──────────────────────────┤
                 │     WAITING ◄──Suspended(until)                                    │
                 │                  └──Held(reason)──► HELD ──────────────────────────┘
                 ├── interrupted (drain, crash: the next start's epoch reclaims it), Restarted (journal dropped)
                 └── resume, retry ── PAUSED ◄── record, while the event's trigger is paused

`cancel` moves PENDING, WAITING, PAUSED and HELD to CANCELLED at once. A RUNNING run is notified and ends in the outcome that it
reaches. Each arrow is one store method. Leaving RUNNING needs the token of the claim: a stale token writes nothing.
"""

import threading
from collections.abc import Sequence
from enum import IntEnum
from typing import TypeAlias

import msgspec

from eventflow.events.event import ALPHABET
from eventflow.events.event import format_id as format_id  # noqa: PLC0414  (its readers know it from here)
from eventflow.runs.journal import Entry

MAX_CRASHES = 3
"""Journaled attempt starts that nothing followed, before a run is quarantined."""


class State(IntEnum):
    """The state of a run. The first five are live: the run has not ended.

    The numbers are stored, and the partial indexes of live runs are `state < 4`; PAUSED was added last, so it is negative.
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
    def live(self) -> bool:
        return self < State.COMPLETED


class Run(msgspec.Struct, kw_only=True):
    """One row of `runs`, as the worker holds it. Instants are microseconds.

    `params` is a JSON object of bound arguments, or None: bind from the event, whose CloudEvents JSON is `body`.
    `token` fences: it grows with every claim. `suspect`: a crash left it in flight; `deaths` counts journaled attempt
    starts of it after which nothing was recorded. `parent` and `parent_claim` name the run and journal claim a child answers.
    `mode` is the delivery mode that gathered its events, None for one event, one run; it has `deliveries` of them, and while it
    runs their `bodies` in the order recorded.
    """

    id: int
    flow: str
    created_at: int
    due_at: int
    event: int | None = None
    subscription: str = ""
    state: State = State.PENDING
    started_at: int | None = None
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
    mode: str | None = None
    deliveries: int = 1
    payloads: Sequence[bytes] = ()


class Completed(msgspec.Struct, frozen=True):
    """The flow returned; `value` is its encoded result under `codec`."""

    value: bytes
    codec: str = "json"
    unclaimed_entries: int = 0


class Failed(msgspec.Struct, frozen=True):
    """The flow raised; `error` is JSON: type, message, args, traceback."""

    error: bytes


class Suspended(msgspec.Struct, frozen=True):
    """Every branch waits durably: out of memory until `until` (None: until something wakes it).

    `seen_batch` is the last batch the run knows of: if the journal holds a later one, the run is due at once.
    """

    until: int | None
    seen_batch: int
    entries: int = 0
    """How many journal entries the run knows of. An answer may commit before one of its own and be told to nobody."""


class Cancelled(msgspec.Struct, frozen=True):
    reason: str


class NeedsAttention(msgspec.Struct, frozen=True):
    """A person must look; `reason` says at what."""

    reason: str


class Interrupted(msgspec.Struct, frozen=True):
    """No outcome: the run goes back to PENDING as it was (drain)."""


class Restarted(msgspec.Struct, frozen=True):
    """`restart_with`: the run begins afresh under its id, PENDING and due now, with these parameters.

    Its journal is replaced by the one entry `first`; its old children keep no claim on it; it counts as never started.
    """

    params: bytes
    first: Entry


Outcome: TypeAlias = Completed | Failed | Suspended | Cancelled | NeedsAttention | Interrupted | Restarted


class Ids:
    """63-bit ids that only grow: milliseconds << 20 | counter, from any thread.

    `floor` is the largest id that may already be in use (read from the store at open), so that a clock set back repeats none.
    """

    def __init__(self, floor: int = 0) -> None:
        self._last = floor
        self._lock = threading.Lock()

    def next(self, now_us: int) -> int:
        floor = now_us // 1000 << 20
        with self._lock:
            last = self._last + 1
            if last < floor:
                last = floor
            self._last = last
        return last

    def raise_floor(self, floor: int) -> None:
        with self._lock:
            self._last = max(self._last, floor)


_VALUE = {letter: value for value, letter in enumerate(ALPHABET)}


def parse_id(text: str) -> int | None:
    """The id that `show_id` wrote; None when `text` is not 13 of its letters."""
    if len(text) != 13:
        return None
    number = 0
    for letter in text.lower():
        value = _VALUE.get(letter)
        if value is None:
            return None
        number = number << 5 | value
    return number if number < 1 << 63 else None
