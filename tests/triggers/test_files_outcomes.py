"""`after=outcome(...)`: files wait where they landed until their runs have ended, and then go where
the outcome says, over any crash.
"""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from eventflow.core.clock import SystemClock
from eventflow.core.errors import UsageError
from eventflow.events.event import EventOutcome
from eventflow.store.sqlite import SqliteStore
from eventflow.testing.trigger_contract import ContractLedger
from tests.conftest import eventually
from tests.garbage import leaving_no_error_cycles
from tests.triggers.inbox import Inbox, run, touch, watched
from tests.triggers.test_files_post_actions import files, leaves
from triggers._files.names import NameFilter
from triggers._files.post_actions import remove_source
from triggers._files.tree import Tree
from triggers.files import Directory, delete, move, outcome

BOTH: Any = {"after": outcome(completed=move("done"), failed=move("failed"))}


def end(inbox: Inbox, name: str, result: Any) -> None:
    """The runs of this file's last event have ended."""
    event = next(each for each in reversed(inbox.events) if each.data["relpath"] == name)
    inbox.ledger.event_outcomes[event.id] = result


def test_a_file_is_moved_by_its_outcome(tmp_path: Path):
    """A file stays where its event says until its runs have ended; then it is moved by their
    outcome, its cursor entry goes, and nothing of that is an event. A line of the log says where
    the file of a failed run is.
    """

    async def test(inbox: Inbox) -> None:
        for name in ("good.csv", "sub/bad.csv", "slow.csv"):
            inbox.write(name, name)
        await inbox.has("good.csv", "slow.csv", "sub/bad.csv")
        await inbox.wait_until_idle()
        assert all(Path(event.data["path"]).exists() for event in inbox.events)
        end(inbox, "good.csv", "completed")
        end(inbox, "sub/bad.csv", "failed")
        await leaves(inbox, "good.csv", "sub/bad.csv")
        assert files(inbox.root / "done") == ["good.csv"]
        assert files(inbox.root / "failed") == ["sub/bad.csv"]
        (line,) = [each for each in inbox.logged("file.moved") if each["outcome"] == "failed"]
        assert line["path"] == str(inbox.root / "sub/bad.csv")
        assert line["to"] == str(inbox.root / "failed")
        await eventually(lambda: "good.csv" not in inbox.ledger.cursors, "it is forgotten")
        await inbox.wait_until_idle()
        assert inbox.without_probes() == ["good.csv", "slow.csv", "sub/bad.csv"]
        assert (inbox.root / "slow.csv").exists()

    run(test, tmp_path / "in", deleted=True, rescan=0.2, **BOTH)


@pytest.mark.parametrize("result", ["completed", "failed", "unknown"])
def test_an_outcome_without_an_action_leaves_the_file(tmp_path: Path, result: str):
    """Without an action for an outcome the file stays, and is no event again, also after a restart;
    of an outcome that the ledger has forgotten a line says so.
    """
    after = outcome(failed=delete()) if result != "failed" else outcome(completed=delete())

    async def main() -> None:
        ledger = ContractLedger()
        lines: list[dict[str, Any]] = []
        for _ in range(2):
            async with watched(tmp_path, ledger, after=after, rescan=0.2) as inbox:
                if not inbox.events:
                    inbox.write("a")
                    await inbox.has("a")
                    end(inbox, "a", result)
                await eventually(lambda: ledger.cursors["a"][4] == 0, "it is not awaited")  # type: ignore[index]
                lines += inbox.logged("file.outcome_unknown")
        assert len(lines) == (1 if result == "unknown" else 0)
        assert (tmp_path / "a").exists() and len(ledger.offered) == 1

    asyncio.run(main())


def test_delete_by_outcome(tmp_path: Path):
    """A file may be deleted by its outcome, not before."""

    async def test(inbox: Inbox) -> None:
        inbox.write("a")
        await inbox.has("a")
        await inbox.wait_until_idle()
        assert (inbox.root / "a").exists()
        end(inbox, "a", "completed")
        await leaves(inbox, "a")

    run(test, tmp_path / "in", after=outcome(completed=delete(), failed=move("failed")))


async def touch_and_wait(inbox: Inbox, path: Path) -> None:
    """Gives the file `a` a new time, which the cursor has afterwards."""
    touch(path)
    await eventually(
        lambda: inbox.ledger.cursors["a"][1] == path.stat().st_mtime_ns,  # type: ignore[index]
        "its new time is known",
    )


