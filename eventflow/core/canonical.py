"""One order for the items of sets, in every process.

A set of texts iterates in an order that depends on the process (PYTHONHASHSEED), so the JSON of
equal values can differ. Whatever two processes compare (fingerprints of arguments, parameters of
child runs, names of flow-made tasks) passes through here first: codecs.py, routing/binding.py and
loop/scopes.py call it.
"""

import collections.abc
import contextlib
import dataclasses
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from pathlib import PurePath
from typing import Any, cast
from uuid import UUID

import msgspec

_SORT_KEY = msgspec.json.Encoder(order="deterministic").encode
_ATOMS = (
    str, int, float, bytes, bytearray, type(None), Enum, Decimal, date, time, timedelta, UUID,
    PurePath, msgspec.Raw,
)  # fmt: skip
_CONTAINERS: frozenset[Any] = frozenset(
    {
        list,
        tuple,
        dict,
        typing.Union,
        types.UnionType,
        collections.abc.Sequence,
        collections.abc.MutableSequence,
        collections.abc.Mapping,
        collections.abc.MutableMapping,
    }
)


def to_sorted_builtins(value: Any, *, marked: bool = False) -> Any:
    """The JSON data of a value that msgspec or pydantic can write, the items of its sets sorted.

    Raises TypeError and what `model_dump` raises for a value without such a form.
    """
    if not marked and not may_hold_sets(cast(type[Any], type(value))):
        # A set may be where no annotation says so; msgspec can sort one of simple items.
        with contextlib.suppress(TypeError):
            return msgspec.to_builtins(
                value, str_keys=True, enc_hook=dump_model, order="deterministic"
            )
    form = msgspec.to_builtins(value, str_keys=True, enc_hook=dump_model)
    return sort_sets(value, form, marked=marked)


def dump_model(value: Any) -> Any:
    """msgspec's hook: pydantic models as JSON data."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", by_alias=True, warnings=False)
    kind = cast(type[Any], type(value))
    raise TypeError(f"{kind.__module__}.{kind.__qualname__}")


def sort_sets(value: Any, form: Any, *, marked: bool = False) -> Any:
    """`form`, the JSON data that `value` was encoded as, with the items of each set sorted.

    `form` must list sets and mappings in the order in which `value` iterates. A part whose form has
    another shape than its value stays as it is. `marked`: a set becomes `{"$set": [items]}`.
    """
    if getattr(value, "__pydantic_root_model__", False):
        value = value.root
    if isinstance(form, list | tuple):
        items = list(cast(Sequence[Any], form))
        if isinstance(value, AbstractSet):
            members = cast(AbstractSet[Any], value)
            if len(members) == len(items):
                items = [
                    sort_sets(member, item, marked=marked)
                    for member, item in zip(members, items, strict=True)
                ]
            items = sorted(items, key=_SORT_KEY)
            return {"$set": items} if marked else items
        parts: Collection[Any] = _parts(value)
        if len(parts) == len(items):
            return [
                sort_sets(part, item, marked=marked)
                for part, item in zip(parts, items, strict=True)
            ]
        return items
    if isinstance(form, dict):
        fields = cast(dict[str, Any], form)
        if isinstance(value, Mapping):
            members = cast(Mapping[Any, Any], value)
            if len(members) != len(fields):
                return fields
            return {
                name: sort_sets(member, field, marked=marked)
                for member, (name, field) in zip(members.values(), fields.items(), strict=True)
            }
        attributes = _attributes(value)
        return {
            name: sort_sets(getattr(value, attributes[name], None), field, marked=marked)
            if name in attributes
            else field
            for name, field in fields.items()
        }
    return form


def _parts(value: Any) -> Collection[Any]:
    """The values that the list of a sequence, or of an `array_like` Struct, is made of."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return cast(Sequence[Any], value)
    if isinstance(value, msgspec.Struct):
        values = [getattr(value, name) for name in value.__struct_fields__]
        return values if value.__struct_config__.tag is None else [None, *values]
    return ()


def _attributes(value: Any) -> dict[str, str]:
    """The attributes of a record, by their names in JSON."""
    kind = cast(type[Any], type(value))
    if isinstance(value, msgspec.Struct):
        return dict(zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True))
    names: dict[str, str] = {}
    for name, field in cast(
        dict[str, Any],
        getattr(kind, "model_fields", {}) | getattr(kind, "model_computed_fields", {}),
    ).items():
        alias = getattr(field, "serialization_alias", None) or getattr(field, "alias", None)
        names[alias or name] = name
    names |= {name: name for name in getattr(value, "model_extra", None) or ()}
    if names:
        return names
    fields: Any = getattr(kind, "__attrs_attrs__", ())
    names = {field.name: field.name for field in fields}
    return names | {name: name for name in getattr(kind, "__dataclass_fields__", ())}


@lru_cache(maxsize=4096)
def may_hold_sets(annotation: Any) -> bool:
    """Whether a value of this type may have a set in it, by the annotations of its parts.

    A class without annotations may. What an annotation promises is believed.
    """
    return _may_hold_sets(annotation, set())


def _may_hold_sets(annotation: Any, seen: set[Any]) -> bool:
    origin: Any = typing.get_origin(annotation)
    if origin is typing.Literal or origin is typing.ClassVar:
        return False
    if origin is typing.Annotated or origin in _CONTAINERS:
        arguments = typing.get_args(annotation)
        if origin is typing.Annotated:
            arguments = arguments[:1]
        return any(_may_hold_sets(each, seen) for each in arguments if each is not ...)
    if annotation is None:
        return False
    if not isinstance(annotation, type):
        return True
    kind = cast(type[Any], annotation)
    if issubclass(kind, _ATOMS) or kind in seen:
        return False
    seen.add(kind)
    return not _is_record(kind) or any(_may_hold_sets(hint, seen) for hint in _field_types(kind))


def _is_record(kind: type[Any]) -> bool:
    if hasattr(kind, "model_fields"):
        return not (
            cast(Any, kind).model_computed_fields
            or cast(Any, kind).model_config.get("extra") == "allow"
        )
    return issubclass(kind, msgspec.Struct) or dataclasses.is_dataclass(kind)


def _field_types(kind: type[Any]) -> Collection[Any]:
    try:
        return typing.get_type_hints(kind, include_extras=True).values()
    except (NameError, TypeError, AttributeError):
        return (Any,)
