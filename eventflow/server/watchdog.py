"""Who keeps a loop from turning: a thread that notices within a second and logs the line of user code that does it.

server.py starts one over the loop of the way in and the loop of flows. A blocked flow loop does not stop intake or HTTP, but
it stops every other run; the log line says which function to move into a plain `def` task, which runs in a thread. Once per
episode a warning, after ten seconds an error. Code that holds the interpreter lock for long (some C extensions) stops this
thread too.
"""

import asyncio
import sys
import sysconfig
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

from eventflow.core.clock import Clock
from eventflow.engine.execution import Execution
from eventflow.logs.log import get_logger

EVERY = 0.25
WARN, ALARM = 1.0, 10.0
"""Seconds without a turn."""

log = get_logger("eventflow.watchdog")

_OURS = str(Path(__file__).parent.parent)
_LIBRARIES = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


class Watched:
    """A loop, its thread, and when it last turned."""

    def __init__(self, loop: asyncio.AbstractEventLoop, thread: int, now: float) -> None:
        self.loop, self.thread = loop, thread
        self.turned, self.asked = now, False
        self.told = 0


class Watchdog:
    """`start`, and `stop` before the loops are closed. `loops` maps a name to a loop and the ident of its thread."""

    def __init__(
        self, loops: Mapping[str, tuple[asyncio.AbstractEventLoop, int]], clock: Clock
    ) -> None:
        self._clock = clock
        now = clock.monotonic()
        self._watched = {name: Watched(loop, thread, now) for name, (loop, thread) in loops.items()}
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
        last = self._clock.monotonic()
        while not self._stopping.wait(EVERY):
            now = self._clock.monotonic()
            paused = (
                now - last - EVERY
            )  # the whole process stood still (SIGSTOP, a suspended machine): nobody's fault
            for name, watched in self._watched.items():
                if paused > WARN / 2:
                    watched.turned += paused
                self._look(name, watched, now)
            last = now

    def _look(self, name: str, watched: Watched, now: float) -> None:
        if not watched.asked:
            watched.turned, watched.asked, watched.told = now, True, 0
            try:
                watched.loop.call_soon_threadsafe(self._turned, watched)
            except RuntimeError:  # that loop is closed; the process is on its way out
                self._stopping.set()
            return
        still = now - watched.turned
        if still >= ALARM and watched.told < 2:
            watched.told = 2
            log.error("loop.blocked", loop=name, seconds=round(still, 1), **blame(watched.thread))
        elif still >= WARN and watched.told < 1:
            watched.told = 1
            log.warning("loop.blocked", loop=name, seconds=round(still, 1), **blame(watched.thread))

    @staticmethod
    def _turned(watched: Watched) -> None:
        watched.asked = False


def blame(thread: int) -> dict[str, str]:
    """Where a thread is: `stack` (file:line function, the innermost line of user code), and `run` and `flow` where known."""
    frames = list(_frames(sys._current_frames().get(thread)))  # pyright: ignore[reportPrivateUsage]
    if not frames:
        return {"stack": "unknown"}
    user = next((frame for frame in frames if not _library(frame)), frames[0])
    blamed = {"stack": f"{user.f_code.co_filename}:{user.f_lineno} {user.f_code.co_qualname}"}
    for frame in frames:
        known = frame.f_locals if frame.f_code.co_filename.startswith(_OURS) else {}
        for owner in (known.get("self"), known.get("host")):  # of the flow's steps; of an attempt's
            if isinstance(owner, Execution):
                return {**blamed, "run": owner.name, "flow": owner.flow.name}
    return blamed


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """From the innermost outwards."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _library(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return name.startswith((_OURS, *_LIBRARIES, "<frozen"))
