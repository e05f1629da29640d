"""`@flow`: an async function whose execution is a durable run, and the words flow code uses: `current_run`, `sleep`, `timeout`,
`emit`, `restart_with`.

A flow is started by an event (routing.py), by a door (`app.start`, the API), or by another flow, whose child it then is. The
executor runs it. Called outside a run and outside an App it is just its function.
"""

import asyncio
import inspect
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import ContextVar
from datetime import datetime
from functools import update_wrapper
from typing import Any, Generic, NoReturn, ParamSpec, Protocol, TypeVar, cast, overload

import msgspec

from eventflow.core.clock import Duration, seconds, to_datetime
from eventflow.core.errors import NotAsync, UsageError
from eventflow.events.event import Event, Json
from eventflow.logs.log import Log, get_logger
from eventflow.loop.flow_loop import flow_loop
from eventflow.routing.binding import Binder
from eventflow.sdk.task import CallPerformer, Hook, return_annotation, task_context
from eventflow.serialization.codecs import ResultCodec

P = ParamSpec("P")
T = TypeVar("T")


class FlowOptions(msgspec.Struct, frozen=True):
    """What `@flow(...)` was given. Durations are seconds."""

    name: str
    timeout: float | None = None
    concurrency: int | None = None
    priority: int = 0
    timeout_counts: str = "wall"
    grace: float = 20.0
    on_success: Hook | None = None
    on_failure: Hook | None = None


class RunContext:
    """What `current_run()` tells a flow (and its task bodies).

    `id` and `event` say what is running and why; of a run that gathered several, `events` are all, `event` the newest. `now` is
    the time of the last thing the journal delivered, `random` a generator seeded by the run: both replay alike in the flow. A
    task body has a generator of its own, which does not. `state` is what the App's lifespan yielded.
    """

    __slots__ = ("_body_random", "_events", "_flow_random", "_now", "_seed", "flow", "id", "state")

    def __init__(
        self,
        ident: str,
        flow: str,
        events: Callable[[], list[Event]],
        now: Callable[[], int],
        state: Any,
        generation: int = 0,
    ) -> None:
        self.id, self.flow, self.state = ident, flow, state
        self._events, self._now = events, now
        self._seed = f"{ident}~{generation}" if generation else ident
        self._flow_random: random.Random | None = None
        self._body_random: random.Random | None = None

    @property
    def log(self) -> Log:
        """A logger named like the flow, for the user's own lines."""
        return get_logger(self.flow)

    @property
    def random(self) -> random.Random:
        if (
            task_context() is not None
        ):  # a body draws when it happens to run: it must not move what the flow draws next
            self._body_random = self._body_random or random.Random()
            return self._body_random
        self._flow_random = self._flow_random or random.Random(self._seed)
        return self._flow_random

    @property
    def event(self) -> Event | None:
        """The event that started the run, the newest if there are several; None for a child run."""
        events = self._events()
        return events[-1] if events else None

    @property
    def events(self) -> list[Event]:
        """All events of the run, in the order recorded: one, several (`app.on(deliver=)`), or none for a child run."""
        return list(self._events())

    @property
    def now(self) -> datetime:
        return to_datetime(self._now())


_run: ContextVar[RunContext | None] = ContextVar("eventflow_run", default=None)


def current_run() -> RunContext:
    """The run this code belongs to. Raises UsageError outside one."""
    context = _run.get()
    if context is None:
        raise UsageError(
            "current_run(): expected to be called in a flow or a task of a run, found none"
        )
    return context


def enter_run(context: RunContext) -> None:
    """Makes `context` the current one of this contextvars context."""
    _run.set(context)


class FlowCallPerformer(CallPerformer, Protocol):
    """The executor, as flow code sees it."""

    def perform_flow(
        self, flow: "Flow[..., Any]", args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]: ...

    def perform_emit(self, event_type: str, fields: dict[str, Any]) -> Coroutine[Any, Any, str]: ...

    def perform_restart(self, params: dict[str, Any]) -> Coroutine[Any, Any, NoReturn]: ...


class Flow(Generic[P, T]):
    """A flow, made by `@flow`."""

    def __init__(self, fn: Callable[..., Coroutine[Any, Any, Any]], options: FlowOptions) -> None:
        if not inspect.iscoroutinefunction(fn):
            raise NotAsync(getattr(fn, "__name__", str(fn)))
        self.fn = fn
        self.options = options
        self.name = options.name
        self.priority = options.priority
        self._binder: Binder | None = None
        self._result: ResultCodec | None = None
        update_wrapper(cast(Any, self), fn)

    @property
    def binder(self) -> Binder:
        """How events and parameters become arguments; built at first use, so that forward references resolve."""
        if self._binder is None:
            self._binder = Binder(self.fn, self.name)
        return self._binder

    @property
    def result(self) -> ResultCodec:
        if self._result is None:
            self._result = ResultCodec(return_annotation(self.fn), f"flow {self.name!r} result")
        return self._result

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        loop = flow_loop(self.name)
        if loop is None:
            return cast("Coroutine[Any, Any, T]", self.fn(*args, **kwargs))
        return cast(
            "Coroutine[Any, Any, T]",
            cast(FlowCallPerformer, loop.host).perform_flow(self, args, kwargs),
        )


