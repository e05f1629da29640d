"""Which keys of a bucket count: prefix, suffix, globs, markers.

Pure questions on keys; queue.py asks them of notices, sweep.py of listings. Globs are those of `globs.py`, over the key without
the prefix. Keys that end with a slash are the folders that consoles draw, not objects, and never count.
"""

import os
import re
from collections.abc import Sequence

from triggers.globs import compile_globs


class Selection:
    """What one `S3` takes. With a folder marker (a plain name) only markers count; `holds` then says what they complete."""

    def __init__(
        self, prefix: str, suffix: str, pattern: str | Sequence[str], marker: str | None
    ) -> None:
        globs = [pattern] if isinstance(pattern, str) else list(pattern)
        self.prefix, self.marker = prefix, marker
        self.per_object = marker is not None and "{" in marker
        self.per_folder = marker is not None and not self.per_object
        self._suffix = suffix
        self._globs = compile_globs(globs)
        self._markers = compile_globs([_marker_glob(marker)] if marker else [])
        self.listed = prefix + _literal(globs)

    def wants(self, key: str) -> bool:
        """Whether an object of this key is an event."""
        return self._is_marker(key) if self.per_folder else self.holds(key)

    def holds(self, key: str) -> bool:
        """Whether a key is data: below the prefix, taken by suffix and globs, no folder, and no marker itself."""
        if (
            not key.startswith(self.prefix)
            or not key.endswith(self._suffix)
            or key.endswith("/")
            or self._is_marker(key)
        ):
            return False
        return self._globs.fullmatch(key[len(self.prefix) :]) is not None

    def _is_marker(self, key: str) -> bool:
        return (
            key.startswith(self.prefix)
            and self._markers.fullmatch(key[len(self.prefix) :]) is not None
        )

    def marker_of(self, key: str) -> str:
        """The key that says `key` is complete; only for markers per object."""
        assert self.marker is not None
        folder, slash, name = key.rpartition("/")
        stem = name.rpartition(".")[0] or name
        return folder + slash + self.marker.replace("{name}", name).replace("{stem}", stem)


def folder_of(key: str) -> str:
    """`a/b/` of `a/b/c`; nothing at the top."""
    return key[: key.rfind("/") + 1]


def _marker_glob(marker: str) -> str:
    parts = re.split(r"\{name\}|\{stem\}", marker)
    return "*".join(re.sub(r"([*?\[])", r"[\1]", part) for part in parts)


def _literal(globs: Sequence[str]) -> str:
    """What every key that the globs take begins with, so that a listing need not begin before it."""
    if not all("/" in glob for glob in globs):
        return ""
    plain = [re.split(r"[*?\[]", glob.removeprefix("/"))[0] for glob in globs]
    return os.path.commonprefix(plain)  # noqa: RUF071  # characters are what a listing's prefix is made of
