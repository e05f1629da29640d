"""The events of a monitor, as `Drift` values: which features drifted, how far, with histograms.

evaluator.py calls `episode_event` for a move of an episode, engine.py `nodata_event` when samples
cease and arrive again. Ids are made of the episode's number, never of the time: a batch that is
counted again makes the same events.
"""

from collections.abc import Sequence
from typing import NamedTuple

from eventflow.core.clock import to_datetime
from triggers._drift.baseline import Baseline
from triggers._drift.config import MonitorConfig
from triggers._drift.episodes import Episode, Move
from triggers._drift.evaluation import MetricResult, make_finding
from triggers._drift.schema import Drift, Status, short_hash
from triggers._drift.window import EvaluatedWindow, OpenWindow

SEVERITIES = ("none", "warning", "alert")

MAX_FINDINGS = 20
"""Features whose histograms one event carries; `features` names all of them."""


class DriftEvent(NamedTuple):
    """A drift, and the id of its event."""

    drift: Drift
    ident: str


def episode_event(
    config: MonitorConfig,
    baselines: Sequence[Baseline],
    version: int,
    unit: int,
    episode: Episode,
    move: Move,
    results: Sequence[MetricResult],
    window: OpenWindow | EvaluatedWindow,
) -> DriftEvent:
    """The event of an episode's move; notes the drifted features in `episode.features`.

    `version`: number of the reference. `unit`: index of the episode's feature, 0 without one.
    """
    worst = _worst_first(
        results if move == "resolved" else [each for each in results if each.level]
    )
    findings = [
        make_finding(each, window, config.features, baselines) for each in worst[:MAX_FINDINGS]
    ]
    if move != "resolved":
        episode.features = [config.features[each.feature_index].name for each in worst]
    top = next(
        (each for each in findings if each.feature in episode.features),
        findings[0] if findings else None,
    )
    feature = config.features[unit].name if config.per_feature else ""
    fingerprint = short_hash(config.name, version, feature, episode.number)
    drifted = {each.feature_index for each in results if each.level}
    drift = Drift(
        status=move,
        sender="eventflow",
        name=config.name,
        fingerprint=fingerprint,
        model=config.model,
        feature=next(iter(episode.features), None),
        features=list(episode.features),
        metric=top.metric if top else None,
        statistic=top.statistic if top else None,
        threshold=top.threshold if top else None,
        p_value=top.p_value if top else None,
        share=round(len(drifted) / len(config.features), 6),
        severity=SEVERITIES[episode.reported_level],
        segment=config.segment,
        starts_at=None if episode.since is None else to_datetime(episode.since),
        ends_at=None if move != "resolved" or window.end is None else to_datetime(window.end),
        baseline=top.baseline if top else None,
        current=top.current if top else None,
        findings=[] if move == "resolved" else findings,
        labels={"reference": str(version)},
    )
    return DriftEvent(drift, f"{fingerprint}/{move}/{drift.severity}")


def _worst_first(results: Sequence[MetricResult]) -> list[MetricResult]:
    """One result of each feature."""
    found: dict[int, MetricResult] = {}
    for each in sorted(results, key=lambda result: (result.level, result.severity), reverse=True):
        found.setdefault(each.feature_index, each)
    return list(found.values())


def nodata_event(
    config: MonitorConfig, version: int, since: int, *, ended_at: int | None = None
) -> DriftEvent:
    """No samples have arrived since `since`; with `ended_at`, they do again. Microseconds."""
    status: Status = "nodata" if ended_at is None else "resolved"
    fingerprint = short_hash(config.name, version, "nodata", since)
    drift = Drift(
        status=status,
        sender="eventflow",
        name=config.name,
        fingerprint=fingerprint,
        model=config.model,
        metric="nodata",
        severity="alert",
        segment=config.segment,
        starts_at=to_datetime(since),
        ends_at=None if ended_at is None else to_datetime(ended_at),
        labels={"reference": str(version)},
    )
    return DriftEvent(drift, f"{fingerprint}/{status}")
