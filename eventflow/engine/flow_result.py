"""A flow's own result on its way out, before the run settles.

The executor makes a `Returned` of what a flow returned, and asks for its outcome again after each wake until there is one. A
large one goes to a file beside the store at once, or to a bucket off the loop, so that no other flow waits for it. When the
bucket does not answer for a minute the run is suspended, and tried again from its journal. Next room: `blobs.py`.
"""

from typing import Protocol

from eventflow.core.clock import SECOND
from eventflow.core.errors import ResultsUnavailable
from eventflow.engine.worker_services import Pool
from eventflow.logs.log import get_logger
from eventflow.runs.journal import Journal
from eventflow.runs.run import Completed, Outcome, Suspended
from eventflow.serialization.blobs import LARGE, offload

RESULT_RETRY_DELAY = 30 * SECOND
"""Microseconds until a run whose results cannot be stored or read is tried again."""

log = get_logger("eventflow.executor")


class Ending(Protocol):
    """What is needed of the execution."""

    pool: Pool
    journal: Journal
    name: str
    working: int

    def wake(self) -> None: ...


class Returned:
    """The encoded result of one execution's flow, and what its run has come to; None while it is on its way."""

    __slots__ = ("outcome",)

    def __init__(self, run: Ending, codec: str, data: bytes) -> None:
        """Raises StoreFailed when the disk refuses a large one."""
        self.outcome: Outcome | None = None
        if len(data) <= LARGE:
            self.outcome = _completed(run, codec, data)
        elif not run.pool.blobs.is_far:
            self.outcome = _completed(run, *run.pool.blobs.offload(codec, data))
        else:
            run.working += 1
            run.pool.spawn(self._leave(run, codec, data))

    async def _leave(self, run: Ending, codec: str, data: bytes) -> None:
        try:
            self.outcome = _completed(
                run, *await offload(run.pool.blobs, codec, data, log.bind(run=run.name))
            )
        except ResultsUnavailable:
            self.outcome = later(run.pool, run.journal)
        finally:
            run.working -= 1
        run.wake()


def _completed(run: Ending, codec: str, data: bytes) -> Outcome:
    return Completed(data, codec, len(run.journal.orphans))


def later(pool: Pool, journal: Journal) -> Outcome:
    """Not now: the place of large results does not answer."""
    return Suspended(pool.clock.now() + RESULT_RETRY_DELAY, journal.last_batch, journal.count)
