"""How fast eventflow is, as ratios to the least that the durable work can cost on the machine at
hand.

`python -m benchmarks` prints the table. Each measure is a module `w*.py` with a side for eventflow
and a side for its limit, every sample of a side runs in a process of its own, the sides take turns,
and the figure is the median of the pairs' ratios. `limit.py` is the ground: the bare durable work
by hand.
"""
