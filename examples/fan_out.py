"""A fan-out over 10,000 items, killed half-way: started again, it computes no recorded item twice.

    timeout -s KILL 2 python examples/fan_out.py  # killed in the middle
    python examples/fan_out.py                    # continues from the journal
    python examples/fan_out.py                    # prints the recorded result

The example computes the value at risk of 10,000 positions, each simulated independently. Watch the
last line of each start: "computed here" counts what was not recorded before. `python
examples/fan_out.py 2026-08-01` is another day, and so another run.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

from eventflow import App, current_run, flow, task

POSITIONS = 10_000
DAYS = 200


@task
def simulate(position: int) -> float:
    """The loss that this position exceeds on one day in twenty. Seeded, so that everyone gets the
    same figure.
    """
    draw = Random(position)
    size, volatility = draw.uniform(1e3, 1e5), draw.uniform(0.01, 0.05)
    days = sorted(size * draw.gauss(0, volatility) for _ in range(DAYS))
    computed: list[int] = current_run().state
    computed.append(position)
    if len(computed) % 1000 == 0:
        print(f"{len(computed):,} computed here", file=sys.stderr, flush=True)
    return round(-days[DAYS // 20], 2)


@flow
async def value_at_risk(day: str) -> str:
    """One task call per position, 500 at a time. Each value is recorded; those that are ready
    together share a commit.
    """
    losses = await simulate.map(range(POSITIONS), limit=500)
    return f"{day}: {sum(losses):,.2f} at risk, the worst position {max(losses):,.2f}"


@asynccontextmanager
async def lifespan() -> AsyncIterator[list[int]]:
    """What lives as long as the app and tasks read as `current_run().state`: here a list, elsewhere
    a model or a pool.
    """
    computed: list[int] = []
    yield computed
    print(f"{len(computed):,} computed here")


app = App("fan_out", lifespan=lifespan)
app.add(value_at_risk)


async def main(day: str) -> None:
    async with app:  # a run that a crash left in flight goes on from here
        run = await app.start(value_at_risk, idempotency_key=f"risk-{day}", day=day)
        print(await run.result())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "2026-07-31"))
