"""Back-pressure: repeats a write to the ledger while the ledger refuses it with `StoreFull`.

`intake/reactor.py` waits this way for every caller of `Intake.accept`; an intake that wraps another
one (drift monitors, the test ledger of the trigger contract) uses the same function. A trigger does
not: it awaits `accept`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from eventflow.core.errors import StoreFull
from eventflow.core.retry import Backoff

T = TypeVar("T")

FIRST_DELAY_SECONDS = 0.05
MAX_DELAY_SECONDS = 0.5
"""Between two tries, growing by half each time. The longest one bounds how late a waiting call
notices free space, or a shutdown.
"""


async def wait_while_full(write: Callable[[], Awaitable[T]], max_wait: float | None) -> T:
    """The result of `write`, tried at once and then again until it no longer raises StoreFull.

    `max_wait` in seconds; 0 tries once, None waits as long as it takes. Raises the last StoreFull
    once `max_wait` is over, and at once one that is `closing`. A cancel
    between two tries ends the wait with nothing written.
    """
    loop = asyncio.get_running_loop()
    deadline = None if max_wait is None else loop.time() + max_wait
    backoff = Backoff(FIRST_DELAY_SECONDS, factor=1.5, max_delay=MAX_DELAY_SECONDS, jitter=0)
    while True:
        try:
            return await write()
        except StoreFull as full:  # nothing was recorded: the same call may be repeated
            left = MAX_DELAY_SECONDS if deadline is None else deadline - loop.time()
            if full.closing or left <= 0:
                raise
        await asyncio.sleep(min(next(backoff), left))
