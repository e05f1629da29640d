"""What a flow can wait for, each with its call key: `TaskCall` (sdk/task.py), `ChildCall`,
`EmitCall`, `FlowTimer` (loop/flow_loop.py) and `ControlSignal`.

`PendingCalls` keeps them by call key until a journal entry answers them.
"""

import asyncio
from typing import Any, TypeAlias

import orjson

from eventflow.core.clock import Moment
from eventflow.loop.flow_loop import FlowTimer
from eventflow.loop.unawaited import CallSite
from eventflow.sdk.flow import Flow
from eventflow.sdk.task import TaskCall
from eventflow.serialization.codecs import fingerprint


class ChildCall:
    """A call of a flow in a flow. `params` is a JSON object."""

    __slots__ = ("call_key", "fingerprint", "flow", "future", "params", "site")

    def __init__(
        self, flow: Flow[..., Any], call_key: str, params: bytes, site: CallSite | None = None
    ) -> None:
        self.flow = flow
        self.call_key = call_key
        self.params = params
        self.site = site
        """Where the parent's flow made the call."""
        self.fingerprint = fingerprint(("params",), (orjson.loads(params),), {}, {})
        self.future: asyncio.Future[Any] | None = None

    def marked_arguments(self) -> dict[str, bytes]:
        """For `codecs.is_recorded_unsorted`."""
        return {"params": self.flow.binder.mark_sets(self.params)}


class EmitCall:
    """An event to publish with the commit that records it."""

    __slots__ = ("call_key", "fields", "fingerprint", "future", "type")

    def __init__(self, call_key: str, event_type: str, fields: dict[str, Any]) -> None:
        self.call_key = call_key
        self.type = event_type
        self.fields = fields
        self.fingerprint: bytes | None = None
        self.future: asyncio.Future[Any] | None = None


class ControlSignal:
    """A cancel or the run's own timeout, recorded and then delivered in its turn. For a timeout:
    `due`, in microseconds, which was computed from `since`.
    """

    __slots__ = ("call_key", "due", "handle", "since")

    def __init__(self, call_key: str, due: int | None = None, since: Moment | None = None) -> None:
        self.call_key = call_key
        self.due = due
        self.since = since
        self.handle: Any = None  # the timer, for a timeout


Call: TypeAlias = TaskCall | ChildCall | EmitCall
"""What flow code awaits through a future."""

Pending: TypeAlias = Call | FlowTimer | ControlSignal
