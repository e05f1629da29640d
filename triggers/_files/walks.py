"""The walks of one opened `Directory`: when the next one is due, its steps, its results.

`Listener.run_once` calls `step`; each step looks at a bounded number of directory entries (tree.py)
in the worker thread. A whole walk compares the tree with the known files; a partial walk covers
directories that a notification named. While too many files are pending, no step is taken. An
unreadable directory is logged once; the files in it do not count as deleted.
"""

from collections.abc import Iterable

from eventflow.core.clock import SECOND, to_datetime
from triggers._files.context import DirectoryContext
from triggers._files.names import printable
from triggers._files.recorder import FileRecorder
from triggers._files.tree import Walk, WalkStep

LOG_EVENTS = {
    "directory.initial_scan_completed": (
        "The first scan of a directory is complete; `known` and `pending` count its files."
    ),
    "file.unsettled": (
        "A file has been changing for a long time; it does not yet count as complete."
    ),
}

UNSETTLED_WARNING_SECONDS = 3_600.0
"""After this time a file that never settled is logged."""


class TreeWalks:
    """`skip_until`: files with a ctime up to it (nanoseconds) are skipped by the first walk; None
    skips none.
    """

    def __init__(
        self,
        context: DirectoryContext,
        recorder: FileRecorder,
        *,
        first_walk_done: bool,
        skip_until: int | None,
    ) -> None:
        self._context: DirectoryContext = context
        self._recorder: FileRecorder = recorder
        self._first_walk_done: bool = first_walk_done  # as the cursor has it, over restarts
        self._first_walk_logged: bool = False  # since this listener was opened
        self._skip_until: int | None = skip_until
        self._walk: Walk | None = None
        self._walk_seconds: float = 0.0  # that the current whole walk took so far
        self._queued: list[bytes] = []  # directories for the current or the next walk
        self._warned: set[bytes] = set()  # paths
        self.next_at: float = context.clock.monotonic()  # of a whole walk
        self.directories: dict[bytes, int] = {}  # path to inode, as walked last

    @property
    def is_running(self) -> bool:
        return self._walk is not None

    @property
    def has_work(self) -> bool:
        """Whether a step can be taken now."""
        return bool(self._context.settling.capacity and (self._walk is not None or self._queued))

    def request(self) -> None:
        """Makes a whole walk due now."""
        self.next_at = min(self.next_at, self._context.clock.monotonic())

    def enqueue(self, directories: Iterable[bytes]) -> None:
        self._queued += directories

    def suspend(self) -> None:
        """The root is missing: ends the current walk; `request` makes the next one due."""
        self._walk = None
        self.next_at = float("inf")

    async def step(self, interval: float) -> bool:
        """One step of the current walk, or of the next one that is due; whether it was the walk's
        last.

        After a whole walk the next one is due in `interval` seconds, or four times what this one
        took. Raises RootMissing.
        """
        context = self._context
        if not context.settling.capacity:
            return False
        walk = self._walk = self._walk or self._next_walk()
        if walk is None:
            return False
        walk.add_directories(self._queued)
        self._queued = []
        started_at = context.clock.monotonic()
        step = await context.run_blocking(walk.step)
        context.observe(step.observations, started_at)
        await self._process(step)
        self._walk_seconds += context.clock.monotonic() - started_at
        if step.done:
            self._walk = None
            await self._finish(walk, interval)
        return step.done

    def _next_walk(self) -> Walk | None:
        is_whole = self._context.clock.monotonic() >= self.next_at
        if not is_whole and not self._queued:
            return None
        if is_whole:
            self.next_at = float("inf")
            self._walk_seconds = 0.0
        context = self._context
        return Walk(context.tree, context.known, whole=is_whole, skip_until=self._skip_until)

    async def _process(self, step: WalkStep) -> None:
        for path, reason in step.denied:
            self._context.warn_denied(path, reason)
        if step.preexisting:
            await self._recorder.record_skipped(step.preexisting)
        if step.pending_removal and self._context.options.removes_source:
            await self._recorder.remove_sources(step.pending_removal)

    async def _finish(self, walk: Walk, interval: float) -> None:
        if not walk.whole:
            self.directories |= walk.directories
            return
        now = self._context.clock.monotonic()
        self.next_at = min(self.next_at, now + max(interval, 4 * self._walk_seconds))
        self.directories = walk.directories
        if not self._first_walk_done:
            ended_at = to_datetime(self._context.clock.now()).isoformat()
            await self._recorder.record_first_walk(ended_at, at_once=self._skip_until is not None)
            self._first_walk_done = True
            self._skip_until = None
        self._warn_unsettled()

    def _warn_unsettled(self) -> None:
        context = self._context
        oldest = context.clock.now() - int(UNSETTLED_WARNING_SECONDS * SECOND)
        for path in context.settling.older_than(oldest):
            if path not in self._warned:
                self._warned.add(path)
                context.log.warning(
                    "file.unsettled",
                    path=printable(context.tree.full(path)),
                    seconds=UNSETTLED_WARNING_SECONDS,
                )

    def log_first(self) -> None:
        """Logs the end of the first walk since the listener was opened."""
        if not self._first_walk_logged:
            self._first_walk_logged = True
            context = self._context
            context.log.info(
                "directory.initial_scan_completed",
                root=printable(context.tree.root),
                directories=len(self.directories),
                known=len(context.known),
                pending=len(context.settling),
            )
