"""`task.map`: a window of calls that moves over the items, without an asyncio task for each.

The executor makes one per map and awaits `run`. Up to `limit` calls are out at a time. The first exhausted item stops new ones,
unless the caller is patient; those that run, end. Memory and time are linear in the number of items.
"""

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any

from eventflow.sdk.task import TaskCall, settle_map


class Window:
    """One map under way. `request` wants a call of the journal, `abandon` gives one up."""

    __slots__ = (
        "_abandon",
        "_failed",
        "_more",
        "_name",
        "_out",
        "_patient",
        "_request",
        "_results",
        "_source",
    )

    def __init__(
        self,
        name: str,
        calls: Iterable[TaskCall],
        request: Callable[[TaskCall], asyncio.Future[Any]],
        abandon: Callable[[TaskCall], None],
        *,
        patient: bool,
    ) -> None:
        self._name, self._source, self._request, self._abandon, self._patient = (
            name,
            iter(calls),
            request,
            abandon,
            patient,
        )
        self._results: list[Any] = []
        self._out: dict[int, TaskCall] = {}
        self._failed = False
        self._more = asyncio.Event()

    async def run(self, limit: int) -> list[Any]:
        """The values in the order of the items. An ExceptionGroup of what failed; if patient, the errors among the values."""
        try:
            while True:
                if not self._failed or self._patient:
                    for call in islice(self._source, limit - len(self._out)):
                        self._send(call)
                if not self._out:
                    return settle_map(self._name, self._results, self._patient)
                self._more.clear()
                await self._more.wait()
        except BaseException:
            for call in self._out.values():
                self._abandon(call)
            raise

    def _send(self, call: TaskCall) -> None:
        place = len(self._results)
        self._results.append(None)
        self._out[place] = call
        self._request(call).add_done_callback(partial(self._take, place))

    def _take(self, place: int, future: asyncio.Future[Any]) -> None:
        self._out.pop(place, None)
        if not future.cancelled():
            error = future.exception()
            self._results[place] = future.result() if error is None else error
            self._failed = self._failed or error is not None
        self._more.set()
