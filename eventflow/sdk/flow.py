"""`@flow` makes an async function whose execution is a durable run; and the functions of flow code:
`current_run`, `sleep`, `timeout`, `emit`, `restart_with`.

A run of a flow is started by an event (routing/router.py), by `app.start` or the API, or by another
flow as its child. The engine executes it and is called from here through `FlowCallPerformer`.
Outside a run, calling a flow calls its function.
"""

import asyncio
import dis
import inspect
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from datetime import datetime, timedelta
from functools import update_wrapper
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    NoReturn,
    ParamSpec,
    Protocol,
    TypeVar,
    cast,
    overload,
)

import msgspec

from eventflow.core.clock import Duration, seconds, to_datetime
from eventflow.core.declarations import (
    Located,
    callable_or_none,
    declaration,
    duration,
    one_of,
    text,
    user_location,
    whole_number,
)
from eventflow.core.errors import NotAsync, UsageError
from eventflow.core.retry import NO_RETRY, Retry, as_retry
from eventflow.events.event import Event, Json
from eventflow.events.storable import storable_text
from eventflow.logs.log import Log, get_logger
from eventflow.loop.flow_loop import flow_loop
from eventflow.loop.unawaited import CallSite, call_site
from eventflow.routing.binding import Binder
from eventflow.sdk.task import (
    CallPerformer,
    Hook,
    Task,
    check_result,
    definition_location,
    return_annotation,
    task_context,
)
from eventflow.serialization.codecs import ResultCodec

P = ParamSpec("P")
T = TypeVar("T")

log = get_logger("eventflow.flow")
LOG_EVENTS = {
    "flow.called_directly": (
        "A flow was called like a plain function while an App is open, outside of a flow: the call "
        "is not recorded."
    ),
}


class FlowOptions(msgspec.Struct, frozen=True):
    """The options of `@flow(...)`. Durations in seconds."""

    name: str
    timeout: float | None = None
    concurrency: int | None = None
    priority: int = 0
    timeout_counts: str = "wall"
    grace: float = 20.0
    retries: Retry = NO_RETRY
    on_success: Hook | None = None
    on_failure: Hook | None = None
    on_retry: Hook | None = None


class RunContext:
    """The current run, as `current_run()` returns it in a flow and in its task bodies.

    `event` started the run; of several `events`, it is the newest. `now` is the time of the last
    value that the journal delivered, `random` a generator seeded by the run: in the flow, both give
    the same values when it is replayed. A task body has a separate generator, which does not.
    `state` is what the App's lifespan yielded.
    """

    __slots__ = (
        "_body_random",
        "_events",
        "_flow_random",
        "_now",
        "_payloads",
        "_seed",
        "flow",
        "id",
        "state",
    )

    def __init__(
        self,
        ident: str,
        flow: str,
        payloads: Sequence[bytes],
        now: Callable[[], int],
        state: Any,
        generation: int = 0,
        repeats: str | None = None,
    ) -> None:
        self.id: str = ident
        self.flow: str = flow
        self.state: Any = state
        self._payloads: Sequence[bytes] = payloads
        self._events: list[Event] | None = None  # decoded at the first use
        self._now: Callable[[], int] = now
        seed = repeats or ident  # a repeated run draws the numbers of the first one
        self._seed: str = f"{seed}~{generation}" if generation else seed
        self._flow_random: random.Random | None = None
        self._body_random: random.Random | None = None

    @property
    def log(self) -> Log:
        """A logger for user code, named like the flow."""
        return get_logger(self.flow)

    @property
    def random(self) -> random.Random:
        """In the flow a generator seeded by the run; in a task body one that is not replayed."""
        if task_context() is not None:  # draws of a task body must not change those of the flow
            self._body_random = self._body_random or random.Random()
            return self._body_random
        self._flow_random = self._flow_random or random.Random(self._seed)
        return self._flow_random

    @property
    def event(self) -> Event | None:
        """The event that started the run, the newest of several; None for a child run."""
        events = self._decode_events()
        return events[-1] if events else None

    @property
    def events(self) -> list[Event]:
        """The events of the run, in the order recorded.

        One, or several with `app.on(deliver=)`, or none for a child run.
        """
        return list(self._decode_events())

    def _decode_events(self) -> list[Event]:
        if self._events is None:
            self._events = [Event.from_recorded(payload) for payload in self._payloads]
        return self._events

    @property
    def now(self) -> datetime:
        """The time of the last value that the journal delivered: the same in a replay."""
        return to_datetime(self._now())


class Openable(Protocol):
    """An App, which is defined above this module."""

    @property
    def is_open(self) -> bool: ...


opened_app: ContextVar[Openable | None] = ContextVar("eventflow_opened_app", default=None)
"""The App that was opened last in this context, such as by `async with app:` around the code. It
may have been closed since then.
"""


