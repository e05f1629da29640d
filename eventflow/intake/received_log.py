"""One log line for each event received, with what it started or why it started nothing.

`eventflow dev` asks for it; the reactor calls `log_received` after the commit.
"""

from typing import Any

import orjson

from eventflow.events.event import Receipt, format_id
from eventflow.logs.log import get_logger
from eventflow.store.protocol import Arrival

MAX_RESULT_CHARS = 300

log = get_logger("eventflow.reactor")
LOG_EVENTS = {
    "event.received": "An event was recorded; `result` says what it started (`eventflow dev`).",
}


def log_received(arrival: Arrival, receipt: Receipt) -> None:
    log.info(
        "event.received",
        trigger=arrival.trigger or None,
        event_id=arrival.event_id,
        subject=arrival.subject,
        result=result_text(arrival, receipt)[:MAX_RESULT_CHARS],
    )


def result_text(arrival: Arrival, receipt: Receipt) -> str:
    """`starts handle, run 0001`, or why nothing starts; one part for each subscription.

    A run is named by the end of its id.
    """
    if receipt.conflict:
        return "known with other content: starts nothing"
    if receipt.duplicate:
        return "known already: starts nothing"
    verdicts: list[list[Any]] = orjson.loads(receipt.verdicts or arrival.verdicts)
    if not verdicts:
        return f"no subscription accepts {arrival.type}: starts nothing"
    flows = {run.id: run.flow for run in arrival.runs}
    return "; ".join(
        _verdict_text(str(name), str(outcome), detail, flows, many=len(verdicts) > 1)
        for name, outcome, detail in verdicts
    )


def _verdict_text(
    subscription: str, outcome: str, detail: Any, flows: dict[int, str], *, many: bool
) -> str:
    if isinstance(detail, int):
        verb = {"run": "starts", "paused": "paused, for", "batched": "joins"}.get(outcome, outcome)
        return f"{verb} {flows.get(detail, subscription)}, run {format_id(detail)[-4:]}"
    who = f" by {subscription}" if many and subscription else ""
    return f"{outcome}{who}: {detail}"
