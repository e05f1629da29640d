"""What every trigger that is a `POST /hooks/PATH` does alike: the request's way in, the wait for the ledger, the replies.

`webhook.py` and `drift.py` build on it; each says in `_take` what a verified body is. The app mounts `routes` and runs
`listen`, which binds the intake; without one (not started yet, draining) the answer is 503. A request goes method → pace →
encoding → size → body → signature → `_take` → `_accept` → 2xx; whatever is wrong with it is a 4xx, never a 500, and never a
word of why to an unknown sender. An address that floods (pace.py) is told so before any of its body is read. The 2xx follows
the record (P1).
"""

import asyncio
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from eventflow.core.clock import SECOND, Clock, SystemClock
from eventflow.core.errors import StoreError, StoreFull, UsageError
from eventflow.events.event import Event, Gauge, Intake, Receipt, Undecodable
from triggers.http_request import (
    Gone,
    Refused,
    Reply,
    encoding,
    gunzip,
    read_body,
    read_headers,
    send_reply,
)
from triggers.rate_limit import LONGEST, Pace
from triggers.signatures import NOBODY, Verify

Headers = Mapping[str, str]

FULL_PATIENCE = 2.0
"""Seconds a request waits for a full ledger before it is told to come back: under Slack's timeout of 3 s."""

MAX_WAITING = 64 * 1024 * 1024
"""Bytes of bodies that may wait for a full ledger at one webhook; beyond them 503 comes at once, and memory stays flat."""

KEPT_HEADERS = ("content-type", "content-encoding", "user-agent")
"""What a dead letter keeps of the request. An allow-list: headers carry credentials under names nobody foresees."""

_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")
SYSTEM_CLOCK = SystemClock()


class Endpoint:
    """A trigger for `POST /hooks/PATH`; its kinds differ in `_take`.

    `max_body` in bytes, durations in seconds, `max_rate` in requests per second from one address.
    """

    def __init__(
        self,
        path: str,
        *,
        verify: Verify | Literal["none"],
        name: str,
        max_body: int = 1 << 20,
        gzip: bool = False,
        max_rate: float | None = 1000.0,
        body_timeout: float = 30.0,
        clock: Clock = SYSTEM_CLOCK,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        kind = type(self).__name__
        if not _PATH.fullmatch(path):
            raise UsageError(
                f'{kind}({path!r}): expected a path such as "/orders" of letters, digits and . _ ~ -'
            )
        if max_rate is not None and not 0 < max_rate < math.inf:
            raise UsageError(
                f"{kind}({path!r}, max_rate=): expected requests per second, or None for any, found {max_rate!r}"
            )
        self._verify = _verifier(f"{kind}({path!r}", verify)
        self.name, self.path = name, "/hooks" + path
        self.verified = self._verify is not NOBODY
        self._max_body, self._gzip, self._body_timeout = max_body, gzip, body_timeout
        self._pace = None if max_rate is None else Pace(max_rate)
        self._clock, self._entropy = clock, entropy
        self._intake: Intake | None = None
        self._waiting = 0
        self._quiet_until, self._unlogged = 0.0, 0

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.path.removeprefix('/hooks')!r}, verify={self._verify!r})"
        )

    async def _take(self, headers: Headers, repeated: set[str], body: bytes) -> Reply:
        """What becomes of a verified body; Refused where it is none of ours."""
        raise NotImplementedError

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

    # ------------------------------------------------------------------------- how it fares

    @property
    def condition(self) -> str | None:
        """Nothing keeps senders from sending."""
        return None

    def gauges(self) -> Sequence[Gauge]:
        """How many requests were refused because their address sent too many, since the start."""
        return [] if self._pace is None else [Gauge("requests_throttled", self._pace.refused)]

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
        self._hold_back(scope)
        if self._intake is None:
            raise self._unavailable(unread=True)
        headers, repeated = read_headers(scope["headers"])
        return await self._take(headers, repeated, await self._read(receive, headers, repeated))

    def _hold_back(self, scope: Scope) -> None:
        """Refused (429) when the address that the server names (behind a proxy: that the proxy names) sends too fast.

        The connection stays: what is left of the body is dropped as it comes, and a new connection would cost us more.
        """
        client: tuple[str, int] | None = scope.get("client")
        if self._pace is None or client is None:
            return
        if wait := self._pace.wait(client[0], self._clock.monotonic()):
            rate = f"{self._pace.rate:g} requests a second from one address"
            refused = Refused(
                429,
                "too_many_requests",
                f"expected at most {rate}",
                retry_after=str(math.ceil(wait)),
            )
            raise self._refused(refused, f"more than {rate}", address=client[0][:LONGEST])

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
            asked = (
                {"www_authenticate": self._verify.challenge}
                if self._verify.challenge
                else dict[str, str]()
            )
            raise self._refused(_unauthorized(asked), why)
        return body

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
        except (
            StoreError
        ):  # unknown, not refused: the sender tries again, and its id tells whether it was recorded
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

    async def _dead(
        self, ident: str, source: str, headers: Headers, body: bytes, error: str
    ) -> Refused:
        """Keeps what a real sender sent and nobody can read; the answer for it."""
        kept = {name: headers[name] for name in KEPT_HEADERS if name in headers}
        item = Undecodable(id=ident, source=source, body=body, error=error, headers=kept)
        await self._accept([item], len(body))
        return self._refused(Refused(400, "unreadable", error), error)

    def _fresh_id(self) -> str:
        return self._entropy(16).hex()

    # ------------------------------------------------------------------------- out again

    def _unavailable(self, *, unread: bool = False) -> Refused:
        seconds = (
            1 + self._entropy(1)[0] % 5
        )  # spread, so that waiting senders do not all come back at once
        detail = "not taking events now; come back later"
        return Refused(
            503, "unavailable", detail, hang_up=True, unread=unread, retry_after=str(seconds)
        )

    def _refused(self, refused: Refused, reason: str, **fields: str) -> Refused:
        """Says why in the log, at most once a second: whoever floods us with forgeries must not fill the disk."""
        now = self._clock.monotonic()
        self._unlogged += 1
        if now >= self._quiet_until:
            self._log(
                "webhook.refused",
                reason=reason,
                status=refused.reply.status,
                count=self._unlogged,
                **fields,
            )
            self._quiet_until, self._unlogged = now + 1.0, 0
        return refused

    def _log(self, event: str, **fields: Any) -> None:
        if self._intake is not None:
            self._intake.log.warning(event, path=self.path, **fields)


def _unauthorized(asked: Mapping[str, str]) -> Refused:
    """One answer, whatever was wrong with the proof."""
    return Refused(
        401,
        "unauthorized",
        "the request could not be verified",
        hang_up=False,
        unread=False,
        **asked,
    )


def _full(full: StoreFull) -> Refused:
    status, error = (507, "disk_full") if full.disk else (503, "overloaded")
    return Refused(
        status,
        error,
        "the ledger is full; come back later",
        retry_after=str(max(1, math.ceil(full.retry_after))),
    )


def _verifier(where: str, verify: Verify | Literal["none"]) -> Verify:
    if isinstance(verify, Verify):
        return verify
    if verify == "none":
        return NOBODY
    raise UsageError(
        f'{where}, verify=): expected a preset such as GitHub(secret=env("NAME")), or "none" written out'
    )
