"""Files after their event is recorded: moved or deleted, in spite of crashes, and never lost."""

import asyncio
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from eventflow.core.clock import SystemClock
from eventflow.core.errors import StoreFull
from eventflow.logs.progress import Progress
from eventflow.store.sqlite import SqliteStore
from eventflow.testing.trigger_contract import ContractLedger
from tests.conftest import eventually, stays
from tests.triggers.inbox import Inbox, run, touch, watched
from triggers._files import post_actions
from triggers.files import delete, move


def files(directory: Path) -> list[str]:
    return sorted(
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    )


async def leaves(inbox: Inbox, *names: str) -> None:
    await eventually(
        lambda: not any((inbox.root / name).exists() for name in names), f"{names} have left"
    )


# ------------------------------------------------------------------ move and delete


def test_moved_file_is_at_the_path_of_its_event(tmp_path: Path):
    """`after=move(...)` moves each file to its path below the target, which `data["path"]` names;
    the cursor forgets it.
    """

    async def test(inbox: Inbox) -> None:
        inbox.write("a.csv", "a")
        inbox.write("sub/b.csv", "b")
        await leaves(inbox, "a.csv", "sub/b.csv")
        assert files(tmp_path / "done") == ["a.csv", "sub/b.csv"]
        for event in inbox.events:
            assert Path(event.data["path"]) == tmp_path / "done" / event.data["relpath"]
            assert Path(event.data["path"]).read_text() == event.data["name"][0]
        await eventually(
            lambda: inbox.ledger.cursors.keys() == {"/began"}, "the cursor forgets them"
        )
        await inbox.wait_until_idle()
        assert len(inbox.without_probes()) == 2 and inbox.names("deleted") == []

    run(test, tmp_path / "in", after=move(tmp_path / "done"), deleted=True)


def test_the_path_holds_before_the_event_is_recorded(tmp_path: Path):
    """From the moment the event is offered the file is at `data["path"]`, so that a flow may start
    at once; and while it is not recorded the file keeps its landing name.
    """

    async def test(inbox: Inbox) -> None:
        inbox.ledger.error = StoreFull("full", 0.05)
        inbox.write("a")
        await eventually(lambda: inbox.ledger.refused_calls > 1, "it is offered")
        assert (inbox.root / "a").exists()
        offered = {item.data["path"] for item in inbox.ledger.offered}  # type: ignore[union-attr]
        assert offered == {str(tmp_path / "done/a")} and (tmp_path / "done/a").read_text() == "data"
        inbox.ledger.error = None
        await leaves(inbox, "a")

    run(test, tmp_path / "in", after=move(tmp_path / "done"))


def test_move_below_the_root(tmp_path: Path):
    """A relative target lies below the root, and what was moved there does not fire again, however
    often it is walked past.
    """

    async def test(inbox: Inbox) -> None:
        inbox.write("a")
        await leaves(inbox, "a")
        assert files(inbox.root) == ["processed/a"]
        await stays(lambda: inbox.names() == ["a"], "nothing else is an event", during=0.5)

    run(test, tmp_path / "in", after=move("processed"), rescan=0.1)


def test_a_taken_name_gets_a_suffix(tmp_path: Path):
    """A file whose name is taken at the target is moved under another one, which its event names;
    nothing is overwritten.
    """

    async def test(inbox: Inbox) -> None:
        for text in ("one", "two", "three"):
            inbox.write("x.csv", text)
            await leaves(inbox, "x.csv")
        found = {Path(event.data["path"]).read_text(): event.data["path"] for event in inbox.events}
        assert found.keys() == {"one", "two", "three"} and len(files(tmp_path / "done")) == 3
        assert found["one"].endswith("/x.csv") and all(
            path.endswith(".csv") for path in found.values()
        )
        assert inbox.events[1].id[:8] in found["two"]

    run(test, tmp_path / "in", after=move(tmp_path / "done"))


LONGEST = 255
"""Bytes of a file name."""

LONG_NAMES = {
    "ascii": "x" * (LONGEST - 4) + ".csv",
    "two bytes": "é" * 125 + "x.csv",
    "three bytes": "漢" * 83 + "xy.csv",
    "four bytes": "😀" * 62 + "xyz.csv",
    "decomposed": "e\u0301" * 83 + "x.csv",
    "no suffix": "x" * LONGEST,
    "long suffix": "x." + "y" * (LONGEST - 2),
    "one less": "x" * (LONGEST - 5) + ".csv",
    "nine less": "x" * (LONGEST - 13) + ".csv",
}


