"""`Webhook`: `POST /hooks/PATH` becomes an event; the 2xx follows the record (P1).

`http_endpoint.py` reads and verifies the request and sends the response. Here the body becomes
events: content type → JSON or CloudEvents (eventflow/events/cloudevents.py) → id → `accept` → 202.
A verified body that is refused becomes a dead letter: one that cannot be read (400), one of another
type (415), and, recorded by the ledger itself, one with a known id and other content (409).
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast
from urllib.parse import parse_qsl

import msgspec
import orjson

from eventflow.core.clock import Clock
from eventflow.core.declarations import declaration
from eventflow.core.errors import ANY_FAILURE, UsageError
from eventflow.events.cloudevents import (
    BATCH,
    charset,
    is_cloudevent,
    is_json,
    media_type,
    parse_cloudevents,
    read_http_json,
)
from eventflow.events.event import Event, Receipt
from eventflow.events.strict_json import MAX_JSON_KEYS, codec_of, decode_text, in_utf8
from triggers.http_endpoint import (
    SYSTEM_CLOCK,
    Endpoint,
    Headers,
    RequestLimits,
    body_id,
    unreadable,
)
from triggers.http_request import Reply, RequestRejected
from triggers.signatures import Vendor, Verify

MAX_ID_LENGTH = 1024
"""Characters of an event id."""

_CLOUDEVENT_ID = ("ce-source", "ce-id")  # an id is unique within its source only
ID_HEADERS = (
    ("webhook-id",),
    _CLOUDEVENT_ID,
    ("ce-id",),
    ("x-github-delivery",),
    ("idempotency-key",),
    ("x-amz-sns-message-id",),
)
CREDENTIAL_HEADERS = frozenset(
    {"authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key"}
)

_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,254}")


class Webhook(Endpoint):
    """A trigger for `POST /hooks/PATH`.

    Args:
        path: below `/hooks`, such as "/orders".
        verify: a preset (`StandardWebhooks(secret=env("NAME"))`, `GitHub`, `HMAC`, `Bearer` …), or
            "none", written out.
        name: the name in the ledger; by default made from the path.
        id: a path into the JSON body (`"order.id"`), or a function of the headers (lower-case
            names) and the raw body; by default the preset's own, else the first of `webhook-id`,
            `ce-id`, `X-GitHub-Delivery`, `Idempotency-Key`; without any, each POST is a new event.
            A known id starts nothing and is answered 200; with another body, 409.
        type: the event's type; by default the preset's, such as `com.github.push`, else
            `webhook.received`. CloudEvents keep their own type and source.
        source: the event's source, by default `/hooks/PATH`.
        content: "json" (also where a sender calls it text/plain, as SNS does); "form" (fields as an
            object, a repeated field as a list); "raw" (any bytes).
        max_body: in bytes, before and after unpacking.
        max_keys: keys of one JSON object, or fields of a form.
        gzip: whether bodies may be gzipped.
        max_rate: requests per second from one address, in bursts of up to five seconds' worth; more
            are answered 429. None: no limit.
        keep: headers that become extensions, without their dashes. Choose headers that are the same
            in a repeated request; others make it look like a conflict.
        success_status: of the response to a new event.
        body_timeout: seconds that a body may take to arrive.
    """

    @declaration
    def __init__(
        self,
        path: str,
        *,
        verify: Verify | Literal["none"],
        name: str | None = None,
        id: str | Callable[[Headers, bytes], str | None] | None = None,
        type: str | None = None,
        source: str | None = None,
        content: Literal["json", "form", "raw"] = "json",
        max_body: int = 1 << 20,
        max_keys: int = MAX_JSON_KEYS,
        gzip: bool = False,
        max_rate: float | None = 1000.0,
        keep: Sequence[str] = (),
        success_status: int = 202,
        body_timeout: float = 30.0,
        clock: Clock = SYSTEM_CLOCK,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        if content not in ("json", "form", "raw"):
            raise UsageError(
                f'Webhook({path!r}, content=): expected "json", "form" or "raw", found {content!r}'
            )
        if isinstance(id, str) and content == "raw":
            raise UsageError(
                f"Webhook({path!r}, id={id!r}): expected a function, since a raw body has no fields"
            )
        super().__init__(
            path,
            verify=verify,
            name=name or "webhook" + path.replace("/", "-"),
            limits=RequestLimits(max_body, gzip, max_rate, body_timeout, max_keys),
            clock=clock,
            random_bytes=random_bytes,
        )
        self._keep: tuple[tuple[str, str], ...] = _kept_headers(path, keep, self._verify)
        self._source = source or self.path
        self._id: str | Callable[[Headers, bytes], str | None] | None = id
        self._type: str | None = type
        self._content: Literal["json", "form", "raw"] = content
        self._success_status: int = success_status

    async def _handle(self, headers: Headers, repeated: set[str], body: bytes) -> Reply:
        media = media_type(headers)
        if not _is_acceptable(self._content, media, headers):
            raise await self._dead_letter(
                headers,
                repeated,
                body,
                RequestRejected(415, "unsupported_type", _EXPECTED[self._content]),
            )
        try:
            events = self._events(headers, media, repeated, body)
        except ValueError as error:
            raise await self._dead_letter(headers, repeated, body, unreadable(error)) from None
        if isinstance(events, Reply):
            return events
        receipts = await self._accept(events) if events else []
        return self._reply_to(receipts, batch=media == BATCH)

    def _events(
        self, headers: Headers, media: str, repeated: set[str], body: bytes
    ) -> list[Event] | Reply:
        """The events of a body, or the reply to a handshake. ValueError if it cannot be read."""
        vendor = self._verify.vendor
        if self._content == "json" and vendor.cloudevents and is_cloudevent(headers, media):
            return self._cloudevents(headers, repeated, body)
        data = _parse_body(self._content, headers, body, self._limits.max_keys)
        for name in vendor.delivery_fields:
            if isinstance(data, dict):
                cast(dict[str, Any], data).pop(name, None)
        if vendor.challenge and _field_at(data, "type") == "url_verification":
            challenge = str(_field_at(data, "challenge")).encode()
            return Reply(200, challenge, media_type=b"text/plain; charset=utf-8")
        event = Event(
            id=self._event_id(headers, repeated, data, body),
            source=self._source,
            type=self._type or _vendor_type(vendor, headers, data) or "webhook.received",
            data=data,
            datacontenttype=self._datacontenttype(headers, media),
            extensions={name: headers[header] for header, name in self._keep if header in headers},
        )
        return [event]

    def _datacontenttype(self, headers: Headers, media: str) -> str | None:
        """The sender's content type, unless it calls JSON something else."""
        given = headers.get("content-type")
        if self._content == "json" and not (given and is_json(media)):
            return "application/json"
        return given

    def _cloudevents(self, headers: Headers, repeated: set[str], body: bytes) -> list[Event]:
        """CloudEvents as sent; in binary mode a signed id replaces theirs, an unsigned header."""
        if twice := next(
            (name for name in repeated if name.startswith("ce-") or name == "content-type"), None
        ):
            raise ValueError(f"{twice}: expected once, found it twice")
        events = parse_cloudevents(headers, body, max_keys=self._limits.max_keys)
        signed = self._verify.signed_id(headers)
        if signed and "ce-specversion" in headers and len(events) == 1:
            return [msgspec.structs.replace(events[0], id=signed)]
        return events

    # ------------------------------------------------------------------------- ids

    def _event_id(self, headers: Headers, repeated: set[str], data: Any, body: bytes) -> str:
        configured = self._configured_id(headers, data, body) if self._id is not None else None
        ident = configured or self._sender_id(headers, repeated, data, body) or self._new_id()
        if len(ident) > MAX_ID_LENGTH:
            raise ValueError(f"id: expected at most {MAX_ID_LENGTH} characters, found {len(ident)}")
        return ident

    def _configured_id(self, headers: Headers, data: Any, body: bytes) -> str | None:
        """The id by the app's `id=`."""
        if isinstance(self._id, str):
            return _id_text(_field_at(data, self._id))
        assert self._id is not None
        try:
            found: object = self._id(headers, body)
            ident = _id_text(found)
            if ident is None and found not in (None, ""):
                raise TypeError(f"id= returned {type(found).__name__}, expected a str or None")
            (ident or "").encode()  # a lone surrogate cannot be stored
            return ident
        except ANY_FAILURE as error:  # around the user's function: the event is unreadable
            raise ValueError(f"id: {error.__class__.__name__}: {error}") from error

    def _sender_id(
        self, headers: Headers, repeated: set[str], data: Any, body: bytes
    ) -> str | None:
        vendor = self._verify.vendor
        if signed := self._verify.signed_id(headers):
            return signed
        own = None
        if vendor.id_headers:
            own = _first_id(vendor.id_headers, headers, repeated, body)
        if own is None and vendor.id_field:
            own = _id_text(_field_at(data, vendor.id_field))
        return own or _first_id(ID_HEADERS, headers, repeated, body)

    def _dead_letter_id(self, headers: Headers, repeated: set[str], body: bytes) -> str:
        """The id of a refused body: the sender's, if there is one."""
        try:
            return (self._sender_id(headers, repeated, None, body) or body_id(body))[:MAX_ID_LENGTH]
        except ValueError:
            return body_id(body)

    # ------------------------------------------------------------------------- responses

    def _reply_to(self, receipts: Sequence[Receipt], *, batch: bool) -> Reply:
        conflicts: list[Receipt] = []
        rows: list[dict[str, Any]] = []
        status = 200  # nothing is new
        for one in receipts:
            if one.conflict:
                conflicts.append(one)
            if not one.duplicate:
                status = self._success_status
            rows.append({"id": one.id_text, "event_id": one.event_id, "duplicate": one.duplicate})
        if conflicts:
            return self._conflict(conflicts)
        return Reply(status, orjson.dumps(rows if batch else rows[0]))

    def _conflict(self, receipts: Sequence[Receipt]) -> Reply:
        """The first event stands, and the ledger keeps this one as a dead letter. Either an id was
        used twice, or a sender changed a repetition.
        """
        for receipt in receipts:
            first, this = receipt.digests or (None, None)
            known = {"event_id": receipt.event_id, "first_digest": first, "this_digest": this}
            self._log("webhook.refused", reason="known id with other content", status=409, **known)
        ids = ", ".join(receipt.event_id for receipt in receipts[:3])
        return RequestRejected(
            409,
            "conflict",
            f"{ids}: already received with other content; the first event stays, this one is "
            "a dead letter",
        ).reply


