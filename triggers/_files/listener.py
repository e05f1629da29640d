"""One opened `Directory`: the loop over notifications, walks and settled files.

    FsNotifications ─┐
                     ├─► SettlingFiles ─► FileRecorder ─► Intake.accept ─► move or delete
    TreeWalks ───────┘

`Directory.listen` opens a `Listener` and calls `run_once` and `wait` in turn. One coroutine does
everything in sequence, so nothing is locked; what blocks runs in a thread, one call at a time. All
knowledge comes from the cursor at `open`, and changes only after `accept` has returned. See
settling.py (the state machine), walks.py and recorder.py.
"""

import asyncio
import os
import socket
from collections.abc import Mapping
from urllib.parse import quote

import anyio
import anyio.to_thread

from eventflow.core.clock import sleep_for
from eventflow.events.event import Intake, Json
from triggers._files.context import DirectoryContext, DirectoryOptions
from triggers._files.mounts import CHANGING_INODES, file_system, is_remote
from triggers._files.names import printable
from triggers._files.notifications import FsNotifications
from triggers._files.recorder import FIRST_WALK_DONE_KEY, FileRecorder
from triggers._files.settling import KnownFiles, SettlingFiles
from triggers._files.tree import RootMissing, Tree
from triggers._files.walks import TreeWalks

LOG_EVENTS = {
    "directory.opened": "A directory is watched; `watch` is native or poll.",
    "directory.polling_fallback": (
        "Kernel notifications are not available; the directory is polled from now on."
    ),
    "directory.root_found": "A watched directory that was missing exists again.",
    "directory.root_missing": (
        "A watched directory is missing. No file counts as deleted; the trigger waits for it."
    ),
}


class RootMonitor:
    """Checks, without inotify, whether the root is missing or has been replaced."""

    INTERVAL_SECONDS = 5.0
    """Between checks; a fifth of that while the root is missing or not watched."""

    def __init__(self, context: DirectoryContext) -> None:
        self._context: DirectoryContext = context
        self._identity: tuple[int, int] | None = None  # device and inode at the last check
        self._is_missing: bool = False
        self.check_at: float = context.clock.monotonic()

    def check_soon(self, *, short: bool) -> None:
        seconds = self.INTERVAL_SECONDS / 5 if short else self.INTERVAL_SECONDS
        self.check_at = self._context.clock.monotonic() + seconds

    def set_found(self, identity: tuple[int, int]) -> bool:
        """Whether it is another directory than at the last check."""
        if self._is_missing:
            self._is_missing = False
            root = printable(self._context.tree.root)
            self._context.log.info("directory.root_found", root=root)
        is_new = identity != self._identity
        self._identity = identity
        return is_new

    def set_missing(self, reason: str) -> None:
        if not self._is_missing:
            self._is_missing = True
            root = printable(self._context.tree.root)
            self._context.log.warning("directory.root_missing", root=root, reason=reason)
        self._identity = None
        self.check_soon(short=True)


