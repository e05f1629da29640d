"""Gives a call's future the answer that its journal entry records: what a replay would give it.

A value is decoded from its recorded form, an error rebuilt from its class and arguments.
"""

from typing import Any

from eventflow.core.errors import ResultsUnavailable, call_catching
from eventflow.engine.awaitables import Call, ChildCall, EmitCall
from eventflow.engine.large_result import retry_later
from eventflow.engine.worker_services import WorkerServices
from eventflow.runs.journal import Entry, Journal, Kind
from eventflow.runs.run import NeedsAttention, Outcome
from eventflow.sdk.task import TaskCall
from eventflow.serialization.codecs import decode_error


def answer(call: Call, entry: Entry, services: WorkerServices, journal: Journal) -> Outcome | None:
    """Sets the future, unless it is done. Returns how the run ends if the value cannot be read."""
    future = call.future
    if future is None or future.done():
        return None
    if entry.kind is Kind.ERROR:
        future.set_exception(decode_error(entry.error or b"{}"))
        # Recorded: no warning if the flow ignores it.
        future._log_traceback = False  # pyright: ignore
    elif isinstance(call, EmitCall):
        future.set_result((entry.value or b"").decode())
    else:
        value, error = call_catching(_decode, call, entry, services)
        if error is None:
            future.set_result(value)
        elif isinstance(error, ResultsUnavailable):
            return retry_later(services, journal)
        else:  # the code reads another type than was stored; the value stays
            return NeedsAttention(
                f"{call.call_key}: the recorded value cannot be read back: {error}"
            )
    return None


def _decode(call: TaskCall | ChildCall, entry: Entry, services: WorkerServices) -> Any:
    result = call.task.result if isinstance(call, TaskCall) else call.flow.result
    codec = entry.codec or "json"
    data = entry.value or b"null"
    if codec.endswith("@blob"):
        codec, data = services.blobs.fetch(codec, data)
    return result.decode(codec, data, allow_pickle=True, key=services.secret)
