"""Lossless JSON of plain data.

codecs.py calls it for values whose annotation does not define their form. What JSON represents
exactly becomes JSON (codec `json`). The rest of a closed list (tuple, set, bytes, dates, Decimal,
UUID, paths, big integers, NaN, keys that are not strings) becomes JSON with one-key tags such as
`{"$tuple": [1, 2]}` (codec `tagged`), and so do enum members, named tuples, dataclasses and numpy
scalars (records.py). Everything else is refused with `NotStorable`, which names the path to the
value: nothing is replaced by its `repr`, and no class is imported by name.
"""

import base64
import math
import pathlib
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, cast

import orjson

from eventflow.core.errors import NotStorable
from eventflow.serialization.records import RECORD_READERS, tag_record, without_classes

SCALARS: frozenset[type] = frozenset({type(None), bool, int, float, str})
_CONTAINERS: frozenset[type] = frozenset({dict, list})
_type_of: Callable[[Any], type[Any]] = type  # typed, where `type(value)` is not
_STR: frozenset[type] = frozenset({str})


def encode_plain(value: Any, where: str) -> tuple[str, bytes]:
    """`(codec, bytes)` of a value that decodes to an equal one. Raises NotStorable if there is no
    such form.
    """
    try:
        if is_plain(value):
            data = orjson.dumps(value)
            # orjson writes NaN and Infinity as null: only a text with a null can have lost one.
            if b"null" not in data or orjson.loads(data) == value:
                return "json", data
    except TypeError:
        pass  # an integer over 64 bits, a lone surrogate, nesting over 254: tags carry or name it
    except RecursionError:
        raise NotStorable(where, f"{type_name(value)} nested too deep") from None
    return "tagged", encode_tagged(value, where)


def encode_tagged(value: Any, where: str) -> bytes:
    """JSON with tags for what JSON cannot represent."""
    try:
        return orjson.dumps(_tag(value, where))
    except (RecursionError, TypeError):
        # All leaves are valid by now, so depth is all that orjson can refuse.
        raise NotStorable(where, f"{type_name(value)} nested too deep") from None


def decode_tagged(data: bytes) -> Any:
    """The inverse of `encode_tagged`."""
    return _untag(orjson.loads(data))


def decode_readable(data: bytes) -> Any:
    """For people: as `decode_tagged`, with plain data in place of objects of classes."""
    return _untag(without_classes(orjson.loads(data)))


def to_tagged(value: Any, where: str) -> Any:
    """JSON data with tags, as `encode_tagged` writes it; it may be nested too deep for orjson."""
    return _tag(value, where)


def from_tagged(form: Any) -> Any:
    """The inverse of `to_tagged`."""
    return _untag(form)


def is_plain(value: Any) -> bool:
    """Whether JSON represents the value exactly, except NaN and sizes: exact built-in types, string
    keys.

    Subclasses are not plain: an IntEnum would be decoded as an int, an OrderedDict as a dict.
    """
    kind = _type_of(value)
    if kind in SCALARS:
        return True
    if kind is dict:
        if not _STR.issuperset(map(type, value)):
            return False
        members: Iterable[Any] = value.values()
    elif kind is list:
        members = value
    else:
        return False
    if SCALARS.issuperset(map(type, members)):
        return True
    return all(
        type(member) in SCALARS or (type(member) in _CONTAINERS and is_plain(member))
        for member in members
    )


def is_taggable(kind: type[Any]) -> bool:
    """Whether values of exactly this built-in type can be stored, as far as the type tells."""
    return kind in _TAGGABLE


def type_name(value: Any) -> str:
    """`module.Class` of a value, without `builtins.`"""
    kind = _type_of(value)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )


