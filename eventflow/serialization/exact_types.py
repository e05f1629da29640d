"""Annotations under which `==` is enough to verify a result.

codecs.py compares a value with what its annotation reads back from the stored JSON. In general that
takes a walk over all parts (`reads_back` in tagged_json.py), because `==` ignores types, zones and
folds. Most annotations leave `==` nothing to ignore, provided that the value has exactly the types
that they name: JSON has different texts for 1, 1.0, true and -0.0, and the decoder makes the types
of the annotation. `exact_check` decides once per annotation whether that is so.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from itertools import chain
from operator import attrgetter, methodcaller
from typing import Any, cast
from uuid import UUID

import msgspec

from eventflow.serialization.tagged_json import is_plain

Column = Sequence[Any]
Check = Callable[[Column], bool]
"""Whether all values of a column have exactly the types of an annotation, in all of their parts.

Such a value is deeply equal to what the annotation reads from its JSON if it is `==` to it.
"""

_SCALARS: frozenset[Any] = frozenset(
    {type(None), bool, int, float, str, bytes, date, timedelta, UUID}
)
"""No two of them are both `==` and written as the same JSON, so that one check serves fields of
several of them. Not enums and Decimal: `"red" == Colour.RED`, and 1 is a Decimal's JSON, too.
"""

_ATTRIBUTES_OF = attrgetter("__dict__")
_VALUES_OF = methodcaller("values")
_STRUCT_EQUALS = cast(Any, msgspec.Struct).__eq__


def exact_check(annotation: Any) -> Check | None:
    """The check of an annotation; None if `==` may ignore something under it."""
    try:
        return _Compiler().check_of(annotation)
    except (_Inexact, NameError, TypeError, AttributeError):  # some are of an unresolved name
        return None


class _Inexact(Exception):
    """`==` may ignore something under the annotation."""


class _Compiler:
    """Makes the check of one annotation. A class is compiled once, because it may hold itself."""

    __slots__ = ("_records",)

    def __init__(self) -> None:
        self._records: dict[type[Any], _RecordCheck] = {}

    def check_of(self, annotation: Any) -> Check:
        if annotation in (Any, object, dict, list):
            return _are_plain
        scalars = _scalars_of(annotation)
        if scalars is not None:
            return _are_of(scalars)
        if annotation is Decimal:
            return _are_decimals
        if annotation in (datetime, time):
            return _are_plain_times(annotation)
        origin = typing.get_origin(annotation)
        if origin is not None:
            return self._check_of_parts(origin, typing.get_args(annotation))
        if isinstance(annotation, type):
            kind = cast(type[Any], annotation)
            if issubclass(kind, Enum):
                return _are_of(frozenset({kind}))
            if issubclass(kind, msgspec.Struct) or dataclasses.is_dataclass(kind):
                return self._records.get(kind) or self._record(kind)
        raise _Inexact

    def _check_of_parts(self, origin: Any, arguments: tuple[Any, ...]) -> Check:
        if origin is typing.Annotated:
            return self.check_of(arguments[0])
        if origin in (typing.Union, types.UnionType):
            others = [each for each in arguments if each is not type(None)]
            if len(others) == 1:
                return _are_optional(self.check_of(others[0]))
        elif origin in (list, set, frozenset) or (origin is tuple and arguments[1:] == (...,)):
            return _are_filled(origin, self.check_of(arguments[0]))
        elif origin is tuple:
            scalars = [_scalars_of(each) for each in arguments]
            if None not in scalars:
                kinds = chain.from_iterable(cast(list[frozenset[Any]], scalars))
                return _are_filled(tuple, _are_of(frozenset(kinds)))
            return _are_tuples([self.check_of(each) for each in arguments])
        elif origin is dict:
            return _are_dicts(self.check_of(arguments[0]), self.check_of(arguments[1]))
        raise _Inexact

    def _record(self, kind: type[Any]) -> Check:
        if hasattr(kind, "__post_init__"):
            raise _Inexact
        is_struct = issubclass(kind, msgspec.Struct)
        if not (_is_compared_by_fields if is_struct else _is_generated)(kind):
            raise _Inexact
        check = self._records[kind] = _RecordCheck(kind)
        types_of = (
            {field.name: field.type for field in msgspec.structs.fields(kind)}
            if is_struct
            else typing.get_type_hints(kind, include_extras=True)
        )
        for place, name in enumerate(_field_names(kind)):
            scalars = _scalars_of(types_of[name])
            if scalars is None:
                check.columns.append((place, self.check_of(types_of[name])))
            else:
                check.scalars |= scalars
                check.scalar_places.append(place)
        return check


def _field_names(kind: type[Any]) -> Sequence[str]:
    if issubclass(kind, msgspec.Struct):
        return kind.__struct_fields__
    return [field.name for field in dataclasses.fields(kind)]


def _is_compared_by_fields(kind: type[Any]) -> bool:
    """Whether `==` of these Structs compares the class and all of the state."""
    return cast(Any, kind).__eq__ is _STRUCT_EQUALS and kind.__dictoffset__ == 0


def _is_generated(kind: type[Any]) -> bool:
    """Whether `==` of these dataclasses compares the class and all fields: it is what a dataclass
    with these fields gets.
    """
    fields = dataclasses.fields(kind)
    if len(fields) != len(kind.__dataclass_fields__):  # it has an InitVar or a ClassVar
        return False
    twin = dataclasses.make_dataclass("Twin", [field.name for field in fields])
    ours = getattr(vars(kind).get("__eq__"), "__code__", None)
    usual = cast(Any, twin).__eq__.__code__
    return ours is not None and (ours.co_code, ours.co_names, ours.co_consts, ours.co_freevars) == (
        usual.co_code,
        usual.co_names,
        usual.co_consts,
        usual.co_freevars,
    )


class _RecordCheck:
    """Checks Structs or dataclasses: all fields of scalars at once, each other field as a column,
    and that a dataclass has no other attributes. `columns` and `scalar_places` are by the place of
    the field in the class.
    """

    __slots__ = ("_kinds", "_names", "_read", "columns", "scalar_places", "scalars")

    def __init__(self, kind: type[Any]) -> None:
        names = _field_names(kind)
        self._kinds = frozenset({kind})
        self._names = frozenset(names) if kind.__dictoffset__ else None
        self._read: Callable[[Any], tuple[Any, ...]] = (
            msgspec.structs.astuple if issubclass(kind, msgspec.Struct) else _reader_of(names)
        )
        self.scalars: frozenset[Any] = frozenset()
        self.scalar_places: list[int] = []
        self.columns: list[tuple[int, Check]] = []

    def __call__(self, values: Column) -> bool:
        if not values:  # where a class holds itself, this ends the descent
            return True
        if not self._kinds.issuperset(map(type, values)):
            return False
        names = self._names
        if names is not None and not all(map(names.issuperset, map(_ATTRIBUTES_OF, values))):
            return False
        try:
            rows = list(map(self._read, values))
        except AttributeError:  # a field was deleted, or never set
            return False
        if not self.columns:
            return self.scalars.issuperset(map(type, chain.from_iterable(rows)))
        fields = list(zip(*rows, strict=True))
        scalars = chain.from_iterable([fields[place] for place in self.scalar_places])
        if not self.scalars.issuperset(map(type, scalars)):
            return False
        for place, check in self.columns:
            column = fields[place]
            if not check(column):
                return False
        return True


def _reader_of(names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    if not names:
        return lambda value: ()
    # Twice a single name, because attrgetter of one name returns no tuple.
    return attrgetter(*(names if len(names) > 1 else [*names, *names]))


def _scalars_of(annotation: Any) -> frozenset[Any] | None:
    """The types that the annotation allows if all are of `_SCALARS`; else None."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        return _scalars_of(arguments[0])
    if origin is typing.Literal:
        found = frozenset(map(type, arguments))
    elif origin in (typing.Union, types.UnionType):
        members = [_scalars_of(each) for each in arguments]
        if None in members:
            return None
        found = frozenset(chain.from_iterable(cast(list[frozenset[Any]], members)))
    elif annotation is None:
        found = frozenset({type(None)})
    elif isinstance(annotation, type):
        found = frozenset({annotation})
    else:
        return None
    if not found <= _SCALARS:
        return None
    # An int under float is read as a float.
    return found | {int} if float in found else found


