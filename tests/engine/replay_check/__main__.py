"""Two processes of the crash test: `record FIRST COUNT FILE` plays seeds and writes their journals; `replay FILE` resumes each
from a seeded crash and compares. Run by test_kernel.py under different hash seeds."""

import logging
import pickle
import random
import sys
from collections import Counter
from typing import Any

import msgspec

from eventflow.runs.journal import Entry, Kind
from eventflow.runs.run import Completed
from tests.engine.replay_check.bench import Bench
from tests.engine.replay_check.weave import NOW, weave


def play(bench: Bench) -> Any:
    NOW[:] = [bench]
    return bench.play(weave)


def copies(entries: list[Entry]) -> list[Entry]:
    return [msgspec.structs.replace(entry) for entry in entries]


def record(first: int, how_many: int, path: str) -> None:
    rows: list[tuple[int, list[Entry], bytes]] = []
    for seed in range(first, first + how_many):
        bench = Bench(seed)
        outcome = play(bench)
        assert isinstance(outcome, Completed), (seed, outcome)
        assert outcome.unclaimed_entries == 0, seed
        rows.append((seed, bench.kept, outcome.value))
    with open(path, "wb") as file:
        pickle.dump(rows, file)


def replay(path: str) -> None:
    with open(path, "rb") as file:
        rows = pickle.load(file)
    for seed, journal, value in rows:
        resume(seed, journal, value)
    print(len(rows))


def resume(seed: int, journal: list[Entry], value: bytes) -> None:
    """Crashes after a seeded commit, resumes, crashes again, resumes; the value must be the uncrashed run's."""
    draw = random.Random(seed)
    last = journal[-1].batch
    cut = draw.randint(0, last)
    kept = copies([entry for entry in journal if entry.batch <= cut])
    done = {entry.call_key for entry in kept if entry.kind in (Kind.VALUE, Kind.ERROR)}
    again = Bench(seed + 1, kept, copies(journal), crash_after=draw.randint(0, max(0, last - cut)))
    outcome = play(again)
    check_bodies(seed, again.bodies, done)
    if outcome is None:
        done = {entry.call_key for entry in again.kept if entry.kind in (Kind.VALUE, Kind.ERROR)}
        again = Bench(seed + 2, copies(again.kept), copies(journal))
        outcome = play(again)
        check_bodies(seed, again.bodies, done)
    assert isinstance(outcome, Completed), (seed, cut, outcome)
    assert outcome.value == value, (seed, cut, outcome.value, value)
    assert outcome.unclaimed_entries == 0, (seed, cut)


def check_bodies(seed: int, bodies: Counter[str], done: set[str]) -> None:
    again = done & bodies.keys()
    assert not again, f"seed {seed}: recorded, and run again: {sorted(again)}"


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    if sys.argv[1] == "record":
        record(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        replay(sys.argv[2])
