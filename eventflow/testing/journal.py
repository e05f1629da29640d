"""The records of a run, for assertions: the calls in its journal and the events that it emitted."""

import re
from datetime import datetime
from typing import Any

import msgspec
import orjson

from eventflow.app import App, RunHandle
from eventflow.core.clock import to_datetime
from eventflow.events.event import Event
from eventflow.routing.subscriptions import EMITTED
from eventflow.runs.journal import Entry, Kind
from eventflow.runs.run import format_id


class JournalCall(msgspec.Struct, frozen=True):
    """One call of a run, from the entries of its journal.

    `name`: the task or flow called, `sleep`, `timer` or `emit:TYPE`; `call_key`: its key in
    the journal. `state`: `completed`, `failed`, `retrying`, `started` (a child run), `fired` (a
    timer), `published` (an event), `signalled` (a cancel). `attempts`: of a task. `value`: the
    recorded JSON, or bytes of another codec. `error`: the message of the last error.
    """

    call_key: str
    name: str
    state: str
    attempts: int = 0
    value: Any = None
    error: str | None = None
    next_at: datetime | None = None


async def journal_of(app: App, run: RunHandle[Any] | str | int) -> list[JournalCall]:
    """The calls of a run, in the order of their first entries.

    calls = await journal_of(app, handle)
    assert [(call.name, call.attempts) for call in calls] == [("fetch", 3), ("store", 1)]
    """
    calls: dict[str, JournalCall] = {}
    for entry in await app.store.load(await _run_number(app, run)):
        if entry.kind is not Kind.NOTE:
            known = calls.get(entry.call_key) or JournalCall(
                entry.call_key, _task_name(entry.call_key), "new"
            )
            calls[entry.call_key] = msgspec.structs.replace(known, **_changes(app, entry, known))
    return list(calls.values())


async def events_of(app: App, run: RunHandle[Any] | str | int) -> list[Event]:
    """The events that a run emitted, from its flow or its tasks, in order.

    (event,) = await events_of(app, handle)
    assert event.type == "order.scored" and event.data == {"score": 0.5}
    """
    cause = format_id(await _run_number(app, run))
    found: list[Event] = []
    for row in reversed(await app.store.events(trigger=EMITTED, limit=10_000)):
        body = (await app.store.event(row["id"]))["body"]
        if (
            body is not None
            and (event := Event.from_json(body)).extensions.get("eventflowcause") == cause
        ):
            found.append(event)
    return found


async def _run_number(app: App, run: RunHandle[Any] | str | int) -> int:
    return run.number if isinstance(run, RunHandle) else (await app.store.run(run))["id"]


_NAME = re.compile(r"([^/\[#]+)(?:#\d+|\[.*\])$")


def _task_name(call_key: str) -> str:
    found = _NAME.search(call_key)
    return found[1] if found else call_key


_STATES = {
    Kind.VALUE: "completed",
    Kind.ERROR: "failed",
    Kind.FAILED: "retrying",
    Kind.CLEARED: "retrying",
    Kind.TIMER: "fired",
    Kind.EMIT: "published",
    Kind.CHILD: "started",
    Kind.CANCEL: "signalled",
}


def _changes(app: App, entry: Entry, known: JournalCall) -> dict[str, Any]:
    """The fields of a call that one of its entries changes."""
    changes: dict[str, Any] = {
        "state": _STATES[entry.kind],
        "attempts": max(known.attempts, entry.attempt),
        "next_at": None,
    }
    if entry.kind is Kind.CHILD or known.state == "started":
        changes["attempts"] = 1  # the entry has the number of the child's claims
    if entry.due_at is not None and entry.kind is Kind.FAILED:
        changes["next_at"] = to_datetime(entry.due_at)
    if entry.error is not None:
        changes["error"] = orjson.loads(entry.error).get("message")
    if entry.kind is Kind.VALUE:
        codec, data = app.runtime.blobs.fetch(entry.codec or "json", entry.value or b"null")
        changes["value"] = orjson.loads(data) if codec == "json" else data
    return changes
