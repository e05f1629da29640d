"""The file system type of a directory. On a remote one, inotify sees nothing and inodes may change.

Reads /proc/self/mountinfo (see proc_pid_mountinfo(5)); where it does not exist, every directory
counts as local.
"""

import os
import re

REMOTE = frozenset(
    (
        "nfs nfs4 cifs smb3 smbfs 9p virtiofs fuse ceph glusterfs lustre gpfs beegfs afs ocfs2 "
        "gfs2 vboxsf vmhgfs prl_fs"
    ).split()
)
"""Types whose files change without this kernel; `fuse.*` too (but `fuseblk` is a local disk)."""

CHANGING_INODES = frozenset({"overlay"})
"""Local types where the inode number of a file may change at its first write."""

MOUNTINFO = "/proc/self/mountinfo"


def file_system(directory: bytes, mountinfo: str = MOUNTINFO) -> str:
    """The file system type of `directory`; empty when it is unknown."""
    try:
        with open(mountinfo, "rb") as lines:
            mounts = [_mount(line) for line in lines]
    except OSError:  # not Linux
        return ""
    real = os.path.realpath(directory)
    best = b""
    found = ""
    for point, kind in mounts:
        inside = real == point or real.startswith(point.rstrip(b"/") + b"/")
        if inside and len(point) >= len(best):  # a later mount at the same point hides the earlier
            best = point
            found = kind
    return found


def is_remote(kind: str) -> bool:
    return kind in REMOTE or kind.startswith("fuse.")


def _mount(line: bytes) -> tuple[bytes, str]:
    """`(mount point, type)` of a line: fields, ` - `, type. Spaces are octal escapes."""
    fields, _, rest = line.partition(b" - ")
    point = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), fields.split(b" ")[4])
    return point, rest.split(b" ", 1)[0].decode()
