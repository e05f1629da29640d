"""What happens to a recorded file once its runs have ended: `after=outcome(...)`.

    cursor: awaited ─► Intake.outcomes ─► link_or_copy, sync ─► remove_source ─► cursor: forgotten

The ledger knows the ends of runs, and the cursor which files await one; so nothing is kept in
between, and a crash between any two steps repeats them: each is idempotent. `Listener.run_once`
calls `run_due`; `FileRecorder` adds the files that it records.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import cast

from eventflow.core.errors import SourceError, UsageError
from eventflow.core.retry import Backoff
from eventflow.events.event import Intake, Json, KnowsOutcomes
from eventflow.logs.progress import Progress
from triggers._files.context import DirectoryContext, OutcomeTargets
from triggers._files.names import from_key, printable, to_key
from triggers._files.post_actions import (
    link_or_copy,
    remove_source,
    sync_directories,
    unlink_if_present,
)
from triggers._files.settling import FileStat, pack_mark
from triggers._files.tree import Tree

LOG_EVENTS = {
    "file.moved": (
        "A file whose runs have ended was moved to the folder `to`, below its relative path; "
        "debug if they completed, unless an earlier try failed."
    ),
    "file.outcome_unknown": (
        "The ledger no longer has the runs of a file; the file stays where it is."
    ),
}

CHECK_INTERVAL_SECONDS = 0.5
"""Between two questions about the files that await an outcome."""

MAX_RETRY_SECONDS = 60.0
"""Longest pause between two tries to move a file; the first is CHECK_INTERVAL_SECONDS."""

FILES_PER_CHECK = 500

AWAITED = 2
"""In a file's cursor entry, where 1 is a pending removal: its runs have not ended, as far as the
trigger knows. The id of its event follows.
"""


@dataclass(frozen=True, slots=True)
class AwaitedFile:
    """A recorded version. `event_id` stays when only its times change. `known_outcome`: of a file
    that was put back: its runs had ended so, and it waits until a retry of them ends.
    """

    stat: FileStat
    sample: int | None
    event_id: str
    known_outcome: str | None = None

    def to_cursor(self) -> Json:
        return [*self.stat, self.sample, AWAITED, self.event_id, self.known_outcome]


class FailedMove:
    """A file that could not be moved or deleted. `retry_at`: the next try, in monotonic seconds."""

    __slots__ = ("_backoff", "reason", "retry_at")

    def __init__(self) -> None:
        self._backoff = Backoff(CHECK_INTERVAL_SECONDS, max_delay=MAX_RETRY_SECONDS, jitter=0)
        self.retry_at: float = 0.0
        self.reason: str = ""

    def note(self, reason: str, now: float) -> bool:
        """Records a failed try and sets the time of the next one; whether the reason is new."""
        self.retry_at = now + next(self._backoff)
        is_new = reason != self.reason
        self.reason = reason
        return is_new


class OutcomeActions:
    """The awaited files of one opened `Directory`. `source` is that of its events."""

    def __init__(
        self,
        context: DirectoryContext,
        intake: Intake,
        source: str,
        targets: OutcomeTargets,
        stop: threading.Event,
    ) -> None:
        if not isinstance(intake, KnowsOutcomes):
            raise UsageError(
                "Directory(after=outcome(...)): expected a trigger with flows of its own, found a "
                "source whose events are not all recorded (of a drift monitor); use after=move(...)"
            )
        self._context: DirectoryContext = context
        self._intake: Intake = intake
        self._ledger: KnowsOutcomes = intake
        self._source: str = source
        self._targets: OutcomeTargets = targets
        self._stop: threading.Event = stop
        self._awaited: dict[bytes, AwaitedFile] = {}
        self._failed: dict[bytes, FailedMove] = {}
        self._next_at: float = context.clock.monotonic()

    def load(self, cursor: Mapping[str, Json]) -> None:
        """Takes over the awaited files of the cursor."""
        for key, value in cursor.items():
            if isinstance(value, list) and len(value) == 7 and value[4] == AWAITED:
                size, mtime_ns, inode, sample, _, event_id, outcome = cast(
                    "tuple[int, int, int, int | None, int, str, str | None]", value
                )
                stat = FileStat(size, mtime_ns, inode)
                self._awaited[from_key(key)] = AwaitedFile(stat, sample, event_id, outcome)

    def replace(self, path: bytes, file: AwaitedFile | None) -> None:
        """Another version of this path was recorded, or none is awaited any more."""
        self._awaited.pop(path, None)
        self._failed.pop(path, None)
        if file is not None:
            self._awaited[path] = file

    async def put_back(self, paths: Sequence[bytes]) -> dict[str, Json]:
        """The new cursor entries of files whose events were known: their outcome so far moves them
        no second time.
        """
        files = {path: self._awaited[path] for path in paths if path in self._awaited}
        ids = [file.event_id for file in files.values()]
        found = await self._ledger.outcomes(self._source, ids)
        entries: dict[str, Json] = {}
        for path, file in files.items():
            if (outcome := found.get(file.event_id)) is not None:
                self._awaited[path] = replace(file, known_outcome=outcome)
                entries[to_key(path)] = self._awaited[path].to_cursor()
        return entries

    def get(self, path: bytes) -> AwaitedFile | None:
        return self._awaited.get(path)

    @property
    def next_at(self) -> float | None:
        """When `run_due` has something to do; None: nothing is awaited."""
        if not self._awaited:
            return None
        if len(self._failed) < len(self._awaited):
            return self._next_at
        return max(self._next_at, min(each.retry_at for each in self._failed.values()))

    async def run_due(self) -> None:
        """Asks for the outcomes of some awaited files, and moves those whose runs have ended."""
        context = self._context
        now = context.clock.monotonic()
        if not self._awaited or now < self._next_at:
            return
        failed = self._failed
        due = (
            item
            for item in self._awaited.items()
            if item[0] not in failed or failed[item[0]].retry_at <= now
        )
        asked = dict(islice(due, FILES_PER_CHECK))
        found = await self._ledger.outcomes(
            self._source, [file.event_id for file in asked.values()]
        )
        cursor: dict[str, Json] = {}
        with context.progress("moving", len(found)) as progress:
            for path, file in asked.items():
                self._awaited[path] = self._awaited.pop(path)  # those not asked for come first
                outcome = found.get(file.event_id)
                if outcome is None and file.known_outcome is not None:  # a retry is under way
                    self._awaited[path] = file = replace(file, known_outcome=None)
                    cursor[to_key(path)] = file.to_cursor()
                if outcome not in (None, file.known_outcome) and await self._settle(
                    path, file, outcome, cursor, progress
                ):
                    self.replace(path, None)
        if cursor:
            await self._intake.accept(cursor=cursor)
        self._next_at = context.clock.monotonic() + CHECK_INTERVAL_SECONDS

    async def _settle(
        self,
        path: bytes,
        file: AwaitedFile,
        outcome: str,
        cursor: dict[str, Json],
        progress: Progress,
    ) -> bool:
        """Whether it is done; then adds the file's new cursor entry."""
        context = self._context
        done = progress.done
        if outcome == "unknown":
            full = printable(context.tree.full(path))
            context.log.warning("file.outcome_unknown", path=full)
        target, deletes = self._targets.of(outcome)
        if target is None and not deletes:
            cursor[to_key(path)] = [*file.stat, file.sample, 0]
            return True
        try:
            is_removed = await context.run_blocking(
                _place_and_remove, context.tree, path, file, target, self._stop, progress
            )
        except (OSError, SourceError) as error:  # tried again: the target may become writable
            failure = self._failed.setdefault(path, FailedMove())
            if failure.note(str(error), context.clock.monotonic()):
                full = printable(context.tree.full(path))
                context.log.warning("file.move_failed", path=full, reason=failure.reason)
            return False
        finally:
            progress.move_to(done + 1)
        if is_removed:
            if target is not None:  # where a person finds the file of a failed run
                moved = {"path": printable(context.tree.full(path)), "to": printable(target)}
                if outcome == "failed" or path in self._failed:
                    context.log.info("file.moved", **moved, outcome=outcome)
                else:
                    context.log.debug("file.moved", **moved, outcome=outcome)
            context.known.forget(path)
            context.settling.remove(path)
            cursor[to_key(path)] = None
        else:  # another version has landed, which is an event of its own
            cursor[to_key(path)] = [*file.stat, file.sample, 0]
            context.known.add(path, pack_mark(file.stat, file.sample))
        return True


def _place_and_remove(
    tree: Tree,
    path: bytes,
    file: AwaitedFile,
    target: bytes | None,
    stop: threading.Event,
    progress: Progress,
) -> bool:
    """Gives the file its final name, durably, and removes its landing name. False when another
    version has landed; a file that is gone counts as removed. Blocks. Raises OSError, SourceError.
    """
    if target is not None and tree.file_stat(path) == file.stat:
        placed, is_new = link_or_copy(tree.full(path), target, path, file.event_id, stop, progress)
        if is_new and tree.file_stat(path) != file.stat:  # it changed while it was copied
            unlink_if_present(placed)
            return False
        if failed := sync_directories([placed], target):
            raise SourceError(failed[placed])
    return remove_source(tree, path, file.stat)
