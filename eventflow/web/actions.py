"""Administrative actions on the ledger: replay, redrive, retry, cancel, pause, resume.

handlers.py calls them on the intake loop. Each is one transaction of the store and logs one
`api.action` line with the caller, the action and its target.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec
import orjson

from eventflow.app import App
from eventflow.core.errors import NotFound, UsageError, value_or_none
from eventflow.events.event import Event, Receipt
from eventflow.logs.log import get_logger
from eventflow.runs.run import State, format_id
from eventflow.store.protocol import Arrival

Verdicts: TypeAlias = list[list[Any]]

log = get_logger("eventflow.web")
LOG_EVENTS = {
    "api.action": (
        "A user changed a run, event or trigger through the API: `action`, `by`, the target."
    ),
    "trigger.paused": "A user paused a trigger.",
    "trigger.resumed": "A user resumed a trigger.",
}


async def replay(
    app: App, ident: str, only: str | None, *, dry: bool, by: str, own: bool = False
) -> tuple[int, Verdicts]:
    """Matches a recorded event again and starts new runs. Returns the event's id and the new
    verdicts.

    For all subscriptions, or for `only` one (by its name or its flow's); `own`: only for those on
    the event's own trigger. `dry` starts nothing. Raises NotFound, and UsageError when the event's
    payload is gone or no subscription accepts it.
    """
    row = await app.store.event(ident)
    if row["body"] is None:
        raise UsageError(
            f"event {format_id(row['id'])} is past its retention: its body is gone;"
            " send it again under a new id"
        )
    arrival = _match(app, row["trigger"], row["id"], _read_event(row["body"]), only, own)
    if dry:
        matched = _arrival_verdicts(arrival, [])
        return row["id"], [_with_window(arrival, each, row["received_at"]) for each in matched]
    await app.store.replay(row["id"], arrival)
    _log_action(
        "replay",
        by,
        ledger_id=format_id(row["id"]),
        to=only,
        runs=[format_id(run.id) for run in arrival.runs],
    )
    return row["id"], _arrival_verdicts(arrival, (await app.store.event(row["id"]))["verdicts"])


def _arrival_verdicts(arrival: Arrival, recorded: Verdicts) -> Verdicts:
    """The verdicts of this arrival: as recorded, since an event may have joined another's run; with
    none recorded, as matched.
    """
    matched: Verdicts = orjson.loads(arrival.verdicts)
    return recorded[-len(matched) :] if recorded else matched


def _with_window(arrival: Arrival, verdict: list[Any], at: int) -> list[Any]:
    """A verdict with the window that the event would open or join, as its fourth element."""
    window = next(
        (
            arrival.batch_policies[run.id]
            for run in arrival.runs
            if run.id == verdict[2] and run.id in arrival.batch_policies
        ),
        None,
    )
    if window is None:
        return verdict
    ordering_key = next(run.ordering_key for run in arrival.runs if run.id == verdict[2])
    return [*verdict, {**msgspec.structs.asdict(window), "ordering_key": ordering_key, "at": at}]


async def redrive(
    app: App, ident: str, correction: Mapping[str, Any], *, by: str
) -> tuple[Receipt, Verdicts]:
    """Redrives a dead letter: as recorded, with `correction` `{"data": …}` and `{"type": …}`, or
    with a whole CloudEvent `{"event": {…}}`. Raises UsageError when it was redriven before.
    """
    letter = await app.store.dead_letter(ident)
    if letter["redriven_at"] is not None:
        raise UsageError(
            f"dead letter {ident} was redriven already;"
            f" replay its event {format_id(letter['event'])} to run it once more"
        )
    event = _corrected_event(letter, correction)
    arrival = _match(app, letter["trigger"], letter["event"], event, letter["subscription"] or None)
    receipt = await app.store.redrive(letter["id"], arrival)
    _log_action(
        "redrive",
        by,
        dead=letter["id"],
        ledger_id=format_id(letter["event"]),
        runs=[format_id(run.id) for run in arrival.runs],
    )
    return receipt, _arrival_verdicts(arrival, (await app.store.event(letter["event"]))["verdicts"])


def _match(
    app: App, trigger: str, ledger_id: int, event: Event, only: str | None, own: bool = False
) -> Arrival:
    arrival = app.runtime.router.route(
        trigger, event, ledger_id=ledger_id, only=only, same_trigger_only=own
    )
    if orjson.loads(arrival.verdicts) == []:
        known = ", ".join(sorted({each.name for each in app.subscriptions})) or "none"
        raise UsageError(
            f"no subscription{f' or flow {only!r}' if only else ''} accepts {event.type};"
            f" there are: {known}"
        )
    return arrival


def _read_event(body: bytes) -> Event:
    try:
        return Event.from_json(body)
    except ValueError as error:
        raise UsageError(
            f"the body is no event ({error}); redrive it corrected, with data or a whole event"
        ) from None


def _corrected_event(letter: Mapping[str, Any], correction: Mapping[str, Any]) -> Event:
    """The event of a dead letter. Undecodable bytes get the dead letter's attributes around the
    data.
    """
    if "event" in correction:
        try:
            return Event.from_dict(correction["event"])
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"event: {error}") from None
    first = value_or_none(Event.from_json, letter["body"])
    if first is None and "data" not in correction:
        return _read_event(letter["body"])
    event = first or Event(id=letter["event_id"], source=letter["source"], type=letter["type"])
    changes = {name: correction[name] for name in ("data", "type") if name in correction}
    return msgspec.structs.replace(event, **changes)


async def retry(app: App, ident: str, *, from_scratch: bool, by: str) -> tuple[int, State, State]:
    """FAILED, CANCELLED, PAUSED, HELD or DEAD → PENDING; so does WAITING for a next attempt. Of a
    run in memory, attempts that wait start at once. Returns its id, its state before and now.
    """
    row = await app.store.run(ident)
    number: int = row["id"]
    before = State[row["state"].upper()]
    now = State.PENDING
    if before is State.RUNNING and not from_scratch and await app.runtime.retry_now(number):
        now = before
    else:
        await app.store.retry(number, discard_journal=from_scratch)
    _log_action("retry", by, run=format_id(number), from_scratch=from_scratch)
    return number, before, now


async def retry_from(app: App, ident: str, call: str, *, by: str) -> tuple[int, int]:
    """A new run that repeats one that has ended, from a call on. Returns the ids of both."""
    number: int = (await app.store.run(ident))["id"]
    new = app.runtime.ids.next(app.clock.now())
    await app.store.retry_from(number, call, new)
    _log_action("retry", by, run=format_id(number), call=call, new_run=format_id(new))
    return number, new


async def cancel(app: App, ident: str, reason: str, *, by: str) -> tuple[int, State]:
    """Cancels a run: at once, or by a request if it has begun. Returns its id and its state
    before.

    Raises UsageError when it has ended already.
    """
    number: int = (await app.store.run(ident))["id"]
    before = await app.store.cancel(number, reason)
    if not before.is_live:
        raise UsageError(f"run {format_id(number)} is {before.label} already")
    _log_action("cancel", by, run=format_id(number), reason=reason)
    return number, before


async def pause(app: App, trigger: str, paused: bool, *, by: str) -> None:
    """While a trigger is paused its events are recorded with paused runs; `resume` makes these
    PENDING.
    """
    reactor = app.runtime.reactor
    known = trigger in reactor.health
    if not (
        known
        or trigger in await app.store.paused_triggers()
        or await app.store.events(trigger=trigger, limit=1)
    ):
        raise NotFound("trigger", trigger)
    if not paused and known:
        reactor.pause(
            trigger, False
        )  # first: what arrives from here on is not paused, what arrived before is released below
    await app.store.set_paused(trigger, paused)
    if paused and known:
        reactor.pause(trigger, True)
    log.info("trigger.paused" if paused else "trigger.resumed", trigger=trigger)
    _log_action("pause" if paused else "resume", by, trigger=trigger)


def _log_action(action: str, by: str, **target: Any) -> None:
    log.info("api.action", action=action, by=by, **target)
