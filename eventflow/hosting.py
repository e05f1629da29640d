"""What `async with app:` adds to `App.open`: the log store of the runs, and other workers.

`App` makes one `Hosting`. The lifespan of `app.asgi()` is `async with app:` too; `eventflow serve`
has a log store of its own and calls `App.open`.
"""

import asyncio
from collections.abc import Awaitable, Callable

from eventflow.core.clock import Clock
from eventflow.core.errors import StoreLocked
from eventflow.core.siblings import is_sibling_worker
from eventflow.logs.log import LogReceiver, get_logger

log = get_logger("eventflow.app")
LOG_EVENTS = {
    "app.locked_by_worker": (
        "Another worker of the same server has the app's store; this one answers 503 (`uvicorn "
        "--workers 2`)."
    ),
}


class Hosting:
    """`locked`: why the App stayed closed, if another worker of the same server has its store."""

    def __init__(self) -> None:
        self.locked: StoreLocked | None = None
        self._close_logs: Callable[[], None] | None = None

    async def open(
        self, app: str, url: str, clock: Clock, open_app: Callable[[LogReceiver], Awaitable[None]]
    ) -> None:
        """Calls `open_app` with a log store beside the store.

        If another worker of the same server has the store, this logs why and returns: raising would
        stop the server, and with it the other worker. Raises what `open_app` raises.
        """
        from eventflow.logs.store import LogStore  # loaded when an App opens
        from eventflow.store.url import open_store

        self.locked = None
        logs = LogStore(f"{open_store(url, clock).path}.logs.db", clock=clock)
        logs.open()
        try:
            await open_app(logs)
            self._close_logs = logs.close
        except StoreLocked as error:
            if not is_sibling_worker(error.pid):
                raise
            self.locked = error
            log.error(
                "app.locked_by_worker",
                app=app,
                pid=error.pid,
                store=url,
                hint="one process serves an app: run one worker; this one answers 503",
            )
        finally:
            if self._close_logs is None:
                await asyncio.to_thread(logs.close)

    async def close(self) -> None:
        """Closes the log store; idempotent."""
        close = self._close_logs
        self._close_logs = None
        if close is not None:
            await asyncio.to_thread(close)
