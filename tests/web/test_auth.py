"""The access check before routing: what is reachable without a token, and that nothing else is,
however its path is spelt.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from eventflow import App, Intake, flow
from eventflow.core.errors import UsageError
from eventflow.web.api import Api, make_asgi
from eventflow.web.auth import constant_time_equal, host_name
from eventflow.web.openapi import OPERATIONS
from eventflow.web.responses import client_address
from tests.conftest import eventually
from triggers import Webhook

Client = httpx2.AsyncClient


@flow
async def note(total: float) -> float:
    return total


def shop(folder: Path) -> App:
    app = App("shop", store=f"sqlite:///{folder}/shop.db")
    app.on(Webhook("/orders", verify="none", id="id"), note)
    return app


def with_client(
    folder: Path, work: Callable[[App, Client], Awaitable[None]], **options: Any
) -> None:
    """`work` with a client of an open app; the client sends no token."""

    async def go() -> None:
        app = shop(folder)
        async with app:
            transport = httpx2.ASGITransport(make_asgi(app, manage=False, **options))
            async with Client(transport=transport, base_url="http://localhost") as client:
                await work(app, client)

    asyncio.run(go())


def token(folder: Path) -> dict[str, str]:
    return {"authorization": f"Bearer {(folder / 'shop.db.token').read_text().strip()}"}


def test_every_api_route_requires_the_token(tmp_path: Path):
    """Without the token every described path is 401 for every method, except the two probes."""

    async def work(app: App, client: Client) -> None:
        for _, path, _, _ in OPERATIONS:
            for method in ("GET", "POST", "DELETE", "PUT", "OPTIONS", "HEAD"):
                is_probe = path in ("/healthz", "/readyz") and method in ("GET", "HEAD")
                answer = await client.request(
                    method, path.replace("{id}", "x").replace("{name}", "x")
                )
                assert answer.status_code == (200 if is_probe else 401), (method, path)

    with_client(tmp_path, work)


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/",
        "/api",
        "/healthz/",
        "//healthz",
        "/healthz/../api/runs",
        "/api/runs;/healthz",
        "/HEALTHZ",
        "/hooks",
        "/hooks/other",
        "/hooks/orders/",
        "/metrics",
        "/openapi.json",
        "/api/%2e%2e/healthz",
        "/healthz%00",
    ],
)
def test_paths_that_resemble_open_ones_are_closed(tmp_path: Path, path: str):
    """Only exact paths are open: no prefix, no trailing slash, no encoding trick. An unknown path
    below /hooks/ is 404, since its senders have no token.
    """

    async def work(app: App, client: Client) -> None:
        shut = 404 if path.startswith("/hooks/") else 401
        for method in ("GET", "POST"):
            answer = await client.request(method, path)
            assert answer.status_code in (shut, 405), (method, path)
        assert (await client.get(path)).status_code == shut
        assert shut == 401 or f"no webhook takes POST {path}" in answer.json()["detail"]

    with_client(tmp_path, work)


def test_websockets_are_closed(tmp_path: Path):
    """A WebSocket is closed before routing, on an open path too."""

    async def work(app: App, client: Client) -> None:
        asgi = make_asgi(app, manage=False)
        sent = list[Any]()

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        for path in ("/api/runs", "/healthz", "/hooks/orders"):
            sent.clear()
            await asgi(
                {"type": "websocket", "path": path, "headers": [(b"host", b"localhost")]},
                receive,
                send,
            )
            assert [message["type"] for message in sent] == ["websocket.close"]

    with_client(tmp_path, work)


def test_token(tmp_path: Path):
    """Only the right token is accepted: not a wrong, empty, doubled or renamed one; responses do
    not tell how close it was.
    """

    async def work(app: App, client: Client) -> None:
        await client.get("/api/counts")  # makes the token
        right = token(tmp_path)["authorization"]
        assert (
            await client.get("/api/counts", headers={"authorization": right})
        ).status_code == 200
        for wrong in (
            right + "x",
            right[:-1],
            "Bearer ",
            "Bearer",
            "",
            right.replace("Bearer", "Basic"),
            "Bearer \xff",
            right.replace(" ", "\t"),
            right.replace(" ", ""),
            f"{right} ",
            f"{right}, {right}",
            f'Bearer "{right[7:]}"',
        ):
            header = {"authorization": wrong.encode("latin-1")}
            answer = await client.get("/api/counts", headers=header)  # type: ignore[arg-type]
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        twice = [("authorization", right), ("authorization", right)]
        assert (await client.get("/api/counts", headers=twice)).status_code == 401
        assert (await client.get(f"/api/counts?token={right[7:]}")).status_code == 401

    with_client(tmp_path, work)


def test_tokens_are_compared_in_constant_time():
    """Tokens compare equal only if they are; unusual characters raise no error."""
    assert (
        constant_time_equal("abc", "abc")
        and not constant_time_equal("abc", "abcd")
        and not constant_time_equal("", "abc")
        and not constant_time_equal("\udcff", "abc")
    )


@pytest.mark.parametrize(
    ("host", "served"),
    [
        ("localhost", True),
        ("localhost:8710", True),
        ("127.0.0.1:1", True),
        ("[::1]:8710", True),
        ("shop.example", True),
        ("SHOP.example:443", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("evil@localhost", False),
        ("", False),
        ("localhost/x", False),
        ("[::1", False),
        ("[0:0:0:0:0:0:0:1]:8710", True),
        ("[::1].evil.example", False),
        ("[::1].evil.example:8710", False),
        ("[::1]evil", False),
        ("[::1]]", False),
        ("[::1]:8710:1", False),
        ("[::1]:", False),
        ("[::1%25lo]", False),
        ("[localhost]", False),
        ("::1", False),
        ("localhost:", False),
        ("localhost:x", False),
        ("localhost:99999", False),
        ("localhost:80@evil.example", False),
        ("localhost#evil.example", False),
        ("localhost?evil.example", False),
        ("localhost\\evil.example", False),
        ("localhost, evil.example", False),
        ("local\thost", False),
        ("localhost\x00", False),
        ("localhost ", False),
        ("local%68ost", False),
        ("localhost.", False),
        ("\xa0localhost", False),
        ("http://localhost", False),
    ],
)
def test_host_allow_list(tmp_path: Path, host: str, served: bool):
    """A Host that is not allowed is 421 before its token is checked; probes and hooks answer under
    any Host.
    """

    async def work(app: App, client: Client) -> None:
        await client.get("/api/counts")
        raw = [(b"host", host.encode("latin-1"))]
        raw += [(name.encode(), value.encode()) for name, value in token(tmp_path).items()]
        answer = await client.get("/api/counts", headers=raw)
        assert answer.status_code == (200 if served else 421)
        assert (await client.get("/healthz", headers={"host": "10.0.0.7"})).status_code == 200
        hook = await client.post(
            "/hooks/orders", json={"id": f"<{host}>", "total": 1}, headers={"host": "hooks.example"}
        )
        assert hook.status_code == 202

    with_client(tmp_path, work, allowed_hosts=["shop.example"])


def test_host_name():
    """Ports and brackets are removed; an invalid host is empty."""
    assert [host_name(each) for each in ("a:1", "[::1]:2", "A", "a@b", "x/y", "[")] == [
        "a",
        "::1",
        "a",
        "",
        "",
        "",
    ]


def test_cross_site_requests(tmp_path: Path):
    """A request from another site's page changes nothing, even with the token."""

    async def work(app: App, client: Client) -> None:
        await client.get("/api/counts")
        for headers, status in (
            ({"sec-fetch-site": "cross-site"}, 403),
            ({"sec-fetch-site": "same-site"}, 403),
            ({"origin": "https://evil.example"}, 403),
            ({"origin": "null"}, 403),
            ({"origin": ""}, 403),
            ({"origin": "//localhost"}, 403),
            ({"origin": "file://localhost"}, 403),
            ({"origin": "http://localhost/"}, 403),
            ({"origin": "http://localhost/@evil.example"}, 403),
            ({"origin": "http://evil@localhost"}, 403),
            ({"origin": "http://localhost.evil.example"}, 403),
            ({"origin": "http://[::1].evil.example"}, 403),
            ({"origin": "http://localhost:1"}, 403),
            ({"origin": "http://local\thost"}, 403),
            ({"origin": "http://localhost http://evil.example"}, 403),
            ({"origin": "https://localhost"}, 404),
            ({"sec-fetch-site": ""}, 403),
            ({"sec-fetch-site": "None"}, 403),
            ({"sec-fetch-site": "none, cross-site"}, 403),
            ({"sec-fetch-site": "same-origin", "origin": "http://localhost"}, 404),
            ({"sec-fetch-site": "none"}, 404),
        ):
            answer = await client.post(
                "/api/runs/nope/retry", headers={**token(tmp_path), **headers}
            )
            assert answer.status_code == status, headers
        assert (
            await client.get(
                "/api/counts", headers={**token(tmp_path), "sec-fetch-site": "cross-site"}
            )
        ).status_code == 200

    with_client(tmp_path, work)


