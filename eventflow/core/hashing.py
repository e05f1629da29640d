"""Digests of lists of byte strings, for event identities and fingerprints.

Called for every event by routing/router.py and by serialization/codecs.py.
"""

from functools import lru_cache
from hashlib import blake2b
from struct import Struct

_size = Struct(">Q").pack


def digest(*parts: bytes, size: int = 16) -> bytes:
    """blake2b over the length-prefixed parts, so that `(a, bc)` and `(ab, c)` differ."""
    return blake2b(b"".join([_size(len(part)) + part for part in parts]), digest_size=size).digest()


def digest_text(first: tuple[str, ...], last: bytes, size: int = 16) -> bytes:
    """`digest` of the texts `first`, which many calls share and which are cached, and of `last`."""
    return blake2b(_sized(first) + _size(len(last)) + last, digest_size=size).digest()


@lru_cache(maxsize=4096)
def _sized(texts: tuple[str, ...]) -> bytes:
    return b"".join([_size(len(part)) + part for part in map(str.encode, texts)])
