"""Webhooks: `POST /hooks/PATH` becomes an event, and the 2xx follows the record (P1).

The app mounts `Webhook.routes` and runs `Webhook.listen`, which binds the intake; without one (not started yet, draining) the
answer is 503. A request goes method → encoding → size → body → signature → type → JSON → `accept` → 202; whatever is wrong with
it is a 4xx (requests.py, signatures.py, eventflow/cloudevents.py), never a 500, and never a word of why to an unknown sender.
A body that a real sender signed but nobody can read is kept as a dead letter and answered 400.
"""

import asyncio
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast
from urllib.parse import parse_qsl

import msgspec
import orjson
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from eventflow.clock import SECOND, Clock, SystemClock
from eventflow.cloudevents import BATCH, is_cloudevent, is_json, media_type, parse_cloudevents, read_json
from eventflow.errors import StoreError, StoreFull, UsageError
from eventflow.event import Event, Intake, Receipt, Undecodable
from triggers.requests import Gone, Refused, Reply, encoding, gunzip, read_body, read_headers, send_reply
from triggers.signatures import NOBODY, Vendor, Verify

Headers = Mapping[str, str]

FULL_PATIENCE = 2.0
"""Seconds a request waits for a full ledger before it is told to come back: under Slack's timeout of 3 s."""

MAX_WAITING = 64 * 1024 * 1024
"""Bytes of bodies that may wait for a full ledger at one webhook; beyond them 503 comes at once, and memory stays flat."""

MAX_ID = 1024
"""Characters of an event id."""

MAX_REASON = 500
"""Characters of why a body cannot be read; the reason may quote it."""

ID_HEADERS = ("webhook-id", "ce-id", "x-github-delivery", "idempotency-key")
KEPT_HEADERS = ("content-type", "content-encoding", "user-agent")
"""What a dead letter keeps of the request. An allow-list: headers carry credentials under names nobody foresees."""

NEVER_KEPT = frozenset({"authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key"})

_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,254}")
_SYSTEM_CLOCK = SystemClock()