@pytest.mark.parametrize("name", ["host", "origin", "sec-fetch-site", "authorization"])
def test_a_repeated_header_is_rejected(tmp_path: Path, name: str):
    """Two values, of which a proxy may read the one and the server the other, are none that a guard
    accepts, whatever their order, also if both are the right one.
    """

    async def work(app: App, client: Client) -> None:
        await client.get("/api/counts")
        right = {
            **token(tmp_path),
            "host": "localhost",
            "origin": "http://localhost",
            "sec-fetch-site": "same-origin",
        }
        wrong = {
            "authorization": "Bearer x",
            "host": "evil.example",
            "origin": "http://evil.example",
            "sec-fetch-site": "cross-site",
        }
        for first, second in ((right, right), (right, wrong), (wrong, right)):
            others = [(key, value) for key, value in right.items() if key != name]
            headers = [(name, first[name]), *others, (name, second[name])]
            answer = await client.post("/api/runs/nope/retry", headers=headers)
            assert answer.status_code in (401, 403, 421), headers
        answer = await client.post("/api/runs/nope/retry", headers=right)
        assert answer.status_code == 404

    with_client(tmp_path, work)


@pytest.mark.parametrize("header", ["x-http-method-override", "x-http-method", "x-method-override"])
def test_no_header_changes_the_method(tmp_path: Path, header: str):
    """A GET that asks for another method is a GET, and a POST is checked as a POST."""

    async def work(app: App, client: Client) -> None:
        for method, wanted in (("GET", "POST"), ("POST", "GET")):
            headers = {header: wanted, "sec-fetch-site": "cross-site"}
            answer = await client.request(method, "/api/counts", headers=headers)
            assert answer.status_code == 401
        answer = await client.post(
            "/api/runs/nope/retry",
            headers={header: "GET", "sec-fetch-site": "cross-site", **token(tmp_path)},
        )
        assert answer.status_code == 403

    with_client(tmp_path, work)


