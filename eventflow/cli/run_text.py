"""One run, or one event, as text: what `eventflow show` and `explain` print.

The facts come first, then the calls of a run in a table; calls of one name are one line with counts
from `GROUP_SIZE` on. An error is printed once: that of a call in its line, that of the run at the
end.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import click
import orjson

from eventflow.cli.output import fields_text, table
from eventflow.cli.times import age_text, instant_text, seconds_since
from eventflow.core.clock import duration_text
from eventflow.logs.redaction import escape_controls_by_line

GROUP_SIZE = 12
"""Calls of one name that become one line."""
MAX_SHOWN = 10
"""Calls of a group that are listed: those that failed, run or are retried."""
MAX_TRACEBACK_LINES = 40
RECORDED_TRACEBACK = "recorded traceback:"
"""Line of an error's note, before the traceback of the task's body."""
MAX_MESSAGE_CHARS = 2000
COMPARED_CHARS = 400
"""Of two messages, of which the API shortens that of a call."""
LIVE = ("running", "queued", "retrying")


def last_part(error_type: str | None) -> str:
    """`ConnectionError` of `builtins:ConnectionError`."""
    return (error_type or "").rpartition(":")[2]


# --------------------------------------------------------------------------- a run


def run_text(run: Mapping[str, Any], width: int | None = None) -> str:
    head = fields_text(
        [
            ("run", run["id"]),
            ("flow", run["flow"]),
            ("state", _state(run)),
            ("why", run["reason"]),
            ("retry", _retry(run)),
            ("about", _about(run)),
            ("event", _event(run)),
            ("parent", run["parent"]),
            ("repeats", run["repeats"] and f"{run['repeats']} from {run['repeats_from']}"),
            ("ordering key", run["ordering_key"]),
            ("created", None if run["started_at"] else instant_text(run["created_at"])),
            ("started", run["started_at"] and instant_text(run["started_at"])),
            ("due", _due(run)),
            ("resumed", _times(run["attempts"] - (2 if run["repeats"] else 1))),
            ("params", _json(run["params"])),
            ("data", _json(run["event_data"]) if run["params"] is None else None),
            ("result", _result(run)),
        ],
        width,
    )
    parts = (head, *_calls(run, width), *_failed_attempts(run, width), _error(run))
    return "\n\n".join(part for part in parts if part)


def _state(run: Mapping[str, Any]) -> str:
    took = duration_text(run["took"])
    if run["state"] == "running" and run["started_at"]:
        return f"running for {duration_text(seconds_since(run['started_at']))}"
    return f"{run['state']} in {took}" if took else run["state"]


def _retry(run: Mapping[str, Any]) -> str | None:
    """`attempt 2 of 4, in 30 s`."""
    retry = run["retry"]
    if retry is None:
        return None
    due = f", {age_text(retry['next_at'])}" if retry["next_at"] else ""
    return f"attempt {retry['attempt']} of {retry['attempts']}{due}"


def _times(count: int) -> str | None:
    return None if count < 1 else "once" if count == 1 else f"{count:,} times"


def _about(run: Mapping[str, Any]) -> str | None:
    """Nothing that another line says."""
    return run["about"] if run["params"] is None and run["about"] != run["event_id"] else None


def _event(run: Mapping[str, Any]) -> str | None:
    if run["ledger_id"] is None or run["event_type"] == "eventflow.run.requested":
        return None
    more = f", and {run['events'] - 1} more" if run["events"] > 1 else ""
    ids = f"{run['ledger_id']}  {run['event_type']}  {run['event_id']}"
    return f"{ids}  by {run['subscription']}{more}"


def _due(run: Mapping[str, Any]) -> str | None:
    if run["state"] not in ("pending", "waiting") or run["due_at"] is None:
        return None
    return instant_text(run["due_at"])


def _json(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value, default=str).decode()


def _result(run: Mapping[str, Any]) -> str | None:
    if run["result_digest"] is None:
        return None
    if run["result"] is None and run.get("result_size", 0) > 4:
        return f"{run['result_size']:,} bytes ({run['result_codec']})"
    return _json(run["result"])


# --------------------------------------------------------------------------- its calls


def _calls(run: Mapping[str, Any], width: int | None) -> list[str]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for call in run["tasks"]:
        groups.setdefault(call["name"], []).append(_without_error_of(run, call))
    rows: list[dict[str, Any]] = []
    for name, calls in groups.items():
        if len(calls) < GROUP_SIZE:
            rows += [_call_row(call) for call in calls]
        else:
            rows += _group_rows(name, calls)
    if not rows:
        return []
    columns = ("call", "state", "attempts", "started", "waited", "took", "detail")
    return [table(rows, columns, "", width=width)]


def _without_error_of(run: Mapping[str, Any], call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The call that the run failed with does not repeat the error at the end."""
    error = run["error"]
    last = call["errors"][-1] if call["errors"] else None
    if error is None or last is None or call["state"] != "failed":
        return call
    messages = [(each.get("message") or "")[:COMPARED_CHARS] for each in (error, last)]
    if error["type"] != last.get("type") or messages[0] != messages[1]:
        return call
    return {**call, "errors": [{"type": last["type"], "message": "see below"}]}


def _call_row(call: Mapping[str, Any]) -> dict[str, Any]:
    """A wait that a person cannot notice is not shown."""
    waited = call["waited"]
    started = call["called_at"] or call["first_at"]
    return {
        "call": call["call_key"],
        "state": call["state"],
        "attempts": call["attempts"] if call["attempts"] > 1 else None,
        "started": age_text(started),
        "waited": duration_text(waited) if waited is not None and waited >= 0.05 else None,
        "took": duration_text(call["took"]),
        "detail": _detail(call),
    }


