"""Computes the arguments of a flow from an event, or from a JSON object of parameters.

A `Binder` is built once per flow. The router uses it when an event arrives, so that an event that
cannot be bound becomes a dead letter with the field and the reason; the engine uses it again when
the run starts. The rules, in order:

1. A parameter annotated `Event` gets the event.
2. The others are filled by name from `event.data` and validated by their annotations (msgspec,
   strict, as from JSON; pydantic models by pydantic). Missing ones keep their defaults; `**kwargs`
   gets the rest; fields without a parameter are ignored.
3. If a flow has exactly one parameter besides rule 1, and it cannot be filled by name, it gets the
   *whole* data, provided that it is annotated with a record (Struct, dataclass, TypedDict, pydantic
   model) or a mapping, or the data is no object. So `handle(order: Order)` takes both
   `{"order": {…}}` and the order itself. An event's data also goes whole to such a parameter
   without annotation and default: `handle(body)`.
4. A flow without parameters accepts any event.

A run may have several events (delivery.py). Then a parameter annotated `list[Event]` gets all of
them, and so does a flow's only other parameter if it is a list: `handle(orders: list[Order])` gets
the data of each. Everything else comes from the newest event. (`list[Event]` works for a single
event too.)
"""

import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, cast

import msgspec
import orjson

from eventflow.core.canonical import dump_model, may_hold_sets, sort_sets
from eventflow.core.declarations import nearest
from eventflow.core.errors import BindingError, NotStorable, UsageError, value_or_none
from eventflow.events.event import Event
from eventflow.serialization.tagged_json import is_plain, reads_back, type_name

_UNSET = msgspec.UNSET
_UNREADABLE = (TypeError, NameError, AttributeError, RecursionError)


