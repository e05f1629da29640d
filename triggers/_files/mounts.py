"""Whether a directory lies on a file system that others write to: inotify sees nothing of that, and inodes mean little there.

Reads /proc/self/mountinfo (see proc_pid_mountinfo(5)); where there is none, every directory counts as local.
"""

import os
import re

REMOTE = frozenset(
    "nfs nfs4 cifs smb3 smbfs 9p virtiofs fuse ceph glusterfs lustre gpfs beegfs afs ocfs2 gfs2 vboxsf vmhgfs prl_fs".split()
)
"""Types whose content changes behind this kernel's back; `fuse.*` belongs to them too (`fuseblk` is a local disk)."""

CHANGING_INODES = frozenset({"overlay"})
"""Local types on which a file's inode number may change when it is first written."""

MOUNTINFO = "/proc/self/mountinfo"


def file_system(directory: bytes, mountinfo: str = MOUNTINFO) -> str:
    """The type of the file system that `directory` is on; an empty string when that cannot be told."""
    try:
        with open(mountinfo, "rb") as lines:
            mounts = [_mount(line) for line in lines]
    except OSError:
        return ""
    real = os.path.realpath(directory)
    best, found = b"", ""
    for point, kind in mounts:
        inside = real == point or real.startswith(point.rstrip(b"/") + b"/")
        if inside and len(point) >= len(best):  # a later mount on the same point lies on top
            best, found = point, kind
    return found


def is_remote(kind: str) -> bool:
    return kind in REMOTE or kind.startswith("fuse.")


def _mount(line: bytes) -> tuple[bytes, str]:
    """`(mount point, type)` of one line: fields, ` - `, type. Blanks in the point are written as octal escapes."""
    fields, _, rest = line.partition(b" - ")
    point = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), fields.split(b" ")[4])
    return point, rest.split(b" ", 1)[0].decode()
