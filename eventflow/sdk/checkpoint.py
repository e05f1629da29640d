"""`checkpoint()`: what a task body keeps of its work, so that the next attempt goes on where this one was.

    STORE.checkpoints/RUN/CALL/00000007/        one checkpoint: `head` (step, sums, form) and its files; whole, or not there
    STORE.checkpoints/RUN/CALL/.draft-…         one that is being written, or that a crash left half written

A body calls `save` and `load`. A checkpoint is written aside, fsynced and renamed, and belongs to the call (its idempotency key
and arguments), not to the attempt: retries, restarts of the process and a retry by hand find it. An attempt that is over can
save no more. The executor forgets a call's checkpoints once its value is durable; the house sweeps what is left over
(`Checkpoints`). Blocking, for any thread. Next room: `saved.py`, how states become files.
"""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from eventflow.core.errors import CheckpointFailed, UsageError
from eventflow.core.hashing import digest
from eventflow.logs.log import get_logger
from eventflow.loop.flow_loop import flow_loop
from eventflow.sdk.checkpoint_files import (
    Manifest,
    decode,
    encode,
    encode_path,
    write_manifest,
    step_of,
    fsync_path,
    read_verified,
)
from eventflow.sdk.task import TaskContext, task_context
from eventflow.serialization.codecs import fingerprint_diff

DEFAULT_MAX_BYTES = 4 << 30
"""Bytes of one checkpoint, if `largest=` says nothing: a mistake is refused before it fills the disk."""
MIN_FREE_BYTES = 256 << 20
"""Bytes that a checkpoint leaves free, or 2 % of the disk if that is less: the ledger needs them (store/guard.py)."""

log = get_logger("eventflow.checkpoint")
LOG_EVENTS = {
    "checkpoint.damaged": (
        "The checksums of a checkpoint do not match; the previous checkpoint is tried."
    ),
    "checkpoint.ignored": (
        "A checkpoint was saved with other task arguments; the task starts from the beginning."
    ),
    "checkpoint.loaded": "An attempt continues from `step`, saved by an earlier attempt.",
    "checkpoint.not_removed": (
        "An obsolete checkpoint could not be removed; a later sweep removes it."
    ),
    "checkpoint.saved": "A checkpoint is durable (debug).",
    "checkpoint.unavailable": "A task runs outside of a run, where checkpoints are not stored.",
}


class LastCheckpoint(NamedTuple):
    """What `load` gives back."""

    state: Any
    step: int


class CheckpointStore:
    """The checkpoints of one App, in a folder beside its store. From any thread."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lock = threading.Lock()
        """Held while a checkpoint comes into its place: whoever has had it since an attempt was over sees no more of it."""
        self._used: dict[str, set[str]] = {}
        """By run, the calls of it that may have some; of an earlier process's only those that were loaded since."""

    def call_directory(self, key: str) -> Path:
        """Where the call with this idempotency key keeps its own. Names are ours: none comes from an event (S16)."""
        run, _, claim = key.partition("/")
        return self.directory / run / digest(claim.encode()).hex()

    def mark_used(self, key: str) -> None:
        run, _, claim = key.partition("/")
        with self.lock:
            self._used.setdefault(run, set()).add(claim)

    @property
    def is_used(self) -> bool:
        """Whether any run has a checkpoint."""
        return bool(self._used)

    def forget(self, run: str, claim: str | None = None) -> Callable[[], None] | None:
        """The call's value is durable, or with no claim all of the run's: what removes its checkpoints, if it has any."""
        with self.lock:
            calls = self._used.get(run)
            if calls is None or (claim is not None and claim not in calls):
                return None
            if claim is None:
                del self._used[run]
            else:
                calls.discard(claim)
        gone = self.directory / run if claim is None else self.call_directory(f"{run}/{claim}")
        return lambda: self.remove(gone)

    def remove(self, folder: Path) -> None:
        """Takes a folder away, at once to those who look."""
        try:
            aside = Path(tempfile.mkdtemp(prefix=".gone-", dir=self.directory))
            with self.lock, suppress(FileNotFoundError):
                folder.rename(aside / "folder")
            shutil.rmtree(aside)
        except OSError as error:
            log.warning("checkpoint.not_removed", folder=str(folder), error=str(error))

    def run_ids(self) -> list[str]:
        """The runs that something is kept for, as ids are shown."""
        if not self.directory.is_dir():
            return []
        return [each.name for each in self.directory.iterdir() if not each.name.startswith(".")]

    def load_index(self) -> None:
        """What an earlier process left: its runs are remembered, and what it was removing goes. Call before the first run."""
        for left in self.directory.glob(".gone-*"):
            shutil.rmtree(left, ignore_errors=True)
        self._used.update((run, set[str]()) for run in self.run_ids())


