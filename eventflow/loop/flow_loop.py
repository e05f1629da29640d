"""Who calls: the event loop that a run's flow code sees, and the claim each call makes on the journal.

Every run has a `FlowLoop` of its own, a real asyncio event loop without I/O. Flow code runs on it: `create_task`, `gather`,
`TaskGroup`, `wait`, queues, `asyncio.timeout` and anyio all work, because they ask the running loop and get this one. That
buys three things a task factory on the user's loop cannot give:

- *parked* is exact: the ready queue is empty. No passes to count, no chain of callbacks to guess at. When the run is parked the
  host delivers the next batch; between two deliveries nothing outside can touch the flow, so a replay takes the same steps.
- *time is durable*: `time()` is the time of the last delivery, a timer is a claim like any other: `asyncio.sleep(86400)` and
  `asyncio.timeout(30)` survive a crash as they stand.
- *identity is lineage*: each flow-made task gets a scope named by its coroutine and its plain arguments (`labels.py`), and an
  ordinal among equals; a call claims `scope / name # ordinal`, synchronously, before its coroutine exists. Tasks and futures
  hash by lineage, so that sets of them iterate alike in every process.

I/O does not belong here: the loop's socket methods say so. Task bodies run on the worker's own loop. The executor is the host.
"""

import asyncio
import contextvars
import inspect
import sys
import zlib
from asyncio import events
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any, NoReturn, cast

from eventflow.core.clock import SECOND
from eventflow.core.errors import LineageLost, UsageError
from eventflow.loop.host import Host
from eventflow.loop.scopes import Scope, from_unordered_iteration, label

BREATH = 1_000
"""Steps one pump takes, a few milliseconds, before the worker's loop may do something else."""
SPIN = 100_000
"""Rounds of the ready queue without parking after which a flow spins: a wide gather takes a handful, polling any number."""
FOREVER = 1 << 62
"""The due time, in microseconds, of `sleep(inf)`: what a 64-bit column holds."""

_inside: contextvars.ContextVar["FlowLoop | None"] = contextvars.ContextVar(
    "eventflow_inside", default=None
)


class FlowTask(asyncio.Task[Any]):
    """A task made by flow code. Hashes by lineage, so that `next(iter(done))` repeats."""

    __slots__ = ("_scope", "lineage", "path")

    def __init__(
        self, coro: Any, *, loop: "FlowLoop", path: str, name: str | None, context: Any
    ) -> None:
        self.path = path
        self._scope: Scope | None = (
            None  # most tasks are one journaled call and never claim anything
        )
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
    """A future made by flow code; hashes by the order of creation."""

    __slots__ = ("ordinal",)

    def __init__(self, *, loop: "FlowLoop", ordinal: int) -> None:
        self.ordinal = ordinal
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self.ordinal


class FlowHandle(asyncio.Handle):
    """A callback to come; `asyncio.Handle` without its question for the debug mode, which cannot be on here."""

    __slots__ = ()

    def __init__(
        self, callback: Any, args: Any, loop: "FlowLoop", context: contextvars.Context | None
    ) -> None:  # pyright: ignore[reportMissingSuperCall]
        self._context = context if context is not None else contextvars.copy_context()
        self._loop, self._callback, self._args = loop, callback, args
        self._cancelled, self._repr, self._source_traceback = False, None, None


class FlowTimer(asyncio.TimerHandle):
    """A timer set by flow code: a claim with a due time. Its firing is journaled, its setting need not be: the due time is
    computed from delivered times, so a replay computes the same."""

    __slots__ = ("claim", "due", "handle")

    def __init__(
        self, claim: str, due: int, callback: Any, args: Any, loop: "FlowLoop", context: Any
    ) -> None:
        super().__init__(due / SECOND, callback, args, loop, context)
        self.claim, self.due = claim, due
        self.handle: Any = None

    def fire(self) -> None:
        """The firing is recorded: run the callback in its turn."""
        loop = cast("FlowLoop", self._loop)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        if not self.cancelled():
            loop.push(self)


