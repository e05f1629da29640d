"""How a run ends: by its flow's result or error, a cancel, its timeout, or from outside. An error
ends only an attempt while the flow has retries left (`Retried`).

A run is *open*, then *ending* (it has an outcome, and its flow unwinds), then *closed* (the outcome
is posted to the store). A cancel and the timeout are journaled and delivered in their turn, like
any answer, so that a replay cancels the flow at the same step; the flow may then clean up for its
`grace`. `Execution` makes one `RunEnd` per run.
"""

from collections.abc import Callable
from types import CoroutineType
from typing import Any, cast

import msgspec
import orjson

from eventflow.core.clock import SECOND, Timer, microseconds, read_moment, timer_after
from eventflow.core.errors import ResultsUnavailable, RunCancelled, RunDead, RunTimedOut
from eventflow.core.secrets import KNOWN_SECRETS
from eventflow.engine.actions import EndRun
from eventflow.engine.awaitables import ControlSignal
from eventflow.engine.lost_calls import returned_unawaited
from eventflow.engine.worker_services import WorkerServices
from eventflow.logs.log import get_logger
from eventflow.loop.flow_loop import FlowTask
from eventflow.runs.journal import CANCEL_KEY, TIMEOUT_KEY, Entry, Journal, Kind, retry_note
from eventflow.runs.run import (
    Cancelled,
    Completed,
    Failed,
    Outcome,
    Restarted,
    Retried,
    Run,
    Suspended,
)
from eventflow.sdk.flow import Flow
from eventflow.serialization.blobs import OFFLOAD_BYTES, offload
from eventflow.serialization.errors import MAX_DETAIL, encode_error, error_summary

RESULT_RETRY_DELAY = 30 * SECOND
"""Microseconds until a run whose results cannot be stored or read is tried again."""

MAX_REFUSALS = 100
"""Calls that a flow may make in spite of its cancel before it is ended."""

_FINAL = (RunCancelled, RunDead)
"""Errors of a child run after which its parent is not retried."""

log = get_logger("eventflow.execution")


class RunEnd(msgspec.Struct, eq=False):
    """`outcome` is set when the run is ending, `is_closed` when nothing of it is accepted
    any more.
    """

    _services: WorkerServices
    _flow: Flow[..., Any]
    _journal: Journal
    outcome: Outcome | None = None
    unawaited: list[str] = []
    """Calls that the flow made and never awaited, with their lines."""
    is_closed: bool = False
    is_signalled: bool = False
    """Whether a cancel or the timeout was delivered: the flow cleans up."""
    refusals: int = 0
    """Calls that the flow made after that, not to clean up; and repeated cancels."""
    unwind_rounds: int = 0
    """How often the flow's unfinished tasks were cancelled."""
    requested_cancel: str | None = None
    """The reason of a requested cancel, whether or not the flow has received it."""
    _cancel_reason: str | None = None
    _timed_out: bool = False
    _grace_timer: Timer | None = None
    _large_result: "LargeResult | None" = None

    @property
    def is_open(self) -> bool:
        """Whether anything may still be recorded."""
        return self.outcome is None and not self.is_closed

    @property
    def will_resume(self) -> bool:
        """Whether the run only leaves memory: a later execution makes its calls again."""
        return self.outcome is not None and not isinstance(
            self.outcome, Completed | Failed | Cancelled | Restarted
        )

    # ----------------------------------------------------------------- cancel and timeout

    def initial_signals(self, run: Run, flow_time: int) -> list[ControlSignal]:
        """What the run waits for from its start: a cancel that is recorded, and its timeout."""
        signals: list[ControlSignal] = []
        journal = self._journal
        options = self._flow.options
        if (cancel := journal.finals.get(CANCEL_KEY)) is not None:
            self.requested_cancel = orjson.loads(cancel.value or b'""')
            signals.append(ControlSignal(CANCEL_KEY))
        if options.timeout is not None:
            now = read_moment(self._services.clock, not_before=flow_time)
            started = now.wall
            if options.timeout_counts == "running":
                started -= journal.running_time
            elif not run.begins:
                # `started_at` is in the future if the wall clock was set back after it.
                started = min(run.started_at or started, started)
            due = started + microseconds(options.timeout)
            signals.append(ControlSignal(TIMEOUT_KEY, due, now))
        return signals

    def apply_signal(
        self, entry: Entry, root: FlowTask, on_grace_over: Callable[[Outcome], None]
    ) -> None:
        """Cancels the flow; `on_grace_over` gets the outcome if the flow still runs after its grace
        period.
        """
        if root.done():
            return
        if entry.call_key == CANCEL_KEY:
            self._cancel_reason = orjson.loads(entry.value or b'""')
        else:
            self._timed_out = True
        root.cancel()
        self.is_signalled = True
        if self._grace_timer is None:
            services = self._services
            self._grace_timer = timer_after(
                services.clock,
                services.loop,
                microseconds(self._flow.options.grace),
                lambda: on_grace_over(self.signal_outcome()),
            )

    def refuse(self) -> EndRun | None:
        """Counts a call that the flow made in spite of its cancel. EndRun: too many of them."""
        self.refusals += 1
        return EndRun(self.signal_outcome()) if self.refusals >= MAX_REFUSALS else None

    def signal_outcome(self) -> Outcome:
        if self._timed_out:
            timeout = self._flow.options.timeout or 0.0
            return self._failed(RunTimedOut(self._flow.name, timeout))
        return Cancelled(self._cancel_reason or "the flow cancelled itself")

    # ----------------------------------------------------------------- the flow's own end

    def encode_error(self, error: BaseException) -> bytes:
        """The record of an error that this run's flow raised or will receive."""
        return self._services.encode_error(error, self._flow)

    def flow_outcome(
        self, root: FlowTask, name: str, on_stored: Callable[[], None]
    ) -> Outcome | None:
        """What the end of the flow's first task means; None while a large result is being stored.

        `on_stored` is called when it is. `name` is the run's, for the log.
        """
        if root.cancelled() or self.refusals:
            return self.signal_outcome()  # any other result is a consequence
        error = root.exception()
        if error is None:
            try:
                return self._complete(root.result(), name, on_stored)
            except BaseException as unstorable:  # a result without a form, or a user's class
                if type(root.result()) is CoroutineType:  # why it cannot be encoded
                    lost = returned_unawaited(self._flow.name, root.result())
                    return Failed(self.encode_error(lost))
                return self._failed(unstorable)
        if isinstance(error, TypeError | AttributeError) and "'coroutine'" in str(error):
            error.add_note(
                "A call of a task or a flow returns a coroutine: write `await` before the call to "
                "get its value."
            )
        return self._failed(error)

    def _failed(self, error: BaseException) -> Failed | Retried | Cancelled:
        """The outcome of an execution that ends with this error."""
        record = self.encode_error(error)
        retries = self._flow.options.retries
        is_cancelled = self.is_signalled and not self._timed_out
        if retries.attempts == 1 or is_cancelled or _is_final(error):
            return Failed(record)
        if self.requested_cancel is not None:  # the flow has not received it
            return Cancelled(self.requested_cancel)
        journal = self._journal
        attempt = journal.spent_retries + 1
        delay = retries.delay_after(attempt, error, self._services.rng)
        if delay is None:
            return Failed(record)
        last = journal.retry_note
        number = 1 if last is None else last.attempt + 1
        note = retry_note(number, attempt, retries.attempts, record)
        why = KNOWN_SECRETS.excerpt(error_summary(orjson.loads(record)), MAX_DETAIL)
        reason = f"attempt {attempt} of {retries.attempts} failed: {why}"
        return Retried(note, reason, microseconds(delay))

    def _complete(self, value: Any, name: str, on_stored: Callable[[], None]) -> Outcome | None:
        journal = self._journal
        if self._large_result is None:
            codec, data = self._flow.result.encode(value)
            if len(data) <= OFFLOAD_BYTES:
                return Completed(data, codec, len(journal.unclaimed))
            self._large_result = LargeResult(self._services, name, journal, on_stored)
            self._large_result.store(codec, data)
        return self._large_result.outcome

    @property
    def is_storing(self) -> bool:
        """Whether a large result is being stored."""
        return self._large_result is not None and self._large_result.outcome is None

    def close(self) -> None:
        self.is_closed = True
        if self._grace_timer is not None:
            self._grace_timer.cancel()
            self._grace_timer = None


