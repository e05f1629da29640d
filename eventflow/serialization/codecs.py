"""Codecs: results, and fingerprints of arguments, as bytes.

The engine encodes the result of a task and gives the flow the decoded value, live and in a replay,
so a value either comes back equal or is refused (`NotStorable`) when it is made. The name of a
codec is stored beside the bytes: `json`, `tagged` (tagged_json.py), `bytes`, `typed` and
`typed-*` (by the return annotation), `pickle` (only if the task asks for it; signed, and never
read by the server). With `@blob` after it, the bytes are a reference (blobs.py). No class is ever
imported by name. Pure functions, all on the hot path. Errors are in errors.py; the rows that hold
the bytes in store/.
"""

import contextlib
import hashlib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, cast

import msgspec
import orjson

from eventflow.core.canonical import dump_model, to_sorted_builtins
from eventflow.core.errors import (
    NotStorable,
    ResultTooLarge,
    StoreCorrupt,
    UsageError,
)
from eventflow.core.hashing import digest
from eventflow.core.large_values import MIN_LARGE_BYTES, LargeValues
from eventflow.serialization.exact_types import Check, exact_check
from eventflow.serialization.tagged_json import (
    SCALARS,
    TAGGED_TYPES,
    decode_readable,
    decode_tagged,
    encode_plain,
    encode_tagged,
    reads_back,
    shape_of,
    type_name,
)

MAX_JSON = 64 * 1024 * 1024
"""Bytes of JSON above which a result is refused (fault 36)."""

_NULL = ("json", b"null")
_UNENCODABLE = (TypeError, ValueError, OverflowError, RecursionError)
_FIELDS_SET = "__pydantic_fields_set__"
_TYPED_FORMS = frozenset({"typed", "typed-unset", "typed-tagged", "typed-models"})
# What msgspec raises for an annotation that is unsupported, unresolved or circular.
_UNREADABLE = (TypeError, NameError, AttributeError, RecursionError)


# --------------------------------------------------------------------------- results


