"""A flow's result that is too large for a row, while it is being stored.

`RunEnd` makes one when a flow returns more than `OFFLOAD_BYTES`. The values themselves are kept by
serialization/blobs.py.
"""

from collections.abc import Callable

from eventflow.core.clock import SECOND
from eventflow.core.errors import ResultsUnavailable
from eventflow.engine.worker_services import WorkerServices
from eventflow.logs.log import get_logger
from eventflow.runs.journal import Journal
from eventflow.runs.run import Completed, Outcome, Suspended
from eventflow.serialization.blobs import offload

RESULT_RETRY_DELAY = 30 * SECOND
"""Microseconds until a run whose results cannot be stored or read is tried again."""

log = get_logger("eventflow.execution")


class LargeResult:
    """The encoded result of a flow that is too large for a row; `outcome` is None while it is being
    stored.

    It goes to a file beside the store at once. Where large results are kept elsewhere, it is stored
    off the loop, so that no other flow waits for it: `on_stored` is called then. If that place does
    not answer for a minute, the outcome is `Suspended`, and the run is tried again from its
    journal.
    """

    __slots__ = ("_journal", "_name", "_on_stored", "_services", "outcome")

    def __init__(
        self, services: WorkerServices, name: str, journal: Journal, on_stored: Callable[[], None]
    ) -> None:
        self._services = services
        self._name = name
        self._journal = journal
        self._on_stored = on_stored
        self.outcome: Outcome | None = None

    def store(self, codec: str, data: bytes) -> None:
        """Raises StoreFailed when the disk refuses it."""
        blobs = self._services.blobs
        if blobs.is_remote:
            self._services.spawn(self._upload(codec, data))
        else:
            self._complete(*blobs.offload(codec, data))

    async def _upload(self, codec: str, data: bytes) -> None:
        bound = log.bind(run=self._name)
        try:
            self._complete(*await offload(self._services.blobs, codec, data, bound))
        except ResultsUnavailable:
            self.outcome = retry_later(self._services, self._journal)
        finally:
            self._on_stored()

    def _complete(self, codec: str, data: bytes) -> None:
        self.outcome = Completed(data, codec, len(self._journal.unclaimed))


def retry_later(services: WorkerServices, journal: Journal) -> Outcome:
    """The outcome of a run whose large results cannot be stored or read now."""
    due = services.clock.now() + RESULT_RETRY_DELAY
    return Suspended(due, journal.last_batch, journal.count)
