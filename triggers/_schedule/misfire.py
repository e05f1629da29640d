"""The misfire policy: which occurrences fire whose time passed while nothing listened.

`Schedule.listen` calls `due_occurrences` when it starts and when it wakes up. An occurrence is
*missed* when it is later than the grace. The policies:

    skip   the newest fires unless it is missed; the others are skipped
    last   the newest fires, however late; the others are skipped
    all    the newest `limit` fire, in order; older ones are skipped

Skipped occurrences are counted, up to MAX_COUNTED, and the cursor moves past them: they never fire.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from triggers._schedule.times import Times, newest

MAX_COUNTED = 10_000
"""Skipped occurrences are counted one by one up to here, which takes a tenth of a second."""

Misfire = Literal["skip", "last", "all"]


@dataclass(frozen=True, slots=True)
class MisfirePolicy:
    """`grace` in microseconds. `delay`: an occurrence's jitter in microseconds."""

    misfire: Misfire
    grace: int
    limit: int
    delay: Callable[[int], int]


@dataclass(frozen=True, slots=True)
class DueOccurrences:
    """Occurrences up to `through`: those to fire, in order, each with whether it was missed; and
    the number of skipped ones. `exact` is False if more were skipped than are counted.
    """

    fire: list[tuple[int, bool]]
    through: int
    skipped: int = 0
    exact: bool = True


def due_occurrences(
    times: Times, last: int, now: int, policy: MisfirePolicy
) -> DueOccurrences | None:
    """What to do about the occurrences in (last, now]; None if none of them is due."""
    first = list(islice(times.after(last), 2))
    if not first or first[0] + policy.delay(first[0]) > now:
        return None
    several = len(first) == 2 and first[1] + policy.delay(first[1]) <= now
    newest_due = _newest_due(times, last, now, policy) if several else first[:1]
    fire = [
        (at, is_missed)
        for at in newest_due
        if not (is_missed := _is_missed(at, now, policy)) or policy.misfire != "skip"
    ]
    before = fire[0][0] - 1 if fire else newest_due[-1]
    skipped = 0
    exact = True
    if several or not fire:
        skipped, exact = times.count(last, before, MAX_COUNTED)
    return DueOccurrences(fire, newest_due[-1], skipped, exact)


def _newest_due(times: Times, last: int, now: int, policy: MisfirePolicy) -> list[int]:
    """The newest that are due. One that jitter delays beyond `now` is not."""
    limit = policy.limit if policy.misfire == "all" else 1
    # One more than the limit: jitter is shorter than any gap, so it delays at most one of them.
    found = newest(times, last, now, limit + 1)
    return [at for at in found if at + policy.delay(at) <= now][-limit:]


def _is_missed(at: int, now: int, policy: MisfirePolicy) -> bool:
    return now - at - policy.delay(at) > policy.grace