class Listener:
    """The state of one `listen`. `file_system_type` is the name in /proc/self/mountinfo."""

    def __init__(
        self,
        options: DirectoryOptions,
        intake: Intake,
        cursor: Mapping[str, Json],
        file_system_type: str,
        opened_ns: int,
    ) -> None:
        remote = is_remote(file_system_type)
        targets = [options.move_to]
        if options.outcome is not None:
            targets += [options.outcome.completed, options.outcome.failed]
        tree = Tree(
            options.root,
            options.names,
            options.recursive,
            options.follow_symlinks,
            inodes=not remote and file_system_type not in CHANGING_INODES,
            excluded=tuple(
                below
                for target in targets
                if target is not None and (below := relative_to(options.root, target)) is not None
            ),
        )
        known = KnownFiles()
        known.load(cursor)
        settling = SettlingFiles(known, options.settle, options.zero_byte_grace)
        context = DirectoryContext(
            options, tree, known, settling, intake.log, anyio.CapacityLimiter(1)
        )
        first_walk_done = FIRST_WALK_DONE_KEY in cursor
        skip_until = None
        if options.skip_existing and not first_walk_done:
            # The clock of another host stamps remote files: there, every file of the first walk is
            # skipped.
            skip_until = 1 << 63 if remote else opened_ns
        self._context: DirectoryContext = context
        self._recorder = FileRecorder(context, intake, _source(options.root, remote))
        if self._recorder.outcomes is not None:
            self._recorder.outcomes.load(cursor)
        self._walks = TreeWalks(
            context, self._recorder, first_walk_done=first_walk_done, skip_until=skip_until
        )
        self._root = RootMonitor(context)
        self._wake = asyncio.Event()
        self._notifications = FsNotifications(options.root, self._wake.set)
        self._native: bool = options.watch == "native" or (options.watch == "auto" and not remote)

    @classmethod
    async def open(cls, options: DirectoryOptions, intake: Intake) -> "Listener":
        opened_ns = _file_clock()
        kind = await anyio.to_thread.run_sync(
            file_system, options.root, limiter=anyio.CapacityLimiter(1)
        )
        listener = cls(options, intake, await intake.cursor(), kind, opened_ns)
        listener._context.log.info(
            "directory.opened",
            root=printable(options.root),
            watch="native" if listener._native else "poll",
            file_system=kind,
            known=len(listener._context.known),
        )
        return listener

    async def close(self) -> None:
        self._recorder.stop()
        await self._notifications.close()

    async def run_once(self) -> None:
        """One round of all work that is due; each part is bounded."""
        await self._check_root()
        await self._process_notifications()
        await self._walk()
        await self._recorder.record_settled()
        if self._recorder.outcomes is not None:
            await self._recorder.outcomes.run_due()
        await self._recorder.flush()

    async def wait(self) -> None:
        """Waits for a notification, or until a settle time, a walk or a root check is due."""
        delay = self._next_at() - self._context.clock.monotonic()
        if not self._wake.is_set() and delay > 0:
            await sleep_for(self._context.clock, delay, self._wake)
        self._wake.clear()

    def _next_at(self) -> float:
        if self._walks.has_work:
            return 0.0
        times = [self._root.check_at]
        if not self._walks.is_running:
            times.append(self._walks.next_at)
        settles_at = self._context.settling.next_due()
        if settles_at is not None:
            times.append(settles_at)
        outcomes = self._recorder.outcomes
        if outcomes is not None and (check_at := outcomes.next_at) is not None:
            times.append(check_at)
        return min(times)

    async def _check_root(self) -> None:
        if self._context.clock.monotonic() < self._root.check_at:
            return
        identity = await self._context.run_blocking(self._context.tree.identity)
        if identity is None:
            is_there = await self._context.run_blocking(os.path.lexists, self._context.tree.root)
            self._on_root_missing(
                "it is not a readable directory"
                if is_there
                else "it does not exist; create or mount it"
            )
            return
        is_unwatched = (
            self._native
            and bool(self._walks.directories)
            and not self._notifications.is_watched(b"")
        )
        if self._root.set_found(identity) or is_unwatched:
            self._walks.request()
        self._root.check_soon(short=is_unwatched)

    def _on_root_missing(self, reason: str) -> None:
        """No file counts as deleted; `_check_root` notices when the root is back."""
        self._root.set_missing(reason)
        self._walks.suspend()

    async def _process_notifications(self) -> None:
        """Stats the files that notifications named, and queues the directories for a walk."""
        notifications = self._notifications
        context = self._context
        if notifications.unavailable_reason is not None and self._native:
            self._native = False
            context.log.warning(
                "directory.polling_fallback",
                root=printable(context.tree.root),
                reason=notifications.unavailable_reason,
            )
        if notifications.may_have_missed:
            notifications.may_have_missed = False
            self._walks.request()
        changed = notifications.drain()
        if changed and not notifications.is_watched(b""):
            self._root.check_at = context.clock.monotonic()
        paths = [path for full in changed if (path := context.tree.relative(full)) is not None]
        if not paths:
            return
        for path in paths:
            if not notifications.is_watched(path):
                self._walks.directories.pop(path, None)
        started_at = context.clock.monotonic()
        files, directories = await context.run_blocking(context.tree.sort_paths, paths)
        context.observe(files, started_at)
        self._walks.enqueue(directories)

    async def _walk(self) -> None:
        """One step of a walk; after the last one, the walked directories are the watched ones."""
        options = self._context.options
        walks = self._walks
        try:
            has_ended = await walks.step(options.rescan if self._native else options.poll)
        except RootMissing as error:  # checked again soon
            self._on_root_missing(str(error))
            return
        if has_ended:
            if self._native:
                walks.enqueue(await self._notifications.watch(walks.directories))
            walks.log_first()


def relative_to(root: bytes, directory: bytes) -> bytes | None:
    """The path of `directory` below `root`; None when it is elsewhere."""
    prefix = root.rstrip(b"/") + b"/"
    return directory[len(prefix) :] if directory.startswith(prefix) else None


def _file_clock() -> int:
    """Now, in nanoseconds of the clock that stamps local files, which lags behind other clocks: the
    ctime of a new pipe.
    """
    ends = os.pipe()
    try:
        return os.fstat(ends[0]).st_ctime_ns
    finally:
        for end in ends:
            os.close(end)


def _source(root: bytes, remote: bool) -> str:
    """`file://host/root`; without the host where other hosts see the same files."""
    return f"file://{'' if remote else socket.gethostname()}{quote(root)}"