def test_another_version_is_not_moved_by_the_first_ones_outcome(tmp_path: Path):
    """A version that lands while the runs of another one work stays until its own have ended; new
    times alone change nothing.
    """

    async def test(inbox: Inbox) -> None:
        path = inbox.write("a", "first")
        await inbox.has("a")
        await touch_and_wait(inbox, path)
        inbox.write("a", "the second one")
        await inbox.has("a", "a")
        inbox.ledger.event_outcomes[inbox.events[0].id] = "completed"
        await inbox.wait_until_idle()
        assert path.read_text() == "the second one"
        end(inbox, "a", "failed")
        await leaves(inbox, "a")
        assert (inbox.root / "failed/a").read_text() == "the second one"

    run(test, tmp_path / "in", **BOTH)


def test_a_version_that_lands_during_the_copy_is_not_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A file that grows while it is copied to another device leaves nothing at its target; it is an
    event once more, and moved by the outcome of that.
    """
    if not Path("/dev/shm").is_dir():
        pytest.skip("no second device here")
    done = Path(tempfile.mkdtemp(dir="/dev/shm"))
    real = shutil.copystat
    grown: list[bytes] = []

    def grow_once(source: bytes, target: bytes) -> None:
        real(source, target)
        if not grown:
            grown.append(source)
            with open(source, "a") as file:
                file.write(" and more")

    async def test(inbox: Inbox) -> None:
        monkeypatch.setattr("triggers._files.post_actions.shutil.copystat", grow_once)
        inbox.write("a", "first")
        await inbox.has("a")
        end(inbox, "a", "completed")
        await inbox.has("a", "a")
        assert grown and files(done) == []
        end(inbox, "a", "completed")
        await leaves(inbox, "a")
        assert (done / "a").read_text() == "first and more"

    try:
        run(test, tmp_path / "in", after=outcome(completed=move(done)))
    finally:
        shutil.rmtree(done)


@pytest.mark.parametrize("into", ["directory", "link"])
def test_what_takes_the_name_of_a_file_is_not_removed(tmp_path: Path, into: str):
    """A directory or a link that took the name of a recorded file is neither removed nor an error
    that is tried again for ever.
    """
    tree = Tree(os.fsencode(tmp_path), NameFilter("**/*", (), None))
    path = tmp_path / "a"
    path.write_text("data")
    stat = tree.file_stat(b"a")
    assert stat is not None
    path.unlink()
    if into == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path)
    assert remove_source(tree, b"a", stat) is False
    assert os.path.lexists(path)


def test_times_alone_change_no_outcome(tmp_path: Path):
    """A file that is touched while its runs work is moved by their outcome all the same."""

    async def test(inbox: Inbox) -> None:
        path = inbox.write("a", "first")
        await inbox.has("a")
        await touch_and_wait(inbox, path)
        end(inbox, "a", "completed")
        await leaves(inbox, "a")
        assert files(inbox.root / "done") == ["a"] and inbox.names() == ["a"]

    run(test, tmp_path / "in", **BOTH)


def test_a_target_that_cannot_be_written_delays_only_its_files(tmp_path: Path):
    """While a file cannot be placed it stays, with one line; the others are moved, then it is."""

    async def test(inbox: Inbox) -> None:
        inbox.write("failed", "in the way")
        inbox.write("a")
        inbox.write("b")
        await inbox.has("a", "b")
        end(inbox, "a", "failed")
        end(inbox, "b", "completed")
        await leaves(inbox, "b")
        await eventually(lambda: inbox.logged("file.move_failed"), "it is told")
        (inbox.root / "failed").unlink()
        await leaves(inbox, "a")
        assert files(inbox.root / "failed") == ["a"] and len(inbox.logged("file.move_failed")) == 1

    run(test, tmp_path / "in", pattern="/*", **BOTH)


class AskedLedger(ContractLedger):
    """Records when it is asked for outcomes."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[float] = []

    async def outcomes(self, source: str, ids: Sequence[str]) -> Mapping[str, EventOutcome]:
        self.asked.append(time.monotonic())
        return await super().outcomes(source, ids)


def test_a_file_that_cannot_be_moved_is_tried_with_backoff(tmp_path: Path):
    """The pauses between two tries become longer, the log has a line for each new reason and one
    when the file has been moved, and the errors are freed at once.
    """

    async def main() -> None:
        ledger = AskedLedger()
        async with watched(tmp_path, ledger, **BOTH, pattern="/*") as inbox:
            (tmp_path / "done").write_text("in the way")
            inbox.write("a")
            await inbox.has("a")
            with leaving_no_error_cycles():
                end(inbox, "a", "completed")
                await eventually(lambda: inbox.logged("file.move_failed"), "it is told")
                ledger.asked.clear()
                await eventually(lambda: len(ledger.asked) == 3, "it is tried again")
            first, second, third = ledger.asked
            assert third - second > 1.5 * (second - first)
            assert len(inbox.logged("file.move_failed")) == 1
            (tmp_path / "done").unlink()
            ident = inbox.events[0].id
            taken = [tmp_path / "done" / name for name in ("a", f"a.{ident[:8]}", f"a.{ident}")]
            for path in taken:
                path.mkdir(parents=True)
            await eventually(lambda: len(inbox.logged("file.move_failed")) == 2, "why else")
            taken[0].rmdir()
            await leaves(inbox, "a")
            assert [each["log_level"] for each in inbox.logged("file.moved")] == ["info"]

    asyncio.run(main())