# ----------------------------------------------------------------------------- parsing

_EXPECTED = {
    "json": "expected Content-Type application/json",
    "form": "expected Content-Type application/x-www-form-urlencoded",
    "raw": "",
}


def _is_acceptable(content: str, media: str, headers: Headers) -> bool:
    """Whether the media type matches the option `content`."""
    match content:
        case "json":
            return is_json(media) or media == "text/plain" or "ce-specversion" in headers
        case "form":
            return media in ("application/x-www-form-urlencoded", "")
        case _:
            return True


def _parse_body(content: str, headers: Headers, body: bytes, max_keys: int) -> Any:
    match content:
        case "json":
            return read_http_json(headers, body, max_keys)
        case "form":
            named = charset(headers)
            return _form_fields(decode_text(in_utf8(body, named)), named, max_keys)
        case _:
            return body


def _form_fields(text: str, charset: str, max_fields: int) -> dict[str, str | list[str]]:
    """The fields of a form by name; a repeated one as the list of its values, in order. `charset`:
    of percent-encoded bytes that are not UTF-8.
    """
    if text.count("&") >= max_fields:
        raise ValueError(f"body: expected at most {max_fields} form fields, found more")
    values: dict[str, list[str]] = {}
    for name, value in _form_pairs(text, charset):
        values.setdefault(name if values else name.removeprefix("\ufeff"), []).append(value)
    return {name: found[0] if len(found) == 1 else found for name, found in values.items()}


