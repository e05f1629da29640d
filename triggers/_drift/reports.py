"""Reports of Evidently and NannyML, libraries that compute drift in a batch job.

The job posts the report, since they send no webhooks:
`httpx.post(url, content=report.run(current, reference).json())`. One report is one drift: its worst
feature first, each drifted one in `findings`. A report without drift resolves the last one; one in
which no column could be compared is no data. A column that cannot be read (a statistic of NaN, an
unknown form) costs itself only.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from triggers._drift.json_fields import fields_of, listed, moment, number, text, truth
from triggers._drift.schema import (
    Drift,
    DriftFinding,
    DriftWindow,
    Status,
    short_hash,
    short_json_hash,
)

DRIFT_SHARE = 0.5
"""Evidently's default: the share of drifted columns from which the data set has drifted."""

_ZONE = re.compile(r"([Zz]|[+-]\d\d:?\d\d)$")

METHODS = ("kolmogorov_smirnov", "jensen_shannon", "wasserstein", "hellinger", "chi2", "l_infinity")
"""NannyML's univariate methods, the ends of its column names."""


class ColumnResult(DriftFinding, frozen=True, kw_only=True):
    """One column of a report, and whether it drifted."""

    drifted: bool

    @property
    def is_judged(self) -> bool:
        """Whether the library could compare the column: it has a statistic, or drifted."""
        return self.drifted or self.statistic is not None


# --------------------------------------------------------------------------- Evidently


def read_evidently(report: Mapping[str, Any]) -> Drift:
    """A report's `.json()` or `.dict()`, of 0.7 (`metric_name`, `config`, `value`) or of 0.4 to 0.6
    (`metric`, `result`).
    """
    metrics = [fields_of(each) for each in listed(report["metrics"], "metrics")]
    share, limit, columns = (
        _legacy(metrics) if any("result" in each for each in metrics) else _current(metrics)
    )
    if not columns:
        raise ValueError(
            "metrics: expected ValueDrift or DataDriftTable among them "
            "(DataDriftPreset has them), found neither"
        )
    findings = sorted(
        (each for each in columns if each.drifted), key=_relative_excess, reverse=True
    )
    judged = sum(each.is_judged for each in columns)
    if not judged:
        return _report("evidently", report, (), None, "nodata")
    if share is None:
        share = len(findings) / judged
    is_drift = share >= limit and bool(findings)
    return _report("evidently", report, findings, share, "detected" if is_drift else "resolved")


def _current(
    metrics: Sequence[Mapping[str, Any]],
) -> tuple[float | None, float, list[ColumnResult]]:
    share = None
    limit = DRIFT_SHARE
    columns = list[ColumnResult]()
    for metric in metrics:
        config = fields_of(metric.get("config"))
        kind = str(config.get("type") or metric.get("metric_name") or "")
        if "DriftedColumnsCount" in kind:
            share = number(fields_of(metric.get("value")).get("share"))
            limit = number(config.get("drift_share")) or DRIFT_SHARE
        elif "ValueDrift" in kind and config.get("column"):
            columns.append(_value_drift(metric, config))
    return share, limit, columns


def _value_drift(metric: Mapping[str, Any], config: Mapping[str, Any]) -> ColumnResult:
    found = number(metric.get("value"))
    method = str(config.get("method") or "")
    threshold = number(config.get("threshold"))
    return _column_result(str(config["column"]), method, found, threshold, None)


def _legacy(metrics: Sequence[Mapping[str, Any]]) -> tuple[float | None, float, list[ColumnResult]]:
    share = None
    limit = DRIFT_SHARE
    columns = dict[str, ColumnResult]()
    for metric in metrics:
        result = fields_of(metric.get("result"))
        if "share_of_drifted_columns" in result:
            share = number(result["share_of_drifted_columns"])
            limit = number(result.get("drift_share")) or limit
        for column, each in fields_of(result.get("drift_by_columns")).items():
            one = fields_of(each)
            score = number(one.get("drift_score"))
            threshold = number(one.get("stattest_threshold"))
            columns[column] = _column_result(
                column,
                str(one.get("stattest_name") or ""),
                score,
                threshold,
                one.get("drift_detected"),
            )
    return share, limit, list(columns.values())


def _column_result(
    column: str, method: str, found: float | None, threshold: float | None, drift_detected: Any
) -> ColumnResult:
    """A p-value below its threshold is drift, and a distance at or above it."""
    p = found if method.endswith("p_value") else None
    below = (
        found is not None
        and threshold is not None
        and (found < threshold if p is not None else found >= threshold)
    )
    return ColumnResult(
        feature=column,
        metric=method or None,
        statistic=found,
        threshold=threshold,
        p_value=p,
        drifted=below if drift_detected is None else truth(drift_detected),
    )


