"""Hashes of large values, one per object.

A flow may pass one large object to many calls. Its JSON takes some milliseconds per megabyte, on
the loop of all flows, so it is made once: loop/scopes.py (names of tasks) and
serialization/codecs.py (fingerprints) each keep a `LargeValues` per run.
"""

from collections.abc import Iterable
from typing import Any

MIN_LARGE_BYTES = 1 << 16
"""Of its JSON: a smaller value is hashed again."""
MAX_KEPT = 32
"""Objects kept; the one kept first goes first."""


class LargeValues(dict[int, tuple[Any, bytes]]):
    """What was computed from a large object, by the object itself.

    An object that was changed since keeps its first hash. It does so in a replay, too: the flow
    passes the same objects in the same order.
    """

    def has_any(self, values: Iterable[Any]) -> bool:
        return bool(self) and any(id(value) in self for value in values)

    def find(self, value: Any) -> bytes | None:
        found = self.get(id(value))
        return None if found is None else found[1]

    def add(self, value: Any, digest: bytes) -> None:
        """Keeps a reference to the object, so that its id stays its own."""
        if len(self) >= MAX_KEPT:
            del self[next(iter(self))]
        self[id(value)] = (value, digest)
