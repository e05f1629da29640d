"""The commands of benchmarks/ that compare and bound speed: their output without the network, and
which figures pass their gates.
"""

import subprocess
import sys
from pathlib import Path

from benchmarks import peers
from benchmarks.measure import Figure

ROOT = Path(__file__).resolve().parent.parent


def test_peers_that_are_not_installed_are_rows_with_a_reason(tmp_path: Path):
    """`python -m benchmarks peers --no-install` prints the values of eventflow and of the limit
    loop, and for each peer that it cannot run, with the reason.
    """
    environment = tmp_path / "peers"
    options = ["--quick", "--rounds", "1", "--no-install", "--environment", str(environment)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "peers", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    measures = tuple(comparison.what for comparison in peers.COMPARISONS)
    rows = [row for row in done.stdout.splitlines() if row.startswith(measures)]
    for side in ("eventflow", "limit loop"):
        found = [row for row in rows if f" {side} " in row]
        assert len(found) == len(measures)
        assert not any("CANNOT RUN" in row for row in found)
    for side in ("DBOS, PostgreSQL", "DBOS, SQLite", "Prefect"):
        found = [row for row in rows if f" {side} " in row and "CANNOT RUN" in row]
        assert len(found) == len(measures)
        assert f"{side}: CANNOT RUN: expected an environment in {environment}" in done.stdout
    assert not environment.exists()


def test_the_gate_of_a_figure_is_taken_from_its_earlier_floor_when_it_has_one():
    """A figure passes down to 0.7 of its floor, or of `gated_floor` where that is given."""
    plain = Figure(key="k", what="", unit="", floor=1.0, goal=2.0)
    eased = Figure(key="k", what="", unit="", floor=1.0, goal=2.0, gated_floor=0.5)
    time = Figure(key="k", what="", unit="", floor=70, goal=10, lower_is_better=True)
    assert plain.passes_gate(0.7) and not plain.passes_gate(0.69)
    assert eased.passes_gate(0.35) and not eased.passes_gate(0.34)
    assert eased.verdict(0.4) == "below the floor"
    assert time.passes_gate(99) and not time.passes_gate(101)
