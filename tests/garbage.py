"""Finds the errors that a piece of work leaves to the garbage collector.

An error in a local variable of a frame that its traceback refers to, or of a caller of that frame,
is in a reference cycle: it stays, with everything in those frames, until the collector runs.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from eventflow.core.declarations import format_location

OURS = tuple(f"{Path(__file__).parent.parent / name}/" for name in ("eventflow", "triggers"))


@contextmanager
def leaving_no_error_cycles() -> Iterator[None]:
    """Fails if an error that passed through our own code is in a reference cycle afterwards."""
    gc.collect()
    gc.disable()
    try:
        yield
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found = [
            f"{type(each).__name__}({each}) {' '.join(passed)}"
            for each in gc.garbage
            if isinstance(each, BaseException) and (passed := _own_lines(each.__traceback__))
        ]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not found, "\n".join(found)


def _own_lines(step: TracebackType | None) -> list[str]:
    lines: list[str] = []
    while step is not None:
        code = step.tb_frame.f_code
        if code.co_filename.startswith(OURS):
            lines.append(f"{format_location(code.co_filename, step.tb_lineno)} {code.co_qualname}")
        step = step.tb_next
    return lines