@pytest.mark.parametrize(
    "value",
    ["+5", "5_0", "\xb2", " 5", "0x5", "5, 5", "-1", "5;", "\u0665".encode().decode("latin-1")],
)
def test_a_content_length_that_is_no_number_is_refused(tmp_path: Path, value: str):
    """Where a host's own server lets such a header pass: 400, never an internal error."""

    async def work(app: App, client: Client) -> None:
        await client.get("/api/counts")
        for path in ("/api/runs", "/hooks/orders"):
            headers = {**token(tmp_path), "content-type": "application/json"}
            raw = [(key.encode(), text.encode("latin-1")) for key, text in headers.items()]
            answer = await client.post(
                path,
                content=b'{"id":"1"}',
                headers=[*raw, (b"content-length", value.encode("latin-1"))],
            )
            assert answer.status_code == 400, (path, answer.text)

    with_client(tmp_path, work)


@pytest.mark.parametrize(
    "name",
    ["", "shop.example:443", "https://shop.example", "*", "*.example", "a b", "[::1]:80", "::1%lo"],
)
def test_an_allowed_host_that_can_never_match_is_refused(tmp_path: Path, name: str):
    """A misspelt entry of the allow-list is a UsageError when the app is made."""
    with pytest.raises(UsageError, match="without scheme and port"):
        make_asgi(shop(tmp_path), allowed_hosts=[name])


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (("203.0.113.9", 1), "203.0.113.9"),
        (("2001:DB8::0:1", 1), "2001:db8::1"),
        (("unknown", 0), ""),
        (("203.0.113.9, 10.0.0.1", 0), ""),
        (("203.0.113.9:80", 0), ""),
        (("'; DROP", 0), ""),
        (None, ""),
    ],
)
def test_client_address(client: tuple[str, int] | None, address: str):
    """What stands for the sender in counts and audit lines is an address or nothing, whatever a
    proxy passed on as X-Forwarded-For.
    """
    assert client_address({"client": client}) == address


def test_guessing_is_slowed_down(tmp_path: Path):
    """After five wrong tokens in a minute the responses to an address are delayed."""

    async def work(app: App, client: Client) -> None:
        begun = asyncio.get_running_loop().time()
        for _ in range(5):
            await client.get("/api/counts", headers={"authorization": "Bearer wrong"})
        assert asyncio.get_running_loop().time() - begun < 1
        await client.get("/api/counts", headers={"authorization": "Bearer wrong"})
        assert asyncio.get_running_loop().time() - begun > 1.9

    with_client(tmp_path, work)


