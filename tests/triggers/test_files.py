"""Landing files, on a real file system with real notifications: what is an event, when, and that
none is lost or made twice.
"""

import asyncio
import base64
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from eventflow.core.errors import StoreFull, UsageError
from eventflow.events.event import Json
from eventflow.testing.trigger_contract import (
    CONTRACT,
    ContractLedger,
    Item,
    Promise,
    TriggerHarness,
)
from tests.conftest import eventually, stays
from tests.triggers.inbox import Inbox, run, touch, watched
from triggers.files import Directory, move

# ------------------------------------------------------------------ the contract


class FilesHarness(TriggerHarness):
    """A directory; an item is a file, acknowledged when the cursor holds it."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.root = root
        self.options = options

    @asynccontextmanager
    async def source(self) -> AsyncIterator[None]:
        self.root.mkdir()
        yield

    def trigger(self) -> Directory:
        return Directory(self.root, settle=0.05, poll=0.1, name="inbox", **self.options)

    async def offer(self, keys: Sequence[str]) -> None:
        for key in keys:
            (self.root / key).write_text(key)

    async def redeliver(self, keys: Sequence[str], ledger: ContractLedger) -> None:
        for key in keys:
            del ledger.cursors[key]

    def key(self, item: Item) -> str:
        return item.data["relpath"]  # type: ignore[union-attr]

    async def acknowledged(self, ledger: ContractLedger) -> set[str]:
        return {key for key in ledger.cursors if not key.startswith("/")}


class MovingHarness(FilesHarness):
    """The same, but a file is acknowledged when it has left the landing directory."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, after=move(root.parent / "done"))

    async def redeliver(self, keys: Sequence[str], ledger: ContractLedger) -> None:
        for key in keys:
            os.rename(self.root.parent / "done" / key, self.root / key)

    async def acknowledged(self, ledger: ContractLedger) -> set[str]:
        done = self.root.parent / "done"
        return {path.name for path in done.glob("*") if not (self.root / path.name).exists()}


@pytest.mark.parametrize("promise", CONTRACT)
@pytest.mark.parametrize("how", ["native", "poll", "move"])
def test_contract(promise: Promise, how: str, tmp_path: Path):
    """A directory keeps the promises of every trigger, with notifications, by polling, and when it
    moves what landed.
    """
    root = tmp_path / "in"
    asyncio.run(promise(MovingHarness(root) if how == "move" else FilesHarness(root, watch=how)))


def test_name_is_stable(tmp_path: Path):
    """The name comes from the root as given, or is given."""
    assert Directory("inbox").name == "files:inbox" and Directory("inbox", name="x").name == "x"


# ------------------------------------------------------------------ events


def test_event_of_a_file(tmp_path: Path):
    """An event names the file, its size and times, and its version; `sha256` only when asked
    for.
    """

    async def test(inbox: Inbox) -> None:
        path = inbox.write("sub dir/a.csv", "1,2\n")
        await inbox.has("sub dir/a.csv")
        (event,) = inbox.events
        stat = path.stat()
        assert event.type == "io.eventflow.file.created" and event.subject == "sub dir/a.csv"
        assert event.source.startswith("file://") and unquote(event.source).endswith(
            str(inbox.root)
        )
        assert event.data == {
            "path": str(path),
            "relpath": "sub dir/a.csv",
            "name": "a.csv",
            "size": 4,
            "mtime_ns": stat.st_mtime_ns,
            "mtime": event.data["mtime"],
            "inode": stat.st_ino,
            "sha256": hashlib.sha256(b"1,2\n").hexdigest(),
        }
        assert abs(datetime.fromisoformat(event.data["mtime"]).timestamp() - stat.st_mtime) < 1e-3
        assert event.time is not None and event.time >= datetime.fromisoformat(
            str(event.extensions["firstseen"])
        )

    run(test, tmp_path / "in", sha256=True)
    run(no_digest, tmp_path / "plain")