@pytest.mark.parametrize("kind", LONG_NAMES)
@pytest.mark.parametrize("device", ["same", "other"])
def test_a_taken_name_of_the_longest_length(tmp_path: Path, shm: Path, kind: str, device: str):
    """A file whose name is taken and leaves no bytes for a suffix is moved under a shortened name,
    whole characters of which are left; its event names it, and nothing is overwritten.
    """
    name = LONG_NAMES[kind]
    assert len(name.encode()) <= LONGEST
    done = tmp_path / "done" if device == "same" else shm

    async def test(inbox: Inbox) -> None:
        for text in ("one", "two", "three"):
            inbox.write(name, text)
            await leaves(inbox, name)
        found = {Path(event.data["path"]).read_text(): event.data["path"] for event in inbox.events}
        assert found.keys() == {"one", "two", "three"} and len(files(done)) == 3
        assert all(len(os.fsencode(each)) <= LONGEST for each in os.listdir(done))
        assert inbox.events[1].id[:8] in found["two"]
        assert not inbox.logged("file.move_failed")
        assert all("path_b64" not in event.data for event in inbox.events)

    run(test, tmp_path / "in", after=move(done))


@pytest.fixture
def shm() -> Iterator[Path]:
    """A directory on another device."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("no second device here")
    root = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        yield root
    finally:
        shutil.rmtree(root)


@pytest.mark.parametrize("device", ["same", "other"])
def test_the_new_name_is_durable_before_the_event(
    tmp_path: Path, shm: Path, device: str, monkeypatch: pytest.MonkeyPatch
):
    """Before an event is offered, the directories of its file's new name have been synced, up to
    the target; and a copy's content, before it gets that name.
    """
    done = tmp_path / "done" if device == "same" else shm / "done"
    synced: list[str] = []
    fsync = os.fsync
    rename = os.rename

    def observed_fsync(handle: int) -> None:
        fsync(handle)
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))

    def observed_rename(source: bytes, target: bytes) -> None:
        assert os.fsdecode(source) in synced, "the content is not durable yet"
        rename(source, target)

    monkeypatch.setattr(os, "fsync", observed_fsync)
    monkeypatch.setattr(os, "rename", observed_rename)

    async def test(inbox: Inbox) -> None:
        inbox.ledger.block()
        inbox.write("sub/a", "content")
        await eventually(lambda: inbox.ledger.offered, "it is offered")
        assert {str(done / "sub"), str(done)} <= set(synced)
        copies = [path for path in synced if path.endswith(".part")]
        assert len(copies) == (1 if device == "other" else 0)
        inbox.ledger.unblock()
        await leaves(inbox, "sub/a")

    run(test, tmp_path / "in", after=move(done))


def test_a_directory_that_cannot_be_synced_delays_only_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A file whose new name cannot be made durable waits, with a line; the others are recorded and
    moved; then it is, too.
    """
    fsync = os.fsync
    broken = [True]

    def failing_fsync(handle: int) -> None:
        if broken[0] and os.readlink(f"/proc/self/fd/{handle}").endswith("/done/bad"):
            raise OSError(errno.EIO, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing_fsync)

    async def test(inbox: Inbox) -> None:
        inbox.write("bad/a")
        inbox.write("good/b")
        await leaves(inbox, "good/b")
        await eventually(lambda: inbox.logged("file.move_failed"), "it is warned about")
        assert inbox.names() == ["good/b"] and (inbox.root / "bad/a").exists()
        broken[0] = False
        await leaves(inbox, "bad/a")
        assert inbox.names() == ["bad/a", "good/b"]

    run(test, tmp_path / "in", after=move(tmp_path / "done"))


