"""`RunState`: what became of runs, as events: chaining, alerts, clean-up.

    app.on(RunState("train", "completed"), promote)
    app.on(RunState("*", "failed", "dead", "held"), alert)

The event is recorded in the transaction that ends the run, so it is there exactly when the run has ended so. Nothing listens:
the App subscribes to the types and the pattern that this names (event.Recorded).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from eventflow.errors import UsageError

STATES: Final = ("completed", "failed", "cancelled", "dead", "held")


class RunState:
    """Runs of `flow` (by name, or the flow itself; `*` matches any part) that come to one of `states`.

    The event's type is `eventflow.run.STATE`, its subject the run; its data has `run`, `flow`, `state`, `attempts`, `seconds`,
    `reason`, `error` (`type`, `message`) and `result` (JSON of at most 64 KiB, else null). UsageError for an unknown state.
    """

    def __init__(self, flow: Any = "*", *states: str) -> None:
        name = flow if isinstance(flow, str) else getattr(flow, "name", None)
        if not isinstance(name, str) or not name:
            raise UsageError(f"RunState: expected a flow or its name, found {flow!r}")
        for state in states:
            if state not in STATES:
                raise UsageError(f"RunState: expected states among {', '.join(STATES)}, found {state!r}")
        self._flow, self._states = name, states or STATES

    @property
    def types(self) -> Sequence[str]:
        return [f"eventflow.run.{state}" for state in self._states]

    @property
    def pattern(self) -> Mapping[str, Any]:
        return {} if self._flow == "*" else {"flow": [{"wildcard": self._flow}]}
