"""One opened landing directory: the loop that looks, waits and lands.

    hints.py ─► look: hints, walk, settle, land ─► landing.py (judge, place) ─► Intake.accept ─► afterwards.py (remove)
    tree.py (walk) ─► settling.py (pending, known) ──┘

`Directory.listen` opens one and drives it. One coroutine does everything in turn, so nothing here is locked; what blocks goes
to a thread, one call at a time. Everything known comes from the cursor at `open`, and changes only after `accept` returned.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import anyio
import anyio.to_thread

from eventflow.core.clock import SECOND, Clock, microseconds, to_datetime
from eventflow.core.errors import StoreFull
from eventflow.events.event import Event, Intake, Json
from triggers._files.events import Desk, Fate, Landed, to_event
from triggers._files.mounts import CHANGING_INODES, file_system, is_remote
from triggers._files.names import Names, printable, to_key
from triggers._files.notifications import Hints
from triggers._files.post_actions import remove
from triggers._files.settling import Known, Settling, Sight, mark
from triggers._files.tree import RootMissing, Step, Tree, Walk

T = TypeVar("T")

BATCH = 500
"""Events in one `accept`, so that a flood streams and never fills the commit queue (4,096)."""

PATIENCE = 3_600.0
"""Seconds after which a file that never held still is warned about."""

BEGAN = "/began"
"""The cursor's note that the first walk is over; no relative path begins with a slash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `Directory` was given, ready for use: `root` and `move_to` absolute, `leaves` whether files go once recorded."""

    root: bytes
    names: Names
    leaves: bool
    move_to: bytes | None
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


