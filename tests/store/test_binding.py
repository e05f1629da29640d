"""Values bound to statements: what the store registers with Python's sqlite3 changes nothing for
the program's own connections, whatever the version of Python.
"""

import json
import subprocess
import sys
from typing import Any

_PROGRAM = """
import json
import sqlite3
import sys

class Text(bytes):
    pass

class Point:
    def __conform__(self, protocol):
        return "1;2"

class Date:
    pass

sqlite3.register_adapter(Date, lambda date: "today")
if "own" in sys.argv:
    sqlite3.register_adapter(bytes, bytes.hex)
    sqlite3.register_adapter(type(None), lambda none: "none")
if "store" in sys.argv:
    from eventflow.store.rows import skip_adapters
    skip_adapters()
    skip_adapters()
if "later" in sys.argv:
    sqlite3.register_adapter(bytes, bytes.hex)
connection = sqlite3.connect(":memory:")
values = (
    None, b"", b"a" * 9, bytearray(b"b"), memoryview(b"c"), Text(b"d"), "e", 1, 2.5, True, Point(),
    Date(),
)
row = connection.execute("SELECT " + ",".join("?" * len(values)), values).fetchone()
types = connection.execute("SELECT " + ",".join(["typeof(?)"] * len(values)), values).fetchone()
try:
    connection.execute("SELECT ?", (object(),))
except sqlite3.Error as error:
    refused = f"{type(error).__name__}: {error}"
print(json.dumps([repr(row), types, refused]))
"""


def bound(*options: str) -> Any:
    """The values as SQLite gets them, in a fresh interpreter."""
    command = [sys.executable, "-W", "error", "-c", _PROGRAM, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return json.loads(done.stdout)


def test_the_programs_own_connections_bind_as_before():
    """Values, types and refusals are the same with and without the adapters of the store."""
    assert bound("store") == bound()


def test_the_programs_own_adapters_stay():
    """An adapter for bytes or None that the program registers, earlier or later, is the one that
    counts.
    """
    assert bound("own", "store") == bound("own")
    assert bound("store", "later") == bound("later")
    assert bound("own") != bound() != bound("later")
