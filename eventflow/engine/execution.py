"""The executor: one run in memory, from its claim to its one outcome.

    begin    bind the arguments, make the flow's first task on a FlowLoop of its own
    perform  a call of the flow claims its place in the journal and waits (claims.py)
    parked   the flow can go no further: deliver the next batch, else start what is new, else rest
    settle   the flow ended, or every branch waits for long, or somebody said stop: one Outcome, one transaction

The worker makes an Execution per claimed run and is told when it settles. Everything here runs on the worker's loop. Between
two deliveries nothing outside touches the flow, live or replaying: that is the whole of determinism (lineage.py says why). The
next rooms are claims.py and attempt.py, then the store.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextvars import copy_context
from functools import partial
from typing import Any, NoReturn

import orjson

from eventflow.core.clock import SECOND, microseconds
from eventflow.core.errors import RunCancelled, RunTimedOut, StoreError, call_catching
from eventflow.engine.attempts import run_hook
from eventflow.engine.awaitables import ChildCall, EmitCall, ControlSignal, Target
from eventflow.engine.flow_result import Returned
from eventflow.engine.pending_calls import Claims
from eventflow.engine.task_map import Window
from eventflow.engine.worker_services import Pool
from eventflow.events.event import Event
from eventflow.logs.log import Where, get_logger, where
from eventflow.loop.flow_loop import DETACHED_HOST, FlowLoop, FlowTask, FlowTimer
from eventflow.runs.journal import CANCEL, RAN, TIMEOUT, Entry, Journal, Kind, begun_afresh
from eventflow.runs.run import (
    Cancelled,
    Completed,
    Failed,
    Held,
    Interrupted,
    Outcome,
    Restarted,
    Run,
    Suspended,
    format_id,
)
from eventflow.sdk.flow import Flow, RunContext, enter_run
from eventflow.sdk.task import TaskCall
from eventflow.serialization.codecs import encode_error
from eventflow.store.protocol import Refused, Settle

SUSPEND_AFTER = 60 * SECOND
"""A run leaves memory when every branch of it waits at least this long."""
FEW = 16
"""Waiting branches that are looked through at every park; more are looked through once a second."""

log = get_logger("eventflow.executor")


class Execution:
    """One run in memory. `begin` it, `pump` it when told, `interrupt` it on drain; it settles itself."""

    def __init__(self, pool: Pool, run: Run, flow: Flow[..., Any], journal: Journal) -> None:
        self.pool, self.run, self.flow, self.journal = pool, run, flow, journal
        self.name = format_id(run.id)
        self.is_idle = self.settling = self.dirty = False
        self.replaying = journal.last_own > 0
        self.working = 0
        self.here = Where(
            run.id, flow.name, run.event, sink=pool.sink, replaying=self._is_replaying
        )
        self.loop = FlowLoop(self, pool.loop, run.id)
        self.claims = Claims(self, journal)
        self.read_now = self.claims.read_now
        self.append, self.came = self.claims.append, self.claims.came
        self._root: FlowTask | None = None
        self._ending: Outcome | None = None
        self._returned: Returned | None = None
        self._unwound = 0
        self._cancelled: str | None = None
        self._timed_out = False
        self._grace: Any = None
        self._idle_since = 0
        self._check: Any = None
        self._checking = self._spun = self._counted = False
        self._events: list[Event] | None = None

    # ----------------------------------------------------------------- begin

    def begin(self) -> None:
        """Binds the arguments and takes the flow's first steps. Call from a plain callback on the worker's loop."""
        context = copy_context()
        context.run(self._enter)
        coro, error = call_catching(context.run, self._coroutine)
        if coro is None:
            assert error is not None
            self._settle(Failed(encode_error(error)))
            return
        generation = self.journal.generation
        self._root = self.loop.create_root_task(coro, context, f"~{generation}/" if generation else "")
        self._listen_for_orders()
        self.pump()

    def _enter(self) -> None:
        where.set(self.here)
        pool, generation = self.pool, self.journal.generation
        enter_run(
            RunContext(
                self.name, self.flow.name, self._read_events, self._tell_now, pool.state, generation
            )
        )

    def _read_events(self) -> list[Event]:
        if self._events is None:
            run = self.run
            self._events = [
                Event.from_recorded(body)
                for body in run.bodies or ((run.body,) if run.body is not None else ())
            ]
        return self._events

    def _coroutine(self) -> Coroutine[Any, Any, Any]:
        events, binder = self._read_events(), self.flow.binder
        if self.run.params is not None:
            arguments = binder.bind_params(
                orjson.loads(self.run.params), events[-1] if events else None
            )
        elif self.run.mode is not None:
            arguments = binder.bind_events(events)
        else:
            arguments = binder.bind_event(events[0]) if events else {}
        return self.flow.fn(**arguments)

    def _listen_for_orders(self) -> None:
        options = self.flow.options
        if CANCEL in self.journal.finals:
            self.claims.want(ControlSignal(CANCEL))
        if options.timeout is not None:
            started = self.run.started_at or self.claims.began_at
            if options.timeout_counts == "running":
                started = self.claims.began_at - self.journal.ran
            self.claims.want(ControlSignal(TIMEOUT, started + microseconds(options.timeout)))
        if self.run.cancel_requested:
            self.cancel("cancel requested")

    def _tell_now(self) -> int:
        if self.settling or self.loop.is_current():
            return self.read_now()
        return self.claims.now  # what a body asks, nothing will depend on

    def _is_replaying(self) -> bool:
        return self.replaying

    # ----------------------------------------------------------------- calls, as flow code makes them

    async def perform(self, call: TaskCall | ChildCall | EmitCall) -> Any:
        """Waits for a call (task.Caller); its claim is taken already."""
        if self._ending is not None and not self.settling:
            await asyncio.sleep(
                0
            )  # it will be refused; a flow that tries for ever must not do so in one step
        future = self._request(call)
        try:
            return await future
        except BaseException:
            self.claims.give_up(call)
            raise

    def _request(self, call: TaskCall | ChildCall | EmitCall) -> asyncio.Future[Any]:
        if not self.takes():
            raise asyncio.CancelledError(self._ending)
        if type(call) is TaskCall:
            call.context = copy_context()
        return self.claims.request(call, self.loop)

    def perform_all(
        self, name: str, calls: Iterable[TaskCall], limit: int, patient: bool
    ) -> Coroutine[Any, Any, list[Any]]:
        return Window(name, calls, self._request, self.claims.give_up, patient=patient).run(limit)

    def perform_flow(
        self, flow: Flow[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        """A child run and its result (flow.FlowCaller)."""
        return self.perform(
            ChildCall(flow, self.loop.current_scope().call_key(flow.name), flow.binder.unpack(args, kwargs))
        )

    def perform_emit(self, event_type: str, fields: dict[str, Any]) -> Coroutine[Any, Any, str]:
        return self.perform(
            EmitCall(self.loop.current_scope().call_key(f"emit:{event_type}"), event_type, fields)
        )

    async def perform_restart(self, params: dict[str, Any]) -> NoReturn:
        self._end(
            Restarted(
                self.flow.binder.unpack((), params), begun_afresh(self.journal.generation + 1)
            )
        )
        while True:  # until the unwinding's cancel
            await asyncio.Future(loop=self.loop)

    # ----------------------------------------------------------------- the host of a FlowLoop

    def pump(self) -> None:
        """Lets the flow take every step it can."""
        if not self.settling:
            self.safely(self.loop.run_ready)

    def safely(self, step: Callable[..., None], *args: Any) -> None:
        """Calls `step`; what it raises holds this run and says so, hangs nothing, and harms no other run."""
        try:
            step(*args)
        except (
            Exception
        ) as fault:  # around a run: the flow's and the bodies' own exceptions do not come this way
            log.error("run.broken", run=self.name, flow=self.flow.name, exc_info=fault)
            if not self.settling:
                self._settle(
                    Held(
                        f"a fault in eventflow, or in what the app gave it: {type(fault).__name__}: {fault}"
                    )
                )

    def wake(self) -> None:
        self.pool.soon(self)

    def on_callback_error(self, context: dict[str, Any]) -> None:
        log.error(
            "flow.callback_failed",
            run=self.name,
            problem=context.get("message"),
            exc_info=context.get("exception"),
        )

    def on_parked(self) -> bool:
        """Nothing is ready: the one place where the outside reaches the flow."""
        root = self._root
        if self._ending is not None:
            return not self.settling and self._unwind()
        if root is not None and root.done():
            self._ending = self._verdict(root)
            if self._ending is not None:
                return self._unwind()
            self.claims.commit_ahead()  # a large result is on its way out; that may take a while
            return False
        if self.claims.due:
            self.claims.deliver()
            return True
        self.replaying = False
        self.claims.start_all()
        self.rest()
        return False

    def on_busy_loop(self) -> None:
        if not self._spun:
            self._spun = True
            log.warning("flow.spun", run=self.name, flow=self.flow.name)
        if self._ending is not None or self.claims.due:
            self.on_parked()
        else:
            self.claims.start_all()

    def takes(self) -> bool:
        """Whether anything may still be recorded."""
        return self._ending is None and not self.settling

    def final(self) -> bool:
        return self._ending is None or isinstance(
            self._ending, Completed | Failed | Cancelled | Restarted
        )

    def recorded(self, entry: Entry) -> None:
        """A child of this run settled in this process, and its answer is durable."""
        self.safely(self.claims.recorded, entry)

    def set_timer(self, timer: FlowTimer) -> None:
        if self.takes():
            self.claims.want(timer)

    def cancel_timer(self, timer: FlowTimer) -> None:
        self.claims.disarm(timer)

    # ----------------------------------------------------------------- orders from outside

    def cancel(self, reason: str) -> None:
        """A door asks to cancel: recorded, then delivered in its turn."""
        if self.takes() and CANCEL not in self.journal.finals and CANCEL not in self.claims.waiting:
            self.claims.waiting[CANCEL] = ControlSignal(CANCEL)
            self.append(Entry(claim=CANCEL, kind=Kind.CANCEL, value=orjson.dumps(reason)))

    def obey(self, entry: Entry, order: ControlSignal) -> None:
        root = self._root
        if root is None or root.done():
            return
        if order.call_key == CANCEL:
            self._cancelled = orjson.loads(entry.value or b'""')
        else:
            self._timed_out = True
        root.cancel()
        if self._grace is None:
            due = self.pool.clock.now() + microseconds(self.flow.options.grace)
            self._grace = self.pool.clock.timer(self.pool.loop, due, self._grace_is_over)

    def _grace_is_over(self) -> None:
        self.stop(self._stopped())

    def interrupt(self) -> None:
        """Drain: bodies under way are cancelled, nothing is recorded of them, the run goes back to pending."""
        self.stop(Interrupted())

    def abandon(self) -> None:
        """The store is gone: cancel everything, record nothing, tell nobody."""
        if not self.settling:
            self._finish_up()

    def lost(self, reply: Refused | StoreError) -> None:
        """The store refuses an entry. If the lease is gone it refuses the outcome too; else a person must look."""
        reason = str(getattr(reply, "reason", reply))
        log.warning("run.lost", run=self.name, reason=reason)
        if isinstance(reply, Refused) or self.pool.store.failed is None:
            self.stop(Held(f"the store refused an entry: {reason}"))
        elif not self.settling:
            self._finish_up()
            self.pool.settled(self, Interrupted(), reply)

    def hold(self, reason: str) -> None:
        """A person must look."""
        self.stop(Held(reason))

    def stop(self, outcome: Outcome) -> None:
        if self.takes():
            self._end(outcome)

    # ----------------------------------------------------------------- waiting for long

    def rest(self) -> None:
        """Parked with nothing to do now: idle runs give up their slot, long sleepers their memory."""
        idle = self.working == 0
        if idle is not self.is_idle:
            self.is_idle = idle
            self._idle_since = self.pool.clock.now() if idle else 0
            self.pool.idle(self, idle)
        if (
            not idle
            or self.loop.unjournaled_awaits
            or self.claims.due
            or self._grace is not None
            or self.pool.draining
        ):
            return
        if not self.claims.waiting or (
            self.journal.orphans and self.claims.waiting.keys() <= {TIMEOUT}
        ):
            self._stuck()
        elif len(self.claims.waiting) <= FEW:
            self._consider_suspending()
        else:
            self._check_at(self.pool.clock.now() + SECOND)

    def _awaits_child(self) -> bool:
        return any(type(target) is ChildCall for target in self.claims.waiting.values())

    def _check_at(self, due: int) -> None:
        if not self._checking:
            self._checking = True
            self._check = self.pool.clock.timer(self.pool.loop, due, self._check_later)

    def _check_later(self) -> None:
        self._checking = False
        if (
            self.takes()
            and self.is_idle
            and not self.claims.due
            and self.working == 0
            and not self.loop.is_ready()
        ):
            self._consider_suspending()

    def _consider_suspending(self) -> None:
        due = min(
            (d for t in self.claims.waiting.values() if (d := self._due(t)) is not None),
            default=None,
        )
        now = self.pool.clock.now()
        if due is not None and due - now < SUSPEND_AFTER:
            return
        if (
            self._awaits_child()
            and not self.pool.is_crowded
            and now < self._idle_since + SUSPEND_AFTER
        ):
            self._check_at(
                self._idle_since + SUSPEND_AFTER
            )  # most children are quick: coming back would cost a replay
            return
        if self._counts_memory() and not self._counted:
            self._counted = True
            self._note_time_in_memory()  # its commit brings us back here
        else:
            self._end(Suspended(due, self.journal.last_batch, self.journal.count))

    def _due(self, target: Target) -> int | None:
        match target:
            case FlowTimer():
                return target.due
            case ControlSignal():
                return None if self._counts_memory() else target.due
            case TaskCall():
                return self.journal.attempts(target.call_key)[2]
            case _:
                return None

    def _counts_memory(self) -> bool:
        return (
            self.flow.options.timeout_counts == "running" and self.flow.options.timeout is not None
        )

    def _note_time_in_memory(self) -> None:
        ran = self.journal.ran + self.pool.clock.now() - self.claims.began_at
        self.append(
            Entry(claim=RAN, kind=Kind.NOTE, attempt=self.journal.ran_notes + 1, due_at=ran)
        )

    def _stuck(self) -> None:
        orphans = sorted(self.journal.orphans)
        if orphans:
            shown = ", ".join(orphans[:5]) + (" …" if len(orphans) > 5 else "")
            what = f"diverged: the flow no longer makes the recorded calls {shown}"
            self.hold(f"{what}; deploy the code that made them, or retry afresh")
        else:
            self.hold(
                "the flow waits for something that no task, sleep or child run of it will bring about"
            )

    # ----------------------------------------------------------------- settling

    def _end(self, outcome: Outcome) -> None:
        if self._ending is None:
            self._ending = outcome
            self.replaying = self.replaying or not isinstance(
                outcome, Completed | Failed | Cancelled | Restarted
            )
            self.wake()

    def _verdict(self, root: FlowTask) -> Outcome | None:
        """What the flow's own end means; None while its result is on its way out."""
        if root.cancelled():
            return self._stopped()
        error = root.exception()
        if error is None:
            outcome, error = call_catching(self._return, root.result())
            if error is None:
                return outcome
        return Failed(encode_error(error))

    def _return(self, value: Any) -> Outcome | None:
        if self._returned is None:
            self._returned = Returned(self, *self.flow.result.encode(value))
        return self._returned.outcome

    def _stopped(self) -> Outcome:
        if self._timed_out:
            return Failed(
                encode_error(RunTimedOut(self.flow.name, self.flow.options.timeout or 0.0))
            )
        return Cancelled(self._cancelled or "the flow cancelled itself")

    def _unwind(self) -> bool:
        """Cancels what is left of the flow, a few times, then closes it; then settles. Journaled calls re-raise meanwhile."""
        left = self.loop.unfinished_tasks()
        if left and self._unwound < 3:
            self._unwound += 1
            for task in left:
                task.cancel()
            return True
        outcome = self._ending
        assert outcome is not None
        self._settle(outcome)
        return False

    def _settle(self, outcome: Outcome) -> None:
        self._ending = outcome
        ahead = self.claims.take_ahead()
        if isinstance(outcome, Interrupted) and self._counts_memory() and not self._counted:
            self._note_time_in_memory()
        self._finish_up()
        run = self.run
        op = Settle(run.id, run.token, outcome, self._parents_entry(outcome), run.parent, ahead)
        self.pool.store.post(op, partial(self.pool.settled, self, outcome), self.pool.loop)

    def _finish_up(self) -> None:
        """Nothing more is taken in: bodies are cancelled, timers disarmed, the loop closed, the slot given back."""
        self.settling = True
        self.claims.close()
        for timer in (self._grace, self._check):
            if timer is not None:
                timer.cancel()
        self.loop.close()
        self.here.close()
        self.pool.ending(self)

    def part(self) -> None:
        """The run has left memory: lets go of all that points back here, so that it is freed at once and the garbage collector
        finds nothing of it. Bodies that were left behind may still ask for the time."""
        now = self.claims.now
        self.read_now = lambda: now
        self.loop.host = DETACHED_HOST
        self.here.replaying = None
        self._root = self._grace = self._check = None
        del self.claims, self.append, self.came

    def hook(self, hook: Callable[..., Any], *args: Any) -> Coroutine[Any, Any, None]:
        """A hook of the flow, to be told of the outcome by the worker."""
        return run_hook(self.name, hook, *args)

    def _parents_entry(self, outcome: Outcome) -> Entry | None:
        claim, attempt = self.run.parent_claim, self.run.token
        if self.run.parent is None or claim is None:
            return None
        match outcome:
            case Completed(value, codec):
                return Entry(
                    claim=claim, kind=Kind.VALUE, attempt=attempt, codec=codec, value=value
                )
            case Failed(error):
                return Entry(claim=claim, kind=Kind.ERROR, attempt=attempt, error=error)
            case Cancelled(reason):
                error = encode_error(RunCancelled(f"child run {self.name} was cancelled: {reason}"))
                return Entry(claim=claim, kind=Kind.ERROR, attempt=attempt, error=error)
            case _:
                return None
