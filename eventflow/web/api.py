"""The HTTP application: the triggers' own routes, the JSON API under `/api`, health and metrics.

    request ─► Guard (auth.py) ─► handler (handlers.py) ─► App / store / actions.py ─► JSON

`App.asgi()` and server/server.py call `make_asgi`. Errors are `{"error", "detail"}` (responses.py);
openapi.py describes every route.
"""

import secrets
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from eventflow.app import App
from eventflow.core.declarations import declaration
from eventflow.core.errors import StoreLocked, UsageError
from eventflow.logs.log import get_logger
from eventflow.store.key_files import load_or_create_secret
from eventflow.store.url import open_store
from eventflow.web.auth import Guard
from eventflow.web.backfill import Backfill
from eventflow.web.dry_run import DryRun
from eventflow.web.handlers import (
    DeadLetterHandlers,
    EventHandlers,
    LedgerHandlers,
    RunHandlers,
    TriggerHandlers,
)
from eventflow.web.metrics import render
from eventflow.web.openapi import describe_api
from eventflow.web.responses import (
    ApiRoute,
    Handler,
    Json,
    error_json,
    http_error,
    internal_error,
    unavailable,
    with_error_responses,
)

log = get_logger("eventflow.web")
LOG_EVENTS = {
    "app.not_open": (
        "Requests arrive, but the host of `app.asgi()` never opened the app; they are answered 503."
    ),
}


@declaration
def make_asgi(
    app: App,
    *,
    auth: bool = True,
    allowed_hosts: Collection[str] = (),
    open_metrics: bool = False,
    manage: bool = True,
    draining: Callable[[], bool] = lambda: False,
) -> ASGIApp:
    """The ASGI app of an App.

    `auth=False` requires no token. `allowed_hosts`: host names besides the loopback ones. `manage`:
    the lifespan opens and closes the App; otherwise the caller does. `draining` returns True once a
    stop was requested.
    """
    hooks: list[BaseRoute] = [
        route for trigger in app.triggers for route in getattr(trigger, "routes", ())
    ]
    api = Api(app, draining)
    inner = Starlette(
        routes=[*hooks, *api.routes(), *api.old_routes()],
        exception_handlers={404: _not_found, 405: _wrong_method, Exception: internal_error},
        lifespan=api.lifespan if manage else None,
    )
    inner.router.redirect_slashes = False
    return Guard(
        inner,
        routes=hooks,
        token=api.token if auth else lambda: None,
        hosts=allowed_hosts,
        open_paths=("/metrics",) if open_metrics else (),
        draining=api.is_draining,
        unopened=api.is_unopened,
        clock=app.clock.monotonic,
    )


async def _not_found(request: Request, _error: Exception) -> Response:
    return error_json(
        404, "not_found", f"nothing is at {request.url.path}; /openapi.json lists what there is"
    )


async def _wrong_method(request: Request, error: Exception) -> Response:
    headers = error.headers if isinstance(error, HTTPException) else None
    detail = f"{request.url.path} does not take {request.method}"
    return error_json(405, "method_not_allowed", detail, allow=(headers or {}).get("Allow", ""))


