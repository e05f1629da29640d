"""Attempts: the bodies of one run's calls on the worker's loop, bounded in time and number, and what is recorded of each.

    launch     a copy of the call's context, an asyncio task of its own
    bounded    the task's concurrency, the gate for suspects of a crash, the attempt's timeout
    ended      value → VALUE · error → FAILED with the next due time, or ERROR when it was the last · abandoned → nothing

The executor launches a call's attempt once its claim is not in the journal. What an abandoned body still returns is refused. A
body that ignores its cancel is asked `ASKS` times and then left behind; a thread cannot be stopped at all and keeps its slot
until it ends. What is recorded comes back to the executor by its commit.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Future as ThreadFuture
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from typing import Any, Protocol

from eventflow.core.clock import Clock, microseconds
from eventflow.core.errors import StoreError, TaskTimedOut, call_catching
from eventflow.engine.worker_services import Pool
from eventflow.logs.log import Where, get_logger, where
from eventflow.loop.flow_loop import leave_flow
from eventflow.runs.journal import Entry, Kind
from eventflow.runs.run import DEATHS, Run
from eventflow.sdk.checkpoint import enter_checkpoints
from eventflow.sdk.task import TaskCall, TaskContext, enter_task, task_context
from eventflow.serialization.blobs import LARGE, offload
from eventflow.serialization.codecs import encode_error
from eventflow.store.protocol import Append, Appended, Arrival, Mark, Refused

ASKS = 3
"""Times a body is asked to stop, `ASK_EVERY` seconds apart, before it is left behind."""
ASK_EVERY = 1.0

log = get_logger("eventflow.attempt")


class Host(Protocol):
    """What attempts need of their run's execution."""

    pool: Pool
    run: Run
    name: str
    here: Where
    working: int
    """Bodies and appends under way: while there are any, the run is not idle."""

    def takes(self) -> bool:
        """Whether what an attempt comes to may still be recorded."""
        ...

    def append(self, entry: Entry, arrivals: Iterable[Arrival] = ()) -> None: ...

    def came(self, entry: Entry, arrivals: Iterable[Arrival] = ()) -> None:
        """`append` for a body's value, and the events that its success publishes."""
        ...

    def safely(self, step: Callable[..., None], *args: Any) -> None:
        """Calls `step`; what it raises is a fault that holds the run."""
        ...

    def lost(self, reply: Refused | StoreError) -> None:
        """The store refuses: nothing more may be written."""
        ...

    def interrupt(self) -> None:
        """Stop without an outcome."""
        ...