class Listener:
    """One `listen`: what it knows, what it waits for, and when it looks next."""

    ROOT_CHECK = 5.0
    """Seconds between looks at which directory the root is; a fifth of that while it is missing or not watched."""

    def __init__(
        self,
        options: Options,
        intake: Intake,
        cursor: Mapping[str, Json],
        kind: str,
        opened_ns: int,
    ) -> None:
        self._options, self._intake, self._log, self._clock = (
            options,
            intake,
            intake.log,
            options.clock,
        )
        remote = is_remote(kind)
        self._source = _source(options.root, remote)
        self._native = options.watch == "native" or (options.watch == "auto" and not remote)
        inodes = not remote and kind not in CHANGING_INODES
        move_to = options.move_to
        apart = _below(options.root, move_to) if move_to is not None else None
        self._tree = Tree(
            options.root, options.names, options.recursive, options.follow_symlinks, inodes, apart
        )
        self._known = Known()
        self._known.load(cursor)
        self._settling = Settling(self._known, options.settle, options.zero_byte_grace)
        self._desk = Desk(
            self._tree, self._known, move_to, sha256=options.sha256, touch=options.touch
        )
        self._wake = asyncio.Event()
        self._hints = Hints(options.root, self._wake.set)
        self._limiter = anyio.CapacityLimiter(1)
        self._began, self._walked = BEGAN in cursor, False
        self._skip_until: int | None = None
        if options.skip_existing and not self._began:
            self._skip_until = (
                1 << 63 if remote else opened_ns
            )  # another host's clock stamps remote files: skip all of them
        self._walk: Walk | None = None
        self._walk_took = 0.0
        self._walk_at = self._clock.monotonic()
        self._into: list[bytes] = []
        self._directories: dict[bytes, int] = {}
        self._root_at = self._clock.monotonic()
        self._root: tuple[int, int] | None = None
        self._root_missing = False
        self._notes: dict[str, Json] = {}
        self._warned: set[bytes] = set()

    @classmethod
    async def open(cls, options: Options, intake: Intake) -> "Listener":
        opened_ns = _file_clock()
        kind = await anyio.to_thread.run_sync(
            file_system, options.root, limiter=anyio.CapacityLimiter(1)
        )
        listener = cls(options, intake, await intake.cursor(), kind, opened_ns)
        watch = "native" if listener._native else "poll"
        listener._log.info(
            "directory.opened",
            root=printable(options.root),
            watch=watch,
            file_system=kind,
            known=len(listener._known),
        )
        return listener

    async def close(self) -> None:
        self._desk.stop.set()
        await self._hints.close()

    async def look(self) -> None:
        """Does what there is to do now: one round of everything, each part bounded."""
        await self._check_root()
        await self._take_hints()
        await self._walk_on()
        await self._land_ripe()
        if self._notes.keys() - {BEGAN}:
            await self._offer([], {})

    # ------------------------------------------------------------------------- when

    async def rest(self) -> None:
        """Waits until there is something to do: a hint, a file that may be ripe, a walk."""
        now = self._clock.monotonic()
        if not self._wake.is_set() and (delay := self._next_at() - now) > 0:
            await self._sleep(delay, self._wake)
        self._wake.clear()

    def _next_at(self) -> float:
        if self._settling.room and (self._walk is not None or self._into):
            return 0.0
        ripe_at = self._settling.next_due()
        walk_at = self._walk_at if self._walk is None else self._root_at
        return min(self._root_at, walk_at, self._root_at if ripe_at is None else ripe_at)

    async def _sleep(self, seconds: float, wake: asyncio.Event) -> None:
        """Until `wake`, at most `seconds`. The timer follows the wall clock; should that be set back, the loop's own wakes."""
        loop = asyncio.get_running_loop()
        timer = self._clock.timer(loop, self._clock.now() + microseconds(seconds), wake.set)
        backstop = loop.call_later(seconds + 1, wake.set)
        try:
            await wake.wait()
        finally:
            timer.cancel()
            backstop.cancel()

    async def _blocking(self, call: Callable[..., T], *args: Any) -> T:
        return await anyio.to_thread.run_sync(
            call, *args, limiter=self._limiter, abandon_on_cancel=True
        )

    # ------------------------------------------------------------------------- looking

    async def _check_root(self) -> None:
        """Finds out, without inotify's help, that the root was replaced or has come back."""
        now = self._clock.monotonic()
        if now < self._root_at:
            return
        root = await self._blocking(self._tree.identity)
        if root is None:
            self._lose_root("it is not there, or is no directory")
            return
        if self._root_missing:
            self._root_missing = False
            self._log.info("directory.root_found", root=printable(self._tree.root))
        deaf = self._native and bool(self._directories) and not self._hints.covers(b"")
        if root != self._root or deaf:
            self._walk_soon()
        self._root = root
        self._root_at = now + (self.ROOT_CHECK / 5 if deaf else self.ROOT_CHECK)

    async def _take_hints(self) -> None:
        hints = self._hints
        if hints.refused is not None and self._native:
            self._native = False
            self._log.warning(
                "directory.polled_instead", root=printable(self._tree.root), reason=hints.refused
            )
        if hints.gap:
            hints.gap = False
            self._walk_soon()
        taken = hints.take()
        if taken and not hints.covers(b""):
            self._root_at = self._clock.monotonic()
        hinted = [path for full in taken if (path := self._tree.relative(full)) is not None]
        if not hinted:
            return
        for path in hinted:
            if not hints.covers(path):
                self._directories.pop(path, None)
        before = self._clock.monotonic()
        files, directories = await self._blocking(self._tree.examine, hinted)
        self._see(files, before)
        self._into += directories

    def _see(self, observations: Sequence[tuple[bytes, Sight | None]], before: float) -> None:
        after, now_us = self._clock.monotonic(), self._clock.now()
        for path, sight in observations:
            self._settling.see(path, sight, before=before, after=after, now_us=now_us)

    def _walk_soon(self) -> None:
        self._walk_at = min(self._walk_at, self._clock.monotonic())

    async def _walk_on(self) -> None:
        """One step of the walk under way, or of the next one that is due."""
        if not self._settling.room:
            return
        walk = self._walk = self._walk or self._next_walk()
        if walk is None:
            return
        walk.into(self._into)
        self._into = []
        before = self._clock.monotonic()
        try:
            step = await self._blocking(walk.step)
        except RootMissing as error:
            self._lose_root(str(error))
            return
        self._see(step.seen, before)
        await self._take_step(step)
        self._walk_took += self._clock.monotonic() - before
        if step.done:
            self._walk = None
            await self._end_walk(walk)

    def _next_walk(self) -> Walk | None:
        whole = self._clock.monotonic() >= self._walk_at
        if not whole and not self._into:
            return None
        if whole:
            self._walk_at, self._walk_took = float("inf"), 0.0
        return Walk(self._tree, self._known, whole=whole, skip_until=self._skip_until)

    async def _take_step(self, step: Step) -> None:
        for path, why in step.denied:
            if path not in self._warned:
                self._warned.add(path)
                self._log.warning(
                    "directory.denied", path=printable(self._tree.full(path)), reason=why
                )
        if step.old:
            samples = await self._blocking(self._desk.samples, [path for path, _ in step.old])
            skipped = [
                (path, sight, sample)
                for (path, sight), sample in zip(step.old, samples, strict=True)
            ]
            await self._offer(
                [], {to_key(path): [*sight, sample, 0] for path, sight, sample in skipped}
            )
            for path, sight, sample in skipped:
                self._known.add(path, mark(sight, sample))
        if step.owed and self._options.leaves:
            await self._remove(step.owed)

    async def _end_walk(self, walk: Walk) -> None:
        if walk.whole:
            now = self._clock.monotonic()
            interval = self._options.rescan if self._native else self._options.poll
            self._walk_at = min(self._walk_at, now + max(interval, 4 * self._walk_took))
            self._directories = walk.directories
            await self._note_beginning()
            self._warn_of_restless()
        else:
            self._directories |= walk.directories
        if self._native:
            self._into += await self._hints.cover(self._directories)
        if not self._walked:
            self._walked = True
            self._log.info(
                "directory.walked", root=printable(self._tree.root), directories=len(self._directories),
                known=len(self._known), pending=len(self._settling),
            )  # fmt: skip

    async def _note_beginning(self) -> None:
        """From now on everything new fires. Unless something was skipped, the note may ride with the first event."""
        if not self._began:
            self._notes[BEGAN] = to_datetime(self._clock.now()).isoformat()
            if self._skip_until is not None:
                await self._offer([], {})
            self._began, self._skip_until = True, None

    def _warn_of_restless(self) -> None:
        for path in self._settling.older_than(self._clock.now() - int(PATIENCE * SECOND)):
            if path not in self._warned:
                self._warned.add(path)
                self._log.warning(
                    "file.unsettled", path=printable(self._tree.full(path)), seconds=PATIENCE
                )

    def _lose_root(self, why: str) -> None:
        """Nothing counts as deleted; `_check_root` finds the root when it is back."""
        if not self._root_missing:
            self._root_missing = True
            self._log.warning("directory.root_missing", root=printable(self._tree.root), reason=why)
        self._walk, self._walk_at, self._root = None, float("inf"), None
        self._root_at = self._clock.monotonic() + self.ROOT_CHECK / 5

    # ------------------------------------------------------------------------- landing

    async def _land_ripe(self) -> None:
        due = self._settling.due(self._clock.monotonic())
        for start in range(0, len(due), BATCH):
            before = self._clock.monotonic()
            self._see(
                await self._blocking(self._tree.look_again, due[start : start + BATCH]), before
            )
        ripe = self._settling.ripe(due)
        for start in range(0, len(ripe), BATCH):
            now_us = self._clock.now()
            await self._land(
                await self._blocking(self._desk.prepare, ripe[start : start + BATCH], now_us),
                now_us,
            )

    async def _land(self, judged: Sequence[Landed], now_us: int) -> None:
        """Records what landed, with its cursor, in one transaction; then remembers it, then lets it go."""
        events: list[Event] = []
        cursor: dict[str, Json] = {}
        settled: list[tuple[Landed, bool]] = []
        for each in judged:
            if each.fate in (Fate.WAITING, Fate.CHANGED):
                self._wait(each)
                continue
            owed = self._known.owes(each.path) if each.fate is not Fate.CREATED else False
            if each.is_file or (each.fate is Fate.DELETED and self._options.deleted and not owed):
                events.append(to_event(each, self._source, now_us))
            owed = self._options.leaves if each.is_file else owed
            cursor[to_key(each.path)] = (
                None if each.sight is None else [*each.sight, each.sample, int(owed)]
            )
            settled.append((each, owed))
        if cursor:
            await self._offer(events, cursor)
        self._remember(settled)
        if leaving := [
            (each.path, each.sight) for each, owed in settled if owed and each.sight is not None
        ]:
            await self._remove(leaving)

    def _wait(self, each: Landed) -> None:
        now = self._clock.monotonic()
        if each.fate is Fate.CHANGED:
            self._settling.postpone(each.path, now)
            return
        if each.problem is not None:
            self._log.warning(
                "file.not_placed", path=printable(self._tree.full(each.path)), reason=each.problem
            )
        self._settling.postpone(
            each.path,
            now + (self._options.poll if each.problem else max(self._options.settle, 1.0)),
        )

    def _remember(self, settled: Sequence[tuple[Landed, bool]]) -> None:
        for each, owed in settled:
            self._settling.done(each.path)
            if each.sight is None:
                self._known.forget(each.path)
            else:
                self._known.add(each.path, mark(each.sight, each.sample, owed))

    async def _offer(self, events: Sequence[Event], cursor: Mapping[str, Json]) -> None:
        """Durable when it returns. While the ledger is full it waits, and nothing counts as seen."""
        merged = {**self._notes, **cursor}
        while True:
            try:
                await self._intake.accept(*events, cursor=merged)
            except StoreFull as full:
                self._log.warning(
                    "directory.slowed",
                    root=printable(self._tree.root),
                    reason=str(full),
                    wait=full.retry_after,
                )
                await self._sleep(full.retry_after, asyncio.Event())
            else:
                self._notes = {}
                return

    async def _remove(self, files: Sequence[tuple[bytes, Sight]]) -> None:
        """The second half of `after`: each file whose event is recorded loses its landing name, and its place in the cursor."""
        for path, outcome in await self._blocking(_remove_all, self._tree, files):
            if outcome is True:
                self._known.forget(path)
                self._notes[to_key(path)] = None
            elif outcome is not False:
                self._log.warning(
                    "file.not_removed", path=printable(self._tree.full(path)), reason=outcome
                )


def _remove_all(tree: Tree, files: Sequence[tuple[bytes, Sight]]) -> list[tuple[bytes, bool | str]]:
    outcomes: list[tuple[bytes, bool | str]] = []
    for path, sight in files:
        try:
            outcomes.append((path, remove(tree, path, sight)))
        except OSError as error:
            outcomes.append((path, str(error)))
    return outcomes


def _below(root: bytes, directory: bytes) -> bytes | None:
    prefix = root.rstrip(b"/") + b"/"
    return directory[len(prefix) :] if directory.startswith(prefix) else None


def _file_clock() -> int:
    """Now, in nanoseconds of the clock that stamps local files, which is a little behind any other: a new pipe carries it."""
    ends = os.pipe()
    try:
        return os.fstat(ends[0]).st_ctime_ns
    finally:
        for end in ends:
            os.close(end)


def _source(root: bytes, remote: bool) -> str:
    """`file://host/root`; without the host where other hosts see the same files."""
    return f"file://{'' if remote else socket.gethostname()}{quote(root)}"
