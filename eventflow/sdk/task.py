"""`@task` makes a function whose calls in a flow are journaled, retried and limited in time.

Called in a flow, a task takes the next call key of its scope and passes the call to the engine
through `CallPerformer`. Called anywhere else, it calls its function, with the same retries and
timeout. An `async def` body runs on the worker's event loop, a plain `def` body in a bounded thread
pool. Both are awaited: `await score(order)`. `score.fn` is the undecorated function.
"""

import asyncio
import inspect
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextvars import ContextVar, copy_context
from functools import partial, update_wrapper
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    Self,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    get_args,
    get_type_hints,
    overload,
)

import msgspec

from eventflow.core.clock import Duration, Moment
from eventflow.core.declarations import (
    Located,
    callable_or_none,
    declaration,
    duration,
    format_location,
    one_of,
    text,
    whole_number,
)
from eventflow.core.errors import TaskTimedOut, UsageError, value_or_none
from eventflow.core.hashing import digest
from eventflow.core.large_values import LargeValues
from eventflow.core.retry import Retry, as_retry
from eventflow.core.threads import DaemonThreads
from eventflow.logs.log import get_logger
from eventflow.loop.flow_loop import LoopHost, flow_loop
from eventflow.loop.unawaited import CallSite, call_site
from eventflow.runs.journal import CallTimes
from eventflow.serialization.annotations import check_return_annotation
from eventflow.serialization.codecs import ResultCodec, bind_names, fingerprint, mark_sets

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

PLAIN_THREADS = 32
"""Plain functions of one task that run at once outside of a run."""

OnChanged = Literal["error", "rerun", "accept"]
Hook = Callable[..., Any]


class TaskOptions(msgspec.Struct, frozen=True):
    """The options of `@task(...)`. Durations in seconds."""

    name: str
    retries: Retry
    timeout: float | None = None
    concurrency: int | None = None
    on_changed: OnChanged = "error"
    key: Callable[..., str] | None = None
    on_success: Hook | None = None
    on_failure: Hook | None = None
    on_retry: Hook | None = None


class TaskChanges(TypedDict, total=False):
    """The options of `@task(...)` that `Task.options_with` changes."""

    name: str
    retries: Retry | int | Sequence[Duration] | None
    timeout: Duration | None
    concurrency: int | None
    on_changed: OnChanged
    key: Callable[..., str] | None
    on_success: Hook | None
    on_failure: Hook | None
    on_retry: Hook | None


class TaskContext(msgspec.Struct, gc=False):
    """The current attempt of a task, as `current_task()` returns it in the body.

    `attempt` counts from 1. `idempotency_key` is the same for every attempt of this call, across
    restarts: pass it to the systems that the body writes to, since a body runs at least once. It
    is a text of any length and any characters; `idempotency_digest` is its short form for headers,
    file names and bounded columns. `log` is bound to run, task and attempt. Outside a run, `run_id`
    and both keys are empty.
    """

    run_id: str
    task: str
    attempt: int
    idempotency_key: str
    success_events: list[tuple[str, str, dict[str, Any]]] | None = None
    arguments_fingerprint: bytes | None = None
    is_over: bool = False
    """Whether the attempt has ended or was abandoned; what its body still does has no effect."""
    failure_events: list[tuple[str, str, dict[str, Any]]] | None = None
    """(id, type, fields) of the events to publish if this attempt fails and is the last."""

    @property
    def idempotency_digest(self) -> str:
        """32 hexadecimal digits made of `idempotency_key`, and as stable; "" outside a run.

        BLAKE2b of 16 bytes: equal for equal keys, also in another version of eventflow. It is valid
        in an HTTP header, in a file name and as a UUID.
        """
        return (
            digest(self.idempotency_key.encode(errors="surrogatepass")).hex()
            if self.idempotency_key
            else ""
        )

    @property
    def log(self) -> Any:
        return get_logger(self.task)

    def emit(self, event_type: str, fields: dict[str, Any], *, with_failure: bool = False) -> str:
        """Publish an event with the success or the failure of the task. Returns its id.

        User code calls `emit()` instead.
        """
        if with_failure:  # numbered by attempt: after a manual retry the task may fail again
            self.failure_events = self.failure_events or []
            ident = f"{self.idempotency_key}/failed#{self.attempt}.{len(self.failure_events)}"
            self.failure_events.append((ident, event_type, fields))
        else:
            self.success_events = self.success_events or []
            ident = f"{self.idempotency_key}/emit#{len(self.success_events)}"
            self.success_events.append((ident, event_type, fields))
        return ident


