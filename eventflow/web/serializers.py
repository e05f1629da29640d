"""Rows of the ledger as JSON: ids in base 32, instants as ISO 8601 in UTC, bodies as JSON values.

handlers.py calls these pure functions; the command line prints what they return. Error messages are
redacted here, since they may quote a task's arguments.
"""

import base64
import re
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from typing import Any, cast

import msgspec
import orjson

from eventflow.core.clock import in_seconds
from eventflow.engine.run_parts import RunningCall
from eventflow.events.event import HasGauges, Trigger, gauge_totals
from eventflow.logs.log import format_timestamp
from eventflow.logs.redaction import SECRETS
from eventflow.runs.journal import RERUN_NOTE, RETRY_NOTE, Entry, Kind
from eventflow.runs.run import format_id

MAX_RESULT_BYTES = 64 * 1024
"""Of a larger result only size and digest are returned."""
MAX_PREVIEW_CHARS = 200
"""Of the value of a call."""
MAX_LISTED_CHARS = 500
"""Of a message or reason in a list: a page of 1,000 rows stays below 2 MB."""
MAX_MESSAGE_CHARS = 64 * 1024
"""Of the message or the traceback of one run."""


def instant(us: int | None) -> str | None:
    return None if us is None else format_timestamp(us)


def ident(number: int | None) -> str | None:
    return None if number is None else format_id(number)


# --------------------------------------------------------------------------- events


def event(row: Mapping[str, Any]) -> dict[str, Any]:
    """An event in a list."""
    return {
        "id": format_id(row["id"]),
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


def event_details(row: Mapping[str, Any]) -> dict[str, Any]:
    """One event with its verdicts, runs, dead letters, unsent messages and body."""
    runs = {each["id"]: each for each in row["runs"]}
    return {
        **event(row),
        "verdicts": [verdict(each, runs) for each in row["verdicts"]],
        "outbox": [{**message, "at": instant(message["at"])} for message in row["outbox"]],
        "runs": [run(each) for each in row["runs"]],
        "dead": [dead_letter(each) for each in row["dead"]],
        "event": body(row["body"]),
    }


def verdict(stored: Iterable[Any], runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """A verdict on one delivery. `outcome`: run, batched, paused (with a run and its state),
    filtered, waiting, expired, matched, invalid, dead, outbox. For a run that waits for a retry
    of its flow also `reason` and `due_at`.
    """
    subscription, outcome, detail = stored
    shown: dict[str, Any] = {"subscription": subscription, "outcome": outcome}
    if outcome not in ("run", "paused", "batched"):
        return {**shown, "reason": detail}
    known = runs.get(detail)
    shown |= {"run": format_id(detail), "state": known["state"] if known else "pruned"}
    if known and _awaits_retry(known):
        shown |= {
            "reason": _reason(known["reason"], MAX_LISTED_CHARS),
            "due_at": instant(known["due_at"]),
        }
    return shown


def new_verdict(stored: Iterable[Any]) -> dict[str, Any]:
    """A verdict of a replay or redrive that was just recorded."""
    subscription, outcome, detail = stored
    shown = verdict((subscription, outcome, detail), {})
    if "run" in shown:
        shown["state"] = "paused" if outcome == "paused" else "pending"
    return shown


def simulated_verdict(stored: Iterable[Any]) -> dict[str, Any]:
    """A verdict of a dry run, with the `window` that the event would join; the run does not exist,
    so it has no id.
    """
    subscription, outcome, detail, *window = stored
    shown = verdict((subscription, outcome, detail), {})
    simulated = {name: value for name, value in shown.items() if name not in ("run", "state")}
    return {**simulated, "window": window[0]} if window else simulated


def body(data: bytes | None) -> Any:
    """Stored bytes as JSON if they are JSON, else as text, else as `{"base64": …}`."""
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


def run(row: Mapping[str, Any], pause_reason: str = "") -> dict[str, Any]:
    """A run in a list. `pause_reason`: why the worker starts no runs now; the reason of a pending
    run.
    """
    return {
        "id": format_id(row["id"]),
        "flow": row["flow"],
        "state": row["state"],
        "ledger_id": ident(row["event"]),
        "subscription": row["subscription"] or None,
        "created_at": instant(row["created_at"]),
        "due_at": instant(row["due_at"]),
        "started_at": instant(row["started_at"]),
        "finished_at": instant(row["finished_at"]),
        "attempts": row["token"],
        "ordering_key": row["ordering_key"],
        "mode": row["mode"],
        "events": row["deliveries"],
        "parent": ident(row["parent"]),
        "about": about(row),
        "took": _elapsed(row["started_at"], row["finished_at"]),
        "reason": _reason(
            row["reason"] or (pause_reason if pause_reason and row["state"] == "pending" else None),
            MAX_LISTED_CHARS,
        ),
        "cancel_requested": row["cancel_requested"],
        "error": error(row.get("error"), traceback=False, limit=MAX_LISTED_CHARS),
    }


def about(row: Mapping[str, Any]) -> str | None:
    """What tells a run from others of its flow: the subject of its event, else the beginning of its
    parameters, else the sender's id.
    """
    brief = row.get("brief")
    if row.get("subject"):
        return cut(row["subject"], MAX_PREVIEW_CHARS)
    if brief and brief != b"{}":
        return cut(SECRETS.redact_text(brief.decode(errors="replace")), MAX_PREVIEW_CHARS)
    return cut(row.get("event_id"), MAX_PREVIEW_CHARS)


def _elapsed(start: int | None, end: int | None) -> float | None:
    return None if start is None or end is None else in_seconds(max(0, end - start))


def _reason(text: str | None, limit: int) -> str | None:
    """The reason of a run, redacted, because it may quote an error; at most `limit` characters."""
    return cut(_redacted(text), limit)


def cut(text: str | None, limit: int) -> str | None:
    """The beginning of a text, and how much is missing."""
    if text is None or len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text):,} characters)"


