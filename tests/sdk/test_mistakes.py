"""What newcomers write, and what they are told: at the line that they wrote, with what to write."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import triggers
from eventflow import (
    App,
    Batch,
    Event,
    Retry,
    UsageError,
    all_of,
    count,
    flow,
    part,
    sequence,
    task,
)
from eventflow.core.errors import BindingError, NotAsync, NotFound, NotStorable
from eventflow.testing import MemoryTrigger, result_of, running
from triggers import Bearer, Directory, Every, Webhook, outcome

HERE = Path(__file__).name


@task
async def score(order: int) -> int:
    return order


@flow
async def handle(order: int) -> int:
    return await score(order)


@flow
async def other(order: int) -> int:
    return order


async def plain(order: int) -> int:
    return order


SCORE: Any = score
HANDLE: Any = handle


def app() -> Any:
    return App("mistaken")


def _call_of_a_flow() -> None:
    app().on("a", handle(1))


def _two_flows_on_one_path() -> None:
    hooked = app()
    hooked.on(Webhook("/orders", verify="none"), handle)
    hooked.on(Webhook("/orders", verify="none", name="second"), other)


def _generator() -> None:
    @flow  # type: ignore[arg-type]
    async def rows():  # type: ignore[no-untyped-def]
        yield 1


DECLARED: dict[str, tuple[Callable[[], Any], str]] = {
    "App without a name": (App, "App: .*'name'; write App(name, ...)"),  # type: ignore[call-arg]
    "Webhook without verify": (
        lambda: Webhook("/orders"),  # type: ignore[call-arg]
        "'verify'; write Webhook(path, verify=..., ...)",
    ),
    "app.on as a decorator": (
        lambda: app().on(Every(5)),
        "'flow'; write App.on(trigger, flow, ...)",
    ),
    "all_of without within": (
        lambda: all_of("a", "b"),  # type: ignore[call-arg]
        "'within'; write all_of(*parts, within=..., ...)",
    ),
    "count without within": (
        lambda: count("a", 3),  # type: ignore[call-arg]
        "write count(what, n, within=..., ...)",
    ),
    "sequence without names": (
        lambda: sequence("a", "b", within=60),  # type: ignore[call-arg, misc]
        "write sequence(first, then=..., within=..., ...)",
    ),
    "Batch without within": (lambda: Batch(3), "write Batch(size, within)"),  # type: ignore[call-arg]
    "Batch itself": (lambda: app().on("a", handle, deliver=Batch), "deliver= expected Each()"),
    "a cron expression": (
        lambda: app().on("0 6 * * *", handle),
        "did you mean Cron('0 6 * * *')",
    ),
    "a cron name": (lambda: app().on("@daily", handle), "did you mean Cron('@daily')"),
    "a cron expression in a pattern": (
        lambda: any((part("*/5 * * * *"),)),
        "did you mean Cron('*/5 * * * *')",
    ),
    "app.flow as a decorator": (lambda: app().flow(plain), "'plain'; decorate it with @flow"),
    "a plain function": (lambda: app().on("a", plain), "'plain'; decorate it with @flow"),
    "a task for a flow": (lambda: app().on("a", score), "the task 'score'; only flows have runs"),
    "a call for a flow": (_call_of_a_flow, "a call of 'handle'; write handle, not handle()"),
    "an async generator": (_generator, "found an async generator; collect the values"),
    "two webhooks of one path": (
        _two_flows_on_one_path,
        "/hooks/orders: .* make one trigger and pass it to app.on for each flow",
    ),
    "a comparison as a field": (
        lambda: app().on("a", handle, where={"total": {">": 0}}),
        'for a comparison write [{"numeric": [">", 0]}]',
    ),
    "another comparison": (
        lambda: app().on("a", handle, where={"state": {"!=": "done"}}),
        'for a comparison write [{"anything-but": "done"}]',
    ),
    "a folder's name for what happens to files": (
        lambda: Directory("in", after="done"),  # type: ignore[arg-type]
        "after= expected move(\"FOLDER\") or delete(), or outcome(.*found 'done'",
    ),
    "a folder's name for what happens to files after their runs": (
        lambda: outcome(completed="done"),  # type: ignore[arg-type]
        "completed= expected move(\"FOLDER\") or delete(), found 'done'",
    ),
    "a pattern that repeats the folder": (
        lambda: Directory("/srv/in", pattern="/srv/in/*.csv"),
        "pattern= is relative to the root; write '/*.csv'",
    ),
    "a file for the folder": (
        lambda: Directory(__file__),
        "expected a directory, found a file; write Directory('.*', pattern='/test_mistakes.py')",
    ),
    "a number for the attempts": (
        lambda: Retry(3),  # type: ignore[call-arg, misc]
        "write Retry(attempts=..., ...)",
    ),
    "arguments for params": (
        lambda: app().on("a", handle, params={"order": 5}),  # type: ignore[arg-type]
        "params= expected a function from the event .*found {'order': 5}",
    ),
    "the prefix of all webhooks": (
        lambda: Webhook("/hooks/orders", verify="none"),
        "every path is below /hooks; write '/orders'",
    ),
    "a misspelled option whose beginning is right": (
        lambda: task(retry=3),  # type: ignore[call-overload]
        "did you mean retries=?",
    ),
    "another library's delay between retries": (
        lambda: task(retries=3, retry_delay_seconds=5),  # type: ignore[call-overload]
        "write retries=Retry(attempts=..., delay=...)",
    ),
    "a secret that os.getenv did not find": (
        lambda: Bearer(None),  # type: ignore[arg-type]
        'found None; write env("NAME"), which is read when the app starts',
    ),
}


@pytest.mark.parametrize("case", DECLARED)
def test_a_declaration_that_cannot_be_meant_is_refused(case: str) -> None:
    """A call that cannot be meant as written is a UsageError with the call that can, and the
    user's file and line.
    """
    declare, message = DECLARED[case]
    pattern = ".*".join(map(re.escape, message.split(".*")))
    with pytest.raises(UsageError, match=f"(?s){pattern}") as refused:
        declare()
    where = refused.value.location or ""
    assert isinstance(refused.value, NotAsync) or case == "app.flow as a decorator" or HERE in where


@pytest.mark.parametrize("name", triggers.__all__)
def test_a_trigger_imported_from_eventflow(name: str) -> None:
    """`from eventflow import Cron`, for every name of `triggers`, says where it is."""
    with pytest.raises(ImportError, match=f"write `from triggers import {name}`"):
        exec(f"from eventflow import {name}")
    with pytest.raises(AttributeError):
        importlib.import_module("eventflow").nothing  # noqa: B018


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("args", "params", "message"),
    [
        ((3,), {}, r"by name, found 1 positional; write app.start\(handle, order=...\)"),
        (({"order": 3},), {}, r"write app.start\(handle, order=...\)"),
        ((), {"ordre": 3}, "'ordre': the flow has no such parameter; did you mean order"),
        ((), {}, "'order': missing; given are no fields"),
    ],
)
async def test_parameters_of_a_start(args: Any, params: Any, message: str) -> None:
    """`app.start` with parameters that do not fit names the parameter, or how to pass one."""
    async with running(App("mistaken")) as opened:
        with pytest.raises((UsageError, BindingError), match=message):
            await opened.start(handle, *args, **params)
        with pytest.raises((UsageError, BindingError), match=message):
            await result_of(opened, handle, *args, **params)


@pytest.mark.anyio
async def test_a_start_of_a_flow_that_the_app_has_not() -> None:
    """The start of a flow by an unknown name says which flows the app has."""
    with pytest.raises(NotFound, match=r"'mistaken' has handle; app.add\(flow\) adds one"):
        async with running(App("mistaken")) as opened:
            opened.add(handle)
            await opened.start("hndle")


@pytest.mark.anyio
async def test_an_awaited_run_names_the_call_for_its_value() -> None:
    """`await run` is a TypeError with the call that waits for the value."""
    async with running(App("mistaken")) as opened:
        run: Any = await opened.start(handle, order=1)
        with pytest.raises(TypeError, match=r"await run\.result"):
            await run
        assert await run.result() == 1


@pytest.mark.anyio
async def test_an_argument_that_cannot_be_stored() -> None:
    """The error for an argument without a JSON form speaks of the parameter, not of a result."""

    @flow
    async def takes(thing: Any) -> None: ...

    async with running(App("mistaken")) as opened:
        with pytest.raises(NotStorable, match="annotate the parameter"):
            await opened.start(takes, thing=object())


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda: SCORE.submit(3), r"write `await score\(...\)`"),
        (lambda: SCORE.delay(3), r"asyncio.gather or score.map\(items\)"),
        (
            lambda: HANDLE.serve(cron="0 6 * * *"),
            r"app.on\(trigger, handle\) and `eventflow serve",
        ),
    ],
)
def test_methods_of_other_libraries(write: Callable[[], Any], message: str) -> None:
    """A method that another library's tasks or flows have is refused with what is written here."""
    with pytest.raises(AttributeError, match=message):
        write()
    assert not hasattr(score, "nothing") and not hasattr(handle, "nothing")


