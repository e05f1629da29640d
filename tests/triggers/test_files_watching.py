"""What notifications miss, and obstacles of a walk: overflow, lost roots, limits, symlinks,
unreadable directories.
"""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from eventflow.core.clock import SystemClock
from eventflow.testing.trigger_contract import ContractLedger
from tests.conftest import eventually, stays, wait_until
from tests.triggers.inbox import Inbox, run, watched
from triggers._files.mounts import file_system, is_remote
from triggers.files import Directory


def child(script: str, *args: object, **options: Any) -> subprocess.Popen[str]:
    """A Python program in another process."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(program: subprocess.Popen[str]) -> str:
    out, err = program.communicate(timeout=60)
    assert program.returncode == 0, err
    return out


# ------------------------------------------------------------------ what notifications miss

REWATCH_SECONDS = 1.5
"""In which a root made anew is watched again: nothing tells when that is."""

WATCH = """
    import asyncio, sys
    from pathlib import Path
    from tests.triggers.inbox import watched
    async def main():
        async with watched(Path(sys.argv[1]), zero_byte_grace=0.1, rescan=600) as inbox:
            print("ready", flush=True)
            while len(inbox.events) < int(sys.argv[2]):
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.3)
            print(len(inbox.events), len(inbox.ledger.offered), len(set(inbox.names())), flush=True)
    asyncio.run(main())
