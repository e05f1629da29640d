"""Replay under seeded crashes: a resumed run returns what the uncrashed one returned (P4, P5)."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SEEDS = int(os.environ.get("EVENTFLOW_SEEDS", "1000"))
ROOT = Path(__file__).parents[2]


def replay_check(hash_seed: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.replay_check", *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_p5_seeded_crashes_replay_to_the_uncrashed_result_in_another_process(
    tmp_path: Path,
) -> None:
    """A flow of every asyncio construct, crashed after any commit and resumed in a process with
    other hashes, gives the uncrashed run's result; every entry is claimed, and no recorded body
    runs again.
    """
    chunk = -(-SEEDS // 4)

    def both(first: int) -> int:
        journal = str(tmp_path / f"{first}.journal")
        replay_check("1", "record", str(first), str(chunk), journal)
        return int(replay_check("2", "replay", journal))

    with ThreadPoolExecutor(2) as pool:
        replayed = sum(pool.map(both, range(0, SEEDS, chunk)))
    assert replayed >= SEEDS
