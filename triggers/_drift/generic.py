"""Alerts in the project's own schema, by JSON pointers (`DriftAlert(fields=…)`), and MLflow's tags.

The own schema is `Drift`. All fields are optional, but one of `model`, `feature` and `fingerprint`
must be present.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from triggers._drift.json_fields import (
    MissingField,
    moment,
    number,
    point,
    status,
    table,
    text,
    texts,
)
from triggers._drift.schema import Drift, short_hash, short_json_hash

TAG = "drift"
"""The tag on a model version by which an MLflow user reports drift."""

NUMBERS = frozenset({"statistic", "threshold", "p_value", "share"})
TIMES = frozenset({"starts_at", "ends_at"})
MAPPINGS = frozenset({"labels", "annotations"})
FIELDS = frozenset(Drift.__struct_fields__) - {
    "features",
    "findings",
    "baseline",
    "current",
    "sender",
}
"""The fields that a pointer may fill."""


def read_generic(body: Mapping[str, Any]) -> Drift:
    """The own schema. Unknown fields are ignored; ValueError names an invalid one."""
    known = {name: body[name] for name in Drift.__struct_fields__ if body.get(name) is not None}
    if not any(known.get(name) for name in ("model", "feature", "fingerprint")):
        raise ValueError('expected "model", "feature" or "fingerprint", found none of them')
    read = (NUMBERS | TIMES | MAPPINGS | {"status"}) & known.keys()
    known |= {name: _fit(name, known[name]) for name in read}
    known.setdefault("status", "detected")
    return _complete(known, body, "generic")


def mapped(body: Any, fields: Mapping[str, str], over: Drift | None = None) -> Drift:
    """A drift by pointers into the body; or `over`, a known sender's, with some fields replaced.

    A pointer that ends in `?` may be absent; any other absent one raises ValueError, naming it.
    """
    found: dict[str, Any] = {}
    for name, pointer in fields.items():
        try:
            value = point(body, pointer.removesuffix("?"))
        except MissingField:
            value = None
        if value is None:
            if pointer.endswith("?"):
                continue
            raise ValueError(f"{name}: expected something at {pointer!r}, found nothing")
        found[name] = _fit(name, value)
    if over is None:
        found.setdefault("status", "detected")
        return _complete(found, body, "generic")
    known = {name: getattr(over, name) for name in Drift.__struct_fields__} | found
    return _complete(known, body, over.sender)


def _fit(name: str, value: Any) -> Any:
    if name in NUMBERS:
        if (found := number(value)) is None:
            raise ValueError(f"{name}: expected a number, found {value!r}")
        return found
    if name in TIMES:
        return moment(value, name)
    if name in MAPPINGS:
        return texts(value, name)
    if name == "status":
        return status(value, name)
    return value if isinstance(value, str) else f"{value}"


def _complete(known: dict[str, Any], body: Any, sender: str) -> Drift:
    """Derives missing fields. Without a start time, the same content is the same alert."""
    model = known.get("model")
    feature = known.get("feature")
    known["sender"] = sender
    known.setdefault(
        "name",
        "/".join(str(part) for part in (model, feature) if part)
        or str(known.get("fingerprint") or sender),
    )
    if not known.get("fingerprint"):
        since = () if known.get("starts_at") else (short_json_hash(body),)
        known["fingerprint"] = short_hash(
            known["name"], model, feature, known.get("segment"), known.get("metric"), *since
        )
    known["severity"] = str(known.get("severity") or "warning").lower()
    if feature and not known.get("features"):
        known["features"] = [feature]
    try:
        return msgspec.convert(known, Drift, from_attributes=True)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


# --------------------------------------------------------------------------- MLflow


def read_mlflow(body: Mapping[str, Any]) -> Drift | str:
    """MLflow's tag `drift`, set on a model version: its value is a status or the statistic.

    For any other event of its registry, a text that says what it is.
    """
    kind = f"{body['entity']}.{body['action']}"
    data = table(point(body, "/data"), "data")
    if kind not in ("model_version_tag.set", "model_version_tag.deleted") or data.get("key") != TAG:
        return f"{kind} {data.get('key', '')}".strip() + f", no tag {TAG!r}"
    name = text(data.get("name"), "data/name")
    version = str(data.get("version") or "")
    value = str(data.get("value") or "")
    at = moment(body.get("timestamp"), "timestamp")
    over = kind.endswith("deleted")
    return Drift(
        status="resolved"
        if over
        else "detected"
        if number(value) is not None
        else status(value, "data/value"),
        sender="mlflow",
        name=f"{name}/{version}",
        fingerprint=short_hash("mlflow", name, version),
        model=name,
        statistic=number(value),
        starts_at=at,
        labels={"version": version},
    )
