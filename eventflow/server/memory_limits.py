"""Memory limits for a process whose tasks leak: at the soft limit it starts no runs, at the hard it
restarts.

server.py starts a `MemoryMonitor` when `--memory-soft` or `--memory-hard` is given. A limit is
enforced only once memory was below it in this process: a process that starts above its limit would
restart forever. Measured is the resident set of this process, from /proc/self/statm, so limits need
Linux; child processes are not counted.
"""

import asyncio
import gc
import os
import re
from collections.abc import Callable
from pathlib import Path

from eventflow.core.clock import Clock
from eventflow.core.errors import UsageError
from eventflow.engine.worker import Worker
from eventflow.logs.log import get_logger

CHECK_INTERVAL_SECONDS = 0.25
"""Between two checks: a task that allocates 1 GB per second exceeds its limit by 250 MB."""
RESUME_FRACTION = 0.95
"""Of the soft limit: below it the worker starts runs again. The gap prevents a switch with every
run.
"""
STUCK_AFTER_SECONDS = 5.0
"""Above the soft limit with no run at work: leaked memory does not come back, so the process
restarts.
"""

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
LOG_EVENTS = {
    "memory.hard_limit_exceeded": (
        "A hard memory limit is exceeded: the server drains and re-executes itself; `reason` "
        "says why."
    ),
    "memory.limit_too_low": (
        "The process started above a memory limit; the limit applies once memory was below it."
    ),
    "memory.recovered": "Memory is below the soft limit: runs start again.",
    "memory.soft_limit_exceeded": (
        "The soft memory limit is exceeded: no runs start, events wait in the ledger."
    ),
}


def parse_size(name: str, text: str) -> int:
    """`2GB`, `2G` (10⁹ each), `1.5GiB`, `512Mi` (2³⁰, 2²⁰), or plain bytes. UsageError says which
    option `name` is wrong.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise UsageError(f"{name} expected a size such as 2GB, 1.5GiB or 512Mi, found {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def resident() -> int:
    """Resident bytes of this process. OSError where there is no /proc."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_limits(soft: int | None, hard: int | None) -> None:
    """UsageError for limits that cannot be enforced: the program alone takes more, or there is no
    /proc.
    """
    if soft is None and hard is None:
        return
    if soft is not None and hard is not None and soft >= hard:
        raise UsageError(
            "--memory-soft expected less than --memory-hard,"
            f" found {_megabytes(soft)} and {_megabytes(hard)}"
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
                f"--memory-{name} {_megabytes(limit)}: the program alone takes {_megabytes(taken)};"
                " give it more"
            )


def _megabytes(size: int) -> str:
    return f"{size / 10**6:.0f}MB"


class MemoryMonitor:
    """Checks the process's memory until cancelled.

    `soft`, `hard`: limits in bytes. The worker is paused through `flow_loop`, where it lives.
    `restart(reason)` is called at most once, on the loop of `run`.
    """

    def __init__(
        self,
        soft: int | None,
        hard: int | None,
        worker: Worker,
        flow_loop: asyncio.AbstractEventLoop,
        clock: Clock,
        restart: Callable[[str], None],
    ) -> None:
        self._limits: dict[str, int | None] = {"soft": soft, "hard": hard}
        self._worker = worker
        self._flow_loop = flow_loop
        self._clock = clock
        self._restart = restart
        self._armed: set[str] = set()  # limits that memory was below once
        self._low_limit_logged: bool = False
        self._paused: bool = False
        self._idle_since: float | None = None

    async def run(self) -> None:
        while True:
            if self._check(resident()):
                return
            await asyncio.sleep(CHECK_INTERVAL_SECONDS)

    def _check(self, size: int) -> bool:
        """Whether the process has to restart. `size`: resident bytes."""
        self._arm(size)
        reason = self._excess("hard", size)
        if reason is None and self._paused and self._is_stuck(size):
            reason = (
                f"{_megabytes(size)} are taken and nothing is at work:"
                " what leaked does not come back"
            )
        if reason is not None:
            log.error("memory.hard_limit_exceeded", resident=size, **self._limits, reason=reason)
            self._restart(f"memory: {reason}")
            return True
        if not self._paused and self._excess("soft", size) is not None:
            gc.collect()  # it runs rarely (server.py): what it can free is no leak
            if (reason := self._excess("soft", resident())) is not None:
                self._set_pause(f"short of memory: {reason}")
                log.warning("memory.soft_limit_exceeded", resident=size, **self._limits)
        elif self._paused and size < RESUME_FRACTION * (self._limits["soft"] or 0):
            self._set_pause("")
            log.info("memory.recovered", resident=size, **self._limits)
        return False

    def _arm(self, size: int) -> None:
        limits = {name: limit for name, limit in self._limits.items() if limit is not None}
        self._armed |= {name for name, limit in limits.items() if size < limit}
        if limits.keys() - self._armed and not self._low_limit_logged:
            self._low_limit_logged = True
            log.error("memory.limit_too_low", resident=size, **self._limits)

    def _excess(self, name: str, size: int) -> str | None:
        limit = self._limits[name]
        if limit is None or size < limit or name not in self._armed:
            return None
        return f"{_megabytes(size)} are taken, --memory-{name} is {_megabytes(limit)}"

    def _set_pause(self, reason: str) -> None:
        self._paused = bool(reason)
        self._idle_since = None
        self._flow_loop.call_soon_threadsafe(self._worker.set_pause_reason, reason)

    def _is_stuck(self, size: int) -> bool:
        if self._worker.load["working"]:
            self._idle_since = None
            return False
        now = self._clock.monotonic()
        self._idle_since = self._idle_since or now
        is_above = size >= RESUME_FRACTION * (self._limits["soft"] or 0)
        return is_above and now - self._idle_since >= STUCK_AFTER_SECONDS
