"""Which keys of a bucket are selected: prefix, suffix, globs, markers.

Pure functions of keys; queue.py asks for notifications, listing.py for listings. Globs are those of
`globs.py`, over the key without the prefix. Keys that end with a slash are the folders that
consoles create: they are never selected.
"""

import os
import re
from collections.abc import Sequence

from triggers.globs import compile_globs, normal_form


class KeyFilter:
    """The selection of one `S3`. With a folder marker (a plain name) only markers match; `is_data`
    selects their objects.
    """

    def __init__(
        self, prefix: str, suffix: str, pattern: str | Sequence[str], marker: str | None
    ) -> None:
        globs = [pattern] if isinstance(pattern, str) else list(pattern)
        self.prefix: str = prefix
        self.marker: str | None = marker
        self.marker_per_object: bool = marker is not None and "{" in marker
        self.marker_per_folder: bool = marker is not None and not self.marker_per_object
        self._suffix: str = normal_form(suffix)
        self._globs = compile_globs(globs)
        self._markers = compile_globs([_marker_glob(marker)] if marker else [])
        self.list_prefix: str = prefix + _common_prefix(globs)

    def matches(self, key: str) -> bool:
        """Whether an object with this key is an event."""
        return self._is_marker(key) if self.marker_per_folder else self.is_data(key)

    def is_data(self, key: str) -> bool:
        """Whether a key matches prefix, suffix and globs, and is neither a folder nor a marker."""
        if (
            not key.startswith(self.prefix)
            or not normal_form(key).endswith(self._suffix)
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

    def marker_for(self, key: str) -> str:
        """The marker key that completes `key`; only for markers per object."""
        assert self.marker is not None
        folder, slash, name = key.rpartition("/")
        stem = name.rpartition(".")[0] or name
        return folder + slash + self.marker.replace("{name}", name).replace("{stem}", stem)


def folder_of(key: str) -> str:
    """`a/b/` for `a/b/c`; empty at the top level."""
    return key[: key.rfind("/") + 1]


def _marker_glob(marker: str) -> str:
    parts = re.split(r"\{name\}|\{stem\}", marker)
    return "*".join(re.sub(r"([*?\[])", r"[\1]", part) for part in parts)


def _common_prefix(globs: Sequence[str]) -> str:
    """The common beginning of all keys that match the globs, for the listing's prefix."""
    if not all("/" in glob for glob in globs):
        return ""
    plain = [
        re.split(r"[*?\[]|[^\x00-\x7f]", normal_form(glob).removeprefix("/"))[0] for glob in globs
    ]
    return os.path.commonprefix(plain)  # noqa: RUF071  # a listing's prefix consists of characters
