"""The deterministic event loop that one run's flow code runs on.

Every run has a `FlowLoop` of its own, a real asyncio event loop without I/O. `create_task`,
`gather`, `TaskGroup`, `wait`, queues, `asyncio.timeout` and anyio all work, because they ask for
the running loop and get this one. A task factory on the user's loop could not give these three
things:

- *Parked* is exact: the ready queue is empty. When a run is parked, its host delivers the next
  batch of journal entries. Nothing else reaches the flow between two deliveries, so a replay takes
  the same steps.
- *Time is durable*: `time()` is the time of the last delivery, and a timer has a call key like a
  task call. So `asyncio.sleep(86400)` and `asyncio.timeout(30)` survive a crash.
- *Identity is lineage*: each task gets a scope named after its coroutine and its plain arguments
  (scopes.py). The key of a call is `scope / name # ordinal`, made synchronously, before the call's
  coroutine exists. Tasks and futures hash by lineage, so that sets of them iterate alike in every
  process.

Socket methods raise: I/O belongs into tasks, whose bodies run on the worker's own loop.
engine/execution.py is the host.
"""

import asyncio
import contextvars
import inspect
import sys
import zlib
from asyncio import events
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from functools import cached_property
from typing import Any, NoReturn, Protocol, TypeVar, cast

from eventflow.core.clock import SECOND, Moment
from eventflow.core.errors import OutsideFlowError, UsageError
from eventflow.core.large_values import LargeValues
from eventflow.loop.cleanup import Cleanup
from eventflow.loop.left_behind import close_or_keep
from eventflow.loop.scopes import Scope, from_unordered_iteration, task_label

T = TypeVar("T")

MAX_STEPS_PER_RUN = 1_000
"""Steps of one `run_ready`, a few milliseconds; then the worker's loop gets its turn."""
BUSY_LOOP_ROUNDS = 100_000
"""Rounds of the ready queue without parking that count as a busy loop: a wide `gather` takes a
handful, polling any number.
"""
MAX_DUE = 1 << 62
"""The due time, in microseconds, of `sleep(inf)`: what a 64-bit column holds."""

_inside: contextvars.ContextVar["FlowLoop | None"] = contextvars.ContextVar(
    "eventflow_inside", default=None
)


class LoopHost(Protocol):
    """What a FlowLoop calls; `engine.execution.Execution` implements it.

    `read_now`, `set_timer` and `cancel_timer` are called inside a step of the flow: their effect
    must be the same in a replay.
    """

    def read_now(self) -> int:
        """Time of the last delivery, microseconds."""
        ...

    def is_recorded_scope(self, path: str) -> bool | None:
        """Whether an earlier execution of the run recorded a call in the scope of this path, which
        is without its last slash. None: it recorded nothing.
        """
        ...

    def on_parked(self) -> bool:
        """No step is ready. Returns True when something was delivered and stepping continues."""
        ...

    def on_busy_loop(self) -> None:
        """The flow polls without parking: deliver and start anyway, or it would wait for ever. Not
        deterministic.
        """
        ...

    def set_timer(self, timer: "FlowTimer") -> None:
        """Flow code waits for `timer.due`; the host calls `timer.fire()` once the firing is
        recorded.
        """
        ...

    def cancel_timer(self, timer: "FlowTimer") -> None:
        """Flow code no longer waits for the timer."""
        ...

    def on_callback_error(self, context: dict[str, Any]) -> None:
        """A callback raised, or a task's exception was never retrieved."""
        ...

    def on_unawaited(self, coro: Any) -> None:
        """A coroutine that flow code made was freed without being awaited."""
        ...

    def wake(self) -> None:
        """A step became ready outside `run_ready`: call that soon. Call this from the host's loop
        only.
        """
        ...


class DetachedHost:
    """The host of a run that has left memory: does nothing."""

    def read_now(self) -> int:
        return 0

    def is_recorded_scope(self, path: str) -> bool | None:
        return None

    def on_parked(self) -> bool:
        return False

    def on_busy_loop(self) -> None:
        pass

    def set_timer(self, timer: "FlowTimer") -> None:
        pass

    def cancel_timer(self, timer: "FlowTimer") -> None:
        pass

    def on_callback_error(self, context: dict[str, Any]) -> None:
        pass

    def on_unawaited(self, coro: Any) -> None:
        pass

    def wake(self) -> None:
        pass


