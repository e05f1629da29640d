"""A monitor's findings as `Drift`s: which features, how badly, with the histograms of before and after.

The engine calls `tell` for a move of an episode and `tell_silence` when samples cease and come again. Ids are made of the
episode's number, never of the time, so that a batch that is taken again tells the same.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from eventflow.core.clock import to_datetime
from triggers._drift.episodes import Move
from triggers._drift.evaluation import Verdict, finding
from triggers._drift.schema import Drift, Status, digest
from triggers._drift.window import Judged, Window

if TYPE_CHECKING:
    from triggers._drift.engine import Engine

SEVERITIES = ("none", "warning", "alert")

MAX_FINDINGS = 20
"""Features whose histograms one event carries; the names of all are in `features`."""


class Told(NamedTuple):
    """A drift, and the id of its event."""

    drift: Drift
    ident: str


def tell(
    engine: "Engine", unit: int, move: Move, verdicts: Sequence[Verdict], window: Window | Judged
) -> Told:
    """What an episode's move is in words."""
    setting, episode = engine.setting, engine.memory.episodes[unit]
    worst = _worst_first(
        verdicts if move == "resolved" else [each for each in verdicts if each.level]
    )
    shown = [
        finding(each, window, setting.watched, engine.baselines) for each in worst[:MAX_FINDINGS]
    ]
    if move != "resolved":
        episode.features = [setting.watched[each.place].name for each in worst]
    top = next(
        (each for each in shown if each.feature in episode.features), shown[0] if shown else None
    )
    name = setting.watched[unit].name if setting.per_feature else ""
    fingerprint = digest(setting.name, engine.memory.version, name, episode.number)
    drift = Drift(
        status=move,
        sender="eventflow",
        name=setting.name,
        fingerprint=fingerprint,
        model=setting.model,
        feature=next(iter(episode.features), None),
        features=list(episode.features),
        metric=top.metric if top else None,
        statistic=top.statistic if top else None,
        threshold=top.threshold if top else None,
        p_value=top.p_value if top else None,
        share=round(len({each.place for each in verdicts if each.level}) / len(setting.watched), 6),
        severity=SEVERITIES[episode.told],
        segment=setting.segment,
        starts_at=None if episode.since is None else to_datetime(episode.since),
        ends_at=None if move != "resolved" or window.end is None else to_datetime(window.end),
        baseline=top.baseline if top else None,
        current=top.current if top else None,
        findings=[] if move == "resolved" else shown,
        labels={"reference": str(engine.memory.version)},
    )
    return Told(drift, f"{fingerprint}/{move}/{drift.severity}")


def _worst_first(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """One verdict of each feature."""
    found: dict[int, Verdict] = {}
    for each in sorted(
        verdicts, key=lambda verdict: (verdict.level, verdict.badness), reverse=True
    ):
        found.setdefault(each.place, each)
    return list(found.values())


def tell_silence(engine: "Engine", now: int, *, over: bool) -> Told:
    """No samples come; or (`over`) they do again."""
    setting, since = engine.setting, engine.memory.silent
    assert since is not None
    status: Status = "resolved" if over else "nodata"
    fingerprint = digest(setting.name, engine.memory.version, "nodata", since)
    drift = Drift(
        status=status,
        sender="eventflow",
        name=setting.name,
        fingerprint=fingerprint,
        model=setting.model,
        metric="nodata",
        severity="alert",
        segment=setting.segment,
        starts_at=to_datetime(since),
        ends_at=to_datetime(now) if over else None,
        labels={"reference": str(engine.memory.version)},
    )
    return Told(drift, f"{fingerprint}/{status}")
