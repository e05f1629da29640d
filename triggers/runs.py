"""`RunState`: ends of runs as events, for chaining, alerts, clean-up and deadlines.

    app.on(RunState("train", "completed"), promote)
    app.on(RunState("*", "failed", "dead", "held"), alert)
    app.on(RunState("train", "late", after=3600), alert)

The event is recorded in the transaction that ends the run: it exists exactly if the run ended so.
Nothing listens: the App subscribes to `types` and `pattern`, and monitors the runs that may be late
(`events.event.LedgerTrigger`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from eventflow.core.clock import Duration, in_seconds, microseconds
from eventflow.core.declarations import declaration, duration
from eventflow.core.errors import UsageError
from eventflow.events.event import LateSpec

STATES: Final = ("completed", "failed", "cancelled", "dead", "held")
LATE: Final = "late"


class RunState:
    """Runs of `flow` (by name, or the flow itself; `*` matches any part) that reach one of
    `states`.

    The event's type is `eventflow.run.STATE`, its subject the run; its data has `run`, `flow`,
    `state`, `claims`, `seconds`, `reason`, `error` (`type`, `message`) and `result` (JSON of at
    most 64 KiB, else null). Without `states`: every end.

    `"late"` is a run that has not ended `after` seconds (or a timedelta) after it was due, whatever
    its state: pending, running, waiting, paused or held. A run is due when it is recorded; the run
    of a window (`Batch`, `Debounce`), when the window closes. One event for each run and `after`:
    never early, at once after a restart, none for a run that had ended by then and was retried. Its
    data also has `after`, `due` (when the run was due) and `run_state`. A `*` excludes runs that
    such events started.

    UsageError for an unknown state, `"late"` without `after`, `after` without `"late"`.
    """

    @declaration
    def __init__(self, flow: Any = "*", *states: str, after: Duration | None = None) -> None:
        name = flow if isinstance(flow, str) else getattr(flow, "name", None)
        if not isinstance(name, str) or not name:
            raise UsageError(f"RunState: expected a flow or its name, found {flow!r}")
        for state in states:
            if state not in (*STATES, LATE):
                raise UsageError(
                    f"RunState: expected states among {', '.join((*STATES, LATE))}, found {state!r}"
                )
        self._flow: str = name
        self._states: Sequence[str] = states or STATES
        self._after: int | None = _checked_after(after, LATE in states)  # microseconds

    def __repr__(self) -> str:
        states = "".join(f", {state!r}" for state in self._states)
        after = "" if self._after is None else f", after={in_seconds(self._after)}"
        return f"RunState({self._flow!r}{states}{after})"

    @property
    def types(self) -> Sequence[str]:
        return [f"eventflow.run.{state}" for state in self._states]

    @property
    def pattern(self) -> Mapping[str, Any]:
        wanted: dict[str, Any] = {} if self._flow == "*" else {"flow": [{"wildcard": self._flow}]}
        if self._after is not None:
            same = {"numeric": ["=", in_seconds(self._after)]}
            wanted["after"] = [same] if set(self._states) == {LATE} else [same, {"exists": False}]
        return wanted

    @property
    def late(self) -> LateSpec | None:
        return None if self._after is None else LateSpec(self._flow, self._after)


def _checked_after(after: Duration | None, is_late: bool) -> int | None:
    """Microseconds."""
    if after is None and is_late:
        raise UsageError(
            'RunState: "late" expected after= (seconds or a timedelta from the due time), '
            "found none"
        )
    if after is not None and not is_late:
        raise UsageError(
            f'RunState: after={after!r} goes with the state "late", which is not among those named'
        )
    return (
        None if after is None else microseconds(duration(after, "RunState: after=", positive=True))
    )