def _detail(call: Mapping[str, Any]) -> str | None:
    """The last error of a call that has not completed, else its value, or the run it started."""
    if call["next_at"] is not None:
        return f"next attempt {age_text(call['next_at'])}; {_last_error(call)}"
    if call["state"] == "failed" or (call["errors"] and call["state"] in LIVE):
        return _last_error(call)
    return call.get("child") or call["result"]


def _last_error(call: Mapping[str, Any]) -> str:
    error: dict[str, Any] = call["errors"][-1] if call["errors"] else {}
    return f"{last_part(error.get('type'))}: {error.get('message', '')}"


def _group_rows(name: str, calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line for many calls, then those that a person looks for."""
    states = Counter(call["state"] for call in calls)
    unwell = [call for call in calls if call["state"] == "failed" or call["state"] in LIVE]
    unwell.sort(key=lambda call: (call["state"] != "failed", -(call["took"] or 0)))
    attempts = sum(call["attempts"] for call in calls)
    times = sorted(call["took"] for call in calls if call["took"] is not None)
    spread = None
    if times:
        median = times[len(times) // 2]
        slow = times[int(len(times) * 0.95)]
        spread = (
            f"took {duration_text(median)} (median), {duration_text(slow)} (95 %), "
            f"{duration_text(times[-1])} (longest)"
        )
    counts = ", ".join(f"{number:,} {state}" for state, number in states.most_common())
    group = {
        "call": f"{name} ×{len(calls):,}",
        "state": next(iter(states)) if len(states) == 1 else "mixed",
        "attempts": f"{attempts:,}" if attempts > len(calls) else None,
        "started": age_text(min(call["called_at"] or call["first_at"] for call in calls)),
        "detail": "; ".join(part for part in (counts if len(states) > 1 else None, spread) if part),
    }
    rows = [group, *(_call_row(call) for call in unwell[:MAX_SHOWN])]
    if len(unwell) > MAX_SHOWN:
        rows.append({"call": f"… {len(unwell) - MAX_SHOWN:,} more", "state": "see --json"})
    return rows


def _failed_attempts(run: Mapping[str, Any], width: int | None) -> list[str]:
    """A table of the attempts of the flow that failed and were retried."""
    rows = [
        {
            "failed attempt": each["number"],
            "failed": age_text(each["at"]),
            "error": f"{last_part(each.get('type'))}: {each.get('message', '')}",
        }
        for each in run["failed_attempts"]
    ]
    return [table(rows, ("failed attempt", "failed", "error"), "", width=width)] if rows else []


# --------------------------------------------------------------------------- its error


def _error(run: Mapping[str, Any]) -> str | None:
    """The traceback, whose last lines are the error, or the error alone."""
    error = run["error"]
    if not error:
        return None
    text = _one_traceback(escape_controls_by_line(error.get("traceback") or "").rstrip())
    message = escape_controls_by_line(error.get("message") or "")
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[:MAX_MESSAGE_CHARS]}… all: --json"
    first = f"{last_part(error['type'])}: {message}"
    if last_part(error["type"]) not in text:  # none, or cut: a long message fills it
        return f"{click.style('error', bold=True)}  {first}"
    lines = text.splitlines()
    if len(lines) > MAX_TRACEBACK_LINES:
        left_out = len(lines) - MAX_TRACEBACK_LINES
        lines = [lines[0], f"  … {left_out} lines; all: --json", *lines[-MAX_TRACEBACK_LINES + 1 :]]
    return "\n".join(lines)


def _one_traceback(text: str) -> str:
    """The frames of the flow and, below them, those of the task's body that its note has; the error
    once.
    """
    flow, note, body = text.partition(f"\n{RECORDED_TRACEBACK}\n")
    frames = [line for line in flow.splitlines() if line.startswith("  ")]
    head = flow.splitlines()[:1]
    if not note or not frames or not body:
        return text
    return "\n".join([*head, *frames, body.removeprefix(f"{head[0]}\n")])


# --------------------------------------------------------------------------- an event


def event_text(event: Mapping[str, Any], width: int | None = None) -> str:
    head = fields_text(
        [
            ("event", event["id"]),
            ("sender's id", event["event_id"]),
            *((name, event[name]) for name in ("type", "source", "subject", "trigger")),
            ("received", instant_text(event["received_at"])),
            ("duplicates", _duplicates(event)),
            ("conflicts", event["conflicts"] or None),
            ("data", _event_data(event["event"])),
        ],
        width,
    )
    rows = [
        {
            "subscription": verdict["subscription"] or "(the event itself)",
            "verdict": "run started" if verdict["outcome"] == "run" else verdict["outcome"],
            "run": verdict.get("run"),
            "state": verdict.get("state"),
            "why": _why(verdict),
        }
        for verdict in event["verdicts"]
    ]
    columns = ("subscription", "verdict", "run", "state", "why")
    verdicts = table(
        rows, columns, "no subscription accepts events of this type", width=width, reason_lines=6
    )
    return f"{head}\n\n{verdicts}"


def _why(verdict: Mapping[str, Any]) -> str | None:
    due = verdict.get("due_at")
    return f"retry {age_text(due)}; {verdict['reason']}" if due else verdict.get("reason")


def _event_data(event: Any) -> str | None:
    data: Any = cast(dict[str, Any], event).get("data") if isinstance(event, dict) else event
    return data if isinstance(data, str) else _json(data)


def _duplicates(event: Mapping[str, Any]) -> str | None:
    if not event["duplicates"]:
        return None
    last = age_text(event["last_duplicate_at"])
    return f"{event['duplicates']}, the last {last}; they started nothing"