def _is_final(error: BaseException) -> bool:
    """Whether the error, or one in a group, is one after which no flow is retried."""
    if isinstance(error, BaseExceptionGroup):
        return cast("BaseExceptionGroup[BaseException]", error).subgroup(_FINAL) is not None
    return isinstance(error, _FINAL)


def answer_to_parent(run: Run, name: str, outcome: Outcome) -> Entry | None:
    """The journal entry of the parent that the outcome of a child run is; None where the parent
    waits on.
    """
    call_key = run.parent_call_key
    if run.parent is None or call_key is None:
        return None
    match outcome:
        case Completed(value, codec):
            return Entry(
                call_key=call_key, kind=Kind.VALUE, attempt=run.token, codec=codec, value=value
            )
        case Failed(error):
            return Entry(call_key=call_key, kind=Kind.ERROR, attempt=run.token, error=error)
        case Cancelled(reason):
            error = encode_error(RunCancelled(f"child run {name} was cancelled: {reason}"))
            return Entry(call_key=call_key, kind=Kind.ERROR, attempt=run.token, error=error)
        case _:
            return None


class LargeResult:
    """The encoded result of a flow that is too large for a row; `outcome` is None while it is being
    stored.

    It goes to a file beside the store at once. Where large results are kept elsewhere, it is stored
    off the loop, so that no other flow waits for it: `on_stored` is called then. If that place does
    not answer for a minute, the outcome is `Suspended`, and the run is tried again from its
    journal.
    """

    __slots__ = ("_journal", "_name", "_on_stored", "_services", "outcome")

    def __init__(
        self, services: WorkerServices, name: str, journal: Journal, on_stored: Callable[[], None]
    ) -> None:
        self._services = services
        self._name = name
        self._journal = journal
        self._on_stored = on_stored
        self.outcome: Outcome | None = None

    def store(self, codec: str, data: bytes) -> None:
        """Raises StoreFailed when the disk refuses it."""
        blobs = self._services.blobs
        if blobs.is_remote:
            self._services.spawn(self._upload(codec, data))
        else:
            self._complete(*blobs.offload(codec, data))

    async def _upload(self, codec: str, data: bytes) -> None:
        bound = log.bind(run=self._name)
        try:
            self._complete(*await offload(self._services.blobs, codec, data, bound))
        except ResultsUnavailable:
            self.outcome = retry_later(self._services, self._journal)
        finally:
            self._on_stored()

    def _complete(self, codec: str, data: bytes) -> None:
        self.outcome = Completed(data, codec, len(self._journal.unclaimed))


def retry_later(services: WorkerServices, journal: Journal) -> Outcome:
    """The outcome of a run whose large results cannot be stored or read now."""
    due = services.clock.now() + RESULT_RETRY_DELAY
    return Suspended(due, journal.last_batch, journal.count)
