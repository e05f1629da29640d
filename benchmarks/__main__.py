"""Runs the measures and prints the table.

    python -m benchmarks [W1 W2 …] [--quick] [--rounds N] [--loop uvloop | asyncio] [--gate]
    python -m benchmarks [W1 W2 …] --against DIR   # another checkout, see compare.py
    python -m benchmarks path     # files and function calls that one event takes, see path.py
    python -m benchmarks peers    # compared with DBOS and Prefect, see peers.py
    python -m benchmarks costs    # what a filter, a key, an emit … add to a run, see costs.py
    python -m benchmarks instructions   # machine instructions per run, see instructions.py

Every sample of a side is a process of its own; the sides take turns, so that both meet the same
machine. A figure is the median over the rounds' pairs. With --gate the exit code is 1 when a figure
falls below its gate (0.7 of its floor, or of an earlier floor where `Figure.gated_floor` says so),
or cannot be taken at all.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import compare, costs, instructions, load, path, peers
from benchmarks.measure import Figure, alone, format_number

MEASURES = (
    "W1",
    "W1w",
    "W1h",
    "W2",
    "W3",
    "W4",
    "W5",
    "W6",
    "W7",
    "busy",
    "kafka",
    "patterns",
    "memory",
)
COMMANDS = {
    "costs": costs.main,
    "instructions": instructions.main,
    "path": path.main,
    "peers": peers.main,
}
COLUMNS = "{:<7} {:<56} {:>12} {:>12} {:>8} {:>7} {:>7} {:>7}  {}"
Samples = dict[str, list[dict[str, float]]]


def module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name.lower()}")


def sample(name: str, side: str, options: argparse.Namespace) -> dict[str, float]:
    """One sample, in a fresh process. Raises RuntimeError with the last line it said."""
    call = [sys.executable, "-m", "benchmarks", name, "--side", side, "--loop", options.loop]
    done = subprocess.run(
        [*call, *["--quick"] * options.quick], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    return json.loads(done.stdout)


def take(name: str, options: argparse.Namespace) -> Samples:
    samples: Samples = {side: [] for side in module(name).SIDES}
    for number in range(options.rounds):
        for side in samples:
            print(
                f"\r\033[K{name} {side} {number + 1}/{options.rounds} ",
                end="",
                file=sys.stderr,
                flush=True,
            )
            samples[side].append(sample(name, side, options))
    return samples


def measure(name: str, options: argparse.Namespace) -> bool:
    """Takes and prints one measure; whether it passes the gate."""
    try:
        samples, failure = take(name, options), ""
    except RuntimeError as error:
        samples, failure = {}, str(error)
    print("\r\033[K", end="", file=sys.stderr, flush=True)
    if failure:
        print(COLUMNS.format(name, failure[:56], *"------", "CANNOT RUN"), flush=True)
        return False
    passed = [row(name, figure, samples) for figure in module(name).FIGURES]
    return all(passed)


def row(name: str, figure: Figure, samples: Samples) -> bool:
    """Prints one figure; whether it passes the gate."""
    ours = [values[figure.key] for values in samples["eventflow"]]
    limit = [] if figure.combine is alone else [values[figure.key] for values in samples["limit"]]
    value = figure.value(ours, limit)
    numbers = (
        median(ours),
        median(limit) if limit else None,
        value,
        figure.gate,
        figure.floor,
        figure.goal,
    )
    mine, its, found, *bounds = (
        "-" if number is None else format_number(number) for number in numbers
    )
    unit = f" {figure.unit}"
    its = its if its == "-" else its + unit
    print(
        COLUMNS.format(name, figure.what, mine + unit, its, found, *bounds, figure.verdict(value)),
        flush=True,
    )
    return figure.passes_gate(value)


def main() -> int:
    if command := COMMANDS.get("".join(sys.argv[1:2])):
        return command(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="benchmarks")
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=", ".join(MEASURES))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small samples: seconds instead of minutes, and noisier",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--gate", action="store_true", help="exit 1 below a gate, 0.7 of a floor")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="compare with the checkout in DIR"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = [
        known
        for known in MEASURES
        if not options.measures or known.lower() in map(str.lower, options.measures)
    ]
    if unknown := {name.lower() for name in options.measures} - {name.lower() for name in MEASURES}:
        parser.error(f"expected measures among {', '.join(MEASURES)}; found {', '.join(unknown)}")
    if options.side:
        print(
            json.dumps(load.run(module(names[0]).SIDES[options.side](options.quick), options.loop))
        )
        return 0
    quick = ", quick" if options.quick else ""
    print(f"{os.cpu_count()} cores, {options.loop}, medians of {options.rounds}{quick}")
    if options.against:
        print(compare.COLUMNS.format("", "measure", "now", "before", "now ÷ before"))
        flags = ["--loop", options.loop, *["--quick"] * options.quick]
        before = options.against.resolve()
        compared = [
            compare.compare(name, module(name).FIGURES, before, options.rounds, flags)
            for name in names
        ]
        return 0 if all(compared) else 1
    print(
        COLUMNS.format(
            "", "measure", "eventflow", "limit", "ratio", "gate", "floor", "goal", "verdict"
        )
    )
    passed = [measure(name, options) for name in names]
    return 1 if options.gate and not all(passed) else 0


if __name__ == "__main__":
    sys.exit(main())
