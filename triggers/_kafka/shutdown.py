"""What aiokafka leaves open when it is cut short, and how it is closed all the same. For client.py and producer.py.

Its `bootstrap` drops its connection when it is cancelled, its `stop` skips the connections when it is. So here a cancel waits a
little for what is under way, and `hang_up` closes whatever is left, without waiting for anybody.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

BOOTSTRAP = 3.0
"""Seconds a cancel waits for the first answer of a broker. Later the connection is left to the garbage collector."""


async def to_its_end(work: Coroutine[Any, Any, None], seconds: float) -> None:
    """Runs it also when cancelled meanwhile, for `seconds` more at most; then the cancel goes on."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await ends(task, seconds)
        raise


async def ends(task: asyncio.Future[None], seconds: float) -> bool:
    """Whether it ended well, and in time; if not in time, it is cancelled."""
    await asyncio.wait([task], timeout=seconds)
    if not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=seconds)
    return task.done() and not task.cancelled() and task.exception() is None


def with_whole_bootstrap(client: Any) -> None:
    """From here on the client's first connection is closed also when its start is cancelled."""
    bootstrap: Callable[[], Coroutine[Any, Any, None]] = client.bootstrap

    def whole() -> Awaitable[None]:
        return to_its_end(bootstrap(), BOOTSTRAP)

    client.bootstrap = whole


def hang_up(client: Any) -> None:
    """Ends the client's own task and closes its connections; what waits for an answer gets an error."""
    if client._sync_task is not None:
        client._sync_task.cancel()
    for connection in client._conns.values():
        connection.close()