_store: ContextVar[CheckpointStore | None] = ContextVar("eventflow_checkpoints", default=None)


_progress_callback: ContextVar[Callable[[], None] | None] = ContextVar(
    "eventflow_further", default=None
)


def enter_checkpoints(store: CheckpointStore, on_progress: Callable[[], None] | None) -> None:
    """Makes `place` the one that a body of this contextvars context keeps its own in.

    `further` is called, from any thread, when it has saved a step beyond all that were saved before it began.
    """
    _store.set(store)
    if on_progress is not None:
        _progress_callback.set(on_progress)


def checkpoint(
    name: str = "", *, keep: int = 1, max_bytes: int = DEFAULT_MAX_BYTES
) -> "Checkpoint":
    """What this call of a task keeps between its attempts. For the body of a `@task`, `async def` or plain.

        kept = checkpoint()
        model, first = kept.load() or (Model(), 0)
        for epoch in range(first, 20):
            model.train()
            kept.save(model.state(), step=epoch + 1)

    - `name`: several in one body need different names.
    - `keep`: how many of the last are kept on disk; `load` gives the last whole one.
    - `largest`: bytes that one may have.

    Outside a run (the task is then its plain function) nothing is kept: `load` gives None, and `save` says so once in the log.
    """
    if flow_loop("checkpoint") is not None:
        raise UsageError(
            "checkpoint(): expected to be called in a @task body, found a flow; a flow's tasks are "
            "recorded anyway"
        )
    if keep < 1 or max_bytes < 1:
        raise UsageError(
            f"checkpoint(keep=, max_bytes=) expected at least 1, found {keep} and {max_bytes}"
        )
    place, context = _store.get(), task_context()
    if place is None or context is None or not context.run_id:
        return Checkpoint(None, context, Path(), keep, max_bytes)
    folder = place.call_directory(context.idempotency_key)
    return Checkpoint(
        place, context, folder / digest(name.encode()).hex() if name else folder, keep, max_bytes
    )