def test_metrics_are_open_only_on_request(tmp_path: Path):
    """/metrics needs the token, unless --open-metrics."""

    async def shut(app: App, client: Client) -> None:
        assert (await client.get("/metrics")).status_code == 401

    async def open_(app: App, client: Client) -> None:
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.post("/metrics")).status_code == 401

    with_client(tmp_path, shut)
    with_client(tmp_path, open_, open_metrics=True)


def test_no_auth(tmp_path: Path):
    """Without auth the Host is still checked."""

    async def work(app: App, client: Client) -> None:
        assert (await client.get("/api/counts")).status_code == 200
        assert (
            await client.get("/api/counts", headers={"host": "evil.example"})
        ).status_code == 421

    with_client(tmp_path, work, auth=False)


def test_draining_rejects_new_work(tmp_path: Path):
    """While draining, new work is answered 503 with a closed connection, before the token check;
    reads work.
    """

    async def work(app: App, client: Client) -> None:
        app.runtime.reactor.draining = True
        for path in ("/hooks/orders", "/api/events", "/api/runs"):
            answer = await client.post(path, json={})
            assert (
                answer.status_code == 503
                and answer.headers["connection"] == "close"
                and answer.headers["retry-after"]
            )
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/healthz")).status_code == 200

    with_client(tmp_path, work)


def test_the_description_names_every_route(tmp_path: Path):
    """/openapi.json and the routes are the same list."""
    described = {(method.upper(), path) for method, path, _, _ in OPERATIONS}
    routes = {
        (method, route.path.replace(":path", ""))
        for route in Api(shop(tmp_path), lambda: False).routes()
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert described == routes


def test_mounted(tmp_path: Path):
    """Mounted below a path in another app, open and closed paths stay so."""
    from starlette.applications import Starlette
    from starlette.routing import Mount

    async def go() -> None:
        app = shop(tmp_path)
        outer = Starlette(routes=[Mount("/flows", app=app.asgi(manage=False))])
        async with (
            app,
            Client(transport=httpx2.ASGITransport(outer), base_url="http://localhost") as client,
        ):
            assert (await client.get("/flows/healthz")).status_code == 200
            assert (
                await client.post("/flows/hooks/orders", json={"id": "1", "total": 1})
            ).status_code == 202
            assert (await client.get("/flows/api/runs")).status_code == 401
            assert (await client.get("/flows/api/runs", headers=token(tmp_path))).status_code == 200

    asyncio.run(go())


def test_lifespan_opens_and_closes(tmp_path: Path):
    """`app.asgi()` as a whole server app: its lifespan opens and closes the store; before, the API
    is unavailable.
    """

    async def go() -> None:
        app = shop(tmp_path)
        asgi = app.asgi()
        sent = list[str]()
        inbox: asyncio.Queue[Any] = asyncio.Queue()

        async def send(message: Any) -> None:
            sent.append(message["type"])

        transport = httpx2.ASGITransport(asgi)
        async with Client(transport=transport, base_url="http://localhost") as client:
            assert (await client.get("/readyz")).status_code == 503
            for guess in ("", "\0", "None"):
                assert (
                    await client.get("/api/runs", headers={"authorization": f"Bearer {guess}"})
                ).status_code == 401
            lifespan = asyncio.create_task(
                asgi({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, inbox.get, send)
            )
            inbox.put_nowait({"type": "lifespan.startup"})
            await eventually(lambda: "lifespan.startup.complete" in sent, "it has started")
            assert app.is_open and (await client.get("/readyz")).status_code == 200
            inbox.put_nowait({"type": "lifespan.shutdown"})
            await lifespan
            assert not app.is_open

    asyncio.run(go())


class Broken:
    """A trigger whose endpoint has a defect."""

    name = "broken"

    @property
    def routes(self) -> list[Route]:
        return [Route("/hooks/broken", self)]

    async def listen(self, intake: Intake) -> None:
        await asyncio.get_running_loop().create_future()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("a secret")


def test_s26_a_defect_of_an_endpoint_is_answered_without_its_text(tmp_path: Path):
    """A trigger's endpoint that raises is answered 500 in JSON, with an id and no more."""

    async def go() -> None:
        app = App("shop", store=f"sqlite:///{tmp_path / 'a.db'}")
        app.on(Broken(), note)
        async with app:
            transport = httpx2.ASGITransport(
                make_asgi(app, manage=False), raise_app_exceptions=False
            )
            async with httpx2.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                answer = await client.post("/hooks/broken", json={})
                assert answer.status_code == 500 and answer.json()["error"] == "internal"
                assert "secret" not in answer.text

    asyncio.run(go())
