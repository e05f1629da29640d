"""Return annotations that no result can satisfy: known at decoration, not after the body has run.

`@task` and `@flow` call `check_return_annotation`. It refuses only what is certain: a concrete
class that has no lossless form and no subclass with one.
"""

import collections.abc
import dataclasses
import inspect
import types
import typing
from enum import Enum
from typing import Any, cast

from eventflow.core.errors import UsageError
from eventflow.serialization.tagged_json import is_taggable

_NEVER: frozenset[Any] = frozenset(
    {
        collections.abc.Iterator,
        collections.abc.Generator,
        collections.abc.AsyncIterator,
        collections.abc.AsyncGenerator,
        collections.abc.AsyncIterable,
        collections.abc.Awaitable,
        collections.abc.Coroutine,
        collections.abc.Callable,
    }
)
_BUILTIN_BASES = (dict, list, set, frozenset, tuple, str, int, float, bytes, Exception)
_MARKS = ("__struct_fields__", "__attrs_attrs__", "model_validate", "__total__")


def check_return_annotation(annotation: Any, where: str, *, pickle_hint: bool) -> None:
    """UsageError if no value of this annotation can be stored. `where` names the task or flow."""
    found = unstorable_part(annotation)
    if found is None:
        return
    ways = ['use @task(codec="pickle")'] if pickle_hint else []
    ways += ["return bytes", "write a file and return its path"]
    raise UsageError(
        f"{where}: its return annotation has {found}, which has no lossless form in the journal; "
        "return plain data, a dataclass, a msgspec.Struct or a pydantic model, or "
        + ", ".join(ways[:-1])
        + f", or {ways[-1]}"
    )


def unstorable_part(annotation: Any) -> str | None:
    """The name of the class that makes every value of an annotation unstorable; None if unknown."""
    origin: Any = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        return unstorable_part(arguments[0])
    if origin in (typing.Union, types.UnionType):
        members = [each for each in arguments if each is not type(None)]
        found = [unstorable_part(each) for each in members]
        return found[0] if found and all(found) else None
    kind = annotation if origin is None else origin
    if kind in _NEVER if isinstance(kind, collections.abc.Hashable) else False:
        return _name(kind)
    if origin in (list, dict, tuple, set, frozenset):
        parts = map(unstorable_part, arguments)
        return next((part for part in parts if part is not None), None)
    if not isinstance(kind, type) or _may_be_stored(cast(type[Any], kind)):
        return None
    return _name(cast(type[Any], kind))


def _may_be_stored(kind: type[Any]) -> bool:
    if kind is object or is_taggable(kind) or issubclass(kind, (*_BUILTIN_BASES, Enum)):
        return True
    if dataclasses.is_dataclass(kind) or any(hasattr(kind, mark) for mark in _MARKS):
        return True
    if any(base.__module__ == "numpy" and base.__name__ == "generic" for base in kind.__mro__):
        return True
    if inspect.isabstract(kind) or getattr(kind, "_is_protocol", False):
        return True
    if kind.__module__ in ("numbers", "collections.abc", "typing", "os"):
        return True
    return any(map(_may_be_stored, kind.__subclasses__()))


def _name(kind: Any) -> str:
    module = getattr(kind, "__module__", "")
    name = getattr(kind, "__qualname__", str(kind))
    return name if module in ("builtins", "") else f"{module}.{name}"
