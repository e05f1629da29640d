"""Environments of server processes with another wall clock, by libfaketime. The monotonic clock is
unchanged.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest


def _library() -> Path | None:
    return next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


needs_faketime = pytest.mark.skipif(
    _library() is None,
    reason="expected libfaketime, found none: apt-get install libfaketime",
)


def starting_at(moment: str) -> Mapping[str, str]:
    """The environment of a process whose clock starts at a UTC time (`@2026-10-24 23:59:57`), or
    has an offset from the machine's (`+0`, `-1h`, `+1y`).
    """
    return {**_preloaded(), "FAKETIME": moment}


def offset_from(file: Path) -> Mapping[str, str]:
    """The environment of a process whose clock has the offset in the file, which may change at any
    time.
    """
    return {**_preloaded(), "FAKETIME_TIMESTAMP_FILE": str(file), "FAKETIME_NO_CACHE": "1"}


def _preloaded() -> Mapping[str, str]:
    return {"LD_PRELOAD": str(_library()), "FAKETIME_DONT_FAKE_MONOTONIC": "1", "TZ": "UTC"}
