"""The log lines of the runs of an embedded app are kept, as those of a server are."""

from pathlib import Path

import httpx2
import pytest
from starlette.applications import Starlette

from eventflow import App, current_run, current_task, flow, task
from eventflow.core.clock import SystemClock
from eventflow.logs.store import LogStore
from eventflow.web.api import Api, make_asgi

pytestmark = pytest.mark.anyio


@task
async def step() -> None:
    current_task().log.info("charged the card")


@flow
async def order() -> None:
    current_run().log.info("an order came in")
    await step()


async def _texts(path: Path, run: int) -> str:
    """The lines of a run, read when the app is closed."""
    store = LogStore(f"{path}.logs.db", clock=SystemClock())
    store.open()
    try:
        return str(await store.read(run, 0, 100))
    finally:
        store.close()


async def test_lines_of_an_embedded_run_are_kept(tmp_path: Path) -> None:
    """`async with app:` keeps what flow and task log, for `eventflow logs RUN`."""
    path = tmp_path / "shop.db"
    async with App("shop", store=f"sqlite:///{path}") as app:
        run = await app.start(order)
        await run.result()
        api = httpx2.ASGITransport(make_asgi(app, auth=False, manage=False))
        async with httpx2.AsyncClient(transport=api, base_url="http://localhost") as client:
            served = (await client.get(f"/api/runs/{run.id}/logs")).text
    for text in ("an order came in", "charged the card"):
        assert text in served
        assert text in await _texts(path, run.number)


async def test_lines_of_a_mounted_app_are_kept(tmp_path: Path) -> None:
    """The lifespan of `app.asgi()` keeps them too, and closes their store."""
    path = tmp_path / "shop.db"
    app = App("shop", store=f"sqlite:///{path}")
    app.add(order)
    inner = Starlette()
    async with Api(app, lambda: False).lifespan(inner):
        run = await app.start(order)
        await run.result()
    assert not app.is_open
    assert "charged the card" in await _texts(path, run.number)
