"""`RateLimiter`: a token bucket for each client address of an HTTP trigger.

`http_endpoint.py` calls `reserve` before it reads a body. A bucket holds BURST_SECONDS' worth of
requests and fills at the rate. It is stored as one number, the time at which it will be full: a
request moves it by 1 / rate, and is rejected while that time is more than the burst away (the
generic cell rate algorithm). A rejected request costs nothing: after the returned delay the next
one passes. IPv6 addresses count by /64, which one client usually owns; loopback is not limited,
since it may be a proxy. At most MAX_ADDRESSES are remembered.
"""

from ipaddress import IPv6Address
from operator import itemgetter

BURST_SECONDS = 5.0
"""Seconds' worth of requests that may arrive at once."""

MAX_ADDRESSES = 4096
"""Some 0.5 MB. When there are more, the half whose buckets are nearest to full is forgotten."""

MAX_ADDRESS_LENGTH = 64
"""In characters: a proxy may forward a text of the client's making as its address."""


class RateLimiter:
    """The buckets of one endpoint; `rate` in requests per second. Times are a monotonic clock's."""

    def __init__(self, rate: float) -> None:
        self.rate: float = rate
        self.rejected: int = 0  # requests
        self._interval: float = 1.0 / rate
        # Half a request of leeway: sums of 1 / rate are not exact; 5,000 must not end at 4,999.
        self._burst_interval: float = (max(1.0, rate * BURST_SECONDS) - 0.5) * self._interval
        self._full_at: dict[str | int, float] = {}

    def __len__(self) -> int:
        """The number of remembered addresses."""
        return len(self._full_at)

    def reserve(self, address: str, now: float) -> float:
        """0.0 if a request from this address may pass now, which counts it; else the seconds until
        one may.
        """
        key = bucket_key(address)
        if key is None:
            return 0.0
        full_at = max(now, self._full_at.get(key, now))
        delay = full_at - now - self._burst_interval
        if delay > 0:
            self.rejected += 1
            return delay
        if key not in self._full_at and len(self) >= MAX_ADDRESSES:
            self._forget()
        self._full_at[key] = full_at + self._interval
        return 0.0

    def _forget(self) -> None:
        """Half at once: a flood of new addresses costs few sorts. Full buckets first: they lose
        nothing.
        """
        by_fullness = sorted(self._full_at.items(), key=itemgetter(1))
        self._full_at = dict(by_fullness[MAX_ADDRESSES // 2 :])


def bucket_key(address: str) -> str | int | None:
    """The bucket of an address: its own, or for IPv6 its network's. None: not limited (loopback, a
    Unix socket).
    """
    if ":" not in address:
        return None if not address or address.startswith("127.") else address[:MAX_ADDRESS_LENGTH]
    try:
        six = IPv6Address(address)
    except ValueError:
        return address[:MAX_ADDRESS_LENGTH]
    if six.ipv4_mapped is not None:  # IPv4 on a dual-stack socket
        return bucket_key(str(six.ipv4_mapped))
    return None if six.is_loopback else int(six) >> 64
