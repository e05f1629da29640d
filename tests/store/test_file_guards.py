"""The lock, the high-water mark, damage, the free-space floor, migrations. Real files, real
processes.
"""

import asyncio
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from eventflow.core.errors import (
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreLocked,
    StoreUnwritable,
    UsageError,
)
from eventflow.store.file_guards import DiskSpaceGuard, HighWater
from eventflow.store.migrate import migrate, migrations
from eventflow.store.protocol import RecordEvents
from eventflow.store.sqlite import SqliteStore
from eventflow.store.url import open_store
from tests.conftest import eventually
from tests.server_process import ROOT
from tests.store.ledger import Ledger, ManualClock, Reopen

HOLD = """
import sys
from eventflow.core.clock import SystemClock
from eventflow.store.sqlite import SqliteStore
store = SqliteStore(sys.argv[1], clock=SystemClock())
store.open()
if sys.argv[2:]:
    import asyncio
    from tests.store.ledger import Ledger
    asyncio.run(Ledger(store, SystemClock()).recorded())
print("open", flush=True)
sys.stdin.read()
store.close()
"""


@contextmanager
def holding(path: str, *record: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the store open, with one event if asked; killed at the end."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, path, *record],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert holder.stdout is not None and holder.stdin is not None
    try:
        assert holder.stdout.readline() == "open\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()


def opening(path: str) -> StoreError:
    """The error with which another process's `open` ends."""
    store = SqliteStore(path, clock=ManualClock())
    with pytest.raises(StoreError) as caught:
        store.open()
    return caught.value


# --------------------------------------------------------------------------- the lock


def test_row_11_a_second_process_gets_the_pid_of_the_holder(tmp_path: Path):
    """StoreLocked names the pid and exits 75; after its end the store opens, whatever the lock file
    contains.
    """
    path = str(tmp_path / "a.db")
    with holding(path) as holder:
        error = opening(path)
        assert isinstance(error, StoreLocked) and error.exit_code == 75
        assert error.pid == holder.pid and str(holder.pid) in str(error)
    store = SqliteStore(path, clock=ManualClock())
    store.open()
    store.close()


def test_one_process_opens_a_store_once(ledger: Ledger, path: str):
    """A second store object on the same file in the same process is refused too, and does not break
    the first one's lock.
    """
    for _ in range(2):
        error = opening(path)
        assert isinstance(error, StoreLocked) and error.pid == os.getpid()
    code = f"""
from eventflow.core.clock import SystemClock
from eventflow.store.sqlite import SqliteStore
SqliteStore({path!r}, clock=SystemClock()).open()
"""
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "StoreLocked" in other.stderr


WAYS = {
    "the same path": lambda path: path,
    "another spelling": lambda path: f"{os.path.dirname(path)}/../{path.split('/')[-2]}/./a.db",
    "a symlink": lambda path: _linked(os.symlink, path, f"{path}.link"),
    "a symlink elsewhere": lambda path: _linked(os.symlink, path, f"{path}.elsewhere/b.db"),
    "a symlinked folder": lambda path: (
        _linked(os.symlink, os.path.dirname(path), f"{path}.f") + "/a.db"
    ),
    "a hard link": lambda path: _linked(os.link, path, f"{path}.hard"),
    "a hard link elsewhere": lambda path: _linked(os.link, path, f"{path}.elsewhere/b.db"),
    "no lock file": lambda path: _without_lock(path, ""),
    "another lock file": lambda path: _without_lock(path, "1"),
}
"""Another name of an open store, or its name after what people do to its lock file."""


def _linked(make: Callable[[str, str], None], path: str, link: str) -> str:
    os.makedirs(os.path.dirname(link), exist_ok=True)
    make(path, link)
    return link


def _without_lock(path: str, content: str) -> str:
    os.unlink(f"{path}.lock")
    if content:
        Path(f"{path}.lock").write_text(content)
    return path


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["another process", "the same process"])
def test_row_11_the_file_has_one_owner_whatever_its_path(tmp_path: Path, way: str, where: str):
    """The lock belongs to the file, not to a name: StoreLocked with the holder's pid, and the first
    store still commits. After its end by kill -9 the store opens.
    """
    path = str(tmp_path / "a.db")
    if where == "the same process":
        store = SqliteStore(path, clock=ManualClock())
        store.open()
        error = opening(WAYS[way](path))
        assert isinstance(error, StoreLocked) and error.pid == os.getpid()
        asyncio.run(Ledger(store, ManualClock()).recorded())
        store.close()
    else:
        with holding(path) as holder:
            error = opening(WAYS[way](path))
            assert isinstance(error, StoreLocked) and error.exit_code == 75
            assert error.pid == holder.pid and str(holder.pid) in str(error)
            error = opening(path)  # the failed try has left nothing behind
            assert isinstance(error, StoreLocked) and error.pid == holder.pid
            holder.kill()
    store = SqliteStore(path, clock=ManualClock())
    store.open()
    store.close()