def test_a_file_that_is_put_back_waits_for_a_retry(tmp_path: Path):
    """A file put back for a retry of its runs stays until they have ended again, also over a
    restart; it is no new event.
    """

    async def main() -> None:
        ledger = ContractLedger()
        async with watched(tmp_path, ledger, **BOTH) as inbox:
            inbox.write("a")
            await inbox.has("a")
            end(inbox, "a", "failed")
            await leaves(inbox, "a")
            (tmp_path / "failed/a").rename(tmp_path / "a")
            await eventually(
                lambda: ledger.cursors.get("a", [None])[-1] == "failed",  # type: ignore[index]
                "its outcome is known",
            )
        async with watched(tmp_path, ledger, **BOTH) as inbox:
            await inbox.wait_until_idle()
            await inbox.wait_until_idle()
            assert (tmp_path / "a").exists()
            del ledger.event_outcomes[inbox.events[0].id]
            await eventually(
                lambda: ledger.cursors["a"][-1] is None,  # type: ignore[index]
                "the retry is seen",
            )
            end(inbox, "a", "completed")
            await leaves(inbox, "a")
            assert (tmp_path / "done/a").exists() and inbox.without_probes() == ["a"]

    asyncio.run(main())


def test_options_that_cannot_work(tmp_path: Path):
    """An outcome needs an action, and a target other than the landing directory."""
    with pytest.raises(UsageError, match="found neither"):
        outcome()
    with pytest.raises(UsageError, match="landing directory itself"):
        Directory(tmp_path, after=outcome(completed=move(".")))


# ------------------------------------------------------------------ with a server's ledger

PROGRAM = """
    import asyncio, os, signal, sys
    from pathlib import Path
    from eventflow import App, flow, task
    from triggers._files import outcomes
    from triggers.files import Directory, move, outcome

    root, store, seam = sys.argv[1:]

    def die(*args, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    remove_source = outcomes.remove_source

    def remove_and_die(*args):
        remove_source(*args)
        die()

    match seam:
        case "before the move":
            outcomes._place_and_remove = die
        case "after the link":
            outcomes.sync_directories = die
        case "before the removal":
            outcomes.remove_source = die
        case "after the removal":
            outcomes.remove_source = remove_and_die

    @task
    def read(path: str) -> str:
        text = Path(path).read_text()
        if seam == "after a body" and text == "f7":
            die()
        if text == "f3":
            raise ValueError("a bad file")
        return text

    @flow
    async def take(path: str, relpath: str) -> str:
        return await read(path)

    @flow
    async def count(name: str) -> str:
        return name

    app = App("files", store="sqlite:///" + store)
    inbox = Directory(
        root, settle=0.05, name="inbox", after=outcome(completed=move("done"), failed=move("bad"))
    )
    app.on(inbox, take)
    app.on(inbox, count, where={"name": ["f3", "f4"]})

    async def main():
        async with app:
            while any(path.is_file() for path in Path(root).iterdir()):
                await asyncio.sleep(0.01)

    asyncio.run(main())
"""

SEAMS = [
    "after a body",
    "before the move",
    "after the link",
    "before the removal",
    "after the removal",
]


def test_killed_between_any_two_steps(tmp_path: Path):
    """Killed while the runs work, and between any two steps of the move: each file has one event,
    is read where it landed, and ends in the place of its outcome, once; with several flows it fails
    when one of them did.
    """
    root, store = tmp_path / "in", tmp_path / "store.db"
    root.mkdir()
    names = [f"f{number}" for number in range(10)]
    for name in names:
        (root / name).write_text(name)
    for seam in (*SEAMS, *SEAMS[1:], "none"):
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), root, store, seam]
        program = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        expected = 0 if seam == "none" else -signal.SIGKILL
        assert program.returncode == expected, (seam, program.stderr)
    assert files(root) == sorted(["bad/f3", *(f"done/{name}" for name in names if name != "f3")])
    counts = asyncio.run(counts_of(store))
    assert counts["events"] == len(names) and counts["duplicates"] == 0
    assert counts["failed"] == 1 and counts["completed"] == len(names) + 1


async def counts_of(path: Path) -> dict[str, int]:
    store = SqliteStore(path, clock=SystemClock())
    store.open()
    try:
        return await store.counts()
    finally:
        store.close()
