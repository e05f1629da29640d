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
import struct
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import orjson

from eventflow.core.errors import NotStorable
from eventflow.serialization.records import RECORD_READERS, tag_record, without_classes

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

SCALARS: frozenset[type] = frozenset({type(None), bool, int, float, str})
_CONTAINERS: frozenset[type] = frozenset({dict, list})
_type_of: Callable[[Any], type[Any]] = type  # typed, where `type(value)` is not
_STR: frozenset[type] = frozenset({str})
_BITS = struct.Struct(">d")


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
        return value if math.isfinite(value) else {"$float": _float_text(value)}
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
    if kind is datetime or kind is time:
        return _tag_time(value, path)
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


def _float_text(value: float) -> str:
    """`inf`, `nan`, or the bits of another NaN than Python's usual one."""
    bits = _BITS.pack(value)
    return repr(value) if value == value or bits == _BITS.pack(math.nan) else f"0x{bits.hex()}"


def _read_float(text: str) -> float:
    return _BITS.unpack(bytes.fromhex(text[2:]))[0] if text.startswith("0x") else float(text)


def _tag_time(value: datetime | time, path: str) -> Any:
    """A datetime or a time: with its offset as ISO text, and with its fold and the name of its zone
    as `$zoned`.
    """
    name = type(value).__name__
    zone = value.tzinfo
    offset = None if zone is None else zone.utcoffset(None)
    if (named_zone := _zone_info(zone)) is not None:
        place: Any = named_zone.key
    elif offset is not None and zone is not None:
        named = isinstance(zone, timezone) and zone.tzname(None) != timezone(offset).tzname(None)
        place = [offset.total_seconds(), zone.tzname(None)] if named else None
    else:
        place = None
    if zone is not None and offset is None and place is None:
        raise NotStorable(path, f"{name} in a zone of the class {type_name(zone)}")
    if not value.fold and place is None:
        return {f"${name}": value.isoformat()}
    if place is None and zone is not None:
        place = [cast(timedelta, offset).total_seconds(), None]
    return {"$zoned": [name, value.replace(tzinfo=None, fold=0).isoformat(), value.fold, place]}


def _zone_info(zone: tzinfo | None) -> "ZoneInfo | None":
    """`zone` if it is a ZoneInfo."""
    if zone is None or isinstance(zone, timezone):
        return None
    from zoneinfo import ZoneInfo  # takes 2 ms to import; few programs have values with such zones

    return zone if isinstance(zone, ZoneInfo) else None


def _read_zoned(form: list[Any]) -> datetime | time:
    name, text, fold, place = form
    zone: tzinfo | None = None
    if isinstance(place, str):
        from zoneinfo import ZoneInfo  # as in _zone_info

        zone = ZoneInfo(place)
    elif place is not None:
        offset = timedelta(seconds=place[0])
        zone = timezone(offset) if place[1] is None else timezone(offset, place[1])
    made = time.fromisoformat(text) if name == "time" else datetime.fromisoformat(text)
    return made.replace(fold=fold, tzinfo=zone)


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
    date: ("$date", date.isoformat),
    timedelta: ("$timedelta", lambda value: f"{value.days} {value.seconds} {value.microseconds}"),
    Decimal: ("$decimal", str),
    uuid.UUID: ("$uuid", str),
    _PATHS[0]: ("$path", _path_text),
    _PATHS[1]: ("$posixpath", _path_text),
    _PATHS[2]: ("$windowspath", _path_text),
}

TAGGED_TYPES: tuple[type, ...] = (bytes, datetime, date, time, timedelta, Decimal, uuid.UUID)
"""Types that msgspec would write as text; tags keep their type."""

_TAGGABLE: frozenset[type] = (
    SCALARS | _CONTAINERS | {tuple, set, frozenset, datetime, time} | frozenset(_WRITERS)
)


def _read_dict(pairs: list[Any]) -> dict[Any, Any]:
    return {_untag(key): _untag(member) for key, member in pairs}


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "$int": lambda text: int(text, 16),
    "$float": _read_float,
    "$tuple": lambda items: tuple(map(_untag, items)),
    "$set": lambda items: set(map(_untag, items)),
    "$frozenset": lambda items: frozenset(map(_untag, items)),
    "$dict": _read_dict,
    "$bytes": base64.b64decode,
    "$datetime": datetime.fromisoformat,
    "$date": date.fromisoformat,
    "$time": time.fromisoformat,
    "$zoned": _read_zoned,
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


_EXACT: frozenset[type] = frozenset({type(None), bool, int, str, bytes})


def deep_equal(left: Any, right: Any) -> bool:
    """Equality of all that `==` ignores, too: types, order of keys, bits of floats, zone and fold
    of times, fields that are not compared, private and unset fields of models.

    Classes without `__eq__` are compared by their fields.
    """
    return _STRICT.equal(left, right)


def reads_back(back: Any, value: Any, *, same_unset: bool = True) -> bool:
    """Whether `back`, which an annotation made of a stored `value`, is deeply equal to it; an int
    may come back as the float that its annotation says.

    With `same_unset=False`, a field of a pydantic model that was given its default equals one that
    was left out.
    """
    return (_READ if same_unset else _READ_AS_SET).equal(back, value)


