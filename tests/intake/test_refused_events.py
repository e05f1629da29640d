"""An event that cannot become a run is a warning in the log, with the reason."""

import io
import json
from typing import Any

import httpx2
import pytest

from eventflow import App, Event, emit, flow, task
from eventflow.logs.capture import configure
from eventflow.testing import MemoryTrigger, drain, result_of, running
from eventflow.web.api import make_asgi
from triggers import RunState, Webhook

pytestmark = pytest.mark.anyio


@flow
async def charge(amount: int) -> None:
    """Needs a whole number."""


@flow
async def emits() -> None:
    await emit("order.paid", {"amount": "much"})


@task
async def emits_in_a_task() -> None:
    await emit("order.paid", {"amount": "much"})


@flow
async def emits_by_a_task() -> None:
    await emits_in_a_task()


async def _by_trigger(app: App, orders: MemoryTrigger) -> None:
    await orders.send(data={"amount": "much"})


async def _twice(app: App, orders: MemoryTrigger) -> None:
    for _ in range(2):
        await orders.send(Event(id="1", source="/s", type="order.paid", data={"amount": "much"}))


async def _by_program(app: App, orders: MemoryTrigger) -> None:
    await app.emit("order.paid", {"amount": "much"})


async def _by_flow(app: App, orders: MemoryTrigger) -> None:
    await result_of(app, emits)


async def _by_task(app: App, orders: MemoryTrigger) -> None:
    await result_of(app, emits_by_a_task)


WAYS = [_by_trigger, _twice, _by_program, _by_flow, _by_task]


async def _warnings(way: Any, event: str) -> list[dict[str, Any]]:
    orders = MemoryTrigger("orders")
    app = App("refused")
    app.on(orders, charge)
    app.on("order.paid", charge)
    stream = io.BytesIO()
    with configure(stream=stream, pretty=False) as logs:
        async with running(app) as app:
            await way(app, orders)
            await drain(app)
        logs.flush()
    lines = map(json.loads, stream.getvalue().splitlines())
    return [line for line in lines if line["event"] == event]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_an_event_that_binds_to_nothing_is_one_warning_with_the_reason(way: Any) -> None:
    """Whoever sends it, an event that does not fit its flow is one warning that says why."""
    (line,) = await _warnings(way, "event.dead_lettered")
    assert line["level"] == "warning"
    assert "amount" in line["error"]
    assert line["subscription"].endswith("/charge")


async def test_the_event_of_an_ended_run_that_does_not_bind_is_a_warning() -> None:
    """A run-state event that does not fit its flow is a warning too."""
    app = App("ended")
    app.on(RunState(emits, "completed"), charge, params=lambda event: {"amount": "much"})
    stream = io.BytesIO()
    with configure(stream=stream, pretty=False) as logs:
        async with running(app) as app:
            await result_of(app, emits)
            await drain(app)
        logs.flush()
    assert b'"event":"event.dead_lettered"' in stream.getvalue()


async def test_requests_that_the_api_and_a_webhook_refuse_are_warnings() -> None:
    """A body over the limit, a wrong host, a missing token, parameters that do not fit: each is a
    warning with method, path and reason.
    """
    app = App("api")
    app.add(charge)
    app.on(Webhook("/orders", verify="none", max_body=10), charge)
    stream = io.BytesIO()
    with configure(stream=stream, pretty=False) as logs:
        async with running(app) as app:
            open_api = httpx2.ASGITransport(make_asgi(app, auth=False, manage=False))
            async with httpx2.AsyncClient(
                transport=open_api, base_url="http://localhost"
            ) as client:
                assert (await client.post("/hooks/orders", content=b" " * 11)).status_code == 413
                too_large = await client.post(
                    "/api/events",
                    content=b" " * (20 << 20),
                    headers={"content-type": "application/cloudevents+json"},
                )
                assert too_large.status_code == 413
                unfit = await client.post(
                    "/api/runs", json={"flow": "charge", "params": {"amount": "much"}}
                )
                assert unfit.status_code == 400
            closed_api = httpx2.ASGITransport(make_asgi(app, manage=False))
            async with httpx2.AsyncClient(
                transport=closed_api, base_url="http://localhost"
            ) as client:
                assert (await client.get("/api/runs")).status_code == 401
        logs.flush()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    refused = [
        (line["status"], bool(line["reason"]), line["level"])
        for line in lines
        if line["event"] in ("http.refused", "webhook.refused")
    ]
    assert refused == [
        (413, True, "warning"),
        (413, True, "warning"),
        (400, True, "warning"),
        (401, True, "warning"),
    ]
