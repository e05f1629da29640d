"""What the gates of benchmarks/ accept."""

from benchmarks.measure import Figure


def test_the_gate_of_a_figure_is_taken_from_its_earlier_floor_when_it_has_one():
    """A figure passes down to 0.7 of its floor, or of `gated_floor` where that is given."""
    plain = Figure(key="k", what="", unit="", floor=1.0, goal=2.0)
    eased = Figure(key="k", what="", unit="", floor=1.0, goal=2.0, gated_floor=0.5)
    time = Figure(key="k", what="", unit="", floor=70, goal=10, lower_is_better=True)
    assert plain.passes_gate(0.7) and not plain.passes_gate(0.69)
    assert eased.passes_gate(0.35) and not eased.passes_gate(0.34)
    assert eased.verdict(0.4) == "below the floor"
    assert time.passes_gate(99) and not time.passes_gate(101)
