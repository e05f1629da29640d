"""`task.map`: calls for many items, a bounded number at a time, without an asyncio task for each.

`Execution.perform_all` makes one `TaskMap` per map and awaits `run`. The first item whose attempts
are exhausted stops new ones, unless exceptions are to be returned; those that run, end. Memory and
time are linear in the number of items.
"""

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any

from eventflow.sdk.task import TaskCall, settle_map


class TaskMap:
    """One map. `request` makes a call pending and returns its future, `give_up` ends the wait for
    it.
    """

    __slots__ = (
        "_calls",
        "_failed",
        "_give_up",
        "_patient",
        "_progress",
        "_request",
        "_results",
        "_running",
        "map_name",
    )

    def __init__(
        self,
        name: str,
        calls: Iterable[TaskCall],
        request: Callable[[TaskCall], asyncio.Future[Any]],
        give_up: Callable[[TaskCall], None],
        *,
        patient: bool,
    ) -> None:
        self.map_name = name
        self._calls = iter(calls)
        self._request = request
        self._give_up = give_up
        self._patient = patient
        self._results: list[Any] = []
        self._running: dict[int, TaskCall] = {}
        self._failed = False
        self._progress = asyncio.Event()

    async def run(self, limit: int) -> list[Any]:
        """The values in the order of the items. Raises an ExceptionGroup of all errors; if patient,
        they are among the values.
        """
        try:
            while True:
                if not self._failed or self._patient:
                    for call in islice(self._calls, limit - len(self._running)):
                        self._start(call)
                if not self._running:
                    return settle_map(self.map_name, self._results, self._patient)
                self._progress.clear()
                await self._progress.wait()
        except BaseException:
            for call in self._running.values():
                self._give_up(call)
            raise

    # The label of the asyncio task that a flow may make of it (loop/scopes.py): stored journals
    # depend on it.
    run.__qualname__ = "Window.run"

    def _start(self, call: TaskCall) -> None:
        index = len(self._results)
        self._results.append(None)
        self._running[index] = call
        self._request(call).add_done_callback(partial(self._on_done, index))

    def _on_done(self, index: int, future: asyncio.Future[Any]) -> None:
        self._running.pop(index, None)
        if not future.cancelled():
            error = future.exception()
            self._results[index] = future.result() if error is None else error
            self._failed = self._failed or error is not None
        self._progress.set()
