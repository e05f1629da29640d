"""`where=`: which events a subscription accepts. EventBridge's pattern grammar, or a callable.

`compile_filter` runs once, at registration, and raises UsageError, naming the path, for a malformed
pattern. `Filter.mismatch` runs for every event and returns the condition that did not hold, which
`eventflow explain` shows. A pattern is a JSON object. Its keys are fields of `data`, or `@type`,
`@subject`, `@source`, `@id`, `@time` and `@extension` for attributes; its values are lists of
alternatives, or objects for nested fields:

    {"@type": [{"prefix": "order."}],
     "total": [{"numeric": [">", 0]}],
     "customer": {"country": ["DE", "AT"]}}

As in EventBridge, an array in the event matches when any of its elements does, `exists` tests
leaves only, and an empty array is no leaf. There is no expression language and no regular
expression: a filter takes linear time. Called by subscriptions.py and patterns.py; router.py
applies the filters.
"""

import inspect
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, cast

from eventflow.core.errors import UsageError
from eventflow.events.event import Event

Pattern: TypeAlias = Mapping[str, Any]
FilterSpec: TypeAlias = Pattern | Callable[[Event], bool] | None
Test: TypeAlias = Callable[[Any], bool]

OPERATORS = (
    "prefix",
    "suffix",
    "anything-but",
    "exists",
    "numeric",
    "equals-ignore-case",
    "wildcard",
)

_MISSING: Any = object()
_COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    "=": operator.eq,
    ">=": operator.ge,
    ">": operator.gt,
}


class Filter(Protocol):
    """A compiled `where=`."""

    def mismatch(self, event: Event) -> str | None:
        """None if the event matches, else the condition that did not hold, as text.

        A filter made of a user's callable raises what that raises.
        """
        ...


def compile_filter(where: FilterSpec) -> Filter | None:
    """The filter of `where=`. Raises UsageError for a malformed pattern and an `async` callable."""
    if where is None:
        return None
    if isinstance(where, Mapping):
        return PatternFilter(cast(Pattern, where))
    if not callable(where):
        raise UsageError(f"where= expected a pattern or a callable, found {where!r}")
    called = getattr(where, "__call__", None)  # noqa: B004
    if inspect.iscoroutinefunction(where) or inspect.iscoroutinefunction(called):
        raise UsageError(
            "where= expected a plain function, found an `async` one; filters run before an event "
            "is recorded and must return at once"
        )
    return CallableFilter(where)


class CallableFilter:
    """A user's predicate over the event."""

    __slots__ = ("_call", "_name")

    def __init__(self, call: Callable[[Event], bool]) -> None:
        self._call = call
        self._name: str = getattr(call, "__qualname__", type(call).__qualname__)

    def mismatch(self, event: Event) -> str | None:
        answer = self._call(event)
        if inspect.isawaitable(answer):
            if inspect.iscoroutine(answer):
                answer.close()
            raise TypeError(f"{self._name} returned {type(answer).__name__}, expected a bool")
        return None if answer else f"{self._name} returned {answer!r}"[:200]


class PatternFilter:
    """A compiled pattern."""

    __slots__ = ("_attributes", "_data")

    def __init__(self, pattern: Pattern) -> None:
        attributes = {name: value for name, value in pattern.items() if _is_attribute(name)}
        data = {name: value for name, value in pattern.items() if not _is_attribute(name)}
        self._attributes = [
            (name[1:], _compile_leaf(value, name)) for name, value in attributes.items()
        ]
        # An alternative of a top-level $or may contain attributes, so it is a filter of its own.
        alternatives = data.pop("$or", None)
        self._data: list[Callable[[Event], str | None]] = []
        if data:
            node = _compile_object(data, "")
            self._data.append(lambda event: node(event.data))
        if alternatives is not None:
            filters = [
                PatternFilter(_object(one, "$or")) for one in _alternatives(alternatives, "$or")
            ]
            self._data.append(
                lambda event: _check_any([each.mismatch for each in filters], event, "$or")
            )

    def mismatch(self, event: Event) -> str | None:
        for name, leaf in self._attributes:
            if (why := leaf(_attribute(event, name))) is not None:
                return why
        for check in self._data:
            if (why := check(event)) is not None:
                return why
        return None