class Attempts:
    """Launches and ends the attempts of one run. Everything here runs on the worker's loop."""

    __slots__ = ("_host", "_marking")

    def __init__(self, host: Host) -> None:
        self._host = host
        self._marking: asyncio.Future[Any] | None = None

    @property
    def marked(self) -> bool:
        """Whether a start was journaled in this life: then what is recorded from here on must clear it."""
        return self._marking is not None

    def launch(self, call: TaskCall) -> None:
        """Starts the next attempt of a call; its body takes its first step in the loop's next turn."""
        host = self._host
        call.attempt += 1
        call.running, call.thread = True, None
        host.working += 1
        # What a body sets in its context, the next attempt's must not see.
        context: Context = (
            call.context.copy() if call.task.options.retries.attempts > 1 else call.context
        )
        context.run(self._enter, call)
        # Not loop.create_task: an eager task factory would run the body here, inside the flow's own step.
        call.handle = asyncio.Task(self._attempt(call), loop=host.pool.loop, context=context)

    def abandon(self, call: TaskCall) -> None:
        """The call is given up: its body is cancelled, nothing of it is recorded from here on."""
        handle = call.handle
        if handle is not None:
            handle.cancel()
            if self._ended(call):
                self._let_go(handle)

    def _enter(self, call: TaskCall) -> None:
        host, name = self._host, call.task.name
        leave_flow()
        where.set(host.here.during(name, call.attempt))
        call.body = TaskContext(
            host.name, name, call.attempt, f"{host.name}/{call.call_key}", None, call.fingerprint
        )
        enter_task(call.body)
        enter_checkpoints(host.pool.checkpoints, self._came_further if host.run.suspect else None)

    async def _attempt(self, call: TaskCall) -> None:
        """Runs one body and records what came of it. Whatever it raises ends here."""
        me: asyncio.Task[Any] = call.handle
        host = self._host
        try:
            value = await self._body(call)
            codec, data = call.task.result.encode(value, key=host.pool.secret)
            if len(data) > LARGE:
                codec, data = await offload(
                    host.pool.blobs, codec, data, log.bind(run=host.name, task=call.task.name)
                )
            context = task_context()
            emitted = context.success_events if context is not None else None
            arrivals = (
                [host.pool.emitted(host.run, *fields) for fields in emitted] if emitted else ()
            )
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except (
            BaseException
        ) as error:  # around an attempt: its failure is recorded, and retried if its Retry says so
            if call.handle is not me or not host.takes():
                pass  # Abandoned (cancelled by the flow, by a drain, or left behind): it is nobody's any more.
            elif isinstance(error, asyncio.CancelledError) and me.cancelling():
                host.interrupt()  # Neither the flow nor a timeout asked: the loop itself is being taken down.
            else:
                host.safely(self._failed, call, error)
        else:
            if call.handle is me and host.takes():
                host.safely(self._succeeded, call, value, codec, data, arrivals)
        finally:
            if (here := where.get()) is not None and here.tails:
                here.close()

    # ----------------------------------------------------------------- bounds

    def _body(self, call: TaskCall) -> Awaitable[Any]:
        """The body within the limits set for it."""
        slots = self._host.pool.slots(call)
        if slots is None and not self._host.run.suspect:
            return self._timed(call)
        return self._bounded(call, slots)

    async def _bounded(self, call: TaskCall, slots: asyncio.Semaphore | None) -> Any:
        if slots is None:
            return await self._gated(call)
        await slots.acquire()
        try:
            return await self._gated(call)
        finally:
            if call.thread is None:
                slots.release()
            else:  # also when it ended long ago
                release = partial(_tell, self._host.pool.loop, slots.release)
                call.thread.add_done_callback(lambda _: release())  # pyright: ignore[reportUnknownLambdaType]

    async def _gated(self, call: TaskCall) -> Any:
        """Those suspected of killing the process run few at a time, with their start on record; a death from the end, alone."""
        run, gate = self._host.run, self._host.pool.suspects
        if not run.suspect:
            return await self._timed(call)
        async with gate.exclusive() if run.deaths >= DEATHS - 1 else gate:
            if run.suspect:  # not cleared while it waited here, by another of its calls
                await self._mark()
            return await self._timed(call)

    async def _mark(self) -> None:
        """Makes the start of a suspect's attempts durable before any body: a death from here on counts against it, once."""
        host = self._host
        if self._marking is None:
            self._marking = host.pool.loop.create_future()
            host.pool.store.post(
                Mark(host.run.id, host.run.token), self._marking.set_result, host.pool.loop
            )
        reply = await asyncio.shield(self._marking)
        if not isinstance(reply, Appended):
            host.lost(reply)
            raise asyncio.CancelledError("lost the lease")

    def _came_further(self) -> None:
        """A suspect's body saved more than any before it did: the deaths so far were not its doing. From any thread."""
        _tell(self._host.pool.loop, self._clear)

    def _clear(self) -> None:
        host = self._host
        if host.run.suspect and host.takes():
            host.pool.store.post(
                Append(host.run.id, host.run.token, (), proof=True), self._cleared, host.pool.loop
            )

    def _cleared(self, reply: Appended | Refused | StoreError) -> None:
        if isinstance(reply, Appended):
            self._host.run.suspect = False
        elif self._host.takes():
            self._host.lost(reply)

    def _timed(self, call: TaskCall) -> Awaitable[Any]:
        pool, timeout = self._host.pool, call.task.options.timeout
        if timeout is not None:
            return _within(call, timeout, pool, partial(self._deaf, call, call.attempt))
        if call.task.is_async:
            return call.task.fn(*call.args, **call.kwargs)
        return _in_thread(call, pool)

    def _deaf(self, call: TaskCall, attempt: int) -> None:
        """A body did not listen when its time was up: record the timeout, leave it behind, refuse what it still returns."""
        if call.running and call.attempt == attempt and self._host.takes():
            log.error("task.abandoned", run=self._host.name, task=call.task.name, attempt=attempt)
            handle = call.handle
            self._host.safely(
                self._failed, call, TaskTimedOut(call.task.name, call.task.options.timeout or 0.0)
            )
            self._let_go(handle)

    def _let_go(self, handle: asyncio.Task[Any]) -> None:
        """The loop holds its tasks weakly: somebody must hold this one until it has ended."""
        pool = self._host.pool
        pool.loop.call_soon(pool.spawn, _outlast(handle), context=Context())

    # ----------------------------------------------------------------- what came of it

    def _ended(self, call: TaskCall) -> bool:
        if not call.running:
            return False
        call.running = False
        call.handle = None
        if call.body is not None:
            call.body.is_over = True
        self._host.working -= 1
        return True

    def _succeeded(
        self, call: TaskCall, value: Any, codec: str, data: bytes, arrivals: Iterable[Arrival]
    ) -> None:
        self._ended(call)
        entry = Entry(
            claim=call.call_key,
            kind=Kind.VALUE,
            attempt=call.attempt,
            fingerprint=call.fingerprint,
            codec=codec,
            value=data,
        )
        self._host.came(entry, arrivals)
        if call.task.options.on_success is not None:
            self._run_hook(call.task.options.on_success, value)

    def _failed(self, call: TaskCall, error: BaseException) -> None:
        self._ended(call)
        host, options = self._host, call.task.options
        call.spent += 1
        delay = options.retries.delay_after(call.spent, error, host.pool.draw)
        text, _ = call_catching(str, error)
        log.warning(
            "task.attempt_failed", run=host.name, task=call.task.name, attempt=call.attempt, retry_in=_shown(delay),
            error=f"{type(error).__name__}: {text}",
        )  # fmt: skip
        entry = Entry(
            claim=call.call_key, kind=Kind.ERROR if delay is None else Kind.FAILED, attempt=call.attempt,
            fingerprint=call.fingerprint, error=encode_error(error),
        )  # fmt: skip
        arrivals: list[Arrival] = []
        if delay is None:
            for fields in (call.body and call.body.failure_events) or ():
                arrival, _ = call_catching(host.pool.emitted, host.run, *fields)
                arrivals += (
                    [arrival] if arrival is not None else []
                )  # refused: the chain of events is too long already
            self._run_hook(options.on_failure, error)
        else:
            entry.due_at = host.pool.clock.now() + microseconds(delay)
            self._run_hook(options.on_retry, error, delay)
        host.append(entry, arrivals)
        if delay == 0 and not host.pool.draining:
            self.launch(call)

    def _run_hook(self, hook: Callable[..., Any] | None, *args: Any) -> None:
        if hook is not None:
            self._host.pool.spawn(run_hook(self._host.name, hook, *args))


