"""Closes what aiokafka leaves open when it is cancelled: for client.py, producer.py, session.py.

aiokafka's `bootstrap` drops its connection when it is cancelled, and its `stop` then skips the
connections. So here a cancel waits a short time for the current work, and `close_connections`
closes the rest without waiting.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

BOOTSTRAP_TIMEOUT_SECONDS = 3.0
"""That a cancel waits for the first answer of a broker. After it, the garbage collector closes the
connection.
"""


async def finish_despite_cancel(work: Coroutine[Any, Any, None], seconds: float) -> None:
    """Runs `work`. A cancel waits up to `seconds` for it to finish, then is raised."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:  # raised again once the work has finished
        await wait_or_cancel(task, seconds)
        raise


async def wait_or_cancel(task: asyncio.Future[None], seconds: float) -> bool:
    """Whether the task returned within `seconds`; after that it is cancelled."""
    await asyncio.wait([task], timeout=seconds)
    if not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=seconds)
    return task.done() and not task.cancelled() and task.exception() is None


def finish_bootstrap_despite_cancel(client: Any) -> None:
    """Makes the client close its first connection also when its start is cancelled."""
    bootstrap: Callable[[], Coroutine[Any, Any, None]] = client.bootstrap

    def whole() -> Awaitable[None]:
        return finish_despite_cancel(bootstrap(), BOOTSTRAP_TIMEOUT_SECONDS)

    client.bootstrap = whole


def close_connections(client: Any) -> None:
    """Cancels the client's own task and closes its connections; pending requests get an error."""
    if client._sync_task is not None:
        client._sync_task.cancel()
    for connection in client._conns.values():
        connection.close()
