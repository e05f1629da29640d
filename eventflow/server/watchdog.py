"""The watchdog: a thread that notices when a loop or thread of the server ends or does not respond.

server.py starts one. A blocked flow loop does not stop intake or HTTP, but it stops every other
run; the log line shows which function belongs into a plain `def` task, which runs in a thread. Per
episode one warning after a second and one error after ten: then `/readyz` answers 503 with the
reason. If one has ended, or does not respond for `stall_timeout` seconds, the process ends with
exit code 70, so that a supervisor restarts it. Code that holds the GIL for long (some C extensions)
stops this thread too. Time in which the whole process was stopped does not count.
"""

import asyncio
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Protocol

from eventflow.core.clock import Clock
from eventflow.engine.attempts import Attempts
from eventflow.engine.execution import Execution
from eventflow.engine.worker import Worker
from eventflow.logs.log import get_logger
from eventflow.store.sqlite import SqliteStore

CHECK_INTERVAL_SECONDS = 0.25
WARN_AFTER_SECONDS = 1.0
ERROR_AFTER_SECONDS = 10.0
"""Without a turn of the loop."""


class Parts(Protocol):
    """What is watched besides loops; `Runtime` implements it."""

    @property
    def store(self) -> SqliteStore: ...

    @property
    def worker(self) -> Worker: ...

    def dead_part(self) -> str: ...


log = get_logger("eventflow.watchdog")
LOG_EVENTS = {
    "loop.blocked": "Code blocked an event loop for a second or more; `stack` shows where.",
}

_OURS = str(Path(__file__).parent.parent)


@cache
def _libraries() -> tuple[str, ...]:
    """The folders of Python's modules and of installed packages."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return tuple({sysconfig.get_path(name) for name in names})


class LoopProbe:
    """A loop, the ident of its thread, and when it last ran a callback."""

    def __init__(self, loop: asyncio.AbstractEventLoop, thread: int) -> None:
        self.loop = loop
        self.thread = thread
        self.last_turn_at: float = 0.0
        self.is_pending: bool = False  # a callback of ours waits on the loop
        self.logged_level: int = 0  # of this episode: 1 warning, 2 error


class Watchdog:
    """`start` it, and `stop` it before the loops are closed. `loops`: name → loop and ident of its
    thread. `threads`: further ones, by what they do, and whether they live. `on_fault(reason)` is
    called once, in the watchdog's thread.
    """

    def __init__(
        self,
        loops: Mapping[str, tuple[asyncio.AbstractEventLoop, int]],
        clock: Clock,
        parts: Parts,
        threads: Mapping[str, Callable[[], bool]],
        stall_timeout: float,
        on_fault: Callable[[str], None],
    ) -> None:
        self._clock = clock
        self._parts = parts
        self._threads = threads
        self._stall_timeout = stall_timeout
        self._on_fault = on_fault
        self._blocked_since: float | None = None  # all threads of plain bodies
        self._transaction: float | None = None  # when the current one began, by the clock
        self._transaction_since: float = 0.0
        self._probes = {name: LoopProbe(loop, thread) for name, (loop, thread) in loops.items()}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="eventflow-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def _run(self) -> None:
        try:
            self._watch()
        except BaseException as error:  # who watches the watchdog
            self._on_fault(f"the watchdog has ended: {error!r}")

    def _watch(self) -> None:
        now = 0.0  # seconds in which the process ran, since the start
        last = self._clock.monotonic()
        while not self._stopping.wait(CHECK_INTERVAL_SECONDS):
            passed = self._clock.monotonic() - last
            last += passed
            # Much longer than requested: the whole process was stopped (SIGSTOP, a suspended
            # machine), which is no fault of a loop or thread.
            is_late = passed > CHECK_INTERVAL_SECONDS + WARN_AFTER_SECONDS / 2
            now += CHECK_INTERVAL_SECONDS if is_late else passed
            for name, probe in self._probes.items():
                self._check(name, probe, now)
            fault = self._dead_thread() or self._parts.dead_part() or self._stall(now)
            if fault and not self._stopping.is_set():
                self._on_fault(fault)
                return

    def _dead_thread(self) -> str:
        for name, is_alive in self._threads.items():
            if not is_alive():
                return f"the thread of {name} has ended"
        return ""

    def _stall(self, now: float) -> str:
        """Which loop or thread did not respond for too long; empty: none. Sets
        `Worker.stall_reason` before that.
        """
        parts = self._parts
        since: dict[str, float] = {
            name: probe.last_turn_at for name, probe in self._probes.items() if probe.is_pending
        }
        if (began := parts.store.busy_since) != self._transaction:
            self._transaction = began
            self._transaction_since = now
        if began is not None:
            since["the store's writer waits for its disk"] = self._transaction_since
        if not parts.worker.threads.is_blocked:
            self._blocked_since = None
        else:
            self._blocked_since = self._blocked_since or now
            since["plain task bodies that do not return use all threads"] = self._blocked_since
        reason = ""
        for what, began in since.items():
            if now - began >= ERROR_AFTER_SECONDS:
                if (probe := self._probes.get(what)) is not None:
                    what = f"the {what} loop is blocked by {locate(probe.thread)['stack']}"
                reason = f"{what}, for {now - began:.0f} s"
                if now - began >= self._stall_timeout:
                    return reason
        parts.worker.stall_reason = reason
        return ""

    def _check(self, name: str, probe: LoopProbe, now: float) -> None:
        if not probe.is_pending:
            probe.last_turn_at = now
            probe.is_pending = True
            probe.logged_level = 0
            try:
                probe.loop.call_soon_threadsafe(self._on_turn, probe)
            except RuntimeError:  # that loop is closed: the process ends
                self._stopping.set()
            return
        blocked_for = now - probe.last_turn_at
        if blocked_for >= ERROR_AFTER_SECONDS and probe.logged_level < 2:
            probe.logged_level = 2
            log.error(
                "loop.blocked", loop=name, seconds=round(blocked_for, 1), **locate(probe.thread)
            )
        elif blocked_for >= WARN_AFTER_SECONDS and probe.logged_level < 1:
            probe.logged_level = 1
            log.warning(
                "loop.blocked",
                loop=name,
                seconds=round(blocked_for, 1),
                hint="all work on this loop waits; make it a plain `def` task, or await",
                **locate(probe.thread),
            )

    @staticmethod
    def _on_turn(probe: LoopProbe) -> None:
        probe.is_pending = False


def locate(thread: int) -> dict[str, str]:
    """Where a thread is: `stack` (`file:line function`, the innermost line of user code), and its
    `run` and `flow` if known.
    """
    frames = list(_frames(sys._current_frames().get(thread)))  # pyright: ignore[reportPrivateUsage]
    if not frames:
        return {"stack": "unknown"}
    user = next((frame for frame in frames if not _is_library(frame)), frames[0])
    location = {"stack": f"{user.f_code.co_filename}:{user.f_lineno} {user.f_code.co_qualname}"}
    for frame in frames:
        known = frame.f_locals if frame.f_code.co_filename.startswith(_OURS) else {}
        owner = known.get("self")
        if isinstance(owner, Execution | Attempts):  # of the flow's steps; of a task body's
            return {**location, "run": owner.run_id, "flow": owner.run.flow}
    return location


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and its callers, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_library(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return name.startswith((_OURS, *_libraries(), "<frozen"))
