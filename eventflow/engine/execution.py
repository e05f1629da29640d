"""One run in memory, from its claim to its one outcome.

    begin        bind the arguments; make the flow's first task on a FlowLoop; step it
    on_parked    no step is ready: deliver the next batch, else start what is new, else rest
    carry_out    what the run's objects decided (actions.py) takes effect, in this one place
    _settle      close the run, post its outcome; `Worker` detaches it when the store has replied

`Worker` makes an Execution per run that it takes. Everything here runs on the worker's loop.
Between two deliveries nothing outside reaches the flow, live or replaying: that makes it
deterministic (loop/flow_loop.py). The parts of a run (run_parts.py) can be read alone:
pending_calls.py (what the run waits for), journal_writer.py (what it records), attempts.py (task
bodies), suspension.py (when it leaves memory), run_end.py (how it ends). So can the base classes:
flow_calls.py (what flow code calls) and calls.py (how a call is answered).
"""

import logging
from collections.abc import Callable, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any, assert_never

import orjson

from eventflow.core.clock import read_moment, timer_at
from eventflow.core.errors import StoreError, error_line
from eventflow.engine.actions import (
    AbandonAttempt,
    Action,
    AppendEntry,
    CancelChild,
    CancelTimer,
    EndRun,
    PublishEvent,
    RecordValue,
    ReportFault,
    ReportFenced,
    SetTimer,
    StartAttempt,
    StartChild,
)
from eventflow.engine.awaitables import ControlSignal
from eventflow.engine.flow_calls import FlowCalls
from eventflow.engine.journal_writer import Reply
from eventflow.engine.lost_calls import report_lost_calls
from eventflow.engine.run_end import answer_to_parent
from eventflow.engine.run_parts import SETTLED_LOOP
from eventflow.engine.worker_services import WorkerServices
from eventflow.logs.log import get_logger
from eventflow.loop.flow_loop import DETACHED_HOST, FlowTask, FlowTimer
from eventflow.runs.journal import CANCEL_KEY, TIMEOUT_KEY, Entry, Journal, Kind
from eventflow.runs.run import (
    Completed,
    Failed,
    Interrupted,
    NeedsAttention,
    Outcome,
    Run,
)
from eventflow.sdk.flow import Flow
from eventflow.sdk.task import TaskCall
from eventflow.serialization.blobs import OFFLOAD_BYTES
from eventflow.store.protocol import Appended, Arrival, Fenced, Settle, Settled

LONG_JOURNAL = 10_000
"""Entries at which a warning asks for `restart_with`: every resume reads all of them."""

MAX_UNWIND_ROUNDS = 3
"""Times that the unfinished tasks of a flow are cancelled before their coroutines are closed."""

log = get_logger("eventflow.execution")
LOG_EVENTS = {
    "flow.busy_loop": "A flow polls without waiting; a replay may see results in another order.",
    "run.fenced": (
        "The store refused a write for a run: the run was claimed again, or storage failed."
    ),
    "run.internal_error": (
        "A defect in eventflow, or in an object of the app, stopped a run; the run is held."
    ),
    "journal.long": "The journal of a run has 10,000 entries; every resume reads all of it.",
}


OnSettled = Callable[["Execution", Outcome, Settled | Fenced | StoreError], None]


