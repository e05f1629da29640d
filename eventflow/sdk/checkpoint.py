"""`checkpoint()`: the saved progress of a task body, from which the next attempt continues.

    STORE.checkpoints/RUN/CALL/00000007/   one checkpoint: `head` (its manifest) and its files
    STORE.checkpoints/RUN/CALL/.draft-…    one that is being written, or was interrupted by a crash

A body calls `save` and `load`. A checkpoint is written to a draft directory, fsynced and renamed,
so it is complete or does not exist. It belongs to the call (idempotency key and arguments), not to
the attempt: retries, restarts of the process and manual retries find it. An attempt that is over
cannot save. The engine removes a call's checkpoints once its value is durable; `runtime.py` removes
those that are left over (`CheckpointStore`). Blocking; for any thread. checkpoint_files.py has the
file format.
"""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from eventflow.core.declarations import declaration
from eventflow.core.errors import CheckpointFailed, UsageError
from eventflow.core.forks import call_in_forked_children
from eventflow.core.hashing import digest
from eventflow.logs.log import get_logger
from eventflow.loop.flow_loop import flow_loop
from eventflow.sdk.checkpoint_files import (
    Manifest,
    SizeCheck,
    decode,
    encode,
    encode_path,
    fsync_path,
    make_folder,
    read_verified,
    remove_tree,
    step_of,
    write_manifest,
)
from eventflow.sdk.task import TaskContext, task_context
from eventflow.serialization.codecs import fingerprint_diff

DEFAULT_MAX_BYTES = 4 << 30
"""Default limit of one checkpoint: a mistake is rejected before it fills the disk."""
MIN_FREE_BYTES = 256 << 20
"""A checkpoint leaves this much free, or 2 % of a small disk: the ledger needs it."""

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
    """The result of `Checkpoint.load`."""

    state: Any
    step: int


class CheckpointStore:
    """The checkpoints of one App, in a directory next to its store. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        self.directory: Path = directory
        self.lock: threading.Lock = threading.Lock()
        """Held while a checkpoint is published. After an attempt is over, whoever acquires and
        releases it sees no further checkpoint of that attempt.
        """
        self._used: dict[str, set[str]] = {}
        """By run: the calls that may have checkpoints. Calls of an earlier process are listed only
        once they have been loaded.
        """
        call_in_forked_children(self._after_fork)

    def _after_fork(self) -> None:
        self.lock = threading.Lock()

    def call_directory(self, key: str) -> Path:
        """The directory of the call with this idempotency key.

        No part of the name comes from an event (S16).
        """
        run, _, call_key = key.partition("/")
        return self.directory / run / digest(call_key.encode()).hex()

    def mark_used(self, key: str) -> None:
        """Note that the call with this idempotency key has checkpoints."""
        run, _, call_key = key.partition("/")
        with self.lock:
            self._used.setdefault(run, set()).add(call_key)

    @property
    def is_used(self) -> bool:
        """Whether any run has a checkpoint."""
        return bool(self._used)

    def forget(self, run: str, call_key: str | None = None) -> Callable[[], None] | None:
        """Forget the checkpoints of a call, or of a whole run, that are no longer needed.

        Returns the function that removes their files, or None if there are none.
        """
        with self.lock:
            calls = self._used.get(run)
            if calls is None or (call_key is not None and call_key not in calls):
                return None
            if call_key is None:
                del self._used[run]
                obsolete = self.directory / run
            else:
                calls.discard(call_key)
                obsolete = self.call_directory(f"{run}/{call_key}")
        return lambda: self.remove(obsolete)

    def remove(self, folder: Path) -> None:
        """Remove a directory. It is renamed first, so readers never see a part of it."""
        try:
            aside = make_folder(self.directory, ".gone-")
            with self.lock, suppress(FileNotFoundError):
                folder.rename(aside / "folder")
            remove_tree(aside)
        except OSError as error:
            log.warning("checkpoint.not_removed", folder=str(folder), error=str(error))

    def run_ids(self) -> list[str]:
        """The ids, as text, of the runs with a directory."""
        if not self.directory.is_dir():
            return []
        return [each.name for each in self.directory.iterdir() if not each.name.startswith(".")]

    def load_index(self) -> None:
        """Read which runs have checkpoints of an earlier process, and finish its removals.

        Call it before the first run.
        """
        for removed in self.directory.glob(".gone-*"):
            remove_tree(removed, ignore_errors=True)
        self._used.update((run, set[str]()) for run in self.run_ids())


_store: ContextVar[CheckpointStore | None] = ContextVar("eventflow_checkpoints", default=None)
_progress_callback: ContextVar[Callable[[], None] | None] = ContextVar(
    "eventflow_checkpoint_progress", default=None
)


def enter_checkpoints(store: CheckpointStore, on_progress: Callable[[], None] | None) -> None:
    """Set where `checkpoint()` saves in this contextvars context.

    `on_progress` is called once, from any thread, when the body has saved a higher step than any
    attempt before it.
    """
    _store.set(store)
    if on_progress is not None:
        _progress_callback.set(on_progress)


@declaration
def checkpoint(
    name: str = "", *, keep: int = 1, max_bytes: int = DEFAULT_MAX_BYTES
) -> "Checkpoint":
    """The saved progress of this call of a task. For the body of a `@task`, async or plain.

        progress = checkpoint()
        model, first = progress.load() or (Model(), 0)
        for epoch in range(first, 20):
            model.train()
            progress.save(model.state(), step=epoch + 1)

    - `name`: several in one body need different names.
    - `keep`: the number of checkpoints on disk; `load` returns the last intact one.
    - `max_bytes`: the limit of one checkpoint.

    Outside a run nothing is saved: `load` returns None, and the first `save` logs
    `checkpoint.unavailable`.
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
    store = _store.get()
    context = task_context()
    if store is None or context is None or not context.run_id:
        return Checkpoint(None, context, Path(), keep, max_bytes)
    folder = store.call_directory(context.idempotency_key)
    return Checkpoint(
        store, context, folder / digest(name.encode()).hex() if name else folder, keep, max_bytes
    )


