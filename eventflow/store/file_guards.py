"""Guards of the store's file: the lock, the high-water mark, the free-space floor, the ballast.

sqlite.py and writer.py use them. Their files are beside the store: `STORE.lock`, `STORE.hwm`,
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
    """One process per store, by `flock` on a separate file: SQLite's locks on the store's file are
    lost when this process closes any handle of it.
    """

    def __init__(self, path: str) -> None:
        self._store = path
        self._path = f"{path}.lock"
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
    def is_held(self) -> bool:
        return self._fd is not None

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _release_in_forks(lock: Lock) -> None:
    """Close the handle of a forked child, which would keep the lock after its parent's death."""
    reference = weakref.ref(lock)

    def release() -> None:
        lock = reference()
        if lock is not None:
            lock.release()

    os.register_at_fork(after_in_child=release)


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
                "beside a worker a copy of the ledger is checked; free some space, or stop the "
                "server and run `eventflow doctor`",
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