def _shown(delay: float | None) -> float | None:
    return None if delay is None else round(delay, 3)


async def run_hook(run: str, hook: Callable[..., Any], *args: Any) -> None:
    """Calls a user's hook after the fact, in the order of nothing else; plain or async. It changes nothing."""
    try:
        result = hook(*args)
        if asyncio.iscoroutine(result):
            await result
    except Exception as error:  # around a hook: what it is told of has happened already
        log.error("task.hook_failed", run=run, hook=getattr(hook, "__name__", "?"), exc_info=error)


async def _outlast(task: asyncio.Task[Any]) -> None:
    await asyncio.wait((task,))


# --------------------------------------------------------------------------- time


class Deadline:
    """Cancels an attempt's asyncio task when its timeout has passed, and again while it does not listen.

    `on_deaf` is called when it was asked in vain: the attempt then counts as timed out and its late result is refused.
    """

    __slots__ = ("_asked", "_clock", "_loop", "_on_deaf", "_task", "_timeout", "_timer", "expired")

    def __init__(self, clock: Clock, timeout: float, on_deaf: Callable[[], None]) -> None:
        self.expired = False
        self._asked = 0
        self._clock, self._timeout, self._on_deaf = clock, timeout, on_deaf
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = asyncio.current_task()
        self._timer: Any = None

    def start(self) -> None:
        """The body starts now. A call after `cancel` does nothing."""
        if self._task is not None:
            self._timer = self._clock.timer(
                self._loop, self._clock.now() + microseconds(self._timeout), self._expire
            )

    def _expire(self) -> None:
        self.expired = True
        if self._asked == ASKS:
            self._on_deaf()
            return
        self._asked += 1
        if self._task is not None:
            self._task.cancel()
        self._timer = self._clock.timer(
            self._loop, self._clock.now() + microseconds(ASK_EVERY), self._expire
        )

    def absorb(self) -> None:
        """The cancels were ours and become a timeout: outer code must not see them."""
        if self._task is not None:
            for _ in range(self._asked):
                self._task.uncancel()

    def cancel(self) -> None:
        self._task = None
        if self._timer is not None:
            self._timer.cancel()


async def _within(call: TaskCall, timeout: float, pool: Pool, on_deaf: Callable[[], None]) -> Any:
    """The body's return value, or its exception; TaskTimedOut when it outlived its timeout."""
    deadline = Deadline(pool.clock, timeout, on_deaf)
    try:
        if not call.task.is_async:
            return await _in_thread(call, pool, deadline.start)
        deadline.start()
        return await call.task.fn(*call.args, **call.kwargs)
    except asyncio.CancelledError:
        if not deadline.expired or asyncio.current_task() is not call.handle:
            raise
        deadline.absorb()
        raise TaskTimedOut(call.task.name, timeout) from None
    finally:
        deadline.cancel()


# --------------------------------------------------------------------------- threads


def _in_thread(
    call: TaskCall, pool: Pool, started: Callable[[], None] | None = None
) -> Coroutine[Any, Any, Any]:
    """A plain `def` body in the pool's threads. `started` is told on the loop when a thread takes it up."""
    begun = None if started is None else partial(_tell, pool.loop, started)
    call.thread = pool.threads.submit(_work, copy_context(), call, begun)
    return _result(call.thread)


async def _result(thread: ThreadFuture[Any]) -> Any:
    return await asyncio.wrap_future(thread)


def _work(context: Context, call: TaskCall, begun: Callable[[], None] | None) -> Any:
    if begun is not None:
        begun()
    try:
        return context.run(partial(call.task.fn, *call.args, **call.kwargs))
    except StopIteration as stop:  # a future cannot carry it
        raise RuntimeError(f"task {call.task.name!r} raised StopIteration") from stop


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # The loop is closed: nobody waits for this any more.
        loop.call_soon_threadsafe(call)