def _are_of(kinds: frozenset[Any]) -> Check:
    return lambda values: kinds.issuperset(map(type, values))


def _are_decimals(values: Column) -> bool:
    # A signalling NaN cannot be compared.
    return {Decimal}.issuperset(map(type, values)) and not any(map(Decimal.is_snan, values))


def _are_plain_times(kind: type[Any]) -> Check:
    """Naive or in UTC, which are the only zones that JSON keeps, and without a fold."""

    def are_plain_times(values: Column) -> bool:
        for value in values:
            if type(value) is not kind or value.fold:
                return False
            zone = value.tzinfo
            if zone is not None and zone is not UTC:
                return False
        return True

    return are_plain_times


def _are_plain(values: Column) -> bool:
    """Without a type to read them as, they come back as the types that JSON has."""
    return all(map(is_plain, values))


def _are_optional(check: Check) -> Check:
    return lambda values: check([each for each in values if each is not None])


def _are_filled(kind: type[Any], check: Check) -> Check:
    """Lists, sets, or tuples of any length."""
    kinds = frozenset({kind})
    return lambda values: (
        kinds.issuperset(map(type, values))
        and check(
            values[0] if len(values) == 1 and kind is list else list(chain.from_iterable(values))
        )
    )


def _holds(check: Check, column: Column) -> bool:
    return check(column)


def _are_tuples(checks: list[Check]) -> Check:
    kinds = frozenset({tuple})
    sizes = frozenset({len(checks)})
    return lambda values: (
        kinds.issuperset(map(type, values))
        and sizes.issuperset(map(len, values))
        and (not values or all(map(_holds, checks, zip(*values, strict=True))))
    )


def _are_dicts(check_keys: Check, check_values: Check) -> Check:
    kinds = frozenset({dict})
    return lambda values: (
        kinds.issuperset(map(type, values))
        and check_keys(list(chain.from_iterable(values)))
        and check_values(list(chain.from_iterable(map(_VALUES_OF, values))))
    )
