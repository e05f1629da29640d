"""The two commands of the replay check, run by test_replay.py under different hash seeds.

record FIRST COUNT FILE    play COUNT seeds and write their journals
replay FILE                resume each from a seeded crash, and compare the results
equal FIRST COUNT          play COUNT seeds, with the parts of a run made when they are needed and
                           all at its start, and compare their journals
"""

import logging
import pickle
import random
import sys
from collections import Counter
from typing import Any

import msgspec

from eventflow.engine import run_parts
from eventflow.runs.journal import Entry, Kind
from eventflow.runs.run import Completed
from tests.engine.replay_check.scenario import CURRENT, scenario
from tests.engine.replay_check.seeded_run import SeededRun


def play(seeded_run: SeededRun) -> Any:
    CURRENT[:] = [seeded_run]
    return seeded_run.play(scenario)


def copies(entries: list[Entry]) -> list[Entry]:
    return [msgspec.structs.replace(entry) for entry in entries]


def record(first: int, how_many: int, path: str) -> None:
    rows: list[tuple[int, list[Entry], bytes]] = []
    for seed in range(first, first + how_many):
        seeded_run = SeededRun(seed)
        outcome = play(seeded_run)
        assert isinstance(outcome, Completed), (seed, outcome)
        assert outcome.unclaimed_entries == 0, seed
        rows.append((seed, seeded_run.kept, outcome.value))
    with open(path, "wb") as file:
        pickle.dump(rows, file)


def equal(first: int, how_many: int) -> None:
    for seed in range(first, first + how_many):
        journals: list[list[Entry]] = []
        for all_parts in (False, True):
            run_parts.MAKES_ALL_PARTS = all_parts
            seeded_run = SeededRun(seed)
            outcome = play(seeded_run)
            assert isinstance(outcome, Completed), (seed, outcome)
            journals.append(seeded_run.kept)
        lazy, full = journals
        assert lazy == full, (seed, lazy, full)
    print(how_many)


def replay(path: str) -> None:
    with open(path, "rb") as file:
        rows = pickle.load(file)
    for seed, journal, value in rows:
        resume(seed, journal, value)
    print(len(rows))


def resume(seed: int, journal: list[Entry], value: bytes) -> None:
    """Crashes after a seeded commit, resumes, crashes again, resumes; the value must equal the
    uncrashed run's.
    """
    rng = random.Random(seed)
    last = journal[-1].batch
    cut = rng.randint(0, last)
    kept = copies([entry for entry in journal if entry.batch <= cut])
    done = {entry.call_key for entry in kept if entry.kind in (Kind.VALUE, Kind.ERROR)}
    again = SeededRun(
        seed + 1, kept, copies(journal), crash_after=rng.randint(0, max(0, last - cut))
    )
    outcome = play(again)
    check_bodies(seed, again.bodies, done)
    if outcome is None:
        done = {entry.call_key for entry in again.kept if entry.kind in (Kind.VALUE, Kind.ERROR)}
        again = SeededRun(seed + 2, copies(again.kept), copies(journal))
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
    elif sys.argv[1] == "equal":
        equal(int(sys.argv[2]), int(sys.argv[3]))
    else:
        replay(sys.argv[2])
