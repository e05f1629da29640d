"""From the body of an alert to `Drift`s: recognises the sender by the shape of the body.

`drift.py` calls `parse_message`. alertmanager.py, cloudwatch.py, generic.py and reports.py parse
the bodies of their senders. An unknown shape is a ValueError that says what was found.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgspec

from eventflow.events.strict_json import read_report
from triggers._drift.alertmanager import read_alert
from triggers._drift.cloudwatch import read_eventbridge, read_sns_alarm
from triggers._drift.generic import mapped, read_generic, read_mlflow
from triggers._drift.json_fields import fields_of, listed, point, table
from triggers._drift.reports import is_analyzed, read_chunk, read_evidently
from triggers._drift.schema import Drift

MAX_ALERTS = 10_000
"""In one body, by default."""


class UnreadableAlert(msgspec.Struct, frozen=True):
    """An alert that cannot be read, and the reason."""

    alert: Any
    reason: str


class SnsConfirmation(msgspec.Struct, frozen=True):
    """SNS's request to confirm a subscription to `topic`, by a GET of `url`."""

    topic: str
    url: str


class ParsedBody(msgspec.Struct, frozen=True, kw_only=True):
    """The alerts of a body.

    `ignored_reason`: why the body of a known sender is no alert. `truncated_count`: alerts that the
    sender left out. `unknown_fields`: names in a body of the own schema that it does not have.
    """

    drifts: Sequence[Drift] = ()
    unreadable: Sequence[UnreadableAlert] = ()
    ignored_reason: str = ""
    truncated_count: int = 0
    unknown_fields: tuple[str, ...] = ()
    confirmation: SnsConfirmation | None = None


def parse_message(
    body: Any, fields: Mapping[str, str], alerts: str | None = None, max_alerts: int = MAX_ALERTS
) -> ParsedBody:
    """The drifts of a body (JSON as Python values), in order. `fields`, `alerts`: JSON pointers of
    `DriftAlert`.

    Each alert of a group is read alone. ValueError for an unknown shape, and for more than
    `max_alerts`.
    """
    parsed = _parse(body, fields, alerts)
    found = len(parsed.drifts) + len(parsed.unreadable)
    if found > max_alerts:
        raise ValueError(f"expected at most {max_alerts} alerts (max_alerts=), found {found}")
    return parsed


def _parse(body: Any, fields: Mapping[str, str], alerts: str | None) -> ParsedBody:
    if alerts is not None:
        return _parse_each(
            listed(point(body, alerts), alerts), lambda alert, _: mapped(alert, fields)
        )
    if isinstance(body, dict):
        message = cast(dict[str, Any], body)
        if "Type" in message and "TopicArn" in message:
            return _parse_sns(message, fields)
        if isinstance(message.get("alerts"), list) and (
            "groupKey" in message or "receiver" in message
        ):
            return _parse_group(message, fields)
    if fields and not _is_known(body):
        return ParsedBody(drifts=[mapped(body, fields)])
    return _parse_known(body, fields)


def _is_known(body: Any) -> bool:
    if not isinstance(body, dict):
        return False
    message = cast(dict[str, Any], body)
    return isinstance(message.get("chunks"), list) or any(
        matches(message) for matches, _ in KNOWN_SHAPES
    )


def _parse_known(body: Any, fields: Mapping[str, str]) -> ParsedBody:
    if isinstance(body, list):
        rows = cast(list[Any], body)
        return _parse_chunks({"chunks": rows}, fields) if _is_chunks(rows) else _parse_each(rows)
    message = table(body, "the body")
    if isinstance(message.get("chunks"), list):
        return _parse_chunks(message, fields)
    for matches, reader in KNOWN_SHAPES:
        if matches(message):
            found = reader(message)
            if isinstance(found, str):
                return ParsedBody(ignored_reason=found)
            return ParsedBody(drifts=[mapped(message, fields, found) if fields else found])
    try:
        unknown = tuple(sorted(message.keys() - set(Drift.__struct_fields__)))
        return ParsedBody(drifts=[read_generic(message)], unknown_fields=unknown)
    except ValueError as error:
        raise ValueError(
            f"no known sender's shape (fields {', '.join(list(message)[:8]) or 'none'}); {error}"
        ) from None


