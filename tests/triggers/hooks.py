"""A trigger that is posted to, for tests: served over real HTTP, with the contract's ledger on its far side, and senders who do
not give up.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from starlette.routing import Mount

from eventflow.events.event import Event, Trigger, Undecodable
from tests.triggers.contract import Item, Ledger, listening
from tests.triggers.serving import serving
from triggers.http_endpoint import Endpoint
from triggers.webhook import Webhook


class Hook:
    """A served trigger, its ledger, and a client."""

    def __init__(self, path: str, port: int, ledger: Ledger, client: httpx2.AsyncClient) -> None:
        self.path, self.port, self.ledger, self.client = path, port, ledger, client

    async def post(self, body: Any, /, **headers: str) -> httpx2.Response:
        """Bytes and text as they are, anything else as JSON; `x_tenant="a"` is the header `x-tenant`."""
        content = body if isinstance(body, bytes | str) else json.dumps(body).encode()
        named = {
            "content-type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        return await self.client.post(self.path, content=content, headers=named)

    @property
    def kept(self) -> list[Item]:
        return list(self.ledger.kept.values())

    @property
    def events(self) -> list[Event]:
        return self.ledger.events

    @property
    def dead(self) -> list[Undecodable]:
        return self.ledger.dead

    @property
    def event(self) -> Event:
        """The only one."""
        (event,) = self.kept
        assert isinstance(event, Event)
        return event


@asynccontextmanager
async def hooked(trigger: Endpoint) -> AsyncIterator[Hook]:
    """The trigger, served and listening."""
    ledger = Ledger()
    async with (
        serving(trigger.routes) as port,
        listening(trigger, ledger),
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):
        yield Hook(trigger.path, port, ledger, client)


def posting(trigger: Endpoint, test: Callable[[Hook], Awaitable[None]]) -> None:
    """A test with the trigger's hook, on a loop of its own."""

    async def main() -> None:
        async with hooked(trigger) as hook:
            await test(hook)

    asyncio.run(main())


def over_http(test: Callable[[Hook], Awaitable[None]], **options: Any) -> None:
    """The same with a webhook at `/hooks/orders`, which verifies nobody if not told otherwise."""
    posting(Webhook("/orders", **{"verify": "none", **options}), test)


class Senders:
    """The contract's harness for what `make` makes: senders that post until they get a 2xx, as real ones do.

    `body` is what is posted for a key, which is its `idempotency-key` too. Only 5xx makes a real one try again.
    """

    def __init__(
        self, make: Callable[[], Endpoint], body: Callable[[str], Any] = lambda key: {"key": key}
    ) -> None:
        self._make, self._body = make, body
        self._current: Endpoint | None = None
        self._acknowledged: set[str] = set()
        self._senders: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def source(self) -> AsyncIterator[None]:
        async def dispatch(scope: Any, receive: Any, send: Any) -> None:
            assert self._current is not None
            await self._current(scope, receive, send)

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

    def trigger(self) -> Trigger:
        self._current = self._make()
        return self._current

    async def offer(self, keys: Sequence[str]) -> None:
        self._senders |= {asyncio.create_task(self._send(key)) for key in keys}

    async def offer_again(self, keys: Sequence[str], ledger: Ledger) -> None:
        self._acknowledged -= set(keys)
        await self.offer(keys)

    async def _send(self, key: str) -> None:
        assert self._current is not None
        path = self._current.path
        while True:
            answer = await self._client.post(
                path, json=self._body(key), headers={"idempotency-key": key}
            )
            if answer.is_success:
                self._acknowledged.add(key)
                return
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            await asyncio.sleep(0.02)

    def key(self, item: Item) -> str:
        return item.id

    async def acknowledged(self, ledger: Ledger) -> set[str]:
        return set(self._acknowledged)
