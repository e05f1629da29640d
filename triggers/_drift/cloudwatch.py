"""CloudWatch alarms, SageMaker Model Monitor's among them: through SNS, or as EventBridge sends
them.

Model Monitor writes a metric `feature_baseline_drift_<feature>` with the dimensions `Endpoint` and
`MonitoringSchedule`; an alarm on it is the drift. ALARM is detected, OK resolved, INSUFFICIENT_DATA
no data, as is an ALARM because missing data counts as breaching. A message must have what its
identity needs: the alarm, its state, and the time of the change. What it says about a metric may be
missing: composite alarms have a rule instead, and alarms on a metric expression several metrics.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from triggers._drift.json_fields import (
    fields_of,
    items_of,
    moment,
    number,
    point,
    status,
    table,
    text,
    texts,
)
from triggers._drift.schema import Drift, short_hash

PREFIX = "feature_baseline_drift_"


class _Alarm(NamedTuple):
    """A change of an alarm's state, as either way of delivery reports it."""

    name: str
    arn: str
    state: Any
    since: Any
    metric: str
    dimensions: Mapping[str, str]
    statistic: float | None
    threshold: float | None
    reason: str


_DATAPOINT = re.compile(r"\[([-+0-9.eE]{1,40}) ")


_MISSING = re.compile(r"no datapoints were received\b.*\[Breaching\]", re.DOTALL)
"""The reason of an alarm that no data point has raised: the alarm treats missing data as
breaching.
"""


def read_sns_alarm(message: Mapping[str, Any]) -> Drift:
    """The JSON inside an SNS notification of an alarm."""
    trigger = fields_of(message.get("Trigger"))
    metric = trigger if trigger.get("MetricName") else _first_of_expression(trigger)
    reason = str(message.get("NewStateReason") or "")
    found = _DATAPOINT.search(reason)
    return _drift_of(
        _Alarm(
            name=text(message.get("AlarmName"), "AlarmName"),
            arn=str(message.get("AlarmArn") or message.get("AWSAccountId") or ""),
            state=message.get("NewStateValue"),
            since=point(message, "/StateChangeTime", "the alarm"),
            metric=str(metric.get("MetricName") or ""),
            dimensions=_dimensions(metric.get("Dimensions")),
            statistic=number(found[1]) if found else None,
            threshold=number(trigger.get("Threshold")),
            reason=reason,
        )
    )


def _first_of_expression(trigger: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first metric of an alarm on a metric expression."""
    metrics = [
        fields_of(fields_of(each.get("MetricStat")).get("Metric"))
        for each in map(fields_of, items_of(trigger.get("Metrics")))
    ]
    return next((metric for metric in metrics if metric), dict[str, Any]())


def _dimensions(value: Any) -> dict[str, str]:
    found = {
        str(each.get("name") or each.get("Name")): each.get("value") or each.get("Value")
        for each in map(fields_of, items_of(value))
    }
    return texts({name: text for name, text in found.items() if text is not None}, "Dimensions")


def read_eventbridge(message: Mapping[str, Any]) -> Drift:
    """A `CloudWatch Alarm State Change` event."""
    detail = table(point(message, "/detail"), "detail")
    state = table(point(detail, "/state", "detail"), "detail/state")
    metric = _first_metric(detail)
    data = _reason_data(state)
    recent = items_of(data.get("recentDatapoints"))
    return _drift_of(
        _Alarm(
            name=text(detail.get("alarmName"), "detail/alarmName"),
            arn=str(next(iter(items_of(message.get("resources"))), "")),
            state=point(detail, "/state/value", "detail"),
            since=state.get("timestamp") or point(message, "/time"),
            metric=str(metric.get("name") or ""),
            dimensions=texts(fields_of(metric.get("dimensions")), "dimensions"),
            statistic=number(recent[-1]) if recent else None,
            threshold=number(data.get("threshold")),
            reason=str(state.get("reason") or ""),
        )
    )


def _first_metric(detail: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return table(point(detail, "/configuration/metrics/0/metricStat/metric"), "metric")
    except ValueError:
        return {}  # a composite alarm has no metric of its own


def _reason_data(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """CloudWatch puts JSON as text into `reasonData`."""
    try:
        return fields_of(orjson.loads(str(state.get("reasonData") or "{}")))
    except orjson.JSONDecodeError:
        return {}


def _drift_of(alarm: _Alarm) -> Drift:
    at = moment(alarm.since, "the time of the state's change")
    if at is None:
        raise ValueError("the time of the state's change: expected a time, found none")
    found = status(alarm.state, "the alarm's state")
    if found == "detected" and _MISSING.search(alarm.reason):
        found = "nodata"
    feature = alarm.metric.removeprefix(PREFIX) if alarm.metric.startswith(PREFIX) else None
    is_sagemaker = feature or "MonitoringSchedule" in alarm.dimensions
    return Drift(
        status=found,
        sender="sagemaker" if is_sagemaker else "cloudwatch",
        name=alarm.name,
        fingerprint=short_hash(alarm.arn, alarm.name),
        model=alarm.dimensions.get("Endpoint"),
        feature=feature,
        features=(feature,) if feature else (),
        metric=alarm.metric or None,
        statistic=alarm.statistic,
        threshold=alarm.threshold,
        starts_at=at,
        ends_at=at if found == "resolved" else None,
        labels=alarm.dimensions,
        annotations={"reason": alarm.reason} if alarm.reason else {},
    )