def test_row_11_a_bind_mount_is_the_same_file(tmp_path: Path):
    """Under another mount point the file has the same owner."""
    path = tmp_path / "data" / "a.db"
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    path.parent.mkdir()
    command = ["mount", "--bind", str(path.parent), str(mounted)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    try:
        with holding(str(path)) as holder:
            (mounted / "a.db.lock").unlink()
            error = opening(str(mounted / "a.db"))
            assert isinstance(error, StoreLocked) and error.pid == holder.pid
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)


def test_a_copy_is_another_store(ledger: Ledger, path: str, tmp_path: Path):
    """A copy of an open store's files is a file of its own and opens beside it."""
    shutil.copytree(tmp_path, tmp_path / "copy")
    store = SqliteStore(tmp_path / "copy" / Path(path).name, clock=ManualClock())
    store.open()
    store.close()


def test_a_second_name_of_a_store_is_refused(tmp_path: Path):
    """A killed process leaves commits in the WAL of the first name. A hard link would open the
    store without them, so it is refused, and the first name opens with all of them.
    """
    path = str(tmp_path / "a.db")
    with holding(path, "record") as holder:
        holder.kill()
    os.link(path, f"{path}.hard")
    with pytest.raises(UsageError, match="hard link"):
        SqliteStore(f"{path}.hard", clock=ManualClock()).open()
    store = SqliteStore(path, clock=ManualClock())
    store.open()
    assert asyncio.run(store.counts())["events"] == 1
    store.close()


def test_a_symlinked_store_has_one_set_of_files(tmp_path: Path):
    """Whatever name is used, the WAL, the mark, the token and the blobs are beside the file."""
    (tmp_path / "link.db").symlink_to(tmp_path / "a.db")
    store = SqliteStore(tmp_path / "link.db", clock=ManualClock())
    assert store.path == str(tmp_path / "a.db")
    store.open()
    store.close()
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith("link.db.")]


def test_a_forked_child_does_not_own_the_store(tmp_path: Path):
    """In a child every verb is refused at once, opening it is StoreLocked with the parent's pid,
    and neither `close` nor the end of the child touches the files; the parent goes on.
    """
    code = """
import asyncio, os, sys
from eventflow.core.clock import SystemClock
from eventflow.core.errors import StoreError, StoreLocked
from eventflow.store.sqlite import SqliteStore
from tests.store.ledger import Ledger
store = SqliteStore(sys.argv[1], clock=SystemClock())
store.open()
asyncio.run(Ledger(store, SystemClock()).recorded())
child = os.fork()
if child == 0:
    for verb in (store.counts, lambda: store.record([]), store.paused_triggers):
        try:
            asyncio.run(asyncio.wait_for(verb(), 5))
        except StoreError as error:
            assert "fork" in str(error), error
        else:
            os._exit(9)
    store.close()
    try:
        SqliteStore(sys.argv[1], clock=SystemClock()).open()
    except StoreLocked as error:
        assert error.pid == os.getppid(), error
    else:
        os._exit(8)
    del store
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
asyncio.run(Ledger(store, SystemClock()).recorded(name="second"))
assert os.path.getsize(sys.argv[1] + "-wal")
assert asyncio.run(store.counts())["events"] == 2
store.close()
"""
    path = tmp_path / "a.db"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.anyio
