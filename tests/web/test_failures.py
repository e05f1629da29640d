"""Requests that fail: each 500 has a line in the log, with the traceback under the answer's id."""

import asyncio
import json
import re
import resource
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from eventflow import App
from eventflow.web.api import make_asgi
from eventflow.web.http_protocol import RESERVED_FILES
from tests.conftest import wait_until
from tests.server_process import EventflowProcess, serving

PROGRAM = """
import asyncio
from eventflow import App, Event, flow
from starlette.routing import Route

class Odd(BaseException): ...

class Door:
    name = "door"

    def __init__(self):
        self.routes = [Route("/hooks/{kind}", self.take, methods=["POST"])]

    async def take(self, request):
        if request.path_params["kind"] == "stuck":
            print("stuck", flush=True)
            await asyncio.sleep(3600)
        raise {"cancelled": asyncio.CancelledError, "odd": Odd}[request.path_params["kind"]]("here")

    async def listen(self, intake):
        await asyncio.Event().wait()

@flow
async def note(event: Event) -> None: ...

app = App("shop")
app.on(Door(), note)
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EventflowProcess]:
    folder = tmp_path_factory.mktemp("shop")
    (folder / "shop.py").write_text(PROGRAM)
    with serving(folder) as served:
        yield served


def failures(served: EventflowProcess) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in served.log.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == "http.failed"]


@pytest.mark.parametrize("kind", ["cancelled", "odd"])
def test_what_no_handler_catches_is_logged_and_answered(shop: EventflowProcess, kind: str):
    """A CancelledError without a cancel, and another BaseException of a route: 500 in JSON, and a
    line with the traceback under the id of the answer. The server goes on.
    """
    answer = shop.post(f"/hooks/{kind}")
    assert (answer.status_code, answer.json()["error"]) == (500, "internal")
    ident = answer.json()["detail"].rpartition(" ")[2]
    wait_until(lambda: ident in shop.log, "the line is written")
    (found,) = [line for line in failures(shop) if line.get("id") == ident]
    assert (found["level"], found["path"]) == ("error", f"/hooks/{kind}")
    assert found["exception"].endswith(": here") and "Traceback" in found["exception"]
    assert shop.get("/healthz") == {"ok": True}


def test_an_error_of_the_access_check_is_logged_and_answered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """When the token cannot be read, the answer is 500 in JSON, and the log has the reason once."""

    async def go() -> httpx2.Response:
        app = App("shop", store=f"sqlite:///{tmp_path}/shop.db")
        (tmp_path / "shop.db.token").mkdir()
        async with app:
            asgi = make_asgi(app, manage=False)
            transport = httpx2.ASGITransport(asgi, raise_app_exceptions=False)
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as it:
                return await it.get("/api/runs")

    answer = asyncio.run(go())
    assert (answer.status_code, answer.json()["error"]) == (500, "internal")
    (line,) = [record for record in caplog.records if "http.failed" in record.getMessage()]
    assert answer.json()["detail"].rpartition(" ")[2] in line.getMessage()
    assert "StoreUnwritable" in str(line.exc_text)


def test_an_internal_error_has_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """An error that a handler raises is logged once, though the access check sees it too."""

    async def go() -> httpx2.Response:
        app = App("shop", store=f"sqlite:///{tmp_path}/shop.db")
        async with app:
            asgi = make_asgi(app, auth=False, manage=False)
            app.triggers.append(object())  # type: ignore[arg-type]
            transport = httpx2.ASGITransport(asgi, raise_app_exceptions=False)
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as it:
                answer = await it.get("/api/triggers")
            app.triggers.pop()
            return answer

    assert asyncio.run(go()).status_code == 500
    assert sum("http.failed" in record.getMessage() for record in caplog.records) == 1


def test_a_request_that_outlives_the_stop_is_answered_503(tmp_path: Path):
    """A request that still runs a second after the drain gets a 503, so that its sender repeats it,
    and a line that says where it was.
    """
    (tmp_path / "shop.py").write_text(PROGRAM)
    with serving(tmp_path, "--grace", "1") as served, ThreadPoolExecutor(1) as pool:
        pending = pool.submit(served.post, "/hooks/stuck")
        assert served.process.stdout is not None
        assert served.process.stdout.readline() == "stuck\n"
        served.process.terminate()
        answer = pending.result()
        assert (answer.status_code, answer.json()["error"]) == (503, "unavailable")
        wait_until(lambda: served.process.poll() == 0, "the server has ended")
        (line,) = failures(served)
        assert "in take" in line["exception"]


def test_refused_connections_are_logged(tmp_path: Path):
    """Connections over the limit are answered 503, and one line counts those of a second."""
    files = 24 + RESERVED_FILES  # of which 24 may be connections
    limits = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (files, files))
    with serving(tmp_path, limits=limits) as served, ExitStack() as opened:
        address = (served.client.base_url.host, served.client.base_url.port or 0)
        sockets = [opened.enter_context(socket.create_connection(address)) for _ in range(30)]
        answers = [each.recv(64) for each in sockets[-3:]]
        assert all(answer.startswith(b"HTTP/1.1 503") for answer in answers)
        wait_until(lambda: "http.connections_refused" in served.log, "a line is written")
        (line,) = re.findall(r'{.*"http.connections_refused".*}', served.log)[:1]
        assert (json.loads(line)["level"], json.loads(line)["open"]) == ("warning", 24)
