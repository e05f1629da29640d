"""Alerts of Prometheus Alertmanager's webhook (version 4) and of Grafana's, which has its shape.

Each alert of a group is one `Drift`. A group mixes firing and resolved alerts and is repeated every
`repeat_interval`. An alert must have what its identity needs: labels or a fingerprint, a status and
its start; anything else that is missing or odd is left out. Grafana also sends alerts about its own
rules (`SPECIAL_ALERTS`, `SPECIAL_REASONS`), itself or through an Alertmanager: while they fire it
cannot tell whether there is drift, so they are `nodata`, and resolved when they end. Model, feature
and so on are in labels and annotations of conventional names (`MODEL` … below), or where `fields=`
of `DriftAlert` says.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from triggers._drift.json_fields import fields_of, first, moment, number, status, text, texts
from triggers._drift.schema import Drift, short_json_hash

MODEL = ("model", "model_name", "model_id")
FEATURE = ("feature", "feature_name", "column")
METRIC = ("metric", "drift_metric", "method", "test")
SEGMENT = ("segment", "slice")
STATISTIC = ("statistic", "value", "current_value")
THRESHOLD = ("threshold",)

SPECIAL_ALERTS = ("DatasourceNoData", "DatasourceError")
"""Grafana's names of the alerts that its rules cannot be evaluated."""

SPECIAL_REASONS = ("NoData", "Error")
"""Why an alert fires that Grafana could not evaluate, if the rule says to alert then; in the
annotation `grafana_state_reason`.
"""

GRAFANA_LABELS = ("grafana_folder", "datasource_uid")
"""Labels that only Grafana gives: they show its alerts when an Alertmanager forwards them."""


def read_alert(alert: Mapping[str, Any], where: str, sender: str) -> Drift:
    """One alert of a group; ValueError names what is missing."""
    labels = texts(alert.get("labels"), f"{where}/labels")
    annotations = texts(fields_of(alert.get("annotations")), f"{where}/annotations")
    both = labels | annotations
    fingerprint = str(alert.get("fingerprint") or "")
    if not (labels or fingerprint):
        raise ValueError(f"{where}: expected labels or a fingerprint, found neither")
    fingerprint = fingerprint or short_json_hash(labels)
    found = status(alert.get("status"), f"{where}/status")
    if found == "detected" and _is_special(sender, labels, annotations):
        found = "nodata"
    starts = moment(text(alert.get("startsAt"), f"{where}/startsAt"), f"{where}/startsAt")
    if starts is None:
        raise ValueError(f"{where}/startsAt: expected a start, found year 1 (none)")
    feature = first(labels, FEATURE)
    return Drift(
        status=found,
        sender=sender,
        name=labels.get("alertname") or fingerprint,
        fingerprint=fingerprint,
        model=first(labels, MODEL),
        feature=feature,
        features=(feature,) if feature else (),
        metric=first(labels, METRIC),
        statistic=_statistic(alert, both),
        threshold=number(first(both, THRESHOLD)),
        severity=labels.get("severity", "warning").lower(),
        segment=first(labels, SEGMENT),
        starts_at=starts,
        ends_at=_end(alert) if found == "resolved" else None,
        labels=labels,
        annotations=annotations,
        url=str(alert.get("generatorURL") or "") or None,
    )


def _is_special(sender: str, labels: Mapping[str, str], annotations: Mapping[str, str]) -> bool:
    if annotations.get("grafana_state_reason") in SPECIAL_REASONS:
        return True
    is_grafana = sender == "grafana" or any(name in labels for name in GRAFANA_LABELS)
    return is_grafana and labels.get("alertname") in SPECIAL_ALERTS


def _end(alert: Mapping[str, Any]) -> datetime | None:
    """When it was resolved. (The endsAt of a firing alert is when Prometheus would drop it.)"""
    try:
        return moment(alert.get("endsAt"), "endsAt")
    except ValueError:
        return None


def _statistic(alert: Mapping[str, Any], both: Mapping[str, str]) -> float | None:
    """By a label or annotation; else Grafana's own value, if the alert has only one."""
    named = number(first(both, STATISTIC))
    values = fields_of(alert.get("values"))
    return number(next(iter(values.values()))) if named is None and len(values) == 1 else named
