"""Checkpoints: what one attempt saved, the next one loads, whatever was killed when; nothing else
is left.
"""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy
import pytest

from eventflow import App, Permanent, UsageError, checkpoint, current_task, flow, task
from eventflow.core.clock import SystemClock
from eventflow.core.errors import CheckpointFailed, NotStorable
from eventflow.sdk.checkpoint import Checkpoint, CheckpointStore
from eventflow.sdk.task import TaskContext
from eventflow.testing import drain, result_of, running
from tests.conftest import eventually
from tests.durable import SyncedFiles

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def attempt(
    checkpoints: CheckpointStore, number: int = 1, *, arguments: bytes | None = None, **given: Any
) -> Checkpoint:
    """The result of `checkpoint()` in the body of attempt `number` of one call."""
    context = TaskContext("01run", "train", number, "01run/train#0", None, arguments)
    return Checkpoint(
        checkpoints,
        context,
        checkpoints.call_directory("01run/train#0"),
        given.get("keep", 1),
        given.get("max_bytes", 1 << 20),
    )


def files(folder: Path) -> list[Path]:
    """Those below a folder, which may be removed meanwhile."""
    return [Path(root, name) for root, _, names in os.walk(folder) for name in names]


# --------------------------------------------------------------------------- durable


def test_a_checkpoint_is_durable_when_save_returns(
    checkpoints: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All files of the first and of later checkpoints, and every name on the way to them, have been
    synced.
    """
    synced = SyncedFiles(monkeypatch)
    saving = attempt(checkpoints, keep=3)
    for step in (1, 2):
        saving.save({"w": numpy.arange(1000) * step}, step=step)
        assert synced.missing(tmp_path / "checkpoints", above=tmp_path) == []


# --------------------------------------------------------------------------- what comes back

STATES: list[Any] = [
    {"epoch": 3, "history": [0.5, 0.25], "done": False, "none": None},
    {
        "when": datetime(2026, 7, 1, tzinfo=UTC),
        "price": Decimal("1.50"),
        7: ("a", b"\x00\xff"),
        "big": 1 << 80,
    },
    {"nan": float("nan"), "inf": float("-inf")},
    {"$tuple": [1]},
    b"\x80\x04raw",
    [],
    "text",
    None,
]


@pytest.mark.parametrize("state", STATES, ids=lambda state: str(state)[:24])
def test_plain_data_is_restored(checkpoints: CheckpointStore, state: Any):
    """A state of plain data is loaded equal down to the types, by another attempt."""
    attempt(checkpoints).save(state, step=4)
    saved = attempt(checkpoints, 2).load()
    assert saved is not None and saved.step == 4
    assert repr(saved.state) == repr(state)


def test_arrays_are_restored_anywhere_in_a_state(checkpoints: CheckpointStore):
    """numpy arrays and scalars in dicts, lists and tuples are restored with their types, next to
    plain data, without pickle.
    """
    weights = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)
    state = OrderedDict(
        layers=[{"w": weights, "b": numpy.zeros(2, dtype=numpy.int8)}, None],
        best=numpy.float64(0.5),
        pair=(numpy.array(7), None, "x"),
        days=numpy.array(["2026-07-01"], dtype="datetime64[D]"),
        empty=[],
        none=None,
    )
    attempt(checkpoints).save(state, step=1)
    assert not any(
        b"pickle" in path.read_bytes() or path.suffix == ".pkl"
        for path in files(checkpoints.directory)
    )
    saved = attempt(checkpoints).load()
    assert saved is not None
    got = saved.state
    assert (
        list(got) == list(state)
        and got["layers"][1] is None
        and got["empty"] == []
        and got["none"] is None
    )
    numpy.testing.assert_array_equal(got["layers"][0]["w"], weights)
    assert (
        got["layers"][0]["w"].dtype == numpy.float32 and got["layers"][0]["b"].dtype == numpy.int8
    )
    assert type(got["best"]) is numpy.float64 and got["best"] == 0.5
    assert (
        type(got["pair"]) is tuple and got["pair"][0].shape == () and got["pair"][1:] == (None, "x")
    )
    assert got["days"].dtype == numpy.dtype("datetime64[D]")


def test_an_array_alone_is_a_state(checkpoints: CheckpointStore):
    """The state may be one array, not only a dict of them."""
    attempt(checkpoints).save(numpy.eye(3), step=1)
    saved = attempt(checkpoints).load()
    assert saved is not None and numpy.array_equal(saved.state, numpy.eye(3))


def test_a_value_that_cannot_be_stored_is_named(checkpoints: CheckpointStore):
    """A state that would need pickle raises when it is saved, with the path to the value; the
    previous checkpoint is intact.
    """
    kept = attempt(checkpoints)
    kept.save({"epoch": 1}, step=1)
    for state, path in [
        ({"model": [object()]}, r"state\['model'\]\[0\] is a object"),
        (
            {"a": {"b": numpy.array([object()], dtype=object)}},
            r"\['a'\]\['b'\] is a numpy array of Python objects",
        ),
        ({"mask": numpy.ma.array([1], mask=[True])}, r"\['mask'\] is a numpy.ma.MaskedArray"),
    ]:
        with pytest.raises(NotStorable, match=path):
            kept.save(state, step=2)
    saved = attempt(checkpoints).load()
    assert saved == ({"epoch": 1}, 1)
    assert not list(checkpoints.directory.rglob(".draft*"))


def test_files_and_directories_are_copied(checkpoints: CheckpointStore, tmp_path: Path):
    """`save_file` copies a file or directory; `load` returns the Path of the copy, with the same
    name.
    """
    model = tmp_path / "model.bin"
    model.write_bytes(b"one")
    attempt(checkpoints).save_file(model, step=1)
    model.write_bytes(b"two")
    saved = attempt(checkpoints).load()
    assert (
        saved is not None and saved.state.name == "model.bin" and saved.state.read_bytes() == b"one"
    )
    tree = tmp_path / "tree"
    (tree / "deep" / "empty").mkdir(parents=True)
    (tree / "head").write_text("not ours")
    (tree / os.fsdecode(b"caf\xe9")).write_text("no UTF-8")
    (tree / "deep" / "link").symlink_to(model)
    attempt(checkpoints).save_file(tree, step=2)
    saved = attempt(checkpoints).load()
    assert saved is not None and saved.step == 2
    assert (saved.state / "deep" / "link").read_bytes() == b"two" and not (
        saved.state / "deep" / "link"
    ).is_symlink()
    assert (saved.state / "deep" / "empty").is_dir() and (
        saved.state / os.fsdecode(b"caf\xe9")
    ).exists()
    with pytest.raises(UsageError, match="expected a file or a folder, found none"):
        attempt(checkpoints).save_file(tmp_path / "missing", step=3)


def test_tensors_are_restored(checkpoints: CheckpointStore):
    """A torch state dict is restored with its types, on the CPU; only tensors are unpickled."""
    torch = pytest.importorskip(
        "torch", reason="torch is no dependency; this runs where it is installed"
    )
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "array": numpy.ones(2),
        "epoch": 3,
    }
    attempt(checkpoints).save(state, step=3)
    saved = attempt(checkpoints).load()
    assert saved is not None
    again = torch.nn.Linear(3, 2)
    again.load_state_dict(saved.state["model"])
    assert all(
        torch.equal(mine, its)
        for mine, its in zip(again.parameters(), model.parameters(), strict=True)
    )
    torch.optim.Adam(again.parameters()).load_state_dict(saved.state["optimizer"])
    assert saved.state["half"].dtype == torch.bfloat16 and saved.state["epoch"] == 3


# --------------------------------------------------------------------------- what is on disk


def test_the_last_ones_are_kept(checkpoints: CheckpointStore):
    """By default one checkpoint is on disk, with `keep` as many; the newest is loaded, whatever its
    step.
    """
    for step in (5, 6, 2):
        attempt(checkpoints).save({"step": step}, step)
    assert len(list(checkpoints.directory.rglob("head"))) == 1
    for step in range(5):
        attempt(checkpoints, keep=3).save({"step": step}, step)
    assert len(list(checkpoints.directory.rglob("head"))) == 3
    assert attempt(checkpoints).load() == ({"step": 4}, 4)


def test_a_damaged_checkpoint_is_skipped_and_logged(
    checkpoints: CheckpointStore, caplog: pytest.LogCaptureFixture
):
    """A checkpoint whose bytes changed is never loaded: the previous one is, or none, and the log
    names it.
    """
    kept = attempt(checkpoints, keep=2)
    kept.save({"epoch": 1}, step=1)
    kept.save({"epoch": 2}, step=2)
    newest = sorted(checkpoints.directory.rglob("0000*"))[-1]
    (newest / "state").write_bytes(b'{"epoch":9}')
    assert attempt(checkpoints).load() == ({"epoch": 1}, 1)
    assert "checkpoint.damaged" in caplog.text
    (newest / "head").write_bytes(b"")  # as a power cut leaves it
    assert attempt(checkpoints).load() == ({"epoch": 1}, 1)
    (newest / "state").unlink()
    (newest.parent / "00000001" / "state").unlink()
    assert attempt(checkpoints).load() is None


def test_drafts_of_killed_attempts_are_removed(checkpoints: CheckpointStore):
    """What a killed attempt did not complete is no checkpoint; the next attempt removes it."""
    attempt(checkpoints).save({"epoch": 1}, step=1)
    draft = checkpoints.call_directory("01run/train#0") / ".draft-dead"
    draft.mkdir()
    (draft / "state").write_text("half")
    assert attempt(checkpoints, 2).load() == ({"epoch": 1}, 1)
    assert not draft.exists()


def test_the_directory_is_private(checkpoints: CheckpointStore):
    """Only the owner can read the directory."""
    attempt(checkpoints).save({}, step=1)
    folder = checkpoints.call_directory("01run/train#0")
    assert {
        each.stat().st_mode & 0o77 for each in (folder, folder.parent, checkpoints.directory)
    } == {0}


def test_limits_are_checked_before_anything_is_written(
    checkpoints: CheckpointStore, tmp_path: Path
):
    """Too large a state or file raises with both sizes, and the previous checkpoint is intact."""
    attempt(checkpoints).save({"epoch": 1}, step=1)
    large = tmp_path / "large"
    large.write_bytes(bytes(3 << 20))
    for save in (
        lambda kept: kept.save(numpy.zeros(1 << 19), step=2),
        lambda kept: kept.save(bytes(3 << 20), step=2),
        lambda kept: kept.save_file(large, step=2),
    ):
        with pytest.raises(CheckpointFailed, match=r"\d\.\d MiB, expected at most 1\.0"):
            save(attempt(checkpoints))
    with pytest.raises(CheckpointFailed, match=r"MiB free in .*, expected"):
        attempt(checkpoints, max_bytes=1 << 62).save_file(_sparse(tmp_path, 1 << 42), step=2)
    assert attempt(checkpoints).load() == ({"epoch": 1}, 1)


def _sparse(folder: Path, size: int) -> Path:
    path = folder / "sparse"
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_an_operating_system_error_is_reported(tmp_path: Path):
    """An operating system error is CheckpointFailed, which names the path."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointFailed, match=r"cannot write to .*file"):
        attempt(CheckpointStore(tmp_path / "file")).save({}, step=1)


FULL = """
import resource, sys
from pathlib import Path
import numpy
from eventflow.sdk.checkpoint import Checkpoint, CheckpointStore
from eventflow.core.errors import CheckpointFailed
from eventflow.sdk.task import TaskContext

store = CheckpointStore(Path(sys.argv[1]))
context = TaskContext("01run", "train", 1, "01run/train#0")
kept = Checkpoint(store, context, store.call_directory("01run/train#0"), 1, 1 << 30)
kept.save({"epoch": 1}, step=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
for state in (numpy.ones(1 << 20), bytes(1 << 20), "x" * (1 << 20)):
    try:
        kept.save(state, step=2)
    except CheckpointFailed as error:
        print(error)
"""


def test_an_interrupted_write_leaves_the_previous_checkpoint(checkpoints: CheckpointStore):
    """When the system rejects a write in the middle of a state, the error has the cause and nothing
    of it is left.
    """
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(checkpoints.directory)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout.count("File too large; the previous checkpoint is intact") == 3
    assert attempt(checkpoints).load() == ({"epoch": 1}, 1)
    assert len(files(checkpoints.directory)) == 2


# --------------------------------------------------------------------------- whose they are


def test_p7_an_attempt_that_is_over_cannot_save(checkpoints: CheckpointStore):
    """An abandoned body cannot replace its successor's state."""
    late = attempt(checkpoints)
    late.save({"by": 1}, step=1)
    assert late._context is not None
    late._context.is_over = True
    attempt(checkpoints, 2).save({"by": 2}, step=2)
    with pytest.raises(CheckpointFailed, match="attempt 1 of 'train' is over"):
        late.save({"by": 1}, step=9)
    assert attempt(checkpoints, 2).load() == ({"by": 2}, 2)


def test_other_arguments_start_from_the_beginning(
    checkpoints: CheckpointStore, caplog: pytest.LogCaptureFixture
):
    """What was saved with other arguments of the call is not loaded; the log names what changed."""
    attempt(checkpoints, arguments=b'{"rate":0.1,"x":"?"}').save({"epoch": 1}, step=1)
    assert attempt(checkpoints, arguments=b'{"rate":0.1,"x":"?"}').load() is not None
    assert attempt(checkpoints, arguments=b'{"rate":0.2,"x":"?"}').load() is None
    assert "rate: 0.1 -> 0.2" in caplog.text


# --------------------------------------------------------------------------- in a run


def kept_runs(app: App) -> list[str]:
    return app.runtime.retention.checkpoints.run_ids()


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_retry_continues_from_the_last_checkpoint(tmp_path: Path, is_async: bool):
    """Attempt 2 loads what attempt 1 saved, in a thread and on the loop; after success nothing is
    left on disk.
    """
    done: list[tuple[int, int]] = []

    def steps(kept: Checkpoint) -> Any:
        saved = kept.load()
        for step in range(saved.step if saved else 0, 5):
            done.append((current_task().attempt, step))
            yield step
            if step == 2 and current_task().attempt == 1:
                raise ConnectionError("in the middle")

    def train() -> str:
        kept = checkpoint()
        for step in steps(kept):
            kept.save({"w": numpy.full(3, step)}, step=step + 1)
        return "trained"

    async def train_async() -> str:
        kept = checkpoint()
        for step in steps(kept):
            await asyncio.to_thread(kept.save, {"w": numpy.full(3, step)}, step=step + 1)
        return "trained"

    body: Any = train_async if is_async else train
    work = task(name="train", retries=[0, 0])(body)

    @flow
    async def fit() -> str:
        return await work()

    app = App("fit")
    app.add(fit)
    async with running(app, store=tmp_path / "store.db"):
        assert await result_of(app, fit) == "trained"
        assert done == [(1, 0), (1, 1), (1, 2), (2, 3), (2, 4)]
        await eventually(lambda: not kept_runs(app), "the checkpoints are removed")
    assert not files(tmp_path / "store.db.checkpoints")


async def test_success_of_one_call_removes_only_its_own(tmp_path: Path):
    """During the run, a finished call's checkpoints are removed and the others stay; a failed run
    keeps its own, and a manual retry continues from them.
    """
    seen: list[Any] = []
    broken = [True]

    @task
    def first() -> None:
        checkpoint().save({"first": 1}, step=1)

    @task
    def second() -> None:
        kept = checkpoint()
        seen.append(kept.load())
        kept.save({"second": 2}, step=2)
        if broken:
            raise Permanent("broken")

    @flow
    async def both() -> None:
        await first()
        await second()

    app = App("both")
    app.add(both)
    async with running(app, store=tmp_path / "store.db"):
        handle = await app.start(both)
        await drain(app)
        directory = tmp_path / "store.db.checkpoints"
        await eventually(
            lambda: len(list(directory.glob("*/*/*/head"))) == 1, "only the second call's is left"
        )
        assert kept_runs(app) == [handle.id]
        broken.clear()
        await app.store.retry((await handle.row())["id"])
        await drain(app)
        assert seen == [None, ({"second": 2}, 2)]
        await eventually(lambda: not kept_runs(app), "the run is completed, and nothing of it kept")


async def test_a_retry_from_scratch_starts_from_the_beginning(tmp_path: Path):
    """A retry that discards the journal removes the checkpoints too."""
    seen: list[Any] = []

    @task
    def work() -> None:
        kept = checkpoint()
        seen.append(kept.load())
        kept.save([len(seen)], step=len(seen))
        if len(seen) < 3:
            raise Permanent("not yet")

    @flow
    async def alone() -> None:
        await work()

    app = App("alone")
    app.add(alone)
    async with running(app, store=tmp_path / "store.db"):
        handle = await app.start(alone)
        await drain(app)
        ident = (await handle.row())["id"]
        await app.store.retry(ident, discard_journal=True)
        await drain(app)
        await app.store.retry(ident)
        await drain(app)
        assert seen == [None, None, ([2], 2)]


async def test_p7_a_thread_that_timed_out_cannot_save(tmp_path: Path):
    """A thread cannot be stopped; what it tries to save after its timeout raises."""
    release, tried, refused = threading.Event(), threading.Event(), []

    @task(timeout=0.3, retries=[0])
    def work() -> int:
        kept = checkpoint()
        if current_task().attempt == 2:
            release.set()
            tried.wait(10)
            saved = kept.load()
            return saved.step if saved else 0
        kept.save({"by": 1}, step=1)
        release.wait(20)
        try:
            kept.save({"by": 1}, step=99)
        except CheckpointFailed as error:
            refused.append(str(error))
        tried.set()
        return 99

    @flow
    async def alone() -> int:
        return await work()

    app = App("alone")
    app.add(alone)
    async with running(app, store=tmp_path / "store.db", clock=SystemClock()):
        run = await app.start(alone)
        assert await run.result() == 1
    assert "attempt 1 of 'work' is over" in refused[0]


async def test_the_runtime_removes_what_a_crash_left(tmp_path: Path):
    """Checkpoints of completed runs, and of runs that the ledger does not know, are removed; those
    of a failed run stay.
    """

    @flow
    async def noop(fail: bool) -> None:
        if fail:
            raise Permanent("failed")

    app = App("noop")
    app.add(noop)
    async with running(app, store=tmp_path / "store.db"):
        done, failed = await app.start(noop, fail=False), await app.start(noop, fail=True)
        await drain(app)
        checkpoints = app.runtime.retention.checkpoints
        for run in (done.id, failed.id, "0" * 13):
            context = TaskContext(run, "t", 1, f"{run}/t#0")
            Checkpoint(
                checkpoints,
                context,
                checkpoints.call_directory(context.idempotency_key),
                1,
                1 << 20,
            ).save({}, step=1)
        await app.runtime.retention.sweep_checkpoints()
        assert kept_runs(app) == [failed.id]


async def test_a_restart_completes_a_removal(tmp_path: Path):
    """A value became durable before its checkpoints were removed: the next process removes them
    when the run completes.
    """
    held_up = [True]

    @task
    def train() -> int:
        checkpoint().save({"epoch": 1}, step=1)
        return 1

    @task(retries=[0.0] * 3)
    async def wait() -> None:
        if held_up:
            await asyncio.Event().wait()

    @flow
    async def both() -> int:
        value = await train()
        await wait()
        return value

    app = App("both")
    app.add(both)
    store = tmp_path / "store.db"
    async with running(app, store=store):
        run = await app.start(both)
        await eventually(
            (tmp_path / "store.db.checkpoints" / run.id).exists, "a checkpoint is saved", poll=0
        )
        await eventually(lambda: not files(tmp_path / "store.db.checkpoints"), "and removed")
    checkpoints = CheckpointStore(tmp_path / "store.db.checkpoints")
    context = TaskContext(run.id, "train", 1, f"{run.id}/train#0")
    Checkpoint(
        checkpoints, context, checkpoints.call_directory(context.idempotency_key), 1, 1 << 20
    ).save({"epoch": 1}, step=1)
    (checkpoints.directory / ".gone-dead").mkdir()
    held_up.clear()
    async with running(app, store=store):
        await drain(app)
        assert (await run.row())["state"] == "completed"
        await eventually(lambda: not files(checkpoints.directory), "what was left is removed")
        assert not (checkpoints.directory / ".gone-dead").exists()


# --------------------------------------------------------------------------- outside a run; errors


async def test_outside_a_run_nothing_is_saved(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A task called as its function loads nothing, saves nothing, and logs that once."""
    monkeypatch.chdir(tmp_path)

    @task
    def work() -> bool:
        kept = checkpoint()
        assert kept.load() is None
        kept.save({"epoch": 1}, step=1)
        kept.save({"epoch": 2}, step=2)
        kept.clear()
        return kept.is_kept

    caplog.set_level("INFO")
    assert await work() is False and work.fn() is False
    assert caplog.text.count("checkpoint.unavailable") == 2
    assert list(tmp_path.iterdir()) == []


async def test_a_flow_cannot_checkpoint():
    """In a flow's body it raises, since a replay would skip it."""

    @flow
    async def wrong() -> None:
        checkpoint()

    app = App("wrong")
    app.add(wrong)
    async with running(app):
        with pytest.raises(UsageError, match="expected to be called in a @task body, found a flow"):
            await result_of(app, wrong)


def test_names_separate_checkpoints(checkpoints: CheckpointStore):
    """Checkpoints of one body with different names are independent, and are removed together."""
    attempt(checkpoints).save("plain", step=1)
    context = TaskContext("01run", "train", 1, "01run/train#0")
    named = Checkpoint(
        checkpoints, context, checkpoints.call_directory("01run/train#0") / "name", 1, 1 << 20
    )
    named.save("named", step=2)
    assert attempt(checkpoints).load() == ("plain", 1) and named.load() == ("named", 2)
    attempt(checkpoints).clear()
    assert attempt(checkpoints).load() is None and named.load() == ("named", 2)
    remove = checkpoints.forget("01run", "train#0")
    assert remove is not None
    remove()
    assert named.load() is None


@pytest.mark.parametrize("given", [{"keep": 0}, {"max_bytes": 0}])
def test_limits_must_be_positive(given: dict[str, Any]):
    """Limits below 1 raise."""
    with pytest.raises(UsageError, match="expected at least 1"):
        checkpoint(**given)


# --------------------------------------------------------------------------- killed

TRAINING = """
import asyncio, os, sys, time
from eventflow import App
from eventflow import checkpoint, flow, task

@task
def train(stuck: bool) -> list[int]:
    kept = checkpoint()
    pids, done = kept.load() or ([], 0)
    for epoch in range(done + 1, 13):
        kept.save([*pids, os.getpid()], step=1 if stuck else epoch)
        print(epoch, flush=True)
        if epoch % 2 == 0 and epoch < 12:
            os._exit(9)  # two epochs in each life
    return pids

@flow
async def fit(stuck: bool) -> int:
    return len(await train(stuck))

app = App("fit")

async def main() -> None:
    await app.open(store=sys.argv[1])
    run = await app.start(fit, idempotency_key="one", stuck=sys.argv[2] == "stuck")
    print("result", await run.result(), flush=True)
    await app.close()

app.add(fit)
asyncio.run(main())
"""


def lives(folder: Path, how: str) -> tuple[list[list[str]], str]:
    """What each process of TRAINING printed until one ended by itself, and that one's last error
    line.
    """
    printed: list[list[str]] = []
    while len(printed) < 10:
        command = [sys.executable, "-c", TRAINING, f"sqlite:///{folder}/store.db", how]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        printed.append(done.stdout.split("\n")[:-1])
        if done.returncode != 9:
            return printed, done.stderr.strip().split("\n")[-1]
    pytest.fail(f"it never ended: {printed}")


def test_a_training_that_progresses_in_each_process_is_not_quarantined(tmp_path: Path):
    """Five crashes during one attempt do not quarantine the run: each process saved a higher step
    than the one before.
    """
    printed, _ = lives(tmp_path, "healthy")
    assert printed == [
        ["1", "2"],
        ["3", "4"],
        ["5", "6"],
        ["7", "8"],
        ["9", "10"],
        ["11", "12", "result 5"],
    ]


def test_a_training_without_progress_is_quarantined(tmp_path: Path):
    """Saving the same step again in each process is no progress: after three crashes the run is
    dead.
    """
    printed, error = lives(tmp_path, "stuck")
    assert len(printed) == 5 and "RunDead" in error


VICTIM = """
import sys
from pathlib import Path
import numpy
from eventflow.sdk.checkpoint import Checkpoint, CheckpointStore
from eventflow.sdk.task import TaskContext

store = CheckpointStore(Path(sys.argv[1]))
context = TaskContext("01run", "train", 1, "01run/train#0")
kept = Checkpoint(store, context, store.call_directory("01run/train#0"), 1, 1 << 30)
saved = kept.load()
step = saved.step if saved else 0
print(step, flush=True)
while True:
    step += 1
    kept.save({"w": numpy.full(20_000, step), "step": step}, step)
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path: Path):
    """Killed with -9 a dozen times while it saves, a body finds the last checkpoint that it saw
    saved, or the one after, complete.
    """
    last_printed = 0
    for life in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(tmp_path / "kept")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout
        found = int(process.stdout.readline())
        assert last_printed <= found <= last_printed + 1
        for _ in range(life % 4):
            last_printed = int(process.stdout.readline())
        if life % 2:
            os.sched_yield()
            threading.Event().wait(life / 1000)  # somewhere in the middle of the next one
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split("\n")
        process.wait()
        process.stdout.close()
        last_printed = max([last_printed, found, *(int(line) for line in rest[:-1] if line)])
    assert last_printed > 10
    saved = attempt(CheckpointStore(tmp_path / "kept")).load()
    assert (
        saved is not None
        and saved.state["step"] == saved.step
        and (saved.state["w"] == saved.step).all()
    )
