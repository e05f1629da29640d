"""The selection of names in a landing directory, and how a name is written in JSON.

Pure functions of relative POSIX paths as bytes (a file name on Linux is bytes). tree.py calls them
during a walk, events.py for events. Globs are those of `globs.py`.
"""

import base64
import re
import unicodedata
from collections.abc import Sequence

from triggers.globs import compile_globs

IGNORED = (".*", "*.tmp", "*.part", "*.partial", "*.filepart", "*.crdownload", "*.swp", "~$*")
"""Usual names of incomplete files, and dotfiles."""


class NameFilter:
    """The selection of one `Directory`: files, directories to enter, and the marker that a file
    waits for.
    """

    def __init__(
        self, pattern: str | Sequence[str], ignore: Sequence[str], marker: str | None
    ) -> None:
        self._patterns = compile_globs([pattern] if isinstance(pattern, str) else pattern)
        self._ignore = compile_globs(ignore)
        self._marker = marker
        self._markers = compile_globs([_marker_glob(marker)] if marker else [])

    def enters(self, directory: bytes) -> bool:
        """Whether a directory is entered; assumes that its parents are."""
        return not self._ignore.fullmatch(_text(directory))

    def matches(self, path: bytes) -> bool:
        """Whether a file is data: it matches a pattern, is not ignored, and is not a marker."""
        text = _text(path)
        if self._ignore.fullmatch(text) or self._markers.fullmatch(text):
            return False
        return self._patterns.fullmatch(text) is not None

    def matches_path(self, path: bytes, *, directory: bool = False) -> bool:
        """`matches` (or `enters`, for a directory), with all its parents."""
        parts = path.split(b"/")
        parents = (b"/".join(parts[:depth]) for depth in range(1, len(parts)))
        return all(map(self.enters, parents)) and (
            self.enters(path) if directory else self.matches(path)
        )

    def markers(self, path: bytes) -> list[bytes]:
        """The possible paths of the marker that completes `path`; none without markers. More than
        one when its name has several normal forms in Unicode.
        """
        if self._marker is None:
            return []
        directory, slash, name = path.rpartition(b"/")
        stem = name.rpartition(b".")[0] or name
        marker = self._marker.encode().replace(b"{name}", name).replace(b"{stem}", stem)
        return [directory + slash + form for form in _normal_forms(marker)]

    @property
    def marker_is_per_file(self) -> bool:
        return self._marker is not None and "{" in self._marker


def _marker_glob(marker: str) -> str:
    parts = re.split(r"\{name\}|\{stem\}", marker)
    return "*".join(re.sub(r"([*?\[])", r"[\1]", part) for part in parts)


def _normal_forms(name: bytes) -> list[bytes]:
    if name.isascii():
        return [name]
    text = _text(name)
    forms = [text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)]
    return [form.encode("utf-8", "surrogateescape") for form in dict.fromkeys(forms)]


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


# --------------------------------------------------------------------------- names in JSON


def printable(path: bytes) -> str:
    """A path for people and JSON; bytes that are not UTF-8 become `\\xNN`."""
    return path.decode("utf-8", "backslashreplace")


def is_utf8(path: bytes) -> bool:
    try:
        path.decode()
    except UnicodeDecodeError:
        return False
    return True


def to_key(path: bytes) -> str:
    """A relative path as a cursor key: itself, or, when it is not UTF-8, `//` and base64. No
    relative path begins so.
    """
    return path.decode() if is_utf8(path) else "//" + base64.b64encode(path).decode()


def from_key(key: str) -> bytes:
    """The path of a key from `to_key`."""
    return base64.b64decode(key[2:]) if key.startswith("//") else key.encode()
