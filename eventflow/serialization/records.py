"""Tags for values of classes: enum members, named tuples, dataclasses, numpy scalars.

tagged_json.py calls `tag_record` for a value of no built-in type. Such a value comes back as an
equal object of the same class, or is refused: `tag_record` rebuilds it at once and compares it,
hidden attributes included. A class is stored by the name that its module has when it is imported,
and found again among the modules already imported (S12: no module is imported by name). A process
without that class cannot read the value: UsageError.
"""

import base64
import dataclasses
import sys
from collections.abc import Callable, Iterator
from enum import Enum, Flag
from types import ModuleType
from typing import Any, cast

from eventflow.core.errors import UsageError, value_or_none

Tag = Callable[[Any, str], Any]
"""Tags a part of a value; the text is the path to it. Raises NotStorable."""
Untag = Callable[[Any], Any]

_NUMPY_KINDS = frozenset("biufcmM")
_MAX_NUMPY_BYTES = 16
"""Longer ones (float128) differ by platform."""


def tag_record(value: Any, path: str, tag: Tag) -> dict[str, Any] | None:
    """The tagged form of a value of a class; None if it has none. Raises what `tag` raises."""
    kind = cast(type[Any], type(value))
    if kind.__module__ == "numpy":
        return _tag_numpy(value)
    if isinstance(value, Enum):
        name = cast(Any, value.value if isinstance(value, Flag) else value.name)
        return {"$enum": [class_name(kind), name]} if _find(kind) else None
    if not _find(kind):
        return None
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        items = cast(tuple[Any, ...], value)
        form = [tag(item, f"{path}.{name}") for name, item in zip(kind._fields, items, strict=True)]
        return {"$namedtuple": [class_name(kind), form]}
    if dataclasses.is_dataclass(kind):
        return _tag_dataclass(value, kind, path, tag)
    return None


def _tag_dataclass(value: Any, kind: type[Any], path: str, tag: Tag) -> dict[str, Any] | None:
    fields = dataclasses.fields(kind)
    if any(not hasattr(value, field.name) for field in fields):
        return None
    arguments = {field.name: getattr(value, field.name) for field in fields if field.init}
    again = value_or_none(kind, **arguments)
    if again is None or not _same_state(value, again):
        return None
    form = {name: tag(part, f"{path}.{name}") for name, part in arguments.items()}
    return {"$dataclass": [class_name(kind), form]}


def _same_state(value: Any, again: Any) -> bool:
    """Whether two objects of one class have the same attributes, hidden ones included.

    The values of the fields are the same objects, or made anew by `__post_init__`.
    """
    left: dict[str, Any] = getattr(value, "__dict__", {})
    right: dict[str, Any] = getattr(again, "__dict__", {})
    slots = [
        name
        for base in type(value).__mro__
        for name in getattr(base, "__slots__", ())
        if name not in ("__dict__", "__weakref__")
    ]
    missing = object()
    pairs = [(left.get(name, missing), right.get(name, missing)) for name in left | right]
    pairs += [(getattr(value, name, missing), getattr(again, name, missing)) for name in slots]
    return all(one is other or (type(one) is type(other) and one == other) for one, other in pairs)


def _tag_numpy(value: Any) -> dict[str, Any] | None:
    dtype = getattr(value, "dtype", None)
    if dtype is None or getattr(value, "shape", None) != () or type(value).__name__ == "ndarray":
        return None
    if dtype.kind not in _NUMPY_KINDS or dtype.itemsize > _MAX_NUMPY_BYTES or dtype.char in "gG":
        return None
    return {"$numpy": [dtype.str, base64.b64encode(value.tobytes()).decode(), str(value)]}


# --------------------------------------------------------------------------- reading


def read_enum(form: Any, untag: Untag) -> Any:
    name, member = form
    kind = _load(name)
    return kind(member) if issubclass(kind, Flag) else kind[member]


def read_namedtuple(form: Any, untag: Untag) -> Any:
    name, items = form
    return _load(name)._make(map(untag, items))


def read_dataclass(form: Any, untag: Untag) -> Any:
    name, fields = form
    return _load(name)(**{field: untag(part) for field, part in fields.items()})


def read_numpy(form: Any, untag: Untag) -> Any:
    import numpy  # the value was made with it

    dtype, data, _ = form
    return numpy.frombuffer(base64.b64decode(data), numpy.dtype(dtype))[0]


RECORD_READERS: dict[str, Callable[[Any, Untag], Any]] = {
    "$enum": read_enum,
    "$namedtuple": read_namedtuple,
    "$dataclass": read_dataclass,
    "$numpy": read_numpy,
}


def without_classes(form: Any) -> Any:
    """Tagged JSON for people: a member by its name, a named tuple as a list, a dataclass as its
    fields, a numpy scalar as a number. Needs no class.
    """
    if isinstance(form, list):
        return [without_classes(item) for item in cast(list[Any], form)]
    if not isinstance(form, dict):
        return form
    fields = cast(dict[str, Any], form)
    if len(fields) == 1:
        (tag,) = fields
        if tag == "$numpy":
            return _readable_number(fields[tag])
        if tag in RECORD_READERS:
            return without_classes(fields[tag][-1])
    return {name: without_classes(part) for name, part in fields.items()}


def _readable_number(form: list[str]) -> Any:
    dtype, _, text = form
    match dtype[1]:
        case "i" | "u":
            return int(text)
        case "f" if text not in ("nan", "inf", "-inf"):
            return float(text)
        case "b":
            return text == "True"
        case _:
            return text


# --------------------------------------------------------------------------- names of classes


def class_name(kind: type[Any]) -> str:
    """`module:Qual.Name`, the module by the name that it has when it is imported."""
    return f"{import_name(kind.__module__)}:{kind.__qualname__}"


def import_name(name: str) -> str:
    """`shop` for the file shop.py, also where it runs as `__main__`."""
    if name != "__main__":
        return name
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if spec is not None:
        return spec.name
    path = getattr(sys.modules.get(name), "__file__", None) or name
    return path.replace("\\", "/").rpartition("/")[2].removesuffix(".py")


def _find(kind: type[Any]) -> bool:
    """Whether the class is found by its name: not one of a function, nor a replaced one."""
    return any(found is kind for found in _classes_named(class_name(kind)))


def _load(name: str) -> Any:
    for found in _classes_named(name):
        return found
    raise UsageError(
        f"a recorded value is a {name}, which is not imported here; import its module where the "
        "flow is defined, or deploy the code that recorded it"
    )


def _classes_named(name: str) -> Iterator[type[Any]]:
    module, _, path = name.partition(":")
    main = "__main__" if import_name("__main__") == module else module
    loaded: list[ModuleType | None] = [sys.modules.get(module), sys.modules.get(main)]
    for place in loaded:
        found: Any = place
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, type):
            yield found
