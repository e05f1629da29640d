"""Drift as events: what other monitors send (`DriftAlert`), and what a monitor of our own finds in a stream (`DriftMonitor`).

    app.on(DriftAlert("/drift", verify=Bearer(env("DRIFT_TOKEN"))), retrain)

Both make one shape of event, `Drift` (_drift/shape.py), of type `drift.detected`, `drift.resolved` or `drift.nodata`, and a
flow that names no types hears of `drift.detected` alone: an alert that fires, repeats and resolves starts one run.

This file is the public face. `_drift/senders.py` reads what comes in.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import httpx2
import orjson

from eventflow.core.clock import Clock
from eventflow.core.errors import UsageError
from eventflow.events.cloudevents import is_json, media_type
from eventflow.events.event import Event, Undecodable
from triggers._drift.generic import FIELDS
from triggers._drift.schema import DETECTED, Bin, Drift, Finding, Window, digest_json, to_event
from triggers._drift.senders import Broken, Handshake, Reading, read
from triggers._drift.sns import may_confirm
from triggers.http_endpoint import SYSTEM_CLOCK, Endpoint, Headers
from triggers.http_request import Refused, Reply
from triggers.signatures import Verify

__all__ = ["Bin", "Drift", "DriftAlert", "Finding", "Window"]

MAX_REASON = 500
"""Characters of why an alert cannot be read; the reason may quote it."""

CONFIRMING = 5.0
"""Seconds that SNS's confirmation may take; SNS itself waits 15."""


class DriftAlert(Endpoint):
    """A trigger for `POST /hooks/PATH`: alerts of any known sender, each as one event.

    Senders are known by the shape of what they send: Prometheus Alertmanager and Grafana (each alert of a group by itself),
    Evidently and NannyML (a report posted by your job), CloudWatch alarms such as SageMaker Model Monitor's (through SNS or
    EventBridge), MLflow (the tag `drift` of a model version), and our own schema, `Drift` as JSON. An alert told again is a
    duplicate, also when its value has changed since: the first one stands. What cannot be read is a dead letter.

    Args:
        verify: how a sender proves itself: `Bearer`, `HMAC`, `MLflow` … or "none", written out.
        fields: names of `Drift`'s fields, each with a JSON pointer into the alert: for another sender's shape, or over a known
            sender's. A pointer that ends in `?` may lead nowhere; any other that does makes a dead letter that names it.
        alerts: a JSON pointer to the list of alerts, where one body has several; `fields` then point into each.
        topics: ARNs of the SNS topics whose `SubscriptionConfirmation` is answered; none are by default.
        sns: where SNS is, if it is not Amazon's, such as `http://localhost:4566`.
        name: the trigger's name; by default made from the path.
        max_rate: requests per second from one address, five seconds' worth at once; more are answered 429; None for any number.
    """

    heard = (DETECTED,)

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
        max_body: int = 4 << 20,
        gzip: bool = False,
        max_rate: float | None = 1000.0,
        body_timeout: float = 30.0,
        clock: Clock = SYSTEM_CLOCK,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        if unknown := set(fields or ()) - FIELDS:
            raise UsageError(
                f"DriftAlert({path!r}, fields=): expected {', '.join(sorted(FIELDS))}, found {', '.join(unknown)}"
            )
        if alerts is not None and not fields:
            raise UsageError(
                f"DriftAlert({path!r}, alerts=): expected fields= beside it, to say what each alert holds"
            )
        super().__init__(
            path, verify=verify, name=name or "drift" + path.replace("/", "-"), max_body=max_body, gzip=gzip,
            max_rate=max_rate, body_timeout=body_timeout, clock=clock, entropy=entropy,
        )  # fmt: skip
        self._fields, self._alerts, self._topics, self._sns = (
            dict(fields or {}),
            alerts,
            frozenset(topics),
            sns,
        )

    async def _take(self, headers: Headers, repeated: set[str], body: bytes) -> Reply:
        if not (
            is_json(media_type(headers)) or media_type(headers) == "text/plain"
        ):  # SNS calls its JSON plain text
            raise self._refused(
                Refused(415, "unsupported_type", "expected Content-Type application/json"),
                "content type",
            )
        try:
            reading = read(body, self._fields, self._alerts)
        except ValueError as error:
            raise await self._dead(
                _body_id(body), self.path, headers, body, str(error)[:MAX_REASON]
            ) from None
        if reading.handshake is not None:
            return await self._confirm(reading.handshake)
        return await self._record(reading, body, self._verify.signed_id(headers))

    async def _record(self, reading: Reading, body: bytes, signed: str | None) -> Reply:
        self._tell(reading)
        items: list[Event | Undecodable] = []
        items += [
            to_event(each, self.path, ident=_ident(each, body, signed)) for each in reading.drifts
        ]
        items += [self._broken(each) for each in reading.broken]
        receipts = await self._accept(items, len(body)) if items else []
        rows = [
            {"id": one.shown, "event_id": one.event_id, "duplicate": one.duplicate or one.conflict}
            for one in receipts
        ]
        known = not items or all(one.duplicate or one.conflict for one in receipts)
        return Reply(200 if known else 202, orjson.dumps(rows))

    def _broken(self, broken: Broken) -> Undecodable:
        body = orjson.dumps(broken.alert)
        return Undecodable(
            id=f"undecodable-{digest_json(broken.alert)}",
            source=self.path,
            body=body,
            error=broken.reason,
        )

    def _tell(self, reading: Reading) -> None:
        if reading.aside:
            self._log("alert.ignored", reason=reading.aside)
        if reading.cut:
            self._log("alert.truncated", count=reading.cut)

    async def _confirm(self, asked: Handshake) -> Reply:
        """Says yes to SNS, for a topic that the app names and at SNS's own address only; anybody may write any URL here."""
        if asked.topic not in self._topics:
            why = f"the topic {asked.topic} is not among topics="
        elif not may_confirm(asked.url, self._sns):
            why = "SubscribeURL does not lead to SNS"
        else:
            return await self._visit(asked)
        raise self._refused(
            Refused(403, "not_subscribed", "this topic is not one that the application takes"), why
        )

    async def _visit(self, asked: Handshake) -> Reply:
        try:
            async with httpx2.AsyncClient(follow_redirects=False, timeout=CONFIRMING) as client:
                status = (await client.get(asked.url)).status_code
        except httpx2.HTTPError as error:
            status = type(error).__name__
        if status != 200:
            self._log("alert.unconfirmed", topic=asked.topic, error=f"SNS answered {status}")
            raise self._unavailable()
        return Reply(200, orjson.dumps({"confirmed": asked.topic}))


def _ident(drift: Drift, body: bytes, signed: str | None) -> str | None:
    """Where an alert has no identity of its own: MLflow's is its delivery's, that of a report without a time its content's."""
    if drift.sender == "mlflow":
        return signed
    return _body_id(body) if drift.sender == "evidently" and drift.starts_at is None else None


def _body_id(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=16).hexdigest()


def parse_alerts(body: bytes, fields: Mapping[str, str] | None = None) -> Sequence[Drift]:
    """The drifts in an alert's body: for `Webhook(content="raw")`, a Kafka record, a file. ValueError says what was missing."""
    reading = read(body, fields)
    if reading.broken:
        raise ValueError(reading.broken[0].reason)
    return reading.drifts