def run_details(
    row: Mapping[str, Any],
    journal: Iterable[Entry],
    fetch: Callable[[str, bytes], tuple[str, bytes]],
    *,
    event_body: bytes | None = None,
    running: Iterable[RunningCall] = (),
    now: int = 0,
) -> dict[str, Any]:
    """One run with its parameters, tasks, result and error; `repeats` is the run that it repeats,
    and `repeats_from` the call from which.

    `fetch` reads a result stored outside its row. `event_body` is the CloudEvent that started the
    run, if it is kept. `running`: its attempts under way at `now`, microseconds.
    """
    entries = list(journal)
    return {
        **run(row),
        **_repeated(entries),
        **_retries(row, entries),
        "reason": _reason(row["reason"], MAX_MESSAGE_CHARS),
        "error": error(row["error"]),
        "joined": [format_id(event) for event in row["joined"]],
        "params": body(row["params"]),
        "event_id": row["event_id"],
        "event_type": row["event_type"],
        "event_data": _event_data(event_body),
        "priority": row["priority"],
        "crash_suspect": row["crash_suspect"],
        "crash_count": row["crash_count"],
        "unclaimed_entries": row["unclaimed_entries"],
        **_result(row, fetch),
        "tasks": tasks(entries, running, now),
    }


def _repeated(journal: Iterable[Entry]) -> dict[str, Any]:
    note = next((entry.value for entry in journal if entry.call_key == RERUN_NOTE), None)
    value: dict[str, Any] = orjson.loads(note or b"{}")
    return {"repeats": value.get("run"), "repeats_from": value.get("from")}


def _awaits_retry(row: Mapping[str, Any]) -> bool:
    """Whether the run waits for the next attempt of its flow: only such a wait has a reason."""
    return row["state"] == "waiting" and row["reason"] is not None


def _retries(row: Mapping[str, Any], journal: Iterable[Entry]) -> dict[str, Any]:
    """`failed_attempts`: number, time and error of the attempts of the flow that failed.
    `retry`: the attempt that is next or under way, how many there are, and when it is due; None if
    no attempt has failed since the start or the last retry by hand, and for a run that has ended.
    """
    failed: list[dict[str, Any]] = []
    retry: dict[str, Any] | None = None
    for entry in journal:
        if entry.call_key != RETRY_NOTE:
            continue
        count: dict[str, int] = orjson.loads(entry.value or b"{}")
        attempt = count.get("attempt")
        details = error(entry.error, traceback=False, limit=MAX_LISTED_CHARS) or {}
        if attempt is None:  # retried by hand: all retries are left again
            retry = None
        else:
            due = instant(entry.due_at) if _awaits_retry(row) else None
            retry = {"attempt": attempt + 1, "attempts": count["attempts"], "next_at": due}
        if details:
            number = len(failed) + 1
            failed.append({"number": number, "at": instant(entry.at), **details})
    is_live = row["finished_at"] is None
    return {"retry": retry if is_live else None, "failed_attempts": failed}