_current: ContextVar[TaskContext | None] = ContextVar("eventflow_task", default=None)


def current_task() -> TaskContext:
    """The attempt whose body is running. Raises UsageError outside a task body."""
    context = _current.get()
    if context is None:
        raise UsageError(
            "current_task(): expected to be called in a @task body, found none running here"
        )
    return context


def task_context() -> TaskContext | None:
    """`current_task()`, or None outside a task body."""
    return _current.get()


def enter_task(context: TaskContext) -> None:
    """Set `current_task()` in this contextvars context."""
    _current.set(context)


class TaskCall(msgspec.Struct, eq=False):
    """One call of a task in a flow. The engine keeps its progress here."""

    task: "Task[..., Any]"
    call_key: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fingerprint: bytes | None  # of the arguments; None: not verified
    site: CallSite | None = None  # where the flow made the call; None in a map
    future: asyncio.Future[Any] | None = None  # what the flow awaits
    handle: Any = None  # the attempt's asyncio task, or the timer of the next attempt
    context: Any = None
    body: TaskContext | None = None  # of the current attempt, or the last one
    attempt: int = 0  # the number of the current attempt, or the last one
    failed_attempts: int = 0  # since the last manual retry; for Retry.attempts
    since: Moment | None = None  # the moment from which the next attempt's due time was computed
    is_running: bool = False  # whether a body is executing
    first_step: Any = None  # StartedCoroutine of a body that began before `Attempts` had the call
    thread: Any = None  # where a plain `def` body runs
    times: CallTimes = msgspec.field(default_factory=CallTimes)

    def marked_arguments(self) -> dict[str, bytes]:
        """For `codecs.is_recorded_unsorted`."""
        return mark_sets(self.task.bound_arguments(self.args, self.kwargs) or {})


class CallPerformer(LoopHost, Protocol):
    """What a task call needs of the engine; implemented by `engine.execution.Execution`."""

    async def perform(self, call: TaskCall) -> Any:
        """The value of `call`: recorded, or returned by its body. Starts when awaited."""
        ...

    def perform_all(
        self, name: str, calls: Iterable[TaskCall], limit: int, patient: bool
    ) -> Coroutine[Any, Any, list[Any]]: ...