def _is_attribute(name: str) -> bool:
    return name.startswith("@")


_FIELDS = frozenset({"id", "source", "type", "subject", "datacontenttype", "dataschema"})


def _attribute(event: Event, name: str) -> Any:
    if name in _FIELDS:
        value = getattr(event, name)
        return _MISSING if value is None else value
    if name == "time":
        return _MISSING if event.time is None else event.time.isoformat().replace("+00:00", "Z")
    return event.extensions.get(name, _MISSING)


# --------------------------------------------------------------------------- objects

Check: TypeAlias = Callable[[Any], str | None]


def _compile_object(pattern: Pattern, path: str) -> Check:
    """A check of all fields of an object. An array passes if one of its objects does."""
    if not pattern:
        raise UsageError(f"where: {path or 'the pattern'} is empty; expected at least one field")
    checks: list[tuple[str | None, Check]] = []
    for name, value in pattern.items():
        here = f"{path}.{name}" if path else name
        if name == "$or":
            nodes = [
                _compile_object(_object(one, here), path) for one in _alternatives(value, here)
            ]
            checks.append(
                (None, lambda found, nodes=nodes, here=here: _check_any(nodes, found, here))
            )
        elif isinstance(value, Mapping):
            nested = cast(Pattern, value)
            _refuse_bare_operator(nested, here)
            checks.append((name, _compile_object(nested, here)))
        else:
            checks.append((name, _compile_leaf(value, here, dotted="." in name)))
    return lambda found: _check_object(checks, found)


def _check_object(checks: Sequence[tuple[str | None, Check]], found: Any) -> str | None:
    if isinstance(found, list):
        why: str | None = None
        for element in cast(list[Any], found):
            failed = _check_object(checks, element)
            if failed is None:
                return None
            why = why or failed
        return why or _check_object(checks, _MISSING)
    fields: Mapping[str, Any] = cast(Mapping[str, Any], found) if isinstance(found, dict) else {}
    for name, check in checks:
        failed = check(fields if name is None else fields.get(name, _MISSING))
        if failed is not None:
            return failed
    return None


def _check_any(checks: Sequence[Check], found: Any, path: str) -> str | None:
    reasons: list[str] = []
    for check in checks:
        why = check(found)
        if why is None:
            return None
        reasons.append(why)
    return f"{path}: none of [{'; '.join(reasons)}]"


def _alternatives(value: Any, path: str) -> Sequence[Any]:
    if not isinstance(value, list) or len(cast(list[Any], value)) < 2:
        raise UsageError(
            f"where: {path} expected a list of two or more patterns, found {_format(value)}"
        )
    return cast(list[Any], value)


def _object(value: Any, path: str) -> Pattern:
    if not isinstance(value, Mapping):
        raise UsageError(f"where: {path} expected a list of patterns, found {_format(value)} in it")
    return cast(Pattern, value)


def _refuse_bare_operator(pattern: Pattern, path: str) -> None:
    """Reject an operator without its list, such as `{"total": {"numeric": [">", 0]}}`.

    By the grammar that is a nested field `numeric`, which is nearly always a mistake.
    """
    if len(pattern) != 1:
        return
    ((name, operand),) = pattern.items()
    if name in _COMPARISONS or name in ("==", "!="):
        right = {"==": "="}.get(name, name)
        example = {"anything-but": operand} if name == "!=" else {"numeric": [right, operand]}
        raise UsageError(
            f"where: {path}: {name!r} would be the name of a field; for a comparison write "
            f"[{_format(example)}]"
        )
    listed = isinstance(operand, list | Mapping)
    comparison = (
        name == "numeric" and isinstance(operand, list) and cast(list[Any], operand)[:1] != []
    )
    if name == "anything-but" or comparison or (name in OPERATORS and not listed):
        raise UsageError(f"where: {path} expected a list; write [{_format(pattern)}]")


# --------------------------------------------------------------------------- leaves


