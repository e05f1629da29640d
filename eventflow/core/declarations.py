"""Checks of what users declare: names of options, durations, counts; and where it is written.

`@declaration` is on every public callable that takes options (`App`, `@flow`, `@task`, `app.on`,
`Retry`, delivery modes, patterns, triggers, sinks, checks); `Declared` is the same for options that
are msgspec Structs. Both turn an option that does not exist into a UsageError with the nearest
name, and add the user's file and line to every UsageError raised inside. `duration`,
`whole_number` and `one_of` check values. Static types stay those of the callable.
"""

import functools
import inspect
import math
import os
import sys
import typing
from collections.abc import Callable, Iterable
from datetime import timedelta
from numbers import Integral, Real
from types import TracebackType
from typing import Any, TypeVar, cast

import msgspec

from eventflow.core.clock import Duration
from eventflow.core.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

MAX_SECONDS = 1000 * 365.25 * 86_400.0
"""The longest duration, a thousand years: instants stay within the years of a datetime."""

_SOURCE_ROOT = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", ".."))
_OWN_FOLDERS = tuple(
    os.path.join(_SOURCE_ROOT, package, "") for package in ("eventflow", "triggers")
)


# --------------------------------------------------------------------------- where


def user_location() -> str:
    """`file:line` of the nearest caller outside eventflow's own packages; "" if there is none.

    The file is relative to the working directory if it lies below it.
    """
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        name = frame.f_code.co_filename
        if not is_own_file(name) and not name.startswith("<frozen"):
            return format_location(name, frame.f_lineno)
        frame = frame.f_back
    return ""


def is_own_file(file: str) -> bool:
    """Whether a source file is one of eventflow's own packages."""
    return file.startswith(_OWN_FOLDERS)


def format_location(file: str, line: int) -> str:
    """`file:line`, relative to the working directory if the file lies below it."""
    below = file
    try:
        if not os.path.relpath(file).startswith(os.pardir):
            below = os.path.relpath(file)
    except (OSError, ValueError):  # the working directory is gone; another drive
        pass
    return f"{below}:{line}"


class Located:
    """`with Located():` adds `user_location()` to a UsageError that is raised inside, once."""

    __slots__ = ("_where",)

    def __init__(self, where: str | None = None) -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, UsageError) and error.location is None:
            error.location = where = self._where or user_location()
            args = error.args
            if where and len(args) == 1 and isinstance(args[0], str):
                error.args = (f"{args[0]} ({where})",)


# --------------------------------------------------------------------------- names


def declaration(fn: F) -> F:
    """A decorator for a function, method or constructor that takes options.

    A call with an unknown option raises UsageError naming the nearest option and the caller's file
    and line; so does one whose arguments do not fit, with the form of the call. A UsageError
    raised by `fn` gets the file and line too. `**options` annotated `Unpack[TypedDict]` accepts the
    keys of that class only.
    """
    name = fn.__qualname__.removesuffix(".__init__")

    @functools.wraps(fn)
    def checked(*args: Any, **kwargs: Any) -> Any:
        with Located():
            names = _option_names(fn) if kwargs else None
            if names is not None:
                for given in kwargs:
                    if given not in names:
                        raise unknown_option(name, given, names)
            try:
                return fn(*args, **kwargs)
            except TypeError as error:
                if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                    raise  # from inside of `fn`
                raise _wrong_arguments(name, inspect.signature(fn), args, kwargs, error) from None

    return cast(F, checked)


def _wrong_arguments(
    name: str, signature: inspect.Signature, args: Any, kwargs: Any, error: TypeError
) -> UsageError:
    """The error for a call that Python refused, with the form that it has."""
    problem = str(error)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as misfit:
        problem = str(misfit)
    return UsageError(f"{name}: {problem}; write {_call_form(name, signature)}")


def _call_form(name: str, signature: inspect.Signature) -> str:
    """`Webhook(path, verify=...)`: the call with what it must have, and `...` for the rest.

    If it must have nothing, with its first option: `Retry(attempts=..., ...)`.
    """
    form: list[str] = []
    has_more = False
    options: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            form.append(f"*{parameter.name}")
        elif parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD:
            has_more = True
            if parameter.kind is parameter.KEYWORD_ONLY:
                options.append(f"{parameter.name}=...")
        elif parameter.kind is parameter.KEYWORD_ONLY:
            form.append(f"{parameter.name}=...")
        else:
            form.append(parameter.name)
    return f"{name}({', '.join((form or options[:1]) + ['...'] * has_more)})"


@functools.cache  # not at import, where all declarations together would take 1 ms
def _option_names(fn: Callable[..., Any]) -> tuple[str, ...] | None:
    """The names that keyword arguments may have; None if any other name is taken too."""
    names: list[str] = []
    for parameter in inspect.signature(fn).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            options = typing.get_args(parameter.annotation)
            if typing.get_origin(parameter.annotation) is not typing.Unpack:
                return None
            names += options[0].__annotations__
        elif parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            names.append(parameter.name)
    return tuple(name for name in names if name not in ("self", "cls"))


