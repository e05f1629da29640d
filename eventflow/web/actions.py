"""What an operator may do to the ledger besides looking: replay, redrive, retry, cancel, pause, resume.

api.py calls these on the loop of the way in. Each is one transaction of the store; each leaves a line in the log that says who
asked, from where and for what.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec
import orjson

from eventflow.core.errors import NotFound, UsageError, caught
from eventflow.events.event import Event, Receipt
from eventflow.logs.log import get_logger
from eventflow.runs.run import State, show_id
from eventflow.store.protocol import Arrival
from eventflow.web.served import Served

Verdicts: TypeAlias = list[list[Any]]

log = get_logger("eventflow.web")


async def replay(
    app: Served, ident: str, only: str | None, *, dry: bool, by: str, own: bool = False
) -> tuple[int, Verdicts]:
    """Matches a recorded event once more, for all subscriptions or for `only` one (its name, or its flow's), and starts new
    runs; `own`: of those on its own trigger. `dry` only tells what would be. Raises NotFound, and UsageError when its body is
    gone or nobody would hear of it."""
    row = await app.store.event(ident)
    if row["body"] is None:
        raise UsageError(
            f"event {show_id(row['id'])} is past its retention: its body is gone; send it again under a new id"
        )
    arrival = _match(app, row["trigger"], row["id"], _read(row["body"]), only, own)
    if dry:
        return row["id"], [
            _foreseen(arrival, said, row["received_at"]) for said in _told(arrival, [])
        ]
    await app.store.replay(row["id"], arrival)
    _note(
        "replay",
        by,
        ledger_id=show_id(row["id"]),
        to=only,
        runs=[show_id(run.id) for run in arrival.runs],
    )
    return row["id"], _told(arrival, (await app.store.event(row["id"]))["verdicts"])


def _told(arrival: Arrival, recorded: Verdicts) -> Verdicts:
    """The verdicts of this arrival: as recorded, for an event may have joined another's run, or else as matched."""
    matched: Verdicts = orjson.loads(arrival.verdicts)
    return recorded[-len(matched) :] if recorded else matched


def _foreseen(arrival: Arrival, said: list[Any], at: int) -> list[Any]:
    """A verdict with the window that the event would open or join, as its fourth part."""
    window = next(
        (
            arrival.gathers[run.id]
            for run in arrival.runs
            if run.id == said[2] and run.id in arrival.gathers
        ),
        None,
    )
    if window is None:
        return said
    lane = next(run.lane for run in arrival.runs if run.id == said[2])
    return [*said, {**msgspec.structs.asdict(window), "lane": lane, "at": at}]


async def redrive(
    app: Served, ident: str, mended: Mapping[str, Any], *, by: str
) -> tuple[Receipt, Verdicts]:
    """Tries a dead letter once more: as it stands, or mended by `{"data": …}` (new data), with `"type"` if that is wrong too,
    or by `{"event": {…}}` (a whole CloudEvent)."""
    letter = await app.store.dead_letter(ident)
    if letter["redriven_at"] is not None:
        raise UsageError(
            f"dead letter {ident} was redriven already; replay its event {show_id(letter['event'])} to run it once more"
        )
    event = _mended(letter, mended)
    arrival = _match(app, letter["trigger"], letter["event"], event, letter["subscription"] or None)
    receipt = await app.store.redrive(letter["id"], arrival)
    _note(
        "redrive",
        by,
        dead=letter["id"],
        ledger_id=show_id(letter["event"]),
        runs=[show_id(run.id) for run in arrival.runs],
    )
    return receipt, _told(arrival, (await app.store.event(letter["event"]))["verdicts"])


def _match(
    app: Served, trigger: str, ledger_id: int, event: Event, only: str | None, own: bool = False
) -> Arrival:
    arrival = app.house.router.arrive(trigger, event, ledger_id=ledger_id, only=only, own=own)
    if orjson.loads(arrival.verdicts) == []:
        known = ", ".join(sorted({each.name for each in app.subscriptions})) or "none"
        raise UsageError(
            f"no subscription{f' or flow {only!r}' if only else ''} hears of {event.type}; there are: {known}"
        )
    return arrival


def _read(body: bytes) -> Event:
    try:
        return Event.from_json(body)
    except ValueError as error:
        raise UsageError(
            f"the body is no event ({error}); redrive it mended, with data or a whole event"
        ) from None


def _mended(letter: Mapping[str, Any], mended: Mapping[str, Any]) -> Event:
    """The event of a dead letter. Bytes that never were an event get the letter's attributes around the data."""
    if "event" in mended:
        try:
            return Event.from_dict(mended["event"])
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"event: {error}") from None
    first, _ = caught(Event.from_json, letter["body"])
    if first is None and "data" not in mended:
        return _read(letter["body"])
    event = first or Event(id=letter["event_id"], source=letter["source"], type=letter["type"])
    changes = {name: mended[name] for name in ("data", "type") if name in mended}
    return msgspec.structs.replace(event, **changes)


async def retry(app: Served, ident: str, *, fresh: bool, by: str) -> int:
    """FAILED, CANCELLED, HELD or DEAD → PENDING."""
    number: int = (await app.store.run(ident))["id"]
    await app.store.retry(number, fresh=fresh)
    _note("retry", by, run=show_id(number), fresh=fresh)
    return number


async def cancel(app: Served, ident: str, reason: str, *, by: str) -> tuple[int, State]:
    """Ends a run that is not running, asks one that is. UsageError when it has ended already."""
    number: int = (await app.store.run(ident))["id"]
    before = await app.store.cancel(number, reason)
    if not before.live:
        raise UsageError(f"run {show_id(number)} is {before.word} already")
    _note("cancel", by, run=show_id(number), reason=reason)
    return number, before


async def pause(app: Served, trigger: str, paused: bool, *, by: str) -> None:
    """While a trigger is paused its events are recorded and their runs held; `resume` lets those go on."""
    reactor = app.house.reactor
    known = trigger in reactor.health
    if not (
        known
        or trigger in await app.store.paused()
        or await app.store.events(trigger=trigger, limit=1)
    ):
        raise NotFound("trigger", trigger)
    if not paused and known:
        reactor.pause(
            trigger, False
        )  # first: what arrives from here on is not held, what arrived before is released below
    await app.store.hold(trigger, paused)
    if paused and known:
        reactor.pause(trigger, True)
    log.info("trigger.paused" if paused else "trigger.resumed", trigger=trigger)
    _note("pause" if paused else "resume", by, trigger=trigger)


def _note(verb: str, by: str, **what: Any) -> None:
    log.info("operator.acted", verb=verb, by=by, **what)
