"""Digests of lists of byte strings, for event identities and fingerprints.

Called for every event by routing/router.py and by serialization/codecs.py.
"""

import hashlib
from functools import lru_cache


def digest(*parts: bytes, size: int = 16) -> bytes:
    """blake2b over the length-prefixed parts, so that `(a, bc)` and `(ab, c)` differ."""
    return hashlib.blake2b(
        b"".join([len(part).to_bytes(8, "big") + part for part in parts]), digest_size=size
    ).digest()


def digest_text(first: tuple[str, ...], last: bytes, size: int = 16) -> bytes:
    """`digest` of the texts `first`, which many calls share and which are cached, and of `last`."""
    data = b"%b%b%b" % (_sized(first), len(last).to_bytes(8, "big"), last)
    return hashlib.blake2b(data, digest_size=size).digest()


@lru_cache(maxsize=4096)
def _sized(texts: tuple[str, ...]) -> bytes:
    return b"".join([len(part).to_bytes(8, "big") + part for part in map(str.encode, texts)])
