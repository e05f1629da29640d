"""Counts the machine instructions of a plain run of one task, by thread, under valgrind.

    python -m benchmarks instructions [--gate]

Times on a shared machine vary by half; the instructions of the same work vary by a few percent.
Each mode of W1 (events accepted 100 at a time, and one at a time by 200 callers) runs under
callgrind with 300 and with 1,300 events; the difference is what 1,000 runs take, without the start
and the end of the process. A count above its bound is taken twice more, and the smallest is judged:
how the threads take turns moves a count by a tenth. Threads have callgrind's numbers; 1 is the main
thread. With --gate the exit code is 1 when a mode takes more than its bound, which is for CPython
3.11 (counts of another version are only printed). Needs `valgrind` on the PATH: `apt install
valgrind` on Debian.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import load, ours
from benchmarks.w4 import WRITES_BYTE_CODE

EVENTS = (300, 1_300)
BOUNDS = {"batch": 590_000, "single": 645_000}
"""Instructions per run that --gate accepts: a usual count and 10 %."""
COUNTS = 3
GATED_PYTHON = (3, 11)
TOTAL = re.compile(r"^(?:totals|summary): (\d+)", re.MULTILINE)
MIN_INSTRUCTIONS = 100
"""Threads with fewer instructions per run are not printed."""


def by_thread(mode: str, events: int) -> dict[int, int]:
    """Instructions of each thread of one process that handles `events` events."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--separate-threads=yes"]
        command += [f"--callgrind-out-file={folder}/out", sys.executable, "-m"]
        command += ["benchmarks.instructions", "--sample", mode, str(events)]
        # the same hashes in every process, so the same collisions
        environment = {**WRITES_BYTE_CODE, "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
        totals: dict[int, int] = {}
        for file in Path(folder).glob("out-*"):
            if found := TOTAL.search(file.read_text()):
                totals[int(file.name.rpartition("-")[2])] = int(found[1])
        return totals


def per_run(mode: str) -> dict[int, float]:
    """Instructions per run, by thread."""
    with ThreadPoolExecutor(len(EVENTS)) as pool:
        few, many = pool.map(lambda events: by_thread(mode, events), EVENTS)
    return {
        thread: (many[thread] - few.get(thread, 0)) / (EVENTS[1] - EVENTS[0])
        for thread in sorted(many)
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks instructions")
    parser.add_argument("--gate", action="store_true", help="exit 1 above a bound")
    parser.add_argument("--sample", nargs=2, metavar=("MODE", "EVENTS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.sample:
        mode, events = options.sample
        load.run(ours.throughput(mode, int(events)))
        return 0
    if shutil.which("valgrind") is None:
        print("CANNOT RUN: expected valgrind on the PATH, found none; apt install valgrind")
        return 0
    warm_up = [sys.executable, "-c", "import benchmarks.ours"]  # compiles what is not yet compiled
    subprocess.run(warm_up, env=WRITES_BYTE_CODE, check=True)
    is_judged = sys.version_info[:2] == GATED_PYTHON
    passed = True
    for mode, bound in BOUNDS.items():
        threads = per_run(mode)
        for _ in range(1, COUNTS):
            if sum(threads.values()) > bound:
                threads = min(threads, per_run(mode), key=lambda each: sum(each.values()))
        total = sum(threads.values())
        passed = passed and (total <= bound or not is_judged)
        parts = ", ".join(
            f"thread {thread}: {count:,.0f}"
            for thread, count in threads.items()
            if abs(count) >= MIN_INSTRUCTIONS
        )
        judged = f"bound {bound:,}" if is_judged else "no bound for this version of Python"
        print(f"{mode}: {total:,.0f} instructions per run ({judged}); {parts}", flush=True)
    return 1 if options.gate and not passed else 0


if __name__ == "__main__":
    sys.exit(main())
