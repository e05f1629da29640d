"""Who calls: the event loop that a run's flow code sees, and the claim each call makes on the journal.

Every run has a `FlowLoop` of its own, a real asyncio event loop without I/O. Flow code runs on it: `create_task`, `gather`,
`TaskGroup`, `wait`, queues, `asyncio.timeout` and anyio all work, because they ask the running loop and get this one. That
buys three things a task factory on the user's loop cannot give:

- *parked* is exact: the ready queue is empty. No passes to count, no chain of callbacks to guess at. When the run is parked the
  host delivers the next batch; between two deliveries nothing outside can touch the flow, so a replay takes the same steps.
- *time is durable*: `time()` is the time of the last delivery, and a timer is a claim like any other. `asyncio.sleep(86400)` and
  `asyncio.timeout(30)` survive a crash as they stand.
- *identity is lineage*: each flow-made task gets a scope named by its coroutine's qualname, a digest of its plain arguments, and
  an ordinal among equals; a call claims `scope / name # ordinal`, synchronously, before its coroutine exists. Tasks and futures hash
  by lineage, so that sets of them iterate alike in every process.

I/O does not belong here: the loop's socket methods say so. Task bodies run on the worker's own loop. The executor is the host.
"""

import asyncio
import contextvars
import inspect
import sys
import zlib
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from hashlib import blake2b
from types import CodeType
from typing import Any, NoReturn, Protocol, cast

import orjson

from eventflow.clock import SECOND
from eventflow.errors import LineageLost, UsageError

MAX_SPIN = 10_000
"""Steps one pump takes before it lets the worker's loop breathe: a flow that never parks must not starve the others."""

_inside: contextvars.ContextVar["FlowLoop | None"] = contextvars.ContextVar("eventflow_inside", default=None)


class Host(Protocol):
    """What a FlowLoop needs of the executor."""

    def read_now(self) -> int:
        """Time of the last delivery, microseconds."""
        ...

    def parked(self) -> bool:
        """Nothing is ready. True: something was delivered, go on stepping."""
        ...

    def arm(self, timer: "FlowTimer") -> None:
        """Flow code waits for `timer.due`; the host calls `timer.fire()` when that is recorded."""
        ...

    def complain(self, context: dict[str, Any]) -> None:
        """A callback raised, or a task's exception was never retrieved."""
        ...

    def wake(self) -> None:
        """Something became ready from outside a pump: pump soon. Safe from the host's loop only."""
        ...