def _event_data(event_body: bytes | None) -> Any:
    """The data of a stored event, or None: it is past its retention, long, or not JSON."""
    if event_body is None or len(event_body) > MAX_RESULT_BYTES:
        return None
    event = body(event_body)
    return cast(dict[str, Any], event).get("data") if isinstance(event, dict) else None


def _result(
    row: Mapping[str, Any], fetch: Callable[[str, bytes], tuple[str, bytes]]
) -> dict[str, Any]:
    if row["result"] is None:
        return {"result": None, "result_digest": None}
    codec, data = fetch(row["codec"] or "json", row["result"])
    shown = body(data) if codec != "pickle" and len(data) <= MAX_RESULT_BYTES else None
    return {
        "result": shown,
        "result_digest": digest(data),
        "result_size": len(data),
        "result_codec": codec,
    }


def preview(codec: str | None, value: bytes | None) -> str | None:
    """The beginning of a recorded value as JSON; None where it is no text, or stored apart."""
    if value is None or codec == "pickle" or (codec or "").endswith("@blob"):
        return None
    text = value[: 4 * MAX_PREVIEW_CHARS].decode(errors="replace")
    shown = SECRETS.redact_text(text)
    return shown if len(shown) <= MAX_PREVIEW_CHARS else f"{shown[:MAX_PREVIEW_CHARS]}…"


def digest(data: bytes | None) -> str | None:
    return None if data is None else sha256(data).hexdigest()[:16]


def error(
    data: bytes | str | None, *, traceback: bool = True, limit: int = MAX_MESSAGE_CHARS
) -> dict[str, Any] | None:
    """`{"type", "message", "traceback"}`, each with at most `limit` characters."""
    if data is None:
        return None
    stored = cast(dict[str, Any], orjson.loads(data))
    names = ("type", "message", "traceback") if traceback else ("type", "message")
    return {
        name: cut(SECRETS.redact_text(str(stored[name])), limit)
        for name in names
        if stored.get(name)
    }


# --------------------------------------------------------------------------- a run's journal

_KINDS = {Kind.TIMER: "timer", Kind.EMIT: "emit", Kind.CANCEL: "cancel", Kind.CHILD: "flow"}


def tasks(
    journal: Iterable[Entry], running: Iterable[RunningCall] = (), now: int = 0
) -> list[dict[str, Any]]:
    """The calls of a run with their states, in the order of their first entries; those that are
    `running` at `now` for the first time come last.

    `called_at` is the instant of the call. `waited` is the time until the body of the last attempt
    began, `took` that of its body, in seconds; of a running one until now. They are None in
    journals of an earlier version. `after` is the commit that the flow had received last when it
    made the call.
    """
    calls: dict[str, dict[str, Any]] = {}
    children: dict[str, int] = {}
    for entry in journal:
        if entry.kind is Kind.NOTE:
            continue
        call = calls.setdefault(entry.call_key, _call(entry))
        _apply_entry(call, entry)
        if entry.kind is Kind.CHILD:
            children[entry.call_key] = entry.at
        elif (started := children.get(entry.call_key)) is not None:
            call["took"] = _elapsed(started, entry.at)
    for each in running:
        begun = now - each.waited - (each.took or 0)
        call = calls.setdefault(each.call_key, _new_call(each.call_key, "task", begun))
        call["state"] = "queued" if each.took is None else "running"
        call["attempts"] = each.attempt
        call["at"] = instant(now)
        call["next_at"] = None
        _add_times(call, each, now)
    return list(calls.values())


def _call(entry: Entry) -> dict[str, Any]:
    return _new_call(entry.call_key, _KINDS.get(entry.kind, "task"), entry.at)


def _new_call(call_key: str, kind: str, at: int) -> dict[str, Any]:
    return {
        "call_key": call_key,
        "name": call_name(call_key),
        "kind": kind,
        "state": "started",
        "attempts": 0,
        "called_at": None,
        "after": None,
        "waited": None,
        "took": None,
        "first_at": instant(at),
        "at": instant(at),
        "next_at": None,
        "result": None,
        "result_digest": None,
        "errors": [],
    }


def call_name(call_key: str) -> str:
    """The task, flow or event of a call: `score` of `a/score#0` and `score[7]`, `score.map` of
    `score.map/#0`.
    """
    found = re.search(_CALL_NAME, call_key)
    return found[1] if found else call_key


