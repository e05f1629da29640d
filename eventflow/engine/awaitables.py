"""What a flow can wait for, each with its claim: a task's call (`task.Call`), a child run, an emitted event, a timer
(`lineage.FlowTimer`), and what is told to the run from outside.

The executor keeps them by claim until an entry answers them. Values only; what becomes of them is the executor's.
"""

import asyncio
from typing import Any, TypeAlias

import orjson

from eventflow.loop.flow_loop import FlowTimer
from eventflow.sdk.flow import Flow
from eventflow.sdk.task import TaskCall
from eventflow.serialization.codecs import fingerprint


class ChildCall:
    """A call of a flow in a flow."""

    __slots__ = ("call_key", "fingerprint", "flow", "future", "params")

    def __init__(self, flow: Flow[..., Any], claim: str, params: bytes) -> None:
        self.flow, self.call_key, self.params = flow, claim, params
        self.fingerprint = fingerprint(("params",), (orjson.loads(params),), {}, {})
        self.future: asyncio.Future[Any] | None = None


class EmitCall:
    """An event to publish with the commit that records it."""

    __slots__ = ("call_key", "fields", "fingerprint", "future", "type")

    def __init__(self, claim: str, event_type: str, fields: dict[str, Any]) -> None:
        self.call_key, self.type, self.fields = claim, event_type, fields
        self.fingerprint: bytes | None = None
        self.future: asyncio.Future[Any] | None = None


class ControlSignal:
    """Something told to the run from outside, delivered in its turn: a cancel, or its own timeout."""

    __slots__ = ("call_key", "due", "handle")

    def __init__(self, claim: str, due: int | None = None) -> None:
        self.call_key, self.due = claim, due
        self.handle: Any = None


Target: TypeAlias = TaskCall | ChildCall | EmitCall | FlowTimer | ControlSignal
