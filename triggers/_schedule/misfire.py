"""What is due now, and what becomes of occurrences whose time passed while nothing could fire them. Pure questions.

The loop of schedule.py asks `due` whenever the first occurrence after its cursor has come. An occurrence is *missed* when it is
later than the grace. The policies:

    skip   the newest fires unless it is missed; the others are skipped
    last   the newest fires, however late; the others are skipped
    all    the newest `limit` fire, in order; older ones are skipped

Whatever is skipped is counted, up to `COUNTED`, and the cursor moves past it: it never fires any more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from triggers._schedule.times import Times, newest

COUNTED = 10_000
"""Skipped occurrences that are counted one by one; beyond that it is "at least". A tenth of a second of work."""

Misfire = Literal["skip", "last", "all"]


@dataclass(frozen=True, slots=True)
class Policy:
    """`grace` in microseconds; `delay`: by how many an occurrence's firing is put off (jitter)."""

    misfire: Misfire
    grace: int
    limit: int
    delay: Callable[[int], int]


@dataclass(frozen=True, slots=True)
class Due:
    """Occurrences to fire now, in order, each with whether it was missed; and how many up to `through` are skipped.

    `exact` is False when there were more skipped ones than are counted.
    """

    fire: list[tuple[int, bool]]
    through: int
    skipped: int = 0
    exact: bool = True


def due(times: Times, last: int, now: int, policy: Policy) -> Due | None:
    """What to do about the occurrences in (last, now]; None when none of them is due."""
    first = list(islice(times.after(last), 2))
    if not first or first[0] + policy.delay(first[0]) > now:
        return None
    many = len(first) == 2 and first[1] + policy.delay(first[1]) <= now
    come = _come(times, last, now, policy) if many else first[:1]
    fire = _chosen(come, now, policy)
    before = fire[0] - 1 if fire else come[-1]
    skipped, exact = times.count(last, before, COUNTED) if many or not fire else (0, True)
    return Due([(at, _late(at, now, policy)) for at in fire], come[-1], skipped, exact)


def _come(times: Times, last: int, now: int, policy: Policy) -> list[int]:
    """The newest that are due. One that is held back by jitter is left for its own time."""
    wanted = policy.limit if policy.misfire == "all" else 1
    found = newest(
        times, last, now, wanted + 1
    )  # jitter is shorter than any gap: at most one of them is held back
    return [at for at in found if at + policy.delay(at) <= now][-wanted:]


def _chosen(come: list[int], now: int, policy: Policy) -> list[int]:
    return [at for at in come if policy.misfire != "skip" or not _late(at, now, policy)]


def _late(at: int, now: int, policy: Policy) -> bool:
    return now - at - policy.delay(at) > policy.grace