async def test_a_store_that_lost_its_file_leaves_the_next_one_alone(tmp_path: Path):
    """Another process starts on a new file at the same path; the end of the first store removes
    none of its files.
    """
    path = tmp_path / "a.db"
    store = SqliteStore(path, clock=ManualClock(), ballast=4096)
    store.open()
    await Ledger(store, ManualClock()).recorded()
    for file in tmp_path.glob("a.db*"):
        file.unlink()
    with holding(str(path), "record") as holder:
        await eventually(lambda: store.failed, "the first store has failed")
        store.close()
        names = {file.name for file in tmp_path.iterdir()}
        assert names >= {"a.db", "a.db-wal", "a.db-shm", "a.db.ballast"}
        holder.kill()
    store = SqliteStore(path, clock=ManualClock())
    store.open()
    assert (await store.counts())["events"] == 1
    store.close()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path):
    """A worker of a process pool that outlives its parent does not hold the lock: the store
    opens.
    """
    path = str(tmp_path / "a.db")
    code = """
import os, sys, time
from eventflow.core.clock import SystemClock
from eventflow.store.sqlite import SqliteStore
store = SqliteStore(sys.argv[1], clock=SystemClock())
store.open()
child = os.fork()
if child == 0:
    os.write(1, b"forked\\n")
    time.sleep(60)
    os._exit(0)
os.write(1, b"%d\\n" % child)
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None and parent.stdin is not None
    output = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
    (child,) = output - {"forked"}
    parent.kill()
    parent.wait()
    store = SqliteStore(path, clock=ManualClock())
    store.open()
    store.close()
    os.kill(int(child), 9)
    parent.stdin.close()
    parent.stdout.close()


@pytest.mark.anyio
async def test_row_10_another_writer_in_the_file_slows_intake_and_loses_nothing(
    ledger: Ledger, path: str
):
    """While another process holds SQLite's lock, records are refused and settles wait; both succeed
    afterwards.
    """
    run = await ledger.running()
    connection = ledger.store._connection
    assert connection is not None
    connection.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    settled = asyncio.create_task(ledger.settle(run))
    await asyncio.sleep(0)
    for _ in range(2):
        with pytest.raises(StoreFull, match="locked") as caught:
            await ledger.store.record([ledger.arrival("a", ledger.run())])
        assert caught.value.retry_after > 0 and not settled.done() and ledger.store.failed is None
    other.execute("ROLLBACK")
    other.close()
    await settled
    assert await ledger.state(run) == "completed"
    await ledger.recorded(ledger.run(), name="a")


# --------------------------------------------------------------------------- permissions


@pytest.mark.anyio
async def test_files_are_private(tmp_path: Path):
    """The store, its sidecars and the folder made for it are open to their owner only."""
    path = tmp_path / "deep" / "folder" / "a.db"
    store = SqliteStore(path, clock=ManualClock(), ballast=4096, free_floor=0)
    store.open()
    await Ledger(store, ManualClock()).recorded()
    names = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert set(names) >= {"a.db", "a.db-wal", "a.db-shm", "a.db.lock", "a.db.hwm", "a.db.ballast"}
    assert set(names.values()) == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    store.close()


def test_the_default_folder_is_kept_out_of_git(tmp_path: Path):
    """A `.eventflow` that a store makes has a `.gitignore` for all of it; one that was there, and a
    folder of another name, are left as they are.
    """
    there = tmp_path / "there" / ".eventflow"
    there.mkdir(parents=True)
    for folder in (tmp_path / "new" / ".eventflow", there, tmp_path / "data"):
        store = SqliteStore(folder / "a.db", clock=ManualClock(), ballast=0)
        store.open()
        store.close()
    assert (tmp_path / "new" / ".eventflow" / ".gitignore").read_text() == "*\n"
    assert [path.parent.parent.name for path in tmp_path.rglob(".gitignore")] == ["new"]


def test_row_9_a_folder_that_cannot_be_written(tmp_path: Path):
    """StoreUnwritable, exit 73, in one line that names the store; for a read-only store
    file too.
    """
    code = """
