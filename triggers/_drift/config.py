"""What a monitor was asked to do, `Setting`, and what it is fed: the rows of an event as `Sample`."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal, TypeAlias

import msgspec

from triggers._drift.baseline import Baseline
from triggers._drift.bins import MAX_LABEL
from triggers._drift.episodes import Rules
from triggers._drift.features import Watched
from triggers._drift.schema import digest, digest_json

WindowKind: TypeAlias = int | timedelta | Literal["batch"]


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """A monitor's options, checked. Durations in microseconds; `span` is that of windows of time, else 0."""

    name: str
    model: str | None
    segment: str | None
    watched: tuple[Watched, ...]
    given: tuple[Baseline, ...]
    learn: int
    window: WindowKind
    span: int
    lateness: int
    min_samples: int
    alpha: float
    rules: Rules
    nodata: int | None
    per_feature: bool
    history: int

    def measured(self) -> str:
        """Another one when the same rows would give other statistics: other features, reference or windows. Not thresholds."""
        features = [_without_thresholds(each) for each in self.watched]
        reference = (
            digest_json([msgspec.to_builtins(each) for each in self.given])
            if self.given
            else self.learn
        )
        return digest(digest_json(features), reference, self.window)

    def digest(self) -> str:
        """Another one when what was counted so far is void."""
        return digest(self.measured(), self.per_feature)


def _without_thresholds(watched: Watched) -> list[Any]:
    feature = msgspec.structs.replace(watched.feature, warn=None, alert=None)
    return [watched.name, watched.at, watched.numeric, msgspec.to_builtins(feature)]


class Sample(msgspec.Struct, frozen=True):
    """The rows of one event, each its values in the features' order, and the event's time in microseconds."""

    rows: Sequence[Sequence[Any]]
    at: int


def compact(watched: Watched, value: Any) -> Any:
    """What is kept of a value: it may be of any size, and JSON has no infinity. An empty list stands for the invalid."""
    if value is None or value != value:
        return None
    if watched.numeric:
        return value if isinstance(value, int | float) and abs(value) < float("inf") else []
    if isinstance(value, str):
        return value[:MAX_LABEL]
    return value if isinstance(value, bool | int | float) else []
