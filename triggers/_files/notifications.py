"""What the kernel says has changed: the fast but forgetful half of the files trigger.

inotify (through watchfiles' Rust notifier) loses events when its queue overflows, says nothing of files made right after
their directory, and falls silent when the root is replaced; so a hint only ever says where to look, and `gap` says to look
everywhere. `listener.py` gives it the list of directories after each walk: watching them one by one, not recursively, makes the
watches ours to account for (nothing ignored, moved away or behind a symlink is watched) and keeps the notifier from walking
1,000,000 files with the interpreter lock held. The thread comes from a limiter of its own, so that it starves nobody.
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

QUIET_MS, BATCH_MS = 50, 400
"""A batch of hints ends after this much quiet, or at this age."""

MANY = 2_000
"""A batch larger than this may have overflowed the kernel's queue (16,384 by default): look everywhere instead."""

FAILURES = 2
"""Deaths of the notifier before polling takes over for good (a name that is not UTF-8 kills it every time)."""

_FAULTS = (OSError, RuntimeError)
"""What the notifier raises; RuntimeError is the base of whatever its Rust side cannot name better."""


@dataclass(eq=False)
class _Watch:
    """One notifier and the task that reads it. A retired one ends after the batch it is gathering."""

    notifier: Any
    limiter: anyio.CapacityLimiter
    retired: bool = False


class Hints:
    """Paths that may have changed since they were last taken. Lives on one loop; `close` it."""

    def __init__(self, root: bytes, wake: Callable[[], None]) -> None:
        self._root, self._wake = root, wake
        self._paths: set[str] = set()
        self._covered: dict[bytes, int] = {}
        self._tasks: dict[_Watch, asyncio.Task[None]] = {}
        self._failures = 0
        self.gap = False
        """Whether something may have been missed."""
        self.refused: str | None = None
        """Why this root cannot be watched; polling must do."""

    def take(self) -> list[bytes]:
        """The hinted paths, absolute; forgets them."""
        taken = [os.fsencode(path) for path in self._paths]
        self._paths.clear()
        return taken

    def covers(self, directory: bytes) -> bool:
        return directory in self._covered

    async def cover(self, directories: Mapping[bytes, int]) -> list[bytes]:
        """Watches exactly these (path below the root → inode), and returns those not watched before: walk them once more.

        The new watch stands before the old one retires, so nothing falls between. On failure nothing is watched: `gap`, and
        after a failure that will not heal, `refused`.
        """
        wanted = {
            path: inode
            for path, inode in directories.items()
            if is_utf8(os.path.join(self._root, path))
        }
        if self.refused is not None or wanted == self._covered:
            return []
        fresh = [path for path, inode in wanted.items() if self._covered.get(path) != inode]
        limiter = anyio.CapacityLimiter(1)
        try:
            notifier = await anyio.to_thread.run_sync(
                partial(self._open, list(wanted)), limiter=limiter
            )
        except _FAULTS as error:
            self._failed(error)
            return []
        for old in self._tasks:
            old.retired = True
        self._covered = wanted
        watch = _Watch(notifier, limiter)
        self._tasks[watch] = asyncio.get_running_loop().create_task(
            self._follow(watch), name="eventflow files watch"
        )
        return fresh

    def _open(self, directories: list[bytes]) -> Any:
        paths = [
            os.fsdecode(os.path.join(self._root, path) if path else self._root)
            for path in directories
        ]
        return RustNotify(
            paths, False, False, 0, False, False
        )  # debug, polling, its interval, recursive, errors ignored

    async def _follow(self, watch: _Watch) -> None:
        stop = threading.Event()
        wait = partial(watch.notifier.watch, BATCH_MS, QUIET_MS, 1_000, stop)
        try:
            while not watch.retired:
                found = await anyio.to_thread.run_sync(
                    wait, limiter=watch.limiter, abandon_on_cancel=True
                )
                if isinstance(found, set):
                    self._add(cast("set[tuple[int, str]]", found))
        except _FAULTS as error:
            if not watch.retired:
                self._failed(error)
        finally:
            stop.set()  # the thread looks at it every 50 ms
            del self._tasks[watch]

    def _add(self, found: set[tuple[int, str]]) -> None:
        prefix = len(self._root.rstrip(b"/")) + 1
        for change, path in found:
            if (
                change != Change.modified
            ):  # a directory that was deleted, moved or made anew is not watched any more
                self._covered.pop(os.fsencode(path)[prefix:], None)
        if len(found) > MANY or len(self._paths) > 10 * MANY:
            self.gap = True
            self._paths.clear()
        else:
            self._paths.update(path for _, path in found)
        self._wake()

    def _failed(self, error: Exception) -> None:
        """Nothing is watched now. A directory that vanished heals with the next walk; the rest is counted."""
        self._covered, self.gap = {}, True
        for watch in self._tasks:
            watch.retired = True
        reason = str(error)
        self._failures += not isinstance(error, FileNotFoundError)
        if "watch limit" in reason or "No space left" in reason:
            self.refused = f"the kernel's limit of watches is reached ({reason}); raise the sysctl fs.inotify.max_user_watches"
        elif "os error 24" in reason:
            self.refused = f"no inotify instance is left ({reason}); raise the sysctl fs.inotify.max_user_instances"
        elif self._failures >= FAILURES:
            self.refused = reason
        self._wake()

    async def close(self) -> None:
        """Stops watching. What was hinted stays."""
        self._covered = {}
        if tasks := list(self._tasks.values()):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
