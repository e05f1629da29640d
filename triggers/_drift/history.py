"""The last evaluated windows, in the monitor's cursor; dry_run.py tries other thresholds on them.

evaluator.py adds each window that it evaluates, in the commit that closes it. One part of the
cursor for each; the oldest is deleted. Statistics only: some 50 bytes for each feature, whatever
the number of rows. Windows of other features, references or lengths stay until they are the oldest.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from eventflow.events.event import Json
from triggers._drift.window import EvaluatedWindow

KEY_PREFIX = "drift:h/"


class History:
    """The numbers of the stored windows, and the changes since the last commit."""

    def __init__(self, limit: int, parts: Mapping[str, Any]) -> None:
        self._limit = limit
        self._numbers = deque(_numbers(parts))
        self._changed: dict[str, Json] = {}

    def add(self, window: EvaluatedWindow) -> None:
        if not self._limit:
            return
        number = self._numbers[-1] + 1 if self._numbers else 0
        self._numbers.append(number)
        self._changed[f"{KEY_PREFIX}{number}"] = msgspec.to_builtins(window)
        while len(self._numbers) > self._limit:
            self._changed[f"{KEY_PREFIX}{self._numbers.popleft()}"] = None

    def changes(self) -> Iterator[tuple[str, Json]]:
        yield from self._changed.items()
        self._changed = {}


def stored_windows(parts: Mapping[str, Any], by: str) -> list[EvaluatedWindow]:
    """The windows in the cursor that have this `measurement_hash`, in order."""
    stored = [
        msgspec.convert(parts[f"{KEY_PREFIX}{number}"], EvaluatedWindow)
        for number in _numbers(parts)
    ]
    return [each for each in stored if each.by == by]


def _numbers(parts: Mapping[str, Any]) -> list[int]:
    return sorted(int(key.removeprefix(KEY_PREFIX)) for key in parts if key.startswith(KEY_PREFIX))
