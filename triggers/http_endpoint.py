"""The base of the triggers that serve `POST /hooks/PATH`: request, verification, ledger, response.

`webhook.py` and `drift.py` build on it and implement `_handle`, which makes events of a verified
body. The app mounts `routes` and runs `listen`, which binds the intake; without one (not started,
draining) the response is 503. A request passes method → rate limit → size → body → signature →
encoding → `_handle` → `_accept` → 2xx. An invalid request is answered 4xx, never 500, and an
unknown sender never learns the reason. What a verified sender sent and is refused becomes a dead
letter (`_dead_letter`): a wrong guess about a sender never costs the data. A request over the rate
limit (rate_limit.py) is answered before its body is read. The 2xx follows the record (P1).
"""

import asyncio
import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from eventflow.core.clock import SECOND, Clock, SystemClock
from eventflow.core.declarations import duration, whole_number
from eventflow.core.errors import StoreError, StoreFull, UsageError
from eventflow.core.http_body import ClientDisconnected
from eventflow.events.event import Event, Gauge, Intake, Receipt, Undecodable
from eventflow.logs.repeated import RepeatedLines
from triggers.http_request import (
    Reply,
    RequestRejected,
    encoding,
    gunzip,
    read_body,
    read_headers,
    send_reply,
    unsupported_encoding,
)
from triggers.rate_limit import MAX_ADDRESS_LENGTH, RateLimiter
from triggers.signatures import NO_VERIFICATION, Verify

LOG_EVENTS = {
    "webhook.refused": (
        "A request to a webhook was refused: signature, size, type, timestamp or rate; see "
        "`reason`."
    ),
}

Headers = Mapping[str, str]

FULL_WAIT_SECONDS = 2.0
"""While the ledger is full, a request waits this long for its 503; Slack's timeout is 3 s."""

DEAD_LETTER_HEADERS = ("content-type", "content-encoding", "user-agent")
"""The headers stored with a dead letter. An allow-list: others may carry credentials."""

MAX_REASON_LENGTH = 500
"""Characters of the reason why a body cannot be read."""