class Api:
    """The routes of one App, its token and its lifespan."""

    def __init__(self, app: App, draining: Callable[[], bool]) -> None:
        self.app = app
        self._stop_requested = draining
        self._was_opened = False
        self._has_warned = False
        self._token: str | None = None
        self._unknown_token: str = secrets.token_urlsafe(32)  # required until the App is open
        self._events = EventHandlers(self.opened)
        self._runs = RunHandlers(self.opened)
        self._dead_letters = DeadLetterHandlers(self.opened)
        self._triggers = TriggerHandlers(self.opened)
        self._ledger = LedgerHandlers(self.opened)
        self._backfill = Backfill(self.opened)
        self._dry_run = DryRun(self.opened)

    def routes(self) -> list[BaseRoute]:
        """Every route that openapi.py describes."""
        return make_routes(
            [
                ("GET", "/healthz", self.healthz),
                ("GET", "/readyz", self.readyz),
                ("GET", "/metrics", self.metrics),
                ("GET", "/openapi.json", self.openapi),
                *self._events.table(),
                *self._runs.table(),
                *self._dead_letters.table(),
                *self._triggers.table(),
                *self._backfill.table(),
                *self._dry_run.table(),
                *self._ledger.table(),
            ]
        )

    def old_routes(self) -> list[BaseRoute]:
        """Former paths, with the answers they had; not described."""
        return make_routes(
            [
                ("GET", "/api/outlets", self._triggers.sinks_by_old_name),
                ("GET", "/api/foresight", self._dry_run.dry_run),
            ]
        )

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        """Opens the App, and the log store of its runs, on the server's own loop."""
        self._was_opened = True
        async with self.app:
            yield

    def is_unopened(self) -> bool:
        """Whether the host never opened the App, and no other worker of it has the store."""
        if self._was_opened:
            return False
        if is_open_anywhere(self.app):
            self._was_opened = True
            return False
        if not self._has_warned:
            self._has_warned = True
            log.error(
                "app.not_open",
                app=self.app.name,
                hint="a mounted app has no lifespan: write `async with app:` in the host's",
            )
        return True

    def token(self) -> str | None:
        """Read, or made, once: the store's directory exists when the App is open."""
        if self._token is None and self.app.is_open:
            self._token = load_or_create_secret(self.app.store.path, "token")
        return self._token or self._unknown_token

    def is_draining(self) -> bool:
        return self._stop_requested() or (self.app.is_open and self.app.runtime.reactor.draining)

    def opened(self) -> App:
        """The App. HttpError (503) while it is closed."""
        if not self.app.is_open:
            raise http_error(503, "unavailable", "the app is not open", retry_after="1")
        return self.app

    # ----------------------------------------------------------------- health and metrics

    async def healthz(self, _: Request) -> Response:
        """The process is alive, whatever the state of its store."""
        return Json({"ok": True})

    async def readyz(self, _: Request) -> Response:
        """Events are accepted and processed: the App is open, not draining, its store neither
        failed nor full, and all its threads and loops respond.
        """
        if self.is_draining():
            return unavailable("draining")
        app = self.app
        if not app.is_open:
            return unavailable("starting")
        if app.store.failed is not None:
            return unavailable("the store failed")
        if (full := app.store.capacity()) is not None:
            return unavailable(str(full))
        if reason := app.runtime.unready_reason:
            return unavailable(reason)
        pause_reason = app.runtime.worker.pause_reason
        return Json({"ready": True, **({"worker": pause_reason} if pause_reason else {})})

    async def metrics(self, _: Request) -> Response:
        body, media_type = await render(self.opened())
        return Response(body, media_type=media_type)

    async def openapi(self, _: Request) -> Response:
        return Json(describe_api(self.app))


def store_path(app: App) -> str:
    """The path of the store of an App that may not be open yet."""
    return open_store(app.url, app.clock).path


def make_routes(table: Collection[ApiRoute]) -> list[BaseRoute]:
    """One Starlette route per path, in the order of the table; errors become responses."""
    by_path: dict[str, dict[str, Handler]] = {}
    for method, path, handler in table:
        by_path.setdefault(path, {})[method] = with_error_responses(handler)
    return [
        Route(path, _by_method(methods), methods=list(methods)) for path, methods in by_path.items()
    ]


def _by_method(handlers: dict[str, Handler]) -> Handler:
    async def handle(request: Request) -> Response:
        return await handlers["GET" if request.method == "HEAD" else request.method](request)

    return handle


def is_open_anywhere(app: App) -> bool:
    """Whether the App is open, in this process or in another worker of the server."""
    try:
        return bool(app.runtime)
    except StoreLocked:
        return True
    except UsageError:
        return False
