"""From one page of a listing to the next: for the scans (listing.py) and folders (prefixes.py).

Only a page that says that it is the last one ends a listing. A page may be empty and not the last
(a store that filters, or that works through deleted keys), so the keys on it decide nothing.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

_LAST_PAGE_FIELDS = ("IsTruncated", "KeyCount", "MaxKeys", "Name")
"""Some stores leave IsTruncated out; a page without any of these is no page."""


class ListingUnfinished(Exception):
    """The store gives no way to the next page, or refuses it. The keys behind it are unknown."""


class ListingPosition:
    """Where the next page begins: `arguments` for list_objects_v2.

    By the store's continuation token, or, with `by_key`, by the last key of the page before, for
    stores whose tokens do not work.
    """

    def __init__(self, *, by_key: bool = False) -> None:
        self.arguments: dict[str, str] = {}
        self._by_key: bool = by_key
        self._seen: set[str] = set()
        self._last_key: str = ""
        self._in_order: bool = True

    def advance(self, page: Mapping[str, Any], keys: Sequence[str]) -> bool:
        """Whether there is another page, which `arguments` then names. `keys`: all of this page.

        Raises ListingUnfinished when it cannot be named or was seen before, and at the end of a
        listing by keys that were not in order: a page may then have begun behind unseen ones.
        """
        token = page.get("NextContinuationToken")
        if not page.get("IsTruncated") and not (token and "IsTruncated" not in page):
            if not self._in_order:
                raise ListingUnfinished("the store does not list its keys in their order")
            if any(field in page for field in _LAST_PAGE_FIELDS):
                return False
            raise ListingUnfinished("the store sent no page")
        if keys and (self._by_key or not token):
            self._in_order &= _are_ascending([self._last_key, *keys])
            self.arguments = {"StartAfter": keys[-1]}
        elif token:
            self.arguments = {"ContinuationToken": str(token)}
        else:
            raise ListingUnfinished("a page that is not the last has no keys and no token")
        for place in {*self.arguments.values(), *keys[-1:]}:
            if place in self._seen:
                raise ListingUnfinished(f"the listing does not move on from {place[:80]!r}")
            self._seen.add(place)
        self._last_key = keys[-1] if keys else self._last_key
        return True


def _are_ascending(keys: Sequence[str]) -> bool:
    """Whether keys are in the order of S3, that of their UTF-8 bytes, which is Python's of text."""
    return all(one < other for one, other in pairwise(keys))
