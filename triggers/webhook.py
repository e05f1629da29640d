"""Webhooks: `POST /hooks/PATH` becomes an event, and the 2xx follows the record (P1).

`endpoint.py` has the request's way in, up to the verified body, and the way out. Here the body becomes events: type → JSON or
CloudEvents (eventflow/events/cloudevents.py) → id → `accept` → 202. A body that a real sender signed but nobody can read is kept as a
dead letter and answered 400.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast
from urllib.parse import parse_qsl

import msgspec
import orjson

from eventflow.core.clock import Clock
from eventflow.core.errors import UsageError
from eventflow.events.cloudevents import (
    BATCH,
    is_cloudevent,
    is_json,
    media_type,
    parse_cloudevents,
    read_json,
)
from eventflow.events.event import Event, Receipt
from triggers.http_endpoint import SYSTEM_CLOCK, Endpoint, Headers
from triggers.http_request import Refused, Reply
from triggers.signatures import Vendor, Verify

MAX_ID = 1024
"""Characters of an event id."""

MAX_REASON = 500
"""Characters of why a body cannot be read; the reason may quote it."""

ID_HEADERS = ("webhook-id", "ce-id", "x-github-delivery", "idempotency-key")
NEVER_KEPT = frozenset(
    {"authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key"}
)

_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,254}")


class Webhook(Endpoint):
    """A trigger for `POST /hooks/PATH`.

    `verify`: a preset (`StandardWebhooks(secret=env("NAME"))`, `GitHub`, `HMAC`, `Bearer`…), or "none", written out. `id`: a
    path into the JSON body (`"order.id"`), or a function of the headers (lower-case names) and the raw body; by default the
    preset's own, else the first of `webhook-id`, `ce-id`, `X-GitHub-Delivery`, `Idempotency-Key`; without any, each POST is an
    event of its own. A known id starts nothing and is answered 200; with another body, 409. `type`: the event's type, by
    default the preset's, such as `com.github.push`, else `webhook.received`; `source`: by default `/hooks/PATH`. CloudEvents
    keep theirs.

    `content`: "json"; "form" (fields as an object); "raw" (any bytes). `max_body` in bytes, also of what `gzip` unpacks to.
    `max_rate`: requests per second from one address, five seconds' worth at once; more are answered 429; None for any number.
    `keep`: headers that become extensions, dashes dropped; only such as are the same on a retry, or it looks like a conflict.
    Durations in seconds. `name` is by default made from the path, and what the ledger knows this webhook by.
    """

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
        gzip: bool = False,
        max_rate: float | None = 1000.0,
        keep: Sequence[str] = (),
        success_status: int = 202,
        body_timeout: float = 30.0,
        clock: Clock = SYSTEM_CLOCK,
        entropy: Callable[[int], bytes] = os.urandom,
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
            path, verify=verify, name=name or "webhook" + path.replace("/", "-"), max_body=max_body, gzip=gzip,
            max_rate=max_rate, body_timeout=body_timeout, clock=clock, entropy=entropy,
        )  # fmt: skip
        self._keep = _kept(path, keep, self._verify)
        self._source = source or self.path
        self._id, self._type, self._content = id, type, content
        self._success_status = success_status

    async def _take(self, headers: Headers, repeated: set[str], body: bytes) -> Reply:
        if not _is_acceptable(self._content, headers):
            raise self._refused(
                Refused(415, "unsupported_type", _EXPECTED[self._content]), "content type"
            )
        try:
            events = self._events(headers, repeated, body)
        except ValueError as error:
            ident = self._dead_id(headers, repeated)
            raise await self._dead(
                ident, self._source, headers, body, str(error)[:MAX_REASON]
            ) from None
        if isinstance(events, Reply):
            return events
        receipts = await self._accept(events, len(body)) if events else []
        return self._receipted(receipts, batch=media_type(headers) == BATCH)

    def _events(self, headers: Headers, repeated: set[str], body: bytes) -> list[Event] | Reply:
        """What the body says; ValueError if it cannot be read, a Reply if it is only a handshake."""
        vendor = self._verify.vendor
        if self._content == "json" and vendor.cloudevents and is_cloudevent(headers):
            return self._cloudevents(headers, repeated, body)
        data = _parsed(self._content, headers, body)
        if vendor.challenge and _field(data, "type") == "url_verification":
            return Reply(
                200, str(_field(data, "challenge")).encode(), media=b"text/plain; charset=utf-8"
            )
        event = Event(
            id=self._event_id(headers, repeated, data, body),
            source=self._source,
            type=self._type or _vendor_type(vendor, headers, data) or "webhook.received",
            data=data,
            datacontenttype=headers.get("content-type")
            or ("application/json" if self._content == "json" else None),
            extensions={name: headers[header] for header, name in self._keep if header in headers},
        )
        return [event]

    def _cloudevents(self, headers: Headers, repeated: set[str], body: bytes) -> list[Event]:
        """CloudEvents as sent. In binary mode the id is an unsigned header, so that a signed one goes before it."""
        if twice := next(
            (name for name in repeated if name.startswith("ce-") or name == "content-type"), None
        ):
            raise ValueError(f"{twice}: expected once, found it twice")
        events = parse_cloudevents(headers, body)
        signed = self._verify.signed_id(headers)
        if signed and "ce-specversion" in headers and len(events) == 1:
            return [msgspec.structs.replace(events[0], id=signed)]
        return events

    # ------------------------------------------------------------------------- its id

    def _event_id(self, headers: Headers, repeated: set[str], data: Any, body: bytes) -> str:
        given = self._own_id(headers, data, body) if self._id is not None else None
        ident = given or self._sender_id(headers, repeated, data) or self._fresh_id()
        if len(ident) > MAX_ID:
            raise ValueError(f"id: expected at most {MAX_ID} characters, found {len(ident)}")
        return ident

    def _own_id(self, headers: Headers, data: Any, body: bytes) -> str | None:
        """What the app's `id=` says. Its exceptions make the event unreadable, not the server fail."""
        if isinstance(self._id, str):
            return _plain(_field(data, self._id))
        assert self._id is not None
        try:
            ident = _plain(self._id(headers, body))
            (ident or "").encode()  # a lone surrogate cannot be stored
            return ident
        except Exception as error:
            raise ValueError(f"id: {error.__class__.__name__}: {error}") from error

    def _sender_id(self, headers: Headers, repeated: set[str], data: Any) -> str | None:
        vendor = self._verify.vendor
        if signed := self._verify.signed_id(headers):
            return signed
        own = _first(vendor.id_headers, headers, repeated)
        if own is None and vendor.id_field:
            own = _plain(_field(data, vendor.id_field))
        return own or _first(ID_HEADERS, headers, repeated)

    def _dead_id(self, headers: Headers, repeated: set[str]) -> str:
        """An id for what cannot be read: the sender's, if it gave one."""
        try:
            return (self._sender_id(headers, repeated, None) or self._fresh_id())[:MAX_ID]
        except ValueError:
            return self._fresh_id()

    # ------------------------------------------------------------------------- out again

    def _receipted(self, receipts: Sequence[Receipt], *, batch: bool) -> Reply:
        if any(receipt.conflict for receipt in receipts):
            return self._conflict([receipt for receipt in receipts if receipt.conflict])
        rows = [
            {"id": one.shown, "event_id": one.event_id, "duplicate": one.duplicate}
            for one in receipts
        ]
        known = all(receipt.duplicate for receipt in receipts)
        return Reply(
            200 if known else self._success_status, orjson.dumps(rows if batch else rows[0])
        )

    def _conflict(self, receipts: Sequence[Receipt]) -> Reply:
        """The first stands. A person must look: either an id is used twice, or a sender changes what it sends again."""
        for receipt in receipts:
            first, this = receipt.digests or (None, None)
            known = {"event_id": receipt.event_id, "first_digest": first, "this_digest": this}
            self._log("webhook.refused", reason="known id with other content", status=409, **known)
        ids = ", ".join(receipt.event_id for receipt in receipts[:3])
        return Refused(
            409, "conflict", f"{ids}: already received with other content; the first one stands"
        ).reply


