"""The demo's app, and an app like any other: a signed webhook, a watched directory, a drift alert
that comes as a CloudEvent.

`eventflow demo` copies this file into a folder, serves it with `eventflow serve shop.py`, feeds it,
and kills it with -9. Each task body first writes a line into bodies.jsonl: by that the demo knows
what ran, in which process and how often.
"""

import asyncio
import csv
import json
import os

import msgspec

from eventflow import App, Retry, current_task, emit, flow, task
from triggers import Directory, StandardWebhooks, Webhook, env


class Order(msgspec.Struct):
    id: str
    total: float


def note(name: str) -> None:
    this = current_task()
    line = {
        "task": name,
        "key": this.idempotency_key,
        "attempt": this.attempt,
        "process": os.getpid(),
    }
    with open("bodies.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


# --------------------------------------------------------------------------- orders


@task(retries=Retry(attempts=5, delay=0.2, jitter=False), timeout=10)
async def score(order: Order) -> float:
    note("score")
    await asyncio.sleep(0.15)
    if order.id == "order-3" and current_task().attempt <= 2:
        raise ConnectionError("the scorer hung up")
    return round(order.total / 100, 2)


@task
async def pack(order: Order) -> str:
    note("pack")
    await asyncio.sleep(0.6)
    return f"parcel of {order.id}"


@task
async def ship(parcel: str, urgency: float) -> str:
    note("ship")
    await asyncio.sleep(0.02)
    return f"{parcel} by {'courier' if urgency > 0.5 else 'post'}"


@flow
async def handle_order(order: Order) -> str:
    urgency = await score(order)
    parcel = await pack(order)
    return await ship(parcel, urgency)


# --------------------------------------------------------------------------- landing files


@task
def read(path: str) -> list[float]:
    note("read")
    with open(path, newline="") as file:
        return [float(row["price"]) for row in csv.DictReader(file)]


@task
async def convert(price: float) -> float:
    note("convert")
    await asyncio.sleep(0.03)
    return round(price * 1.08, 2)


@flow
async def price_list(path: str) -> float:
    prices = await convert.map(await read(path), limit=4)
    return round(sum(prices), 2)


# --------------------------------------------------------------------------- drift


@task(timeout=60)
async def train(model: str) -> float:
    note("train")
    await asyncio.sleep(0.2)
    return 0.93


@flow
async def retrain(model: str) -> str:
    accuracy = await train(model)
    if accuracy < 0.9:
        return "kept the old one"
    return await emit("model.promoted", {"model": model, "accuracy": accuracy})


@flow
async def announce(model: str, accuracy: float) -> str:
    return f"{model} is in service, accuracy {accuracy:.0%}"


app = App("shop")
app.on(
    Webhook("/orders", verify=StandardWebhooks(secret=env("DEMO_SECRET"))),
    handle_order,
    where={"total": [{"numeric": [">", 0]}]},
)
app.on(Directory("landing", pattern="*.csv", settle=0.3), price_list)
app.on("drift.detected", retrain, where={"psi": [{"numeric": [">", 0.2]}]})
app.on("model.promoted", announce)
