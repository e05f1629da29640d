"""When a failed attempt is tried again: `Retry`, and the user's two words `RetryAfter` and `Permanent`.

Pure questions, no waiting: the executor asks `Retry.delay_after` once per failure and journals the answer before it waits.
"""

import random
from collections.abc import Sequence
from typing import Any

import msgspec

from eventflow.core.clock import Duration, seconds
from eventflow.core.errors import NotStorable, UsageError


class RetryAfter(Exception):
    """Raise in a task: this attempt failed, try again in `delay` seconds. Counts as an attempt."""

    def __init__(self, delay: Duration, message: str = "") -> None:
        super().__init__(seconds(delay), message)
        self.delay = seconds(delay)

    def __str__(self) -> str:
        return self.args[1] or f"retry after {self.delay:g} s"


class Permanent(Exception):
    """Raise in a task: trying again cannot help."""


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """How often and how long apart a task is tried.

    After the n-th failure (n counts from 1) the wait is `min(max_delay, delay * factor ** (n - 1))` seconds; with `jitter` a
    uniform draw from [0, that] ("full jitter", https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
    `attempts` counts all tries: 1 means no retry. `delays` lists the waits instead: attempts = len(delays) + 1, no jitter.
    `on` names what is retried, `give_up_on` what is not even then; `Permanent` and `NotStorable` never are.
    """

    attempts: int = 4
    delay: float = 1.0
    factor: float = 2.0
    max_delay: float = 3600.0
    jitter: bool = True
    on: tuple[type[BaseException], ...] = (Exception,)
    give_up_on: tuple[type[BaseException], ...] = ()
    delays: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise UsageError(f"Retry(attempts=) expected at least 1, found {self.attempts}")
        if (
            self.delay < 0
            or self.factor < 0
            or self.max_delay < 0
            or any(d < 0 for d in self.delays or ())
        ):
            raise UsageError("Retry: delay, factor, max_delay and delays must not be negative")

    def delay_after(self, attempt: int, error: BaseException, draw: random.Random) -> float | None:
        """Seconds to wait after attempt number `attempt` failed with `error`; None when it was the last."""
        if attempt >= self.attempts or isinstance(error, Permanent | NotStorable):
            return None
        if isinstance(error, RetryAfter):
            return error.delay
        if isinstance(error, self.give_up_on) or not isinstance(error, self.on):
            return None
        if self.delays is not None:
            return self.delays[attempt - 1]
        try:
            ceiling = min(self.max_delay, self.delay * self.factor ** (attempt - 1))
        except OverflowError:
            ceiling = self.max_delay
        return draw.uniform(0, ceiling) if self.jitter else ceiling


ONCE = Retry(attempts=1)


def as_retry(given: "Retry | int | Sequence[Duration] | None") -> Retry:
    """`retries=` in any of its forms: a `Retry`, a number of *re*tries, a list of delays, or None for none."""
    match given:
        case None:
            return ONCE
        case Retry():
            return given
        case bool():
            raise UsageError(
                "retries= expected a Retry, a number or a list of delays, found a bool"
            )
        case int():
            return Retry(attempts=given + 1)
        case _:
            return delays(given)


def delays(waits: Sequence[Any]) -> Retry:
    """A `Retry` that waits exactly these times."""
    listed = tuple(seconds(wait) for wait in waits)
    return Retry(attempts=len(listed) + 1, delays=listed)
