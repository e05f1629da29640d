"""A drift alert retrains a model once, a gate compares it with the one in service, and only a better one is promoted.

    mkdir -p data && (echo x,y; seq 200 | awk '{print $1 "," 3 * $1 + $1 % 5}') > data/prices.csv
    eventflow serve examples/drift_retrain.py
    eventflow emit drift.detected --id prices-2026-07 -d '{"model": "prices", "window": "2026-07", "psi": 0.31}'

Watch: the run trains, passes the gate, writes models/prices.json and emits `model.promoted`, which starts the second flow. The
same id again starts nothing. A new window trains again, but on the same data the new model is no better, and the gate keeps the
old one. A PSI under 0.2 starts no run; `eventflow explain` says why.
"""

import csv
from pathlib import Path
from statistics import fmean, linear_regression

import msgspec

from eventflow import App, Event, Retry, current_run, emit, flow, task

DATA, MODELS = Path("data"), Path("models")


class Alert(msgspec.Struct):
    model: str
    window: str
    psi: float


class Model(msgspec.Struct):
    slope: float
    intercept: float


def rows(name: str, *, held_out: bool) -> list[tuple[float, float]]:
    """Every fifth row is held out, the others are trained on."""
    with (DATA / f"{Path(name).name}.csv").open(newline="") as file:
        listed = [(float(row["x"]), float(row["y"])) for row in csv.DictReader(file)]
    return [row for number, row in enumerate(listed) if (number % 5 == 0) is held_out]


@task(retries=Retry(attempts=5, delay=1), timeout=600)
def train(name: str) -> Model:
    """Least squares, in a thread of its own; tried again while the data are not there or half written."""
    return Model(*linear_regression(*zip(*rows(name, held_out=False), strict=True)))


@task
def error_of(name: str, model: Model | None) -> float:
    """Mean absolute error on the held-out rows: of this model, or of the one in service (of none: enormous)."""
    path = MODELS / f"{Path(name).name}.json"
    judged = model or (msgspec.json.decode(path.read_bytes(), type=Model) if path.exists() else Model(0, 1e300))
    return round(fmean(abs(y - judged.slope * x - judged.intercept) for x, y in rows(name, held_out=True)), 6)


@task
def promote(name: str, model: Model) -> None:
    MODELS.mkdir(exist_ok=True)  # the file comes into its place whole or not at all
    (part := MODELS / f"{Path(name).name}.part").write_bytes(msgspec.json.encode(model))
    part.replace(part.with_suffix(".json"))


@flow(timeout=3600)
async def retrain(alert: Alert) -> str:
    challenger = await train(alert.model)
    new, old = await error_of(alert.model, challenger), await error_of(alert.model, None)
    if new > 0.99 * old:
        return f"kept: an error of {new} is no better than {old}"
    await promote(alert.model, challenger)
    await emit("model.promoted", {"model": alert.model, "window": alert.window, "error": new})
    return f"promoted: an error of {new}"


@flow
async def announce(event: Event) -> None:
    current_run().log.info("model.announced", **event.data)


app = App("drift")
app.on("drift.detected", retrain, where={"psi": [{"numeric": [">=", 0.2]}]}, key=lambda event: event.data["model"])
app.on("model.promoted", announce)
