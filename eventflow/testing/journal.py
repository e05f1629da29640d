"""What a run left in the ledger, in a form to assert on: the calls of its journal, the events it
emitted.
"""

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
    """One call of a run, as its journal tells of it.

    `name`: the task or flow called, `sleep`, `timer` or `emit:TYPE`; `claim`: its place in the
    journal. `state`: `completed`, `failed`, `retrying`, `started` (a child run under way), `fired`
    (a timer), `published` (an event), `told` (a cancel). `attempts` counts tries of a task. `value`
    is the JSON recorded (bytes where another codec wrote them), `error` the last error's message.
    """

    call_key: str
    name: str
    state: str
    attempts: int = 0
    value: Any = None
    error: str | None = None
    next_at: datetime | None = None


async def journal_of(app: App, run: RunHandle | str | int) -> list[JournalCall]:
    """What a run did, call by call, in the order first recorded.

    steps = await journal_of(app, handle) assert [(step.name, step.attempts) for step in steps] ==
    [("fetch", 3), ("sleep", 0), ("store", 1)]
    """
    steps: dict[str, JournalCall] = {}
    for entry in await app.store.load(await _run_number(app, run)):
        if entry.kind is not Kind.NOTE:
            known = steps.get(entry.claim) or JournalCall(
                entry.claim, _task_name(entry.claim), "new"
            )
            steps[entry.claim] = msgspec.structs.replace(known, **_changes(app, entry, known))
    return list(steps.values())


async def events_of(app: App, run: RunHandle | str | int) -> list[Event]:
    """The events that a run emitted, from its flow or its tasks, in order.

    (event,) = await events_of(app, handle)
    assert event.type == "order.scored" and event.data == {"score": 0.5}
    """
    cause, found = format_id(await _run_number(app, run)), list[Event]()
    for row in reversed(await app.store.events(trigger=EMITTED, limit=10_000)):
        body = (await app.store.event(row["id"]))["body"]
        if (
            body is not None
            and (event := Event.from_json(body)).extensions.get("eventflowcause") == cause
        ):
            found.append(event)
    return found


async def _run_number(app: App, run: RunHandle | str | int) -> int:
    return run.number if isinstance(run, RunHandle) else (await app.store.run(run))["id"]


_NAME = re.compile(r"([^/\[#]+)(?:#\d+|\[.*\])$")


def _task_name(claim: str) -> str:
    found = _NAME.search(claim)
    return found[1] if found else claim


_STATES = {
    Kind.VALUE: "completed", Kind.ERROR: "failed", Kind.FAILED: "retrying", Kind.FORGIVEN: "retrying", Kind.TIMER: "fired",
    Kind.EMIT: "published", Kind.CHILD: "started", Kind.CANCEL: "told",
}  # fmt: skip


def _changes(app: App, entry: Entry, known: JournalCall) -> dict[str, Any]:
    """What one entry changes in what is known of its call."""
    told: dict[str, Any] = {
        "state": _STATES[entry.kind],
        "attempts": max(known.attempts, entry.attempt),
        "next_at": None,
    }
    if entry.kind is Kind.CHILD or known.state == "started":
        told["attempts"] = 1  # a child run's answer is numbered by its claims
    if entry.due_at is not None and entry.kind is Kind.FAILED:
        told["next_at"] = to_datetime(entry.due_at)
    if entry.error is not None:
        told["error"] = orjson.loads(entry.error).get("message")
    if entry.kind is Kind.VALUE:
        codec, data = app.blobs.fetch(entry.codec or "json", entry.value or b"null")
        told["value"] = orjson.loads(data) if codec == "json" else data
    return told
