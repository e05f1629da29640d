"""The error of a refused event, whatever its source, is freed without the garbage collector."""

import gzip
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest

from eventflow import App, Event, Permanent, all_of, emit, flow, part, sleep
from eventflow.core.errors import StoreFull
from eventflow.events.event import OutboxMessage, Undecodable
from eventflow.testing import MemoryTrigger, drain, running
from eventflow.web.api import make_asgi
from tests.garbage import leaving_no_error_cycles
from triggers import Webhook
from triggers.signatures import Bearer

pytestmark = pytest.mark.anyio


class Refused(Exception):
    """Raised by the user's code."""


class Unprintable(Exception):
    def __str__(self) -> str:
        raise Refused("no text")


def refuse(event: Event) -> Any:
    raise Refused(event.id)


def refuse_without_text(event: Event) -> Any:
    raise Unprintable


def no_text(event: Event) -> Any:
    return 5


@flow
async def take(n: int) -> None:
    """Needs a number."""


@flow
async def announce(event: Event) -> None:
    await emit("order.done", {"id": event.id})


@flow
async def pause(event: Event) -> None:
    await sleep(3600)


class FailingSink:
    def __init__(self, name: str, error: type[Exception]) -> None:
        self.name = name
        self.error = error
        self.calls = 0

    async def send(self, *messages: OutboxMessage) -> None:
        self.calls += 1
        raise self.error("refused")

    async def close(self) -> None:
        pass


def _filter(app: App, orders: MemoryTrigger) -> None:
    app.on(orders, take, where=refuse)


def _filter_without_text(app: App, orders: MemoryTrigger) -> None:
    app.on(orders, take, where=refuse_without_text)


def _key(app: App, orders: MemoryTrigger) -> None:
    app.on(orders, take, key=refuse)


def _no_key(app: App, orders: MemoryTrigger) -> None:
    app.on(orders, take, key=no_text)


def _params(app: App, orders: MemoryTrigger) -> None:
    app.on(orders, take, params=refuse)


def _data(app: App, orders: MemoryTrigger) -> None:
    app.on(orders, take)


def _part_filter(app: App, orders: MemoryTrigger) -> None:
    app.on(all_of(part(orders, where=refuse), "other", within=60), take)


def _part_key(app: App, orders: MemoryTrigger) -> None:
    app.on(all_of(orders, "other", within=60, by=refuse), take)


def _sink_filter(app: App, orders: MemoryTrigger) -> None:
    app.on(orders, announce)
    app.send("order.*", FailingSink("shelf", Refused), where=refuse)


def _sink(app: App, orders: MemoryTrigger) -> None:
    app.on(orders, announce)
    app.send("order.*", FailingSink("shelf", Refused))


def _sink_that_rejects(app: App, orders: MemoryTrigger) -> None:
    app.on(orders, announce)
    app.send("order.*", FailingSink("shelf", Permanent))


ROUTES = [
    _filter,
    _filter_without_text,
    _key,
    _no_key,
    _params,
    _data,
    _part_filter,
    _part_key,
    _sink_filter,
    _sink,
    _sink_that_rejects,
]


@pytest.mark.parametrize("subscribe", ROUTES, ids=lambda each: each.__name__)
async def test_a_refused_event_leaves_no_cycle(subscribe: Callable[[App, MemoryTrigger], None]):
    """The error of a filter, a key, params, the binding of an event or a sink is freed at once;
    likewise that of an event that cannot be recorded.
    """

    async def send(ident: str) -> None:
        await orders.send(Event(id=ident, source="/s", type="t", data={"n": ident}))
        await orders.send(Event(id=ident, source="/s", type="t", data={"n": "other"}))
        await orders.send(Event(id=f"set{ident}", source="/s", type="t", data={"n": {1}}))
        await orders.send(Event(id=f"large{ident}", source="/s", type="t", data={"n": 2**70}))
        await orders.send(Undecodable(id=ident, source="/u", body=b"\xff", error="not JSON"))
        await drain(app)

    orders = MemoryTrigger("orders")
    app = App("shop")
    subscribe(app, orders)
    async with running(app):
        await send("1")  # fills caches
        with leaving_no_error_cycles():
            await send("2")


async def test_a_full_ledger_leaves_no_cycle():
    """The StoreFull that a caller gets is freed with it."""
    orders = MemoryTrigger("orders")
    app = App("shop", max_pending=1)
    app.on(orders, pause)
    async with running(app):
        await orders.send(data={})
        with leaving_no_error_cycles():
            for max_wait in (0.0, 0.05):
                with pytest.raises(StoreFull):
                    await orders.send(data={}, max_wait=max_wait)


GZIP = {"content-encoding": "gzip", "content-type": "application/json"}
JSON = {"content-type": "application/json"}

REQUESTS: dict[str, tuple[int, bytes, dict[str, str]]] = {
    "no proof": (401, b"{}", {"authorization": "Bearer no"}),
    "not JSON": (400, b"{", JSON),
    "not gzip": (400, b"{}", GZIP),
    "a large body": (413, b"1" * 2_000, JSON),
    "a large body, packed": (413, gzip.compress(b"1" * 2_000), GZIP),
    "an unknown type": (415, b"{}", {"content-type": "image/png"}),
    "an unknown encoding": (415, b"{}", {**JSON, "content-encoding": "br"}),
    "too long an id": (400, b"{}", {**JSON, "idempotency-key": "x" * 2_000}),
    "an invalid event": (202, b'{"n": "x"}', JSON),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_refused_request_leaves_no_cycle(name: str):
    """Whatever a webhook refuses, the error is freed with the response."""
    status, body, headers = REQUESTS[name]
    hook = Webhook("/orders", verify=Bearer("secret"), max_body=1_000, gzip=True)
    app = App("shop")
    app.on(hook, take)
    async with running(app), client_of(app) as client:
        for _ in range(2):
            with leaving_no_error_cycles():
                answer = await client.post(
                    "/hooks/orders",
                    content=body,
                    headers={"authorization": "Bearer secret", **headers},
                )
            assert answer.status_code == status, answer.text


API: dict[str, tuple[str, str, Any]] = {
    "no run": ("GET", "/api/runs/zzzz", None),
    "no page": ("GET", "/api/nothing", None),
    "a bad option": ("GET", "/api/runs?state=odd", None),
    "not JSON": ("POST", "/api/events", b"{"),
    "no flow": ("POST", "/api/runs", {"flow": "none"}),
    "arguments that do not fit": ("POST", "/api/runs", {"flow": "take", "params": {"n": "x"}}),
    "an event without a type": ("POST", "/api/events", {"data": 1}),
}


@pytest.mark.parametrize("name", API)
async def test_a_refused_call_of_the_api_leaves_no_cycle(name: str):
    """Whatever the API refuses, the error is freed with the response."""
    method, path, body = API[name]
    app = App("shop")
    app.add(take)
    async with running(app), client_of(app) as client:
        for _ in range(2):
            with leaving_no_error_cycles():
                if isinstance(body, bytes):
                    answer = await client.request(method, path, content=body, headers=JSON)
                else:
                    answer = await client.request(method, path, json=body)
            assert 400 <= answer.status_code < 500, answer.text


@asynccontextmanager
async def client_of(app: App) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(make_asgi(app, auth=False, manage=False))
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
