"""Which names in a landing directory count: globs, ignore patterns, markers, and how a name is written in JSON.

Pure questions on relative POSIX paths as bytes (a file name on Linux is bytes); `tree.py` asks them while it walks,
`landing.py` when it makes an event. Globs are those of `globs.py`.
"""

import base64
import re
from collections.abc import Sequence

from triggers.globs import compile_globs

IGNORED = (".*", "*.tmp", "*.part", "*.partial", "*.filepart", "*.crdownload", "*.swp", "~$*")
"""What writers call a file that is not complete yet, and names that are nobody's data."""


class Names:
    """The selection of one `Directory`: what it takes, what it enters, and the marker a file waits for."""

    def __init__(
        self, pattern: str | Sequence[str], ignore: Sequence[str], marker: str | None
    ) -> None:
        self._take = compile_globs([pattern] if isinstance(pattern, str) else pattern)
        self._ignore = compile_globs(ignore)
        self._marker = marker
        self._markers = compile_globs([_marker_glob(marker)] if marker else [])

    def enters(self, directory: bytes) -> bool:
        """Whether a directory is walked into; its parents are taken to have been asked."""
        return not self._ignore.fullmatch(_text(directory))

    def wants(self, path: bytes) -> bool:
        """Whether a file is data: taken by a pattern, not ignored, not itself a marker."""
        text = _text(path)
        if self._ignore.fullmatch(text) or self._markers.fullmatch(text):
            return False
        return self._take.fullmatch(text) is not None

    def admits(self, path: bytes, *, directory: bool = False) -> bool:
        """`wants` (or `enters`) for a path whose parents nobody has asked about yet."""
        parts = path.split(b"/")
        parents = (b"/".join(parts[:depth]) for depth in range(1, len(parts)))
        return all(map(self.enters, parents)) and (
            self.enters(path) if directory else self.wants(path)
        )

    def marker(self, path: bytes) -> bytes | None:
        """The path of the marker that says `path` is complete, or None when none is asked for."""
        if self._marker is None:
            return None
        directory, slash, name = path.rpartition(b"/")
        stem = name.rpartition(b".")[0] or name
        return (
            directory
            + slash
            + self._marker.encode().replace(b"{name}", name).replace(b"{stem}", stem)
        )

    @property
    def marker_is_per_file(self) -> bool:
        return self._marker is not None and "{" in self._marker


def _marker_glob(marker: str) -> str:
    parts = re.split(r"\{name\}|\{stem\}", marker)
    return "*".join(re.sub(r"([*?\[])", r"[\1]", part) for part in parts)


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


# --------------------------------------------------------------------------- names in JSON


def printable(path: bytes) -> str:
    """A path for people and JSON; bytes that are not UTF-8 show as `\\xNN`."""
    return path.decode("utf-8", "backslashreplace")


def is_utf8(path: bytes) -> bool:
    try:
        path.decode()
    except UnicodeDecodeError:
        return False
    return True


def to_key(path: bytes) -> str:
    """A relative path as a cursor key: itself, or, when it is not UTF-8, `//` (no relative path begins so) and base64."""
    return path.decode() if is_utf8(path) else "//" + base64.b64encode(path).decode()


def from_key(key: str) -> bytes:
    """The path that `to_key` wrote."""
    return base64.b64decode(key[2:]) if key.startswith("//") else key.encode()