class Binder:
    """Binds the arguments of one flow. Raises UsageError for a signature that no event can fill."""

    __slots__ = (
        "_adapters",
        "_complete",
        "_convert_record",
        "_data_parameters",
        "_event_lists",
        "_event_parameters",
        "_flow",
        "_might_take_whole",
        "_record",
        "_required",
        "_signature",
        "_single",
        "_takes_untyped_data",
        "_takes_whole_data",
        "_var_keyword",
    )

    def __init__(self, fn: Callable[..., Any], flow_name: str) -> None:
        self._flow = flow_name
        self._signature = inspect.signature(fn)
        hints = _hints(fn, flow_name)
        self._event_parameters: list[tuple[str, bool]] = []
        self._event_lists: list[str] = []  # parameters annotated list[Event]
        self._var_keyword: str | None = None  # the name of **kwargs
        self._adapters: dict[str, Any] = {}  # pydantic's readers, by parameter
        self._required: list[str] = []
        fields: list[Any] = []
        for parameter in self._signature.parameters.values():
            annotation = hints.get(parameter.name, Any)
            _check_kind(flow_name, parameter)
            optional = parameter.default is not inspect.Parameter.empty
            if parameter.kind is parameter.VAR_KEYWORD:
                self._var_keyword = parameter.name
            elif _is_list(annotation) and typing.get_args(annotation)[:1] == (Event,):
                self._event_lists.append(parameter.name)
            elif _is_event(annotation):
                self._event_parameters.append((parameter.name, not optional))
            else:
                self._required += [] if optional else [parameter.name]
                fields.append(
                    (parameter.name, self._msgspec_type(parameter.name, annotation), _UNSET)
                )
        self._data_parameters: list[str] = [name for name, _, _ in fields]
        self._record: type[msgspec.Struct] = msgspec.defstruct("Parameters", fields)
        self._convert_record: Callable[[Any], msgspec.Struct] = _converter(self._record)
        # the only parameter that data can fill, if there is exactly one
        self._single: str | None = (
            self._data_parameters[0] if len(fields) == 1 and self._var_keyword is None else None
        )
        self._takes_whole_data = self._single is not None and _takes_object(
            hints.get(self._single, Any)
        )
        self._takes_untyped_data: bool = (
            self._single is not None and self._single not in hints and bool(self._required)
        )
        # the only one without a default, if it could take an object: people expect that it does
        self._might_take_whole: str | None = None
        if len(fields) > 1 and len(self._required) == 1:
            name = self._required[0]
            if name not in hints or _takes_object(hints[name]):
                self._might_take_whole = name
        takes_whole = self._takes_whole_data or self._takes_untyped_data
        self._complete = CompleteArguments(
            [field[:2] if field[0] in self._required else field for field in fields],
            whole=self._single if takes_whole else None,
            is_data_enough=not (
                self._event_parameters or self._event_lists or self._adapters or self._var_keyword
            ),
        )

    def bind_event(self, event: Event) -> dict[str, Any]:
        """The arguments for an event. Raises BindingError naming the field and the reason."""
        data = event.data
        needs_more = self._takes_whole_data or self._var_keyword or self._adapters
        arguments = None if needs_more or type(data) is not dict else self._complete.convert(data)
        if arguments is None:
            arguments = self._bind(data, strict=False)
        for name, _ in self._event_parameters:
            arguments[name] = event
        for name in self._event_lists:
            arguments[name] = [event]
        return arguments

    def bind_arriving(self, event: Event, data: bytes | None) -> dict[str, Any] | None:
        """Check that an event can be bound, as `bind_event` does, whose data is recorded as `data`.

        Returns the arguments if they are certain to equal those of the recorded event, and are
        shared with nobody; None if they are to be bound from that. Raises BindingError.
        """
        arguments = None if data is None else self._complete.decode(event.data, data)
        if arguments is None:
            self.bind_event(event)
        return arguments

    def bind_events(self, events: Sequence[Event]) -> dict[str, Any]:
        """The arguments for the events of one run, oldest first. Raises BindingError."""
        if self._single is not None and _is_list(self._record.__annotations__[self._single]):
            arguments = self._convert({self._single: [event.data for event in events]})
            for name, _ in self._event_parameters:
                arguments[name] = events[-1]
        else:
            arguments = self.bind_event(events[-1])
        for name in self._event_lists:
            arguments[name] = list(events)
        return arguments

    def bind_params(self, params: Mapping[str, Any], event: Event | None = None) -> dict[str, Any]:
        """The arguments from a JSON object of parameters.

        Raises BindingError, also for a name that is no parameter.
        """
        arguments = self._bind(params, strict=True)
        for name in self._event_lists:
            arguments[name] = [] if event is None else [event]
        for name, required in self._event_parameters:
            if isinstance(given := params.get(name), Mapping):
                arguments[name] = _read_event(self._flow, name, cast(Mapping[str, Any], given))
            elif event is not None:
                arguments[name] = event
            elif required:
                raise BindingError(
                    self._flow,
                    name,
                    "expected an event, found none: this run was started without one",
                )
        return arguments

    def unpack(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
        """The arguments of a direct call as a JSON object; `bind_params` restores equal arguments.

        Raises TypeError as the call would, and NotStorable for a value that JSON and the annotation
        together cannot represent.
        """
        # Names alone need no binding, which costs 4 µs.
        if args or not kwargs.keys() <= self._signature.parameters.keys():
            bound = self._signature.bind_partial(*args, **kwargs).arguments
            if self._var_keyword is not None:
                bound |= bound.pop(self._var_keyword, {})
        else:
            bound = dict(kwargs)
        for name in self._required:
            if name not in bound:
                raise TypeError(f"{self._flow}() missing a required argument: {name!r}")
        packed = {name: orjson.Fragment(self._pack(name, value)) for name, value in bound.items()}
        return orjson.dumps(packed, option=orjson.OPT_SORT_KEYS)

    def misfit(self, params: Mapping[str, Any], error: TypeError) -> BindingError:
        """Why `unpack` refused these parameters with `error`."""
        known = self._signature.parameters
        for name in params:
            if name not in known:
                hint = _or_nearest(name, known)
                return BindingError(self._flow, name, f"the flow has no such parameter; {hint}")
        for name in self._required:
            if name not in params:
                return BindingError(self._flow, name, f"missing; given are {_list_names(params)}")
        return BindingError(self._flow, ", ".join(params), str(error))

    def mark_sets(self, params: bytes) -> bytes:
        """The JSON of `params`, which `unpack` made, with sets as `{"$set": [items]}`.

        For `codecs.is_recorded_unsorted`.
        """
        fields = orjson.loads(params)
        arguments = value_or_none(self._bind, fields, strict=True)
        if arguments is not None:
            fields = sort_sets({name: arguments.get(name) for name in fields}, fields, marked=True)
        return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)

    def bind_unpacked(self, params: bytes, event: Event) -> dict[str, Any] | None:
        """As `bind_arriving`, for a run with these `params`, which `unpack` made."""
        arguments = self._complete.decode(None, params)
        if arguments is None:
            self.bind_params(orjson.loads(params), event)
        return arguments

    # --------------------------------------------------------------------------- by name

    def _bind(self, data: Any, *, strict: bool) -> dict[str, Any]:
        if not self._data_parameters and self._var_keyword is None and not strict:
            return {}
        if isinstance(data, dict):
            fields = cast(dict[str, Any], data)
            if (
                (self._takes_whole_data or (self._takes_untyped_data and not strict))
                and self._single is not None
                and fields
                and self._single not in fields
            ):
                return self._convert({self._single: fields})
            return self._bind_fields(fields, strict)
        if data is None or (isinstance(data, Mapping) and not data):
            return self._bind_fields({}, strict)
        if self._single is not None:
            return self._convert({self._single: data})
        wanted = ", ".join(self._data_parameters) or f"**{self._var_keyword}"
        raise BindingError(
            self._flow,
            wanted,
            f"expected the event's data to be a JSON object, found {_kind(data)}",
        )

    def _bind_fields(self, fields: dict[str, Any], strict: bool) -> dict[str, Any]:
        for name in self._required:
            if name not in fields:
                has = f"missing; the data has {_list_names(fields)}"
                if name == self._might_take_whole and not strict:
                    has += "; only a single parameter of a flow gets all of the data"
                raise BindingError(self._flow, name, has)
        if strict and self._var_keyword is None:
            self._refuse_unknown(fields)
        try:
            arguments = self._convert(fields)
        except BindingError:
            # `order: Order`, and an Order has a field `order`: the data may be the order itself.
            if not self._takes_whole_data or self._single is None or self._single not in fields:
                raise
            try:
                return self._convert({self._single: fields})
            except BindingError:
                pass
            raise
        if self._var_keyword is not None:
            arguments |= {
                name: value
                for name, value in fields.items()
                if name not in self._signature.parameters
            }
        return arguments

    def _convert(self, fields: dict[str, Any]) -> dict[str, Any]:
        try:
            record = self._convert_record(fields)
        except msgspec.ValidationError as error:
            if not str(error).startswith("Expected `raw`"):
                raise self._binding_error(error) from error
            record = self._read_record(fields)
        arguments = {
            name: value
            for name in self._data_parameters
            if (value := getattr(record, name)) is not _UNSET
        }
        for name in self._adapters.keys() & arguments.keys():
            arguments[name] = self._adapt(name, arguments[name])
        return arguments

    def _read_record(self, fields: dict[str, Any]) -> msgspec.Struct:
        """As `_convert_record`, but from JSON text, of which a `msgspec.Raw` is a part."""
        try:
            return _json_reader(self._record)(orjson.dumps(fields))
        except msgspec.ValidationError as error:
            raise self._binding_error(error) from error
        except TypeError as error:  # data that is no JSON
            raise BindingError(self._flow, ", ".join(self._data_parameters), str(error)) from error

    def _adapt(self, name: str, value: Any) -> Any:
        try:
            return self._adapters[name].validate_json(orjson.dumps(value))
        except (ValueError, TypeError) as error:  # pydantic's ValidationError is a ValueError
            raise BindingError(self._flow, name, str(error)) from error

    def _binding_error(self, error: msgspec.ValidationError) -> BindingError:
        text = str(error)
        found = re.search(r"at `\$\.(\w+)", text) or re.search(r"field `(\w+)`", text)
        return BindingError(
            self._flow, found[1] if found else ", ".join(self._data_parameters), text
        )

    def _refuse_unknown(self, fields: Mapping[str, Any]) -> None:
        for name in fields:
            if name not in self._signature.parameters:
                hint = _or_nearest(name, self._signature.parameters)
                raise BindingError(self._flow, name, f"the flow has no such parameter; {hint}")

    def _pack(self, name: str, value: Any) -> bytes:
        """The JSON of one argument. Decodes it again to compare, unless it is certainly plain."""
        try:
            if is_plain(value):
                data = orjson.dumps(value)
                if b"null" not in data or orjson.loads(data) == value:
                    return data
            elif isinstance(value, Event):
                return value.to_json()
            else:
                data = _encode_sorted(value)
                back = (
                    self._convert({name: orjson.loads(data)})[name]
                    if name in self._data_parameters
                    else orjson.loads(data)
                )
                if reads_back(back, value, same_unset=False):
                    return data
        except (TypeError, ValueError, OverflowError, RecursionError, BindingError):
            pass
        found = type_name(value)
        if isinstance(value, datetime):
            found += f" with the fold {value.fold} in the zone {value.tzinfo} (pass it in UTC)"
        raise NotStorable(f"{self._flow}: argument {name!r}", found)

    # --------------------------------------------------------------------------- the signature

    def _msgspec_type(self, name: str, annotation: Any) -> Any:
        """The annotation if msgspec can read it, or `Any` if pydantic reads it afterwards.

        Raises UsageError if neither can.
        """
        try:
            msgspec.json.Decoder(annotation, dec_hook=_read_model)
        except _UNREADABLE as error:
            where = f"flow {self._flow!r}: parameter {name!r}"
            if "pydantic" not in sys.modules:
                raise UsageError(f"{where} has an annotation no event can fill: {error}") from error
            self._adapters[name] = _adapter(annotation, where)
            return Any
        return annotation