import os, sys
from eventflow.core.clock import SystemClock
from eventflow.core.errors import StoreError
from eventflow.store.sqlite import SqliteStore
if os.getuid() == 0:
    os.setuid(65534)
try:
    SqliteStore(sys.argv[1], clock=SystemClock()).open()
except StoreError as error:
    print(error.exit_code, error)
"""
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    readonly = tmp_path / "open" / "a.db"
    readonly.parent.mkdir()
    readonly.parent.chmod(0o777)
    readonly.touch(0o444)
    for path in (closed / "a.db", closed / "new" / "a.db", readonly):
        result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
        assert (
            result.stdout.startswith("73 ")
            and str(path) in result.stdout
            and result.stdout.count("\n") == 1
        ), result


def test_a_path_that_is_no_path(tmp_path: Path):
    """A file where a folder is expected is StoreUnwritable too."""
    (tmp_path / "file").touch()
    assert isinstance(opening(str(tmp_path / "file" / "a.db")), StoreUnwritable)


# --------------------------------------------------------------------------- damage


def test_not_a_store(tmp_path: Path):
    """Another kind of file is StoreCorrupt, exit 65, and is left as it was."""
    path = tmp_path / "a.db"
    path.write_bytes(b"#!/bin/sh\n" * 1000)
    error = opening(str(path))
    assert isinstance(error, StoreCorrupt) and error.exit_code == 65
    assert path.read_bytes() == b"#!/bin/sh\n" * 1000


@pytest.mark.anyio
async def test_row_12_a_wal_that_lost_its_tail_is_refused(
    ledger: Ledger, path: str, tmp_path: Path
):
    """Fewer commits than were acknowledged: exit 65 with the missing range, nothing is changed;
    `accept_loss` opens it.
    """
    await ledger.recorded(ledger.run())
    writer = ledger.store._writer
    assert writer is not None
    kept = os.path.getsize(f"{path}-wal")
    first = writer.last.batch
    for _ in range(5):
        await ledger.recorded(ledger.run())
    last = writer.last.batch
    await eventually(lambda: writer.high_water.marked == last, "the high-water mark is written")
    copy = tmp_path / "after the power cut"
    copy.mkdir()
    for name in ("", "-wal", ".hwm"):
        shutil.copy(f"{path}{name}", copy / f"a.db{name}")
    os.truncate(copy / "a.db-wal", kept)
    before = (copy / "a.db-wal").read_bytes()
    error = opening(str(copy / "a.db"))
    assert isinstance(error, StoreCorrupt) and error.exit_code == 65
    assert f"{first + 1} to {last}" in str(error)
    assert (copy / "a.db-wal").read_bytes() == before
    store = SqliteStore(copy / "a.db", clock=ManualClock(), accept_loss=True)
    store.open()
    assert (await store.counts())["events"] == 1
    assert store._writer is not None and store._writer.last.batch > last
    store.close()
    store = SqliteStore(copy / "a.db", clock=ManualClock())
    store.open()
    store.close()


@pytest.mark.anyio
async def test_row_12_a_flipped_byte_in_the_wal_is_noticed(
    ledger: Ledger, path: str, tmp_path: Path
):
    """SQLite silently drops the commits after a damaged frame; the high-water mark reveals it."""
    for _ in range(6):
        await ledger.recorded(ledger.run())
    writer = ledger.store._writer
    assert writer is not None
    await eventually(
        lambda: writer.high_water.marked == writer.last.batch, "the high-water mark is written"
    )
    for name in ("", "-wal", ".hwm"):
        shutil.copy(f"{path}{name}", tmp_path / f"a.db{name}")
    wal = bytearray((tmp_path / "a.db-wal").read_bytes())
    wal[len(wal) // 2] ^= 1
    (tmp_path / "a.db-wal").write_bytes(wal)
    assert isinstance(opening(str(tmp_path / "a.db")), StoreCorrupt)


@pytest.mark.parametrize("harm", ["empty", "zeroed", "gone", "one slot torn"])
def test_a_damaged_high_water_mark_is_ignored(reopen: Reopen, path: str, harm: str):
    """A power cut may leave the sidecar empty or zeroed, or one of its two slots torn: the store
    opens.
    """
    reopen().store.close()
    mark = Path(f"{path}.hwm")
    match harm:
        case "empty":
            mark.write_bytes(b"")
        case "zeroed":
            mark.write_bytes(bytes(32))
        case "gone":
            mark.unlink()
        case _:
            mark.write_bytes(b"torn" + mark.read_bytes()[4:])
    reopen()


def test_the_high_water_mark_is_the_higher_slot(tmp_path: Path):
    """Slots are written alternately; if the newer one is torn, the older one counts."""
    mark = HighWater(str(tmp_path / "a"))
    assert mark.open() == 0
    for batch in (5, 6, 7):
        mark.write(batch)
    mark.close()
    assert HighWater(str(tmp_path / "a")).open() == 7
    raw = bytearray((tmp_path / "a.hwm").read_bytes())
    raw[16] ^= 0xFF
    (tmp_path / "a.hwm").write_bytes(raw)
    again = HighWater(str(tmp_path / "a"))
    assert again.open() == 6
    again.write(8)
    again.close()
    assert HighWater(str(tmp_path / "a")).open() == 8


@pytest.mark.anyio
async def test_row_13_a_damaged_page_is_found(reopen: Reopen, path: str, tmp_path: Path):
    """A byte flipped in the file on disk: the row is named by its checksum, and `check`
    reports it.
    """
    ledger = reopen()
    for n in range(50):
        await ledger.store.record([ledger.arrival(f"e{n}", body=b"needle-%d-" % n + b"x" * 200)])
    ledger.store.close()
    raw = Path(path).read_bytes()
    (tmp_path / "a.db").write_bytes(raw.replace(b"needle-7-", b"needle_7-"))
    store = SqliteStore(tmp_path / "a.db", clock=ledger.clock, ballast=0)
    store.open()
    with pytest.raises(StoreCorrupt, match="events row"):
        await store.event("e7")
    assert len(await store.events(limit=100)) == 49
    assert len(await store.check()) == 1
    store.close()


# --------------------------------------------------------------------------- space


@pytest.mark.anyio
async def test_row_8_below_the_floor_intake_is_full_and_runs_continue(path: str):
    """Below the floor `capacity` returns the error with a delay; a running run still settles."""
    store = SqliteStore(path, clock=ManualClock(), free_floor=1 << 60)
    store.open()
    ledger = Ledger(store, ManualClock())
    full = store.capacity()
    assert full is not None and full.disk and full.retry_after > 0 and "free" in str(full)
    run = await ledger.running()
    await ledger.settle(run)
    assert await ledger.state(run) == "completed"
    store.close()


def test_the_ballast_reserves_space_and_is_released(tmp_path: Path):
    """It is created if there is space, released once, and created again later."""
    space = DiskSpaceGuard(str(tmp_path / "a.db"), ManualClock(), 0, 1 << 20)
    assert not space.release_ballast()
    space.reserve_ballast()
    assert (tmp_path / "a.db.ballast").stat().st_blocks * 512 >= 1 << 20
    assert space.release_ballast() and not space.release_ballast()
    space.restore_ballast()
    assert (tmp_path / "a.db.ballast").exists()


def test_a_closed_store_has_no_ballast(path: str):
    """Closing releases the ballast; a second process whose open fails does not."""
    store = SqliteStore(path, clock=ManualClock(), ballast=1 << 20, free_floor=0)
    store.open()
    opening(path)
    assert os.path.exists(f"{path}.ballast")
    store.close()
    assert not os.path.exists(f"{path}.ballast")


def test_row_10_a_locked_file_at_open_names_its_holder(reopen: Reopen, path: str):
    """Another program holds SQLite's lock: opening waits, then fails with its pid, exit 75."""
    reopen().store.close()
    code = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdin is not None
    holder.stdout.readline()
    error = opening(path)
    assert (
        isinstance(error, StoreLocked) and error.pid in (holder.pid, None) and error.exit_code == 75
    )
    holder.stdin.close()
    holder.wait()
    holder.stdout.close()