def _compile_leaf(value: Any, path: str, *, dotted: bool = False) -> Check:
    """A check of a value: one of the alternatives holds, for any element if it is an array.

    `dotted`: the field's name contains a dot, and was perhaps meant as a path.
    """
    if isinstance(value, Mapping):
        raise UsageError(f"where: {path} expected a list; write [{_format(value)}]")
    alternatives: list[Any] = (
        list(cast(Sequence[Any], value)) if isinstance(value, list | tuple) else [value]
    )
    if not alternatives:
        raise UsageError(
            f"where: {path} expected a value or a list with at least one, found an empty list"
        )
    tests: list[Test] = []
    if_present = if_absent = False
    for one in alternatives:
        if isinstance(one, Mapping) and "exists" in one:
            wanted = _exists(cast(Pattern, one), path)
            if_present = if_present or wanted
            if_absent = if_absent or not wanted
        else:
            tests.append(_compile_test(one, path))
    text = _condition(path, alternatives)
    missing = f"{text}{_DOTTED_TEXT if dotted else _MISSING_TEXT}"

    def check(found: Any) -> str | None:
        present = False
        for candidate in _leaves(found):
            present = True
            if if_present or any(test(candidate) for test in tests):
                return None
        if not present and if_absent:
            return None
        return missing if found is _MISSING else f"{text}{_FOUND}{_format(found)})"

    return check


_FOUND = " (found "
_MISSING_TEXT = " (absent)"
_DOTTED_TEXT = ' (absent; a field of an object is written {"a": {"b": ...}})'


def condition_of(reason: str) -> str:
    """The condition in a text of `Filter.mismatch`, without the value that was found."""
    condition = reason.partition(_FOUND)[0]
    return condition.removesuffix(_MISSING_TEXT).removesuffix(_DOTTED_TEXT)


def _leaves(found: Any) -> Iterator[Any]:
    if isinstance(found, list):
        for element in cast(list[Any], found):
            yield from _leaves(element)
    elif found is not _MISSING and not isinstance(found, dict):
        yield found


def _exists(pattern: Pattern, path: str) -> bool:
    wanted = pattern["exists"]
    if not isinstance(wanted, bool) or len(pattern) != 1:
        raise UsageError(
            f'where: {path} expected {{"exists": true}} or {{"exists": false}}, found '
            f"{_format(pattern)}"
        )
    return wanted


def _compile_test(one: Any, path: str) -> Test:
    if not isinstance(one, Mapping):
        return _equals(one, path)
    pattern = cast(Pattern, one)
    if len(pattern) != 1 or next(iter(pattern)) not in OPERATORS:
        raise UsageError(
            f"where: {path} expected an object with one of {', '.join(OPERATORS)}; found "
            f"{_format(pattern)}"
        )
    ((name, operand),) = pattern.items()
    match name:
        case "prefix" | "suffix":
            return _affix(name, operand, path)
        case "equals-ignore-case":
            folded = _expect_string(operand, name, path).casefold()
            return lambda found: isinstance(found, str) and found.casefold() == folded
        case "wildcard":
            return wildcard(_expect_string(operand, name, path), path)
        case "numeric":
            return _numeric(operand, path)
        case _:
            return _anything_but(operand, path)


def _equals(wanted: Any, path: str) -> Test:
    """JSON equality: 1 equals 1.0, but true does not equal 1."""
    if wanted is None or isinstance(wanted, bool):
        return lambda found: found is wanted
    if isinstance(wanted, str):
        return lambda found: found == wanted
    if isinstance(wanted, int | float):
        return lambda found: found == wanted and not isinstance(found, bool)
    raise UsageError(
        f"where: {path} expected a string, number, boolean, null or operator, found "
        f"{_format(wanted)}"
    )


def _affix(name: str, operand: Any, path: str) -> Test:
    fold = isinstance(operand, Mapping) and list(cast(Pattern, operand)) == ["equals-ignore-case"]
    text = _expect_string(operand["equals-ignore-case"] if fold else operand, name, path)
    if fold:
        text = text.casefold()
    holds = str.startswith if name == "prefix" else str.endswith
    return lambda found: isinstance(found, str) and holds(found.casefold() if fold else found, text)


