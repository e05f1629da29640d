"""The events a monitor would have made in the past with its present thresholds and windows.

    record=True   ─► RowSimulation      recorded events, counted again: any option may have changed
    otherwise     ─► WindowSimulation   statistics of past windows (history.py), evaluated again:
                                        thresholds and the rules of episodes may have changed

For `eventflow replay --dry-run`: drift_monitor.py makes a simulation, eventflow/dry_run/replay.py
runs it. Both use the live engine, so hysteresis, confirmation and cool-down are the same. They
start with no open episode at the first instant; nothing is written.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from eventflow.core.clock import to_datetime, to_us
from eventflow.events.event import Event, SimulatedEvent
from triggers._drift.config import MonitorConfig
from triggers._drift.drift_events import DriftEvent
from triggers._drift.engine import Engine
from triggers._drift.evaluator import Evaluator, MonitorState, new_episodes
from triggers._drift.history import KEY_PREFIX, History, stored_windows
from triggers._drift.samples import UNREADABLE, RowsOf, count_samples, read_sample
from triggers._drift.schema import TYPES, Drift, to_event

FORGET_EVERY_EVENTS = 1000
"""The engine collects changes for the cursor; a simulation discards them this often."""


class WindowSimulation:
    """Past windows, evaluated again.

    Recorded events from before the first stored window stay, and so does each `drift.nodata`, which
    no window shows.
    """

    def __init__(
        self,
        config: MonitorConfig,
        parts: Mapping[str, Any],
        since: datetime | None,
        until: datetime,
    ) -> None:
        first = 0 if since is None else to_us(since)
        stored = stored_windows(parts, config.measurement_hash())
        state = MonitorState(config.state_hash(), episodes=new_episodes(config))
        self._config: MonitorConfig = config
        self._evaluator = Evaluator(config, state, config.baselines, History(0, {}))
        self._known_from: int | None = stored[0].at if stored else None
        self._windows = deque(each for each in stored if first <= each.at < to_us(until))
        self.notes = [self._note(first, any(key.startswith(KEY_PREFIX) for key in parts))]

    def _note(self, since: int, others: bool) -> str:
        if self._known_from is None:
            which = "of other features, reference or window" if others else "not stored"
            return (
                f"its windows of that time are {which}: its recorded events stay; "
                "record=True records what to count again"
            )
        first = to_datetime(max(self._known_from, since))
        return (
            f"{len(self._windows)} windows from {first:%Y-%m-%d %H:%M:%S} on, "
            "evaluated by their stored statistics"
        )

    def replaces(self, event: Event, at: datetime) -> bool:
        is_known = self._known_from is not None and to_us(at) >= self._known_from
        return is_known and _is_own(self._config, event) and event.data["metric"] != "nodata"

    async def advance(self, at: datetime, event: Event | None = None) -> Sequence[SimulatedEvent]:
        found: list[SimulatedEvent] = []
        while self._windows and self._windows[0].at <= to_us(at):
            window = self._windows.popleft()
            found += _simulated_events(self._config, self._evaluator.reevaluate(window), window.at)
        return found


class RowSimulation:
    """Recorded events, counted again row by row.

    The monitor's own recorded events stay until there is an event to count.
    """

    def __init__(
        self, config: MonitorConfig, rows: RowsOf, parts: Mapping[str, Any], since: datetime | None
    ) -> None:
        learned = {} if config.baselines else _learned_parts(config, parts)
        self._engine = Engine(config, learned, 0 if since is None else to_us(since))
        self._config: MonitorConfig = config
        self._rows: RowsOf = rows
        self._learns: bool = not config.baselines and not learned
        self._counted: int = 0  # events
        self._unreadable: int = 0

    @property
    def notes(self) -> Sequence[str]:
        if not self._counted:
            return [
                "no event of its source is recorded in that time (record=True): its own events stay"
            ]
        found = [f"{self._counted} recorded events counted again"]
        if self._learns:
            found.append(f"the first {self._config.learn_rows} rows of that time are the reference")
        if self._unreadable:
            found.append(f"{self._unreadable} events have rows that can no longer be read")
        return found

    def replaces(self, event: Event, at: datetime) -> bool:
        return self._counted > 0 and _is_own(self._config, event)

    async def advance(self, at: datetime, event: Event | None = None) -> Sequence[SimulatedEvent]:
        self._engine.since = self._engine.since or to_us(at)
        found = self._ticked(to_us(at))
        if event is None or _is_own(self._config, event) or "eventflowreplay" in event.extensions:
            return found
        try:
            rows = await read_sample(event, self._rows, self._config.features, to_us(at))
        except UNREADABLE:
            self._unreadable += 1
            return found
        self._counted += 1
        events = await count_samples(self._engine, [rows], to_us(at))
        found += _simulated_events(self._config, events, to_us(at))
        if self._counted % FORGET_EVERY_EVENTS == 0:
            self._engine.changes()
        return found

    def _ticked(self, now: int) -> list[SimulatedEvent]:
        """The events that the passing of time caused since the last one, each at its instant."""
        found: list[SimulatedEvent] = []
        ticked = 0
        while (due := self._engine.due) is not None and ticked < due <= now:
            ticked = due
            found += _simulated_events(self._config, self._engine.tick(due), due)
        return found


def _learned_parts(config: MonitorConfig, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The learned reference from the cursor, if features and windows are still the same."""
    if "drift:meta" not in parts:
        return {}
    stored = msgspec.convert(parts["drift:meta"], MonitorState)
    if stored.config_hash != config.state_hash() or not stored.learned:
        return {}
    fresh = MonitorState(
        stored.config_hash,
        version=stored.version,
        learned=True,
        learns=stored.learns,
        episodes=new_episodes(config),
    )
    return {"drift:meta": msgspec.to_builtins(fresh)} | {
        key: part for key, part in parts.items() if key.startswith("drift:r/")
    }


def _is_own(config: MonitorConfig, event: Event) -> bool:
    return event.source == config.name and event.type in TYPES.values()


def _simulated_events(
    config: MonitorConfig, drift_events: Sequence[DriftEvent], at: int
) -> list[SimulatedEvent]:
    return [
        SimulatedEvent(
            at=to_datetime(at),
            event=to_event(each.drift, config.name, ident=each.ident),
            summary=_summary(each.drift),
        )
        for each in drift_events
    ]


def _summary(drift: Drift) -> str:
    """`psi of amount is 0.171, the warning begins at 0.15`"""
    if drift.metric == "nodata":
        return "no data arrives" if drift.status == "nodata" else "data arrives again"
    if drift.metric is None or drift.statistic is None:
        return drift.status
    found = f"{drift.metric} of {drift.feature} is {drift.statistic:.3g}"
    if drift.status == "resolved":
        return f"{found}, back to normal"
    return f"{found}, the {drift.severity} begins at {drift.threshold:g}"