class FlowLoop(asyncio.AbstractEventLoop):
    """The deterministic loop of one run. The host pumps it; it never blocks and never waits."""

    def __init__(self, host: Host, outer: asyncio.AbstractEventLoop, run: int = 0) -> None:
        self.host: Host = host
        # Equal paths of different runs must not hash alike: asyncio keeps the tasks of all of them in one set.
        self.seed = zlib.crc32(run.to_bytes(8, "big"))
        self._outer = outer
        self._ready: deque[asyncio.Handle] = deque()
        self._unordered: list[tuple[str, asyncio.Handle]] = []
        self._sorting: str | None = None
        self._callbacks = Scope("~/")
        self._futures = 0
        self._tasks: list[FlowTask] = []
        self._sweep_at = 64
        self._rounds = 0
        self._pumping = False
        self._closed = False
        self.foreign = 0
        """Awaits under way that the journal knows nothing of (`to_thread` in a flow body)."""
        self.spun = False
        """The flow once took SPIN rounds without parking."""

    # ----------------------------------------------------------------- what the host does

    def root(
        self, coro: Coroutine[Any, Any, Any], context: contextvars.Context, path: str = ""
    ) -> FlowTask:
        """Makes the flow's first task; `context` is where its context variables live, `path` goes before every claim."""
        context.run(_inside.set, self)
        self._pumping = True  # its first step is queued, and the host, who is about to pump, need not be woken for it
        try:
            return self._adopt(FlowTask(coro, loop=self, path=path, name="flow", context=context))
        finally:
            self._pumping = False

    def pump(self) -> None:
        """Steps the flow until it is parked and the host has nothing more to deliver.

        Called on the host's loop from a plain callback, never from inside a task: two tasks cannot be current at once.
        """
        if not self._pumping and not self._closed:
            self._as_running(self._step)

    def _as_running(self, step: Callable[[], None]) -> None:
        """Runs `step` with this loop as the running one; async generators that flow code drops are closed on it too."""
        outer, hooks = events._get_running_loop(), sys.get_asyncgen_hooks()
        self._pumping = True
        events._set_running_loop(self)
        sys.set_asyncgen_hooks(None, self._finalize)
        try:
            step()
        finally:
            sys.set_asyncgen_hooks(*hooks)
            events._set_running_loop(outer)
            self._pumping = False

    def _step(self) -> None:
        ready, budget = self._ready, BREATH
        while True:
            while ready or self._unordered:
                if budget <= 0:
                    self.host.wake()
                    return
                if self._unordered:
                    self._flush()
                turn = min(len(ready), budget)
                budget -= turn
                self._run(turn)
                self._rounds += 1
                if self._rounds >= SPIN:
                    self._rounds, self.spun = 0, True
                    self.host.spinning()
            self._rounds = 0
            if not self.host.parked():
                return

    def _run(self, turn: int) -> None:
        ready = self._ready
        for _ in range(turn):
            handle = ready.popleft()
            if not handle._cancelled:  # pyright: ignore
                try:
                    handle._run()  # pyright: ignore
                except SystemExit:  # `sys.exit()` in a flow: its task holds it, and the worker's loop must not end for it
                    continue

    def _finalize(self, dropped: AsyncGenerator[Any, Any]) -> None:
        """An async generator was dropped half-way: its `finally` blocks run here, in the step that dropped it."""
        if self.is_current():
            self.create_task(dropped.aclose())

    def is_current(self) -> bool:
        """Whether flow code is calling, in this thread."""
        return events._get_running_loop() is self

    def is_ready(self) -> bool:
        """Whether the flow is in the middle of its steps: a pump stopped to let others run."""
        return bool(self._ready)

    def left(self) -> list[FlowTask]:
        """Flow-made tasks that have not ended."""
        return [task for task in self._tasks if not task.done()]

    def close(self) -> None:
        """Ends the loop for good; coroutines still suspended are closed. Idempotent."""
        if self._closed:
            return
        self._ready.clear()
        self._unordered.clear()
        left = self.left()
        if left:
            self._as_running(lambda: _close_all(left))
        self._closed = True
        self._ready.clear()
        self._tasks = []

    # ----------------------------------------------------------------- identity

    def scope(self) -> Scope:
        """The scope of the task being stepped; plain callbacks share one."""
        task = asyncio.current_task(self)
        return task.scope if isinstance(task, FlowTask) else self._callbacks

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
            raise LineageLost(getattr(coro, "__qualname__", "?"), "a run that is already settled")
        if not from_unordered_iteration():
            return self._adopt(
                FlowTask(
                    coro,
                    loop=self,
                    path=self.scope().child(label(coro)),
                    name=name,
                    context=context,
                )
            )
        path = self._sorting = self.scope().child(label(coro, deep=True))
        try:
            return self._adopt(FlowTask(coro, loop=self, path=path, name=name, context=context))
        finally:
            self._sorting = None

    def _adopt(self, task: FlowTask) -> FlowTask:
        """Keeps the task until it has ended; a sweep once there are twice as many costs less than a callback on each."""
        self._tasks.append(task)
        if len(self._tasks) >= self._sweep_at:
            self._tasks = self.left()
            self._sweep_at = 64 + 2 * len(self._tasks)
        return task

    def create_future(self) -> FlowFuture:
        self._futures += 1
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
            self.push(handle)
        return handle

    def push(self, handle: asyncio.Handle) -> None:
        """Queues a handle behind what is ready; wakes the host when nobody is pumping."""
        if self._unordered:
            self._flush()
        self._ready.append(handle)
        if not self._pumping and not self._closed:
            self.host.wake()

    def _flush(self) -> None:
        """`as_completed` makes its tasks in `set()` order, which differs between processes: start them by lineage."""
        self._unordered.sort(key=lambda pair: pair[0])
        self._ready.extend(handle for _, handle in self._unordered)
        self._unordered.clear()

    def time(self) -> float:
        return self.host.read_now() / SECOND

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        return self._set(self.host.read_now() + _us(delay), callback, args, context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        return self._set(_us(when), callback, args, context)

    def _set(
        self, due: int, callback: Callable[..., Any], args: Any, context: Any
    ) -> asyncio.Handle:
        # Named by what they are for, so that a timeout put before a sleep does not take the sleep's firing for its own.
        name = _TIMERS.get(getattr(callback, "__qualname__", ""), "timer")
        timer = FlowTimer(
            self.scope().claim(name), min(due, FOREVER), callback, args, self, context
        )
        if due <= self.host.read_now():
            self.push(timer)
        else:
            self.host.arm(timer)
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self.host.disarm(cast(FlowTimer, handle))

    # ----------------------------------------------------------------- the way out to other threads

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        self._outer.call_soon_threadsafe(
            self.push, handle := FlowHandle(callback, args, self, context)
        )
        return handle

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> FlowFuture:  # type: ignore[override]
        """Works, but its result is not journaled: a replay computes it again. A `@task` is the durable form."""
        mine = self.create_future()
        self.foreign += 1
        theirs = self._outer.run_in_executor(executor, func, *args)

        def finish(done: asyncio.Future[Any]) -> None:
            self.foreign -= 1
            self.call_soon(_copy, done, mine)

        asyncio.ensure_future(theirs, loop=self._outer).add_done_callback(finish)
        return mine

    # ----------------------------------------------------------------- what asyncio asks of any loop

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self._pumping

    def is_closed(self) -> bool:
        return self._closed

    def get_task_factory(self) -> None:
        return None

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.host.complain(context)


def _no_io(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise UsageError(
            f"loop.{name}() in a flow body: expected I/O in a @task, where its result is journaled and retried"
        )

    return refuse


for _name in (
    "add_reader add_writer add_signal_handler connect_accepted_socket connect_read_pipe connect_write_pipe create_connection "
    "create_datagram_endpoint create_server create_unix_connection create_unix_server getaddrinfo getnameinfo remove_reader "
    "remove_writer run_forever run_until_complete sendfile set_debug set_task_factory sock_accept sock_connect sock_recv "
    "sock_recv_into sock_recvfrom sock_recvfrom_into sock_sendall sock_sendfile sock_sendto start_tls stop subprocess_exec "
    "subprocess_shell"
).split():
    setattr(FlowLoop, _name, _no_io(_name))


def flow_loop(task_name: str) -> FlowLoop | None:
    """The FlowLoop whose code is calling; None outside a run and in task bodies. LineageLost where that cannot be told."""
    loop = events._get_running_loop()
    if type(loop) is FlowLoop:
        return loop
    inside = _inside.get()
    if inside is None:
        return None
    if inside.is_closed():
        raise LineageLost(task_name, "a run that is already settled")
    raise LineageLost(task_name, "a thread" if loop is None else "another event loop")


def leave_flow() -> None:
    """Clears the flow's mark from the current context: a task body is going to run in it."""
    _inside.set(None)


# --------------------------------------------------------------------------- small change

_TIMERS = {"_set_result_unless_cancelled": "sleep", "Timeout._on_timeout": "timeout"}


def _us(seconds: float) -> int:
    return FOREVER if seconds * SECOND >= FOREVER else round(seconds * SECOND)


def _copy(done: asyncio.Future[Any], mine: asyncio.Future[Any]) -> None:
    """What became of a foreign await, told to the flow's future, which may have been cancelled meanwhile."""
    if mine.done():
        return
    if done.cancelled():
        mine.cancel()
    elif (error := done.exception()) is not None:
        mine.set_exception(error)
    else:
        mine.set_result(done.result())


def _close_all(tasks: list[FlowTask]) -> None:
    for task in tasks:
        task._log_destroy_pending = False  # pyright: ignore
        coro = task.get_coro()
        if inspect.iscoroutine(coro):
            # Whatever its `finally` blocks raise or await is nobody's any more: nothing of it will be recorded.
            with suppress(Exception, BaseExceptionGroup, asyncio.CancelledError):
                coro.close()
