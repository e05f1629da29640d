"""Several workers of one ASGI server: one serves the app, the others go on without it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from eventflow import App
from eventflow.core.errors import StoreLocked
from eventflow.core.siblings import is_sibling_worker
from tests.conftest import eventually

pytestmark = pytest.mark.anyio

ALONE = """
from eventflow import App, flow
app = App("shop", store="sqlite:///shop.db")
@flow
async def handle(): ...
app.add(handle)
asgi = app.asgi()
"""

IN_A_HOST = """
from contextlib import asynccontextmanager
from eventflow import App, flow
from eventflow.core.errors import StoreLocked
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
app = App("shop", store="sqlite:///shop.db")
@flow
async def handle(): ...
@asynccontextmanager
async def lifespan(_):
    async with app:
        yield
async def ready(request):
    try:
        await app.start(handle)
    except StoreLocked as error:
        print("answered:", error, flush=True)
        return PlainTextResponse(str(error), 503)
    return PlainTextResponse("started")
asgi = Starlette(routes=[Route("/readyz", ready)], lifespan=lifespan)
"""


@pytest.fixture(params=[ALONE, IN_A_HOST], ids=["alone", "in a host"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The port of uvicorn with two workers, and the file of its output."""
    (tmp_path / "shop.py").write_text(request.param)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = tmp_path / "output"
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "shop:asgi", "--workers", "2", "--port", str(port)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}:{tmp_path}"},
            stdout=stream,
            stderr=stream,
        )
    try:
        yield port, output
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()


async def test_the_second_worker_logs_why_and_the_first_one_serves(
    server: tuple[int, Path],
) -> None:
    """With `uvicorn --workers 2` one worker serves the app; the other logs one clear line, answers
    503, and the server stays up. A call of the app there says that another worker has it.
    """
    port, output = server
    seen: set[int] = set()

    async def both_answer() -> bool:
        async with httpx2.AsyncClient() as client:  # a new connection: any of the workers
            with contextlib.suppress(httpx2.HTTPError):
                seen.add((await client.get(f"http://127.0.0.1:{port}/readyz")).status_code)
        return seen >= {200, 503}

    await eventually(both_answer, "both workers have answered")
    lines = [line for line in output.read_text().splitlines() if "app.locked_by_worker" in line]
    assert len(lines) == 1
    assert "one worker" in lines[0]
    assert "Traceback" not in output.read_text()
    for line in output.read_text().splitlines():
        if line.startswith("answered:"):
            assert "another worker of this server" in line and "run one worker" in line


async def test_another_server_on_the_store_is_still_an_error(tmp_path: Path) -> None:
    """A store that no worker of the same server holds raises StoreLocked, as before."""
    program = (
        "import asyncio, sys\n"
        "from eventflow import App\n"
        "async def main():\n"
        "    async with App('shop', store=sys.argv[1]):\n"
        "        print('open', flush=True)\n"
        "        await asyncio.to_thread(sys.stdin.read)\n"
        "asyncio.run(main())\n"
    )
    url = f"sqlite:///{tmp_path}/shop.db"
    with subprocess.Popen(
        [sys.executable, "-c", program, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        assert not is_sibling_worker(other.pid)
        with pytest.raises(StoreLocked, match=str(other.pid)):
            async with App("shop", store=url):
                pass
        other.communicate("")
