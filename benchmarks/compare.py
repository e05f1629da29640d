"""Compares the speed of this checkout with that of another: `python -m benchmarks --against DIR`.

Per measure and round, the eventflow side of both checkouts runs once; which of them begins changes
from round to round, so that both meet the same machine. Every sample is a process of its own, with
the same interpreter, in its checkout as working directory and PYTHONPATH. Printed are the ratios
now ÷ before of each figure and of the CPU seconds (user and system, with all child processes): the
median over the rounds, and the smallest and largest. W7 keeps a store in .eventflow/ of each
checkout. Called by __main__.py; the contract with the other checkout is its command
`python -m benchmarks NAME --side eventflow`, which prints a JSON object.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.measure import Figure

COLUMNS = "{:<9} {:<56} {:>12} {:>12}  {}"
HERE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Sample:
    values: dict[str, float]
    cpu_seconds: float


def take(root: Path, name: str, options: Sequence[str]) -> Sample:
    """One sample of the eventflow side in the checkout `root`. RuntimeError when it fails."""
    command = [sys.executable, "-m", "benchmarks", name, "--side", "eventflow", *options]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        environment = {**os.environ, "PYTHONPATH": str(root)}
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # reaped here, not by Popen
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            lines = errors.read().strip().splitlines() or [f"exit code {process.returncode}"]
            raise RuntimeError(f"{root}: {lines[-1]}")
        return Sample(json.loads(out.read()), usage.ru_utime + usage.ru_stime)


def compare(
    name: str, figures: Iterable[Figure], before: Path, rounds: int, options: Sequence[str]
) -> bool:
    """Print the rows of one measure. False when a sample failed."""
    samples: dict[Path, list[Sample]] = {HERE: [], before: []}
    try:
        for number in range(rounds):
            order = [HERE, before] if number % 2 else [before, HERE]
            for root in order:
                print(f"\r\033[K{name} {number + 1}/{rounds} {root} ", end="", file=sys.stderr)
                sys.stderr.flush()
                samples[root].append(take(root, name, options))
    except RuntimeError as error:
        print(f"\r\033[K{name}: {error}", flush=True)
        return False
    print("\r\033[K", end="", file=sys.stderr, flush=True)
    for figure in figures:
        key = figure.key
        if all(key in sample.values for taken in samples.values() for sample in taken):
            now = [sample.values[key] for sample in samples[HERE]]
            old = [sample.values[key] for sample in samples[before]]
            better = "smaller is better" if figure.lower_is_better else "larger is better"
            _print_row(name, f"{figure.what} ({figure.unit})", now, old, better)
    now = [sample.cpu_seconds for sample in samples[HERE]]
    old = [sample.cpu_seconds for sample in samples[before]]
    _print_row(name, "CPU seconds of the whole sample", now, old, "smaller is better")
    return True


def _print_row(
    name: str, what: str, now: Sequence[float], old: Sequence[float], better: str
) -> None:
    ratios = sorted(mine / its for mine, its in zip(now, old, strict=True))
    spread = f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}; {better})"
    print(
        COLUMNS.format(name, what, f"{median(now):.4g}", f"{median(old):.4g}", spread), flush=True
    )