async def no_digest(inbox: Inbox) -> None:
    inbox.write("b.csv")
    await inbox.has("b.csv")
    assert "sha256" not in inbox.events[0].data


NAMES = [
    "new\nline",
    "emoji🎉.csv",
    "rtl\u202e\u05d0.csv",
    "-rf",
    "x" * 255,
    "quote'\"$(x)`",
    "ünï",
    "u\u0308",
    "tab\t",
    " lead",
    "%41",
]


@pytest.fixture
def shm(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, on a file system that keeps any time."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("no file system here that keeps any time")
    root = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        yield root
    finally:
        shutil.rmtree(root)


YEAR = 31_556_952
SECONDS = {
    "before the first year": -3_000 * YEAR,
    "far before the first year": -30_000 * YEAR,
    "year 1": -1_969 * YEAR,
    "year 1600": -370 * YEAR,
    "before 1970": -1,
    "year 2300": 330 * YEAR,
    "year 9999": 8_029 * YEAR,
    "year 10000": 8_031 * YEAR,
    "year 30828": 28_858 * YEAR,
    "the largest": (1 << 55),
}


@pytest.mark.parametrize("when", SECONDS)
@pytest.mark.parametrize("watch", ["native", "poll"])
@pytest.mark.parametrize("after", [None, move("done")], ids=["stays", "moved"])
def test_a_time_that_no_calendar_has_stops_nothing(shm: Path, when: str, watch: str, after: Any):
    """A file with any mtime is an event, without the time if it cannot be written, and delays no
    other; it is no event again after a restart.
    """

    async def main() -> None:
        ledger = ContractLedger()
        (shm / "odd").write_text("odd")
        ns = SECONDS[when] * 10**9
        try:
            os.utime(shm / "odd", ns=(ns, ns))
        except OverflowError:
            pytest.skip("not a time of this platform")
        (shm / "usual").write_text("usual")
        for _ in range(2):
            async with watched(shm, ledger, watch=watch, after=after) as inbox:
                await inbox.has("odd", "usual")
                await inbox.wait_until_idle()
            for probe in shm.rglob("probe*"):
                probe.unlink()
            for event in [each for each in ledger.events if each.data["name"][0] == "p"]:
                del ledger.recorded[event.source, event.id]
        odd = next(event for event in ledger.events if event.data["name"] == "odd")
        written = odd.data["mtime_ns"]
        assert written in (ns, None) and (odd.data["mtime"] is None) == (written is None)
        assert (written is None) == (not -(1 << 63) < ns < (1 << 63) - 1)

    asyncio.run(main())


def test_odd_names(tmp_path: Path):
    """Newlines, emoji, right-to-left, 255 bytes, a leading dash: one event each, with the path that
    opens the file.
    """

    async def test(inbox: Inbox) -> None:
        for name in NAMES:
            inbox.write(name, name)
        await inbox.has(*NAMES)
        for event in inbox.events:
            assert (
                Path(event.data["path"]).read_text() == event.data["relpath"]
                and "path_b64" not in event.data
            )

    run(test, tmp_path / "in")


def test_names_that_are_not_utf8(tmp_path: Path):
    """A name that is not UTF-8 is one event, with its bytes in `path_b64`; it is known again after
    a restart, and so are others that land once it has killed the notifier.
    """
    root = tmp_path / "in"
    root.mkdir()
    odd = os.fsencode(root) + b"/caf\xe9.csv"

    async def main() -> None:
        ledger = ContractLedger()
        async with watched(root, ledger) as inbox:
            Path(os.fsdecode(odd)).write_text("x")
            await inbox.has(r"caf\xe9.csv")
            assert base64.b64decode(inbox.events[0].data["path_b64"]) == odd
            inbox.write("next.csv")
            await inbox.has(r"caf\xe9.csv", "next.csv")
            Path(os.fsdecode(odd) + "2").write_text("y")
            await eventually(
                lambda: inbox.logged("directory.polling_fallback"), "polling takes over"
            )
            inbox.write("polled.csv")
            await inbox.has(r"caf\xe9.csv", r"caf\xe9.csv2", "next.csv", "polled.csv")
        async with watched(root, ledger) as inbox:
            await inbox.wait_until_idle()
        assert len(ledger.offered) == 5

    asyncio.run(main())


# ------------------------------------------------------------------ when a file fires


def test_a_file_fires_when_it_holds_still(tmp_path: Path):
    """While a file grows it is no event; one event comes when it has held still for `settle`, with
    the final size.
    """

    async def test(inbox: Inbox) -> None:
        with open(inbox.root / "slow.csv", "w") as file:
            for _ in range(15):
                file.write("x" * 100)
                file.flush()
                await stays(lambda: not inbox.events, "a growing file is no event", during=0.1)
        await inbox.has("slow.csv")
        assert inbox.events[0].data["size"] == 1500

    run(test, tmp_path / "in", settle=0.6)


def test_temporary_names_are_ignored(tmp_path: Path):
    """A file written under a dotted or `.part` name and renamed is one event, under its final
    name.
    """

    async def test(inbox: Inbox) -> None:
        for hidden, name in ((".x.tmp", "x.csv"), ("y.csv.part", "y.csv"), ("~$z.csv", "z.csv")):
            os.rename(inbox.write(hidden), inbox.root / name)
        inbox.write(".hidden/inside.csv")
        await inbox.has("x.csv", "y.csv", "z.csv")
        await inbox.wait_until_idle()
        assert len(inbox.without_probes()) == 3

    run(test, tmp_path / "in")


def test_patterns(tmp_path: Path):
    """Only what a pattern takes is an event: without a slash at any depth, with one on the whole
    path.
    """

    async def test(inbox: Inbox) -> None:
        for name in (
            "a.csv",
            "sub/b.csv",
            "c.txt",
            "sub/d.json",
            "deep/er/e.json",
            "probe.csv/f.xml",
        ):
            inbox.write(name)
        await inbox.has("a.csv", "sub/b.csv", "sub/d.json")
        await stays(lambda: len(inbox.events) == 3, "no other file is an event", during=0.3)

    run(test, tmp_path / "in", pattern=["*.csv", "/*/*.json"])


def test_rename_in_and_moved_in_tree(tmp_path: Path):
    """A file renamed in, and 500 files in a directory tree moved in, are one event each."""

    async def test(inbox: Inbox) -> None:
        outside = tmp_path / "outside"
        names = [f"{number % 7}/{number % 3}/f{number}" for number in range(500)]
        for name in names:
            path = outside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        (tmp_path / "one").write_text("one")
        os.rename(tmp_path / "one", inbox.root / "one")
        os.rename(outside, inbox.root / "tree")
        await inbox.has("one", *(f"tree/{name}" for name in names))
        inbox.write("tree/0/0/late")  # the moved-in directories are watched, too
        await inbox.has("one", "tree/0/0/late", *(f"tree/{name}" for name in names), within=10)
        assert len(inbox.ledger.offered) == 502

    run(test, tmp_path / "in")


def test_mkdir_and_file_at_once(tmp_path: Path):
    """A file written right after its directories were made is found."""

    async def test(inbox: Inbox) -> None:
        names = [f"d{number}/e/f/x.csv" for number in range(50)]
        for name in names:
            inbox.write(name)
        await inbox.has(*names, within=10)

    run(test, tmp_path / "in")


def test_ten_thousand_at_once(tmp_path: Path):
    """10,000 files present at once are one event each, at most 500 in one accept, oldest first
    within what ripened together.
    """
    root = tmp_path / "in"
    root.mkdir()
    for number in range(10_000):
        (root / f"f{number}").touch()
        os.utime(root / f"f{number}", ns=(0, (10_000 - number) * 1_000_000))

    async def main() -> None:
        async with watched(root, zero_byte_grace=0.05) as inbox:
            batches: list[int] = []
            accept = inbox.ledger.accept

            async def measured(*items: Item, **options: Any) -> Any:
                batches.append(len(items))
                return await accept(*items, **options)

            inbox.ledger.accept = measured
            await eventually(lambda: len(inbox.events) == 10_000, "all are events", within=60)
            assert len(inbox.ledger.offered) == 10_000 and max(batches) <= 500
            first = [event.data["mtime_ns"] for event in inbox.events[:500]]
            assert first == sorted(first)

    asyncio.run(main())


# ------------------------------------------------------------------ versions


def test_overwrite_is_a_new_event(tmp_path: Path):
    """Another content is another event: of another size, of the same size in place, and of the same
    size and time by rename.
    """

    async def test(inbox: Inbox) -> None:
        path = inbox.write("x.csv", "one")
        await inbox.has("x.csv")
        path.write_text("longer")
        await inbox.has("x.csv", kind="modified")
        path.write_text("LONGER")
        await inbox.has("x.csv", "x.csv", kind="modified")
        other = tmp_path / "other"
        other.write_text("loNGer")
        os.utime(other, ns=(0, path.stat().st_mtime_ns))
        os.rename(other, path)
        await inbox.has("x.csv", "x.csv", "x.csv", kind="modified")
        assert len({event.id for event in inbox.events}) == 4

    run(test, tmp_path / "in")


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_touch_is_no_event(tmp_path: Path, size: int):
    """New times on the same content are no event, now or after a restart; with `touch="fire"` they
    are.
    """
    root = tmp_path / "in"
    root.mkdir()

    async def main() -> None:
        ledger = ContractLedger()
        async with watched(root, ledger) as inbox:
            path = inbox.write("x.csv", "x" * size)
            await inbox.has("x.csv")
            touch(path)
            await eventually(
                lambda: ledger.cursors["x.csv"][1] == path.stat().st_mtime_ns,  # type: ignore
                "the touch is noted",
            )
        touch(path)
        async with watched(root, ledger) as inbox:
            await inbox.wait_until_idle()
            assert len(inbox.without_probes()) == 1
        touch(path)
        async with watched(root, ledger, touch="fire") as inbox:
            await inbox.has("x.csv", kind="modified")

    asyncio.run(main())


def test_empty_files_wait_longer(tmp_path: Path):
    """An empty file fires once: with its final size if it is filled within the grace, else empty,
    after the grace.
    """

    async def test(inbox: Inbox) -> None:
        never, filled = inbox.write("never", ""), inbox.write("filled", "")
        await stays(lambda: not inbox.events, "an empty file is no event yet", during=0.2)
        filled.write_text("now")
        await inbox.has("never", "filled")
        assert {event.data["name"]: event.data["size"] for event in inbox.events} == {
            "never": 0,
            "filled": 3,
        }
        assert never.exists()

    run(test, tmp_path / "in", zero_byte_grace=1.0)


@pytest.mark.parametrize("marker_first", [True, False])
@pytest.mark.parametrize(
    "template,name",
    [("{name}.done", "x.csv.done"), ("{stem}.ok", "x.ok"), ("_SUCCESS", "_SUCCESS")],
)
def test_marker(tmp_path: Path, template: str, name: str, marker_first: bool):
    """With `marker`, a file fires once, after its marker is there, whichever came first; the marker
    is no event.
    """

    async def test(inbox: Inbox) -> None:
        order = [name, "x.csv"] if marker_first else ["x.csv", name]
        inbox.write(order[0])
        await stays(lambda: not inbox.events, "one of the two is no event", during=0.3)
        inbox.write(order[1])
        await inbox.has("x.csv")
        await stays(lambda: len(inbox.ledger.offered) == 1, "the marker is no event", during=0.3)

    run(test, tmp_path / "in", marker=template)


def test_deletions(tmp_path: Path):
    """With `deleted=True` a file that is gone is an event; without, only its cursor entry goes.
    Both find what was removed while nothing watched, and a file that comes back is a created file
    again.
    """
    root = tmp_path / "in"
    root.mkdir()

    async def main(deleted: bool) -> None:
        ledger = ContractLedger()
        async with watched(root, ledger, deleted=deleted) as inbox:
            for name in ("a", "b", "d/c"):
                inbox.write(name)
            await inbox.has("a", "b", "d/c")
            (root / "a").unlink()
            await eventually(lambda: "a" not in ledger.cursors, "the cursor forgets")
            assert inbox.names("deleted") == (["a"] if deleted else [])
        (root / "d/c").unlink()
        (root / "d").rmdir()
        async with watched(root, ledger, deleted=deleted) as inbox:
            await eventually(lambda: "d/c" not in ledger.cursors, "the cursor forgets")
            assert inbox.names("deleted") == (["a", "d/c"] if deleted else [])
            inbox.write("a", "again")
            await inbox.has("a", "a", "b", "d/c", kind="created")
        (root / "a").unlink()
        (root / "b").unlink()

    asyncio.run(main(True))
    asyncio.run(main(False))


# ------------------------------------------------------------------ starts and restarts


def test_existing_files_fire_or_are_skipped_once(tmp_path: Path):
    """`existing="skip"` leaves alone what is there at the very first start, and nothing else: its
    later versions, what lands while the process is down, and what lands in the middle of the start
    are events.
    """
    root = tmp_path / "in"
    root.mkdir()
    for name in ("old", "older"):
        (root / name).write_text(name)

    async def main() -> None:
        ledger = ContractLedger()
        asked, answer, cursor = asyncio.Event(), asyncio.Event(), ledger.cursor

        async def slowly() -> Mapping[str, Json]:
            asked.set()
            await answer.wait()
            return await cursor()

        def stamp() -> int:
            (tmp_path / "stamp").write_text("")
            return (tmp_path / "stamp").stat().st_mtime_ns

        ledger.cursor = slowly
        async with watched(root, ledger, opened=False, existing="skip") as inbox:
            await asked.wait()
            before = stamp()
            await eventually(lambda: stamp() > before, "the clock that stamps files has ticked")
            inbox.write("new")
            answer.set()
            await inbox.has("new")
            inbox.write("old", "changed")
            await inbox.has("new", "old")
            touch(root / "older")
        (root / "meanwhile").write_text("x")
        async with watched(root, ledger, existing="skip") as inbox:
            await inbox.has("new", "old", "meanwhile")
        async with watched(root, ContractLedger()) as inbox:
            await inbox.has("new", "old", "older", "meanwhile")

    asyncio.run(main())


def test_restart_makes_nothing_twice(tmp_path: Path):
    """After a restart nothing known is even offered again."""
    root = tmp_path / "in"
    root.mkdir()

    async def main() -> None:
        ledger = ContractLedger()
        for _ in range(3):
            async with watched(root, ledger) as inbox:
                inbox.write("a")
                await inbox.wait_until_idle()
        assert len(inbox.without_probes()) == 1

    asyncio.run(main())


def test_a_full_ledger_is_waited_for(tmp_path: Path):
    """While the ledger is full nothing is marked as seen; a file that grew meanwhile fires with its
    final size.
    """

    async def test(inbox: Inbox) -> None:
        inbox.ledger.error = StoreFull("full", 0.05)
        inbox.write("a")
        await eventually(lambda: inbox.ledger.refused_calls > 3, "it is offered several times")
        assert "a" not in inbox.ledger.cursors
        inbox.ledger.error = None
        await inbox.has("a")

    run(test, tmp_path / "in")


@pytest.mark.parametrize("wrong", [{"settle": -1}, {"poll": 0}, {"after": move(".")}])
def test_options_that_cannot_work(tmp_path: Path, wrong: dict[str, Any]):
    """Options that cannot work are refused when the trigger is made."""
    with pytest.raises(UsageError):
        Directory(tmp_path, **wrong)
