"""Records settled files: classifies them, accepts their events, then removes their sources.

    SettlingFiles ─► FileClassifier.classify ─► Intake.accept ─► KnownFiles ─► remove_source
                     (thread)                  events + cursor                  (thread)

`Listener.run_once` calls `record_settled`; `TreeWalks` calls `record_skipped` and `remove_sources`.
An event and its cursor entry commit in one transaction, and `KnownFiles` changes only after that
commit. While the ledger is full, `accept` waits and nothing counts as known. See events.py
(classification) and post_actions.py (move and delete).
"""

from collections.abc import Mapping, Sequence

from eventflow.events.event import Event, Intake, Json, Receipt
from triggers._files.context import DirectoryContext
from triggers._files.events import Disposition, FileClassifier, LandedFile, to_event
from triggers._files.names import printable, to_key
from triggers._files.outcomes import AwaitedFile, OutcomeActions
from triggers._files.post_actions import remove_source
from triggers._files.settling import FileStat, pack_mark
from triggers._files.tree import Tree

LOG_EVENTS = {
    "file.delete_failed": "A recorded file could not be deleted.",
    "file.move_failed": "A recorded file could not be moved to its destination.",
}

EVENTS_PER_ACCEPT = 500
"""Bounds one transaction, so that a flood of files streams and never fills the commit queue (4,096
events).
"""

FIRST_WALK_DONE_KEY = "/began"
"""Cursor key: the time when the first walk was over. No relative path begins with a slash."""


