"""Threads for plain functions of users. They never keep the process from ending.

A thread cannot be stopped. One whose function nobody waits for any more is *left behind*: it is
counted, and a spare thread takes its place, up to a bound. engine/attempts.py runs plain task
bodies here, sdk/task.py plain calls outside of a run. `ThreadPoolExecutor` does neither: the
interpreter joins its threads before it exits, and a pool that is full of functions that do not
return stays full.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from eventflow.core.forks import call_in_forked_children

MIN_SPARE_THREADS = 8
"""Spare threads that a small pool may start; a larger one, as many as it has threads."""

_Item = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class DaemonThreads:
    """At most `limit` functions at once, apart from those left behind; the others wait in a queue.

    Threads start when needed and stay. Any thread may call any method.
    """

    def __init__(self, limit: int, name: str) -> None:
        self.limit = limit
        self.max_spare = max(MIN_SPARE_THREADS, limit)
        self._name = name
        self._lock = threading.Lock()
        self._queue: SimpleQueue[_Item | None] = SimpleQueue()
        self._threads = 0
        self._idle = 0  # threads that wait for an item and for which none is queued
        self._waiting = 0  # items for which no thread is free
        self._left_behind: set[Future[Any]] = set()
        call_in_forked_children(self._after_fork)

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        """The future of `call(*args)`, which begins as soon as a thread is free."""
        future: Future[Any] = Future()
        with self._lock:
            if self._idle:
                self._idle -= 1
            elif self._threads < self._allowed:
                self._start_thread()
            else:
                self._waiting += 1
            self._queue.put((future, call, args))
        return future

    def leave_behind(self, future: Future[Any]) -> bool:
        """Stops waiting for this function. Returns whether it is running, so that its thread is
        lost until it returns.
        """
        with self._lock:
            if not future.running():
                return False
            self._left_behind.add(future)
            if self._waiting and self._threads < self._allowed:
                self._waiting -= 1
                self._start_thread()
        return True

    @property
    def left_behind(self) -> int:
        """Number of functions that still run although nobody waits for them."""
        return len(self._left_behind)

    @property
    def is_short(self) -> bool:
        """Whether more functions are left behind than spare threads may replace."""
        return len(self._left_behind) > self.max_spare

    @property
    def is_blocked(self) -> bool:
        """Whether functions wait, and every thread is lost."""
        return self._waiting > 0 and len(self._left_behind) >= self._threads

    def close(self) -> None:
        """Cancels what is queued and lets idle threads end."""
        with self._lock:
            while not self._queue.empty():
                item = self._queue.get()
                if item is not None:
                    item[0].cancel()
            self._waiting = 0
            for _ in range(self._threads):
                self._queue.put(None)

    @property
    def _allowed(self) -> int:
        return self.limit + min(len(self._left_behind), self.max_spare)

    def _start_thread(self) -> None:
        self._threads += 1
        threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            future, call, args = item
            del item
            _run(future, call, args)
            with self._lock:
                self._left_behind.discard(future)
                del future, call, args  # not kept until the next one
                if self._threads > self._allowed:  # the one that replaced this thread stays
                    self._threads -= 1
                    return
                if self._waiting:
                    self._waiting -= 1
                else:
                    self._idle += 1

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._queue = SimpleQueue()
        self._threads = 0
        self._idle = 0
        self._waiting = 0
        self._left_behind = set()


def _run(future: Future[Any], call: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        value = call(*args)
    except BaseException as error:  # user code: whoever waits gets it, the thread lives on
        future.set_exception(error)
        del future  # breaks a cycle: the future holds the error, and the error this frame
    else:
        future.set_result(value)
