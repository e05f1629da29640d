"""Guards of the store's file: its lock, the check that it is still at its path, the high-water
mark, the free-space floor, the ballast.

sqlite.py and writer.py use them. Their files are beside the store: `STORE.lock`, `STORE.hwm`,
`STORE.ballast`, mode 0600. An empty or zeroed one, as a power cut leaves it, counts as absent.
"""

import errno
import fcntl
import os
import sqlite3
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final
from zlib import crc32

from eventflow.core.clock import Clock
from eventflow.core.errors import StoreFailed, StoreFull, StoreLocked, UsageError
from eventflow.core.forks import call_in_forked_children

_MODE = 0o600
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC

FileIdentity = tuple[int, int]
"""Device and inode: what a file is, whatever its names."""

_OWNED: Final[set[FileIdentity]] = set()
"""The stores that this process has open."""

_OWNER_BYTE: Final = 1 << 60
"""Behind the end of any SQLite file (2^48 bytes)."""

_SQLITE_SHARED_BYTE: Final = 0x40000002
"""A byte of which SQLite needs an exclusive lock before it removes a WAL."""

_OFD_SETLK: Final[int | None] = getattr(fcntl, "F_OFD_SETLK", None)


class Lock:
    """One process per store, whatever the path by which it names the file.

    Two locks are held. `flock` on `STORE.lock`, whose content is the holder's pid. And an open file
    description lock on a byte of the store's file that SQLite does not use: it belongs to the
    inode, so a hard link, a bind mount or a removed lock file leads to the same lock, and a copy is
    another store. Where the system has none of these (macOS), only the first one is held. On NFS
    both are locks of the server.
    """

    def __init__(self, path: str) -> None:
        self._store = path
        self._path = f"{path}.lock"
        self._fd: int | None = None
        self._store_fd: int | None = None
        self._identity: FileIdentity | None = None

    def acquire(self, *, create: bool = True) -> None:
        """Raises StoreLocked naming the holder's pid. The store's file is created if it is missing
        and `create` is set.
        """
        self._fd = os.open(self._path, _FLAGS, _MODE)
        try:
            self._lock_path(self._fd)
            if create or os.path.exists(self._store):
                self._lock_file()
        except BaseException:
            self.release()
            raise
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        # A forked child would keep the locks after its parent's death. It does not own the store:
        # it does not serve it, and closes it without a write.
        call_in_forked_children(self.release)

    def _lock_path(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).strip()
            raise StoreLocked(self._store, int(holder) if holder.isdigit() else None) from None

    def _lock_file(self) -> None:
        # Closing any handle of a file drops SQLite's own locks of this process on it: no handle is
        # opened here of a file that this process owns already.
        if file_identity(self._store) in _OWNED:
            raise StoreLocked(self._store, os.getpid())
        self._store_fd = os.open(self._store, _FLAGS, _MODE)
        try:
            _lock_byte(self._store_fd, _OWNER_BYTE, fcntl.F_WRLCK)
        except BlockingIOError:
            raise StoreLocked(self._store, _owner_pid(os.fstat(self._store_fd).st_ino)) from None
        self._identity = _identity(os.fstat(self._store_fd))
        _OWNED.add(self._identity)

    @property
    def is_held(self) -> bool:
        return self._fd is not None

    @property
    def identity(self) -> FileIdentity | None:
        """Of the store's file that is owned."""
        return self._identity

    @property
    def handle(self) -> int | None:
        """Of the store's file, while it is owned."""
        return self._store_fd

    def keep_wal(self) -> None:
        """Lets no connection of this process remove the file at `STORE-wal` when it is closed.

        SQLite removes it by its name if it can lock the store's file exclusively, and the name may
        be another store's by now.
        """
        if self._store_fd is not None:
            _lock_byte(self._store_fd, _SQLITE_SHARED_BYTE, fcntl.F_RDLCK)

    def release(self) -> None:
        """Call it after the last connection to the store's file is closed."""
        for fd in (self._store_fd, self._fd):
            if fd is not None:
                os.close(fd)
        self._store_fd = None
        self._fd = None
        if self._identity is not None:
            _OWNED.discard(self._identity)
            self._identity = None


