"""HTTP triggers under test: served over real HTTP, with a ContractLedger as their intake, and
senders that try again.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from starlette.routing import Mount

from eventflow.events.event import Event, Undecodable
from eventflow.testing.trigger_contract import ContractLedger, Item, TriggerHarness, listening
from tests.conftest import eventually
from tests.triggers.serving import serving
from triggers.http_endpoint import Endpoint
from triggers.webhook import Webhook

SENDER_BACKOFF = 0.02
"""Seconds, shorter than the sender was asked for."""


class Hook:
    """A served trigger, its ledger, and a client."""

    def __init__(
        self, path: str, port: int, ledger: ContractLedger, client: httpx2.AsyncClient
    ) -> None:
        self.path = path
        self.port = port
        self.ledger = ledger
        self.client = client

    async def post(self, body: Any, /, **headers: str) -> httpx2.Response:
        """Bytes and text as they are, anything else as JSON; `x_tenant="a"` is the header
        `x-tenant`.
        """
        content = body if isinstance(body, bytes | str) else json.dumps(body).encode()
        named = {
            "content-type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        return await self.client.post(self.path, content=content, headers=named)

    @property
    def recorded(self) -> list[Item]:
        return list(self.ledger.recorded.values())

    @property
    def events(self) -> list[Event]:
        return self.ledger.events

    @property
    def dead_letters(self) -> list[Undecodable]:
        return self.ledger.dead_letters

    @property
    def event(self) -> Event:
        """The only one."""
        (event,) = self.recorded
        assert isinstance(event, Event)
        return event


@asynccontextmanager
async def serving_hook(trigger: Endpoint) -> AsyncIterator[Hook]:
    """The trigger, served and listening."""
    ledger = ContractLedger()
    async with (
        serving(trigger.routes) as port,
        listening(trigger, ledger),
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):
        yield Hook(trigger.path, port, ledger, client)


def posting(trigger: Endpoint, test: Callable[[Hook], Awaitable[None]]) -> None:
    """Runs a test with the trigger's hook."""

    async def main() -> None:
        async with serving_hook(trigger) as hook:
            await test(hook)

    asyncio.run(main())


def over_http(test: Callable[[Hook], Awaitable[None]], **options: Any) -> None:
    """The same with a webhook at `/hooks/orders`, by default without verification."""
    posting(Webhook("/orders", **{"verify": "none", **options}), test)


class HttpHarness(TriggerHarness):
    """Senders that post to `endpoint` until they are answered 2xx, as real ones do after a 5xx.

    `trigger` of a subclass makes `endpoint`. An item's key is its `idempotency-key`.
    """

    endpoint: Endpoint

    def __init__(self) -> None:
        self._acknowledged: set[str] = set()
        self._senders: set[asyncio.Task[None]] = set()

    def body(self, key: str) -> Any:
        """What is posted for a key."""
        return {"key": key}

    @asynccontextmanager
    async def source(self) -> AsyncIterator[None]:
        async def dispatch(scope: Any, receive: Any, send: Any) -> None:
            await self.endpoint(scope, receive, send)

        async with (
            serving([Mount("/", dispatch)]) as port,
            httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as self._client,
        ):
            try:
                yield
            finally:
                for sender in self._senders:
                    sender.cancel()
                await asyncio.gather(*self._senders, return_exceptions=True)

    async def offer(self, keys: Sequence[str]) -> None:
        self._senders |= {asyncio.create_task(self._send(key)) for key in keys}

    async def redeliver(self, keys: Sequence[str], ledger: ContractLedger) -> None:
        self._acknowledged -= set(keys)
        await self.offer(keys)

    async def _send(self, key: str) -> None:
        path, headers = self.endpoint.path, {"idempotency-key": key}

        async def is_acknowledged() -> bool:
            response = await self._client.post(path, json=self.body(key), headers=headers)
            if response.is_success:
                self._acknowledged.add(key)
                return True
            assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
            return False

        await eventually(is_acknowledged, f"{key} is acknowledged", poll=SENDER_BACKOFF)

    async def acknowledged(self, ledger: ContractLedger) -> set[str]:
        return set(self._acknowledged)


class WebhookHarness(HttpHarness):
    """Senders of JSON to a webhook."""

    def trigger(self) -> Webhook:
        self.endpoint = webhook = Webhook("/orders", verify="none")
        return webhook