def test_a_map_over_two_iterables() -> None:
    """`task.map(a, b)` is refused with `zip`, and the user's line."""
    with pytest.raises(UsageError, match=rf"write score.map\(zip\(a, b\)\).*{HERE}"):
        score.map([1], [2])  # type: ignore[call-overload]


@pytest.mark.anyio
async def test_data_in_the_place_of_an_event() -> None:
    """Data passed where an event is expected is told with the call that takes data."""
    memory = MemoryTrigger()
    mistaken = app()
    mistaken.on(memory, handle)
    async with running(mistaken) as opened:
        with pytest.raises(UsageError, match=r"expected an Event, found \{.*send\(data=\.\.\.\)"):
            await memory.send({"order": 3})  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=r"expected an Event, .*app.emit\(type, data\)"):
            await opened.accept({"order": 3})  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [{"id": "a", "total": 5}, [1, 2], "hey"])
def test_a_parameter_without_annotation_gets_the_data(data: Any) -> None:
    """The only parameter of a flow, without annotation, gets the whole data of an event."""

    @flow
    async def takes(body):  # type: ignore[no-untyped-def]
        return body

    event = Event(id="1", source="/a", type="a", data=data)
    assert takes.binder.bind_event(event) == {"body": data}
    with pytest.raises(BindingError):  # but `app.start(takes, total=5)` is a mistake
        takes.binder.bind_params({"total": 5})


def test_a_second_parameter_takes_the_data_away() -> None:
    """A flow with two parameters that gets data without their names is told why."""

    @flow
    async def takes(order: dict[str, Any], limit: int = 1) -> None: ...

    event = Event(id="1", source="/a", type="a", data={"total": 5})
    with pytest.raises(BindingError, match="has total; only a single parameter of a flow gets all"):
        takes.binder.bind_event(event)