# --------------------------------------------------------------------------- schema, URL, epochs


def test_row_43_a_newer_schema_is_refused(reopen: Reopen, path: str):
    """A store of a newer version is refused unchanged, and the message names the reason."""
    reopen().store.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 999")
    connection.close()
    assert "newer version" in str(opening(path))
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {migrations()[-1][0]}")
    connection.close()


def test_row_43_an_upgrade_is_atomic_and_keeps_a_copy(tmp_path: Path):
    """A failed migration changes nothing and leaves a copy; a successful one commits completely."""
    path = str(tmp_path / "a.db")
    connection = sqlite3.connect(path, isolation_level=None)
    migrate(connection, path, migrations())
    connection.execute("UPDATE ledger SET epoch = 41")
    newest = migrations()[-1][0]
    good = "ALTER TABLE ledger ADD COLUMN later INTEGER NOT NULL DEFAULT 7;"
    with pytest.raises(sqlite3.Error):
        migrate(connection, path, [(newest, ""), (newest + 1, f"{good} UPDATE nowhere SET x = 1;")])
    assert connection.execute("PRAGMA user_version").fetchone() == (newest,)
    assert "later" not in [row[1] for row in connection.execute("PRAGMA table_info(ledger)")]
    migrate(connection, path, [(newest, ""), (newest + 1, good)])
    assert connection.execute("SELECT epoch, later FROM ledger").fetchone() == (41, 7)
    connection.close()
    copy = sqlite3.connect(f"{path}.schema-{newest}.bak")
    assert copy.execute("SELECT epoch FROM ledger").fetchone() == (41,)
    copy.close()