def _relative_excess(finding: DriftFinding) -> float:
    """The statistic in units of its threshold, to put the worst first."""
    if finding.statistic is None or not finding.threshold:
        return 0.0
    if finding.p_value is not None:
        return finding.threshold / max(finding.p_value, 1e-300)
    return abs(finding.statistic) / abs(finding.threshold)


# --------------------------------------------------------------------------- NannyML


def is_analyzed(row: Any) -> bool:
    """Whether a row is of the analysis period, as far as it says so."""
    columns = fields_of(row)
    return columns.get("chunk_period", columns.get("period", "analysis")) == "analysis"


def read_chunk(report: Mapping[str, Any], row: Mapping[str, Any]) -> Drift:
    """A row of `results.to_df(multilevel=False)`, one of a list or of `{"model": …, "chunks":
    [rows]}`.
    """
    name = text(str(row.get("chunk_key", row.get("key", ""))), "chunks/chunk_key")
    columns = list(_worst(_columns(row)))
    if not columns:
        raise ValueError(
            f"chunk {name}: expected columns such as age_jensen_shannon_alert, "
            f"found {', '.join(list(row)[:8])}"
        )
    findings = sorted(
        (each for each in columns if each.drifted), key=_relative_excess, reverse=True
    )
    window = DriftWindow(
        start=moment(_dated(row.get("chunk_start_date")), "chunk_start_date"),
        end=moment(_dated(row.get("chunk_end_date")), "chunk_end_date"),
    )
    judged = sum(each.is_judged for each in columns)
    share = len(findings) / judged if judged else None
    status = "nodata" if not judged else "detected" if findings else "resolved"
    drift = _report("nannyml", report, findings, share, status)
    starts_at = window.end or drift.starts_at
    # Without a time a chunk's key (rows 0 to 999) is that of another chunk in the next report.
    content = (short_json_hash(row),) if starts_at is None else ()
    return msgspec.structs.replace(
        drift,
        current=window,
        labels={"chunk": name},
        segment=drift.segment or name,
        starts_at=starts_at,
        fingerprint=short_hash(drift.fingerprint, name, *content),
    )


def _worst(columns: Iterable[ColumnResult]) -> Iterable[ColumnResult]:
    """One result of each feature, of several methods: a drifted one, the worst of them."""
    found: dict[str, ColumnResult] = {}
    for each in columns:
        before = found.get(each.feature)
        if before is None or (each.drifted, _relative_excess(each)) > (
            before.drifted,
            _relative_excess(before),
        ):
            found[each.feature] = each
    return found.values()


def _dated(value: Any) -> Any:
    """pandas writes times without a zone, or as milliseconds since 1970; both are UTC. Its `NaT`
    is no time.
    """
    if value == "NaT":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return datetime.fromtimestamp(value / 1000, UTC).isoformat()
        except (ValueError, OverflowError, OSError):
            return value
    if isinstance(value, str) and value and not _ZONE.search(value):
        return value + "Z"
    return value


def _columns(row: Mapping[str, Any]) -> Iterator[ColumnResult]:
    for name, alert in row.items():
        stem = name.removesuffix("_alert")
        method = next((method for method in METHODS if stem.endswith(f"_{method}")), None)
        if stem != name and method is not None:
            upper = number(row.get(f"{stem}_upper_threshold"))
            lower = number(row.get(f"{stem}_lower_threshold"))
            yield ColumnResult(
                feature=stem.removesuffix(f"_{method}"),
                metric=method,
                statistic=number(row.get(f"{stem}_value")),
                threshold=lower if upper is None else upper,
                drifted=truth(alert),
            )


# --------------------------------------------------------------------------- both


def _report(
    sender: str,
    report: Mapping[str, Any],
    findings: Sequence[ColumnResult],
    share: float | None,
    status: Status,
) -> Drift:
    """Includes what a job may add to the report: `model`, `segment`, `name`, `timestamp`."""
    model, segment = (str(report[key]) if report.get(key) else None for key in ("model", "segment"))
    worst = findings[0] if findings else None
    at = moment(_dated(report.get("timestamp")), "timestamp")
    return Drift(
        status=status,
        sender=sender,
        name=str(report.get("name") or f"{sender} report"),
        fingerprint=short_hash(sender, model, segment, report.get("name")),
        model=model,
        feature=worst.feature if worst else None,
        features=[each.feature for each in findings],
        metric=worst.metric if worst else None,
        statistic=worst.statistic if worst else None,
        threshold=worst.threshold if worst else None,
        p_value=worst.p_value if worst else None,
        share=None if share is None else round(share, 6),
        segment=segment,
        starts_at=at,
        ends_at=at if status == "resolved" else None,
        findings=[_finding(each) for each in findings],
    )


def _finding(result: ColumnResult) -> DriftFinding:
    return DriftFinding(**{name: getattr(result, name) for name in DriftFinding.__struct_fields__})
