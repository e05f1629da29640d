"""What the parts of one opened `Directory` share: options, tree, files, one worker thread.

`Listener` builds one `DirectoryContext`; `RootMonitor`, `TreeWalks` and `FileRecorder` read it.
Only the listener's coroutine uses it, so nothing here is locked; everything that blocks runs in the
worker thread, one call at a time.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import anyio
import anyio.to_thread

from eventflow.core.clock import Clock
from eventflow.logs.progress import Progress, log_progress
from triggers._files.names import NameFilter, printable
from triggers._files.settling import FileStat, KnownFiles, SettlingFiles
from triggers._files.tree import Tree

LOG_EVENTS = {
    "directory.permission_denied": (
        "A file or folder under a watched directory is not readable; each scan tries again."
    ),
}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class OutcomeTargets:
    """Where files go once their runs have ended: absolute directories, None to leave them."""

    completed: bytes | None
    failed: bytes | None
    deletes_completed: bool
    deletes_failed: bool

    def of(self, outcome: str) -> tuple[bytes | None, bool]:
        """The directory for an outcome, and whether the file is deleted instead."""
        match outcome:
            case "completed":
                return self.completed, self.deletes_completed
            case "failed":
                return self.failed, self.deletes_failed
            case _:
                return None, False


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryOptions:
    """The checked options of a `Directory`. `root` and `move_to` are absolute; durations are in
    seconds.

    `removes_source`: whether a recorded file loses its landing name at once (`after=move(...)` or
    `after=delete()`). `outcome`: what happens to it when its runs have ended.
    """

    root: bytes
    names: NameFilter
    removes_source: bool
    move_to: bytes | None
    outcome: OutcomeTargets | None
    skip_existing: bool
    watch: str
    rescan: float
    poll: float
    settle: float
    zero_byte_grace: float
    recursive: bool
    follow_symlinks: bool
    deleted: bool
    touch: bool
    sha256: bool
    clock: Clock


@dataclass(frozen=True, slots=True)
class DirectoryContext:
    """`limiter` admits one thread at a time. `denied`: paths that are known to be unreadable."""

    options: DirectoryOptions
    tree: Tree
    known: KnownFiles
    settling: SettlingFiles
    log: Any
    limiter: anyio.CapacityLimiter
    denied: set[bytes] = field(default_factory=set[bytes])

    def progress(self, verb: str, total: int) -> Progress:
        """A bar over files of this directory, where log lines go to a terminal."""
        folder = printable(os.path.basename(self.tree.root))
        return log_progress(f"{verb} {folder}/", total)

    def warn_denied(self, path: bytes, reason: str) -> None:
        """One line for each unreadable path, however often it is tried."""
        if path not in self.denied:
            self.denied.add(path)
            full = printable(self.tree.full(path))
            self.log.warning("directory.permission_denied", path=full, reason=reason)

    @property
    def clock(self) -> Clock:
        return self.options.clock

    async def run_blocking(self, call: Callable[..., T], *args: Any) -> T:
        """The result of `call(*args)` from the worker thread. A cancel does not wait for the
        thread.
        """
        value, error = await anyio.to_thread.run_sync(
            _value_or_error, call, args, limiter=self.limiter, abandon_on_cancel=True
        )
        if error is None:
            return cast(T, value)
        try:
            raise error
        finally:  # breaks a cycle: the error refers to this frame
            del error

    def observe(
        self, observations: Sequence[tuple[bytes, FileStat | None]], started_at: float
    ) -> None:
        """Passes stats to the settling files. `started_at`: monotonic instant before the first of
        them was taken.
        """
        ended_at = self.clock.monotonic()
        now_us = self.clock.now()
        for path, stat in observations:
            self.settling.observe(path, stat, before=started_at, after=ended_at, now_us=now_us)


def _value_or_error(
    call: Callable[..., T], args: tuple[Any, ...]
) -> tuple[T | None, BaseException | None]:
    """Returns an error as a value: anyio would keep a raised one in a frame that it refers to."""
    try:
        return call(*args), None
    except BaseException as error:  # raised again by the caller
        return None, error
