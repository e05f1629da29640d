"""Alerts of Prometheus Alertmanager's webhook (version 4) and of Grafana's, which has its shape.

Each alert of a group is one `Drift`. A group mixes firing and resolved alerts and is repeated every
`repeat_interval`. Model, feature and so on are in labels and annotations of conventional names
(`MODEL` … below), or where `fields=` of `DriftAlert` says.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from triggers._drift.json_fields import first, moment, number, status, table, text, texts
from triggers._drift.schema import Drift, short_json_hash

MODEL = ("model", "model_name", "model_id")
FEATURE = ("feature", "feature_name", "column")
METRIC = ("metric", "drift_metric", "method", "test")
SEGMENT = ("segment", "slice")
STATISTIC = ("statistic", "value", "current_value")
THRESHOLD = ("threshold",)


def read_alert(alert: Mapping[str, Any], where: str, sender: str) -> Drift:
    """One alert of a group; ValueError names what is missing."""
    labels = texts(alert.get("labels"), f"{where}/labels")
    annotations = texts(alert.get("annotations"), f"{where}/annotations")
    both = labels | annotations
    starts = moment(text(alert.get("startsAt"), f"{where}/startsAt"), f"{where}/startsAt")
    feature = first(labels, FEATURE)
    return Drift(
        status="nodata"
        if labels.get("alertname") == "DatasourceNoData"
        else status(alert.get("status"), f"{where}/status"),
        sender=sender,
        name=text(labels.get("alertname"), f"{where}/labels/alertname"),
        fingerprint=str(alert.get("fingerprint") or short_json_hash(labels)),
        model=first(labels, MODEL),
        feature=feature,
        features=(feature,) if feature else (),
        metric=first(labels, METRIC),
        statistic=_statistic(alert, both),
        threshold=number(first(both, THRESHOLD)),
        severity=labels.get("severity", "warning").lower(),
        segment=first(labels, SEGMENT),
        starts_at=starts,
        ends_at=_end(alert, where),
        labels=labels,
        annotations=annotations,
        url=str(alert.get("generatorURL") or "") or None,
    )


def _end(alert: Mapping[str, Any], where: str) -> datetime | None:
    """When it was resolved. (The endsAt of a firing alert is when Prometheus would drop it.)"""
    return (
        moment(alert.get("endsAt"), f"{where}/endsAt")
        if alert.get("status") == "resolved"
        else None
    )


def _statistic(alert: Mapping[str, Any], both: Mapping[str, str]) -> float | None:
    """By a label or annotation; else Grafana's own value, if the alert has only one."""
    named = number(first(both, STATISTIC))
    values = table(alert.get("values") or {}, "values")
    return number(next(iter(values.values()))) if named is None and len(values) == 1 else named
