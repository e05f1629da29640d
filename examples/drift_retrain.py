"""A drift alert retrains a model once, with a checkpoint per epoch, gates and a registry.

    export DRIFT_TOKEN=secret EPOCH_SECONDS=1
    python examples/digits_model.py 900
    eventflow serve examples/drift_retrain.py
    curl localhost:8710/hooks/drift -H 'authorization: Bearer secret' \\
        -H 'content-type: application/json' -d '{"model": "digits", "feature": "pixels",
            "statistic": 0.31, "starts_at": "2026-07-01T00:00:00Z"}'

Watch: twelve epochs, the gates, a version in models/digits, the event `model.promoted`. The same
alert again starts nothing. Kill the server with -9 in epoch 7: the next start continues with it.
Alerts of other features in the meantime become one more training, which is rejected as no better;
after `python examples/digits_model.py 1797` it would be promoted.
"""

import os
import time

from digits_model import accuracy, arrived, fresh, train_epoch
from model_registry import champion, register

from eventflow import App, Retry, Singleflight, checkpoint, checks, current_task, emit, flow, task
from triggers import Bearer, Drift, DriftAlert, env

EPOCHS = 12
EPOCH_SECONDS = float(os.environ.get("EPOCH_SECONDS", "0"))  # time to kill it in
Lists = dict[str, list]


@task(retries=Retry(attempts=5, delay=1), timeout=3600)
def train(name: str) -> Lists:
    """Runs in a thread. A state with infinite numbers or an exploding gradient is not saved."""
    saved = checkpoint()
    x, y = arrived(held_out=False)
    model, done = saved.load() or (fresh(), 0)
    for epoch in range(done + 1, EPOCHS + 1):
        current_task().log.info("model.epoch_begun", model=name, epoch=epoch, rows=len(y))
        time.sleep(EPOCH_SECONDS)
        model, loss, gradient = train_epoch(model, x, y, epoch)
        checks.finite(loss=loss, **model)
        checks.gate("gradient", gradient, at_most=100)
        saved.save(model, step=epoch)
    return {part: weights.tolist() for part, weights in model.items()}


@task
def judge(name: str, model: Lists) -> dict[str, float]:
    """The gates: accurate on held-out rows, and more so than the model in use."""
    x, y = arrived(held_out=True)
    new = accuracy(model, x, y)
    current = champion(name)
    old = accuracy(current, x, y) if current else 0.0
    with checks.collect():
        checks.gate("accuracy", new, at_least=0.85)
        checks.better("accuracy", new, old, by=0.005)
    return {"accuracy": new, "champion": old}


@task(retries=Retry(attempts=5, delay=1))
def promote(name: str, model: Lists, scores: dict[str, float]) -> str:
    return register(name, model, scores, key=current_task().idempotency_key)


@flow(timeout=86_400)
async def retrain(drift: Drift) -> str:
    name = drift.model or "digits"
    try:
        model = await train(name)
        scores = await judge(name, model)
    except checks.CheckFailed as failed:
        await emit("model.rejected", {"model": name, "reason": str(failed)})
        return "rejected"
    version = await promote(name, model, scores)
    await emit("model.promoted", {"model": name, "version": version, **scores})
    return f"promoted {version}"


app = App("drift")
alerts = DriftAlert("/drift", verify=Bearer(env("DRIFT_TOKEN")))
app.on(alerts, retrain, deliver=Singleflight(), key="model")
