"""Requests that cannot be meant as they are: refused with what was meant, and told in the log."""

import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from eventflow import App, flow
from eventflow.logs.capture import configure
from eventflow.testing import running
from eventflow.web.api import make_asgi
from tests.conftest import eventually
from triggers import Bearer, Webhook

pytestmark = pytest.mark.anyio
Client = httpx2.AsyncClient


@flow
async def steps(n: int = 1) -> int:
    return n


def shop(folder: Path) -> App:
    app = App("shop", store=f"sqlite:///{folder}/shop.db")
    app.on(Webhook("/orders", verify=Bearer("only-the-shop-knows")), steps)
    return app


async def asked(app: App, check: Callable[[Client], Awaitable[None]], **options: Any) -> list[Any]:
    """Runs `check` with a client of the app's HTTP; the log lines of that time."""
    stream = io.BytesIO()
    with configure(stream=stream, pretty=False) as logs:
        transport = httpx2.ASGITransport(app=make_asgi(app, **options))
        async with Client(transport=transport, base_url="http://localhost") as client:
            await check(client)
        logs.flush()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("path", "body", "detail"),
    [
        ("/api/runs", {"flow": "steps", "parameters": {"n": 5}}, "parameters: .*mean 'params'"),
        ("/api/runs", {"flow": "steps", "idempotencyKey": "a"}, "mean 'idempotency_key'"),
        ("/api/runs", {"flow": "steps", "tags": ["x"]}, "tags: no such field; it has flow, params"),
        ("/api/runs/x/retry", {"from_scrach": True}, "mean 'from_scratch'"),
        ("/api/runs/x/cancel", {"why": "no"}, "why: no such field; it has reason"),
        ("/api/dead-letters/1/redrive", {"Data": 1}, "mean 'data'"),
        ("/api/events/x/replay", {"dryrun": True}, "mean 'dry_run'"),
    ],
)
async def test_an_unknown_field_is_refused(tmp_path: Path, path: str, body: Any, detail: str):
    """A field that a request does not have is a 400 with the nearest name, and nothing happens."""

    async def check(client: Client) -> None:
        answer = await client.post(path, json=body)
        assert answer.status_code == 400
        pattern = detail.partition(".*")
        assert all(part in answer.json()["detail"] for part in (pattern[0], pattern[2]))
        assert (await client.get("/api/runs")).json()["runs"] == []

    async with running(shop(tmp_path)) as app:
        await asked(app, check, auth=False, manage=False)


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("/api/runs?status=failed", "did you mean 'state'?"),
        ("/api/events?typ=a", "did you mean 'type'?"),
        ("/api/dead-letters?flow=a", "flow: no such query parameter; it has limit, after"),
        ("/api/dry-run?sinc=2026-01-01", "did you mean 'since'?"),
    ],
)
async def test_an_unknown_query_parameter_is_refused(tmp_path: Path, query: str, detail: str):
    """A filter that a list does not have is a 400 with the nearest name, not all rows."""

    async def check(client: Client) -> None:
        answer = await client.get(query)
        assert answer.status_code == 400 and detail in answer.json()["detail"]

    async with running(shop(tmp_path)) as app:
        await asked(app, check, auth=False, manage=False)


async def test_each_kind_of_refusal_has_its_line(tmp_path: Path):
    """A wrong token is logged at once, whatever was refused just before; those that follow within
    the second are one line at its end, with their number and reason.
    """
    lines: list[Any] = []

    async def check(client: Client) -> None:
        right = {"authorization": "Bearer only-the-shop-knows"}
        bad = await client.post("/hooks/orders", content=b"{bad", headers=right)
        assert bad.status_code == 400
        for token in ("nope", "no", "never"):
            wrong = {"authorization": f"Bearer {token}"}
            assert (await client.post("/hooks/orders", json={}, headers=wrong)).status_code == 401
        await client.get("/api/runs")
        await eventually(lambda: stream.getvalue().count(b"webhook.refused") == 3, "the summary")

    stream = io.BytesIO()
    async with running(shop(tmp_path)) as app:
        with configure(stream=stream, pretty=False):
            transport = httpx2.ASGITransport(app=make_asgi(app, manage=False))
            async with Client(transport=transport, base_url="http://localhost") as client:
                await check(client)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    refused = [line for line in lines if line["event"] == "webhook.refused"]
    assert [(line["status"], line["count"]) for line in refused] == [(400, 1), (401, 1), (401, 2)]
    assert refused[2]["reason"] == "wrong token"
    (api,) = [line for line in lines if line["event"] == "http.refused"]
    assert "the file STORE.token" in api["reason"]  # not redacted


async def test_a_webhook_without_hooks_in_its_path(tmp_path: Path):
    """A request beside the API and the webhooks is told where they are."""

    async def check(client: Client) -> None:
        token = {"authorization": "Bearer only-the-shop-knows"}
        answer = await client.post("/orders", json={}, headers=token)
        assert answer.status_code == 401
        assert "webhooks are below /hooks" in answer.json()["detail"]

    async with running(shop(tmp_path)) as app:
        await asked(app, check, manage=False)


@pytest.mark.parametrize("manage", [True, False])
async def test_a_mounted_app_that_nobody_opened(tmp_path: Path, manage: bool):
    """An app whose host does not open it answers 503 and says once in the log what to write."""

    async def check(client: Client) -> None:
        for _ in range(2):
            answer = await client.post("/hooks/orders", json={})
            assert answer.status_code == 503 and "not open" in answer.json()["detail"]

    lines = await asked(shop(tmp_path), check, manage=manage)
    (line,) = [line for line in lines if line["event"] == "app.not_open"]
    assert line["level"] == "error" and "async with app" in line["hint"]
