"""stdout and stderr as the commands need them: a closed or ASCII one fails no command.

root.py calls `prepare_streams` first and `flush_streams` last.
"""

import codecs
import os
import sys
from typing import Any


def is_terminal(stream: Any) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def prepare_streams() -> None:
    """Makes stdout and stderr safe to write to: a closed one becomes /dev/null, and what an ASCII
    one cannot encode is replaced. Called once, before anything is opened.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed by the caller: the next file opened must not become our output
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="eventflow-text")


def _encodable(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    plain = "".join(
        _ASCII.get(each) or each.encode("ascii", "backslashreplace").decode() for each in text
    )
    return plain, error.end


_ASCII = {"…": "...", "×": "x", "·": "-", "→": "->", "–": "-", "└": "`", "│": "|"}

codecs.register_error("eventflow-text", _encodable)


def flush_streams() -> None:
    """Writes what is buffered. Nobody reads a closed pipe: that is no error of the command."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        try:
            getattr(sys, name).flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