def _anything_but(operand: Any, path: str) -> Test:
    """The field exists, and its value is none of these."""
    listed: list[Any] = cast(list[Any], operand) if isinstance(operand, list) else [operand]
    if not listed:
        raise UsageError(
            f"where: {path}.anything-but expected at least one value, found an empty list"
        )
    excluded: list[Test] = []
    for one in listed:
        if isinstance(one, Mapping):
            excluded += _excluded(cast(Pattern, one), f"{path}.anything-but")
        else:
            excluded.append(_equals(one, f"{path}.anything-but"))
    return lambda found: not any(test(found) for test in excluded)


def _excluded(pattern: Pattern, path: str) -> list[Test]:
    """`{"prefix": "a"}`, or several at once: `{"prefix": ["a", "b"]}`."""
    if len(pattern) != 1 or next(iter(pattern)) not in (
        "prefix",
        "suffix",
        "equals-ignore-case",
        "wildcard",
    ):
        raise UsageError(
            f"where: {path} expected values, prefix, suffix, equals-ignore-case or wildcard; found "
            f"{_format(pattern)}"
        )
    ((name, operand),) = pattern.items()
    operands: list[Any] = cast(list[Any], operand) if isinstance(operand, list) else [operand]
    return [_compile_test({name: each}, path) for each in operands]


def _numeric(operand: Any, path: str) -> Test:
    parts: list[Any] = cast(list[Any], operand) if isinstance(operand, list) else []
    pairs = list(zip(parts[::2], parts[1::2], strict=False))
    if len(parts) not in (2, 4) or not all(
        isinstance(sign, str) and sign in _COMPARISONS and _number(n) for sign, n in pairs
    ):
        raise UsageError(
            f'where: {path}.numeric expected [">", 0] or [">", 0, "<=", 5], found '
            f"{_format(operand)}"
        )
    bounds = [(_COMPARISONS[sign], limit) for sign, limit in pairs]
    return lambda found: _number(found) and all(holds(found, limit) for holds, limit in bounds)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def wildcard(pattern: str, path: str) -> Test:
    r"""A test for a glob with `*` as its only wildcard; `\*` and `\\` are literal.

    Linear: the pieces between the stars are searched from left to right.
    """
    pieces = _split_wildcard(pattern, path)
    first = pieces[0]
    last = pieces[-1]
    middle = pieces[1:-1]

    def test(found: Any) -> bool:
        if not isinstance(found, str):
            return False
        if len(pieces) == 1:
            return found == first
        if len(found) < len(first) + len(last) or not (
            found.startswith(first) and found.endswith(last)
        ):
            return False
        at = len(first)
        end = len(found) - len(last)
        for piece in middle:
            at = found.find(piece, at, end)
            if at < 0:
                return False
            at += len(piece)
        return True

    return test


def _split_wildcard(pattern: str, path: str) -> list[str]:
    pieces = [""]
    characters = iter(pattern)
    before = ""
    for character in characters:
        if character == "\\":
            escaped = next(characters, "")
            if escaped not in ("*", "\\"):
                raise UsageError(
                    f"where: {path}.wildcard: a backslash stands before * or \\ only, found "
                    f"{_format(pattern)}"
                )
            pieces[-1] += escaped
        elif character == "*":
            if before == "*":
                raise UsageError(
                    f"where: {path}.wildcard: expected single stars, found {_format(pattern)}"
                )
            pieces.append("")
        else:
            pieces[-1] += character
        before = character
    return pieces


def _expect_string(operand: Any, name: str, path: str) -> str:
    if not isinstance(operand, str):
        raise UsageError(f"where: {path}.{name} expected a string, found {_format(operand)}")
    return operand


# --------------------------------------------------------------------------- texts


def _condition(path: str, alternatives: Sequence[Any]) -> str:
    """`total.numeric[> 0]`, `state = "paid"`, `country in ["DE", "AT"]`."""
    if len(alternatives) > 1:
        return f"{path} in {_format(alternatives, 200)}"
    (only,) = alternatives
    if not isinstance(only, Mapping):
        return f"{path} = {_format(only)}"
    ((name, operand),) = cast(Pattern, only).items()
    if name == "numeric":
        return f"{path}.numeric[{' '.join(map(str, operand))}]"
    return f"{path}.{name}[{_format(operand)}]"


def _format(value: Any, limit: int = 80) -> str:
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
