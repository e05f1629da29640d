"""Orders arrive by signed webhook and are scored by a model server that sometimes fails. None is
lost, and none is filed twice.

    export ORDERS_SECRET=whsec_c2hvcC1leGFtcGxlLXNlY3JldA==
    eventflow serve examples/orders_webhook.py

Send one from another terminal, as any Standard Webhooks sender does:

    key=$(echo c2hvcC1leGFtcGxlLXNlY3JldA== | base64 -d)
    body='{"id": "o-1", "total": 99.5}'  now=$(date +%s)
    sign=$(printf %s "msg-1.$now.$body" | openssl dgst -sha256 -hmac "$key" -binary | base64)
    curl localhost:8710/hooks/orders -H "webhook-id: msg-1" -H "webhook-timestamp: $now" \
        -H "webhook-signature: v1,$sign" -H "content-type: application/json" -d "$body"

Watch: the 202 comes at once, and the run retries until a scorer runs, for instance `uvicorn
examples.fastapi_scoring:api --port 8000`; then scores.jsonl has the score. The same order again is
answered with 200 and "duplicate". An order with `"total": 0` starts no run: `eventflow explain`.
"""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import msgspec

from eventflow import App, Permanent, Retry, RetryAfter, current_run, current_task, flow, task
from triggers import StandardWebhooks, Webhook, env

SCORER = os.environ.get("SCORER_URL", "http://127.0.0.1:8000/score")
SCORES = Path(os.environ.get("SCORES", "scores.jsonl"))


class Order(msgspec.Struct):
    id: str
    total: float


@task(retries=Retry(attempts=8, delay=0.2, max_delay=60), timeout=10)
async def score(order: Order) -> float:
    """Ask the model server; wait as long as it says when busy, give up when it refuses."""
    client: httpx2.AsyncClient = current_run().state
    reply = await client.post(SCORER, json=msgspec.to_builtins(order))
    if reply.status_code in (429, 503):
        raise RetryAfter(float(reply.headers.get("retry-after", 1)), "the scorer is busy")
    if reply.status_code == 422:
        raise Permanent(f"the scorer refuses order {order.id}: {reply.text}")
    return float(reply.raise_for_status().json()["score"])


@task
def file_score(order: Order, value: float) -> None:
    """Append a line. The body may run again after a crash; readers drop a line with a known key."""
    line = {"order": order.id, "score": value, "key": current_task().idempotency_key}
    with SCORES.open("a") as file:
        file.write(json.dumps(line) + "\n")


@flow(timeout=3600)
async def handle(order: Order) -> float:
    value = await score(order)
    await file_score(order, value)
    return value


@asynccontextmanager
async def lifespan() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient() as client:
        yield client


app = App("orders", lifespan=lifespan)
orders = Webhook("/orders", verify=StandardWebhooks(secret=env("ORDERS_SECRET")))
app.on(orders, handle, where={"total": [{"numeric": [">", 0]}]})

if __name__ == "__main__":
    app.run()