DETACHED_HOST = DetachedHost()


class FlowTask(asyncio.Task[Any]):
    """A task made by flow code. Hashes by lineage, so that `next(iter(done))` repeats."""

    __slots__ = ("_scope", "lineage", "path")

    def __init__(
        self, coro: Any, *, loop: "FlowLoop", path: str, name: str | None, context: Any
    ) -> None:
        self.path = path
        # Made on demand: most tasks are one journaled call and make no calls of their own.
        self._scope: Scope | None = None
        self.lineage = zlib.crc32(path.encode(), loop.seed)
        super().__init__(coro, loop=loop, name=name or path.rstrip("/") or "flow", context=context)

    def __hash__(self) -> int:
        return self.lineage

    @property
    def scope(self) -> Scope:
        if self._scope is None:
            self._scope = Scope(self.path)
        return self._scope


class FlowFuture(asyncio.Future[Any]):
    """A future made by flow code. Hashes by the order of creation."""

    __slots__ = ("ordinal",)

    def __init__(self, *, loop: "FlowLoop", ordinal: int) -> None:
        self.ordinal = ordinal
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self.ordinal


class FlowHandle(asyncio.Handle):
    """`asyncio.Handle` without its check for the debug mode, which a FlowLoop does not have."""

    __slots__ = ()

    def __init__(
        self, callback: Any, args: Any, loop: "HostedLoop", context: contextvars.Context | None
    ) -> None:  # pyright: ignore[reportMissingSuperCall]
        self._context = context if context is not None else contextvars.copy_context()
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = None
        self._source_traceback = None


class FlowTimer(asyncio.TimerHandle):
    """A timer set by flow code: a pending call with a due time, in microseconds.

    Only its firing is journaled. The due time is computed from delivered times, so a replay
    computes the same one. `since`: when the wait for it began; None if an earlier execution of the
    run may have begun it.
    """

    __slots__ = ("call_key", "due", "handle", "since")

    def __init__(
        self, call_key: str, due: int, callback: Any, args: Any, loop: "HostedLoop", context: Any
    ) -> None:
        super().__init__(due / SECOND, callback, args, loop, context)
        self.call_key = call_key
        self.due = due
        self.since: Moment | None = None
        self.handle: Any = None

    def fire(self) -> None:
        """Queues the callback; call this once the firing is recorded."""
        loop = cast("HostedLoop", self._loop)  # pyright: ignore
        if not self.cancelled():
            loop.enqueue(self)


