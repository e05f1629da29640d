"""Orders arrive in a Kafka topic and are scored once; their scores go to another topic.

    docker compose up -d kafka
    KAFKA_BOOTSTRAP_SERVERS=localhost:9094 eventflow serve examples/kafka_orders.py

Send a few from another terminal, and read the scores:

    for n in 1 2 3; do
        echo "c-$n:{\\"id\\": \\"o-$n\\", \\"customer\\": \\"c-$n\\", \\"total\\": $n}"
    done | kcat -b localhost:9094 -t orders -P -K :
    kcat -b localhost:9094 -t scores -C -f '%k %s %h\\n'

Watch: orders of one customer are scored one after another, of different ones at the same time. Kill
the server with -9 and start it again: it continues after the last recorded order. A record that is
no JSON or no order goes to the topic `dead-orders`, and to `eventflow ls dead-letters`. `eventflow
ls triggers` shows the lag, `eventflow ls sinks` what is still to be sent. A score may come twice
after a kill, with the same `ce_id`.
"""

import asyncio
import os

import msgspec

from eventflow import App, Retry, emit, flow, task
from triggers import Kafka, KafkaSink

BROKER = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9094")
SEGMENTS = {"c-1": "gold", "c-2": "silver"}


class Order(msgspec.Struct):
    id: str
    customer: str
    total: float


@task(retries=Retry(attempts=5, delay=0.2), timeout=10)
async def segment_of(customer: str) -> str:
    """Ask the customer database; here it is a dictionary."""
    await asyncio.sleep(0.01)
    return SEGMENTS.get(customer, "new")


@task
def score(order: Order, segment: str) -> float:
    return round(order.total * {"gold": 1.5, "silver": 1.2}.get(segment, 1.0), 2)


@flow
async def handle(order: Order) -> float:
    segment = await segment_of(order.customer)
    value = await score(order, segment)
    scored = {"order": order.id, "segment": segment, "score": value}
    await emit("order.scored", scored, subject=order.customer)
    return value


app = App("kafka-orders")
# A member with a fixed name rejoins at once after a kill; without one, the group first waits until
# the session of the old member has timed out.
orders = Kafka(
    "orders", bootstrap_servers=BROKER, group_id="kafka-orders", group_instance_id="server-1"
)
app.on(orders, handle, key="record")
app.send("order.scored", KafkaSink("scores", bootstrap_servers=BROKER))
app.send_dead_letters(KafkaSink("dead-orders", bootstrap_servers=BROKER))

if __name__ == "__main__":
    app.run()
