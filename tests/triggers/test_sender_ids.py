"""What an id covers, by preset: an action, a chain of events, one event. One event starts once,
however often it is sent; two events of one id are both recorded.
"""

import base64
import json
from typing import Any

import pytest

from eventflow.core.clock import SECOND, SystemClock
from tests.triggers.hooks import Hook, over_http
from tests.triggers.serving import digest
from triggers.signatures import (
    Bearer,
    GitHub,
    GitLab,
    MLflow,
    Shopify,
    Slack,
    StandardWebhooks,
    Stripe,
    Vendor,
)

SECRET = "s3cret"
STANDARD_SECRET = "whsec_" + base64.b64encode(SECRET.encode() * 4).decode()

Request = tuple[dict[str, Any], dict[str, str]]
"""A body and the sender's headers."""


def shopify(topic: str, event: str, delivery: str, **body: Any) -> Request:
    return body, {
        "x-shopify-topic": topic,
        "x-shopify-event-id": event,
        "x-shopify-webhook-id": delivery,
    }


def gitlab(body: dict[str, Any], **headers: str) -> Request:
    named = {f"x-gitlab-{name.replace('_', '-')}": value for name, value in headers.items()}
    return body, {"x-gitlab-token": SECRET, **named}


def sign(verify: Any, content: bytes, given: dict[str, str]) -> dict[str, str]:
    """The headers of a preset's signature at this time; none for those of a token."""
    mac = digest(SECRET.encode(), content)
    stamp = str(SystemClock().now() // SECOND)
    match getattr(verify, "vendor", None):
        case Vendor(name="Slack"):
            mac = digest(SECRET.encode(), f"v0:{stamp}:".encode(), content)
            return {
                "x-slack-signature": f"v0={mac.hex()}",
                "x-slack-request-timestamp": stamp,
            }
        case Vendor(name="MLflow"):
            signed = f"{given['x-mlflow-delivery-id']}.{stamp}.".encode()
            mac = digest(SECRET.encode(), signed, content)
            return {
                "x-mlflow-signature": f"v1,{base64.b64encode(mac).decode()}",
                "x-mlflow-timestamp": stamp,
            }
        case Vendor(name="StandardWebhooks"):
            family = "svix" if "svix-id" in given else "webhook"
            signed = f"{given[f'{family}-id']}.{stamp}.".encode()
            mac = digest(SECRET.encode() * 4, signed, content)
            return {
                f"{family}-signature": f"v1,{base64.b64encode(mac).decode()}",
                f"{family}-timestamp": stamp,
            }
        case Vendor(name="Shopify"):
            return {"x-shopify-hmac-sha256": base64.b64encode(mac).decode()}
        case Vendor(name="GitHub"):
            return {"x-hub-signature-256": f"sha256={mac.hex()}"}
        case _:
            return {}


ORDER = {"id": 820982911946154508, "name": "#9999"}

SENDERS: dict[str, tuple[Any, list[Request], list[Request]]] = {
    # preset, events that are all different, repetitions of the first one
    "shopify: topics of one action": (
        Shopify(SECRET),
        [
            shopify("orders/create", "e1", "w1", **ORDER),
            shopify("orders/updated", "e1", "w2", **ORDER),
            shopify("orders/paid", "e1", "w3", **ORDER, paid=True),
            shopify("orders/create", "e2", "w4", **ORDER),
        ],
        [
            shopify("orders/create", "e1", "w1", **ORDER),
            shopify("orders/create", "e1", "w5", **ORDER),  # of a second subscription
        ],
    ),
    "shopify: without an event id": (
        Shopify(SECRET),
        [
            (ORDER, {"x-shopify-topic": "orders/create", "x-shopify-webhook-id": "w1"}),
            (ORDER, {"x-shopify-topic": "orders/create", "x-shopify-webhook-id": "w2"}),
        ],
        [(ORDER, {"x-shopify-topic": "orders/create", "x-shopify-webhook-id": "w1"})],
    ),
    "gitlab: events of one chain": (
        GitLab(SECRET),
        [
            gitlab({"object_kind": "push", "ref": "main"}, event_uuid="u1", webhook_uuid="r1"),
            gitlab({"object_kind": "pipeline", "id": 1}, event_uuid="u1", webhook_uuid="r2"),
            gitlab({"object_kind": "pipeline", "id": 2}, event_uuid="u1", webhook_uuid="r3"),
        ],
        [gitlab({"object_kind": "push", "ref": "main"}, event_uuid="u1", webhook_uuid="r4")],
    ),
    "gitlab: with idempotency keys": (
        GitLab(SECRET),
        [
            ({"object_kind": "push"}, {"x-gitlab-token": SECRET, "idempotency-key": "k1"}),
            ({"object_kind": "push"}, {"x-gitlab-token": SECRET, "idempotency-key": "k2"}),
        ],
        [({"object_kind": "push"}, {"x-gitlab-token": SECRET, "idempotency-key": "k1"})],
    ),
    "github: deliveries": (
        GitHub(SECRET),
        [
            ({"ref": "main"}, {"x-github-event": "push", "x-github-delivery": "g1"}),
            ({"ref": "main"}, {"x-github-event": "push", "x-github-delivery": "g2"}),
        ],
        [({"ref": "main"}, {"x-github-event": "push", "x-github-delivery": "g1"})],
    ),
    "slack: events of one team, and a retry": (
        Slack(SECRET),
        [
            ({"event_id": "Ev1", "event": {"type": "message"}}, {}),
            ({"event_id": "Ev2", "event": {"type": "message"}}, {}),
        ],
        [
            (
                {"event_id": "Ev1", "event": {"type": "message"}},
                {"x-slack-retry-num": "1", "x-slack-retry-reason": "http_timeout"},
            )
        ],
    ),
    "mlflow: deliveries": (
        MLflow(SECRET),
        [
            ({"entity": "model_version", "action": "created"}, {"x-mlflow-delivery-id": "d1"}),
            ({"entity": "model_version", "action": "created"}, {"x-mlflow-delivery-id": "d2"}),
        ],
        [({"entity": "model_version", "action": "created"}, {"x-mlflow-delivery-id": "d1"})],
    ),
    "standard webhooks: messages, in either family": (
        StandardWebhooks(STANDARD_SECRET),
        [
            ({"type": "invoice.paid"}, {"webhook-id": "m1"}),
            ({"type": "invoice.paid"}, {"webhook-id": "m2"}),
            ({"type": "invoice.paid"}, {"svix-id": "m3"}),
        ],
        [
            ({"type": "invoice.paid"}, {"webhook-id": "m1"}),
            ({"type": "invoice.paid"}, {"svix-id": "m3"}),
        ],
    ),
    "cloudevents ids of two sources": (
        "none",
        [
            ({"n": 1}, {"ce-id": "1", "ce-source": "/a"}),
            ({"n": 2}, {"ce-id": "1", "ce-source": "/b"}),
        ],
        [({"n": 1}, {"ce-id": "1", "ce-source": "/a"})],
    ),
    "cloudevents whose sources and ids have slashes": (
        "none",
        [
            ({}, {"ce-id": "b/c", "ce-source": "/a"}),
            ({}, {"ce-id": "c", "ce-source": "/a/b"}),
            ({}, {"ce-id": "b%2Fc", "ce-source": "/a"}),
        ],
        [({}, {"ce-id": "b/c", "ce-source": "/a"})],
    ),
    "sns messages": (
        Bearer(SECRET),
        [
            ({"n": 1}, {"authorization": f"Bearer {SECRET}", "x-amz-sns-message-id": "m1"}),
            ({"n": 1}, {"authorization": f"Bearer {SECRET}", "x-amz-sns-message-id": "m2"}),
        ],
        [({"n": 1}, {"authorization": f"Bearer {SECRET}", "x-amz-sns-message-id": "m1"})],
    ),
}


@pytest.mark.parametrize("name", SENDERS)
def test_one_id_is_one_event(name: str):
    """Events that share what the sender calls an id are all recorded; a repetition of any delivery
    is a duplicate.
    """
    verify, events, repetitions = SENDERS[name]

    async def check(hook: Hook) -> None:
        async def send(request: Request) -> int:
            content = json.dumps(request[0]).encode()
            headers = {**request[1], **sign(verify, content, request[1])}
            return (await hook.post(content, **headers)).status_code

        assert [await send(each) for each in events] == [202] * len(events)
        assert [await send(each) for each in repetitions] == [200] * len(repetitions)
        assert [event.data for event in hook.events] == [body for body, _ in events]

    over_http(check, verify=verify)


def test_a_number_may_be_an_id():
    """Numbers as senders write them are ids, so that a repetition starts nothing; a boolean and an
    empty text are none.
    """

    async def check(hook: Hook) -> None:
        for number, ident in (("7", "7"), ("1.5", "1.5"), ("7.0", "7.0"), ("2e3", "2000.0")):
            body = f'{{"order": {{"id": {number}}}}}'
            answers = [await hook.post(body), await hook.post(body)]
            assert [answer.status_code for answer in answers] == [202, 200]
            assert answers[0].json()["event_id"] == ident
        for nothing in ("true", '""', "null", "[]"):
            body = f'{{"order": {{"id": {nothing}}}}}'
            assert [(await hook.post(body)).status_code for _ in range(2)] == [202, 202]

    over_http(check, id="order.id")


def test_a_stripe_event_is_the_same_in_each_delivery():
    """`pending_webhooks` counts the deliveries that are left: another count is no other event."""

    async def check(hook: Hook) -> None:
        for pending, status in ((2, 202), (1, 200), (0, 200)):
            body = {"id": "evt_1", "type": "invoice.paid", "pending_webhooks": pending}
            content = json.dumps(body).encode()
            stamp = str(SystemClock().now() // SECOND)
            mac = digest(SECRET.encode(), f"{stamp}.".encode(), content).hex()
            answer = await hook.post(content, stripe_signature=f"t={stamp},v1={mac}")
            assert answer.status_code == status, answer.text
        assert hook.event.data == {"id": "evt_1", "type": "invoice.paid"}

    over_http(check, verify=Stripe(SECRET))
