"""Codecs: results, errors, and fingerprints of arguments as bytes.

The engine encodes the result of a task and gives the flow the decoded value, live and in a replay,
so a value either comes back equal or is refused (`NotStorable`) when it is made. The name of a
codec is stored beside the bytes: `json`, `tagged` (tagged_json.py), `bytes`, `typed` and
`typed-tagged` (by the return annotation), `pickle` (only if the task asks for it; signed, and never
read by the server). With `@blob` after it, the bytes are a reference (blobs.py). No class is ever
imported by name. Pure functions, all on the hot path. The rows that hold the bytes are in store/.
"""

import contextlib
import hashlib
import hmac
import linecache
import os
import pickle
import sys
import types
import typing
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

import msgspec
import orjson

from eventflow.core.errors import (
    NotStorable,
    ResultTooLarge,
    StoreCorrupt,
    TaskFailed,
    UsageError,
    call_catching,
)
from eventflow.core.hashing import digest
from eventflow.serialization.tagged_json import (
    SCALARS,
    TAGGED_TYPES,
    decode_tagged,
    deep_equal,
    encode_plain,
    encode_tagged,
    is_plain,
    type_name,
)

MAX_JSON = 64 * 1024 * 1024
"""Bytes of JSON above which a result is refused (fault 36)."""

_NULL = ("json", b"null")
_UNENCODABLE = (TypeError, ValueError, OverflowError, RecursionError)
# What msgspec raises for an annotation that is unsupported, unresolved or circular.
_UNREADABLE = (TypeError, NameError, AttributeError, RecursionError)


# --------------------------------------------------------------------------- results


class ResultCodec:
    """Encodes the results of one task or flow. Built once per function, from its return annotation.

    A value that does not fit the annotation is stored by its own type, or refused. `codec="pickle"`
    is for values without another form; `key` signs them (HMAC-SHA256) and is not in the store.
    """

    __slots__ = ("_annotation", "_members", "_name", "_number", "_pickled", "_plain", "_reader")

    def __init__(self, annotation: Any, name: str, codec: str | None = None) -> None:
        if codec not in (None, "pickle"):
            raise UsageError(f'{name}: codec= expected None or "pickle", found {codec!r}')
        self._annotation = annotation
        self._name = name
        self._pickled = codec == "pickle"
        self._plain = _is_json_annotation(annotation)
        self._number: type | None = annotation if annotation in (int, float) else None
        self._reader: msgspec.json.Decoder[Any] | None = None
        self._members: dict[str, ResultCodec] = {}

    def encode(self, value: Any, *, key: bytes = b"") -> tuple[str, bytes]:
        """`(codec, bytes)`, which `decode` turns into an equal value. Raises NotStorable with the
        path and type of the part.
        """
        if value is None:
            return _NULL
        if self._pickled:
            return "pickle", _sign(pickle.dumps(value, protocol=5), key)
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
                return pickle.loads(_verified(data, key, self._name))
            case "pickle":
                raise UsageError(
                    f"{self._name}: this result is pickled, and pickles are only read where flows "
                    "run"
                )
            case _:
                return self._decode_typed(codec, data)

    def _encode_typed(self, value: Any) -> tuple[str, bytes] | None:
        """Encode by the annotation; None if the decoded value would not be equal."""
        reader = self._build()
        if reader is None:
            member = self._members.get(type(value).__qualname__)
            encoded = member and member._encode_typed(value)
            return encoded and (f"{encoded[0]}:{type(value).__qualname__}", encoded[1])
        with contextlib.suppress(*_UNENCODABLE):
            data = _WRITER.encode(value)
            back = reader.decode(data)
            if back == value or deep_equal(back, value):
                return "typed", data
        # NaN and integers beyond 64 bits inside a typed value: builtins first, then tags.
        with contextlib.suppress(*_UNENCODABLE, NotStorable):
            data = encode_tagged(
                msgspec.to_builtins(value, builtin_types=TAGGED_TYPES, enc_hook=_encode_hook),
                self._name,
            )
            if deep_equal(self._convert(data), value):
                return "typed-tagged", data
        return None

    def _decode_typed(self, codec: str, data: bytes) -> Any:
        form, _, member = codec.partition(":")
        reader = self._build()
        if member and member in self._members:
            return self._members[member]._decode_typed(form, data)
        if member or reader is None or form not in ("typed", "typed-tagged"):
            raise UsageError(
                f"{self._name}: a result was recorded as {codec!r}, which its return annotation "
                f"{self._annotation!r} cannot read; deploy the code that recorded it, or retry the "
                "run afresh"
            )
        try:
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
    if form in ("tagged", "typed-tagged"):
        return msgspec.to_builtins(decode_tagged(data), str_keys=True, enc_hook=str)
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