def _is_in_open_app() -> bool:
    app = opened_app.get()
    return app is not None and app.is_open


_run: ContextVar[RunContext | None] = ContextVar("eventflow_run", default=None)


def current_run() -> RunContext:
    """The run that this code is executed in. Raises UsageError outside a run."""
    context = _run.get()
    if context is None:
        raise UsageError(
            "current_run(): expected to be called in a flow or a task of a run, found none"
        )
    return context


def enter_run(context: RunContext) -> None:
    """Set `current_run()` in this contextvars context."""
    _run.set(context)


class FlowCallPerformer(CallPerformer, Protocol):
    """What flow code needs of the engine; implemented by `engine.execution.Execution`."""

    def child_call(
        self, flow: "Flow[..., Any]", args: tuple[Any, ...], kwargs: dict[str, Any], site: CallSite
    ) -> Any:
        """A call to pass to `perform`; it has its call key."""
        ...

    def perform_emit(self, event_type: str, fields: dict[str, Any]) -> Coroutine[Any, Any, str]: ...

    def perform_restart(self, params: dict[str, Any]) -> Coroutine[Any, Any, NoReturn]: ...


class Flow(Generic[P, T]):
    """A flow, made by `@flow`."""

    fn: Callable[P, Coroutine[Any, Any, T]]
    """The undecorated function."""

    def __init__(self, fn: Callable[P, Coroutine[Any, Any, T]], options: FlowOptions) -> None:
        if not inspect.iscoroutinefunction(fn):
            raise NotAsync(getattr(fn, "__name__", str(fn)), inspect.isasyncgenfunction(fn))
        self.fn = fn
        self.options = options
        self.name = options.name
        self.priority = options.priority
        self._binder: Binder | None = None
        self._result: ResultCodec | None = None
        self.open_app: str | None = None
        """The name of the open App that runs it; None while there is none."""
        self._direct_calls: set[str] = set()
        update_wrapper(cast(Any, self), fn)

    if not TYPE_CHECKING:  # the type checker knows the attributes

        def __getattr__(self, name: str) -> Any:
            """For methods of other libraries; called for names that this class does not have."""
            if name in ("serve", "deploy", "submit", "delay"):
                flow = self.__dict__.get("name", "flow")
                raise AttributeError(
                    f"a flow has no {name}(): to run it on events, app.on(trigger, {flow}) and "
                    f"`eventflow serve FILE`; to run it once, `await app.start({flow}, ...)`"
                )
            raise AttributeError(f"a flow has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<flow {self.name!r}: {self.fn.__module__}.{self.fn.__qualname__}>"

    @property
    def binder(self) -> Binder:
        """How events and parameters become arguments; built at first use, so that forward
        references resolve.
        """
        if self._binder is None:
            self._binder = Binder(self.fn, self.name)
        return self._binder

    @property
    def call_form(self) -> str:
        """`name, x=...`: what `app.start` takes, with the parameters that have no default."""
        parameters = inspect.signature(self.fn).parameters.values()
        required = [each.name for each in parameters if each.default is each.empty]
        return ", ".join([self.name, *(f"{name}=..." for name in required)])

    @property
    def result(self) -> ResultCodec:
        if self._result is None:
            self._result = ResultCodec(return_annotation(self.fn), f"flow {self.name!r} result")
        return self._result

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        loop = flow_loop(self.name)
        if loop is None:
            if self.open_app is not None or _is_in_open_app() or task_context() is not None:
                self._report_direct_call()
            return self.fn(*args, **kwargs)
        host = cast(FlowCallPerformer, loop.host)
        call = host.child_call(self, args, kwargs, call_site())
        return cast("Coroutine[Any, Any, T]", host.perform(call))

    def _report_direct_call(self) -> None:
        """Warns, once for each place: a flow called like a function starts no run."""
        at = user_location()
        if at not in self._direct_calls:
            self._direct_calls.add(at)
            hint = f"to start a run: await app.start({self.call_form})"
            if task_context() is not None:
                hint = "a task starts no runs: call it in a flow, or emit an event that starts it"
            elif self.open_app is None:
                hint = f"no open App has it: app.add({self.name}) before the App opens; {hint}"
            log.warning("flow.called_directly", flow=self.name, at=at, hint=hint)


def referenced_flows(flow: Flow[..., Any]) -> list[Flow[..., Any]]:
    """The flows that this flow's code refers to, and may therefore start as children.

    Includes references in functions of its package that it refers to. Needed because a child run
    that a crash interrupted may be claimed before its parent has called the child flow again.
    """
    found: list[Flow[..., Any]] = []
    functions: list[Any] = [flow.fn]
    for function in functions:  # grows as it goes
        for value in _referenced_values(function):
            if isinstance(value, Flow):
                found.append(cast("Flow[..., Any]", value))
                functions += [value.fn] if value.fn not in functions else []
            elif (
                inspect.isfunction(value)
                and value not in functions
                and _top_package(value) == _top_package(function)
            ):
                functions.append(value)
    return found


def check_task_names(flow: Flow[..., Any]) -> None:
    """UsageError if the flow's code refers to two tasks of one name in two modules.

    Calls are named by task, so the two would get each other's recorded values. In one module the
    second has its name from `@task(name=…)`: it replaces the first on purpose. Functions of the
    flow's package count too; what is only reached through other objects is not found.
    """
    known: dict[str, Task[..., Any]] = {}
    functions: list[Any] = [flow.fn]
    for function in functions:  # grows as it goes
        for value in _used_values(function):
            if isinstance(value, Task):
                task = cast("Task[..., Any]", value)
                other = known.setdefault(task.name, task)
                _, module, name = task.identity
                if other.identity[1] != module:
                    raise UsageError(
                        f"flow {flow.name!r} calls two tasks named {task.name!r}: "
                        f"{other.identity[1]}.{other.identity[2]} and {module}.{name}; give one of "
                        "them @task(name=...)"
                    )
            elif (
                inspect.isfunction(value)
                and value not in functions
                and _top_package(value) == _top_package(function)
            ):
                functions.append(value)


def _top_package(function: Any) -> str:
    return function.__module__.partition(".")[0]


def _referenced_values(function: Any) -> list[Any]:
    """The values of names in a function's code: globals, module attributes and closure cells."""
    codes = [function.__code__]
    values: list[Any] = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not bound yet
            values.append(cell.cell_contents)
    for code in codes:
        codes.extend(const for const in code.co_consts if inspect.iscode(const))
        known = [
            function.__globals__[name] for name in code.co_names if name in function.__globals__
        ]
        modules = [value for value in known if inspect.ismodule(value)]
        values += known + [
            vars(module)[name]
            for module in modules
            for name in code.co_names
            if name in vars(module)
        ]
    return values


def _used_values(function: Any) -> list[Any]:
    """The values that a function's code loads: globals, closure cells, attributes of modules."""
    cells: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not bound yet
            cells[name] = cell.cell_contents
    codes = [function.__code__]
    values: list[Any] = []
    for code in codes:  # grows as it goes
        codes.extend(const for const in code.co_consts if inspect.iscode(const))
        loaded: Any = None
        for instruction in dis.get_instructions(code):
            match instruction.opname:
                case "LOAD_GLOBAL" | "LOAD_NAME":
                    loaded = function.__globals__.get(instruction.argval)
                case "LOAD_DEREF" | "LOAD_CLASSDEREF":
                    loaded = cells.get(instruction.argval)
                case "LOAD_ATTR" | "LOAD_METHOD" if inspect.ismodule(loaded):
                    loaded = vars(loaded).get(instruction.argval)
                case _:
                    loaded = None
            values.append(loaded)
    return values


@overload
def flow(fn: Callable[P, Coroutine[Any, Any, T]], /) -> Flow[P, T]: ...
@overload
def flow(
    *,
    name: str | None = None,
    timeout: Duration | None = None,
    concurrency: int | None = None,
    priority: int = 0,
    timeout_counts: str = "wall",
    grace: Duration = 20.0,
    retries: Retry | int | Sequence[Duration] | None = None,
    on_success: Hook | None = None,
    on_failure: Hook | None = None,
    on_retry: Hook | None = None,
) -> "FlowDecorator": ...
@declaration
def flow(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    timeout: Duration | None = None,
    concurrency: int | None = None,
    priority: int = 0,
    timeout_counts: str = "wall",
    grace: Duration = 20.0,
    retries: Retry | int | Sequence[Duration] | None = None,
    on_success: Hook | None = None,
    on_failure: Hook | None = None,
    on_retry: Hook | None = None,
) -> Any:
    """Make an `async def` function a flow.

    - `timeout`: seconds that a run may take from its first start, waits included; with
      `timeout_counts="running"`, without the time in which it is suspended. `grace`: seconds for
      `finally` blocks after a cancel or a timeout. With `retries`, both limit one attempt.
    - `retries`: a `Retry`, a number of retries, or a list of delays; default: none. A run that
      fails waits for the delay and is executed again as by `eventflow retry`: recorded values are
      kept, and calls that failed (after all retries of their task) are made again.
    - `concurrency`: the number of its runs that work at once; the others wait. A run whose every
      branch waits (a sleep, a retry, a child run) does not count. `priority`: runs
      with a higher one start first, within this flow.
    - `on_success(run, value)`, `on_failure(run, error)`, `on_retry(run, error, delay)`: called
      after the outcome is recorded, best effort.
    """

    where = f"flow {name or getattr(fn, '__name__', '?')!r}:"
    if name is not None:
        text(name, "@flow(name=)")
    if concurrency is not None:
        whole_number(concurrency, f"{where} concurrency=")
    one_of(timeout_counts, f"{where} timeout_counts=", ("wall", "running"))
    hooks = {"on_success": on_success, "on_failure": on_failure, "on_retry": on_retry}
    for hook, given in hooks.items():
        callable_or_none(given, f"{where} {hook}=")
    options: dict[str, Any] = {
        "timeout": None
        if timeout is None
        else duration(timeout, f"{where} timeout=", positive=True),
        "concurrency": concurrency,
        "priority": whole_number(priority, f"{where} priority=", minimum=-(1 << 63)),
        "timeout_counts": timeout_counts,
        "grace": duration(grace, f"{where} grace="),
        "retries": as_retry(retries),
        **hooks,
    }

    def decorate(function: Callable[..., Any]) -> Flow[..., Any]:
        with Located(definition_location(function)):
            made: Flow[..., Any] = Flow(
                function, FlowOptions(name or getattr(function, "__name__", "flow"), **options)
            )
            check_result(function, f"flow {made.name!r}", pickle_hint=False)
            return made

    return decorate if fn is None else decorate(fn)


class FlowDecorator(Protocol):
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, T]], /) -> Flow[P, T]: ...