class ResultCodec:
    """Encodes the results of one task or flow. Built once per function, from its return annotation.

    A value that does not fit the annotation is stored by its own type, or refused. `codec="pickle"`
    is for values without another form; `key` signs them (HMAC-SHA256) and is not in the store.
    """

    __slots__ = (
        "_annotation",
        "_has_exact_types",
        "_members",
        "_name",
        "_number",
        "_pickled",
        "_plain",
        "_reader",
    )

    def __init__(self, annotation: Any, name: str, codec: str | None = None) -> None:
        if codec not in (None, "pickle"):
            raise UsageError(f'{name}: codec= expected None or "pickle", found {codec!r}')
        self._annotation = annotation
        self._name = name
        self._pickled = codec == "pickle"
        self._plain = _is_json_annotation(annotation)
        self._number: type | None = annotation if annotation in (int, float) else None
        self._reader: msgspec.json.Decoder[Any] | None = None
        self._has_exact_types: Check | None = None
        self._members: dict[str, ResultCodec] = {}

    def encode(self, value: Any, *, key: bytes = b"") -> tuple[str, bytes]:
        """`(codec, bytes)`, which `decode` turns into an equal value. Raises NotStorable with the
        path and type of the part.
        """
        if value is None:
            return _NULL
        if self._pickled:
            return "pickle", _signed_pickle(value, key)
        if type(value) is bytes:
            return "bytes", value
        encoded = None if self._plain else self._encode_typed(value)
        if encoded is None:
            if self._number is not None and type(value) not in SCALARS:
                value = _as_number(value, self._number)
            encoded = encode_plain(value, f"{self._name}: result")
        if len(encoded[1]) > MAX_JSON:
            raise ResultTooLarge(f"{self._name}: result", len(encoded[1]), MAX_JSON)
        return encoded

    def decode(
        self, codec: str, data: bytes, *, allow_pickle: bool = False, key: bytes = b""
    ) -> Any:
        """The inverse of `encode`. Raises UsageError if the changed annotation cannot read the
        bytes.
        """
        match codec:
            case "json":
                return orjson.loads(data)
            case "bytes":
                return data
            case "tagged":
                return decode_tagged(data)
            case "pickle" if allow_pickle:
                return _read_pickle(data, key, self._name)
            case "pickle":
                raise UsageError(
                    f"{self._name}: this result is pickled, and pickles are only read where flows "
                    "run"
                )
            case _:
                return self._decode_typed(codec, data)

    def _encode_typed(self, value: Any) -> tuple[str, bytes] | None:
        """Encode by the annotation; None if the decoded value would not be equal."""
        reader = self._reader or self._build()
        if reader is None:
            member = self._members.get(type(value).__qualname__)
            encoded = member and member._encode_typed(value)
            return encoded and (f"{encoded[0]}:{type(value).__qualname__}", encoded[1])
        try:
            data = _WRITER.encode(value)
            back = reader.decode(data)
            has_exact_types = self._has_exact_types
            if has_exact_types is not None and has_exact_types((value,)) and back == value:
                return "typed", data
            if reads_back(back, value):
                return "typed", data
            names = _copy_fields_set(value, back)
            if names and reads_back(back, value):
                return "typed-unset", _WRITER.encode(_WithUnset(names, msgspec.Raw(data)))
        except _UNENCODABLE:
            pass
        if hasattr(value, "model_dump"):
            return self._encode_models(value)
        # NaN and integers beyond 64 bits inside a typed value: builtins first, then tags.
        with contextlib.suppress(*_UNENCODABLE, NotStorable):
            data = encode_tagged(
                msgspec.to_builtins(value, builtin_types=TAGGED_TYPES, enc_hook=dump_model),
                self._name,
            )
            if reads_back(self._convert(data), value):
                return "typed-tagged", data
        return self._encode_models(value)

    def _encode_models(self, value: Any) -> tuple[str, bytes] | None:
        """The value, and what a pydantic model does not dump: which fields are set, private
        attributes.
        """
        states = [_model_state(model) for model in _models_in(value)]
        if not states:
            return None
        with contextlib.suppress(*_UNENCODABLE, NotStorable):
            form = msgspec.to_builtins(value, builtin_types=TAGGED_TYPES, enc_hook=_dump_objects)
            data = encode_tagged({"value": form, "models": states}, self._name)
            if reads_back(self._read_models(data), value):
                return "typed-models", data
        return None

    def _read_models(self, data: bytes) -> Any:
        fields = decode_tagged(data)
        value = msgspec.convert(fields["value"], self._annotation, dec_hook=_decode_hook)
        for model, (names, private) in zip(_models_in(value), fields["models"], strict=True):
            object.__setattr__(model, _FIELDS_SET, set(names))
            object.__setattr__(model, "__pydantic_private__", private)
        return value

    def _decode_typed(self, codec: str, data: bytes) -> Any:
        form, _, member = codec.partition(":")
        reader = self._build()
        if member and member in self._members:
            return self._members[member]._decode_typed(form, data)
        if member or reader is None or form not in _TYPED_FORMS:
            raise UsageError(
                f"{self._name}: a result was recorded as {codec!r}, which its return annotation "
                f"{self._annotation!r} cannot read; deploy the code that recorded it, or discard "
                "what was recorded: eventflow retry RUN --from-scratch"
            )
        try:
            if form == "typed-models":
                return self._read_models(data)
            if form == "typed-unset":
                return _read_with_unset(reader, data)
            return reader.decode(data) if form == "typed" else self._convert(data)
        except msgspec.ValidationError as error:
            raise UsageError(
                f"{self._name}: a recorded result does not fit its return annotation any more: "
                f"{error}"
            ) from error

    def _convert(self, data: bytes) -> Any:
        return msgspec.convert(decode_tagged(data), self._annotation, dec_hook=_decode_hook)

    def _build(self) -> "msgspec.json.Decoder[Any] | None":
        """The decoder of the annotation, made at first use: a class it names may be defined after
        the task.
        """
        if self._reader is None and not self._members and not self._plain:
            try:
                self._reader = msgspec.json.Decoder(self._annotation, dec_hook=_decode_hook)
                self._has_exact_types = exact_check(self._annotation)
            except _UNREADABLE:
                # msgspec refuses a union of untagged classes; the class name beside the codec
                # distinguishes them.
                members = typing.get_args(self._annotation)
                if typing.get_origin(self._annotation) in (typing.Union, types.UnionType):
                    self._members = {
                        m.__qualname__: ResultCodec(m, self._name)
                        for m in members
                        if isinstance(m, type)
                    }
                self._plain = not self._members
        return self._reader


