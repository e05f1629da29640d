"""What stands around the store's file: the lock, the high-water mark, the free-space floor and its
ballast.

Used by sqlite.py and writer.py. Their files lie beside the store: `STORE.lock`, `STORE.hwm`,
`STORE.ballast`, mode 0600. An empty or zeroed one, as a power cut leaves it, counts as absent.
"""

import fcntl
import os
import struct
import weakref
from zlib import crc32

from eventflow.core.clock import Clock
from eventflow.core.errors import StoreFull, StoreLocked

_MODE = 0o600
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC


class Lock:
    """One process per store. `flock` on a file of its own: SQLite's locks on the store's file
    vanish when any handle of this process on it is closed.
    """

    def __init__(self, path: str) -> None:
        self._store, self._path = path, f"{path}.lock"
        self._fd: int | None = None

    def acquire(self) -> None:
        """Raises StoreLocked naming the holder's pid."""
        fd = os.open(self._path, _FLAGS, _MODE)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).strip()
            os.close(fd)
            raise StoreLocked(self._store, int(holder) if holder.isdigit() else None) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd
        _release_in_forks(self)

    @property
    def held(self) -> bool:
        return self._fd is not None

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _release_in_forks(lock: Lock) -> None:
    """A forked child shares the lock and would keep it after its parent's death; it lets go of its
    handle.
    """
    held = weakref.ref(lock)

    def let_go() -> None:
        lock = held()
        if lock is not None:
            lock.release()

    os.register_at_fork(after_in_child=let_go)


def lock_holder_pid(path: str) -> int | None:
    """The pid that holds a lock on this file, from /proc/locks where there is one."""
    try:
        found = os.stat(path)
        with open("/proc/locks") as locks:
            for line in locks:
                words = line.split()
                if words[5].endswith(f":{found.st_ino}") and int(words[4]) not in (os.getpid(), -1):
                    return int(words[4])
    except (OSError, ValueError, IndexError):
        pass  # no /proc, or one of another shape: the message goes without a pid
    return None


def sync_folder(path: str) -> None:
    """Makes the names of files beside `path` as durable as their content."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class HighWater:
    """The last committed batch, kept outside the store: a WAL that lost its tail shows fewer
    batches than this.

    Two slots of 16 bytes (batch, CRC), written in turn, so that a torn write spoils only the newer
    one.
    """

    _SLOT = struct.Struct("<QI4x")

    def __init__(self, path: str) -> None:
        self._path = f"{path}.hwm"
        self._fd: int | None = None
        self._turn = 0

    def open(self) -> int:
        """The batch on record; 0 when there is none."""
        self._fd = os.open(self._path, _FLAGS, _MODE)
        raw = os.pread(self._fd, 2 * self._SLOT.size, 0)
        marks = [self._read(raw[at : at + self._SLOT.size]) for at in (0, self._SLOT.size)]
        self._turn = int(marks[0] >= marks[1])
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
        os.pwrite(self._fd, self._SLOT.pack(batch, crc32(number)), self._turn * self._SLOT.size)
        os.fdatasync(self._fd)
        self._turn ^= 1

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class DiskSpaceGuard:
    """The free-space floor: below it the ledger takes nothing more, and runs in flight finish on
    the ballast.
    """

    def __init__(self, path: str, clock: Clock, floor: int | None, ballast: int) -> None:
        self._folder, self._clock, self._floor = os.path.dirname(path) or ".", clock, floor
        self._ballast, self._size = f"{path}.ballast", ballast
        self._asked_at = float("-inf")
        self._full: StoreFull | None = None
        self._spent = False

    def full(self) -> StoreFull | None:
        """Why the disk takes no more. Asks the file system at most once a second."""
        now = self._clock.monotonic()
        if now - self._asked_at >= 1:
            self._asked_at = now
            self._full = self._ask()
        return self._full

    def _ask(self) -> StoreFull | None:
        free, floor = self._free()
        if free >= floor:
            return None
        return StoreFull(
            f"{free >> 20} MiB free in {self._folder}, expected at least {floor >> 20} MiB; free some "
            "space",
            10.0,
            disk=True,
        )

    def check_copy(self, size: int) -> None:
        """Raises StoreFull if a copy of `size` bytes would leave less than the floor."""
        free, floor = self._free()
        if free < size + floor:
            raise StoreFull(
                f"{free >> 20} MiB free in {self._folder}, expected {(size + floor) >> 20} MiB: "
                "beside a worker a copy of the ledger is checked; free some space, or stop the "
                "server and run `eventflow doctor`",
                60.0,
                disk=True,
            )

    def _free(self) -> tuple[int, int]:
        disk = os.statvfs(self._folder)
        floor = (
            min(256 << 20, disk.f_blocks * disk.f_frsize // 50)
            if self._floor is None
            else self._floor
        )
        return disk.f_bavail * disk.f_frsize, floor

    def reserve_ballast(self) -> None:
        """Sets the ballast aside, if there is room for it twice over; it is no reason not
        to start.
        """
        free, floor = self._free()
        if not self._size or free < floor + 2 * self._size or os.path.exists(self._ballast):
            return
        fd = os.open(self._ballast, _FLAGS, _MODE)
        try:
            os.posix_fallocate(fd, 0, self._size)
        except OSError:
            os.unlink(
                self._ballast
            )  # a file system that cannot reserve space: the floor alone must do
        finally:
            os.close(fd)

    def restore_ballast(self) -> None:
        """Sets a spent ballast aside again once there is room."""
        if self._spent and self.full() is None:
            self._spent = False
            self.reserve_ballast()

    def release_ballast(self) -> bool:
        """Gives the ballast's space back, so that what is in flight can finish. False: there was
        none left.
        """
        self._asked_at, self._spent = float("-inf"), True
        try:
            os.unlink(self._ballast)
        except FileNotFoundError:
            return False
        return True
