"""How fast one address may send: a token bucket each, for a trigger that serves HTTP.

`endpoint.py` asks `wait` before it reads a body. A bucket holds BURST seconds' worth of requests and fills at the rate. It is
kept as one number, the moment at which it will be full again: a request puts that off by 1 / rate, and is one too many while it
is more than the burst away (the generic cell rate algorithm). A refused request costs its sender nothing: waiting as long as it
was told always helps. IPv6 counts by /64, since whoever has one address has them all; loopback does not count, a proxy stands
there. At most MOST addresses are remembered.
"""

from ipaddress import IPv6Address
from operator import itemgetter

BURST = 5.0
"""Seconds' worth of requests that may come at once."""

MOST = 4096
"""Addresses that are remembered: some 0.5 MB. When there are more, the half whose buckets are nearest to full is forgotten."""

LONGEST = 64
"""Characters of what stands for an address: a proxy may forward a word of the sender's making."""


class Pace:
    """The buckets of one endpoint; `rate` in requests per second. Times are a monotonic clock's."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.refused = 0
        self._each = 1.0 / rate
        # Half a request of leeway: sums of 1 / rate are not exact, and a burst of 5,000 must not end at 4,999.
        self._ahead = (max(1.0, rate * BURST) - 0.5) * self._each
        self._full_at: dict[str | int, float] = {}

    def __len__(self) -> int:
        """How many addresses it remembers."""
        return len(self._full_at)

    def wait(self, address: str, now: float) -> float:
        """0.0 if a request from there may pass now, and it counts; else the seconds until one may."""
        who = known_as(address)
        if who is None:
            return 0.0
        full_at = max(now, self._full_at.get(who, now))
        over = full_at - now - self._ahead
        if over > 0:
            self.refused += 1
            return over
        if who not in self._full_at and len(self) >= MOST:
            self._forget()
        self._full_at[who] = full_at + self._each
        return 0.0

    def _forget(self) -> None:
        """Half at once: a flood of new addresses pays one sort for many of them. Full buckets go first and lose nothing."""
        self._full_at = dict(sorted(self._full_at.items(), key=itemgetter(1))[MOST // 2 :])


def known_as(address: str) -> str | int | None:
    """Whose bucket an address has: its own, or for IPv6 its network's. None: nobody's (loopback, a Unix socket)."""
    if ":" not in address:
        return None if not address or address.startswith("127.") else address[:LONGEST]
    try:
        six = IPv6Address(address)
    except ValueError:
        return address[:LONGEST]
    if six.ipv4_mapped is not None:  # how a socket that listens on both shows IPv4
        return known_as(str(six.ipv4_mapped))
    return None if six.is_loopback else int(six) >> 64