def _tag(value: Any, path: str) -> Any:
    kind = _type_of(value)
    if kind is str:
        return _check_encodable(value, path)
    if value is None or kind is bool:
        return value
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 64 else {"$int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is list or kind is tuple:
        items = [_tag(item, f"{path}[{index}]") for index, item in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    if kind is dict:
        return _tag_dict(value, path)
    if kind is set or kind is frozenset:
        return {
            f"${kind.__name__}": sorted(
                (_tag(item, f"{path}{{}}") for item in value), key=orjson.dumps
            )
        }
    writer = _WRITERS.get(kind)
    if writer is None:
        if (record := tag_record(value, path, _tag)) is not None:
            return record
        raise _unstorable_part(value, path) or NotStorable(path, type_name(value))
    name, write = writer
    return {name: _check_encodable(write(value), path)}


def _tag_dict(value: dict[Any, Any], path: str) -> Any:
    tagged = [
        (key, _tag(key, f"{path} key"), _tag(member, f"{path}[{key!r}]"))
        for key, member in value.items()
    ]
    if _STR.issuperset(map(type, value)) and not (
        len(value) == 1 and next(iter(value)).startswith("$")
    ):
        return {key: member for key, _, member in tagged}
    return {"$dict": [(key, member) for _, key, member in tagged]}


def _check_encodable(text: str, path: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise NotStorable(path, "str with a lone surrogate") from None
    return text


def _unstorable_part(value: Any, path: str) -> NotStorable | None:
    """The innermost part of `value` that cannot be stored even with an annotation; None if there is
    none.
    """
    fields: Iterable[str] = getattr(value, "__struct_fields__", None) or getattr(
        value, "__dataclass_fields__", ()
    )
    if fields or isinstance(value, Enum):
        parts = (_unstorable_part(getattr(value, name, None), f"{path}.{name}") for name in fields)
        return next((part for part in parts if part is not None), None)
    if type(value) not in _TAGGABLE:
        return NotStorable(path, type_name(value))
    try:
        _tag(value, path)
    except NotStorable as error:
        return error
    return None


def _path_text(path: pathlib.PurePath) -> str:
    return str(path)


_PATHS: tuple[type[pathlib.PurePath], ...] = (
    type(pathlib.Path()),
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
)

_WRITERS: Mapping[type, tuple[str, Callable[[Any], str]]] = {
    bytes: ("$bytes", lambda value: base64.b64encode(value).decode()),
    datetime: ("$datetime", datetime.isoformat),
    date: ("$date", date.isoformat),
    time: ("$time", time.isoformat),
    timedelta: ("$timedelta", lambda value: f"{value.days} {value.seconds} {value.microseconds}"),
    Decimal: ("$decimal", str),
    uuid.UUID: ("$uuid", str),
    _PATHS[0]: ("$path", _path_text),
    _PATHS[1]: ("$posixpath", _path_text),
    _PATHS[2]: ("$windowspath", _path_text),
}

TAGGED_TYPES: tuple[type, ...] = (bytes, datetime, date, time, timedelta, Decimal, uuid.UUID)
"""Types that msgspec would write as text; tags keep their type."""

_TAGGABLE: frozenset[type] = SCALARS | _CONTAINERS | {tuple, set, frozenset} | frozenset(_WRITERS)


def _read_dict(pairs: list[Any]) -> dict[Any, Any]:
    return {_untag(key): _untag(member) for key, member in pairs}


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "$int": lambda text: int(text, 16),
    "$float": float,
    "$tuple": lambda items: tuple(map(_untag, items)),
    "$set": lambda items: set(map(_untag, items)),
    "$frozenset": lambda items: frozenset(map(_untag, items)),
    "$dict": _read_dict,
    "$bytes": base64.b64decode,
    "$datetime": datetime.fromisoformat,
    "$date": date.fromisoformat,
    "$time": time.fromisoformat,
    "$timedelta": lambda text: timedelta(*map(int, text.split())),
    "$decimal": Decimal,
    "$uuid": uuid.UUID,
    "$path": pathlib.Path,
    "$posixpath": pathlib.PurePosixPath,
    "$windowspath": pathlib.PureWindowsPath,
}


def _untag(value: Any) -> Any:
    if type(value) is list:
        return [_untag(item) for item in cast(list[Any], value)]
    if type(value) is not dict:
        return value
    fields = cast(dict[str, Any], value)
    if len(fields) == 1:
        (name,) = fields
        reader = _READERS.get(name) if name.startswith("$") else None
        if reader is not None:
            return reader(fields[name])
        if (record_reader := RECORD_READERS.get(name)) is not None:
            return record_reader(fields[name], _untag)
    return {name: _untag(member) for name, member in fields.items()}


def deep_equal(left: Any, right: Any) -> bool:
    """Equality of values and types. NaN equals NaN; classes without `__eq__` are compared by their
    fields.
    """
    kind = _type_of(left)
    if kind is not type(right):
        return False
    if kind is float:
        return left == right or (left != left and right != right)
    if kind is list or kind is tuple:
        return len(left) == len(right) and all(map(deep_equal, left, right))
    if kind is dict:
        return left.keys() == right.keys() and all(
            deep_equal(member, right[key]) for key, member in left.items()
        )
    if kind is Decimal:
        return str(left) == str(right)
    fields: Collection[str] = getattr(kind, "__struct_fields__", None) or getattr(
        kind, "__dataclass_fields__", ()
    )
    if fields:
        return all(
            deep_equal(getattr(left, name, None), getattr(right, name, None)) for name in fields
        )
    if hasattr(kind, "model_dump"):
        return deep_equal(left.__dict__, right.__dict__)
    return bool(left == right)
