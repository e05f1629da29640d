"""What the runs of a soak must have noted, against what they did.

traffic.py adds each ident before it sends it; app.py writes a line `KIND IDENT` for each run. The
ledger cannot be asked: it forgets within seconds.
"""

import itertools
from collections import Counter
from pathlib import Path

SCHEDULES = {"every": 1, "cron": 2}
"""Seconds between two occurrences, by the name of the schedule."""
OF_THE_APP = ("drift", "failed", "late", "at", "pools", *SCHEDULES)
"""Kinds of notes that nobody sent."""


class Account:
    """`expected`: how often each kind and ident is to be noted. `cancelled`: naps that were."""

    def __init__(self) -> None:
        self.expected: Counter[tuple[str, str]] = Counter()
        self.cancelled = 0

    def expect(self, ident: str, *kinds: str, times: int = 1) -> None:
        for kind in kinds:
            self.expected[kind, ident] += times

    def number_of(self, kind: str) -> int:
        return sum(times for (each, _), times in self.expected.items() if each == kind)

    def compare(self, effects: Path) -> list[str]:
        """What is lost, doubled or made up, one sentence each."""
        lines = effects.read_text().splitlines()
        found = Counter((kind, ident) for kind, ident in (line.split(" ", 1) for line in lines))
        wrong = [
            f"{kind} {ident}: {found[kind, ident]} times, expected {times}"
            for (kind, ident), times in self.expected.items()
            if found[kind, ident] != times
        ]
        own = {each: times for each, times in found.items() if each not in self.expected}
        wrong += [f"nobody sent {kind} {ident}" for kind, ident in own if kind not in OF_THE_APP]
        return wrong + self._compare_own(own)

    def _compare_own(self, own: dict[tuple[str, str], int]) -> list[str]:
        """Of the notes that nobody sent: each once, none missing."""
        wrong = [
            f"{kind} {ident}: {n} times, expected 1" for (kind, ident), n in own.items() if n > 1
        ]
        numbers = Counter(kind for kind, _ in own)
        expected = {"at": 1, "pools": 1, "failed": self.number_of("fail"), "late": self.cancelled}
        wrong += [
            f"{numbers[kind]} notes of {kind}, expected {number}"
            for kind, number in expected.items()
            if numbers[kind] != number
        ]
        for name, seconds in SCHEDULES.items():
            times = sorted(int(ident) for kind, ident in own if kind == name)
            wrong += [
                f"schedule {name}: from {a} to {b}, expected {seconds} s"
                for a, b in itertools.pairwise(times)
                if b - a != seconds
            ]
        missing = [kind for kind in OF_THE_APP if kind not in expected and not numbers[kind]]
        return wrong + [f"no run noted {kind}" for kind in missing]
