"""What must hold of a store after any number of kills, whoever did the killing.

`loop.py` and `syscalls.py` call `check` once everything has come to rest and no server runs. It
opens the store as a server would, asks its own `check` (the sum of P9, the lanes, every checksum,
SQLite's pages), and holds the rows against what senders were told and what bodies did.
"""

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from eventflow.core.clock import SystemClock
from eventflow.runs.journal import Kind
from eventflow.runs.run import State, format_id
from eventflow.store.sqlite import SqliteStore
from tests.crash.app import expected


class SenderLog(NamedTuple):
    """What senders know: the number each id they sent carried, and the ledger id of each that was
    acknowledged.
    """

    sent: Mapping[str, int]
    acked: Mapping[str, str]


class CheckCounts(NamedTuple):
    """How much there was to get wrong."""

    events: int
    runs: int
    entries: int
    bodies: int
    repeated: int
    """Bodies that ran once more because a kill came before their value was recorded."""


def check(folder: Path, sender_log: SenderLog) -> tuple[list[str], CheckCounts]:
    """What does not hold, one sentence each."""
    path = folder / "store.db"
    store = SqliteStore(path, clock=SystemClock(), ballast=0, free_floor=0)
    store.open()
    try:
        wrong = asyncio.run(store.check())
        counts = asyncio.run(store.counts())
        rows = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        wrong += [
            *_sum(counts),
            *_events(rows, sender_log),
            *_handled(rows, sender_log),
            *_children(rows),
            *_emitted(rows),
        ]
        bodies = list(_bodies(folder / "effects"))
        wrong += _never_again(rows, bodies)
        entries = rows.execute("SELECT count(*) FROM journal").fetchone()[0]
        rows.close()
    finally:
        store.close()
    repeated = len(bodies) - len({(key, attempt) for key, attempt, _, _ in bodies})
    return wrong, CheckCounts(counts["events"], counts["runs"], entries, len(bodies), repeated)


def _sum(counts: Mapping[str, int]) -> Iterator[str]:
    """P9, with everything at rest: nothing pending, nothing quarantined, nothing failed."""
    parts = {
        name: counts[name]
        for name in ("completed", "failed", "dead", "cancelled", "suppressed", "pending")
    }
    if counts["accepted"] != sum(parts.values()) or counts["accepted"] != counts["completed"]:
        yield f"accepted {counts['accepted']}, expected all of them completed, found {parts}"


def _events(rows: sqlite3.Connection, sender_log: SenderLog) -> Iterator[str]:
    """No acknowledged event is lost, none is there twice, none was made up."""
    found = {
        ident: (n, format_id(first))
        for ident, n, first in rows.execute(
            "SELECT event_id, count(*), min(id) FROM events WHERE trigger = 'orders' "
            "GROUP BY event_id"
        )
    }
    for ident, ledger_id in sender_log.acked.items():
        if ident not in found:
            yield f"event {ident} was acknowledged as {ledger_id} and is lost"
        elif found[ident][1] != ledger_id:
            known = found[ident][1]
            yield f"event {ident} was acknowledged as {ledger_id}, the ledger has it as {known}"
    yield from (
        f"event {ident} is {n} times in the ledger" for ident, (n, _) in found.items() if n != 1
    )
    yield from (f"event {ident} was never sent" for ident in found.keys() - sender_log.sent.keys())


def _handled(rows: sqlite3.Connection, sender_log: SenderLog) -> Iterator[str]:
    """One run of `handle` per event, completed, with the right result."""
    runs: Counter[str] = Counter()
    asked = (
        "SELECT e.event_id, r.id, r.state, r.result, r.reason, r.crash_count FROM events e "
        "LEFT JOIN runs r ON r.event = e.id"
    )
    for ident, run, state, result, reason, crash_count in rows.execute(
        f"{asked} WHERE e.trigger = 'orders'"
    ):
        runs[ident] += run is not None
        if run is not None and (
            state != State.COMPLETED or json.loads(result) != expected(sender_log.sent[ident])
        ):
            what = f"{State(state).label} ({reason}, {crash_count} crashes) with {result}"
            yield f"run {format_id(run)} of event {ident}: {what}"
    yield from (f"event {ident} has {n} runs, expected one" for ident, n in runs.items() if n != 1)


def _children(rows: sqlite3.Connection) -> Iterator[str]:
    asked = (
        "SELECT p.id, count(c.id), total(c.state = 4) FROM runs p LEFT JOIN runs c ON "
        "c.parent = p.id WHERE p.flow = 'handle'"
    )
    for parent, n, completed in rows.execute(f"{asked} GROUP BY p.id"):
        if (n, completed) != (1, 1):
            found = f"{n} children, {completed:.0f} of them completed"
            yield f"run {format_id(parent)} has {found}, expected one"


def _emitted(rows: sqlite3.Connection) -> Iterator[str]:
    """Each `handle` published one event, which started one `account`, which completed."""
    handled = rows.execute("SELECT count(*) FROM runs WHERE flow = 'handle'").fetchone()[0]
    asked = (
        "SELECT e.event_id, count(r.id), total(r.state = 4) FROM events e LEFT JOIN runs r ON "
        "r.event = e.id"
    )
    published = list(rows.execute(f"{asked} WHERE e.type = 'order.handled' GROUP BY e.event_id"))
    if len(published) != handled:
        yield f"{handled} runs of handle published {len(published)} events, expected one each"
    for ident, n, completed in published:
        if (n, completed) != (1, 1):
            found = f"{n} runs, {completed:.0f} of them completed"
            yield f"emitted event {ident} has {found}, expected one"


def _bodies(effects: Path) -> Iterator[tuple[str, int, int, int]]:
    if effects.exists():
        for line in effects.read_text().splitlines():
            key, attempt, boot, at = line.split()
            yield key, int(attempt), int(boot), int(at)


def _never_again(
    rows: sqlite3.Connection, bodies: list[tuple[str, int, int, int]]
) -> Iterator[str]:
    """P4: once its value is recorded, a call's body never starts again; nor does an attempt whose
    failure is recorded.
    """
    values: dict[str, int] = {}
    failures: dict[tuple[str, int], int] = {}
    kinds = f"({int(Kind.VALUE)}, {int(Kind.FAILED)})"
    for run, claim, attempt, kind, at in rows.execute(
        f"SELECT run, call_key, attempt, kind, at FROM journal WHERE kind IN {kinds}"
    ):
        key = f"{format_id(run)}/{claim}"
        if kind == Kind.VALUE:
            values[key] = at
        else:
            failures[key, attempt] = at
    for key, attempt, boot, at in bodies:
        recorded = min(values.get(key, at), failures.get((key, attempt), at))
        if at > recorded:
            when = f"in boot {boot}, {at - recorded} us after it was recorded"
            yield f"the body of {key}, attempt {attempt}, ran {when}"
    ran = {key for key, _, _, _ in bodies}
    tasks = (key for key in values if not key.rpartition("/")[2].startswith("double"))
    yield from (f"{key} has a value, but its body never ran" for key in tasks if key not in ran)
