"""What a monitor would have told with the thresholds and windows it has now: the past for `eventflow replay --dry-run`.

    record=True   ─► ByRows      the events on record, counted again by an engine of its own: anything may have been changed
    otherwise     ─► ByWindows   the statistics of past windows (history.py), judged again: thresholds and the rules of episodes

Both use the engine that watches, so hysteresis, confirmation and cool-down are those of live. It begins at the first instant
with nothing open; nothing is written. drift_monitor.py makes one, eventflow's foresight.py asks it.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from eventflow.core.clock import to_datetime, to_us
from eventflow.events.event import Event, Foretold
from triggers._drift.config import Setting
from triggers._drift.drift_events import Told
from triggers._drift.engine import Engine, Memory
from triggers._drift.history import KEY, recall
from triggers._drift.samples import UNREADABLE, RowsOf, sample, take
from triggers._drift.schema import TYPES, Drift, to_event

FORGET = 1000
"""Events after which what the engine would write is dropped: nobody keeps it here."""


class ByWindows:
    """The windows that were judged then. Events from before the first known one stand as they are on record, and so does what
    is told of silence: no window tells of it."""

    def __init__(
        self, setting: Setting, parts: Mapping[str, Any], since: datetime | None, until: datetime
    ) -> None:
        first = 0 if since is None else to_us(since)
        self._setting, self._engine = setting, Engine(setting, {}, first)
        kept = recall(parts, setting.measured())
        self._known = kept[0].at if kept else None
        self._windows = deque(each for each in kept if first <= each.at < to_us(until))
        self.notes = [self._note(first, any(key.startswith(KEY) for key in parts))]

    def _note(self, since: int, others: bool) -> str:
        if self._known is None:
            which = "of other features, reference or window" if others else "not kept"
            return f"its windows of that time are {which}: its events on record stand; record=True records what to count again"
        first = to_datetime(max(self._known, since))
        return f"{len(self._windows)} windows from {first:%Y-%m-%d %H:%M:%S} on, judged by the statistics kept of them"

    def retells(self, event: Event, at: datetime) -> bool:
        known = self._known is not None and to_us(at) >= self._known
        return known and _is_own(self._setting, event) and event.data["metric"] != "nodata"

    async def advance(self, at: datetime, event: Event | None = None) -> Sequence[Foretold]:
        found: list[Foretold] = []
        while self._windows and self._windows[0].at <= to_us(at):
            judged = self._windows.popleft()
            found += _foretold(self._setting, self._engine.again(judged), judged.at)
        return found


class ByRows:
    """The events that were recorded, row by row. Those of the monitor's own making stand until there is one to count."""

    def __init__(
        self, setting: Setting, rows: RowsOf, parts: Mapping[str, Any], since: datetime | None
    ) -> None:
        self._setting, self._rows = setting, rows
        learned = {} if setting.given else _learned(setting, parts)
        self._engine = Engine(setting, learned, 0 if since is None else to_us(since))
        self._learns = not setting.given and not learned
        self._counted = self._unreadable = 0

    @property
    def notes(self) -> Sequence[str]:
        if not self._counted:
            return [
                "no event of its source is on record in that time (record=True): its own events stand"
            ]
        found = [f"{self._counted} recorded events counted again"]
        if self._learns:
            found.append(
                f"the first {self._setting.learn} rows of that time were taken as the reference"
            )
        if self._unreadable:
            found.append(f"{self._unreadable} events have rows that cannot be read any more")
        return found

    def retells(self, event: Event, at: datetime) -> bool:
        return self._counted > 0 and _is_own(self._setting, event)

    async def advance(self, at: datetime, event: Event | None = None) -> Sequence[Foretold]:
        self._engine.since = self._engine.since or to_us(at)
        found = self._ticked(to_us(at))
        if event is None or _is_own(self._setting, event) or "eventflowreplay" in event.extensions:
            return found
        try:
            rows = await sample(event, self._rows, self._setting.watched, to_us(at))
        except UNREADABLE:
            self._unreadable += 1
            return found
        self._counted += 1
        found += _foretold(self._setting, await take(self._engine, [rows], to_us(at)), to_us(at))
        if self._counted % FORGET == 0:
            self._engine.changes()
        return found

    def _ticked(self, now: int) -> list[Foretold]:
        """What time alone did since the last event, at its own instants."""
        found: list[Foretold] = []
        ticked = 0
        while (due := self._engine.due) is not None and ticked < due <= now:
            ticked = due
            found += _foretold(self._setting, self._engine.tick(due), due)
        return found


def _learned(setting: Setting, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The reference that the monitor has learned, if it is by the features and windows of now."""
    if "drift:meta" not in parts:
        return {}
    memory = msgspec.convert(parts["drift:meta"], Memory)
    if memory.digest != setting.digest() or not memory.learned:
        return {}
    bare = Memory(memory.digest, version=memory.version, learned=True, own=memory.own)
    bare.episodes = [type(each)() for each in memory.episodes]
    return {"drift:meta": msgspec.to_builtins(bare)} | {
        key: part for key, part in parts.items() if key.startswith("drift:r/")
    }


def _is_own(setting: Setting, event: Event) -> bool:
    return event.source == setting.name and event.type in TYPES.values()


def _foretold(setting: Setting, told: Sequence[Told], at: int) -> list[Foretold]:
    return [
        Foretold(
            at=to_datetime(at),
            event=to_event(each.drift, setting.name, ident=each.ident),
            said=_said(each.drift),
        )
        for each in told
    ]


def _said(drift: Drift) -> str:
    """`psi of amount is 0.171, the warning begins at 0.15`"""
    if drift.metric is None or drift.statistic is None:
        return (
            drift.status
            if drift.metric != "nodata"
            else "no data came"
            if drift.status == "nodata"
            else "data came again"
        )
    found = f"{drift.metric} of {drift.feature} is {drift.statistic:.3g}"
    if drift.status == "resolved":
        return f"{found}, all is well again"
    return f"{found}, the {drift.severity} begins at {drift.threshold:g}"