def referenced_flows(flow: Flow[..., Any]) -> list[Flow[..., Any]]:
    """The flows that this one's code names, itself or in the functions of its package that it names: those it may start as
    children.

    A child that a crash left in flight is claimed before its parent has called it again; its flow must be known by then.
    """
    found: list[Flow[..., Any]] = []
    functions: list[Any] = [flow.fn]
    for function in functions:  # grows as it goes
        for value in _named(function):
            if isinstance(value, Flow):
                found.append(cast("Flow[..., Any]", value))
                functions += [value.fn] if value.fn not in functions else []
            elif (
                inspect.isfunction(value)
                and value not in functions
                and _package(value) == _package(function)
            ):
                functions.append(value)
    return found


def _package(function: Any) -> str:
    return function.__module__.partition(".")[0]


def _named(function: Any) -> list[Any]:
    """What the names in a function's code stand for: globals, attributes of modules, and what it closes over."""
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
    on_success: Hook | None = None,
    on_failure: Hook | None = None,
) -> "FlowDecorator": ...
def flow(fn: Callable[..., Any] | None = None, /, *, name: str | None = None, **given: Any) -> Any:
    """Makes an `async def` function a flow.

    - `timeout`: seconds a run may take from its first start, waits included (`timeout_counts="running"` leaves out the time it
      is suspended). `grace`: how long `finally` blocks may work after a cancel or a timeout.
    - `concurrency`: how many runs of it execute at once; the rest wait. `priority`: higher first, within this flow.
    - `on_success(run, value)`, `on_failure(run, error)`: called after the outcome is recorded, best effort.
    """

    def decorate(function: Callable[..., Any]) -> Flow[..., Any]:
        for duration in ("timeout", "grace"):
            if given.get(duration) is not None:
                given[duration] = seconds(given[duration])
        if given.get("timeout_counts", "wall") not in ("wall", "running"):
            raise UsageError(
                f'timeout_counts= expected "wall" or "running", found {given["timeout_counts"]!r}'
            )
        if given.get("concurrency") is not None and given["concurrency"] < 1:
            raise UsageError(f"concurrency= expected at least 1, found {given['concurrency']}")
        return Flow(function, FlowOptions(name or getattr(function, "__name__", "flow"), **given))

    return decorate if fn is None else decorate(fn)


class FlowDecorator(Protocol):
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, T]], /) -> Flow[P, T]: ...


async def sleep(delay: Duration) -> None:
    """Waits. In a flow it is durable: it survives a crash, and a wait of a minute or more holds no memory."""
    await asyncio.sleep(seconds(delay))


def timeout(delay: Duration | None) -> asyncio.Timeout:
    """`async with timeout(30):` cancels the block when time is up and raises TimeoutError. Durable in a flow."""
    return asyncio.timeout(None if delay is None else seconds(delay))


async def emit(
    event_type: str,
    data: Json = None,
    *,
    subject: str | None = None,
    **extensions: str | int | bool,
) -> str:
    """Publishes an event; `app.on(event_type, flow)` subscribes to it. Returns its id.

    In a flow: a journal entry, published by the commit that records it, never twice, never undone. In a task body:
    published with the task's success, and not at all if it fails.
    """
    fields: dict[str, Any] = {"data": data, "subject": subject, "extensions": extensions}
    loop = flow_loop("emit")
    if loop is not None:
        return await cast(FlowCallPerformer, loop.host).perform_emit(event_type, fields)
    body = task_context()
    if body is None or not body.run_id:
        raise UsageError(
            "emit(): expected to be called in a flow or a task of a run; outside, use `await app.emit(...)`"
        )
    return body.emit(event_type, fields)


async def restart_with(**params: Any) -> NoReturn:
    """Ends this life of the run and begins it afresh under the same id, with these parameters and an empty journal.

    For flows that go on for ever: `await restart_with(cursor=cursor)` every few thousand steps keeps the journal short.
    Everything still under way is cancelled, child runs included; code after it does not run. Effects of the new life have new
    idempotency keys.
    """
    loop = flow_loop("restart_with")
    if loop is None:
        raise UsageError("restart_with(): expected to be called in a flow, found no run here")
    await cast(FlowCallPerformer, loop.host).perform_restart(params)