"""


def test_queue_overflow(tmp_path: Path):
    """20,000 files created while the process is stopped overflow the kernel's queue, and are 20,000
    events once it resumes.
    """
    program = child(WATCH, tmp_path, 20_000)
    try:
        assert program.stdout is not None and program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGSTOP)
        for number in range(20_000):
            (tmp_path / f"f{number}").touch()
        program.send_signal(signal.SIGCONT)
        assert finish(program) == "20000 20000 20000\n"
    finally:
        program.kill()


@pytest.mark.parametrize("watch", ["native", "poll"])
def test_root_removed_and_recreated(tmp_path: Path, watch: str):
    """A root that is missing at start, or removed and recreated later, is waited for and then
    watched again.
    """
    root = tmp_path / "in"

    async def main() -> None:
        async with watched(root, opened=False, watch=watch) as inbox:
            await eventually(
                lambda: inbox.logged("directory.root_missing"),
                "the missing root is logged",
            )
            inbox.write("first")
            await inbox.has("first", within=10)
            for turn in ("second", "third"):
                for path in root.iterdir():
                    path.unlink()
                root.rmdir()
                if turn == "second":
                    await eventually(
                        lambda: len(inbox.logged("directory.root_missing")) == 2,
                        "the removed root is missed",
                    )  # else at once: the new root may well have the old one's inode
                inbox.write(turn)
                await eventually(
                    lambda turn=turn: turn in inbox.names(), f"{turn} is an event", within=10
                )
                await asyncio.sleep(REWATCH_SECONDS)
                inbox.write(f"{turn}, noticed")
                await eventually(
                    lambda turn=turn: f"{turn}, noticed" in inbox.names(),
                    "it is watched",
                    within=10,
                )
            assert len(inbox.logged("directory.root_found")) == len(
                inbox.logged("directory.root_missing")
            )

    asyncio.run(main())


def test_root_replaced_by_another(tmp_path: Path):
    """When another directory takes the root's place by rename, what is in it and what lands in it
    fires.
    """

    async def test(inbox: Inbox) -> None:
        inbox.write("a")
        await inbox.has("a")
        other = tmp_path / "other"
        other.mkdir()
        (other / "b").write_text("b")
        os.rename(inbox.root, tmp_path / "old")
        os.rename(other, inbox.root)
        await inbox.has("a", "b", within=10)
        inbox.write("c")
        await inbox.has("a", "b", "c", within=10)
        (tmp_path / "old" / "ghost").write_text("ghost")
        await inbox.wait_until_idle()
        assert inbox.without_probes() == ["a", "b", "c"]

    run(test, tmp_path / "in")


def test_a_vanished_root_deletes_nothing(tmp_path: Path):
    """A root that goes away (an unmounted disk) makes no file count as deleted."""

    async def test(inbox: Inbox) -> None:
        inbox.write("a")
        await inbox.has("a")
        os.rename(inbox.root, tmp_path / "away")
        await eventually(lambda: inbox.logged("directory.root_missing"), "the root is missed")
        await stays(lambda: not inbox.names("deleted"), "nothing counts as deleted", during=0.5)
        os.rename(tmp_path / "away", inbox.root)
        await inbox.wait_until_idle()
        assert inbox.names("deleted") == [] and len(inbox.without_probes()) == 1

    run(test, tmp_path / "in", deleted=True, watch="poll")


def test_files_are_not_deleted_before_the_root_is_back(tmp_path: Path):
    """When the root is removed with all that is in it, deletions are events once the root exists
    again.
    """

    async def test(inbox: Inbox) -> None:
        inbox.write("a")
        await inbox.has("a")
        shutil.rmtree(inbox.root)
        await eventually(lambda: inbox.logged("directory.root_missing"), "the root is missed")
        await stays(lambda: not inbox.names("deleted"), "nothing counts as deleted", during=1.5)
        inbox.root.mkdir()
        await inbox.has("a", kind="deleted", within=10)

    run(test, tmp_path / "in", deleted=True)


def test_subdirectory_recreated_or_moved_out(tmp_path: Path):
    """A subdirectory that is removed and recreated is watched again; one that was moved out is
    not.
    """

    async def test(inbox: Inbox) -> None:
        inbox.write("sub/a")
        await inbox.has("sub/a")
        (inbox.root / "sub/a").unlink()
        (inbox.root / "sub").rmdir()
        inbox.write("sub/b")
        await inbox.has("sub/a", "sub/b", within=10)
        await stays(
            lambda: inbox.names() == ["sub/a", "sub/b"],
            "nothing else happens while the folder is watched anew",
            during=0.7,
        )
        inbox.write("sub/c")
        await inbox.has("sub/a", "sub/b", "sub/c", within=10)
        os.rename(inbox.root / "sub", tmp_path / "out")
        await inbox.wait_until_idle()
        (tmp_path / "out/d").write_text("d")
        await inbox.wait_until_idle()
        assert inbox.without_probes() == ["sub/a", "sub/b", "sub/c"]

    run(test, tmp_path / "in")


def test_a_clock_set_back_stops_nothing(tmp_path: Path):
    """A wall clock that jumps a day back, or a year on, neither stops the trigger nor makes a
    growing file fire early.
    """

    class Jumping(SystemClock):
        offset = 0

        def now(self) -> int:
            return super().now() + self.offset

    clock = Jumping()

    async def test(inbox: Inbox) -> None:
        for name, days in (("back", -1), ("on", 365)):
            clock.offset = days * 86_400_000_000
            with open(inbox.root / name, "w") as file:
                for _ in range(8):
                    file.write("x")
                    file.flush()
                    await stays(
                        lambda name=name: name not in inbox.names(),
                        "a growing file is no event",
                        during=0.1,
                    )
            await eventually(
                lambda name=name: name in inbox.names(), f"{name} is an event", within=10
            )

    run(test, tmp_path / "in", settle=0.5, clock=clock, poll=0.2)


# ------------------------------------------------------------------ limits

LIMITED = """
    import asyncio, os, sys
    from pathlib import Path
    from tests.triggers.inbox import watched
    Path("/proc/sys/user/" + sys.argv[2]).write_text("2")
    root = Path(sys.argv[1])
    hold = os.eventfd(0)
    async def main():
        async with watched(root) as inbox:
            inbox.write("a/x")
            await inbox.has("a/x", within=10)
            print(inbox.logged("directory.polling_fallback")[0]["reason"])
    if sys.argv[2] == "max_inotify_instances":
        import ctypes
        taken = [ctypes.CDLL(None).inotify_init() for _ in range(2)]
    asyncio.run(main())
