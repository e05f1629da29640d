"""Files that land in a directory, each as one event: `app.on(Directory("inbox", pattern="*.csv"), handle)`.

A file fires once its size, mtime and inode held still for `settle` seconds; an overwrite is a new event. A reconciling walk
compares the tree with the trigger's cursor (what the ledger has already recorded), so files that landed while nothing ran, or
that the kernel's notifications missed, are found; notifications only make it quick. An event and its cursor entry commit in
one transaction; only then is a file moved away or deleted.

This file is the public face; `_files/listener.py` is the loop and shows the way of a file through the other rooms.
"""

import os
from collections.abc import Sequence
from typing import Literal

from eventflow.core.clock import Clock, SystemClock
from eventflow.core.errors import UsageError
from eventflow.events.event import Intake
from triggers._files.listener import Listener, Options
from triggers._files.names import IGNORED, Names, printable
from triggers._files.post_actions import Delete, Move, delete, move

__all__ = ["Directory", "delete", "move"]


class Directory:
    """A directory whose files are events.

    Types are `io.eventflow.file.created`, `.modified` (another version of a file seen before) and, with `deleted=True`,
    `.deleted`. `data`: `path` (where the flow finds it: after the move, if there is one), `relpath`, `name`, `size`, `mtime`,
    `mtime_ns`, `inode`; `sha256` if asked for; `path_b64` when the name is not UTF-8 (`path` then shows such bytes as `\\xNN`).
    The event's `time` is when the file was found still, its extension `firstseen` when it was first seen. A version is
    relative path, size, mtime_ns and, on local file systems, inode: the same version never fires twice while the ledger
    remembers it. Order is by (mtime, path) among what ripens together, best effort.

    Args:
        pattern: globs over the relative path. Without a slash they match names at any depth, `"/*.csv"` the top level only.
        ignore: globs of files and directories to leave alone; by default dotfiles and usual names of incomplete files.
        settle: seconds a file must hold still. `zero_byte_grace`: the same for empty files, which are often not filled yet.
        existing: what to do with files present at the very first start: `"fire"`, or `"skip"` them (their later versions
            fire). After that start the cursor knows, and what landed in between always fires.
        after: `move("processed")` or `delete()`, once the event is recorded. A moved file has its new name just before that
            and loses its old one just after, so `data["path"]` holds from the flow's first line on. To run a file again, replay
            its event: moving the same version back is a duplicate.
        watch: `"native"` (inotify), `"poll"`, or `"auto"`: native except on network file systems, where it hears nothing.
        rescan: seconds between whole walks when native; `poll`: when polling. A tree that takes long to walk is walked less.
        marker: a file that says another is complete: `"{name}.done"`, `"{stem}.ok"` or `"_SUCCESS"` beside it.
        touch: `"skip"`: other times with the same size, inode and content are no event (content is sampled: files up to
            256 KiB whole, larger ones in 16 pieces; with `sha256=True` whole). `"fire"`: any new mtime is an event.
        follow_symlinks: also takes what links lead to, inside the root; dangling and outward links never count.
        name: the trigger's name, by which its cursor is kept; by default `files:` and the root as given.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        pattern: str | Sequence[str] = "**/*",
        ignore: Sequence[str] = IGNORED,
        settle: float = 2.0,
        existing: Literal["fire", "skip"] = "fire",
        after: Move | Delete | None = None,
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
        if min(settle, rescan, poll, zero_byte_grace) < 0 or not rescan or not poll:
            raise UsageError(
                "Directory: settle and zero_byte_grace must not be negative, rescan and poll must be positive"
            )
        self.name = name or f"files:{os.fspath(root)}"
        place = os.path.abspath(os.fsencode(root))
        move_to = _target(place, after) if isinstance(after, Move) else None
        self._options = Options(
            root=place,
            names=Names(pattern, ignore, marker),
            leaves=after is not None,
            move_to=move_to,
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

    async def listen(self, intake: Intake) -> None:
        """Watches until cancelled. Everything known comes from the cursor, so it may be opened again at any time."""
        listener = await Listener.open(self._options, intake)
        try:
            while True:
                await listener.look()
                await listener.rest()
        finally:
            await listener.close()


def _target(root: bytes, after: Move) -> bytes:
    target = os.path.normpath(os.path.join(root, os.fsencode(after.to)))
    if target == root:
        raise UsageError(
            f"Directory: after=move(...) leads to the landing directory itself, {printable(root)}"
        )
    return target
