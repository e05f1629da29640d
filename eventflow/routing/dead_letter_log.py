"""The log line of deliveries that became dead letters.

Whoever has an arrival recorded calls `log_dead_letters`: the reactor for events from outside, the
engine for events that flows emit, the router for the events of ended and late runs.
"""

from eventflow.logs.log import get_logger
from eventflow.store.protocol import Arrival

MAX_REASON_LENGTH = 500
"""Characters of a reason in the log; the dead letter has all of it."""

log = get_logger("eventflow.reactor")
LOG_EVENTS = {
    "event.dead_lettered": "A delivery became a dead letter, with its bytes and its reason.",
}


def log_dead_letters(arrival: Arrival) -> None:
    """One warning for each dead letter of an arrival, with the subscription and the reason."""
    for subscription, reason in arrival.dead_letters:
        log.warning(
            "event.dead_lettered",
            trigger=arrival.trigger,
            event_id=arrival.event_id,
            type=arrival.type,
            subscription=subscription or None,
            error=reason[:MAX_REASON_LENGTH],
        )
