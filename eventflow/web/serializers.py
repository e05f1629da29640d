"""Rows of the ledger as the API shows them: ids in base 32, instants as ISO 8601 in UTC, bodies as JSON.

api.py calls these pure functions; the command line prints what they return. Texts of errors are redacted here, for they may
quote what a task was given.
"""

import base64
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from typing import Any, cast

import msgspec
import orjson

from eventflow.events.event import Gauged, Trigger, totals
from eventflow.logs.log import timestamp
from eventflow.logs.redaction import SECRETS
from eventflow.runs.journal import Entry, Kind
from eventflow.runs.run import show_id

SHOWN_RESULT = 64 * 1024
"""Bytes of a result that are shown; of a larger one only size and digest."""


def instant(us: int | None) -> str | None:
    return None if us is None else timestamp(us)


def ident(number: int | None) -> str | None:
    return None if number is None else show_id(number)


# --------------------------------------------------------------------------- events


def event(row: Mapping[str, Any]) -> dict[str, Any]:
    """One event of a list."""
    return {
        "id": show_id(row["id"]),
        "event_id": row["event_id"],
        "trigger": row["trigger"],
        "source": row["source"],
        "type": row["type"],
        "subject": row["subject"],
        "received_at": instant(row["received_at"]),
        "runs_started": row["matched"],
        "duplicates": row["duplicates"],
        "last_duplicate_at": instant(row["last_duplicate_at"]),
        "conflicts": row["conflicts"],
        "kept": row["kept"],
    }


def event_whole(row: Mapping[str, Any]) -> dict[str, Any]:
    """One event asked for: with its verdicts, runs, dead letters, unsent letters and body."""
    runs = {each["id"]: each for each in row["runs"]}
    return {
        **event(row),
        "verdicts": [verdict(said, runs) for said in row["verdicts"]],
        "outbox": [{**letter, "at": instant(letter["at"])} for letter in row["outbox"]],
        "runs": [run(each) for each in row["runs"]],
        "dead": [dead(each) for each in row["dead"]],
        "event": body(row["body"]),
    }


