"""Backoff: the delays between tries, and the waits that a virtual clock drives (core/retry.py,
core/clock.py).
"""

import asyncio
import random
from itertools import islice
from typing import Any

import pytest

from eventflow import Backoff, UsageError
from eventflow.core.clock import SECOND, sleep_for, sleep_until
from eventflow.testing import VirtualClock


def test_the_ceiling_grows_by_factor_up_to_max_delay():
    """Without jitter the delays are `min(max_delay, delay * factor ** (n - 1))`."""
    backoff = Backoff(0.5, max_delay=10, jitter=0)
    assert list(islice(backoff, 7)) == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert list(islice(Backoff(0.1, factor=1, jitter=0), 3)) == [0.1, 0.1, 0.1]
    assert next(Backoff(5, max_delay=2, jitter=0)) == 2


def test_reset_starts_again_from_delay():
    """After `reset` the next delay is the first one again."""
    backoff = Backoff(1, jitter=0)
    assert list(islice(backoff, 3)) == [1, 2, 4]
    backoff.reset()
    assert next(backoff) == 1


pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("jitter", [0.25, 0.5, 1.0])
def test_jitter_draws_from_the_upper_share_of_the_ceiling(jitter: float):
    """Each delay lies in [(1 - jitter) * ceiling, ceiling], and an equal rng gives equal delays."""
    ceilings = islice(Backoff(0.5, max_delay=8, jitter=0), 200)
    drawn = list(islice(Backoff(0.5, max_delay=8, jitter=jitter, rng=random.Random(1)), 200))
    assert all((1 - jitter) * c <= d <= c for c, d in zip(ceilings, drawn, strict=True))
    assert min(drawn[5:]) < (1 - jitter) * 8 + jitter * 8 * 0.1
    again = list(islice(Backoff(0.5, max_delay=8, jitter=jitter, rng=random.Random(1)), 200))
    assert drawn == again


def test_it_never_ends_and_never_overflows():
    """Ten thousand failures later it still waits `max_delay`."""
    backoff = Backoff(1e-3, factor=10, jitter=0, max_delay=60)
    assert list(islice(backoff, 10_000))[-1] == 60


@pytest.mark.parametrize(
    "given",
    [{"delay": -1}, {"max_delay": -1}, {"factor": 0.5}, {"jitter": 1.5}, {"jitter": -0.1}],
)
def test_a_setting_that_cannot_work_is_refused(given: dict[str, Any]):
    """UsageError when it is made, not at the first failure."""
    with pytest.raises(UsageError, match="Backoff"):
        Backoff(**given)


async def test_a_virtual_clock_drives_the_waits():
    """`sleep_for` and `sleep_until` wait on the clock they are given: never before, at once when
    the time has passed.
    """
    clock, backoff = VirtualClock(), Backoff(20, jitter=0)
    due = clock.now() + 60 * SECOND
    first = asyncio.create_task(sleep_for(clock, next(backoff)))
    second = asyncio.create_task(sleep_until(clock, due))
    await asyncio.sleep(0)
    await clock.advance(19)
    assert not first.done()
    await clock.advance(1)
    await first
    assert not second.done()
    await clock.advance(40)
    await second
    await sleep_until(clock, due)


async def test_a_wait_ends_early_when_its_event_is_set():
    """`wake` ends the wait, and is set when the time itself ended it."""
    clock, wake = VirtualClock(), asyncio.Event()
    waiting = asyncio.create_task(sleep_for(clock, 3600, wake))
    await asyncio.sleep(0)
    wake.set()
    await waiting
    wake.clear()
    waiting = asyncio.create_task(sleep_for(clock, 5, wake))
    await asyncio.sleep(0)
    await clock.advance(5)
    await waiting
    assert wake.is_set()