"""


@pytest.mark.parametrize("limit", ["max_inotify_watches", "max_inotify_instances"])
def test_no_watches_left(tmp_path: Path, limit: str):
    """With the kernel's watches or instances used up the root is polled, and the log names the
    sysctl to raise.
    """
    for name in "abcd":
        (tmp_path / name).mkdir()
    command = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces here: the limit cannot be lowered for one process")
    script = textwrap.dedent(LIMITED)
    program = subprocess.run(
        [*command, sys.executable, "-c", script, str(tmp_path), limit],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert program.returncode == 0, program.stderr
    sysctl = (
        "fs.inotify.max_user_watches"
        if limit == "max_inotify_watches"
        else "fs.inotify.max_user_instances"
    )
    assert sysctl in program.stdout


def test_the_threads_of_others_are_not_taken(tmp_path: Path):
    """More directories under watch than anyio has thread tokens leave `to_thread` free for
    everybody else.
    """

    async def main() -> None:
        ledger = ContractLedger()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(Directory(tmp_path, name=f"d{n}", settle=0.05).listen(ledger))
                for n in range(45)
            ]
            await eventually(
                lambda: len(threads()) >= 45, "every directory has its watching thread"
            )
            async with asyncio.timeout(5):
                assert await anyio.to_thread.run_sync(lambda: "free") == "free"
            assert anyio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
            for task in tasks:
                task.cancel()

    asyncio.run(main())


def threads() -> list[str]:
    return os.listdir("/proc/self/task")


def test_nothing_is_left_running(tmp_path: Path):
    """When the listener has ended, its threads and file descriptors end, too."""
    before = len(os.listdir("/proc/self/fd"))

    async def main() -> None:
        for _ in range(5):
            async with watched(tmp_path) as inbox:
                inbox.write("a")
                await inbox.has("a")

    asyncio.run(main())
    wait_until(
        lambda: len(os.listdir("/proc/self/fd")) <= before, "the inotify instances are closed"
    )


# ------------------------------------------------------------------ obstacles of a walk

UNPRIVILEGED = """
    import asyncio, os, sys
    from pathlib import Path
    from tests.triggers.inbox import watched
    async def main():
        async with watched(Path(sys.argv[1]), rescan=0.2, watch=sys.argv[2]) as inbox:
            await inbox.has("open/a", within=10)
            inbox.write("open/b")
            await inbox.has("open/a", "open/b", within=10)
            await asyncio.sleep(1)
            denied = [entry["path"] for entry in inbox.logged("directory.permission_denied")]
            print(denied, inbox.logged("directory.polling_fallback"))
    import encodings.idna, concurrent.futures.thread, anyio._backends._asyncio, watchfiles
    os.setgid(65534)
    os.setuid(65534)
    asyncio.run(main())
"""


@pytest.mark.parametrize("watch", ["native", "poll"])
def test_unreadable_subdirectory(tmp_path: Path, watch: str):
    """A subdirectory that may not be read is warned about once, however often it is met; the rest
    works, natively too.
    """
    if os.getuid() != 0:
        pytest.skip("needs root, to become another user")
    for name in ("open", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("a")
        os.chown(tmp_path / name, 65534, 65534)
    os.chmod(tmp_path / "closed", 0)
    for parent in (tmp_path, *list(tmp_path.parents)[:-2]):
        os.chmod(parent, 0o755)
    assert finish(child(UNPRIVILEGED, tmp_path, watch)) == f"['{tmp_path}/closed'] []\n"


UNREADABLE = """
    import asyncio, os, sys
    from pathlib import Path
    from tests.conftest import eventually
    from tests.triggers.inbox import watched
    from triggers.files import move
    async def main():
        root, watch, touch, after = Path(sys.argv[1]), *sys.argv[2:]
        options = {"after": move(root.parent / "done")} if after == "moved" else {}
        async with watched(root, rescan=0.2, watch=watch, touch=touch, **options) as inbox:
            await inbox.has("open")
            await eventually(
                lambda: inbox.logged("directory.permission_denied"), "it is told"
            )
            await inbox.wait_until_idle()
            assert inbox.without_probes() == ["open"], inbox.names()
            os.chmod(root / "closed", 0o644)
            await eventually(
                lambda: inbox.without_probes() == ["closed", "open"], "it is an event"
            )
            (line,) = inbox.logged("directory.permission_denied")
            print(line["path"])
    import encodings.idna, concurrent.futures.thread, anyio._backends._asyncio, watchfiles
    os.setgid(65534)
    os.setuid(65534)
    asyncio.run(main())