def test_the_url_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three slashes are relative, four absolute; anything else is a usage error that shows the
    expected form.
    """
    monkeypatch.chdir(tmp_path)
    assert open_store("sqlite:///x/a.db", ManualClock()).path == str(tmp_path / "x" / "a.db")
    assert open_store(f"sqlite:///{tmp_path}/a.db", ManualClock()).path == str(tmp_path / "a.db")
    for wrong in ("a.db", "sqlite://a.db", "sqlite:///", "mysql:///a.db"):
        with pytest.raises(UsageError, match="sqlite:///PATH"):
            open_store(wrong, ManualClock())


@pytest.mark.anyio
async def test_ids_and_batches_continue_after_a_restart(ledger: Ledger, reopen: Reopen):
    """`last_id` is the largest id in the file, and commit numbers never repeat."""
    (run,) = await ledger.recorded(ledger.run())
    writer = ledger.store._writer
    assert writer is not None
    before = writer.last.batch
    ledger = reopen()
    assert ledger.store.last_id == run.event
    writer = ledger.store._writer
    assert writer is not None and writer.last.batch == before + 1


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///a.db?mode=ro",
        "sqlite:///a.db#x",
        "sqlite:///~/a.db",
        "sqlite:///:memory:",
        "sqlite:///a.db\n",
        "sqlite:/// a.db",
        "sqlite:///a\0.db",
        "sqlite:///folder/",
        "SQLITE:///a.db",
        "sqlite:////",
    ],
)
def test_a_store_url_is_parsed_strictly(url: str):
    """What has a meaning elsewhere in such a URL is refused: it would silently be another file."""
    with pytest.raises(UsageError, match="--store expected"):
        open_store(url, ManualClock())


def test_methods_before_open_raise_store_error(path: str):
    """A store that is not open raises StoreError, not AttributeError."""
    store = SqliteStore(path, clock=ManualClock())
    with pytest.raises(StoreError, match="not open"):
        store.capacity()
    with pytest.raises(StoreError, match="not open"):
        asyncio.run(store.record([]))
    with pytest.raises(StoreError, match="not open"):
        asyncio.run(Ledger(store, ManualClock()).do(RecordEvents([])))
