"""A store whose folder is mounted in two places, mounted over, unmounted or replaced while a
server runs on it.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.server_process import EventflowProcess, NoAnswer, serving


@pytest.fixture
def mount() -> Iterator[Callable[[Path, Path], None]]:
    """Calls `mount --bind`; what is still mounted at the end is unmounted."""
    places: list[Path] = []

    def bind(folder: Path, place: Path) -> None:
        place.mkdir(exist_ok=True)
        command = ["mount", "--bind", str(folder), str(place)]
        if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("expected the right to mount, found none; run the tests as root")
        places.append(place)

    yield bind
    for place in reversed(places):
        subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


def serve(folder: Path, place: Path, seed: int = 1):
    store = f"sqlite:///{place}/shop.db"
    return serving(folder, "--store", store, env={"PYTHONHASHSEED": str(seed)})


def refused(folder: Path, place: Path) -> str:
    """The output of another server, which exits with 75 and is never ready."""
    second = EventflowProcess(folder, "shop.py", "--store", f"sqlite:///{place}/shop.db")
    try:
        assert second.wait() == 75 and not second.wait_ready(0), second.log_tail
        return second.log.splitlines()[-1]
    finally:
        second.kill()


def all_done(server: EventflowProcess, count: int) -> None:
    wait_until(lambda: server.get("/api/counts")["pending"] == 0, "its runs have ended")
    runs = server.get("/api/runs?limit=1000")["runs"]
    assert [run["state"] for run in runs] == ["completed"] * count


@pytest.mark.parametrize("without", ["", "no lock file"])
def test_row_11_a_store_at_two_mount_points_has_one_server(
    tmp_path: Path, mount: Callable[[Path, Path], None], without: str
) -> None:
    """Through the other mount point a second server is refused with the pid of the first, which
    continues; after kill -9 a server there, with another hash seed, has all that was acknowledged.
    """
    data, other = tmp_path / "data", tmp_path / "other"
    data.mkdir()
    mount(data, other)
    for turn, (mine, its) in enumerate([(data, other), (other, data), (data, other)]):
        with serve(tmp_path, mine, seed=turn) as first:
            if without:
                (data / "shop.db.lock").unlink()
            assert str(first.process.pid) in refused(tmp_path, its)
            assert first.send(f"event-{turn}", {"id": f"event-{turn}", "total": 3})[0] == 202
            all_done(first, turn + 1)
            first.kill()


def _mounted_over(data: Path, _folder: Path, mount: Callable[[Path, Path], None]) -> Path:
    kept = data.with_name("kept")
    mount(data, kept)
    empty = data.with_name("empty")
    empty.mkdir()
    mount(empty, data)
    return kept


def _mounted_over_by_a_copy(data: Path, folder: Path, mount: Callable[[Path, Path], None]) -> Path:
    kept = data.with_name("kept")
    mount(data, kept)
    shutil.copytree(data, data.with_name("copy"))
    mount(data.with_name("copy"), data)
    return kept


def _unmounted(data: Path, folder: Path, _mount: Callable[[Path, Path], None]) -> Path:
    subprocess.run(["umount", "-l", str(data)], check=True)
    return folder


def _mounted_again(data: Path, folder: Path, mount: Callable[[Path, Path], None]) -> Path:
    """The same folder is mounted at the path again: nothing has changed."""
    subprocess.run(["umount", "-l", str(data)], check=True)
    mount(folder, data)
    return folder


def _replaced(data: Path, folder: Path, _mount: Callable[[Path, Path], None]) -> Path:
    """The folder behind the mount point is replaced; the mount still shows the first one."""
    moved = folder.with_name("moved")
    folder.rename(moved)
    folder.mkdir()
    return moved


HARMS = {
    "another folder mounted over it": (_mounted_over, 74),
    "a copy of it mounted over it": (_mounted_over_by_a_copy, 74),
    "unmounted": (_unmounted, 74),
    "unmounted and mounted again": (_mounted_again, 0),
    "the folder behind the mount replaced": (_replaced, 0),
}
"""Changes of a store's mount point, and the exit code of the server (0: it continues)."""


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("harm", HARMS)
def test_p10_a_server_whose_mount_point_changes_stops(
    tmp_path: Path, mount: Callable[[Path, Path], None], harm: str, busy: bool
) -> None:
    """If the path leads to other files, the server ends with 74 and names the file, idle or busy;
    nothing is acknowledged after that. Until its end no other server gets the files behind the
    mount; the next one, with another hash seed, finds all that was acknowledged, and what is sent
    again is there once. If the path leads to the same files, the server goes on.
    """
    folder, data = tmp_path / "folder", tmp_path / "data"
    folder.mkdir()
    mount(folder, data)
    change, ends = HARMS[harm]
    count = 0

    def send(server: EventflowProcess) -> bool:
        nonlocal count
        ident = f"event-{count}"
        try:
            status = server.send(ident, {"id": ident, "total": count + 1})[0]
        except NoAnswer:
            return False
        count += status in (200, 202)
        return status in (200, 202)

    with serve(tmp_path, data) as server:
        for _ in range(20):
            assert send(server)
        server.signal(signal.SIGSTOP)  # so that it checks its files only after the change
        kept = change(data, folder, mount)
        assert str(server.process.pid) in refused(tmp_path, kept)
        server.signal(signal.SIGCONT)
        if ends == 0:
            assert send(server)
            all_done(server, count)
            server.signal(signal.SIGKILL)
            server.wait()
        else:
            assert not busy or not send(server)
            assert server.wait(5) == ends, server.log_tail
            assert '"store.failed"' in server.log and f"{data}/shop.db" in server.log
    with serve(tmp_path, kept, seed=2) as server:
        if busy and ends:  # it may be recorded, although it was not acknowledged
            assert send(server)
        all_done(server, count)