_DELAY = "write retries=Retry(attempts=..., delay=...), with seconds"
_ELSEWHERE = {
    ("flow", "retry_delay"): _DELAY,
    ("flow", "retry_delay_seconds"): _DELAY,
    ("task", "retry_delay"): _DELAY,
    ("task", "retry_delay_seconds"): _DELAY,
}
"""What to do instead of an option that people look for, by declaration and option."""


def unknown_option(where: str, given: str, names: Iterable[str]) -> UsageError:
    """The error for an option that does not exist, with the nearest name of those that do."""
    known = list(names)
    if elsewhere := _ELSEWHERE.get((where.lstrip("@"), given)):
        return UsageError(f"{where}({given}=): no such option; {elsewhere}")
    hint = nearest(given, known)
    expected = f"did you mean {hint}=?" if hint else f"it has {', '.join(known) or 'none'}"
    return UsageError(f"{where}({given}=): no such option; {expected}")


def nearest(given: str, names: Iterable[str]) -> str | None:
    """The name that `given` is most probably a misspelling of."""
    import difflib  # only for errors, and slow to import

    found = difflib.get_close_matches(given.lower(), list(names), n=3, cutoff=0.6)
    alike = [name for name in found if name[:3] == given[:3].lower()]  # retry: retries, no on_retry
    return (alike or found or [None])[0]


class Declared(msgspec.StructMeta):
    """The metaclass of options that are msgspec Structs: `class Retry(Struct, metaclass=Declared)`.

    Decoding by msgspec does not pass through here.
    """

    if not typing.TYPE_CHECKING:  # the type checker takes the parameters from the fields

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            with Located():
                for given in kwargs:
                    if given not in cls.__struct_fields__:
                        raise unknown_option(cls.__name__, given, cls.__struct_fields__)
                try:
                    return super().__call__(*args, **kwargs)
                except TypeError as error:
                    if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                        raise  # from `__post_init__`
                    form = _call_form(cls.__name__, inspect.signature(cls))
                    raise UsageError(f"{cls.__name__}: {error}; write {form}") from None


# --------------------------------------------------------------------------- values


def duration(
    given: Duration, what: str, *, positive: bool = False, unbounded: bool = False
) -> float:
    """A duration in seconds: a number or a timedelta, from 0 (`positive`: above 0) to MAX_SECONDS.

    `unbounded`: also infinity and any larger number. `what` names the option in the UsageError.
    """
    value = given.total_seconds() if isinstance(given, timedelta) else given
    expected = "a positive duration" if positive else "a duration, which must not be negative"
    if isinstance(cast(object, value), bool) or not isinstance(cast(object, value), Real):
        raise UsageError(f"{what} expected {expected}: seconds or a timedelta, found {given!r}")
    found = float(value)
    if math.isnan(found) or found < 0 or (positive and not found):
        raise UsageError(f"{what} expected {expected}, found {_text(given)}")
    if found > MAX_SECONDS and not unbounded:
        raise UsageError(
            f"{what} expected {expected}, of at most 1,000 years, found {_text(given)}"
        )
    return found


def _text(given: Duration) -> str:
    return repr(given) if isinstance(given, timedelta) else f"{given:g}"


def number(given: float, what: str, *, minimum: float, maximum: float = math.inf) -> float:
    """A finite number from `minimum` to `maximum`."""
    if (
        isinstance(cast(object, given), bool)
        or not isinstance(cast(object, given), Real)
        or not math.isfinite(given)
        or not minimum <= given <= maximum
    ):
        limits = (
            f"of at least {minimum:g}"
            if maximum == math.inf
            else f"from {minimum:g} to {maximum:g}"
        )
        raise UsageError(f"{what} expected a number {limits}, found {given!r}")
    return float(given)


def whole_number(given: int, what: str, *, minimum: int = 1, maximum: int = (1 << 63) - 1) -> int:
    """A whole number from `minimum` to `maximum`."""
    if (
        isinstance(cast(object, given), bool)
        or not isinstance(cast(object, given), Integral)
        or not minimum <= given <= maximum
    ):
        limits = f"at least {minimum:,}" if maximum >> 62 else f"from {minimum:,} to {maximum:,}"
        raise UsageError(f"{what} expected {limits}, a whole number, found {given!r}")
    return int(given)


def one_of(given: object, what: str, choices: Iterable[str]) -> None:
    """UsageError unless `given` is among `choices`."""
    listed = list(choices)
    if given not in listed:
        expected = ", ".join(f'"{choice}"' for choice in listed[:-1]) + f' or "{listed[-1]}"'
        raise UsageError(f"{what} expected {expected}, found {given!r}")


def text(given: object, what: str) -> str:
    """A string that is not empty."""
    if not isinstance(given, str) or not given.strip():
        raise UsageError(f"{what} expected a text that is not empty, found {given!r}")
    return given


def callable_or_none(given: object, what: str) -> None:
    """UsageError unless `given` is None or callable."""
    if given is not None and not callable(given):
        raise UsageError(f"{what} expected a callable, found {given!r}")