async def sleep(delay: Duration) -> None:
    """Wait for `delay`. In a flow, the wait is durable.

    It survives a crash, and a run that waits for a minute or more is not kept in memory. A delay
    of 0 or less waits for nothing, an infinite one until the run is cancelled. Raises UsageError
    for NaN and for what is no number.
    """
    await asyncio.sleep(_delay(delay, "sleep(delay)"))


def timeout(delay: Duration | None) -> asyncio.Timeout:
    """`async with timeout(30):` cancels the block after 30 s and raises TimeoutError.

    Durable in a flow.
    """
    return asyncio.timeout(None if delay is None else _delay(delay, "timeout(delay)"))


def _delay(given: Duration, what: str) -> float:
    """Seconds; any number but NaN."""
    if type(given) is timedelta or (type(given) in (int, float) and given == given):
        return seconds(given)
    with Located():
        return duration(given, what, unbounded=True)


async def emit(
    event_type: str,
    data: Json = None,
    *,
    subject: str | None = None,
    **extensions: str | int | bool,
) -> str:
    """Emit an event; `app.on(event_type, flow)` subscribes to it. Returns its id.

    In a flow, it is a journal entry: published by the commit that records it, exactly once, and
    never undone. In a task body, it is published with the task's success, and not if it fails.
    Raises UsageError for attributes that CloudEvents does not have.
    """
    _check_attributes(event_type, subject, extensions)
    fields: dict[str, Any] = {"data": data, "subject": subject, "extensions": extensions}
    loop = flow_loop("emit")
    if loop is not None:
        return await cast(FlowCallPerformer, loop.host).perform_emit(event_type, fields)
    body = task_context()
    if body is None or not body.run_id:
        raise UsageError(
            "emit(): expected to be called in a flow or a task of a run; outside, use `await "
            "app.emit(...)`"
        )
    return body.emit(event_type, fields)


