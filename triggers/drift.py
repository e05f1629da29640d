"""`DriftAlert`: the alerts of other drift monitors as events.

    app.on(DriftAlert("/drift", verify=Bearer(env("DRIFT_TOKEN"))), retrain)

`DriftMonitor` (drift_monitor.py) makes events of the same shape, `Drift` (_drift/schema.py), of
type `drift.detected`, `drift.escalated`, `drift.resolved` or `drift.nodata`. A subscription without
`types=` gets `drift.detected` only: an alert that fires, repeats and resolves starts one run.
`_drift/senders.py` reads the bodies.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import httpx2
import orjson

from eventflow.core.clock import Clock
from eventflow.core.declarations import declaration, whole_number
from eventflow.core.errors import UsageError
from eventflow.events.cloudevents import charset, is_json, media_type
from eventflow.events.event import Event, Undecodable
from eventflow.events.strict_json import MAX_JSON_KEYS, in_utf8, read_report
from triggers._drift.generic import FIELDS
from triggers._drift.schema import (
    DETECTED,
    Bin,
    Drift,
    DriftFinding,
    DriftWindow,
    json_bytes,
    short_json_hash,
    to_event,
)
from triggers._drift.senders import ParsedBody, SnsConfirmation, UnreadableAlert, parse_message
from triggers._drift.sns import may_confirm
from triggers.http_endpoint import (
    MAX_REASON_LENGTH,
    SYSTEM_CLOCK,
    Endpoint,
    Headers,
    RequestLimits,
    body_id,
    unreadable,
)
from triggers.http_request import Reply, RequestRejected
from triggers.signatures import Verify

LOG_EVENTS = {
    "alert.ignored": "A request to a drift alert webhook is not an alert; `reason` says why.",
    "alert.fields_unknown": (
        "An alert has fields that a `Drift` does not have; they are dropped. Logged once for each "
        "set of names."
    ),
    "alert.truncated": (
        "Alertmanager left `count` alerts out of a message (its `max_alerts` setting)."
    ),
    "sns.confirmation_failed": "An SNS subscription could not be confirmed; SNS asks again.",
}

__all__ = ["Bin", "Drift", "DriftAlert", "DriftFinding", "DriftWindow"]

CONFIRM_TIMEOUT_SECONDS = 5.0
"""For a confirmation to SNS, which waits 15 s for the response."""


class DriftAlert(Endpoint):
    """A trigger for `POST /hooks/PATH`: alerts of any known sender, each as one event.

    A sender is recognised by the shape of its body: Prometheus Alertmanager and Grafana (each alert
    of a group is an event), Evidently and NannyML (a report posted by your job), CloudWatch alarms
    such as SageMaker Model Monitor's (through SNS or EventBridge), MLflow (the tag `drift` of a
    model version), and this project's own schema, `Drift` as JSON. A repeated alert is a duplicate,
    also when its value has changed: the first one is kept. An unreadable alert is a dead letter.

    Args:
        path: below `/hooks`, such as "/drift".
        verify: a preset (`Bearer`, `HMAC`, `MLflow` …), or "none", written out.
        fields: names of `Drift`'s fields, each with a JSON pointer into the alert: for the shape of
            an unknown sender, or to override a known one. A pointer that ends in `?` may be absent;
            any other absent one makes a dead letter that names it.
        alerts: a JSON pointer to the list of alerts, where one body has several; `fields` then
            point into each.
        topics: ARNs of the SNS topics whose subscriptions are confirmed; by default none.
        sns: the URL of an SNS other than Amazon's, such as `http://localhost:4566`.
        name: the name in the ledger; by default made from the path.
        max_alerts: of one body.
        max_body, max_keys, gzip, max_rate, body_timeout: as for `Webhook`.
    """

    default_types = (DETECTED,)
    repeats_may_differ = True  # an alert is repeated with its current value

    @declaration
    def __init__(
        self,
        path: str,
        *,
        verify: Verify | Literal["none"],
        fields: Mapping[str, str] | None = None,
        alerts: str | None = None,
        topics: Sequence[str] = (),
        sns: str | None = None,
        name: str | None = None,
        max_alerts: int = 10_000,
        max_body: int = 16 << 20,
        max_keys: int = MAX_JSON_KEYS,
        gzip: bool = False,
        max_rate: float | None = 1000.0,
        body_timeout: float = 30.0,
        clock: Clock = SYSTEM_CLOCK,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        if unknown := set(fields or ()) - FIELDS:
            raise UsageError(
                f"DriftAlert({path!r}, fields=): expected {', '.join(sorted(FIELDS))}, "
                f"found {', '.join(unknown)}"
            )
        if alerts is not None and not fields:
            raise UsageError(
                f"DriftAlert({path!r}, alerts=): expected fields= as well, "
                "to say what each alert holds"
            )
        super().__init__(
            path,
            verify=verify,
            name=name or "drift" + path.replace("/", "-"),
            limits=RequestLimits(max_body, gzip, max_rate, body_timeout, max_keys),
            clock=clock,
            random_bytes=random_bytes,
        )
        self._fields: dict[str, str] = dict(fields or {})
        self._alerts: str | None = alerts
        self._topics: frozenset[str] = frozenset(topics)
        self._sns: str | None = sns
        self._warned_fields: set[tuple[str, ...]] = set()
        self._max_alerts: int = whole_number(max_alerts, f"DriftAlert({path!r}, max_alerts=)")

    async def _handle(self, headers: Headers, repeated: set[str], body: bytes) -> Reply:
        media = media_type(headers)
        if not (is_json(media) or media == "text/plain"):  # SNS calls its JSON plain text
            expected = "expected Content-Type application/json"
            raise await self._dead_letter(
                headers, repeated, body, RequestRejected(415, "unsupported_type", expected)
            )
        try:
            text = in_utf8(body, charset(headers))
            value = read_report(text, max_keys=self._limits.max_keys)
            parsed = parse_message(value, self._fields, self._alerts, self._max_alerts)
        except ValueError as error:
            raise await self._dead_letter(headers, repeated, body, unreadable(error)) from None
        if parsed.confirmation is not None:
            reason = self._reason_not_to_confirm(parsed.confirmation)
            if reason is None:
                return await self._confirm(parsed.confirmation)
            detail = "this topic is not one that the application takes"
            raise await self._dead_letter(
                headers, repeated, body, RequestRejected(403, "not_subscribed", detail), reason
            )
        return await self._record(parsed, body, self._verify.signed_id(headers))

    async def _record(self, parsed: ParsedBody, body: bytes, signed_id: str | None) -> Reply:
        if parsed.ignored_reason:
            self._log("alert.ignored", reason=parsed.ignored_reason)
        if parsed.truncated_count:
            self._log("alert.truncated", count=parsed.truncated_count)
        if parsed.unknown_fields and parsed.unknown_fields not in self._warned_fields:
            self._warned_fields.add(parsed.unknown_fields)
            self._log(
                "alert.fields_unknown",
                fields=", ".join(parsed.unknown_fields[:10]),
                hint='name them as in Drift, or DriftAlert(fields={"statistic": "/psi"})',
            )
        items: list[Event | Undecodable] = []
        items += [
            to_event(each, self.path, ident=_event_id(each, body, signed_id))
            for each in parsed.drifts
        ]
        items += [self._unreadable_item(each) for each in parsed.unreadable]
        receipts = await self._accept(items) if items else []
        rows = [
            {
                "id": one.id_text,
                "event_id": one.event_id,
                "duplicate": one.duplicate or one.conflict,
            }
            for one in receipts
        ]
        known = not items or all(one.duplicate or one.conflict for one in receipts)
        return Reply(200 if known else 202, orjson.dumps(rows))

    def _unreadable_item(self, unreadable: UnreadableAlert) -> Undecodable:
        return Undecodable(
            id=f"undecodable-{short_json_hash(unreadable.alert)}",
            source=self.path,
            body=json_bytes(unreadable.alert),
            error=unreadable.reason[:MAX_REASON_LENGTH],
        )

    def _reason_not_to_confirm(self, confirmation: SnsConfirmation) -> str | None:
        """None for a topic of the app, at SNS's own address: the body's URL may be anything."""
        if confirmation.topic not in self._topics:
            return f"the topic {confirmation.topic} is not among topics="
        if not may_confirm(confirmation.url, self._sns):
            return "SubscribeURL does not lead to SNS"
        return None

    async def _confirm(self, confirmation: SnsConfirmation) -> Reply:
        try:
            async with httpx2.AsyncClient(
                follow_redirects=False, timeout=CONFIRM_TIMEOUT_SECONDS
            ) as client:
                status = (await client.get(confirmation.url)).status_code
        except httpx2.HTTPError as error:
            status = type(error).__name__
        if status != 200:
            self._log(
                "sns.confirmation_failed",
                topic=confirmation.topic,
                error=f"SNS answered {status}",
            )
            raise self._unavailable()
        return Reply(200, orjson.dumps({"confirmed": confirmation.topic}))


def _event_id(drift: Drift, body: bytes, signed_id: str | None) -> str | None:
    """The id of an alert without an identity: MLflow's is the delivery's, that of a report or tag
    without a time is the hash of the body. Else None.
    """
    if drift.sender == "mlflow" and signed_id:
        return signed_id
    has_identity = drift.sender not in ("evidently", "mlflow") or drift.starts_at is not None
    return None if has_identity else body_id(body)


def parse_alerts(body: bytes, fields: Mapping[str, str] | None = None) -> Sequence[Drift]:
    """The drifts in an alert's body, as from `Webhook(content="raw")`, a Kafka record or a file.

    ValueError says what is missing.
    """
    parsed = parse_message(read_report(body), fields or {})
    if parsed.unreadable:
        raise ValueError(parsed.unreadable[0].reason)
    return parsed.drifts