class HostedLoop(asyncio.AbstractEventLoop):
    """The side of a FlowLoop that faces its host and other threads: time, timers, executors.

    The methods for I/O raise UsageError.
    """

    unjournaled_awaits = 0
    """Awaits under way whose results are not journaled (`asyncio.to_thread` in a flow body)."""
    is_stepping = False
    """Whether flow code, or a body that began in a step of it, is executing."""

    def __init__(self, host: LoopHost, outer: asyncio.AbstractEventLoop) -> None:
        self.host = host
        self._outer = outer

    def current_scope(self) -> Scope:
        raise NotImplementedError

    def enqueue(self, handle: asyncio.Handle) -> None:
        raise NotImplementedError

    def finalize(self, dropped: AsyncGenerator[Any, Any]) -> None:
        raise NotImplementedError

    # ----------------------------------------------------------------- the running loop

    def as_running(self, step: Callable[..., T], *args: Any) -> T:
        """Runs `step` with this loop as the running one, also for async generators that flow code
        drops.
        """
        outer = self._outer if self._outer.is_running() else None
        hooks = self._outer_hooks = sys.get_asyncgen_hooks()
        events._set_running_loop(self)
        sys.set_asyncgen_hooks(None, self.finalize)
        self.is_stepping = True
        try:
            return step(*args)
        finally:
            self.is_stepping = False
            sys.set_asyncgen_hooks(*hooks)
            events._set_running_loop(outer)

    def run_outside(self, step: Callable[..., T], *args: Any) -> T:
        """Runs `step` with the host's loop as the running one, in the middle of a step of this
        loop.
        """
        task = asyncio.current_task(self)
        asyncio._leave_task(self, task)  # pyright: ignore
        events._set_running_loop(self._outer)
        sys.set_asyncgen_hooks(*self._outer_hooks)
        try:
            return step(*args)
        finally:
            sys.set_asyncgen_hooks(None, self.finalize)
            events._set_running_loop(self)
            asyncio._enter_task(self, task)  # pyright: ignore

    def is_current(self) -> bool:
        """Whether the caller is flow code, in this thread."""
        return events._get_running_loop() is self

    # ----------------------------------------------------------------- time

    def time(self) -> float:
        return self.host.read_now() / SECOND

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        # A delay too short for a microsecond still moves the time on, or polling would never end.
        us = _us(delay) or (1 if delay > 0 else 0)
        return self._set(self.host.read_now() + us, callback, args, context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        due = _us(when)
        if due / SECOND < when:  # `time()` must have reached `when`: callers look, and wait again
            due += 1
        return self._set(due, callback, args, context)

    def _set(
        self, due: int, callback: Callable[..., Any], args: Any, context: Any
    ) -> asyncio.Handle:
        # Named by purpose, so that a timeout added in front of a sleep does not get the sleep's
        # recorded firing.
        name = _TIMERS.get(getattr(callback, "__qualname__", ""), "timer")
        timer = FlowTimer(
            self.current_scope().call_key(name), min(due, MAX_DUE), callback, args, self, context
        )
        if due <= self.host.read_now():
            self.enqueue(timer)
        else:
            self.host.set_timer(timer)
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self.host.cancel_timer(cast(FlowTimer, handle))

    # ----------------------------------------------------------------- threads

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        self._outer.call_soon_threadsafe(
            self.enqueue, handle := FlowHandle(callback, args, self, context)
        )
        return handle

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Works, but the result is not journaled: a replay computes it again. A `@task` is the
        durable form.
        """
        mine = self.create_future()
        self.unjournaled_awaits += 1
        theirs = self._outer.run_in_executor(executor, func, *args)

        def finish(done: asyncio.Future[Any]) -> None:
            self.unjournaled_awaits -= 1
            self.call_soon(_copy, done, mine)

        asyncio.ensure_future(theirs, loop=self._outer).add_done_callback(finish)
        return mine

    def get_debug(self) -> bool:
        return False

    def get_task_factory(self) -> None:
        return None

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.host.on_callback_error(context)


def _no_io(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise UsageError(
            f"loop.{name}() in a flow body: expected I/O in a @task, where its result is "
            "journaled and retried"
        )

    return refuse


for _name in (
    "add_reader add_writer add_signal_handler connect_accepted_socket connect_read_pipe "
    "connect_write_pipe create_connection create_datagram_endpoint create_server "
    "create_unix_connection create_unix_server getaddrinfo getnameinfo remove_reader "
    "remove_writer run_forever run_until_complete sendfile set_debug set_task_factory "
    "sock_accept sock_connect sock_recv sock_recv_into sock_recvfrom sock_recvfrom_into "
    "sock_sendall sock_sendfile sock_sendto start_tls stop subprocess_exec subprocess_shell"
).split():
    setattr(HostedLoop, _name, _no_io(_name))


class FlowLoop(HostedLoop):
    """The deterministic loop of one run. `run_ready` steps it; it never blocks and never waits."""

    has_busy_looped = False
    """Whether the flow ever took BUSY_LOOP_ROUNDS rounds without parking."""
    cleanup: Cleanup | None = None
    """Since a cancel was delivered."""
    _sorting: str | None = None
    _futures = 0
    _sweep_at = 64
    _rounds = 0
    _pumping = False
    _closed = False

    def __init__(self, host: LoopHost, outer: asyncio.AbstractEventLoop, run: int = 0) -> None:
        self.host = host
        self._outer = outer
        # Equal paths of different runs must not hash alike: asyncio keeps the tasks of all of them
        # in one set.
        self.seed = zlib.crc32(run.to_bytes(8, "big"))
        self._ready: deque[asyncio.Handle] = deque()
        self._unordered: list[tuple[str, asyncio.Handle]] = []
        self._tasks: list[FlowTask] = []
        self.large_arguments = LargeValues()
        """For the fingerprints of calls."""
        self._large_arguments = LargeValues()  # for the names of tasks

    # ----------------------------------------------------------------- called by the host

    def create_root_task(
        self, coro: Coroutine[Any, Any, Any], context: contextvars.Context, path: str = ""
    ) -> FlowTask:
        """Makes the flow's first task, in `context`. `path` is the prefix of every call key of the
        run.
        """
        context.run(_inside.set, self)
        self._pumping = True  # the host is about to call run_ready: no wake for the first step
        try:
            return self._adopt(FlowTask(coro, loop=self, path=path, name="flow", context=context))
        finally:
            self._pumping = False

    def run_ready(self) -> None:
        """Steps the flow until it is parked and the host has nothing more to deliver.

        Call it on the host's loop from a plain callback, not from a task: two tasks cannot be
        current at once. The host is called while its own loop is the running one.
        """
        if self._pumping or self._closed:
            return
        steps_left = MAX_STEPS_PER_RUN
        self._pumping = True
        try:
            while steps_left > 0:
                if self._ready or self._unordered:
                    steps_left = self.as_running(self._take_steps, steps_left)
                if self._rounds >= BUSY_LOOP_ROUNDS:
                    self._rounds = 0
                    self.host.on_busy_loop()
                    self.has_busy_looped = True
                elif not self._ready and not self._unordered:
                    self._rounds = 0
                    if not self.host.on_parked():
                        return
        finally:
            self._pumping = False
        self.host.wake()

    def _take_steps(self, limit: int) -> int:
        """Takes the steps that are ready, and those that they make ready, up to the limit; returns
        what is left of it.
        """
        ready = self._ready
        while (ready or self._unordered) and limit > 0 and self._rounds < BUSY_LOOP_ROUNDS:
            if self._unordered:
                self._flush()
            turn = min(len(ready), limit)
            limit -= turn
            self._rounds += 1
            for _ in range(turn):
                handle = ready.popleft()
                if handle._cancelled:  # pyright: ignore
                    continue
                try:
                    handle._run()  # pyright: ignore
                except (SystemExit, KeyboardInterrupt):
                    continue  # `sys.exit()` in a flow: held by its task, not for our loop
        return limit

    def finalize(self, dropped: AsyncGenerator[Any, Any]) -> None:
        """Closes an async generator that flow code dropped half-way, in the step that
        dropped it.
        """
        if self.is_current():
            self.create_task(dropped.aclose())

    def is_parked_but_for(self, task: FlowTask | None) -> bool:
        """Whether no step is left once the current one, which is of `task`, has ended: the flow has
        made no other task, and no callback is ready.
        """
        return (
            not self.has_made_tasks
            and not self._ready
            and not self._unordered
            and self.is_current()
            and asyncio.current_task(self) is task
        )

    @property
    def has_made_tasks(self) -> bool:
        """Whether flow code has made tasks, apart from the first one, which have not been swept."""
        return len(self._tasks) > 1

    def is_ready(self) -> bool:
        """Whether steps are left: `run_ready` stopped to let the worker's loop run."""
        return bool(self._ready)

    def unfinished_tasks(self) -> list[FlowTask]:
        """Tasks made by flow code that have not ended."""
        self._tasks = [task for task in self._tasks if not task.done()]
        return self._tasks

    def close(self) -> None:
        """Ends the loop and closes suspended coroutines. Idempotent."""
        if self._closed:
            return
        self._ready.clear()
        self._unordered.clear()
        if not all(map(FlowTask.done, self._tasks)) and (unfinished := self.unfinished_tasks()):
            left = tuple(unfinished)  # closing them may make new tasks
            self._pumping = True
            try:
                self.as_running(_close_all, left)
            finally:
                self._pumping = False
        self._closed = True
        self._ready.clear()
        self._tasks = []

    # ----------------------------------------------------------------- identity

    def current_scope(self) -> Scope:
        """The scope of the current task. Plain callbacks share one scope."""
        task = asyncio.current_task(self)
        return task.scope if isinstance(task, FlowTask) else self._callback_scope

    @cached_property
    def _callback_scope(self) -> Scope:
        return Scope("~/")

    def create_task(  # type: ignore[override]
        self,
        coro: Any,
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
        **_: Any,
    ) -> FlowTask:
        if self._closed:
            if inspect.iscoroutine(coro):
                coro.close()
            raise OutsideFlowError(
                getattr(coro, "__qualname__", "?"), "a run that is already settled"
            )
        if not from_unordered_iteration():
            return self._adopt(
                FlowTask(
                    coro,
                    loop=self,
                    path=_task_path(self, coro, self._large_arguments),
                    name=name,
                    context=context,
                )
            )
        path = self._sorting = _task_path(self, coro, self._large_arguments, deep=True)
        try:
            return self._adopt(FlowTask(coro, loop=self, path=path, name=name, context=context))
        finally:
            self._sorting = None

    def _adopt(self, task: FlowTask) -> FlowTask:
        """Holds the task until it has ended. A sweep at twice the number costs less than a callback
        on each task.
        """
        self._tasks.append(task)
        if self.cleanup is not None and self.is_current():
            self.cleanup.note_new(task, asyncio.current_task(self))
        if len(self._tasks) >= self._sweep_at:
            self._sweep_at = 64 + 2 * len(self.unfinished_tasks())
        return task

    def create_future(self) -> FlowFuture:
        self._futures += 1
        if self.cleanup is not None:
            self.cleanup.note_wait(asyncio.current_task(self))
        return FlowFuture(loop=self, ordinal=self._futures)

    # ----------------------------------------------------------------- scheduling

    def call_soon(
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = FlowHandle(callback, args, self, context)
        if self._sorting is not None:
            self._unordered.append((self._sorting, handle))
        elif self._pumping and not self._unordered:
            self._ready.append(handle)
        else:
            self.enqueue(handle)
        return handle

    def enqueue(self, handle: asyncio.Handle) -> None:
        """Queues a handle behind those that are ready; wakes the host outside `run_ready`."""
        if self._unordered:
            self._flush()
        self._ready.append(handle)
        if not self._pumping and not self._closed:
            self.host.wake()

    def _flush(self) -> None:
        """Queues the tasks of `as_completed` sorted by path: it makes them in `set()` order, which
        differs by process.
        """
        self._unordered.sort(key=lambda pair: pair[0])
        self._ready.extend(handle for _, handle in self._unordered)
        self._unordered.clear()

    def is_running(self) -> bool:
        return self._pumping

    def is_closed(self) -> bool:
        return self._closed


def flow_loop(task_name: str) -> FlowLoop | None:
    """The FlowLoop that the caller runs on; None outside a run and in task bodies.

    Raises OutsideFlowError in a thread, on another event loop and after the run has settled.
    """
    loop = events._get_running_loop()
    if type(loop) is FlowLoop:
        return loop
    inside = _inside.get()
    if inside is None:
        return None
    if inside.is_closed():
        raise OutsideFlowError(task_name, "a run that is already settled")
    raise OutsideFlowError(task_name, "a thread" if loop is None else "another event loop")


def leave_flow() -> None:
    """Marks the current context as one of a task body: `flow_loop` returns None in it."""
    _inside.set(None)


# --------------------------------------------------------------------------- helpers

_TIMERS = {"_set_result_unless_cancelled": "sleep", "Timeout._on_timeout": "timeout"}


def _us(seconds: float) -> int:
    return MAX_DUE if seconds * SECOND >= MAX_DUE else round(seconds * SECOND)


def _copy(done: asyncio.Future[Any], mine: asyncio.Future[Any]) -> None:
    """Copies the outcome of an unjournaled await to the flow's future, unless that was cancelled
    meanwhile.
    """
    if mine.done():
        return
    if done.cancelled():
        mine.cancel()
    elif (error := done.exception()) is not None:
        mine.set_exception(error)
    else:
        mine.set_result(done.result())


def _close_all(tasks: Sequence[FlowTask]) -> None:
    for task in tasks:
        close_or_keep(task)


def _task_path(loop: FlowLoop, coro: Any, large: LargeValues, *, deep: bool = False) -> str:
    """The path of a new task: in a run of an earlier version, the one that it recorded."""
    scope = loop.current_scope()
    label = task_label(coro, deep=deep, large=large)
    if loop.host.is_recorded_scope(scope.path + label) is False:
        earlier = task_label(coro, deep=deep, earlier=True)
        if earlier != label and loop.host.is_recorded_scope(scope.path + earlier):
            label = earlier
    return scope.child_path(label)
