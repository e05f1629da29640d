"""The whole loop on a team's own monitoring: a drifting metric, a Prometheus rule, Alertmanager,
and one retraining.

    export DRIFT_TOKEN=secret
    eventflow serve examples/drift_alerts.py --open-metrics
    curl localhost:8710/hooks/scores -H 'content-type: application/json' -d '{"amount": 12.5}'

`DriftMonitor` counts the scored rows and shows its statistics in /metrics as
`eventflow_trigger_drift_statistic`; the rule in docs/guides/drift.md watches that, and Alertmanager
posts to /hooks/alerts:

    receivers:
      - name: retrain
        webhook_configs:
          - url: http://localhost:8710/hooks/alerts
            http_config: {authorization: {credentials: secret}}

Watch: 400 rows around 10 are learned as the reference; windows of 200 around 12 push the statistic
over 0.2. The alert fires, one training runs, and the alert's repeats and its end start nothing:
`eventflow ls events` shows one `drift.detected`, which counts its duplicates, and one
`drift.resolved`.
"""

from eventflow import App, Event, Retry, Singleflight, current_run, flow, task
from triggers import Bearer, Drift, DriftAlert, DriftMonitor, Numeric, Webhook, env


@task(retries=Retry(attempts=5, delay=1), timeout=3600)
def train(model: str) -> str:
    """A plain `def` runs in a thread of its own."""
    return f"{model} trained"


@flow(timeout=7200)
async def retrain(drift: Drift) -> str:
    current_run().log.info(
        "model.retrained", model=drift.model, feature=drift.feature, psi=drift.statistic
    )
    return await train(drift.model or "unknown")


@flow
async def note(event: Event) -> str:
    """Everything else that is told of a drift: that it got worse, is over, or can no longer be
    judged.
    """
    return f"{event.type} of {event.subject}"


# Only counted: what it tells itself is noted, the decision is Alertmanager's.
scores = DriftMonitor(
    Webhook("/scores", verify="none"),
    features={"amount": Numeric(metric="psi")},
    reference=400,
    window=200,
    model="prices",
)
alerts = DriftAlert("/alerts", verify=Bearer(env("DRIFT_TOKEN")))

app = App("drift-alerts")
app.on(alerts, retrain, deliver=Singleflight())
app.on(alerts, note, types=["drift.resolved", "drift.nodata"])
app.on(scores, note, types=["drift.*"])
