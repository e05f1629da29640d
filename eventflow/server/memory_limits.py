"""Limits for a process whose tasks leak: over the soft one no runs are begun, over the hard one the process is replaced.

server.py starts a `MemoryWatch` when `--memory-soft` or `--memory-hard` is given, and does what it asks for. A limit acts only
once memory was below it in this life: a process that begins above its limit would be replaced for ever. Read is the resident
set of this process, from /proc/self/statm, so limits need Linux; processes that tasks start are not counted.
"""

import asyncio
import gc
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from eventflow.core.clock import Clock
from eventflow.core.errors import UsageError
from eventflow.logs.log import get_logger

EVERY = 0.25
"""Seconds between two looks: a task that takes a GB per second passes its limit by 250 MB."""
BACK = 0.95
"""Of the soft limit: below this the worker goes on. The room between keeps it from going on and off with each run."""
IDLE = 5.0
"""Seconds over the soft limit with nothing at work after which waiting is vain: what leaked does not come back."""

_STATM = Path("/proc/self/statm")
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}

log = get_logger("eventflow.memory")


def parse_size(name: str, text: str) -> int:
    """`2GB`, `2G` (10⁹ each), `1.5GiB`, `512Mi` (2³⁰, 2²⁰), or plain bytes. UsageError says which option `name` is wrong."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise UsageError(f"{name} expected a size such as 2GB, 1.5GiB or 512Mi, found {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def resident() -> int:
    """Bytes of memory that this process holds now. OSError where there is no /proc."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_limits(soft: int | None, hard: int | None) -> None:
    """UsageError for limits that cannot be kept: the program alone takes more, or nobody can tell."""
    if soft is None and hard is None:
        return
    if soft is not None and hard is not None and soft >= hard:
        raise UsageError(
            f"--memory-soft expected less than --memory-hard, found {_shown(soft)} and {_shown(hard)}"
        )
    try:
        taken = resident()
    except OSError:
        raise UsageError(
            "--memory-soft and --memory-hard need Linux: expected /proc/self/statm, found none"
        ) from None
    for name, limit in (("soft", soft), ("hard", hard)):
        if limit is not None and limit <= taken:
            raise UsageError(
                f"--memory-{name} {_shown(limit)}: the program alone takes {_shown(taken)}; give it more"
            )


def _shown(size: int) -> str:
    return f"{size / 10**6:.0f}MB"


class Held(Protocol):
    """The worker, as the watch sees it: `hold_back` is called on the flows' loop."""

    @property
    def load(self) -> dict[str, int]: ...

    def hold_back(self, reason: str) -> None: ...


class MemoryWatch:
    """Looks at the process's memory until cancelled. `recycle(reason)` is called once at most, on the loop of `watch`."""

    def __init__(
        self, soft: int | None, hard: int | None, worker: Held, flows: asyncio.AbstractEventLoop, clock: Clock,
        recycle: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._limits = {"soft": soft, "hard": hard}
        self._worker, self._flows, self._clock, self._recycle = worker, flows, clock, recycle
        self._armed: set[str] = set()
        self._told = False
        self._held = False
        self._idle_since: float | None = None

    async def watch(self) -> None:
        while True:
            if self._look(resident()):
                return
            await asyncio.sleep(EVERY)

    def _look(self, taken: int) -> bool:
        """True: the process is to be replaced."""
        self._arm(taken)
        reason = self._over("hard", taken)
        if reason is None and self._held and self._is_stuck(taken):
            reason = (
                f"{_shown(taken)} are taken and nothing is at work: what leaked does not come back"
            )
        if reason is not None:
            log.error("memory.exceeded", taken=taken, **self._limits, reason=reason)
            self._recycle(f"memory: {reason}")
            return True
        if not self._held and self._over("soft", taken) is not None:
            gc.collect()  # the collector is kept calm (server.py): what it could free is no leak
            if (reason := self._over("soft", resident())) is not None:
                self._hold_back(f"short of memory: {reason}")
                log.warning("memory.short", taken=taken, **self._limits)
        elif self._held and taken < BACK * (self._limits["soft"] or 0):
            self._hold_back("")
            log.info("memory.recovered", taken=taken, **self._limits)
        return False

    def _arm(self, taken: int) -> None:
        self._armed |= {
            name for name, limit in self._limits.items() if limit is not None and taken < limit
        }
        unarmed = [
            name
            for name, limit in self._limits.items()
            if limit is not None and name not in self._armed
        ]
        if unarmed and not self._told:
            self._told = True
            log.error("memory.limit_too_low", taken=taken, **self._limits)

    def _over(self, name: str, taken: int) -> str | None:
        limit = self._limits[name]
        if limit is None or taken < limit or name not in self._armed:
            return None
        return f"{_shown(taken)} are taken, --memory-{name} is {_shown(limit)}"

    def _hold_back(self, reason: str) -> None:
        self._held, self._idle_since = bool(reason), None
        self._flows.call_soon_threadsafe(self._worker.hold_back, reason)

    def _is_stuck(self, taken: int) -> bool:
        if self._worker.load["working"]:
            self._idle_since = None
            return False
        now = self._clock.monotonic()
        self._idle_since = self._idle_since or now
        return now - self._idle_since >= IDLE and taken >= BACK * (self._limits["soft"] or 0)
