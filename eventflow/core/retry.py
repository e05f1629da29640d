"""When something that failed is tried again: `Retry` for tasks, `Backoff` for connections.

`Retry` is a policy without state: the engine calls `Retry.delay_after` once per failed attempt and
journals the delay before the wait. A task influences it by raising `RetryAfter` or `Permanent`.
`Backoff` is an iterator of delays for a loop that reconnects: listeners of triggers, sinks, stores
of large results. Neither of them waits; see `clock.sleep_for`.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, cast

import msgspec

from eventflow.core.clock import Duration
from eventflow.core.declarations import Declared, declaration, duration, number, whole_number
from eventflow.core.errors import NotStorable, UsageError, value_or_none


class RetryAfter(Exception):
    """Raise in a task: this attempt failed, retry it after `delay`. Counts as an attempt.

    Raises UsageError for a delay that is negative, infinite or no number.
    """

    @declaration
    def __init__(self, delay: Duration, message: str = "") -> None:
        self.delay = duration(delay, "RetryAfter(delay)")
        super().__init__(self.delay, message)

    def __str__(self) -> str:
        return self.args[1] or f"retry after {self.delay:g} s"


class Permanent(Exception):
    """Raise in a task, a sink or a decoder: trying again does not help."""


class Retry(msgspec.Struct, frozen=True, kw_only=True, metaclass=Declared):
    """How many times a task is tried, and the delays between attempts.

    After the n-th failure (n counts from 1) the delay in seconds is
    `min(max_delay, delay * factor ** (n - 1))`; with `jitter`, a uniform draw from [0, that]
    ("full jitter",
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/). `attempts` counts
    all tries: 1 means no retry. `delays` lists the delays instead: attempts = len(delays) + 1, no
    jitter. Errors of `on` are retried, except those of `give_up_on`; `Permanent` and `NotStorable`
    never are. An exception group (as raised by a TaskGroup) is retried if each error in it is,
    after the longest of their delays; but if `on` or `give_up_on` names a class of groups, the
    group itself is compared.
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
        whole_number(self.attempts, "Retry(attempts=)")
        duration(self.delay, "Retry(delay=)")
        number(self.factor, "Retry(factor=)", minimum=0)
        duration(self.max_delay, "Retry(max_delay=)")
        for each in self.delays or ():
            duration(each, "Retry(delays=)")

    def delay_after(self, attempt: int, error: BaseException, draw: random.Random) -> float | None:
        """Seconds to wait after attempt `attempt` (from 1) failed; None: do not retry."""
        if attempt >= self.attempts or isinstance(error, Permanent | NotStorable):
            return None
        if isinstance(error, BaseExceptionGroup) and not self._names_groups:
            members = cast("BaseExceptionGroup[BaseException]", error).exceptions
            delays = [self.delay_after(attempt, each, draw) for each in members]
            known = [delay for delay in delays if delay is not None]
            return max(known) if len(known) == len(delays) else None
        if isinstance(error, RetryAfter) and (own := _own_delay(error)) is not None:
            return own
        if isinstance(error, self.give_up_on) or not isinstance(error, self.on):
            return None
        if self.delays is not None:
            return self.delays[attempt - 1]
        try:
            ceiling = min(self.max_delay, self.delay * self.factor ** (attempt - 1))
        except OverflowError:
            ceiling = self.max_delay
        return draw.uniform(0, ceiling) if self.jitter else ceiling

    @property
    def _names_groups(self) -> bool:
        return any(issubclass(each, BaseExceptionGroup) for each in (*self.on, *self.give_up_on))


def _own_delay(error: RetryAfter) -> float | None:
    """Seconds; None if the error (of a user's class) has no delay, or one that is no duration."""
    return value_or_none(lambda: duration(error.delay, "RetryAfter.delay"))


class Backoff(Iterator[float]):
    """An endless iterator of delays in seconds, for a loop that reconnects.

        backoff = Backoff(delay=0.5, max_delay=30.0)
        while True:
            try:
                connection = await connect()
                backoff.reset()  # it works: after the next failure, start again from `delay`
                await consume(connection, intake)
            except OSError as error:
                retry_in = next(backoff)
                intake.log.warning("source.disconnected", error=str(error), retry_in=retry_in)
                await asyncio.sleep(retry_in)

    The n-th delay since the start or the last `reset` (n counts from 1) is a uniform draw from `[(1
    - jitter) * ceiling, ceiling]`, with `ceiling = min(max_delay, delay * factor ** (n - 1))`. By
    default that is 0.5 s, doubling up to 60 s, with full jitter (`jitter=1`), so a delay may be
    close to 0; with `jitter=0` the delays are the ceilings. Pass `rng` to make the draws
    repeatable; by default each object has its own generator. Raises UsageError for a negative
    delay, a factor below 1 or a jitter outside [0, 1].

    Not promised: an end (count the tries where they are bounded), a reset after some time (call
    `reset`), thread safety, and a wait: use `await asyncio.sleep(next(backoff))`, or with a clock
    `await eventflow.core.clock.sleep_for(clock, next(backoff))`, which a test controls with
    `eventflow.testing.VirtualClock`.
    """

    __slots__ = ("_ceiling", "_delay", "_factor", "_jitter", "_max_delay", "_rng")

    @declaration
    def __init__(
        self,
        delay: Duration = 0.5,
        *,
        factor: float = 2.0,
        max_delay: Duration = 60.0,
        jitter: float = 1.0,
        rng: random.Random | None = None,
    ) -> None:
        self._delay: float = duration(delay, "Backoff(delay=)")
        self._factor: float = number(factor, "Backoff(factor=)", minimum=1)
        self._max_delay: float = duration(max_delay, "Backoff(max_delay=)")
        self._jitter: float = number(jitter, "Backoff(jitter=)", minimum=0, maximum=1)
        self._rng: random.Random = rng or random.Random()
        self._ceiling: float = min(self._max_delay, self._delay)

    def __next__(self) -> float:
        """The next delay in seconds."""
        ceiling = self._ceiling
        self._ceiling = min(self._max_delay, ceiling * self._factor)
        return self._rng.uniform((1 - self._jitter) * ceiling, ceiling) if self._jitter else ceiling

    def reset(self) -> None:
        """Start again from `delay`."""
        self._ceiling = min(self._max_delay, self._delay)


NO_RETRY = Retry(attempts=1)


def as_retry(given: "Retry | int | Sequence[Duration] | None") -> Retry:
    """The `Retry` of `retries=`: a Retry, a number of retries, a list of delays, or None."""
    match given:
        case None:
            return NO_RETRY
        case Retry():
            return given
        case bool():
            raise UsageError(
                "retries= expected a Retry, a number or a list of delays, found a bool"
            )
        case int():
            return Retry(attempts=whole_number(given, "retries=", minimum=0) + 1)
        case _:
            sequence = cast(object, given)
            if isinstance(sequence, str | bytes) or not isinstance(sequence, Sequence):
                raise UsageError(
                    f"retries= expected a Retry, a number or a list of delays, found {given!r}"
                )
            return fixed_delays(given)


def fixed_delays(waits: Sequence[Any]) -> Retry:
    """A `Retry` that waits exactly these times."""
    listed = tuple(duration(wait, "retries=") for wait in waits)
    return Retry(attempts=len(listed) + 1, delays=listed)