class Task(Generic[P, R]):
    """A task, made by `@task`. Calling it returns a coroutine; awaiting that, the body's value."""

    def __init__(
        self, fn: Callable[..., Any], options: TaskOptions, codec: str | None = None
    ) -> None:
        self.fn = fn
        self.options = options
        self.name = options.name
        self.identity = (options.name, fn.__module__, fn.__qualname__)
        self.is_async = inspect.iscoroutinefunction(fn)
        code = getattr(fn, "__code__", None)
        self.is_plain = (
            code is not None
            and bool(code.co_flags & inspect.CO_COROUTINE)  # not `inspect.markcoroutinefunction`
            and not (options.timeout or options.concurrency or options.on_success)
        )
        """Whether a body is a coroutine without limits and hooks of its own (engine/calls.py)."""
        self._codec_name = codec
        signature = inspect.signature(fn)
        plain = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        self._signature = signature if any(p.kind is p.VAR_POSITIONAL for p in plain) else None
        self._names = tuple(p.name for p in plain)
        self._defaults = {p.name: p.default for p in plain if p.default is not p.empty}
        update_wrapper(cast(Any, self), fn)
        self._result: ResultCodec | None = None
        self._threads: DaemonThreads | None = None  # of plain calls outside a run

    if not TYPE_CHECKING:  # the type checker knows the attributes

        def __getattr__(self, name: str) -> Any:
            """For methods of other libraries; called for names that this class does not have."""
            if name in ("submit", "delay", "apply_async"):
                task = self.__dict__.get("name", "task")
                raise AttributeError(
                    f"a task has no {name}(): in a flow write `await {task}(...)`, or several at "
                    f"once with asyncio.gather or {task}.map(items)"
                )
            raise AttributeError(f"a task has no attribute {name!r}")

    def __repr__(self) -> str:
        _, module, name = self.identity
        return f"<task {self.name!r}: {module}.{name}>"

    @property
    def result(self) -> ResultCodec:
        """The codec of this task's values; built from the return annotation at first use."""
        if self._result is None:
            self._result = ResultCodec(
                return_annotation(self.fn), f"task {self.name!r} result", self._codec_name
            )
        return self._result

    @declaration
    def options_with(self, **changes: Unpack[TaskChanges]) -> Self:
        """The same task with other options: `score.options_with(retries=1)(order)`."""
        given = _normalized_options(self.name, dict(changes))
        return type(self)(self.fn, msgspec.structs.replace(self.options, **given), self._codec_name)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        loop = flow_loop(self.name)
        if loop is None:
            plain = self._plain(args, kwargs)
            plain.__qualname__ = f"task {self.name}"  # for Python's warning if it is not awaited
            return cast("Coroutine[Any, Any, R]", plain)
        key = self.options.key(*args, **kwargs) if self.options.key else None
        call = TaskCall(
            self,
            loop.current_scope().call_key(self.name, key),
            args,
            kwargs,
            self._fingerprint(args, kwargs, loop.large_arguments),
            call_site(),
        )
        host: Any = loop.host
        performed: Coroutine[Any, Any, R] = host.perform(call)
        return performed

    @overload
    def map(
        self,
        items: Iterable[Any],
        *,
        key: Callable[[Any], str] | None = None,
        limit: int = 1000,
        return_exceptions: Literal[False] = False,
    ) -> Coroutine[Any, Any, list[R]]: ...
    @overload
    def map(
        self,
        items: Iterable[Any],
        *,
        key: Callable[[Any], str] | None = None,
        limit: int = 1000,
        return_exceptions: bool,
    ) -> Coroutine[Any, Any, list[R | BaseException]]: ...
    def map(
        self,
        items: Iterable[Any],
        *more: Any,
        key: Callable[[Any], str] | None = None,
        limit: int = 1000,
        return_exceptions: bool = False,
    ) -> Coroutine[Any, Any, Any]:
        """One call per item, at most `limit` at a time; returns the values in input order.

        When an item fails after its last attempt, no new calls start, running ones end, and an
        ExceptionGroup of all errors is raised. With `return_exceptions=True`, all items run and the
        list contains the errors. `key` computes a call's name from its item, so that a recorded
        value is found again after the list has changed. Outside a run, the items are plain calls.
        """
        if more:
            with Located():
                raise UsageError(
                    f"{self.name}.map: expected one iterable, found {1 + len(more)}; write "
                    f"{self.name}.map(zip(a, b)), and let the task take a pair"
                )
        if type(limit) is not int or limit < 1:
            with Located():
                whole_number(limit, f"{self.name}.map(limit=)")
        loop = flow_loop(self.name)
        if loop is None:
            return self._plain_map(items, limit, return_exceptions)
        calls = self._calls(
            loop.current_scope().child_path(f"{self.name}.map"),
            items,
            key or self.options.key,
            loop.large_arguments,
        )
        return cast(CallPerformer, loop.host).perform_all(
            self.name, calls, limit, return_exceptions
        )

    def _calls(
        self,
        path: str,
        items: Iterable[Any],
        key: Callable[[Any], str] | None,
        large: LargeValues,
    ) -> Iterable[TaskCall]:
        seen: set[str] = set()
        for ordinal, item in enumerate(items):
            call_key = f"{path}[{key(item)}]" if key else f"{path}#{ordinal}"
            if key and call_key in seen:
                raise UsageError(
                    f"{self.name}.map(key=): two items have the key {key(item)!r}; keys must differ"
                )
            seen.add(call_key)
            yield TaskCall(self, call_key, (item,), {}, self._fingerprint((item,), {}, large))

    def _fingerprint(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], large: LargeValues
    ) -> bytes | None:
        if self._signature is not None:  # *args need the slow, general way
            bound = self.bound_arguments(args, kwargs)
            return None if bound is None else fingerprint((), (), bound, {}, large)
        if len(args) > len(self._names):
            return None  # the call of the body raises a TypeError
        return fingerprint(self._names, args, kwargs, self._defaults, large)

    def bound_arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The arguments of a call by name, as in its fingerprint; None if they do not fit."""
        if self._signature is None:
            return bind_names(self._names, args, kwargs, self._defaults)
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError:
            return None  # the call of the body raises it
        bound.apply_defaults()
        return bound.arguments

    # ----------------------------------------------------------------- outside a run

    async def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        retry = self.options.retries
        attempt = 1
        rng = random.Random()
        while True:
            enclosing = task_context()
            if enclosing is None or not enclosing.run_id:
                enter_task(TaskContext("", self.name, attempt, ""))
            try:
                return await self._plain_attempt(args, kwargs)
            except Exception as error:  # around an attempt: the Retry decides
                delay = retry.delay_after(attempt, error, rng)
                if delay is None:
                    raise
            finally:
                _current.set(enclosing)
            attempt += 1
            await asyncio.sleep(delay)

    async def _plain_attempt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        work: Coroutine[Any, Any, Any]
        work = self.fn(*args, **kwargs) if self.is_async else self._in_thread(args, kwargs)
        if self.options.timeout is None:
            return await work
        deadline = asyncio.timeout(self.options.timeout)
        try:
            async with deadline:
                return await work
        except TimeoutError:
            if deadline.expired():
                raise TaskTimedOut(self.name, self.options.timeout) from None
            raise

    async def _in_thread(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Not `asyncio.to_thread`: the process could not end before a function that never
        returns.
        """
        if self._threads is None:
            self._threads = DaemonThreads(PLAIN_THREADS, f"task {self.name}")
        future = self._threads.submit(copy_context().run, partial(self.fn, *args, **kwargs))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._threads.leave_behind(future)
            raise

    async def _plain_map(
        self, items: Iterable[Any], limit: int, return_exceptions: bool
    ) -> list[Any]:
        slots = asyncio.Semaphore(limit)

        async def one(item: Any) -> Any:
            async with slots:
                return await self._plain((item,), {})

        results = await asyncio.gather(*(one(item) for item in items), return_exceptions=True)
        return settle_map(self.name, results, return_exceptions)