def test_move_to_another_device(tmp_path: Path):
    """Across devices the file is copied whole, with its times, before it leaves; no partial file
    bears the final name.
    """
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second device here")
    target = shm / f"eventflow-test-{os.getpid()}"
    text = "x" * 3_000_000

    async def test(inbox: Inbox) -> None:
        path = inbox.write("sub/big", text)
        touch(path, -1000)
        times = path.stat().st_mtime_ns
        await leaves(inbox, "sub/big")
        assert files(target) == ["sub/big"]
        assert (target / "sub/big").read_text() == text and (
            target / "sub/big"
        ).stat().st_mtime_ns == times
        inbox.write("sub/big", "y" * 3_000_000)
        touch(inbox.root / "sub/big", 0)
        os.utime(
            inbox.root / "sub/big", ns=(times, times)
        )  # the same size and time, another content: not the same file
        await leaves(inbox, "sub/big")
        assert {(target / name).read_text()[0] for name in files(target)} == {"x", "y"}

    try:
        run(test, tmp_path / "in", after=move(target))
    finally:
        subprocess.run(["rm", "-rf", target], check=True)


def test_a_target_that_cannot_be_written(tmp_path: Path):
    """While a file cannot be placed at its final path, it stays, is logged, and delays no other;
    then it is moved.
    """
    done = tmp_path / "done"
    done.mkdir()
    (done / "sub").write_text("in the way")

    async def test(inbox: Inbox) -> None:
        inbox.write("sub/a")
        inbox.write("b")
        await leaves(inbox, "b")
        await eventually(lambda: inbox.logged("file.move_failed"), "it is warned about")
        assert (inbox.root / "sub/a").exists() and inbox.names() == ["b"]
        (done / "sub").unlink()
        await leaves(inbox, "sub/a")
        assert inbox.names() == ["b", "sub/a"]

    run(test, tmp_path / "in", after=move(done))


def test_move_into_the_landing_directory_by_another_name(tmp_path: Path):
    """A target that is the landing directory under another name (a symlink) loses no file: it is
    refused, and logged.
    """
    (tmp_path / "in").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "in")

    async def test(inbox: Inbox) -> None:
        inbox.write("a")
        await eventually(lambda: inbox.logged("file.move_failed"), "it is refused")
        assert (inbox.root / "a").read_text() == "data" and not inbox.events

    run(test, tmp_path / "in", after=move(tmp_path / "alias"))


def test_delete(tmp_path: Path):
    """`after=delete()` deletes a file once its event is recorded, and not before; that is no
    deletion event.
    """

    async def test(inbox: Inbox) -> None:
        inbox.ledger.block()
        inbox.write("go")
        await eventually(lambda: inbox.ledger.offered, "it is offered")
        assert (inbox.root / "go").exists()
        inbox.ledger.unblock()
        await leaves(inbox, "go")
        await inbox.wait_until_idle()
        assert inbox.without_probes() == ["go"]

    run(test, tmp_path / "in", after=delete(), deleted=True)


def test_a_per_file_marker_leaves_with_its_file(tmp_path: Path):
    """The marker goes with its file, so that the next file of that name waits for its own
    marker.
    """

    async def test(inbox: Inbox) -> None:
        inbox.write("x.csv.done", "")
        inbox.write("x.csv", "one")
        await leaves(inbox, "x.csv", "x.csv.done")
        inbox.write("x.csv", "two")
        await stays(
            lambda: inbox.names() == ["x.csv"], "the second waits for its marker", during=0.3
        )
        inbox.write("x.csv.done", "")
        await leaves(inbox, "x.csv", "x.csv.done")
        assert inbox.names() == ["x.csv", "x.csv"]

    run(test, tmp_path / "in", marker="{name}.done", after=move(tmp_path / "done"))


def test_a_version_that_lands_meanwhile_is_not_removed(tmp_path: Path):
    """A file that replaces another between its recording and its removal stays, fires as one more
    event, and is then moved.
    """

    async def test(inbox: Inbox) -> None:
        inbox.ledger.block()
        inbox.write("x", "first")
        await eventually(lambda: inbox.ledger.offered, "the first is offered")
        new = tmp_path / "new"
        new.write_text("second")
        os.rename(new, inbox.root / "x")
        inbox.ledger.unblock()
        await eventually(lambda: len(inbox.events) == 2, "both are events")
        await leaves(inbox, "x")
        assert [Path(event.data["path"]).read_text() for event in inbox.events] == [
            "first",
            "second",
        ]

    run(test, tmp_path / "in", after=move(tmp_path / "done"))