# ----------------------------------------------------------------------------- pure questions

_EXPECTED = {
    "json": "expected Content-Type application/json",
    "form": "expected Content-Type application/x-www-form-urlencoded",
    "raw": "",
}


def _is_acceptable(content: str, headers: Headers) -> bool:
    """Whether the media type is one that `content` can be read from."""
    match content:
        case "json":
            return is_json(media_type(headers)) or "ce-specversion" in headers
        case "form":
            return media_type(headers) in ("application/x-www-form-urlencoded", "")
        case _:
            return True


def _parsed(content: str, headers: Headers, body: bytes) -> Any:
    match content:
        case "json":
            return read_json(body)
        case "form":
            fields = parse_qsl(
                body.decode(), keep_blank_values=True, errors="strict", max_num_fields=1000
            )
            if len(fields) != len({name for name, _ in fields}):
                raise ValueError("body: expected each form field once")
            return dict(fields)
        case _:
            return body


def _field(data: Any, path: str) -> Any:
    """What stands at `a.b.c` in nested objects; None when nothing does."""
    for name in path.split("."):
        if not isinstance(data, dict):
            return None
        data = cast(dict[str, Any], data).get(name)
    return data


def _plain(value: object) -> str | None:
    """An id from text or a whole number; None from anything else."""
    if isinstance(value, str):
        return value or None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _first(names: Sequence[str], headers: Headers, repeated: set[str]) -> str | None:
    for name in names:
        if value := headers.get(name):
            if name in repeated:
                raise ValueError(f"{name}: expected once, found it twice")
            return value
    return None


def _vendor_type(vendor: Vendor, headers: Headers, data: Any) -> str | None:
    """The vendor's own word for the event, if it is fit to be a type."""
    word = headers.get(vendor.type_header) if vendor.type_header else None
    for path in vendor.type_fields:
        parts = [_plain(_field(data, part)) for part in path.split("+")]
        if word is None and all(parts):
            word = ".".join(part for part in parts if part)
    word = (word or "").replace("/", ".")
    return vendor.type_prefix + word if _TYPE.fullmatch(word) else None


def _kept(path: str, keep: Sequence[str], verify: Verify) -> tuple[tuple[str, str], ...]:
    """(header, extension) pairs. What proves who the sender is never becomes part of an event."""
    pairs = tuple((header.lower(), re.sub(r"[^a-z0-9]", "", header.lower())) for header in keep)
    for header, name in pairs:
        if header in NEVER_KEPT or header in verify.signed_headers or not name:
            raise UsageError(
                f"Webhook({path!r}, keep=): expected headers without credentials, found {header!r}"
            )
    return pairs