def verdict(said: Iterable[Any], runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """What became of one delivery. `fate`: run, joined, held (with a run and its state), filtered, waits, lapsed,
    matched, invalid, dead, outbox."""
    subscription, fate, detail = said
    shown: dict[str, Any] = {"subscription": subscription, "fate": fate}
    if fate not in ("run", "held", "joined"):
        return {**shown, "reason": detail}
    known = runs.get(detail)
    return {**shown, "run": show_id(detail), "state": known["state"] if known else "pruned"}


def new_verdict(said: Iterable[Any]) -> dict[str, Any]:
    """What a replay or redrive brought about."""
    subscription, fate, detail = said
    shown = verdict((subscription, fate, detail), {})
    if "run" in shown:
        shown["state"] = "held" if fate == "held" else "pending"
    return shown


def foreseen_verdict(said: Iterable[Any]) -> dict[str, Any]:
    """What it would bring about, with the `window` that the event would be in. A run that does not exist has no id."""
    subscription, fate, detail, *window = said
    shown = verdict((subscription, fate, detail), {})
    foreseen = {name: value for name, value in shown.items() if name not in ("run", "state")}
    return {**foreseen, "window": window[0]} if window else foreseen


def body(data: bytes | None) -> Any:
    """Stored bytes as JSON where they are JSON, else as text, else in base 64."""
    if data is None:
        return None
    try:
        return orjson.loads(data)
    except ValueError:
        pass
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


# --------------------------------------------------------------------------- runs


def run(row: Mapping[str, Any], held_back: str = "") -> dict[str, Any]:
    """One run of a list. `held_back`: why the worker begins none, which is why this one is pending."""
    return {
        "id": show_id(row["id"]),
        "flow": row["flow"],
        "state": row["state"],
        "event": ident(row["event"]),
        "subscription": row["subscription"] or None,
        "created_at": instant(row["created_at"]),
        "due_at": instant(row["due_at"]),
        "started_at": instant(row["started_at"]),
        "finished_at": instant(row["finished_at"]),
        "attempts": row["token"],
        "lane": row["lane"],
        "mode": row["mode"],
        "events": row["deliveries"],
        "parent": ident(row["parent"]),
        "reason": row["reason"] or (held_back if held_back and row["state"] == "pending" else None),
        "cancel_requested": row["cancel_requested"],
        "error": error(row.get("error"), traceback=False),
    }


def run_whole(
    row: Mapping[str, Any],
    journal: Iterable[Entry],
    fetch: Callable[[str, bytes], tuple[str, bytes]],
) -> dict[str, Any]:
    """One run asked for: with its parameters, tasks, result and error. `fetch` reads a result that is kept in a file."""
    return {
        **run(row),
        "error": error(row["error"]),
        "joined": [show_id(event) for event in row["joined"]],
        "params": body(row["params"]),
        "priority": row["priority"],
        "suspect": row["suspect"],
        "deaths": row["deaths"],
        "orphans": row["orphans"],
        **_result(row, fetch),
        "tasks": tasks(journal),
    }


def _result(
    row: Mapping[str, Any], fetch: Callable[[str, bytes], tuple[str, bytes]]
) -> dict[str, Any]:
    if row["result"] is None:
        return {"result": None, "result_digest": None}
    codec, data = fetch(row["codec"] or "json", row["result"])
    shown = body(data) if codec != "pickle" and len(data) <= SHOWN_RESULT else None
    return {
        "result": shown,
        "result_digest": digest(data),
        "result_size": len(data),
        "result_codec": codec,
    }


def digest(data: bytes | None) -> str | None:
    return None if data is None else sha256(data).hexdigest()[:16]


def error(data: bytes | str | None, *, traceback: bool = True) -> dict[str, Any] | None:
    """`{"type", "message", "traceback"}`."""
    if data is None:
        return None
    said = cast(dict[str, Any], orjson.loads(data))
    names = ("type", "message", "traceback") if traceback else ("type", "message")
    return {name: SECRETS.text(str(said[name])) for name in names if said.get(name)}


# --------------------------------------------------------------------------- a run's journal

_KINDS = {Kind.TIMER: "timer", Kind.EMIT: "emit", Kind.CANCEL: "cancel", Kind.CHILD: "flow"}


def tasks(journal: Iterable[Entry]) -> list[dict[str, Any]]:
    """The calls of a run in the order they were first recorded, each with what became of it."""
    calls: dict[str, dict[str, Any]] = {}
    for entry in journal:
        if entry.kind is Kind.NOTE:
            continue
        call = calls.setdefault(entry.claim, _call(entry))
        _tell(call, entry)
    return list(calls.values())


def _call(entry: Entry) -> dict[str, Any]:
    return {
        "claim": entry.claim,
        "name": entry.claim.rpartition("/")[2].partition("#")[0],
        "kind": _KINDS.get(entry.kind, "task"),
        "state": "started",
        "attempts": 0,
        "first_at": instant(entry.at),
        "at": instant(entry.at),
        "next_at": None,
        "result_digest": None,
        "errors": [],
    }


def _tell(call: dict[str, Any], entry: Entry) -> None:
    """What one entry adds to its call."""
    call["attempts"] = max(call["attempts"], entry.attempt)
    call["at"], call["next_at"] = instant(entry.at), None
    match entry.kind:
        case Kind.VALUE:
            call["state"], call["result_digest"] = "completed", digest(entry.value)
        case Kind.ERROR | Kind.FAILED | Kind.FORGIVEN:
            call["state"] = "failed" if entry.kind is Kind.ERROR else "retrying"
            call["next_at"] = instant(entry.due_at) if entry.kind is Kind.FAILED else None
            said = error(entry.error, traceback=False) or {}
            call["errors"].append({"attempt": entry.attempt, "at": instant(entry.at), **said})
        case Kind.CHILD:
            call["child"] = (
                show_id(int(entry.value)) if entry.value and entry.value.isdigit() else None
            )
        case Kind.TIMER:
            call["state"] = "fired"
        case Kind.EMIT:
            call["state"] = "published"
        case _:
            call["state"] = "told"


# --------------------------------------------------------------------------- the rest


def dead(row: Mapping[str, Any]) -> dict[str, Any]:
    """A dead letter, with what the query gave of its event."""
    shown = {name: value for name, value in row.items() if name not in ("body", "headers")}
    shown["reason"] = SECRETS.text(row["reason"])
    for name in ("at", "redriven_at"):
        shown[name] = instant(row[name])
    if "event" in row:
        shown["event"] = show_id(row["event"])
    return shown


def health(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A trigger and how it fares."""
    return {**facts, "name": name, "last_event_at": instant(facts["last_event_at"])}


def source(trigger: Trigger) -> dict[str, Any]:
    """What a trigger tells about itself: the paths it serves, whom it verifies, how its source fares."""
    told = trigger if isinstance(trigger, Gauged) else None
    gauges = told.gauges() if told else ()
    return {
        "paths": [route.path for route in getattr(trigger, "routes", ())],
        "verified": getattr(trigger, "verified", None),
        "condition": told.condition if told else None,
        "gauges": [{"name": each.name, "value": each.value, **each.labels} for each in gauges],
        "totals": totals(gauges),
    }


def outlets(
    fared: Mapping[str, msgspec.Struct], depths: Mapping[str, tuple[int, int]]
) -> list[dict[str, Any]]:
    """Each outlet with how it fares and what waits for it; also outlets that the app no longer has, while letters wait."""
    rows: list[dict[str, Any]] = []
    for name in sorted(fared.keys() | depths.keys()):
        waiting, oldest = depths.get(name, (0, None))
        known = (
            msgspec.structs.asdict(fared[name])
            if name in fared
            else {"name": name, "state": "unknown to this app"}
        )
        rows.append({**known, "waiting": waiting, "oldest_at": instant(oldest)})
    return rows


def line(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A line that a run logged."""
    return {**stored, "at": instant(stored["at"])}