def to_readable(codec: str, data: bytes) -> Any:
    """A stored result as JSON data for people: typed values as fields, sets as lists, bytes as
    their size. Never unpickles.
    """
    form = codec.partition(":")[0]
    if form in ("json", "typed"):
        return msgspec.json.decode(data)
    if form == "typed-unset":
        return msgspec.json.decode(data)["value"]
    if form in ("tagged", "typed-tagged"):
        return msgspec.to_builtins(decode_readable(data), str_keys=True, enc_hook=str)
    if form == "typed-models":
        value = decode_readable(data)["value"]
        return msgspec.to_builtins(value, str_keys=True, enc_hook=str)
    return f"<{codec}, {len(data)} bytes>"


_PLAIN_TYPES: frozenset[Any] = SCALARS | {None, Any, object, dict, list, typing.Dict, typing.List}  # noqa: UP006
_PLAIN_ORIGINS: frozenset[Any] = frozenset({dict, list, typing.Union, types.UnionType})


def _is_json_annotation(annotation: Any) -> bool:
    """Whether the annotation adds nothing to the value: JSON types, no annotation, or an unresolved
    one.
    """
    try:
        if annotation in _PLAIN_TYPES:
            return True
    except TypeError:  # unhashable
        return True
    origin = typing.get_origin(annotation)
    if origin is None:
        return isinstance(annotation, str) or getattr(annotation, "__name__", "") == "_empty"
    return origin in _PLAIN_ORIGINS and all(map(_is_json_annotation, typing.get_args(annotation)))


def _as_number(value: Any, wanted: type) -> Any:
    """The number of a numpy scalar under `-> float` or `-> int`."""
    if isinstance(value, Integral if wanted is int else Real):
        number = wanted(cast(Any, value))
        if number == value or value != value:
            return number
    return value


def _models_in(value: Any) -> list[Any]:
    """The pydantic models in a value, in one order. Not those in sets, which have none."""
    found: list[Any] = []
    _add_models(value, found)
    return found


def _add_models(value: Any, found: list[Any]) -> None:
    kind = cast(type[Any], type(value))
    shape = shape_of(kind)
    if shape is not None and shape.is_model:
        found.append(value)
        parts: Iterable[Any] = value.__dict__.values()
        if value.__pydantic_extra__:
            parts = (*parts, value.__pydantic_extra__)
    elif isinstance(value, dict):
        parts = cast(dict[Any, Any], value).values()
    elif isinstance(value, list | tuple):
        parts = cast(Sequence[Any], value)
    else:
        names: Iterable[str] = getattr(value, "__struct_fields__", None) or getattr(
            value, "__dataclass_fields__", ()
        )
        parts = [getattr(value, name, None) for name in names]
    for part in parts:
        if type(part) not in SCALARS:
            _add_models(part, found)


class _WithUnset(msgspec.Struct):
    """A typed value, and per model the names of its set fields; None for a model whose set fields
    are those that reading the JSON gives.
    """

    set: list[list[str] | None]
    value: msgspec.Raw


_UNSET_READER = msgspec.json.Decoder(_WithUnset)


def _copy_fields_set(value: Any, back: Any) -> list[list[str] | None]:
    """Marks the fields of the models in `back` as set that are set in `value`. Returns, per model,
    the names that were copied (None: nothing to copy); empty if the two differ in their models.
    """
    models = _models_in(value)
    others = _models_in(back)
    if len(models) != len(others):
        return []
    names: list[list[str] | None] = []
    for model, other in zip(models, others, strict=True):
        fields: set[str] = model.__pydantic_fields_set__
        if fields == other.__pydantic_fields_set__:
            names.append(None)
        else:
            names.append(sorted(fields))
            object.__setattr__(other, _FIELDS_SET, fields.copy())
    return names


def _read_with_unset(reader: "msgspec.json.Decoder[Any]", data: bytes) -> Any:
    stored = _UNSET_READER.decode(data)
    value = reader.decode(stored.value)
    for model, names in zip(_models_in(value), stored.set, strict=True):
        if names is not None:
            object.__setattr__(model, _FIELDS_SET, set(names))
    return value


def _model_state(model: Any) -> tuple[list[str], dict[str, Any] | None]:
    return sorted(model.__pydantic_fields_set__), model.__pydantic_private__