class _Comparison:
    """`equal` walks two values; their exact scalars are compared in the loops, without a call."""

    __slots__ = ("_int_is_float", "_same_unset")

    def __init__(self, *, int_is_float: bool, same_unset: bool) -> None:
        self._int_is_float = int_is_float
        self._same_unset = same_unset

    def equal(self, left: Any, right: Any) -> bool:
        if left is right:
            return True
        kind = _type_of(left)
        other = _type_of(right)
        if kind is not other:
            return self._int_is_float and kind is float and other is int and left == right
        if kind in _EXACT:
            return bool(left == right)
        if kind is float:
            return _BITS.pack(left) == _BITS.pack(right)
        shape = shape_of(kind)
        if shape is not None:
            if shape.is_model:
                return self._same_model(shape, left, right)
            return self._same_fields(shape, left, right)
        if isinstance(left, list | tuple):
            items = cast(list[Any], left)
            return len(items) == len(right) and self._all(items, right)
        if isinstance(left, dict):
            fields = cast(dict[Any, Any], left)
            return (
                len(fields) == len(right)
                and self._all(fields, right)
                and self._all(fields.values(), right.values())
            )
        if isinstance(left, set | frozenset):
            others = {item: item for item in right}
            members = cast(set[Any], left)
            return len(members) == len(others) and all(
                item in others and self.equal(item, others[item]) for item in members
            )
        if isinstance(left, datetime | time):
            if left.tzinfo is right.tzinfo:
                return left == right and left.fold == right.fold
            return (
                left.replace(tzinfo=None) == right.replace(tzinfo=None)
                and left.fold == right.fold
                and _same_zone(left.tzinfo, right.tzinfo)
            )
        if kind is Decimal:
            return str(left) == str(right)
        return bool(left == right)

    def _all(self, left: Iterable[Any], right: Iterable[Any]) -> bool:
        for one, other in zip(left, right, strict=True):
            if one is not other:
                kind = _type_of(one)
                if kind in _EXACT or (kind is float and one):
                    if kind is not type(other) or one != other:
                        if kind is float and self.equal(one, other):  # NaN, or an int
                            continue
                        return False
                elif not self.equal(one, other):
                    return False
        return True

    def _same_fields(self, shape: "_Shape", left: Any, right: Any) -> bool:
        try:
            fields = self._all(shape.fields_of(left), shape.fields_of(right))
        except AttributeError:  # a field was deleted, or never set
            return False
        if not fields or not shape.has_dict:
            return fields
        others = shape.other_attributes(left)
        return others is _NO_ATTRIBUTES is shape.other_attributes(right) or self.equal(
            others, shape.other_attributes(right)
        )

    def _same_model(self, shape: "_Shape", left: Any, right: Any) -> bool:
        if self._same_unset and left.__pydantic_fields_set__ != right.__pydantic_fields_set__:
            return False
        fields: dict[str, Any] = left.__dict__
        others: dict[str, Any] = right.__dict__
        if [*fields] != [*others]:  # in another order, with a cached property, or not the same
            return self._same_fields(shape, left, right)
        if not self._all(fields.values(), others.values()):
            return False
        return self.equal(left.__pydantic_private__, right.__pydantic_private__) and self.equal(
            left.__pydantic_extra__, right.__pydantic_extra__
        )


_NO_ATTRIBUTES: dict[str, Any] = {}

_STRICT = _Comparison(int_is_float=False, same_unset=True)
_READ = _Comparison(int_is_float=True, same_unset=True)
_READ_AS_SET = _Comparison(int_is_float=True, same_unset=False)


class _Shape:
    """The state of the instances of one class of records."""

    __slots__ = ("_cached", "_names", "fields_of", "has_dict", "is_model")

    def __init__(self, kind: type[Any], names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._cached = frozenset(
            name
            for base in kind.__mro__
            for name, member in vars(base).items()
            if isinstance(member, cached_property)
        )
        self.is_model = hasattr(kind, "__pydantic_fields_set__")
        self.has_dict = kind.__dictoffset__ != 0
        # One more, so that there are two at least: attrgetter of one name returns no tuple.
        extra = ("__pydantic_private__", "__pydantic_extra__") if self.is_model else ("__class__",)
        self.fields_of: Callable[[Any], tuple[Any, ...]] = attrgetter(*names, "__class__", *extra)

    def other_attributes(self, value: Any) -> dict[str, Any]:
        """The attributes that are no fields, in one order; not cached properties."""
        attributes = value.__dict__
        if attributes.keys() <= self._names:
            return _NO_ATTRIBUTES
        names = sorted(attributes.keys() - self._names - self._cached)
        return {name: attributes[name] for name in names}


@lru_cache(maxsize=1024)
def shape_of(kind: type[Any]) -> _Shape | None:
    """The fields of a class of records (Structs, dataclasses, models); None for other classes."""
    if hasattr(kind, "__pydantic_fields_set__"):
        return _Shape(kind, tuple(cast(Any, kind).model_fields))
    names: Any = getattr(kind, "__struct_fields__", None)
    if names is None:
        names = getattr(kind, "__dataclass_fields__", None)
    if names is None and hasattr(kind, "__attrs_attrs__"):
        names = [field.name for field in cast(Any, kind).__attrs_attrs__]
    return None if names is None else _Shape(kind, tuple(names))


def _same_zone(left: tzinfo | None, right: tzinfo | None) -> bool:
    """Whether two zones are the same by name, or two fixed offsets are equal and are called the
    same. Libraries have classes of their own for a fixed offset.
    """
    if left is right:
        return True
    first = _zone_info(left)
    second = _zone_info(right)
    if first is not None and second is not None:
        return first.key == second.key and bool(first.key)
    if left is None or right is None or first is not None or second is not None:
        return False
    if isinstance(left, timezone) and isinstance(right, timezone):
        return left == right and left.tzname(None) == right.tzname(None)
    offset = left.utcoffset(None)
    return offset is not None and offset == right.utcoffset(None)