class Checkpoint:
    """The checkpoints of one call: `save` them, `load` the last. Made by `checkpoint()`.

    Everything blocks while the disk writes: in an `async def` body use `await asyncio.to_thread(kept.save, state, step)`,
    unless the state is small.
    """

    def __init__(
        self,
        store: CheckpointStore | None,
        context: TaskContext | None,
        folder: Path,
        keep: int,
        max_bytes: int,
    ) -> None:
        self._store, self._context, self._folder, self._keep, self._max_bytes = (
            store,
            context,
            folder,
            keep,
            max_bytes,
        )
        self._save_lock = threading.Lock()  # two threads of one body save one after the other
        self._has_logged = self._cleared = self._saved = False
        self._on_progress = None if store is None else _progress_callback.get()
        self._highest_step = -1

    @property
    def is_kept(self) -> bool:
        """Whether anything is kept: false outside a run."""
        return self._store is not None

    def save(self, state: Any, step: int) -> None:
        """Keeps `state` as what was reached with `step`. Durable when it returns; the one before is gone then, unless `keep=`.

        A state is plain data (what a task may return without an annotation: dicts, lists, tuples, dates, bytes …) in which
        numpy arrays and torch tensors may stand anywhere, or `bytes`. Raises NotStorable naming what it cannot keep, and
        CheckpointFailed when it is too large, the disk is full, or this attempt is over.
        """
        self._save(step, lambda draft, room: encode(state, draft, room))

    def save_file(self, path: str | os.PathLike[str], step: int) -> None:
        """Keeps a copy of a file, or of a folder with all in it; `load` then gives the Path of that copy, to be read only."""
        self._save(step, lambda draft, room: encode_path(Path(path), draft, room))

    def load(self) -> LastCheckpoint | None:
        """The last `(state, step)` saved by any attempt of this call; None when there is none.

        One whose sums do not hold is logged and left out; one that was saved under other arguments does not count.
        """
        if self._store is None or self._context is None:
            return None
        with self._store.lock:
            pass  # what an earlier attempt was about to put in its place is there now, or never will be
        self._clear_drafts()
        for folder in reversed(self._complete()):
            try:
                head = read_verified(folder)
            except (OSError, ValueError) as damage:
                log.error("checkpoint.damaged", folder=str(folder), error=str(damage))
                continue
            if not self._has_same_arguments(head):
                return None
            self._store.mark_used(self._context.idempotency_key)
            log.info("checkpoint.loaded", step=head.step, saved_by=head.attempt)
            return LastCheckpoint(decode(folder, head), head.step)
        return None

    def clear(self) -> None:
        """Forgets what was saved: the next attempt begins at the beginning."""
        if self._store is not None:
            for folder in self._complete():
                self._store.remove(folder)

    # ----------------------------------------------------------------- writing

    def _save(self, step: int, write: Callable[[Path, "Callable[[int], None]"], Manifest]) -> None:
        place, context = self._store, self._context
        if place is None or context is None:
            if not self._has_logged:
                self._has_logged = True
                log.info("checkpoint.unavailable", reason="outside a run nothing is kept")
            return
        with self._save_lock:
            self._refuse_if_over(context)
            try:
                self._clear_drafts()
                self._make_folder(place)
                place.mark_used(context.idempotency_key)
                draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=self._folder))
                try:
                    head = write(draft, self._check_size)
                    head.step, head.attempt, head.arguments = (
                        step,
                        context.attempt,
                        _text(context.arguments_fingerprint),
                    )
                    write_manifest(draft, head)
                    self._publish(place, context, draft, step)
                except BaseException:
                    shutil.rmtree(draft, ignore_errors=True)
                    raise
            except OSError as error:
                raise CheckpointFailed(
                    f"cannot write to {self._folder}: {error}; the checkpoint before stands"
                ) from error
        log.debug("checkpoint.saved", step=step)

    def _make_folder(self, store: CheckpointStore) -> None:
        above = [
            folder for folder in self._folder.parents if folder.is_relative_to(store.directory)
        ]
        for folder in (*reversed(above), self._folder):
            folder.mkdir(exist_ok=True, mode=0o700)

    def _publish(
        self, store: CheckpointStore, context: TaskContext, draft: Path, step: int
    ) -> None:
        """The moment in which it is there: before it the last one stands, after it this one."""
        with store.lock:
            self._refuse_if_over(context)
            known = self._complete()
            if not self._saved:
                self._highest_step = max(map(step_of, known), default=-1)
            number = int(known[-1].name) + 1 if known else 1
            draft.rename(self._folder / f"{number:08}")
        self._sync(store)
        if self._on_progress is not None and step > self._highest_step:
            self._on_progress()
            self._on_progress = None
        for older in known[: len(known) + 1 - self._keep]:
            store.remove(older)

    def _sync(self, store: CheckpointStore) -> None:
        fsync_path(self._folder)
        if not self._saved:  # its own folder, and those above it, may be new
            self._saved, above = True, self._folder
            while above != store.directory.parent:
                above = above.parent
                fsync_path(above)

    def _refuse_if_over(self, context: TaskContext) -> None:
        if context.is_over:
            raise CheckpointFailed(
                f"attempt {context.attempt} of {context.task!r} is over; it can save no more"
            )

    def _check_size(self, size: int) -> None:
        """Asked with the bytes to come, before any is written."""
        if size > self._max_bytes:
            shown = f"{size / 2**20:.1f} MiB, expected at most {self._max_bytes / 2**20:.1f}"
            raise CheckpointFailed(
                f"the state is {shown}; keep less of it, or raise checkpoint(max_bytes=)"
            )
        disk = os.statvfs(self._folder)
        free, floor = (
            disk.f_bavail * disk.f_frsize,
            min(MIN_FREE_BYTES, disk.f_blocks * disk.f_frsize // 50),
        )
        if free < size + floor:
            shown = f"{free >> 20} MiB free in {self._folder}, expected {(size + floor) / 2**20:.1f} MiB"
            raise CheckpointFailed(f"{shown}; free some space, the checkpoint before stands")

    # ----------------------------------------------------------------- what is there

    def _complete(self) -> list[Path]:
        """Those that were saved, oldest first."""
        return sorted(self._folder.glob("[0-9]" * 8)) if self._folder.is_dir() else []

    def _clear_drafts(self) -> None:
        """What an attempt before this one left half written."""
        if not self._cleared:
            self._cleared = True
            for draft in self._folder.glob(".draft-*"):
                shutil.rmtree(draft, ignore_errors=True)

    def _has_same_arguments(self, head: Manifest) -> bool:
        mine = self._context.arguments_fingerprint if self._context is not None else None
        saved = None if head.arguments is None else head.arguments.encode()
        diff = fingerprint_diff(saved, mine)
        if diff:
            log.warning("checkpoint.ignored", step=head.step, changed=diff)
        return not diff


def _text(fingerprint: bytes | None) -> str | None:
    return None if fingerprint is None else fingerprint.decode()
