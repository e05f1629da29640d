"""Files that land in a directory, each as one event.

    app.on(Directory("inbox", pattern="*.csv"), handle)

A file fires once its size, mtime and inode have not changed for `settle` seconds; an overwrite is a
new event. Walks compare the tree with the trigger's cursor (the recorded versions), and so find
files that landed while nothing ran, or that the kernel's notifications missed; notifications only
make it fast. An event and its cursor entry commit in one transaction; only after that a file is
moved or deleted.

This file is the public class. See `_files/listener.py`: the loop, and a file's path through the
other files.
"""

import os
from collections.abc import Sequence
from typing import Literal

from eventflow.core.clock import Clock, SystemClock
from eventflow.core.declarations import declaration, duration
from eventflow.core.errors import UsageError
from eventflow.events.event import Intake
from triggers._files.context import DirectoryOptions, OutcomeTargets
from triggers._files.listener import Listener
from triggers._files.names import IGNORED, NameFilter, printable
from triggers._files.post_actions import (
    DeleteAction,
    MoveAction,
    OutcomeAction,
    check_action,
    delete,
    move,
    outcome,
)

__all__ = ["Directory", "delete", "move", "outcome"]


class Directory:
    """A directory whose files are events.

    Types are `io.eventflow.file.created`, `.modified` (another version of a file seen before) and,
    with `deleted=True`, `.deleted`. `data`: `path` (where the flow finds it: after the move, if
    there is one), `relpath`, `name`, `size`, `mtime`, `mtime_ns`, `inode`; `sha256` on request;
    `path_b64` when the name is not UTF-8 (`path` then has such bytes as `\\xNN`). The event's
    `time` is when the file had settled, its extension `firstseen` when it was first seen. A version
    is relative path, size, mtime_ns and, on local file systems, inode: the same version never fires
    twice while the ledger remembers it. Files that settle together are in the order of (mtime,
    path), best effort.

    Args:
        pattern: globs over the relative path. Without a slash they match names at any depth,
            `"/*.csv"` the top level only.
        ignore: globs of files and directories to ignore; by default dotfiles and usual names of
            incomplete files.
        settle: seconds that a file must not change. `zero_byte_grace`: the same for empty files,
            which are often filled later.
        existing: whether files present at the first start `"fire"`, or `"skip"` them (their later
            versions fire). After that start the cursor decides, and what landed in between always
            fires.
        after: `outcome(completed=move("done"), failed=move("failed"))`, once the runs of its event
            have ended; or `move("processed")` or `delete()`, once the event is recorded. Such a
            moved file has its
            new name just before that and loses its old one just after, so `data["path"]` exists
            when the flow starts. To run a file again, reprocess its event: moving the same version
            back is a duplicate.
        watch: `"native"` (inotify), `"poll"`, or `"auto"`: native except on network file systems,
            where inotify sees nothing.
        rescan: seconds between whole walks when native; `poll`: when polling. A tree that takes
            long to walk is walked less.
        marker: a file that marks another one as complete: `"{name}.done"`, `"{stem}.ok"` or
            `"_SUCCESS"` in its directory.
        touch: `"skip"`: other times with the same size, inode and content are no event (content is
            sampled: files up to 256 KiB whole, larger ones in 16 pieces; with `sha256=True` whole).
            `"fire"`: any new mtime is an event.
        follow_symlinks: whether links inside the root are followed; dangling and outward links
            never are.
        name: the trigger's name, the key of its cursor; by default `files:` and the root as given.
    """

    @declaration
    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        pattern: str | Sequence[str] = "**/*",
        ignore: Sequence[str] = IGNORED,
        settle: float = 2.0,
        existing: Literal["fire", "skip"] = "fire",
        after: OutcomeAction | MoveAction | DeleteAction | None = None,
        watch: Literal["auto", "native", "poll"] = "auto",
        rescan: float = 60.0,
        poll: float = 10.0,
        recursive: bool = True,
        follow_symlinks: bool = False,
        marker: str | None = None,
        zero_byte_grace: float = 30.0,
        deleted: bool = False,
        touch: Literal["skip", "fire"] = "skip",
        sha256: bool = False,
        name: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        duration(settle, "Directory: settle=")
        duration(zero_byte_grace, "Directory: zero_byte_grace=")
        duration(rescan, "Directory: rescan=", positive=True)
        duration(poll, "Directory: poll=", positive=True)
        check_action(after)
        self.name = name or f"files:{os.fspath(root)}"
        directory = os.path.abspath(os.fsencode(root))
        if os.path.isfile(directory):
            folder, file = map(printable, os.path.split(directory))
            raise UsageError(
                f"Directory({os.fspath(root)!r}): expected a directory, found a file; write "
                f"Directory({folder!r}, pattern={'/' + file!r})"
            )
        _check_patterns(directory, pattern)
        by_outcome = isinstance(after, OutcomeAction)
        self._options = DirectoryOptions(
            root=directory,
            names=NameFilter(pattern, ignore, marker),
            removes_source=after is not None and not by_outcome,
            move_to=None if by_outcome else _move_target(directory, after),
            outcome=_outcome_targets(directory, after) if by_outcome else None,
            skip_existing=existing == "skip",
            watch=watch,
            rescan=rescan,
            poll=poll,
            settle=settle,
            zero_byte_grace=zero_byte_grace,
            recursive=recursive,
            follow_symlinks=follow_symlinks,
            deleted=deleted,
            touch=touch == "fire",
            sha256=sha256,
            clock=clock or SystemClock(),
        )

    def __repr__(self) -> str:
        return f"Directory({printable(self._options.root)!r}, name={self.name!r})"

    async def listen(self, intake: Intake) -> None:
        """Until cancelled. May be restarted at any time: all it knows comes from the cursor."""
        listener = await Listener.open(self._options, intake)
        try:
            while True:
                await listener.run_once()
                await listener.wait()
        finally:
            await listener.close()


def _check_patterns(root: bytes, patterns: str | Sequence[str]) -> None:
    """Raises UsageError for a pattern that repeats the root, which would match no file."""
    for each in [patterns] if isinstance(patterns, str) else patterns:
        below = each.removeprefix(os.fsdecode(root))
        if below != each and below.startswith("/"):
            raise UsageError(
                f"Directory: pattern= is relative to the root; write {below!r}, found {each!r}"
            )


def _outcome_targets(root: bytes, after: OutcomeAction) -> OutcomeTargets:
    return OutcomeTargets(
        _move_target(root, after.completed),
        _move_target(root, after.failed),
        isinstance(after.completed, DeleteAction),
        isinstance(after.failed, DeleteAction),
    )


def _move_target(root: bytes, after: MoveAction | DeleteAction | None) -> bytes | None:
    """The absolute directory of a move; None for other actions."""
    if not isinstance(after, MoveAction):
        return None
    target = os.path.normpath(os.path.join(root, os.fsencode(after.to)))
    if target == root:
        raise UsageError(
            f"Directory: after=move(...) leads to the landing directory itself, {printable(root)}"
        )
    return target