def _lock_byte(fd: int, offset: int, kind: int) -> None:
    """Lock one byte for this handle. BlockingIOError: another handle has it locked."""
    if _OFD_SETLK is None:
        return
    try:
        fcntl.fcntl(fd, _OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, offset, 1, 0))
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel without them (gVisor): as on macOS
            raise


def _identity(found: os.stat_result) -> FileIdentity:
    return found.st_dev, found.st_ino


def file_identity(path: str) -> FileIdentity | None:
    """None if there is no file, or it cannot be seen."""
    try:
        return _identity(os.stat(path))
    except OSError:
        return None


def _owner_pid(inode: int) -> int | None:
    """The pid of the process that locked the owner's byte of this file; None if unknown: no /proc,
    or a process of another user or container.
    """
    for name in Path("/proc").glob("[0-9]*/fdinfo/*"):
        with suppress(OSError), name.open() as file:
            if any(f":{inode} {_OWNER_BYTE} " in line for line in file if "OFDLCK" in line):
                return int(name.parts[2])
    return None


TEMPORARY_COPY = ".check-"
"""In the names of temporary copies of a store, after its own name; see backup.py."""


def remove_temporary_copies(path: str) -> None:
    """Removes the copies that a killed process left. Call it with the lock of the store."""
    folder, name = os.path.split(path)
    for each in os.listdir(folder or "."):
        if each.startswith(f"{name}{TEMPORARY_COPY}"):
            os.unlink(os.path.join(folder, each))


def check_first_name(path: str) -> None:
    """Raises UsageError for a further hard link of a store's file: the WAL and the other files are
    beside the name under which it was opened first.
    """
    found = os.stat(path)
    if found.st_nlink > 1 and found.st_size and not os.path.exists(f"{path}.hwm"):
        raise UsageError(
            f"{path} is one of {found.st_nlink} names (hard links) of one file; expected the name "
            "under which the store was first opened, which has its .hwm file beside it. For a "
            "store of its own copy the file with `eventflow backup`"
        )


def lock_holder(path: str) -> StoreLocked | None:
    """The error that opening this store would raise, or None if its lock is free."""
    lock = Lock(path)
    try:
        lock.acquire(create=False)
    except StoreLocked as locked:
        return locked
    lock.release()
    return None


ALL_FILES_CHECK_SECONDS: Final = 1.0
"""Between two looks at all files. The store's own file is looked at before each acknowledgement."""


class OpenFiles:
    """The store's file, its WAL and its shared memory: are they, at their paths, still the ones
    that are open?

    SQLite does not notice that a file was removed, moved or replaced, and goes on writing into one
    that no path leads to. For use by the writer's thread.
    """

    def __init__(self, path: str, clock: Clock, lock: Lock) -> None:
        self.path = path
        self._clock = clock
        self._lock = lock
        self._opened: dict[str, FileIdentity | None] = {}
        self._content: FileContent | None = None
        self.is_overwritten = False
        """Whether another program has written into the store's file."""
        self._all_checked_at = float("-inf")

    def remember(self, connection: sqlite3.Connection) -> None:
        """The files are open now, also by `connection`."""
        self._opened = {
            name: file_identity(name) for name in (f"{self.path}-wal", f"{self.path}-shm")
        }
        self._opened[self.path] = self._lock.identity
        shared_memory = _open_handle(f"{self.path}-shm")
        if self._lock.handle is not None and shared_memory is not None:
            self._content = FileContent(self._lock.handle, shared_memory, connection)
        self.check(all_files=True)

    def check(self, *, all_files: bool = False) -> None:
        """Raises StoreFailed if the store's file is another one, or was overwritten. WAL and shared
        memory are looked at once a second, or if `all_files`: what was in them can still be saved
        then.
        """
        now = self._clock.monotonic()
        if all_files or now - self._all_checked_at >= ALL_FILES_CHECK_SECONDS:
            self._all_checked_at = now
            names = list(self._opened)
        else:
            names = [self.path]
        for name in names:
            if file_identity(name) != self._opened.get(name):
                raise StoreFailed(
                    f"{name} was removed, moved or replaced while the store was open; nothing more"
                    " is acknowledged. Stop the server before its files are touched; now restart"
                    " it with the files to serve"
                )
        if self._content is not None and self._content.is_overwritten():
            self.is_overwritten = True
            raise StoreFailed(
                f"{self.path} was overwritten while the store was open; nothing more is"
                f" acknowledged. {self._set_wal_aside()} has the last commits of the store that was"
                " open. Stop the server before its files are touched"
            )

    def _set_wal_aside(self) -> str:
        """The WAL belongs to what was overwritten: the next start must not read it into the other
        content. Returns where it is.
        """
        self.abandon()
        aside = f"{self.path}-wal.{self._clock.now()}"
        with suppress(OSError):
            os.rename(f"{self.path}-wal", aside)
        return aside

    def abandon(self) -> None:
        """Another store may be at the path: its files are left alone from now on."""
        with suppress(OSError):
            self._lock.keep_wal()


