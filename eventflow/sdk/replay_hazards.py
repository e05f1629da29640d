"""Reads of the wall clock and of random numbers in the body of a flow, which differ in a replay.

`eventflow dev` calls `warn_of_hazards` at its start, so that users see them before the first crash.
They are found in the bytecode, by the global names of the flow's module. Reads in other functions
that the flow calls, through objects, and of modules that the body imports are not found; a replay
compares the arguments of calls in any case. A comment `# replay: ok` on the line silences the
warning.
"""

import dis
import inspect
import linecache
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType, ModuleType
from typing import Any, NamedTuple, cast

from eventflow.core.declarations import format_location
from eventflow.logs.log import get_logger
from eventflow.sdk.flow import Flow

log = get_logger("eventflow.flow")
LOG_EVENTS = {
    "flow.hazard_found": (
        "The body of a flow reads the clock or random numbers, which differ in a replay (`dev` "
        "looks for this)."
    ),
}

SILENCING_COMMENT = "replay: ok"

_CLOCK = "current_run().now"
_RANDOM = "current_run().random"
_HAZARDS: Mapping[str, str] = {
    "time.time": _CLOCK,
    "time.time_ns": _CLOCK,
    "datetime.datetime.now": _CLOCK,
    "datetime.datetime.today": _CLOCK,
    "datetime.datetime.utcnow": _CLOCK,
    "datetime.date.today": _CLOCK,
    "os.urandom": _RANDOM,
    "uuid.uuid1": _RANDOM,
    "uuid.uuid4": _RANDOM,
}
"""By name, what to write instead. All functions of `random` and `secrets` count as `_RANDOM`."""


class Hazard(NamedTuple):
    """`name` such as `time.time`, `replacement` to write instead, `at` file and line."""

    name: str
    replacement: str
    at: str


def warn_of_hazards(flows: Iterable[Flow[..., Any]]) -> None:
    """Logs a warning for each place in the bodies of these flows."""
    for flow in flows:
        for hazard in find_hazards(flow.fn):
            log.warning(
                "flow.hazard_found",
                flow=flow.name,
                call=hazard.name,
                at=hazard.at,
                hint=f"it differs in a replay: write {hazard.replacement}, or call it in a task; "
                f"# {SILENCING_COMMENT} on the line silences this",
            )


def find_hazards(fn: Callable[..., Any]) -> list[Hazard]:
    """The hazards in the body of a function and in functions nested in it, each place once."""
    function = inspect.unwrap(fn)
    code = getattr(function, "__code__", None)
    if code is None:
        return []
    return list(dict.fromkeys(_hazards_in(code, function.__globals__)))


def _hazards_in(code: CodeType, names: Mapping[str, Any]) -> Iterator[Hazard]:
    found: Any = None
    parent = ""
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            found = names.get(str(step.argval))
            parent = ""
            name = _function_name(found)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(found, ModuleType | type):
            parent = _owner_name(found)
            name = f"{parent}.{step.argval}"
            found = vars(found).get(str(step.argval))
        else:
            found = None
            continue
        instead = None if name is None else _replacement_for(name)
        if name is None or instead is None:
            continue
        line = (step.positions and step.positions.lineno) or code.co_firstlineno
        if SILENCING_COMMENT not in linecache.getline(code.co_filename, line):
            yield Hazard(name, instead, format_location(code.co_filename, line))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _hazards_in(constant, names)


def _owner_name(found: ModuleType | type) -> str:
    if isinstance(found, ModuleType):
        return found.__name__
    return f"{found.__module__}.{found.__qualname__}"


def _function_name(found: Any) -> str | None:
    """`random.random` for the object of `from random import random`; None for other objects."""
    if not inspect.isroutine(found):
        return None
    function = cast(Any, found)
    owner = getattr(function, "__self__", None)
    module = getattr(function, "__module__", None) or type(owner).__module__
    if isinstance(owner, type):
        module = _owner_name(cast(type[Any], owner))
    return f"{module}.{function.__name__}"


def _replacement_for(name: str) -> str | None:
    module, _, function = name.partition(".")
    if module in ("random", "secrets") and function.islower() and function != "seed":
        return _RANDOM
    return _HAZARDS.get(name)