class Scope:
    """The calls one flow-made task has made so far: what makes the next claim's ordinal."""

    __slots__ = ("counts", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.counts: dict[str, int] = {}

    def claim(self, name: str, key: str | None = None) -> str:
        """The identity of the next call of `name` from here: by ordinal, or by `key`, which must not repeat."""
        if key is None:
            ordinal = self.counts.get(name, 0)
            self.counts[name] = ordinal + 1
            return f"{self.path}{name}#{ordinal}"
        label = f"{name}[{key}]"
        if label in self.counts:
            raise UsageError(f"{label} was already called from this part of the flow; a key names one call, make it unique")
        self.counts[label] = 1
        return self.path + label

    def child(self, label: str) -> str:
        """The path of a new scope below this one: equal labels are told apart by creation order."""
        ordinal = self.counts.get(label, 0)
        self.counts[label] = ordinal + 1
        return f"{self.path}{label}.{ordinal}/" if ordinal else f"{self.path}{label}/"


class FlowTask(asyncio.Task[Any]):
    """A task made by flow code. Hashes by lineage, so that `next(iter(done))` repeats."""

    def __init__(self, coro: Any, *, loop: "FlowLoop", path: str, name: str | None, context: contextvars.Context | None) -> None:
        self.scope = Scope(path)
        self.lineage = zlib.crc32(path.encode(), loop.seed)
        super().__init__(coro, loop=loop, name=name or path.rstrip("/") or "flow", context=context)

    def __hash__(self) -> int:
        return self.lineage


class FlowFuture(asyncio.Future[Any]):
    """A future made by flow code; hashes by the order of creation."""

    def __init__(self, *, loop: "FlowLoop", ordinal: int) -> None:
        self.ordinal = ordinal
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self.ordinal


class FlowTimer(asyncio.TimerHandle):
    """A timer set by flow code: a claim with a due time. Its firing is journaled, its setting need not be: the due time is
    computed from delivered times, so a replay computes the same."""

    __slots__ = ("claim", "due", "handle")

    def __init__(self, claim: str, due: int, callback: Any, args: Any, loop: "FlowLoop", context: Any) -> None:
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
        self.host = host
        # Equal paths of different runs must not hash alike: asyncio keeps the tasks of all of them in one set.
        self.seed = zlib.crc32(run.to_bytes(8, "big"))
        self._outer = outer
        self._ready: deque[asyncio.Handle] = deque()
        self._unordered: list[tuple[str, asyncio.Handle]] = []
        self._sorting: str | None = None
        self._callbacks = Scope("~/")
        self._futures = 0
        self._tasks: set[FlowTask] = set()
        self._pumping = False
        self._closed = False
        self.foreign = 0
        """Awaits under way that the journal knows nothing of (`to_thread` in a flow body)."""
        self.spun = False
        """The flow once took MAX_SPIN steps without parking."""

    # ----------------------------------------------------------------- what the host does

    def root(self, coro: Coroutine[Any, Any, Any], context: contextvars.Context) -> FlowTask:
        """Makes the flow's first task; `context` is where its context variables live."""
        context.run(_inside.set, self)
        return self._adopt(FlowTask(coro, loop=self, path="", name="flow", context=context))

    def pump(self) -> None:
        """Steps the flow until it is parked and the host has nothing more to deliver.

        Called on the host's loop from a plain callback, never from inside a task: two tasks cannot be current at once.
        """
        if self._pumping or self._closed:
            return
        outer = events._get_running_loop()
        self._pumping = True
        events._set_running_loop(self)
        try:
            self._step_until_parked()
        finally:
            events._set_running_loop(outer)
            self._pumping = False

    def _step_until_parked(self) -> None:
        ready, parked = self._ready, self.host.parked
        budget = MAX_SPIN
        while True:
            while ready or self._unordered:
                if self._unordered:
                    self._flush()
                handle = ready.popleft()
                if not handle._cancelled:  # pyright: ignore
                    handle._run()  # pyright: ignore
                budget -= 1
                if budget <= 0:
                    self.spun = True
                    parked()
                    self.host.wake()
                    return
            if not parked():
                return

    @property
    def tasks(self) -> set[FlowTask]:
        """Flow-made tasks that have not ended."""
        return self._tasks

    def close(self) -> None:
        """Ends the loop for good; coroutines still suspended are closed. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._ready.clear()
        for task in self._tasks:
            task._log_destroy_pending = False  # pyright: ignore
            coro = task.get_coro()
            if inspect.iscoroutine(coro):
                # Whatever its `finally` blocks raise or await is nobody's any more: nothing of it will be recorded.
                with suppress(Exception, BaseExceptionGroup, asyncio.CancelledError):
                    coro.close()
        self._tasks = set()

    # ----------------------------------------------------------------- identity

    def scope(self) -> Scope:
        """The scope of the task being stepped; plain callbacks share one."""
        task = asyncio.current_task(self)
        return task.scope if isinstance(task, FlowTask) else self._callbacks

    def create_task(  # type: ignore[override]
        self, coro: Any, *, name: str | None = None, context: contextvars.Context | None = None, **_: Any
    ) -> FlowTask:
        if self._closed:
            if inspect.iscoroutine(coro):
                coro.close()
            raise LineageLost(getattr(coro, "__qualname__", "?"), "a run that is already settled")
        label = _label(coro)
        path = self.scope().child(label)
        if _from_unordered_iteration():
            self._sorting = path
        try:
            return self._adopt(FlowTask(coro, loop=self, path=path, name=name, context=context))
        finally:
            self._sorting = None

    def _adopt(self, task: FlowTask) -> FlowTask:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def create_future(self) -> FlowFuture:
        self._futures += 1
        return FlowFuture(loop=self, ordinal=self._futures)

    # ----------------------------------------------------------------- scheduling

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        if self._sorting is not None:
            self._unordered.append((self._sorting, handle))
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
        self, delay: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        return self._call_at(self.host.read_now() + round(delay * SECOND), callback, args, context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        return self._call_at(round(when * SECOND), callback, args, context)

    def _call_at(self, due: int, callback: Callable[..., Any], args: Any, context: Any) -> asyncio.Handle:
        timer = FlowTimer(self.scope().claim("timer"), due, callback, args, self, context)
        if due <= self.host.read_now():
            self.push(timer)
        else:
            self.host.arm(timer)
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        timer = cast(FlowTimer, handle)
        if timer.handle is not None:
            timer.handle.cancel()

    # ----------------------------------------------------------------- the way out to other threads

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._outer.call_soon_threadsafe(self.push, handle)
        return handle

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> FlowFuture:  # type: ignore[override]
        """Works, but its result is not journaled: a replay computes it again. A `@task` is the durable form."""
        mine = self.create_future()
        self.foreign += 1
        theirs = self._outer.run_in_executor(executor, func, *args)

        def finish(done: asyncio.Future[Any]) -> None:
            self.foreign -= 1
            if done.cancelled():
                self.call_soon(mine.cancel)
            elif not mine.done():
                error = done.exception()
                self.call_soon(mine.set_exception, error) if error else self.call_soon(mine.set_result, done.result())

        asyncio.ensure_future(theirs, loop=self._outer).add_done_callback(finish)
        return mine

    # ----------------------------------------------------------------- what asyncio asks of any loop

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        pass

    def is_running(self) -> bool:
        return self._pumping

    def is_closed(self) -> bool:
        return self._closed

    def get_task_factory(self) -> None:
        return None

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.host.complain(context)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.host.complain(context)


def _no_io(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise UsageError(f"loop.{name}() in a flow body: expected I/O in a @task, where its result is journaled and retried")

    return refuse


for _name in (
    "add_reader add_writer add_signal_handler connect_accepted_socket connect_read_pipe connect_write_pipe create_connection "
    "create_datagram_endpoint create_server create_unix_connection create_unix_server getaddrinfo getnameinfo remove_reader "
    "remove_writer run_forever run_until_complete sendfile set_task_factory sock_accept sock_connect sock_recv sock_recv_into "
    "sock_recvfrom sock_recvfrom_into sock_sendall sock_sendfile sock_sendto start_tls stop subprocess_exec subprocess_shell"
).split():
    setattr(FlowLoop, _name, _no_io(_name))


def flow_loop(task_name: str) -> FlowLoop | None:
    """The FlowLoop whose code is calling; None outside a run and in task bodies. Raises LineageLost where that cannot be told."""
    loop = events._get_running_loop()
    if type(loop) is FlowLoop:
        return loop
    if _inside.get() is None:
        return None
    raise LineageLost(task_name, "a thread" if loop is None else "another event loop")


def leave_flow() -> None:
    """Clears the flow's mark from the current context: a task body is going to run in it."""
    _inside.set(None)


# --------------------------------------------------------------------------- labels


def _label(coro: Any) -> str:
    """The qualname of a coroutine and a digest of its plain arguments.

    A journaled call's own coroutine carries its claim (`call.claim`), which is a better name than any digest.
    """
    frame = getattr(coro, "cr_frame", None)
    name: str = getattr(coro, "__qualname__", type(coro).__qualname__).replace("<locals>.", "").replace("/", "|")
    if frame is None:
        return name
    arguments: dict[str, Any] = frame.f_locals
    call = arguments.get("call")
    if call is not None and (claim := getattr(call, "claim", None)) is not None:
        return f"={claim}".replace("/", "|")
    if not arguments:
        return name
    return f"{name}:{_digest(arguments)}"


def _digest(arguments: dict[str, Any]) -> str:
    try:
        plain = orjson.dumps(arguments, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:
        plain = b"".join(_plain(name, value) for name, value in arguments.items())
    return blake2b(plain, digest_size=4).hexdigest()


def _plain(name: str, value: Any) -> bytes:
    try:
        return orjson.dumps((name, value), option=orjson.OPT_NON_STR_KEYS)
    except TypeError:
        return b""


_UNORDERED: frozenset[CodeType] = frozenset(
    function.__code__
    for function in (
        asyncio.as_completed,
        getattr(getattr(asyncio.tasks, "_AsCompletedIterator", None), "__init__", None),
    )
    if hasattr(function, "__code__")
)


def _from_unordered_iteration() -> bool:
    """Whether the task under creation is one of `as_completed`'s, which walks a set."""
    frame = sys._getframe(2)
    for _ in range(4):
        if frame is None:
            return False
        if frame.f_code in _UNORDERED:
            return True
        frame = frame.f_back
    return False