class FileContent:
    """Whether the content of the store's file was replaced, as `cp backup STORE` does.

    Only checkpoints write the store's file while it is open, and they leave their progress in the
    shared memory: a write without any is somebody else's. It counts if it has changed the size or
    the page of the table `ledger`, which every commit changes. Files are read by handles that are
    open already: closing another one would drop SQLite's locks.
    """

    _SALT: Final = slice(32, 40)
    _BACKFILLED: Final = slice(96, 100)
    _BACKFILLING: Final = slice(128, 132)
    """Where SQLite's wal-index has the salt of the WAL, and the frames that checkpoints have
    written and attempted to write.
    """

    def __init__(self, handle: int, shared_memory: int, connection: sqlite3.Connection) -> None:
        self._handle = handle
        self._shared_memory = shared_memory
        (self._page_size,) = connection.execute("PRAGMA page_size").fetchone()
        (root,) = connection.execute(
            "SELECT rootpage FROM sqlite_schema WHERE name = 'ledger'"
        ).fetchone()
        self._offset = (root - 1) * self._page_size
        self._written_at = 0
        self._progress = b""
        self._content: tuple[int, bytes] = (0, b"")
        self.is_overwritten()

    def is_overwritten(self) -> bool:
        """Whether it was since the last look."""
        found = os.fstat(self._handle)
        if found.st_mtime_ns == self._written_at and found.st_size == self._content[0]:
            return False
        self._written_at = found.st_mtime_ns
        index = os.pread(self._shared_memory, self._BACKFILLING.stop, 0)
        progress = index[self._SALT] + index[self._BACKFILLED] + index[self._BACKFILLING]
        content = (found.st_size, os.pread(self._handle, self._page_size, self._offset))
        is_unfinished = index[self._BACKFILLED] != index[self._BACKFILLING]
        if progress != self._progress or is_unfinished:
            self._progress = progress
            self._content = content
            return False
        return content != self._content


def _open_handle(path: str) -> int | None:
    """A handle of this file that the process has open; None if there is none, or no /proc."""
    wanted = file_identity(path)
    with suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                if _identity(os.fstat(int(name))) == wanted:
                    return int(name)
    return None


def lock_holder_pid(path: str) -> int | None:
    """The pid that holds a lock on this file, by /proc/locks; None if unknown."""
    try:
        found = os.stat(path)
        with open("/proc/locks") as locks:
            for line in locks:
                fields = line.split()
                pid = int(fields[4])
                if fields[5].endswith(f":{found.st_ino}") and pid not in (os.getpid(), -1):
                    return pid
    except (OSError, ValueError, IndexError):
        pass  # no /proc, or another format of it: the message has no pid
    return None


def make_store_folder(folder: str) -> None:
    """Makes the folder of a store if it is missing. One named `.eventflow`, the default, is made
    with a `.gitignore`: it holds tokens and data.
    """
    try:
        os.makedirs(folder, mode=0o700)
    except FileExistsError:
        return
    if os.path.basename(folder) == ".eventflow":
        with open(os.path.join(folder, ".gitignore"), "w") as file:
            file.write("*\n")