class Checkpoint:
    """The checkpoints of one call of a task. Made by `checkpoint()`.

    All methods block until the disk has written: in an `async def` body use
    `await asyncio.to_thread(progress.save, state, step)`, unless the state is small.
    """

    def __init__(
        self,
        store: CheckpointStore | None,
        context: TaskContext | None,
        folder: Path,
        keep: int,
        max_bytes: int,
    ) -> None:
        self._store: CheckpointStore | None = store  # None: outside a run
        self._context: TaskContext | None = context
        self._folder: Path = folder
        self._keep: int = keep
        self._max_bytes: int = max_bytes
        self._save_lock: threading.Lock = threading.Lock()  # for two threads of one body
        call_in_forked_children(self._after_fork)
        self._has_logged: bool = False  # that nothing is saved outside a run
        self._has_cleared_drafts: bool = False
        self._has_saved: bool = False
        self._on_progress: Callable[[], None] | None = (
            None if store is None else _progress_callback.get()
        )
        self._highest_step: int = -1  # of the attempts before this one

    def _after_fork(self) -> None:
        self._save_lock = threading.Lock()

    @property
    def is_kept(self) -> bool:
        """Whether `save` saves anything: false outside a run."""
        return self._store is not None

    def save(self, state: Any, step: int) -> None:
        """Save `state` as the state after `step`. Durable when it returns.

        The previous checkpoint is removed then, unless `keep` is larger than 1. A state is `bytes`,
        or plain data (as a task may return it without an annotation: dicts, lists, tuples, dates …)
        with numpy arrays and torch tensors anywhere in it. Raises NotStorable, naming the path to a
        value that cannot be stored, and CheckpointFailed if it is too large, the disk is full, or
        this attempt is over.
        """
        self._save(step, lambda draft, check_size: encode(state, draft, check_size))

    def save_file(self, path: str | os.PathLike[str], step: int) -> None:
        """Save a copy of a file or directory. `load` returns the Path of the copy: only read it."""
        self._save(step, lambda draft, check_size: encode_path(Path(path), draft, check_size))

    def load(self) -> LastCheckpoint | None:
        """The last `(state, step)` that any attempt of this call saved; None if there is none.

        Skips, and logs, a checkpoint with wrong checksums. Returns None for one that was saved with
        other arguments.
        """
        if self._store is None or self._context is None:
            return None
        with self._store.lock:
            pass  # an earlier attempt has published its checkpoint by now, or never will
        self._clear_drafts()
        for folder in reversed(self._complete()):
            try:
                manifest = read_verified(folder)
            except (OSError, ValueError) as damage:
                log.error("checkpoint.damaged", folder=str(folder), error=str(damage))
                continue
            if not self._has_same_arguments(manifest):
                return None
            self._store.mark_used(self._context.idempotency_key)
            log.info("checkpoint.loaded", step=manifest.step, saved_by=manifest.attempt)
            return LastCheckpoint(decode(folder, manifest), manifest.step)
        return None

    def clear(self) -> None:
        """Remove the saved checkpoints: the next attempt starts from the beginning."""
        if self._store is not None:
            for folder in self._complete():
                self._store.remove(folder)

    # ----------------------------------------------------------------- writing

    def _save(self, step: int, write: Callable[[Path, SizeCheck], Manifest]) -> None:
        store = self._store
        context = self._context
        if store is None or context is None:
            if not self._has_logged:
                self._has_logged = True
                log.info("checkpoint.unavailable", reason="nothing is saved outside a run")
            return
        with self._save_lock:
            self._refuse_if_over(context)
            try:
                self._clear_drafts()
                self._make_folder(store)
                store.mark_used(context.idempotency_key)
                draft = make_folder(self._folder, ".draft-")
                try:
                    manifest = write(draft, self._check_size)
                    manifest.step = step
                    manifest.attempt = context.attempt
                    if context.arguments_fingerprint is not None:
                        manifest.arguments = context.arguments_fingerprint.decode()
                    write_manifest(draft, manifest)
                    self._publish(store, context, draft, step)
                except BaseException:
                    remove_tree(draft, ignore_errors=True)
                    raise
            except OSError as error:
                raise CheckpointFailed(
                    f"cannot write to {self._folder}: {error}; the previous checkpoint is intact"
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
        """Rename the draft, so that it becomes the last checkpoint."""
        with store.lock:
            self._refuse_if_over(context)
            complete = self._complete()
            if not self._has_saved:
                self._highest_step = max(map(step_of, complete), default=-1)
            number = int(complete[-1].name) + 1 if complete else 1
            draft.rename(self._folder / f"{number:08}")
        self._sync(store)
        if self._on_progress is not None and step > self._highest_step:
            self._on_progress()
            self._on_progress = None
        for older in complete[: len(complete) + 1 - self._keep]:
            store.remove(older)

    def _sync(self, store: CheckpointStore) -> None:
        fsync_path(self._folder)
        if not self._has_saved:  # the directory and those above it may be new
            self._has_saved = True
            above = self._folder
            while above != store.directory.parent:
                above = above.parent
                fsync_path(above)

    def _refuse_if_over(self, context: TaskContext) -> None:
        if context.is_over:
            raise CheckpointFailed(
                f"attempt {context.attempt} of {context.task!r} is over; it cannot save"
            )

    def _check_size(self, size: int) -> None:
        """Raise CheckpointFailed if `size` bytes are too many. Called before any is written."""
        if size > self._max_bytes:
            raise CheckpointFailed(
                f"the state is {size / 2**20:.1f} MiB, expected at most "
                f"{self._max_bytes / 2**20:.1f}; keep less of it, or raise checkpoint(max_bytes=)"
            )
        disk = os.statvfs(self._folder)
        free = disk.f_bavail * disk.f_frsize
        reserve = min(MIN_FREE_BYTES, disk.f_blocks * disk.f_frsize // 50)
        if free < size + reserve:
            raise CheckpointFailed(
                f"{free >> 20} MiB free in {self._folder}, expected "
                f"{(size + reserve) / 2**20:.1f} MiB; free some space, the previous checkpoint is "
                "intact"
            )

    # ----------------------------------------------------------------- directory contents

    def _complete(self) -> list[Path]:
        """The directories of complete checkpoints, oldest first."""
        return sorted(self._folder.glob("[0-9]" * 8)) if self._folder.is_dir() else []

    def _clear_drafts(self) -> None:
        """Remove drafts that an earlier attempt did not complete."""
        if not self._has_cleared_drafts:
            self._has_cleared_drafts = True
            for draft in self._folder.glob(".draft-*"):
                remove_tree(draft, ignore_errors=True)

    def _has_same_arguments(self, manifest: Manifest) -> bool:
        mine = self._context.arguments_fingerprint if self._context is not None else None
        saved = None if manifest.arguments is None else manifest.arguments.encode()
        diff = fingerprint_diff(saved, mine)
        if diff:
            log.warning("checkpoint.ignored", step=manifest.step, changed=diff)
        return not diff