class CompleteArguments:
    """Reads arguments of which every required one is present, and each is valid.

    For all others the result is None, and the binder finds out what is wrong. `fields`: the
    parameters, as `msgspec.defstruct` takes them. `whole`: the name of a single parameter that
    takes data without its name as a whole. `is_data_enough`: no parameter is filled otherwise.
    """

    __slots__ = ("_convert", "_decode", "_decode_whole", "_has_defaults", "_whole")

    def __init__(self, fields: Sequence[Any], *, whole: str | None, is_data_enough: bool) -> None:
        record = msgspec.defstruct("Arguments", fields, kw_only=True)
        self._has_defaults: bool = any(len(field) == 3 for field in fields)
        self._convert: Callable[[Any], Any] = _converter(record)
        self._decode: Callable[[bytes], Any] | None = (
            _json_reader(record) if is_data_enough else None
        )
        self._whole: str | None = whole
        self._decode_whole: Callable[[bytes], Any] | None = (
            _json_reader(record.__annotations__[whole]) if whole is not None else None
        )

    def convert(self, fields: Any) -> dict[str, Any] | None:
        """The arguments by name."""
        try:
            arguments = msgspec.structs.asdict(self._convert(fields))
        except msgspec.ValidationError:
            return None
        return _without_unset(arguments) if self._has_defaults else arguments

    def decode(self, fields: Any, data: bytes) -> dict[str, Any] | None:
        """The arguments from `data`, the JSON of `fields`; they share nothing with `fields`."""
        if self._decode is None:
            return None
        try:
            if self._decode_whole is not None:
                whole = cast(str, self._whole)
                if type(fields) is dict and fields and whole not in fields:
                    return {whole: self._decode_whole(data)}
            arguments = msgspec.structs.asdict(self._decode(data))
        except msgspec.ValidationError:
            return None
        return _without_unset(arguments) if self._has_defaults else arguments