def test_skipped_and_older_files_are_not_moved(tmp_path: Path):
    """Files that fired before `after` was set, or were skipped at the first start, stay where they
    are.
    """
    root = tmp_path / "in"
    root.mkdir()
    (root / "skipped").write_text("x")

    async def main() -> None:
        ledger = ContractLedger()
        async with watched(root, ledger, existing="skip") as inbox:
            inbox.write("kept")
            await inbox.has("kept")
        async with watched(root, ledger, after=delete(), rescan=0.1) as inbox:
            inbox.write("gone")
            await leaves(inbox, "gone")
            await stays(
                lambda: files(root) == ["kept", "skipped"], "the others are left alone", during=0.3
            )

    asyncio.run(main())


def test_a_removal_that_somebody_else_made(tmp_path: Path):
    """A recorded file whose removal was pending, and that is missing, is forgotten without a
    deletion event.
    """
    ledger = ContractLedger()
    ledger.cursors["x"] = [4, 1, 1, 1, 1]

    async def main() -> None:
        async with watched(tmp_path, ledger, after=delete(), deleted=True):
            await eventually(lambda: "x" not in ledger.cursors, "it is forgotten")
        assert not ledger.offered

    asyncio.run(main())


# ------------------------------------------------------------------ crashes

KILLED = """
    import asyncio, os, signal, sys
    from pathlib import Path
    from eventflow import App
    from eventflow import flow
    from triggers._files import recorder
    from triggers._files import events
    from triggers.files import Directory, move

    root, store, target, seam = sys.argv[1:]

    def die(*args, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    if seam == "before accept":
        events.sync_directories = die
    if seam == "after accept":
        recorder.remove_sources = die

    @flow
    async def take(path: str, relpath: str) -> str:
        return f"{relpath}: {Path(path).read_text()}"

    app = App("files", store="sqlite:///" + store)
    app.on(Directory(root, settle=0.05, after=move(target), name="inbox"), take)

    async def main():
        async with app:
            while any(Path(root).iterdir()):
                await asyncio.sleep(0.01)
            while (await app.store.counts())["pending"]:
                await asyncio.sleep(0.01)

    asyncio.run(main())
"""


@pytest.mark.parametrize("device", ["same", "other"])
def test_killed_between_any_two_steps(tmp_path: Path, device: str):
    """Killed before the event is recorded, or between that and the removal: on restart each file
    has one event, one run that read it, and one place; nothing is left in the landing directory.
    """
    root, store = tmp_path / "in", tmp_path / "store.db"
    target = (
        tmp_path / "done"
        if device == "same"
        else Path(f"/dev/shm/eventflow-test-{os.getpid()}-{tmp_path.name}")
    )
    root.mkdir()
    names = [f"f{number}" for number in range(20)]
    for name in names:
        (root / name).write_text(name)
    try:
        for seam, code in (
            ("before accept", -signal.SIGKILL),
            ("after accept", -signal.SIGKILL),
            ("none", 0),
        ):
            command = [sys.executable, "-c", textwrap.dedent(KILLED), root, store, target, seam]
            program = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=60
            )
            assert program.returncode == code, program.stderr
            if code:
                assert files(root) == sorted(names)
        assert files(root) == [] and files(target) == sorted(names)
        counts, results = asyncio.run(ledger_of(store))
        assert counts["events"] == counts["completed"] == len(names) and counts["duplicates"] == 0
        assert sorted(results) == sorted(f"{name}: {name}" for name in names)
    finally:
        subprocess.run(["rm", "-rf", target], check=True)


async def ledger_of(path: Path) -> tuple[dict[str, int], list[str]]:
    store = SqliteStore(path, clock=SystemClock())
    store.open()
    try:
        rows = [await store.run(row["id"]) for row in await store.runs(limit=100)]
        return await store.counts(), [json.loads(row["result"]) for row in rows]
    finally:
        store.close()


def test_an_interrupted_copy_leaves_nothing_under_the_final_name(tmp_path: Path):
    """A copy that is stopped leaves no file behind, and the source as it was."""
    stop = threading.Event()
    stop.set()
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("data")
    with pytest.raises(post_actions.ListenerStopped):
        post_actions._copy(
            os.fsencode(source), os.fsencode(target), stop, Progress("", None, show=None)
        )
    assert files(tmp_path) == ["a"]