class AsyncTask(Task[P, R]):
    """A task whose function is `async def`."""

    fn: Callable[P, Coroutine[Any, Any, R]]
    """The undecorated function."""


class PlainTask(Task[P, R]):
    """A task whose function is a plain `def`."""

    fn: Callable[P, R]
    """The undecorated function."""


def settle_map(name: str, results: Sequence[Any], return_exceptions: bool) -> list[Any]:
    """The results as a list. Raises an ExceptionGroup of the errors among them, if asked to."""
    errors = [result for result in results if isinstance(result, Exception)]
    if errors and not return_exceptions:
        raise ExceptionGroup(f"{len(errors)} items of {name}.map failed", errors)
    return list(results)


def definition_location(fn: Callable[..., Any]) -> str | None:
    """`file:line` of a function's definition; None if it has no source."""
    code = getattr(inspect.unwrap(fn), "__code__", None)
    return None if code is None else format_location(code.co_filename, code.co_firstlineno)


def check_result(fn: Callable[..., Any], where: str, *, pickle_hint: bool) -> None:
    """UsageError if the return annotation tells that no result can be stored."""
    hints = value_or_none(get_type_hints, fn, include_extras=True)
    if hints is not None:  # else a class it names is defined, or imported, after the task
        check_return_annotation(hints.get("return", Any), where, pickle_hint=pickle_hint)


def return_annotation(fn: Callable[..., Any]) -> Any:
    """The resolved return annotation of a function; Any if there is none."""
    if "return" not in getattr(fn, "__annotations__", {}):
        return Any
    try:
        return get_type_hints(fn, include_extras=True)["return"]
    except NameError as unresolved:
        raise UsageError(
            f"{fn.__qualname__}: cannot resolve the return annotation: {unresolved}"
        ) from None