"""


@pytest.mark.parametrize("watch", ["native", "poll"])
@pytest.mark.parametrize("touch", ["skip", "fire"])
@pytest.mark.parametrize("after", ["stays", "moved"])
def test_unreadable_file(tmp_path: Path, watch: str, touch: str, after: str):
    """A file that may not be read yet is no event, and delays no other; one line names it, and it
    is an event once it can be read.
    """
    if os.getuid() != 0:
        pytest.skip("needs root, to become another user")
    root = tmp_path / "in"
    root.mkdir()
    os.chown(root, 65534, 65534)
    os.chown(tmp_path, 65534, 65534)
    for name in ("open", "closed"):
        (root / name).write_text("a")
        os.chown(root / name, 65534, 65534)
    os.chmod(root / "closed", 0)
    for parent in (root, tmp_path, *list(tmp_path.parents)[:-2]):
        os.chmod(parent, 0o755)
    assert finish(child(UNREADABLE, root, watch, touch, after)) == f"{root}/closed\n"


@pytest.mark.parametrize("watch", ["native", "poll"])
def test_symlinks_are_not_followed(tmp_path: Path, watch: str):
    """Links to files and directories, loops and dangling ones are no events, however often they are
    met.
    """
    (tmp_path / "out").mkdir()
    (tmp_path / "out/secret").write_text("x")

    async def test(inbox: Inbox) -> None:
        inbox.write("real/a")
        os.symlink(tmp_path / "out", inbox.root / "dir")
        os.symlink(tmp_path / "out/secret", inbox.root / "file")
        os.symlink("nowhere", inbox.root / "dangling")
        os.symlink(inbox.root, inbox.root / "real/loop")
        os.symlink("self", inbox.root / "self")
        await inbox.wait_until_idle()
        (tmp_path / "out/later").write_text("x")
        await inbox.wait_until_idle()
        assert inbox.without_probes() == ["real/a"] and len(inbox.ledger.offered) == 3

    run(test, tmp_path / "in", watch=watch, rescan=0.2, deleted=True)


def test_symlinks_are_followed_inside_the_root(tmp_path: Path):
    """With `follow_symlinks` links inside the root count, each directory once; those leading out of
    it never do.
    """
    (tmp_path / "out").mkdir()
    (tmp_path / "out/secret").write_text("x")

    async def test(inbox: Inbox) -> None:
        inbox.write("real/a")
        os.symlink("real/a", inbox.root / "link")
        os.symlink(inbox.root, inbox.root / "real/loop")
        os.symlink(tmp_path / "out", inbox.root / "dir")
        os.symlink(tmp_path / "out/secret", inbox.root / "file")
        os.symlink("nowhere", inbox.root / "dangling")
        await eventually(
            lambda: {"link", "real/a"} <= set(inbox.names()), "link and file are events"
        )
        await inbox.wait_until_idle()
        assert inbox.without_probes() == ["link", "real/a"]

    run(test, tmp_path / "in", follow_symlinks=True, rescan=0.2)


def test_not_recursive(tmp_path: Path):
    """With `recursive=False` only the root's own files count."""

    async def test(inbox: Inbox) -> None:
        inbox.write("sub/a")
        inbox.write("b")
        await inbox.has("b")
        await stays(lambda: inbox.names() == ["b"], "nothing else is an event", during=0.3)

    run(test, tmp_path / "in", recursive=False, rescan=0.2)


def test_special_files(tmp_path: Path):
    """A pipe, a socket or a directory where a file was is no event and stops nothing."""

    async def test(inbox: Inbox) -> None:
        os.mkfifo(inbox.root / "pipe")
        inbox.write("a")
        await inbox.has("a")

    run(test, tmp_path / "in")


# ------------------------------------------------------------------ network file systems

MOUNTINFO = rb"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:25 / /data rw - nfs4 server:/export rw
31 30 0:26 / /data/local\040disk rw - xfs /dev/vdb rw
32 22 0:27 / /mnt/s3 rw - fuse.s3fs s3fs rw
33 22 0:28 / /mnt/usb rw - fuseblk /dev/sdb1 rw
34 22 0:29 / /data2 rw - cifs //host/share rw
"""


@pytest.mark.parametrize(
    "path,kind,remote",
    [
        ("/data", "nfs4", True),
        ("/data/in", "nfs4", True),
        ("/data/local disk/in", "xfs", False),
        ("/data2/in", "cifs", True),
        ("/data3", "ext4", False),
        ("/mnt/s3/in", "fuse.s3fs", True),
        ("/mnt/usb", "fuseblk", False),
        ("/", "ext4", False),
    ],
)
def test_network_file_systems(tmp_path: Path, path: str, kind: str, remote: bool):
    """The type of the innermost mount decides whether others can write behind the kernel's back."""
    (tmp_path / "mountinfo").write_bytes(MOUNTINFO)
    assert file_system(path.encode(), str(tmp_path / "mountinfo")) == kind
    assert is_remote(kind) is remote


def test_this_machine_s_mounts():
    """/proc has the type that the kernel reports."""
    assert file_system(b"/proc/self") == "proc" and file_system(b"/", "/no/such/file") == ""
