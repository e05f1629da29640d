"""One odd thing in a landing directory robs and stops no other: the files beside it are events,
whether it lies there at the start, arrives later, or comes back after a restart.
"""

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eventflow.testing.trigger_contract import ContractLedger
from tests.conftest import eventually
from tests.triggers.inbox import watched

NOT_UTF8 = b"\xff\xfe not utf-8"


def _socket(root: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(root / "odd.sock"))


def _deep(root: Path) -> None:
    """A file whose path is longer than the kernel takes at once (4,096 bytes)."""
    start = os.open(".", os.O_RDONLY)
    try:
        os.chdir(root)
        for _ in range(25):
            os.makedirs("d" * 200, exist_ok=True)
            os.chdir("d" * 200)
        Path("odd").write_text("deep")
    finally:
        os.fchdir(start)
        os.close(start)


def _loops(root: Path) -> None:
    (root / "loop").mkdir()
    for link, target in (("self", "self"), ("a", "b"), ("b", "a"), ("up", "..")):
        os.symlink(target, root / "loop" / link)


def _not_utf8(root: Path) -> None:
    folder = os.path.join(os.fsencode(root), NOT_UTF8)
    os.mkdir(folder)
    os.symlink(b"nowhere" + NOT_UTF8, os.path.join(folder, b"dangling" + NOT_UTF8))


def _odd_times(root: Path) -> None:
    path = root / "d1"
    path.mkdir()
    os.utime(path, (-(2**31), 2**33))


ODD: dict[str, Callable[[Path], None]] = {
    "pipe": lambda root: os.mkfifo(root / "odd"),
    "socket": _socket,
    "a directory with the name of a file": lambda root: (root / "odd.csv").mkdir(),
    "a path beyond the limit": _deep,
    "loops of links": _loops,
    "a directory whose name is not UTF-8": _not_utf8,
    "a directory of 1901": _odd_times,
    "a link to a device": lambda root: os.symlink("/dev/zero", root / "odd"),
    "a link to itself by another name": lambda root: os.symlink(root, root / "odd"),
}


@pytest.mark.parametrize("watch", ["native", "poll"])
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_entry_stops_no_other(tmp_path: Path, kind: str, watch: str):
    """A file before it, one beside it and one after a restart are one event each; it is none."""
    root = tmp_path / "in"
    root.mkdir()
    reads_more = watch == "poll"
    given: dict[str, Any] = {"watch": watch, "rescan": 0.3, "sha256": reads_more}
    given["follow_symlinks"] = reads_more

    async def main() -> None:
        ledger = ContractLedger()
        async with watched(root, ledger, **given) as inbox:
            inbox.write("before")
            await inbox.has("before")
            ODD[kind](root)
            inbox.write("beside")
            await inbox.has("before", "beside")
        async with watched(root, ledger, **given) as inbox:
            inbox.write("after")
            inbox.write("sub/after")
            await eventually(
                lambda: {"after", "sub/after"} <= set(inbox.names()), "the new files are events"
            )
            await inbox.wait_until_idle()
            assert inbox.without_probes() == ["after", "before", "beside", "sub/after"]

    asyncio.run(main())


@pytest.mark.parametrize("watch", ["native", "poll"])
@pytest.mark.parametrize("into", ["pipe", "directory", "link", "nothing"])
def test_a_file_that_becomes_something_else(tmp_path: Path, into: str, watch: str):
    """Replaced before it has settled, a file is no event; files beside it are."""
    root = tmp_path / "in"
    root.mkdir()

    async def main() -> None:
        async with watched(root, watch=watch, rescan=0.3, settle=0.5) as inbox:
            path = inbox.write("odd")
            path.unlink()
            match into:
                case "pipe":
                    os.mkfifo(path)
                case "directory":
                    path.mkdir()
                case "link":
                    os.symlink("/dev/zero", path)
                case _:
                    pass
            inbox.write("beside")
            await inbox.has("beside")

    asyncio.run(main())


def test_a_root_whose_name_is_not_utf8(tmp_path: Path):
    """Its files are events; the event has the bytes of their paths."""
    root = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), NOT_UTF8)))
    root.mkdir()

    async def main() -> None:
        async with watched(root, rescan=0.3) as inbox:
            inbox.write("a")
            await inbox.has("a")
            (event,) = inbox.events
            assert "path_b64" in event.data
            event.to_json()

    asyncio.run(main())
