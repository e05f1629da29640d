"""eventflow: events in, durable flows out.

    from eventflow import App
    from eventflow import flow, task
    from triggers import Webhook

docs/concepts.md defines the terms. Importing this package has no side effects.
"""

from typing import TYPE_CHECKING, Any

from eventflow.app import App, RunHandle
from eventflow.core.errors import EventflowError, IdempotencyConflict, NotFound, UsageError
from eventflow.core.retry import Backoff, Permanent, Retry, RetryAfter
from eventflow.events.event import (
    Event,
    EventSink,
    Intake,
    OutboxMessage,
    Receipt,
    Trigger,
    Undecodable,
)
from eventflow.routing.delivery import Batch, Debounce, Each, Latest, Singleflight
from eventflow.routing.patterns import absent, all_of, any_of, count, part, sequence
from eventflow.sdk.checkpoint import Checkpoint, checkpoint
from eventflow.sdk.flow import current_run, emit, flow, restart_with, sleep, timeout
from eventflow.sdk.task import current_task, task

__all__ = [
    "App",
    "Backoff",
    "Batch",
    "Checkpoint",
    "Debounce",
    "Each",
    "Event",
    "EventSink",
    "EventflowError",
    "IdempotencyConflict",
    "Intake",
    "Latest",
    "NotFound",
    "OutboxMessage",
    "Permanent",
    "Receipt",
    "Retry",
    "RetryAfter",
    "RunHandle",
    "Singleflight",
    "Trigger",
    "Undecodable",
    "UsageError",
    "absent",
    "all_of",
    "any_of",
    "checkpoint",
    "checks",
    "count",
    "current_run",
    "current_task",
    "emit",
    "flow",
    "part",
    "restart_with",
    "sequence",
    "sleep",
    "task",
    "timeout",
]

if TYPE_CHECKING:
    from eventflow.sdk import checks
else:  # the type checker knows the names

    def __getattr__(name: str) -> Any:
        """Loads `checks` when it is used. For `from eventflow import Cron`, a common mistake: the
        error names the right package.
        """
        from importlib import import_module

        if name == "checks":
            return import_module("eventflow.sdk.checks")
        if not name.startswith("_") and name in import_module("triggers").__all__:
            raise ImportError(
                f"{name} is in the package `triggers`; write `from triggers import {name}`",
                name=__name__,
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
