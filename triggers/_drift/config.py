"""`MonitorConfig`: the options of a monitor; `Sample`: the rows of one event."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal, TypeAlias

import msgspec

from triggers._drift.baseline import Baseline
from triggers._drift.bins import MAX_LABEL_LENGTH
from triggers._drift.episodes import EpisodeRules
from triggers._drift.features import FeatureSpec
from triggers._drift.schema import short_hash, short_json_hash
from triggers._drift.values import plain_value

WindowKind: TypeAlias = int | timedelta | Literal["batch"]


class MonitorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A monitor's validated options. Durations in microseconds.

    `baselines`: of a given reference; empty if it is learned. `span`: length of time windows, else
    0. `nodata_after`: time without samples until `drift.nodata`. `history`: stored windows.
    """

    name: str
    model: str | None
    segment: str | None
    features: tuple[FeatureSpec, ...]
    baselines: tuple[Baseline, ...]
    learn_rows: int
    window: WindowKind
    span: int
    lateness: int
    min_samples: int
    alpha: float
    rules: EpisodeRules
    nodata_after: int | None
    per_feature: bool
    history: int

    def measurement_hash(self) -> str:
        """Another one when the same rows would give other statistics: other features, reference or
        windows. Not thresholds.
        """
        features = [_without_thresholds(each) for each in self.features]
        reference = (
            short_json_hash([msgspec.to_builtins(each) for each in self.baselines])
            if self.baselines
            else self.learn_rows
        )
        return short_hash(short_json_hash(features), reference, self.window)

    def state_hash(self) -> str:
        """Another one when what was counted so far is void."""
        return short_hash(self.measurement_hash(), self.per_feature)


def _without_thresholds(spec: FeatureSpec) -> list[Any]:
    feature = msgspec.structs.replace(spec.feature, warn=None, alert=None)
    return [spec.name, spec.at, spec.numeric, msgspec.to_builtins(feature)]


class Sample(msgspec.Struct, frozen=True):
    """The rows of one event, each its values in the features' order, and the event's time in
    microseconds.
    """

    rows: Sequence[Sequence[Any]]
    at: int


def stored_value(spec: FeatureSpec, value: Any) -> Any:
    """A value as it is stored: bounded in size, valid JSON. An empty list means an invalid one."""
    value = plain_value(value, numeric=spec.numeric)
    if value is None or value != value:
        return None
    if spec.numeric:
        return _stored_number(value)
    if isinstance(value, str):
        return value[:MAX_LABEL_LENGTH]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return str(value)[:MAX_LABEL_LENGTH]
    return value if isinstance(value, bool | int | float) else []


def _stored_number(value: Any) -> Any:
    """A measurement: an integer beyond 64 bits is its nearest float."""
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return value
    if not isinstance(value, int | float):
        return []
    try:
        found = float(value)
    except OverflowError:
        return []
    return found if abs(found) < float("inf") else []