def _form_pairs(text: str, charset: str) -> list[tuple[str, str]]:
    try:
        return parse_qsl(text, keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        if not charset:
            raise
        codec = codec_of(charset)
        return parse_qsl(text, keep_blank_values=True, encoding=codec, errors="strict")


def _field_at(data: Any, path: str) -> Any:
    """The value at `a.b.c` in nested objects, else None."""
    for name in path.split("."):
        if not isinstance(data, dict):
            return None
        data = cast(dict[str, Any], data).get(name)
    return data


def _id_text(value: object) -> str | None:
    """An id from text or a number, as Python writes it; None from anything else."""
    if isinstance(value, str):
        return value or None
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _first_id(
    ids: Sequence[Sequence[str]], headers: Headers, repeated: set[str], body: bytes
) -> str | None:
    """The first id whose headers are all present; `Vendor` documents the form."""
    for names in ids:
        parts: list[str] = []
        for name in names:
            part = body_id(body) if name == "body" else headers.get(name)
            if not part:
                break
            parts.append(part)
        else:
            if repeated and (twice := next((name for name in names if name in repeated), None)):
                raise ValueError(f"{twice}: expected once, found it twice")
            if names == _CLOUDEVENT_ID:  # "/a" and "b/c" are not "/a/b" and "c"
                parts[1] = parts[1].replace("%", "%25").replace("/", "%2F")
            return "/".join(parts)
    return None


def _vendor_type(vendor: Vendor, headers: Headers, data: Any) -> str | None:
    """The vendor's own event type, if it is a valid one."""
    if not vendor.type_header and not vendor.type_fields:
        return None
    name = headers.get(vendor.type_header) if vendor.type_header else None
    for path in vendor.type_fields:
        parts = [_id_text(_field_at(data, part)) for part in path.split("+")]
        if name is None and all(parts):
            name = ".".join(part for part in parts if part)
    name = (name or "").replace("/", ".")
    return vendor.type_prefix + name if _TYPE.fullmatch(name) else None


def _kept_headers(path: str, keep: Sequence[str], verify: Verify) -> tuple[tuple[str, str], ...]:
    """(header, extension) pairs. A credential never becomes part of an event."""
    pairs = tuple((header.lower(), re.sub(r"[^a-z0-9]", "", header.lower())) for header in keep)
    for header, name in pairs:
        if header in CREDENTIAL_HEADERS or header in verify.signed_headers or not name:
            raise UsageError(
                f"Webhook({path!r}, keep=): expected headers without credentials, found {header!r}"
            )
    return pairs