def _encode_hook(value: Any) -> Any:
    """msgspec's hook: pydantic models anywhere in a typed value."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", by_alias=True, warnings=False)
    raise TypeError(type_name(value))


def _decode_hook(wanted: type, value: Any) -> Any:
    if hasattr(wanted, "model_validate"):
        return cast(Any, wanted).model_validate(value)
    raise TypeError(f"cannot read a {wanted!r}")


_WRITER = msgspec.json.Encoder(enc_hook=_encode_hook)
_SORTER = msgspec.json.Encoder(enc_hook=_encode_hook, order="deterministic")


def _sign(data: bytes, key: bytes) -> bytes:
    return hmac.digest(key, data, "sha256") + data


def _verified(data: bytes, key: bytes, name: str) -> bytes:
    """S12: a pickle is read only if the key of this installation signed it."""
    if not hmac.compare_digest(data[:32], hmac.digest(key, data[32:], "sha256")):
        raise StoreCorrupt(
            f"{name}: the signature of a pickled result does not match; it was altered, or the key "
            "has changed"
        )
    return data[32:]


# --------------------------------------------------------------------------- errors

MAX_TRACEBACK = 16 * 1024
"""Characters of the traceback of an error that are stored, from its end, where the error is."""

_OWN_FILES = str(Path(__file__).parent.parent) + os.sep
_REMOTE = "recorded traceback:\n"


def encode_error(error: BaseException) -> bytes:
    """JSON `{"type": "module:Qual.Name", "message", "args", "traceback"}`, and `"exceptions"` of a
    group.

    `args` is null if it is not JSON; then, or if the class cannot be rebuilt from it, the flow gets
    a TaskFailed.
    """
    return orjson.dumps(_describe(error, MAX_TRACEBACK))


def decode_error(data: bytes) -> BaseException:
    """The recorded error, with the recorded traceback as its note.

    Its class is looked up in modules already imported, and must rebuild from its arguments with the
    same type and text. Otherwise the result is TaskFailed(type, message).
    """
    return _rebuild(orjson.loads(data))


def _describe(error: BaseException, max_length: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"traceback": _render(error)[-max_length:]}
    members: tuple[BaseException, ...] = (
        getattr(error, "exceptions", ()) if _is_group(error) else ()
    )
    if members:
        share = max(512, max_length // len(members))
        fields["exceptions"] = [_describe(member, share) for member in members]
    if type(error) is TaskFailed:  # replaces another error: record that one again
        known = {
            "type": error.error_type,
            "message": error.message,
            "args": vars(error).get("recorded_args"),
        }
    else:
        known = {"type": _class_name(error), "message": _message(error), "args": _json_args(error)}
    return {
        name: _utf8(text) if isinstance(text, str) else text
        for name, text in (known | fields).items()
    }


def _is_group(error: BaseException) -> bool:
    return isinstance(error, BaseExceptionGroup)


def _class_name(error: BaseException) -> str:
    return f"{type(error).__module__}:{type(error).__qualname__}"


def _message(error: BaseException) -> str:
    text, broken = call_catching(str, cast(Any, error).message if _is_group(error) else error)
    return (
        text
        if text is not None
        else f"<{type(error).__name__}.__str__ raised {type(broken).__name__}>"
    )


def _json_args(error: BaseException) -> list[Any] | None:
    if _is_group(error):
        return None
    args = list(error.args)
    if isinstance(error, OSError) and len(args) == 2 and error.filename is not None:
        args += (
            [error.filename] if error.filename2 is None else [error.filename, None, error.filename2]
        )
    try:
        return args if is_plain(args) and orjson.loads(orjson.dumps(args)) == args else None
    except (TypeError, RecursionError):  # integers beyond 64 bits, lone surrogates, cycles
        return None


def _utf8(text: str) -> str:
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def _render(error: BaseException) -> str:
    """The traceback as Python prints it, without the frames of eventflow's own files and without
    carets: parsing each line for carets makes a failing task ten times as expensive as a succeeding
    one.
    """
    parts: list[str] = []
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen and len(seen) < 20:
        seen.add(id(link))
        frames = _render_frames(link)
        notes = "".join(f"\n{note}" for note in getattr(link, "__notes__", ()))
        parts.append(f"{frames}{type_name(link)}: {_message(link)}{notes}\n")
        if link.__cause__ is not None:
            parts.append(
                "\nThe above exception was the direct cause of the following exception:\n\n"
            )
            link = link.__cause__
        elif link.__context__ is not None and not link.__suppress_context__:
            parts.append(
                "\nDuring handling of the above exception, another exception occurred:\n\n"
            )
            link = link.__context__
        else:
            link = None
    return "".join(reversed(parts))


def _render_frames(error: BaseException) -> str:
    lines: list[str] = []
    step = error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        if not code.co_filename.startswith(_OWN_FILES):
            lines.append(
                f'  File "{code.co_filename}", line {step.tb_lineno}, in {code.co_qualname}\n'
            )
            if source := linecache.getline(
                code.co_filename, step.tb_lineno, step.tb_frame.f_globals
            ).strip():
                lines.append(f"    {source}\n")
        step = step.tb_next
    if len(lines) > 120:  # infinite recursion: both ends suffice
        lines[60:-60] = ["  ...\n"]
    return "Traceback (most recent call last):\n" + "".join(lines) if lines else ""


def _rebuild(fields: dict[str, Any]) -> BaseException:
    kind = _find_error_class(fields["type"])
    error = _instance(kind, fields) if kind is not None else None
    if error is None:
        error = TaskFailed(fields["type"], fields["message"])
        vars(error)["recorded_args"] = fields["args"]
    if fields["traceback"]:
        error.add_note(_REMOTE + fields["traceback"].rstrip())
    return error


_MOVED_MODULES = {
    "eventflow.checks": "eventflow.sdk.checks",
    "eventflow.errors": "eventflow.core.errors",
    "eventflow.retry": "eventflow.core.retry",
}
_RENAMED_CLASSES = {"LineageLost": "OutsideFlowError"}
"""New names of classes that a ledger of an earlier version recorded."""


def _find_error_class(name: str) -> type[Exception] | None:
    """The class `module:Qual.Name`, if its module is already imported (S12)."""
    module, _, path = name.partition(":")
    if module in _MOVED_MODULES:
        module, path = _MOVED_MODULES[module], _RENAMED_CLASSES.get(path, path)
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def _instance(kind: type[Exception], fields: dict[str, Any]) -> Exception | None:
    """The rebuilt error, or None if its class makes another error from these arguments."""
    if "exceptions" in fields:
        args = [fields["message"], [_rebuild(member) for member in fields["exceptions"]]]
    elif fields["args"] is None:
        return None
    else:
        args = fields["args"]
    error, _ = call_catching(kind, *args)
    return (
        error
        if error is not None and type(error) is kind and _message(error) == fields["message"]
        else None
    )


# --------------------------------------------------------------------------- fingerprints

_MAX_LITERAL = 1024  # size of a fingerprint without hashes: one line of a diff, cheap in every row
_MAX_LITERAL_FIELD = 64  # in a longer one, size of a field without a hash: a hash is not shorter
_UNVERIFIED = b'"?"'


def fingerprint(
    names: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> bytes | None:
    """Canonical JSON of bound arguments: `f(1)`, `f(x=1)` and a default of 1 are the same.

    `names` are the positional parameters in order. In a fingerprint over 1 KiB, long fields are
    `"#" + blake2b`. A value without a JSON form is `"?"`, which is never compared. None: nothing
    can be compared.
    """
    bound: dict[str, Any] = dict(defaults) if defaults else {}
    bound.update(zip(names, args))  # noqa: B905  (fewer arguments than names is the normal case)
    if len(args) > len(names):
        bound["*"] = args[len(names) :]
    if kwargs:
        bound.update(kwargs)
    try:
        data = orjson.dumps(bound, _json_hook, orjson.OPT_SORT_KEYS)
        if len(data) <= _MAX_LITERAL:
            return data
    except TypeError:  # JSONEncodeError is one; some field is not comparable
        pass
    return _fingerprint_fields(bound)


def _fingerprint_fields(bound: Mapping[str, Any]) -> bytes | None:
    """Field by field: hashes of long ones, "?" for those without a JSON form."""
    fields = {name: _field(value) for name, value in bound.items()}
    if bound and all(field == _UNVERIFIED for field in fields.values()):
        return None
    if sum(map(len, fields.values())) > _MAX_LITERAL:
        fields = {
            name: field if len(field) <= _MAX_LITERAL_FIELD else _hashed(field)
            for name, field in fields.items()
        }
    return orjson.dumps(
        {name: orjson.Fragment(field) for name, field in fields.items()},
        option=orjson.OPT_SORT_KEYS,
    )


def _field(value: Any) -> bytes:
    try:
        return orjson.dumps(value, _json_hook, orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    except (TypeError, RecursionError):
        pass
    try:
        # Integers over 64 bits, which orjson refuses without calling its hook.
        return _SORTER.encode(value)
    except _UNENCODABLE:
        return _UNVERIFIED


def _hashed(field: bytes) -> bytes:
    return b'"#' + hashlib.blake2b(field, digest_size=16).hexdigest().encode() + b'"'


def _json_hook(value: Any) -> Any:
    """orjson's hook: the JSON of a value that orjson does not know. Long bytes are hashed instead
    of encoded.
    """
    if isinstance(value, bytes | bytearray):
        content = value if len(value) <= _MAX_LITERAL_FIELD else digest(bytes(value))
        return f"bytes:{content.hex()}"
    if isinstance(value, set | frozenset):
        return sorted(cast(set[Any], value), key=lambda item: orjson.dumps(item, _json_hook))
    return msgspec.to_builtins(value, str_keys=True, enc_hook=_encode_hook)


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
    return all(_as_hash(one) != other for one, other in ((left, right), (right, left)))


def _as_hash(value: Any) -> str:
    return orjson.loads(_hashed(_field(value)))


def _field_text(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        return "absent"
    text = msgspec.json.encode(fields[name]).decode()
    return text if len(text) <= 80 else f"{text[:77]}..."
