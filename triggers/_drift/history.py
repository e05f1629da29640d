"""The last judged windows, in the monitor's cursor: what other thresholds can be tried on (foresight.py).

The engine adds each window it judges, with the commit that closes it; one part each, the oldest goes. Statistics only: some 50
bytes for each feature, whatever the rows. What was measured by other features, references or windows stays until its turn.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from eventflow.events.event import Json
from triggers._drift.window import Judged

KEY = "drift:h/"


class History:
    """Which numbers there are, and what is new."""

    def __init__(self, limit: int, parts: Mapping[str, Any]) -> None:
        self._limit = limit
        self._numbers = deque(_numbers(parts))
        self._changed: dict[str, Json] = {}

    def add(self, judged: Judged) -> None:
        if not self._limit:
            return
        number = self._numbers[-1] + 1 if self._numbers else 0
        self._numbers.append(number)
        self._changed[f"{KEY}{number}"] = msgspec.to_builtins(judged)
        while len(self._numbers) > self._limit:
            self._changed[f"{KEY}{self._numbers.popleft()}"] = None

    def changes(self) -> Iterator[tuple[str, Json]]:
        yield from self._changed.items()
        self._changed = {}


def recall(parts: Mapping[str, Any], by: str) -> list[Judged]:
    """The windows that are kept and were measured by the same, in order."""
    kept = [msgspec.convert(parts[f"{KEY}{number}"], Judged) for number in _numbers(parts)]
    return [each for each in kept if each.by == by]


def _numbers(parts: Mapping[str, Any]) -> list[int]:
    return sorted(int(key.removeprefix(KEY)) for key in parts if key.startswith(KEY))
