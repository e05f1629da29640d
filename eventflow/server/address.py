"""Where a server listens: the ready line on stdout, and the file `STORE.server`.

The line is for whoever started the server; the command line finds a running server by the file
(cli/client.py). Used by server.py.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import orjson


class PublishedAddress:
    """`path`: of the store's file. `stream`: the standard output that the server began with."""

    def __init__(self, path: str, stream: TextIO) -> None:
        self._file = Path(f"{path}.server")
        self._stream = stream

    @property
    def is_terminal(self) -> bool:
        """False too for a stream that is closed."""
        with suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def publish(self, url: str, line: str) -> None:
        """Writes the file, then the ready line."""
        fresh = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        fresh.touch(mode=0o600)
        fresh.write_bytes(orjson.dumps({"url": url, "pid": os.getpid()}))
        fresh.rename(self._file)
        with suppress(OSError, ValueError):  # stdout is closed: serving needs no reader
            self._stream.write(f"{line}\n")
            self._stream.flush()

    def remove(self) -> None:
        """Removes the file, but not that of another server, which has a new store at this path."""
        with suppress(OSError, ValueError, KeyError, TypeError):  # no such file, or not one of ours
            if orjson.loads(self._file.read_bytes())["pid"] == os.getpid():
                self._file.unlink()
