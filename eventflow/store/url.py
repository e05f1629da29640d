"""The store that a URL names. runtime.py, hosting.py, the server and the command line call it."""

import os
from typing import Any

from eventflow.core.clock import Clock
from eventflow.core.errors import UsageError
from eventflow.store.sqlite import SqliteStore

_PREFIX = "sqlite:///"
_REFUSED = frozenset(("?", "#", "\x7f", *map(chr, range(0x20))))


def open_store(url: str, clock: Clock, *, read_only: bool = False, **options: Any) -> SqliteStore:
    """The store, not yet open, that a URL names: `sqlite:///relative/path.db` or
    `sqlite:////absolute/path.db`. `read_only`: without the lock, beside the process that has it.

    The path is taken as it is, without decoding. Refused is what other programs give a meaning in
    such a URL: it would silently be another file.
    """
    path = url.removeprefix(_PREFIX)
    if path in ("", url):
        raise UsageError(
            f"--store expected sqlite:///PATH (four slashes for an absolute path), found {url!r}"
        )
    if path.startswith(("~", ":")) or path != path.strip() or not _REFUSED.isdisjoint(path):
        raise UsageError(
            "--store expected the path of a file, without options (?…), ~, :memory:, and control"
            f" characters, found {url!r}"
        )
    if path.endswith("/"):
        raise UsageError(f"--store expected a file, found the folder {path}; name a file in it")
    if os.path.exists(path) and not os.path.isfile(path):
        found = (
            f"the folder {path}; name a file in it" if os.path.isdir(path) else f"the device {path}"
        )
        raise UsageError(f"--store expected a file, found {found}")
    if read_only:
        from eventflow.store.read_only import ReadOnlyStore  # only the command line uses it

        return ReadOnlyStore(path, clock=clock, **options)
    return SqliteStore(path, clock=clock, **options)