class FileRecorder:
    """`source` is the CloudEvents source of all events."""

    def __init__(self, context: DirectoryContext, intake: Intake, source: str) -> None:
        options = context.options
        self._context: DirectoryContext = context
        self._intake: Intake = intake
        self._source: str = source
        self._classifier = FileClassifier(
            context.tree,
            context.known,
            options.move_to,
            sha256=options.sha256,
            touch=options.touch,
        )
        self._unrecorded_keys: dict[str, Json] = {}  # cursor changes for the next accept
        self.outcomes: OutcomeActions | None = None
        if options.outcome is not None:
            self.outcomes = OutcomeActions(
                context, intake, source, options.outcome, self._classifier.stop
            )

    def stop(self) -> None:
        """Ends reads and copies in the worker thread."""
        self._classifier.stop.set()

    # ------------------------------------------------------------------------- settled files

    async def record_settled(self) -> None:
        """Stats the pending files whose wait is over, and records those that did not change."""
        context = self._context
        settling = context.settling
        due = settling.due(context.clock.monotonic())
        for start in range(0, len(due), EVENTS_PER_ACCEPT):
            started_at = context.clock.monotonic()
            paths = due[start : start + EVENTS_PER_ACCEPT]
            context.observe(await context.run_blocking(context.tree.file_stats, paths), started_at)
        settled = settling.settled(due)
        verb = "reading" if context.options.move_to is None else "moving"
        with context.progress(verb, len(settled)) as progress:
            self._classifier.progress = progress
            for start in range(0, len(settled), EVENTS_PER_ACCEPT):
                now_us = context.clock.now()
                batch = settled[start : start + EVENTS_PER_ACCEPT]
                landed = await context.run_blocking(self._classifier.classify, batch, now_us)
                await self._record(landed, now_us)

    async def _record(self, landed: Sequence[LandedFile], now_us: int) -> None:
        """Records the events and the cursor in one transaction; then updates the known files and
        removes sources.
        """
        options = self._context.options
        known = self._context.known
        events: list[Event] = []
        receipts: Sequence[Receipt] = []
        cursor: dict[str, Json] = {}
        recorded: list[tuple[LandedFile, bool]] = []
        for file in landed:
            if file.disposition in (Disposition.WAITING, Disposition.CHANGED):
                self._postpone(file)
                continue
            removal_pending = file.disposition is not Disposition.CREATED and (
                known.removal_pending(file.path)
            )
            is_deletion = file.disposition is Disposition.DELETED
            if file.is_file or (is_deletion and options.deleted and not removal_pending):
                events.append(to_event(file, self._source, now_us))
            if file.is_file:
                removal_pending = options.removes_source
            cursor[to_key(file.path)] = (
                None if file.stat is None else [*file.stat, file.sample, int(removal_pending)]
            )
            if (awaited := self._awaited(file)) is not None:
                cursor[to_key(file.path)] = awaited.to_cursor()
            recorded.append((file, removal_pending))
        if cursor:
            receipts = await self._accept(events, cursor)
        sources: list[tuple[bytes, FileStat]] = []
        for file, removal_pending in recorded:
            self._context.settling.remove(file.path)
            self._context.denied.discard(file.path)
            if self.outcomes is not None:
                self.outcomes.replace(file.path, self._awaited(file))
            if file.stat is None:
                known.forget(file.path)
                continue
            known.add(file.path, pack_mark(file.stat, file.sample, removal_pending))
            if removal_pending:
                sources.append((file.path, file.stat))
        if sources:
            await self.remove_sources(sources)
        known_ids = {receipt.event_id for receipt in receipts if receipt.duplicate}
        if self.outcomes is not None and known_ids:
            put_back = [file.path for file in landed if file.event_id in known_ids]
            self._unrecorded_keys |= await self.outcomes.put_back(put_back)

    def _awaited(self, file: LandedFile) -> AwaitedFile | None:
        """The file as one that awaits the end of its runs; None when it does not."""
        if self.outcomes is None or file.stat is None:
            return None
        before = self.outcomes.get(file.path)  # only its times may have changed
        event_id = file.event_id if file.is_file else before and before.event_id
        return AwaitedFile(file.stat, file.sample, event_id) if event_id else None

    def _postpone(self, file: LandedFile) -> None:
        context = self._context
        delay = 0.0
        if file.disposition is Disposition.WAITING:
            delay = context.options.poll if file.problem else max(context.options.settle, 1.0)
        if file.is_unreadable:
            context.warn_denied(file.path, file.problem or "")
        elif file.problem is not None:
            path = printable(context.tree.full(file.path))
            context.log.warning("file.move_failed", path=path, reason=file.problem)
        context.settling.postpone(file.path, context.clock.monotonic() + delay)

    async def remove_sources(self, files: Sequence[tuple[bytes, FileStat]]) -> None:
        """The second half of `after`: removes the landing name of each recorded file, and its
        cursor entry.
        """
        context = self._context
        for path, outcome in await context.run_blocking(remove_sources, context.tree, files):
            if outcome is True:
                context.known.forget(path)
                self._unrecorded_keys[to_key(path)] = None
            elif outcome is not False:
                full = printable(context.tree.full(path))
                context.log.warning("file.delete_failed", path=full, reason=outcome)

    # ------------------------------------------------------------------------- the cursor

    async def record_skipped(self, files: Sequence[tuple[bytes, FileStat]]) -> None:
        """Records the versions of files that `existing="skip"` leaves out, without events."""
        context = self._context
        paths = [path for path, _ in files]
        samples = await context.run_blocking(self._classifier.samples, paths)
        skipped = [
            (path, stat, sample) for (path, stat), sample in zip(files, samples, strict=True)
        ]
        cursor: dict[str, Json] = {
            to_key(path): [*stat, sample, 0] for path, stat, sample in skipped
        }
        await self._accept([], cursor)
        for path, stat, sample in skipped:
            context.known.add(path, pack_mark(stat, sample))

    async def record_first_walk(self, ended_at: str, *, at_once: bool) -> None:
        """Records that the first walk is over: every file from now on fires. Unless `at_once`, with
        the next accept.
        """
        self._unrecorded_keys[FIRST_WALK_DONE_KEY] = ended_at
        if at_once:
            await self._accept([], {})

    async def flush(self) -> None:
        """Records cursor entries of removed sources that no accept has carried yet."""
        if self._unrecorded_keys.keys() - {FIRST_WALK_DONE_KEY}:
            await self._accept([], {})

    async def _accept(
        self, events: Sequence[Event], cursor: Mapping[str, Json]
    ) -> Sequence[Receipt]:
        """Durable when it returns. Waits while the ledger is full."""
        receipts = await self._intake.accept(*events, cursor={**self._unrecorded_keys, **cursor})
        self._unrecorded_keys = {}
        return receipts


def remove_sources(
    tree: Tree, files: Sequence[tuple[bytes, FileStat]]
) -> list[tuple[bytes, bool | str]]:
    """`(path, outcome)` for each file: the result of `remove_source`, or the text of its OSError.
    Blocks.
    """
    outcomes: list[tuple[bytes, bool | str]] = []
    for path, stat in files:
        try:
            outcomes.append((path, remove_source(tree, path, stat)))
        except OSError as error:  # the others are removed all the same
            outcomes.append((path, str(error)))
    return outcomes