def _check_kind(flow_name: str, parameter: inspect.Parameter) -> None:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
        raise UsageError(
            f"flow {flow_name!r}: parameter {parameter} is positional only; expected "
            "parameters with names, "
            "which an event's data can fill"
        )


def _hints(fn: Callable[..., Any], flow_name: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(fn, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise UsageError(
            f"flow {flow_name!r}: cannot resolve its annotations: {error}; import the names at the "
            "module's top, not under "
            "`if TYPE_CHECKING`"
        ) from error


def _is_event(annotation: Any) -> bool:
    members = typing.get_args(annotation)  # may be unhashable
    return annotation is Event or members in ((Event, type(None)), (type(None), Event))


def _is_list(annotation: Any) -> bool:
    origin: Any = typing.get_origin(annotation)
    return annotation is list or (isinstance(origin, type) and issubclass(list, origin))


def _converter(annotation: Any) -> Callable[[Any], Any]:
    return partial(msgspec.convert, type=annotation, str_keys=True, dec_hook=_read_model)


def _without_unset(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not _UNSET}


def _json_reader(annotation: Any) -> Callable[[bytes], Any]:
    """msgspec reads JSON as it converts the value of that JSON (tests/routing/test_binding.py)."""
    return msgspec.json.Decoder(annotation, dec_hook=_read_model).decode


def _takes_object(annotation: Any) -> bool:
    """Whether the annotation (or a member of its union) is a record or a mapping."""
    origin: Any = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _takes_object(typing.get_args(annotation)[0])
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return True
    if isinstance(annotation, type):
        marks = ("__struct_fields__", "__dataclass_fields__", "__total__", "model_fields")
        return issubclass(cast(type[Any], annotation), Mapping) or any(
            hasattr(annotation, mark) for mark in marks
        )
    if isinstance(origin, type) and any(
        hasattr(origin, mark) for mark in ("__struct_fields__", "__dataclass_fields__")
    ):
        return True
    return any(map(_takes_object, typing.get_args(annotation)))


def _adapter(annotation: Any, where: str) -> Any:
    """pydantic's reader for an annotation that msgspec cannot read, such as a union of models."""
    pydantic: Any = sys.modules["pydantic"]
    try:
        return pydantic.TypeAdapter(annotation)
    except Exception as error:
        raise UsageError(f"{where} has an annotation no event can fill: {error}") from error


def _read_event(flow: str, name: str, fields: Mapping[str, Any]) -> Event:
    try:
        return Event.from_dict(fields)
    except ValueError as error:
        raise BindingError(flow, name, str(error)) from error


def _read_model(wanted: type, value: Any) -> Any:
    """msgspec's hook for pydantic models: reads JSON, so a strict model accepts date strings."""
    if hasattr(wanted, "model_validate_json"):
        return cast(Any, wanted).model_validate_json(orjson.dumps(value))
    raise TypeError(f"expected a {wanted.__qualname__}, which no JSON value is")


def _encode_sorted(value: Any) -> bytes:
    """JSON in which the items of sets are sorted: the parameters of a child run, and of a run with
    an idempotency key, are compared in other processes.
    """
    if may_hold_sets(cast(type[Any], type(value))):
        form = msgspec.to_builtins(value, str_keys=True, enc_hook=dump_model)
        return msgspec.json.encode(sort_sets(value, form))
    return msgspec.json.encode(value, enc_hook=dump_model)


def _or_nearest(given: str, known: Iterable[str]) -> str:
    hint = nearest(given, known)
    return f"did you mean {hint}?" if hint else f"it has {', '.join(known) or 'none'}"


def _list_names(fields: Mapping[str, Any]) -> str:
    names = ", ".join(list(fields)[:10])
    return f"{names}, …" if len(fields) > 10 else names or "no fields"


def _kind(data: Any) -> str:
    names: dict[type[Any], str] = {
        bytes: "bytes",
        str: "a string",
        list: "an array",
        bool: "a boolean",
    }
    return names.get(cast(type[Any], type(data)), "a number")