def sync_folder(path: str) -> None:
    """Make the names in the folder of `path` durable."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class HighWater:
    """The number of the last commit, outside of the store: a WAL that lost its tail ends before it.

    Two slots of 16 bytes (batch, CRC), written alternately, so that a torn write damages only the
    newer one.
    """

    _SLOT = struct.Struct("<QI4x")

    def __init__(self, path: str) -> None:
        self._path = f"{path}.hwm"
        self._fd: int | None = None
        self._next_slot = 0

    def open(self) -> int:
        """The stored batch; 0 if there is none."""
        self._fd = os.open(self._path, _FLAGS, _MODE)
        raw = os.pread(self._fd, 2 * self._SLOT.size, 0)
        marks = [self._read(raw[at : at + self._SLOT.size]) for at in (0, self._SLOT.size)]
        self._next_slot = int(marks[0] >= marks[1])
        return max(marks)

    def _read(self, slot: bytes) -> int:
        if len(slot) < self._SLOT.size:
            return 0
        batch, crc = self._SLOT.unpack(slot)
        return batch if crc == crc32(slot[:8]) else 0

    def write(self, batch: int) -> None:
        """Durable when it returns."""
        if self._fd is None:
            return
        number = batch.to_bytes(8, "little")
        slot = self._SLOT.pack(batch, crc32(number))
        os.pwrite(self._fd, slot, self._next_slot * self._SLOT.size)
        os.fdatasync(self._fd)
        self._next_slot ^= 1

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class DiskSpaceGuard:
    """The free-space floor: below it the ledger accepts nothing more, and running work is completed
    in the space of the ballast.
    """

    def __init__(self, path: str, clock: Clock, floor: int | None, ballast: int) -> None:
        self._folder = os.path.dirname(path) or "."
        self._clock = clock
        self._floor = floor  # bytes; None: 256 MiB or 2 % of the disk, whichever is less
        self._ballast_path = f"{path}.ballast"
        self._ballast_size = ballast  # bytes
        self._ballast_released = False
        self._full: StoreFull | None = None
        self._checked_at = float("-inf")  # when `_full` was determined

    def full(self) -> StoreFull | None:
        """The error if the free space is below the floor, else None. Checked at most once a
        second.
        """
        now = self._clock.monotonic()
        if now - self._checked_at >= 1:
            self._checked_at = now
            free, floor = self._free()
            self._full = None
            if free < floor:
                self._full = StoreFull(
                    f"{free >> 20} MiB free in {self._folder}, expected at least "
                    f"{floor >> 20} MiB; free some space",
                    10.0,
                    disk=True,
                )
        return self._full

    def check_copy(self, size: int) -> None:
        """Raises StoreFull if a copy of `size` bytes would leave less than the floor."""
        free, floor = self._free()
        if free < size + floor:
            raise StoreFull(
                f"{free >> 20} MiB free in {self._folder}, expected {(size + floor) >> 20} MiB: "
                "while a server runs, a copy of the ledger is checked; free some space, or stop "
                "the server and run `eventflow doctor`",
                60.0,
                disk=True,
            )

    def _free(self) -> tuple[int, int]:
        """The free space and the floor, in bytes."""
        disk = os.statvfs(self._folder)
        floor = (
            min(256 << 20, disk.f_blocks * disk.f_frsize // 50)
            if self._floor is None
            else self._floor
        )
        return disk.f_bavail * disk.f_frsize, floor

    def reserve_ballast(self) -> None:
        """Create the ballast if there is space for twice its size. The store works without it."""
        free, floor = self._free()
        size = self._ballast_size
        if not size or free < floor + 2 * size or os.path.exists(self._ballast_path):
            return
        fd = os.open(self._ballast_path, _FLAGS, _MODE)
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError:
            os.unlink(self._ballast_path)  # this file system cannot reserve space
        finally:
            os.close(fd)

    def restore_ballast(self) -> None:
        """Create a released ballast again once there is space."""
        if self._ballast_released and self.full() is None:
            self._ballast_released = False
            self.reserve_ballast()

    def release_ballast(self) -> bool:
        """Delete the ballast, so that running work can be completed. False if there was
        none left.
        """
        self._checked_at = float("-inf")
        self._ballast_released = True
        try:
            os.unlink(self._ballast_path)
        except FileNotFoundError:
            return False
        return True