_CALL_NAME = r"(?:^|/)([^/\[#]+)/?(?:#\d+|\[.*\])$"


def _add_times(call: dict[str, Any], times: Entry | RunningCall, end: int) -> None:
    """The times of an attempt that ended, or was looked at, at `end`."""
    if times.waited is None:
        return
    if call["called_at"] is None:
        call["called_at"] = instant(end - times.waited - (times.took or 0))
        call["after"] = times.after
    call["waited"] = in_seconds(times.waited)
    call["took"] = None if times.took is None else in_seconds(times.took)


def _apply_entry(call: dict[str, Any], entry: Entry) -> None:
    """Updates a call by its next entry."""
    call["attempts"] = max(call["attempts"], entry.attempt)
    call["at"] = instant(entry.at)
    call["next_at"] = None
    _add_times(call, entry, entry.at)
    match entry.kind:
        case Kind.VALUE:
            call["state"] = "completed"
            call["result"] = preview(entry.codec, entry.value)
            call["result_digest"] = digest(entry.value)
        case Kind.ERROR | Kind.FAILED | Kind.CLEARED:
            call["state"] = "failed" if entry.kind is Kind.ERROR else "retrying"
            call["next_at"] = instant(entry.due_at) if entry.kind is Kind.FAILED else None
            details = error(entry.error, traceback=False, limit=MAX_LISTED_CHARS) or {}
            call["errors"].append(
                {
                    "attempt": entry.attempt,
                    "at": instant(entry.at),
                    "waited": call["waited"],
                    "took": call["took"],
                    **details,
                }
            )
        case Kind.CHILD:
            call["called_at"] = instant(entry.at)
            call["child"] = (
                format_id(int(entry.value)) if entry.value and entry.value.isdigit() else None
            )
        case Kind.TIMER:
            call["state"] = "fired"
        case Kind.EMIT:
            call["state"] = "published"
        case _:
            call["state"] = "signalled"


# --------------------------------------------------------------------------- everything else


def dead_letter(row: Mapping[str, Any]) -> dict[str, Any]:
    """A dead letter with the columns of its event that the query returned."""
    shown = {
        "ledger_id" if name == "event" else name: value
        for name, value in row.items()
        if name not in ("body", "headers")
    }
    shown["reason"] = SECRETS.redact_text(row["reason"])
    for name in ("at", "redriven_at"):
        shown[name] = instant(row[name])
    if "ledger_id" in shown:
        shown["ledger_id"] = format_id(shown["ledger_id"])
    return shown


def trigger(source: Trigger, health: msgspec.Struct, *, paused: bool) -> dict[str, Any]:
    """A trigger: its health, the paths it serves, whether it verifies senders, its condition and
    gauges.
    """
    fields = msgspec.structs.asdict(health)
    gauges = source.gauges() if isinstance(source, HasGauges) else ()
    condition = source.condition if isinstance(source, HasGauges) else None
    if condition is None and fields["backpressure"] is not None:
        condition = f"the ledger is full: {fields['backpressure']}"
    return {
        **fields,
        "last_error": _redacted(fields["last_error"]),
        "paused": paused,
        "last_event_at": instant(fields["last_event_at"]),
        "paths": [route.path for route in getattr(source, "routes", ())],
        "verified": getattr(source, "verified", None),
        "condition": _redacted(condition),
        "gauges": [{"name": each.name, "value": each.value, **each.labels} for each in gauges],
        "totals": gauge_totals(gauges),
    }


def _redacted(text: str | None) -> str | None:
    return None if text is None else SECRETS.redact_text(text)


def sinks(
    health: Mapping[str, msgspec.Struct], depths: Mapping[str, tuple[int, int]]
) -> list[dict[str, Any]]:
    """Each sink subscription with its health and backlog; also those the app no longer has, while
    messages wait.
    """
    rows: list[dict[str, Any]] = []
    for name in sorted(health.keys() | depths.keys()):
        waiting, oldest = depths.get(name, (0, None))
        known = (
            msgspec.structs.asdict(health[name])
            if name in health
            else {"name": name, "state": "unknown to this app"}
        )
        error = {"last_error": _redacted(known["last_error"])} if "last_error" in known else {}
        rows.append({**known, **error, "waiting": waiting, "oldest_at": instant(oldest)})
    return rows


def log_line(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A log line of a run."""
    return {**stored, "at": instant(stored["at"])}
