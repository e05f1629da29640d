"""The store: events, runs, journals. protocol.py declares its verbs, sqlite.py implements them on
one SQLite file.

`open_store` turns a URL into a store; app.py and the command line call it.
"""

import os
from typing import Any

from eventflow.core.clock import Clock
from eventflow.core.errors import UsageError
from eventflow.store.sqlite import SqliteStore


def open_store(url: str, clock: Clock, **options: Any) -> SqliteStore:
    """The store, not yet open, that a URL names: `sqlite:///relative/path.db` or
    `sqlite:////absolute/path.db`.
    """
    scheme, mark, path = url.partition(":///")
    if scheme != "sqlite" or not mark or not path:
        raise UsageError(
            f"--store expected sqlite:///PATH (four slashes for an absolute path), found {url!r}"
        )
    if os.path.exists(path) and not os.path.isfile(path):
        found = (
            f"the folder {path}; name a file in it" if os.path.isdir(path) else f"the device {path}"
        )
        raise UsageError(f"--store expected a file, found {found}")
    return SqliteStore(path, clock=clock, **options)