_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")
SYSTEM_CLOCK = SystemClock()


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of one endpoint.

    `max_body` in bytes, before and after unpacking; `gzip`: whether bodies may be packed;
    `max_rate` in requests per second from one address; `body_timeout` in seconds; `max_keys` of one
    JSON object.
    """

    max_body: int
    gzip: bool
    max_rate: float | None
    body_timeout: float
    max_keys: int


class Endpoint:
    """A trigger for `POST /hooks/PATH`; its subclasses implement `_handle`."""

    def __init__(
        self,
        path: str,
        *,
        verify: Verify | Literal["none"],
        name: str,
        limits: RequestLimits,
        clock: Clock = SYSTEM_CLOCK,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        kind = type(self).__name__
        if not _PATH.fullmatch(path):
            raise UsageError(
                f'{kind}({path!r}): expected a path such as "/orders" '
                "of letters, digits and . _ ~ -"
            )
        if path.startswith("/hooks/"):
            raise UsageError(
                f"{kind}({path!r}): every path is below /hooks; "
                f"write {path.removeprefix('/hooks')!r}"
            )
        where = f"{kind}({path!r}"
        max_rate: Any = limits.max_rate
        is_number = isinstance(max_rate, int | float)
        if max_rate is not None and not (is_number and 0 < max_rate < float("inf")):
            raise UsageError(
                f"{where}, max_rate=): expected requests per second, or None, found {max_rate!r}"
            )
        whole_number(limits.max_body, f"{where}, max_body=)")
        whole_number(limits.max_keys, f"{where}, max_keys=)")
        duration(limits.body_timeout, f"{where}, body_timeout=)", positive=True)
        self.name: str = name
        self.path: str = "/hooks" + path
        self._source: str = self.path
        self._verify: Verify = _verifier(f"{kind}({path!r}", verify)
        self.verified: bool = self._verify is not NO_VERIFICATION
        self._limits: RequestLimits = limits
        self._rate_limiter = None if max_rate is None else RateLimiter(max_rate)
        self._clock: Clock = clock
        self._random_bytes: Callable[[int], bytes] = random_bytes
        self._intake: Intake | None = None  # while it listens
        self._rejections = RepeatedLines(self._write_rejection)

    def check_secrets(self) -> None:
        """Raises EmptySecret; the app calls it before it listens."""
        self._verify.check_secrets()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.path.removeprefix('/hooks')!r}, verify={self._verify!r})"
        )

    async def _handle(self, headers: Headers, repeated: set[str], body: bytes) -> Reply:
        """Records what a verified body holds. Raises RequestRejected if it is not acceptable."""
        raise NotImplementedError

    @property
    def routes(self) -> list[Route]:
        """What the app mounts at its root. For all methods: others than POST are answered here."""
        return [Route(self.path, self, name=self.name, include_in_schema=False)]

    async def listen(self, intake: Intake) -> None:
        """Accepts requests until cancelled. Requests that are being recorded then are answered."""
        self._intake = intake
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._intake = None

    # ------------------------------------------------------------------------- health

    @property
    def condition(self) -> str | None:
        """Always None: the trigger does not depend on a source that could fail."""
        return None

    def gauges(self) -> Sequence[Gauge]:
        """The number of requests rejected by the rate limit since the start."""
        if self._rate_limiter is None:
            return []
        return [Gauge("requests_throttled", self._rate_limiter.rejected)]

    # ------------------------------------------------------------------------- one request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        try:
            reply = await self._respond(scope, receive)
        except RequestRejected as rejected:
            reply = rejected.reply
            if not rejected.is_logged and reply.status < 500:  # a full ledger has its own line
                self._log_rejection(rejected, rejected.args[2])
        except ClientDisconnected:
            return
        await send_reply(reply, receive, send)

    async def _respond(self, scope: Scope, receive: Receive) -> Reply:
        if scope["method"] != "POST":
            raise RequestRejected(405, "method_not_allowed", "expected POST", allow="POST")
        self._enforce_rate_limit(scope)
        if self._intake is None:
            raise self._unavailable(body_unread=True)
        headers, repeated = read_headers(scope["headers"])
        body = await self._read_body(scope, receive, headers, repeated)
        if "content-encoding" in headers:  # the body is unpacked, also in a dead letter
            del headers["content-encoding"]
        return await self._handle(headers, repeated, body)

    def _enforce_rate_limit(self, scope: Scope) -> None:
        """Rejects (429) when the client's address sends too fast. Behind a proxy, the address is
        the one that the proxy names.

        The connection stays open: the rest of the body is dropped as it arrives, which costs less
        than a new connection.
        """
        client: tuple[str, int] | None = scope.get("client")
        if self._rate_limiter is None or client is None:
            return
        if delay := self._rate_limiter.reserve(client[0], self._clock.monotonic()):
            rate = f"{self._rate_limiter.rate:g} requests a second from one address"
            raise self._log_rejection(
                RequestRejected(
                    429,
                    "too_many_requests",
                    f"expected at most {rate}",
                    retry_after=str(math.ceil(delay)),
                ),
                f"more than {rate}",
                address=client[0][:MAX_ADDRESS_LENGTH],
            )

    async def _read_body(
        self, scope: Scope, receive: Receive, headers: Headers, repeated: set[str]
    ) -> bytes:
        """The verified body. Senders sign either the bytes sent or the unpacked ones."""
        limits = self._limits
        wire = body = await read_body(scope, receive, headers, limits.max_body, limits.body_timeout)
        now = self._clock.now() // SECOND
        reason = self._verify.reason_to_refuse(headers, repeated, wire, now)
        packed = encoding(headers)
        if packed and not (packed == "gzip" and limits.gzip):
            if not reason:
                expected = "gzip" if limits.gzip else "identity"
                raise await self._dead_letter(
                    headers, repeated, wire, unsupported_encoding(expected)
                )
            reason += f"; the body is encoded ({packed[:20]}), which is not accepted"
        elif packed:
            try:
                body = gunzip(wire, limits.max_body)
            except RequestRejected as rejected:
                if not reason:
                    raise await self._dead_letter(headers, repeated, wire, rejected) from None
            else:
                if reason:
                    reason = self._verify.reason_to_refuse(headers, repeated, body, now)
        if reason:
            challenge = self._verify.challenge
            extra: dict[str, Any] = {"www_authenticate": challenge} if challenge else {}
            # One response, whatever was wrong with the proof.
            detail = "the request could not be verified"
            raise self._log_rejection(RequestRejected(401, "unauthorized", detail, **extra), reason)
        return body

    # ------------------------------------------------------------------------- the ledger

    async def _accept(self, items: Sequence[Event | Undecodable]) -> list[Receipt]:
        """Durable when it returns. Waits FULL_WAIT_SECONDS while the ledger is full.

        Raises RequestRejected (503, 507) when it stays full, and when the store failed.
        """
        if self._intake is None:
            raise self._unavailable()
        try:
            return await self._intake.accept(*items, max_wait=FULL_WAIT_SECONDS)
        except StoreFull as full:
            raise (self._unavailable() if full.closing else _overloaded(full)) from None
        except StoreError:  # the outcome is unknown: the sender tries again with the same id
            raise self._unavailable() from None

    async def _dead_letter(
        self,
        headers: Headers,
        repeated: set[str],
        body: bytes,
        rejected: RequestRejected,
        reason: str = "",
    ) -> RequestRejected:
        """Records what a verified sender sent and is refused; the response to it. `reason`: where
        it says more than the response.
        """
        stored = {name: headers[name] for name in DEAD_LETTER_HEADERS if name in headers}
        error: str = reason or rejected.args[2]
        ident = self._dead_letter_id(headers, repeated, body)
        await self._accept(
            [Undecodable(id=ident, source=self._source, body=body, error=error, headers=stored)]
        )
        return self._log_rejection(rejected, error)

    def _dead_letter_id(self, headers: Headers, repeated: set[str], body: bytes) -> str:
        """The id of a refused body: its digest, so that a repetition is a duplicate."""
        return body_id(body)

    def _new_id(self) -> str:
        return self._random_bytes(16).hex()

    # ------------------------------------------------------------------------- rejections

    def _unavailable(self, *, body_unread: bool = False) -> RequestRejected:
        seconds = 1 + self._random_bytes(1)[0] % 5  # spread: not all senders retry at once
        return RequestRejected(
            503,
            "unavailable",
            "not accepting events now; try again later",
            close_connection=True,
            body_unread=body_unread,
            retry_after=str(seconds),
        )

    def _log_rejection(
        self, rejected: RequestRejected, reason: str, **fields: str
    ) -> RequestRejected:
        """Logs the reason, at most one line a second for each status."""
        rejected.is_logged = True
        self._rejections.add(rejected.reply.status, reason=reason, **fields)
        return rejected

    def _write_rejection(self, status: int, count: int, fields: dict[str, Any]) -> None:
        self._log("webhook.refused", status=status, count=count, **fields)

    def _log(self, event: str, **fields: Any) -> None:
        if self._intake is not None:
            self._intake.log.warning(event, path=self.path, **fields)


def unreadable(error: ValueError) -> RequestRejected:
    """400, with the reason why a body cannot be read. It may quote the body, so it is cut."""
    return RequestRejected(400, "unreadable", str(error)[:MAX_REASON_LENGTH])


def body_id(body: bytes) -> str:
    """An id made of a body, for one without an identity of its own."""
    return hashlib.blake2b(body, digest_size=16).hexdigest()


def _overloaded(full: StoreFull) -> RequestRejected:
    status, error = (507, "disk_full") if full.disk else (503, "overloaded")
    return RequestRejected(
        status,
        error,
        "the ledger is full; try again later",
        retry_after=str(max(1, math.ceil(full.retry_after))),
    )


def _verifier(where: str, verify: Verify | Literal["none"]) -> Verify:
    if isinstance(verify, Verify):
        return verify
    if verify == "none":
        return NO_VERIFICATION
    raise UsageError(
        f'{where}, verify=): expected a preset such as GitHub(secret=env("NAME")), '
        'or "none" written out'
    )