class Webhook:
    """A trigger for `POST /hooks/PATH`.

    `verify`: a preset (`StandardWebhooks(secret=env("NAME"))`, `GitHub`, `HMAC`, `Bearer`…), or "none", written out. `id`: a
    path into the JSON body (`"order.id"`), or a function of the headers (lower-case names) and the raw body; by default the
    preset's own, else the first of `webhook-id`, `ce-id`, `X-GitHub-Delivery`, `Idempotency-Key`; without any, each POST is an
    event of its own. A known id starts nothing and is answered 200; with another body, 409. `type`: the event's type, by
    default the preset's, such as `com.github.push`, else `webhook.received`; `source`: by default `/hooks/PATH`. CloudEvents
    keep theirs.

    `content`: "json"; "form" (fields as an object); "raw" (any bytes). `max_body` in bytes, also of what `gzip` unpacks to.
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
        keep: Sequence[str] = (),
        success_status: int = 202,
        body_timeout: float = 30.0,
        clock: Clock = _SYSTEM_CLOCK,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        if not _PATH.fullmatch(path):
            raise UsageError(f'Webhook({path!r}): expected a path such as "/orders" of letters, digits and . _ ~ -')
        if content not in ("json", "form", "raw"):
            raise UsageError(f'Webhook({path!r}, content=): expected "json", "form" or "raw", found {content!r}')
        if isinstance(id, str) and content == "raw":
            raise UsageError(f"Webhook({path!r}, id={id!r}): expected a function, since a raw body has no fields")
        self._verify = _verifier(path, verify)
        self._keep = _kept(path, keep, self._verify)
        self.name = name or "webhook" + path.replace("/", "-")
        self.path = "/hooks" + path
        self.verified = self._verify is not NOBODY
        self._source = source or self.path
        self._id, self._type, self._content = id, type, content
        self._max_body, self._gzip, self._body_timeout = max_body, gzip, body_timeout
        self._success_status = success_status
        self._clock, self._entropy = clock, entropy
        self._intake: Intake | None = None
        self._waiting = 0
        self._quiet_until, self._unlogged = 0.0, 0

    def __repr__(self) -> str:
        return f"Webhook({self.path.removeprefix('/hooks')!r}, verify={self._verify!r})"

    @property
    def routes(self) -> list[Route]:
        """What the app mounts, at the root of its paths. All methods come here: the wrong ones are answered here too."""
        return [Route(self.path, self, name=self.name, include_in_schema=False)]

    async def listen(self, intake: Intake) -> None:
        """Takes requests into `intake` until cancelled. What was being recorded then is still answered as it ends."""
        self._intake = intake
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._intake = None

    # ------------------------------------------------------------------------- one request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI way in."""
        try:
            reply = await self._answer(scope, receive)
        except Refused as refused:
            reply = refused.reply
        except Gone:
            return
        await send_reply(reply, receive, send)

    async def _answer(self, scope: Scope, receive: Receive) -> Reply:
        if scope["method"] != "POST":
            raise Refused(405, "method_not_allowed", "expected POST", allow="POST")
        if self._intake is None:
            raise self._unavailable(unread=True)
        headers, repeated = read_headers(scope["headers"])
        body = await self._read(receive, headers, repeated)
        if not _is_acceptable(self._content, headers):
            raise self._refused(Refused(415, "unsupported_type", _EXPECTED[self._content]), "content type")
        try:
            events = self._events(headers, repeated, body)
        except ValueError as error:
            raise await self._dead(headers, repeated, body, str(error)[:MAX_REASON]) from None
        if isinstance(events, Reply):
            return events
        receipts = await self._accept(events, len(body)) if events else []
        return self._receipted(receipts, batch=media_type(headers) == BATCH)

    async def _read(self, receive: Receive, headers: Headers, repeated: set[str]) -> bytes:
        """The verified body. A signature may be over the bytes sent, or over what they unpack to: senders do either."""
        packed = encoding(headers, self._gzip)
        wire = await read_body(receive, headers, self._max_body, self._body_timeout)
        body = gunzip(wire, self._max_body) if packed else wire
        now = self._clock.now() // SECOND
        why = self._verify.reason_to_refuse(headers, repeated, wire, now)
        if why and packed:
            why = self._verify.reason_to_refuse(headers, repeated, body, now)
        if why:
            raise self._refused(Refused(401, "unauthorized", "the request could not be verified"), why)
        return body

    def _events(self, headers: Headers, repeated: set[str], body: bytes) -> list[Event] | Reply:
        """What the body says; ValueError if it cannot be read, a Reply if it is only a handshake."""
        vendor = self._verify.vendor
        if self._content == "json" and vendor.cloudevents and is_cloudevent(headers):
            return self._cloudevents(headers, repeated, body)
        data = _parsed(self._content, headers, body)
        if vendor.challenge and _field(data, "type") == "url_verification":
            return Reply(200, str(_field(data, "challenge")).encode(), media=b"text/plain; charset=utf-8")
        event = Event(
            id=self._event_id(headers, repeated, data, body),
            source=self._source,
            type=self._type or _vendor_type(vendor, headers, data) or "webhook.received",
            data=data,
            datacontenttype=headers.get("content-type") or ("application/json" if self._content == "json" else None),
            extensions={name: headers[header] for header, name in self._keep if header in headers},
        )
        return [event]

    def _cloudevents(self, headers: Headers, repeated: set[str], body: bytes) -> list[Event]:
        """CloudEvents as sent. In binary mode the id is an unsigned header, so that a signed one goes before it."""
        if twice := next((name for name in repeated if name.startswith("ce-") or name == "content-type"), None):
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

    def _fresh_id(self) -> str:
        return self._entropy(16).hex()

    # ------------------------------------------------------------------------- into the ledger

    async def _accept(self, items: Sequence[Event | Undecodable], weight: int) -> list[Receipt]:
        """Durable when it returns. Waits for a full ledger, a little; Refused (503, 507) when it stays full or has failed."""
        try:
            return await self._offer(items)
        except StoreFull as full:
            if self._waiting + weight > MAX_WAITING:
                raise _full(full) from None
        self._waiting += weight
        try:
            return await self._offer_again(items)
        finally:
            self._waiting -= weight

    async def _offer(self, items: Sequence[Event | Undecodable]) -> list[Receipt]:
        if self._intake is None:
            raise self._unavailable()
        try:
            return await self._intake.accept(*items)
        except StoreFull:
            raise
        except StoreError:  # unknown, not refused: the sender tries again, and its id tells whether it was recorded
            raise self._unavailable() from None

    async def _offer_again(self, items: Sequence[Event | Undecodable]) -> list[Receipt]:
        deadline = self._clock.monotonic() + FULL_PATIENCE
        pause = 0.05
        while True:
            await asyncio.sleep(min(pause, max(0.0, deadline - self._clock.monotonic())))
            try:
                return await self._offer(items)
            except StoreFull as full:
                if self._clock.monotonic() >= deadline:
                    raise _full(full) from None
            pause *= 1.5

    async def _dead(self, headers: Headers, repeated: set[str], body: bytes, error: str) -> Refused:
        """Keeps what a real sender sent and nobody can read; the answer for it."""
        try:
            ident = self._sender_id(headers, repeated, None) or self._fresh_id()
        except ValueError:
            ident = self._fresh_id()
        kept = {name: headers[name] for name in KEPT_HEADERS if name in headers}
        item = Undecodable(id=ident[:MAX_ID], source=self._source, body=body, error=error, headers=kept)
        await self._accept([item], len(body))
        return self._refused(Refused(400, "unreadable", error), error)

    # ------------------------------------------------------------------------- out again

    def _receipted(self, receipts: Sequence[Receipt], *, batch: bool) -> Reply:
        if any(receipt.conflict for receipt in receipts):
            return self._conflict([receipt for receipt in receipts if receipt.conflict])
        rows = [{"id": one.shown, "event_id": one.event_id, "duplicate": one.duplicate} for one in receipts]
        known = all(receipt.duplicate for receipt in receipts)
        return Reply(200 if known else self._success_status, orjson.dumps(rows if batch else rows[0]))

    def _conflict(self, receipts: Sequence[Receipt]) -> Reply:
        """The first stands. A person must look: either an id is used twice, or a sender changes what it sends again."""
        for receipt in receipts:
            first, this = receipt.digests or (None, None)
            known = {"event_id": receipt.event_id, "first_digest": first, "this_digest": this}
            self._log("webhook.refused", reason="known id with other content", status=409, **known)
        ids = ", ".join(receipt.event_id for receipt in receipts[:3])
        return Refused(409, "conflict", f"{ids}: already received with other content; the first one stands").reply

    def _unavailable(self, *, unread: bool = False) -> Refused:
        seconds = 1 + self._entropy(1)[0] % 5  # spread, so that waiting senders do not all come back at once
        detail = "not taking events now; come back later"
        return Refused(503, "unavailable", detail, hang_up=True, unread=unread, retry_after=str(seconds))

    def _refused(self, refused: Refused, reason: str) -> Refused:
        """Says why in the log, at most once a second: whoever floods us with forgeries must not fill the disk."""
        now = self._clock.monotonic()
        self._unlogged += 1
        if now >= self._quiet_until:
            self._log("webhook.refused", reason=reason, status=refused.reply.status, count=self._unlogged)
            self._quiet_until, self._unlogged = now + 1.0, 0
        return refused

    def _log(self, event: str, **fields: Any) -> None:
        if self._intake is not None:
            self._intake.log.warning(event, path=self.path, **fields)


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
            fields = parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=1000)
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


def _full(full: StoreFull) -> Refused:
    status, error = (507, "disk_full") if full.disk else (503, "overloaded")
    return Refused(status, error, "the ledger is full; come back later", retry_after=str(max(1, math.ceil(full.retry_after))))


def _verifier(path: str, verify: Verify | Literal["none"]) -> Verify:
    if isinstance(verify, Verify):
        return verify
    if verify == "none":
        return NOBODY
    raise UsageError(f'Webhook({path!r}, verify=): expected a preset such as GitHub(secret=env("NAME")), or "none" written out')


def _kept(path: str, keep: Sequence[str], verify: Verify) -> tuple[tuple[str, str], ...]:
    """(header, extension) pairs. What proves who the sender is never becomes part of an event."""
    pairs = tuple((header.lower(), re.sub(r"[^a-z0-9]", "", header.lower())) for header in keep)
    for header, name in pairs:
        if header in NEVER_KEPT or header in verify.signed_headers or not name:
            raise UsageError(f"Webhook({path!r}, keep=): expected headers without credentials, found {header!r}")
    return pairs