def _normalized_options(task: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of `@task`, checked and converted for `TaskOptions`."""
    if "name" in given:
        text(given["name"], f"task {task!r}: name=")
    if "retries" in given:
        given["retries"] = as_retry(given["retries"])
    if given.get("timeout") is not None:
        given["timeout"] = duration(given["timeout"], f"task {task!r}: timeout=", positive=True)
    if given.get("concurrency") is not None:
        whole_number(given["concurrency"], f"task {task!r}: concurrency=")
    one_of(given.get("on_changed", "error"), f"task {task!r}: on_changed=", get_args(OnChanged))
    for hook in ("key", "on_success", "on_failure", "on_retry"):
        callable_or_none(given.get(hook), f"task {task!r}: {hook}=")
    return given


@overload
def task(fn: Callable[P, Coroutine[Any, Any, T]], /) -> AsyncTask[P, T]: ...  # pyright: ignore[reportOverlappingOverload] (the first that fits counts)
@overload
def task(fn: Callable[P, T], /) -> PlainTask[P, T]: ...
@overload
def task(
    *,
    name: str | None = None,
    retries: Retry | int | Sequence[Duration] | None = None,
    timeout: Duration | None = None,
    concurrency: int | None = None,
    on_changed: OnChanged = "error",
    key: Callable[..., str] | None = None,
    codec: Literal["pickle"] | None = None,
    on_success: Hook | None = None,
    on_failure: Hook | None = None,
    on_retry: Hook | None = None,
) -> "TaskDecorator": ...
@declaration
def task(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    retries: Retry | int | Sequence[Duration] | None = None,
    timeout: Duration | None = None,
    concurrency: int | None = None,
    on_changed: OnChanged = "error",
    key: Callable[..., str] | None = None,
    codec: str | None = None,
    on_success: Hook | None = None,
    on_failure: Hook | None = None,
    on_retry: Hook | None = None,
) -> Any:
    """Make a function a task.

    - `retries`: a `Retry`, a number of retries, or a list of delays; default: none. `timeout`:
      seconds that one attempt may take, from the start of its body.
    - `concurrency`: the number of its bodies that execute at once in this process.
    - `on_changed`: what happens when a recorded call is repeated with other arguments: `"error"`
      holds the run, with a field diff; `"rerun"` runs the call again; `"accept"` uses the recorded
      value.
    - `key`: a callable of the arguments; its text replaces the ordinal in the call's journal key.
    - `codec`: `"pickle"` stores values that plain data cannot represent; only workers read them.
      Default: by the return annotation.
    - `on_success(value)`, `on_failure(error)`, `on_retry(error, delay)`: called afterwards on the
      worker's event loop; plain or async. Best effort: a crash may skip or repeat a call, and an
      exception is logged.
    """

    given: dict[str, Any] = {
        "retries": retries,
        "timeout": timeout,
        "concurrency": concurrency,
        "on_changed": on_changed,
        "key": key,
        "on_success": on_success,
        "on_failure": on_failure,
        "on_retry": on_retry,
    }
    if name is not None:
        text(name, "@task(name=)")
    given = _normalized_options(name or getattr(fn, "__name__", "?"), given)

    def decorate(function: Callable[..., Any]) -> Task[..., Any]:
        with Located(definition_location(function)):
            if not inspect.isroutine(function):
                raise UsageError(f"@task expected a function, found {function!r}")
            options = TaskOptions(name or function.__name__, **given)
            is_async = inspect.iscoroutinefunction(function)
            kind: Any = AsyncTask if is_async else PlainTask
            made: Task[..., Any] = kind(function, options, codec)
            if codec is None:
                check_result(function, f"task {made.name!r}", pickle_hint=True)
            return made

    return decorate if fn is None else decorate(fn)


class TaskDecorator(Protocol):
    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, T]], /) -> AsyncTask[P, T]: ...  # pyright: ignore[reportOverlappingOverload]
    @overload
    def __call__(self, fn: Callable[P, T], /) -> PlainTask[P, T]: ...