_Reader = Callable[[Mapping[str, Any]], "Drift | str"]

KNOWN_SHAPES: Sequence[tuple[Callable[[Mapping[str, Any]], bool], _Reader]] = (
    (lambda body: "detail-type" in body and "detail" in body, read_eventbridge),
    (lambda body: "AlarmName" in body and "NewStateValue" in body, read_sns_alarm),
    (lambda body: "entity" in body and "action" in body and "data" in body, read_mlflow),
    (lambda body: isinstance(body.get("metrics"), list), read_evidently),
)
"""How a sender is recognised, and its parser."""


def _is_chunks(rows: Sequence[Any]) -> bool:
    """Whether a list is NannyML's."""
    return any(any(name.endswith("_alert") for name in fields_of(row)) for row in rows)


# --------------------------------------------------------------------------- several in one body


def _parse_group(message: Mapping[str, Any], fields: Mapping[str, str]) -> ParsedBody:
    """A group of Alertmanager, or of Grafana, which also has an `orgId`."""
    sender = "grafana" if "orgId" in message else "alertmanager"
    version = message.get("version")
    if sender == "alertmanager" and version is not None and str(version) != "4":
        raise ValueError(f'version: expected Alertmanager\'s "4", found {version!r}')

    def one(alert: Any, where: str) -> Drift:
        found = read_alert(table(alert, where), where, sender)
        return mapped(alert, fields, found) if fields else found

    cut = message.get("truncatedAlerts")
    reading = _parse_each(cast(list[Any], message["alerts"]), one, "alerts")
    return msgspec.structs.replace(reading, truncated_count=cut if isinstance(cut, int) else 0)


def _parse_each(
    alerts: list[Any], one: Callable[[Any, str], Drift] | None = None, where: str = "alert"
) -> ParsedBody:
    """Parses each alert alone: an unreadable one does not affect the others."""
    drifts = list[Drift]()
    unreadable = list[UnreadableAlert]()
    for index, alert in enumerate(alerts):
        try:
            drifts.append(
                one(alert, f"{where}/{index}")
                if one
                else read_generic(table(alert, f"{where}/{index}"))
            )
        except ValueError as error:
            unreadable.append(UnreadableAlert(alert, str(error)))
    return ParsedBody(drifts=drifts, unreadable=unreadable)


def _parse_chunks(report: Mapping[str, Any], fields: Mapping[str, str]) -> ParsedBody:
    """NannyML's chunks of the analysis period; those of the reference are left out."""

    def one(row: Any, where: str) -> Drift:
        drift = read_chunk(report, table(row, where))
        return mapped(report, fields, drift) if fields else drift

    rows = [row for row in listed(report["chunks"], "chunks") if is_analyzed(row)]
    return _parse_each(rows, one, "chunks")


# --------------------------------------------------------------------------- SNS


def _parse_sns(message: Mapping[str, Any], fields: Mapping[str, str]) -> ParsedBody:
    """SNS's envelope: a notification that holds the alert as text, or a request to confirm."""
    kind = message["Type"]
    topic = str(message["TopicArn"])
    if kind == "SubscriptionConfirmation":
        return ParsedBody(
            confirmation=SnsConfirmation(topic, str(message.get("SubscribeURL") or ""))
        )
    if kind == "UnsubscribeConfirmation":
        return ParsedBody(ignored_reason=f"SNS no longer sends {topic}")
    inner = message.get("Message")
    try:
        found: Any = read_report(inner.encode()) if isinstance(inner, str) else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            "Message: expected the JSON of an alarm inside SNS's notification, "
            f"found {str(inner)[:80]!r}"
        )
    return _parse(found, fields, None)