def _dump_objects(value: Any) -> Any:
    """msgspec's hook: pydantic models as dicts of Python objects."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="python", by_alias=True, warnings=False)
    raise TypeError(type_name(value))


def _decode_hook(wanted: type, value: Any) -> Any:
    if hasattr(wanted, "model_validate"):
        return cast(Any, wanted).model_validate(value)
    raise TypeError(f"cannot read a {wanted!r}")


_WRITER = msgspec.json.Encoder(enc_hook=dump_model)
_SORTER = msgspec.json.Encoder(enc_hook=dump_model, order="deterministic")


def _signed_pickle(value: Any, key: bytes) -> bytes:
    import hmac  # with pickle 1 ms to import, for `codec="pickle"` only
    import pickle

    data = pickle.dumps(value, protocol=5)
    return hmac.digest(key, data, "sha256") + data


def _read_pickle(data: bytes, key: bytes, name: str) -> Any:
    """S12: a pickle is read only if the key of this installation signed it."""
    import hmac
    import pickle

    if not hmac.compare_digest(data[:32], hmac.digest(key, data[32:], "sha256")):
        raise StoreCorrupt(
            f"{name}: the signature of a pickled result does not match; it was altered, or the key "
            "has changed"
        )
    return pickle.loads(data[32:])


# --------------------------------------------------------------------------- fingerprints

_MAX_LITERAL = 1024  # size of a fingerprint without hashes: one line of a diff, cheap in every row
_MAX_LITERAL_FIELD = 64  # in a longer one, size of a field without a hash: a hash is not shorter
_UNVERIFIED = b'"?"'


def fingerprint(
    names: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    defaults: Mapping[str, Any],
    large: LargeValues | None = None,
) -> bytes | None:
    """Canonical JSON of bound arguments: `f(1)`, `f(x=1)` and a default of 1 are the same.

    `names` are the positional parameters in order. In a fingerprint over 1 KiB, long fields are
    `"##" + blake2b`. A value without a JSON form is `"?"`, which is never compared. None: nothing
    can be compared. Equal arguments have equal fingerprints in every process: sets are sorted.
    """
    bound = bind_names(names, args, kwargs, defaults)
    if large and large.has_any(bound.values()):
        return _fingerprint_fields(bound, large)
    try:
        data = orjson.dumps(bound, _json_hook, orjson.OPT_SORT_KEYS)
        if len(data) <= _MAX_LITERAL:
            return data
    except TypeError:  # JSONEncodeError is one; some field is not comparable
        pass
    return _fingerprint_fields(bound, large)


def bind_names(
    names: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> dict[str, Any]:
    """The arguments by name; those beyond `names` as `*`."""
    bound: dict[str, Any] = dict(defaults) if defaults else {}
    bound.update(zip(names, args))  # noqa: B905  (fewer arguments than names is the normal case)
    if len(args) > len(names):
        bound["*"] = args[len(names) :]
    if kwargs:
        bound.update(kwargs)
    return bound


def _fingerprint_fields(bound: Mapping[str, Any], large: LargeValues | None) -> bytes | None:
    """Field by field: hashes of long ones, "?" for those without a JSON form. `large`: those of
    values that the run has passed to a call before.
    """
    fields: dict[str, bytes] = {}
    has_large = False
    for name, value in bound.items():
        field = None if large is None else large.find(value)
        if field is None:
            field = _field(value)
            if large is not None and len(field) >= MIN_LARGE_BYTES:
                field = _hashed(field)
                large.add(value, field)
                has_large = True
        else:
            has_large = True
        fields[name] = field
    if bound and all(field == _UNVERIFIED for field in fields.values()):
        return None
    if has_large or sum(map(len, fields.values())) > _MAX_LITERAL:
        fields = {
            name: field if len(field) <= _MAX_LITERAL_FIELD else _hashed(field)
            for name, field in fields.items()
        }
    return orjson.dumps(
        {name: orjson.Fragment(field) for name, field in fields.items()},
        option=orjson.OPT_SORT_KEYS,
    )


def _field(value: Any, *, marked: bool = False) -> bytes:
    """The JSON of one argument; with `marked`, sets inside of records are `{"$set": [items]}`."""
    hook = _marked_hook if marked else _json_hook
    try:
        return orjson.dumps(value, hook, orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    except (TypeError, RecursionError):
        pass
    try:
        # Integers over 64 bits, which orjson refuses without calling its hook.
        return _SORTER.encode(to_sorted_builtins(value, marked=marked))
    except _UNENCODABLE:
        return _UNVERIFIED


def _hashed(field: bytes) -> bytes:
    return b'"##' + _hash_text(field) + b'"'


def _hash_text(field: bytes) -> bytes:
    return hashlib.blake2b(field, digest_size=16).hexdigest().encode()


def _json_hook(value: Any) -> Any:
    """orjson's hook: the JSON of a value that orjson does not know. Long bytes are hashed instead
    of encoded.
    """
    if isinstance(value, bytes | bytearray):
        content = value if len(value) <= _MAX_LITERAL_FIELD else digest(bytes(value))
        return f"bytes:{content.hex()}"
    if isinstance(value, set | frozenset):
        return sorted(cast(set[Any], value), key=lambda item: orjson.dumps(item, _json_hook))
    return to_sorted_builtins(value)


def _marked_hook(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | set | frozenset):
        return _json_hook(value)  # earlier versions sorted these, too
    return to_sorted_builtins(value, marked=True)


def mark_sets(bound: Mapping[str, Any]) -> dict[str, bytes]:
    """The JSON of each argument, for `is_recorded_unsorted`."""
    return {name: _field(value, marked=True) for name, value in bound.items()}


def is_recorded_unsorted(recorded: bytes, marked: Mapping[str, bytes]) -> bool:
    """Whether `recorded` is the fingerprint that an earlier version made of these arguments.

    That version wrote sets inside of records in the order of its process. It hashed long arguments
    so, too; of such a hash nobody can tell whether it is of the same set, so it passes.
    """
    before: dict[str, Any] = msgspec.json.decode(recorded)
    return before.keys() == marked.keys() and all(
        _is_unsorted(before[name], field) for name, field in marked.items()
    )


def _is_unsorted(before: Any, field: bytes) -> bool:
    if before == "?" or field == _UNVERIFIED:
        return True
    if _is_hash(before):
        return b'{"$set":' in field and before[1] != "#"
    return _equal_but_for_order(before, msgspec.json.decode(field))


def _equal_but_for_order(before: Any, marked: Any) -> bool:
    if isinstance(marked, dict):
        fields = cast(dict[str, Any], marked)
        if fields.keys() == {"$set"}:
            return _sort_lists(before) == _sort_lists(fields["$set"])
        return (
            isinstance(before, dict)
            and cast(dict[str, Any], before).keys() == fields.keys()
            and all(_equal_but_for_order(before[name], fields[name]) for name in fields)
        )
    if isinstance(marked, list):
        items = cast(list[Any], marked)
        return (
            isinstance(before, list)
            and len(cast(list[Any], before)) == len(items)
            and all(map(_equal_but_for_order, cast(list[Any], before), items))
        )
    return bool(before == marked)


def _sort_lists(form: Any) -> Any:
    """The items of a set, in one order, and so all lists in them."""
    if isinstance(form, list):
        return sorted(map(_sort_lists, cast(list[Any], form)), key=_SORTER.encode)
    if isinstance(form, dict):
        fields = cast(dict[str, Any], form)
        if fields.keys() == {"$set"}:
            return _sort_lists(fields["$set"])
        return {name: _sort_lists(field) for name, field in fields.items()}
    return form


def fingerprint_diff(old: bytes | None, new: bytes | None) -> str:
    """The changed fields with both values: `x: 1 -> 2, y: absent -> 3`; "" if nothing comparable
    changed.
    """
    if old is None or new is None or old == new:
        return ""
    before = msgspec.json.decode(old)
    after = msgspec.json.decode(new)
    changed = [
        f"{name}: {_field_text(before, name)} -> {_field_text(after, name)}"
        for name in sorted(before.keys() | after.keys())
        if _differs(before, after, name)
    ]
    return ", ".join(changed)


def _differs(before: dict[str, Any], after: dict[str, Any], name: str) -> bool:
    if (name in before) != (name in after):
        return True
    left = before[name]
    right = after[name]
    if left == "?" or right == "?":
        return False
    if left == right:
        return False
    # A field may be literal on one side and a hash on the other, because other fields grew.
    return not _is_hash_of(left, right) and not _is_hash_of(right, left)


def _is_hash_of(left: Any, right: Any) -> bool:
    """Whether one is a hash, and the other the hashed value or its hash. Earlier versions wrote a
    single `#`.
    """
    if not _is_hash(left):
        return False
    if _is_hash(right):
        return left[-32:] == right[-32:]
    return left[-32:].encode() == _hash_text(_field(right))


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("##?[0-9a-f]{32}", value) is not None


def _field_text(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        return "absent"
    text = msgspec.json.encode(fields[name]).decode()
    return text if len(text) <= 80 else f"{text[:77]}..."
