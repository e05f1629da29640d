"""What has been synced to the disk, and what it was then: for tests of durability.

No test can cut the power. This one watches the process's own calls of fsync, which still sync.
"""

import os
import stat
from pathlib import Path

import pytest


class SyncedFiles:
    """Every file and directory of which `fsync` was called, as it was at that time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, set[str]] = {}
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._observe)

    def _observe(self, handle: int) -> None:
        self._fsync(handle)
        found = os.fstat(handle)
        path = Path(f"/proc/self/fd/{handle}")
        if stat.S_ISDIR(found.st_mode):
            self._names[found.st_ino] = set(os.listdir(path))
        else:
            self._contents[found.st_ino] = path.read_bytes()

    def has_content(self, path: Path) -> bool:
        """Whether the file's present content is durable, under whatever name it was synced."""
        return self._contents.get(path.stat().st_ino) == path.read_bytes()

    def has_name(self, path: Path) -> bool:
        """Whether the present name is durable: its directory was synced while it was there."""
        return path.name in self._names.get(path.parent.stat().st_ino, ())

    def missing(self, top: Path, *, above: Path | None = None) -> list[str]:
        """The files below `top` that a power cut would lose: their content, or a name on the way
        from `above` (or `top`) to them.
        """
        above = above or top
        lost = [
            str(path) for path in top.rglob("*") if path.is_file() and not self.has_content(path)
        ]
        for path in (top, *top.rglob("*")):
            while path != above:
                if not self.has_name(path):
                    lost.append(f"the name {path}")
                path = path.parent
        return lost
