"""File system notifications from the kernel: the fast but unreliable source of the files trigger.

inotify (through watchfiles' Rust notifier) loses events when its queue overflows, does not report
files made right after their directory, and stops when the root is replaced. So a notification only
says which path to stat, and `may_have_missed` requests a whole walk. After each walk, listener.py
passes the list of directories. They are watched one by one, not recursively: so no ignored, moved
or linked directory is watched, and the notifier does not walk 1,000,000 files with the interpreter
lock held. Its thread has its own limiter.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import anyio.to_thread
from watchfiles import Change
from watchfiles._rust_notify import RustNotify

from triggers._files.names import is_utf8

DEBOUNCE_MS = 50
"""Without a change, after which a batch of changes ends."""

MAX_BATCH_MS = 400
"""After which a batch of changes ends in any case."""

MAX_BATCH_PATHS = 2_000
"""A larger batch may have overflowed the kernel's queue (16,384 by default): a whole walk follows.
"""

MAX_FAILURES = 2
"""Of the notifier, before the trigger polls permanently (a name that is not UTF-8 stops it each
time).
"""

_NOTIFIER_ERRORS = (OSError, RuntimeError)
"""The notifier's errors; RuntimeError is the base of unclassified errors of its Rust code."""


@dataclass(eq=False)
class _Watcher:
    """One notifier. A retired one ends after its current batch."""

    notifier: Any
    limiter: anyio.CapacityLimiter
    retired: bool = False


class FsNotifications:
    """Paths that may have changed since the last `drain`. Belongs to one loop; call `close`."""

    def __init__(self, root: bytes, wake: Callable[[], None]) -> None:
        self._root: bytes = root
        self._wake: Callable[[], None] = wake
        self._paths: set[str] = set()
        self._watched: dict[bytes, int] = {}
        self._tasks: dict[_Watcher, asyncio.Task[None]] = {}
        self._failures: int = 0
        self.may_have_missed: bool = False
        self.unavailable_reason: str | None = None  # why this root has to be polled

    def drain(self) -> list[bytes]:
        """The changed paths, absolute; removes them here."""
        changed = [os.fsencode(path) for path in self._paths]
        self._paths.clear()
        return changed

    def is_watched(self, directory: bytes) -> bool:
        return directory in self._watched

    async def watch(self, directories: Mapping[bytes, int]) -> list[bytes]:
        """Watches exactly these (path below the root → inode). Returns those not watched before,
        which need another walk.

        The new notifier starts before the old one retires, so no change is lost in between. After a
        failure nothing is watched: `may_have_missed` is set, and after a permanent failure
        `unavailable_reason`.
        """
        wanted = {
            path: inode
            for path, inode in directories.items()
            if is_utf8(os.path.join(self._root, path))
        }
        if self.unavailable_reason is not None or wanted == self._watched:
            return []
        added = [path for path, inode in wanted.items() if self._watched.get(path) != inode]
        limiter = anyio.CapacityLimiter(1)
        try:
            notifier = await anyio.to_thread.run_sync(
                partial(self._open, list(wanted)), limiter=limiter
            )
        except _NOTIFIER_ERRORS as error:
            self._on_failure(error)
            return []
        for old in self._tasks:
            old.retired = True
        self._watched = wanted
        watch = _Watcher(notifier, limiter)
        self._tasks[watch] = asyncio.get_running_loop().create_task(
            self._follow(watch), name="eventflow files watch"
        )
        return added

    def _open(self, directories: list[bytes]) -> Any:
        paths = [
            os.fsdecode(os.path.join(self._root, path) if path else self._root)
            for path in directories
        ]
        return RustNotify(
            paths, False, False, 0, False, False
        )  # debug, polling, its interval, recursive, errors ignored

    async def _follow(self, watch: _Watcher) -> None:
        stop = threading.Event()
        wait = partial(watch.notifier.watch, MAX_BATCH_MS, DEBOUNCE_MS, 1_000, stop)
        try:
            while not watch.retired:
                found = await anyio.to_thread.run_sync(
                    wait, limiter=watch.limiter, abandon_on_cancel=True
                )
                if isinstance(found, set):
                    self._add(cast("set[tuple[int, str]]", found))
        except _NOTIFIER_ERRORS as error:  # the retired one's are of no interest
            if not watch.retired:
                self._on_failure(error)
        finally:
            stop.set()  # the thread checks it every 50 ms
            del self._tasks[watch]

    def _add(self, found: set[tuple[int, str]]) -> None:
        prefix = len(self._root.rstrip(b"/")) + 1
        for change, path in found:
            if change != Change.modified:  # a directory made, moved or deleted: not watched now
                self._watched.pop(os.fsencode(path)[prefix:], None)
        if len(found) > MAX_BATCH_PATHS or len(self._paths) > 10 * MAX_BATCH_PATHS:
            self.may_have_missed = True
            self._paths.clear()
        else:
            self._paths.update(path for _, path in found)
        self._wake()

    def _on_failure(self, error: Exception) -> None:
        """Nothing is watched now. A removed directory is no longer watched after the next walk;
        other errors are counted.
        """
        self._watched = {}
        self.may_have_missed = True
        for watch in self._tasks:
            watch.retired = True
        reason = str(error)
        self._failures += not isinstance(error, FileNotFoundError)
        if "watch limit" in reason or "No space left" in reason:
            self.unavailable_reason = (
                f"the kernel's limit of watches is reached ({reason}); "
                "raise the sysctl fs.inotify.max_user_watches"
            )
        elif "os error 24" in reason:
            self.unavailable_reason = (
                f"no inotify instance is left ({reason}); "
                "raise the sysctl fs.inotify.max_user_instances"
            )
        elif self._failures >= MAX_FAILURES:
            self.unavailable_reason = reason
        self._wake()

    async def close(self) -> None:
        """Stops watching. `drain` still returns the changes before."""
        self._watched = {}
        if tasks := list(self._tasks.values()):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