class Execution(FlowCalls):
    """One run in memory. It settles itself, and then calls `on_settled` with the store's reply."""

    def __init__(
        self,
        services: WorkerServices,
        run: Run,
        flow: Flow[..., Any],
        journal: Journal | None,
        on_settled: OnSettled,
    ) -> None:
        """`journal`: None if nothing of the run is recorded yet."""
        self._on_settled = on_settled
        self.has_flow_slot = True
        """Whether it counts for its flow's `concurrency`."""
        self._awaits_flow_slot = False
        self.root: FlowTask | None = None
        super().__init__(services, run, flow, journal)

    # ----------------------------------------------------------------- stepping the flow (LoopHost)

    def begin(self) -> None:
        """Binds the arguments and takes the flow's first steps.

        Call it from a plain callback on the worker's loop.
        """
        context = copy_context()
        try:
            coro = context.run(self.make_coroutine)
        except BaseException as error:  # the arguments cannot be bound, or a user's class raised
            self._settle(Failed(self.run_end.encode_error(error)))
            return
        generation = self.pending.journal.generation if self.has_parts else 0
        path = f"~{generation}/" if generation else ""
        self.root = self.loop.create_root_task(coro, context, path)
        if self.flow.options.timeout is not None:
            self.suspension.begin_count()
        if self.has_parts:
            for signal in self.run_end.initial_signals(self.run, self.pending.now):
                self.request(signal)
        if self.run.cancel_requested:
            self.cancel(self.run.cancel_reason or "cancel requested")
        self.guarded(self.loop.run_ready)

    def step(self) -> None:
        """Takes every step that the flow can take now."""
        if not self.run_end.is_closed:
            self.guarded(self.loop.run_ready)

    def wake(self) -> None:
        """Steps in the loop's next turn: by then every reply of the batch under way was given."""
        if self.has_flow_slot or self._may_work():
            self.services.next_turn.schedule(self.step)

    def _may_work(self) -> bool:
        """Whether a run that waited, and released its slot to others of its flow, may work again.
        If not, it is woken when it has a slot. The end of a run needs none.
        """
        finals = self.pending.journal.finals
        if not self.run_end.is_open or CANCEL_KEY in finals or TIMEOUT_KEY in finals:
            return True
        limit = self.flow.options.concurrency
        if not self._awaits_flow_slot and limit is not None:
            self.has_flow_slot = self.services.limits.flow_slots.take(
                self.flow.name, limit, self._on_flow_slot
            )
            self._awaits_flow_slot = not self.has_flow_slot
        return self.has_flow_slot

    def _on_flow_slot(self) -> None:
        self.has_flow_slot = True
        self._awaits_flow_slot = False
        if self.run_end.is_closed:
            self._release_flow_slot()
        else:
            self.wake()

    def _release_flow_slot(self) -> None:
        self.has_flow_slot = False
        self.services.limits.flow_slots.release(self.flow.name, self.flow.options.concurrency)

    def guarded(self, call: Callable[..., None], *args: Any) -> None:
        """Calls `call`; an exception holds this run and harms no other."""
        try:
            call(*args)
        except (
            BaseException
        ) as fault:  # around a run: exceptions of the flow and of bodies end elsewhere
            self.carry_out(ReportFault(fault))

    def on_parked(self) -> bool:
        """The one place where the outside reaches the flow. True: it has steps to take again."""
        root = self.root
        if not self.has_parts and root is not None and root.done() and self._settle_at_once(root):
            return False
        end = self.run_end
        if end.outcome is None and root is not None and root.done():
            end.outcome = end.flow_outcome(root, self.run_id, self.wake)
            if end.outcome is None:  # a large result is being stored, which may take a while
                self.writer.commit_uncommitted()
                return False
            if end.unawaited or self.pending.waiting:
                end.outcome = report_lost_calls(
                    end.outcome,
                    self.log_context,
                    self.pending.waiting.values(),
                    end.unawaited if self.services.strict else None,
                )
        if end.outcome is not None:
            return self._unwind(end.outcome)
        if self.pending.answers:
            for _, _, entry, target in self.pending.next_batch():
                self.deliver(entry, target)
            return True
        self.pending.is_replaying = False
        cleanup = self.loop.cleanup
        if cleanup is not None and root is not None and cleanup.take_wait(root):
            root.cancel()  # it has swallowed its cancel, and waits as before
            if (action := end.refuse()) is not None:
                self.carry_out(action)
            return True
        self._start_new()
        self.rest()
        return False

    def on_busy_loop(self) -> None:
        if not self.loop.has_busy_looped:
            log.log_line("flow.busy_loop", logging.WARNING, {}, self.log_context)
        if self.run_end.outcome is not None or self.pending.answers:
            self.on_parked()
        else:
            self._start_new()

    def _start_new(self) -> None:
        """Starts new calls, unless the worker drains.

        A value that the flow has before its commit is made durable first. Emissions have no effect
        before their commit, so they share it; a replay delivers the value first all the same.
        """
        writer = self.writer
        pending = self.pending
        if writer.uncommitted is None:
            # A cancel that is being recorded comes before anything new.
            if (
                pending.unstarted
                and not self.services.draining
                and CANCEL_KEY not in pending.waiting
            ):
                for action in pending.start_new(partial(read_moment, self.services.clock)):
                    self.carry_out(action)
        elif not writer.is_committing:
            emissions: Sequence[AppendEntry] = ()
            if (
                pending.unstarted
                and not self.services.draining
                and (calls := pending.start_emissions())
            ):
                emissions = [self.emission(call) for call in calls]
            writer.commit_uncommitted(emissions)

    def rest(self, recheck: bool = False) -> None:
        """Parked, with nothing to deliver and nothing to start: an idle run gives up its slot, and
        in time its memory. `recheck`: called by a timer of `Suspension`.
        """
        suspension = self.suspension
        draining = self.services.draining
        if recheck and (not self.run_end.is_open or self.loop.is_ready()):
            return
        idle = not (self.attempts.running or self.writer.in_flight or self.run_end.is_storing)
        if idle is not suspension.is_idle:
            suspension.set_idle(idle)
            if idle and draining:
                self.end_run(Interrupted())
        if idle and self.has_flow_slot and self.flow.options.concurrency is not None:
            self._release_flow_slot()
        if (
            idle
            and not draining
            and not self.loop.unjournaled_awaits
            and not self.pending.answers
            and not self.run_end.is_signalled
            and (action := suspension.decide(scan_all=recheck)) is not None
        ):
            self.carry_out(action)

    # ----------------------------------------------------------------- carrying out

    def carry_out(self, action: Action) -> None:
        services = self.services
        match action:
            case StartAttempt():
                self.attempts.launch(action.call)
            case RecordValue():
                self._record_value(action.entry, action.arrivals)
            case AppendEntry():
                self.writer.append(action.entry, action.arrivals)
            case SetTimer(target, due):
                clock = services.clock
                since = target.since or read_moment(clock)
                fire = partial(self._on_timer, target)
                target.handle = timer_at(clock, services.loop, due, since, fire)
            case CancelTimer(handle):
                handle.cancel()
            case AbandonAttempt(call):
                self.attempts.abandon(call)
            case PublishEvent(call):
                emission = self.emission(call)
                self.writer.append(emission.entry, emission.arrivals)
            case StartChild(call):
                child = services.derived.child_run(self.run, call.call_key, call.flow, call.params)
                entry = Entry(call_key=call.call_key, kind=Kind.CHILD, value=b"%d" % child.id)
                entry.fingerprint = call.fingerprint
                self.writer.append(entry, children=(child,))
            case CancelChild(started):
                if not self.run_end.will_resume:  # else a later execution makes the call again
                    reason = f"the call in {self.run_id} was cancelled"
                    services.cancel_child(started, reason, self.run.token)
            case EndRun(outcome):
                self.end_run(outcome)
            case ReportFenced(reply):
                reason = str(getattr(reply, "reason", reply))
                log.log_line("run.fenced", logging.WARNING, {"reason": reason}, self.log_context)
                if isinstance(reply, Fenced) or services.store.failed is None:
                    # If the claim is gone, the outcome is refused too; else a person must look.
                    self.end_run(NeedsAttention(f"the store refused an entry: {reason}"))
                elif not self.run_end.is_closed:
                    self.close()
                    self._on_settled(self, Interrupted(), reply)
            case ReportFault(fault):
                fields = {"exc_info": fault}
                log.log_line("run.internal_error", logging.ERROR, fields, self.log_context)
                what = error_line(fault)
                outcome = NeedsAttention(
                    f"a defect in eventflow, or in an object of the app: {what}"
                )
                if self.loop.is_stepping:  # its coroutines cannot be closed now
                    self.end_run(outcome)
                elif not self.run_end.is_closed:
                    self._settle(outcome)
            case _:
                assert_never(action)

    def _record_value(self, entry: Entry, arrivals: Sequence[Arrival]) -> None:
        """Records a body's value; delivers it before its commit if a replay will deliver it alone.

        That is so if it will be alone in its commit: nothing else of the run is under way.
        """
        if (
            arrivals
            or self.attempts.running
            or self.services.draining
            or not self.pending.is_only(entry.call_key)
            or not self.writer.keep_uncommitted(entry)
        ):
            self.writer.append(entry, arrivals)
            return
        # The flow's time from here on, so the store keeps it.
        entry.at = max(self.pending.now, self.services.clock.now())
        self.pending.deliver_uncommitted(entry)
        if not self.loop.is_running():  # else the flow receives it when this step ends
            self.wake()

    def _on_timer(self, target: TaskCall | FlowTimer | ControlSignal) -> None:
        if target.call_key not in self.pending.waiting:
            return
        if not isinstance(target, TaskCall):
            entry = Entry(call_key=target.call_key, kind=Kind.TIMER, due_at=target.due)
            # Also if the wall clock was set back, the flow's time reaches the due time.
            entry.at = max(self.services.clock.now(), target.due or 0)
            self.writer.append(entry)
        elif not self.run_end.is_open or self.services.draining:
            return
        elif self.has_flow_slot:
            self.attempts.launch(target)
            self.rest()
        else:
            self.pending.unstarted.append(target)
            self.wake()

    # ----------------------------------------------------------------- from the store and the
    # worker

    def on_appended(self, reply: Reply) -> None:
        if isinstance(reply, Appended):
            for entry in reply.entries:
                self.guarded(self.on_durable, entry)
        elif not self.run_end.is_closed:
            self.carry_out(ReportFenced(reply))

    def on_durable(self, entry: Entry) -> None:
        """An entry of this run is durable: its own, or the answer of a child that settled here."""
        pending = self.pending
        action = pending.record(entry)
        if pending.journal.count == LONG_JOURNAL:
            fields = {"entries": LONG_JOURNAL}
            log.log_line("journal.long", logging.WARNING, fields, self.log_context)
        if entry.kind is Kind.VALUE and self.services.checkpoints.is_used:
            self.services.forget_checkpoints(self.run_id, entry.call_key)
        if action is not None:
            self.carry_out(action)
        if entry.kind is not Kind.FAILED or not self.attempts.running:
            self.wake()  # else the flow has nothing to receive, and the run does not rest

    def cancel(self, reason: str) -> None:
        """Records a cancel, which is then delivered in its turn."""
        pending = self.pending
        if (
            self.run_end.is_open
            and CANCEL_KEY not in pending.journal.finals
            and CANCEL_KEY not in pending.waiting
        ):
            self.run_end.requested_cancel = reason
            pending.expect(ControlSignal(CANCEL_KEY))
            self.writer.append(
                Entry(call_key=CANCEL_KEY, kind=Kind.CANCEL, value=orjson.dumps(reason))
            )

    # ----------------------------------------------------------------- the end

    def end_run(self, outcome: Outcome) -> None:
        """Ends the run, unless it is ending already: its flow unwinds, then it settles.

        With `Interrupted` (a drain) it goes back to pending, and nothing of running bodies is kept.
        """
        if self.run_end.is_open:
            self.run_end.outcome = outcome
            self.wake()

    def _unwind(self, outcome: Outcome) -> bool:
        """Cancels the flow's unfinished tasks, a few times, then settles. Journaled calls in their
        `finally` blocks raise CancelledError again.
        """
        if self.run_end.is_closed:
            return False
        unfinished = self.loop.unfinished_tasks()
        if unfinished and self.run_end.unwind_rounds < MAX_UNWIND_ROUNDS:
            self.run_end.unwind_rounds += 1
            for task in unfinished:
                task.cancel()
            return True
        self._settle(outcome)
        return False

    def _settle(self, outcome: Outcome) -> None:
        """Closes the run and posts its outcome, in one commit with an uncommitted value."""
        run = self.run
        services = self.services
        self.run_end.outcome = outcome
        uncommitted = self.writer.pop_uncommitted()
        if isinstance(outcome, Interrupted) and (note := self.suspension.record_time()) is not None:
            self.carry_out(note)
        self.close()
        to_parent = answer_to_parent(run, self.run_id, outcome)
        op = Settle(run.id, run.token, outcome, to_parent, run.parent, uncommitted)
        services.posts.post(op, partial(self._on_settled, self, outcome))

    def _settle_at_once(self, root: FlowTask) -> bool:
        """Settles a run without parts. False: its end needs them."""
        if self.loop.has_made_tasks or root.cancelled() or root.exception() is not None:
            return False
        try:
            codec, data = self.flow.result.encode(root.result())
        except BaseException:  # it is encoded again, and the error is the outcome
            return False
        if len(data) > OFFLOAD_BYTES:
            return False
        run = self.run
        services = self.services
        outcome = self.settled_as = Completed(data, codec)
        self.loop.close()
        self.log_context.close()
        services.limits.slots.begin_commit(holds_slot=True)
        to_parent = None
        if run.parent is not None:
            to_parent = answer_to_parent(run, self.run_id, outcome)
        entries = (self.first_call,) if isinstance(self.first_call, Entry) else ()
        op = Settle(run.id, run.token, outcome, to_parent, run.parent, entries)
        services.posts.post(op, partial(self._on_settled, self, outcome))
        self.detach()
        return True

    def close(self) -> None:
        """Cancels bodies and timers, closes the flow's coroutines, releases the slot. Idempotent.

        The worker calls it when the store failed: then nothing is recorded.
        """
        if self.run_end.is_closed:
            return
        self.run_end.outcome = self.run_end.outcome or Interrupted()
        self.run_end.close()
        for action in self.pending.close():
            self.carry_out(action)
        self.suspension.close()
        self.loop.close()
        self.log_context.close()
        self.services.limits.slots.begin_commit(holds_slot=not self.suspension.is_idle)

    def detach(self) -> None:
        """Breaks reference cycles, so that the run is freed without the garbage collector.

        Abandoned task bodies may still read the clock: `pending` stays.
        """
        self.loop.host = DETACHED_HOST
        self.log_context.replaying = None
        self.root = None
        if self.has_parts:
            del self.writer, self.attempts, self.suspension
        else:
            self.loop = SETTLED_LOOP