_OWN_ATTRIBUTES = (
    "specversion",
    "id",
    "source",
    "type",
    "time",
    "datacontenttype",
    "dataschema",
    "data_base64",
)


def _check_attributes(event_type: str, subject: str | None, extensions: Mapping[str, Any]) -> None:
    """UsageError for what would replace an attribute of the event, or could not be recorded."""
    for name, value in (("event_type", event_type), ("subject", subject), *extensions.items()):
        if name in _OWN_ATTRIBUTES:
            raise UsageError(f"emit({name}=): expected an extension, found an event's attribute")
        if isinstance(value, str) and not value.isascii() and storable_text(value) != value:
            raise UsageError(f"emit({name}=): expected text, found a lone surrogate in {value!a}")
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise UsageError(f"emit({name}=): expected an integer of 64 bits, found {value}")


async def restart_with(**params: Any) -> NoReturn:
    """Restart the run under the same id, with these parameters and an empty journal.

    For flows that never end: `await restart_with(cursor=cursor)` every few thousand steps keeps the
    journal short. Pending calls are cancelled, child runs included; the code after it does not run.
    Task calls after the restart have new idempotency keys.
    """
    loop = flow_loop("restart_with")
    if loop is None:
        raise UsageError("restart_with(): expected to be called in a flow, found no run here")
    await cast(FlowCallPerformer, loop.host).perform_restart(params)
