"""The webhook trigger over real HTTP: what it answers, what it records, and that the answer follows
the record.
"""

import asyncio
import base64
import json
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Mount

from eventflow.core.errors import StoreFailed, StoreFull, UsageError
from eventflow.events.event import Event, Trigger, Undecodable
from eventflow.testing.trigger_contract import CONTRACT, ContractLedger, Promise, listening
from tests.conftest import eventually
from tests.triggers.hooks import Hook, WebhookHarness, over_http
from tests.triggers.serving import digest, now, post, raw, serving
from triggers.http_request import read_headers
from triggers.signatures import (
    HMAC,
    Bearer,
    GitHub,
    MLflow,
    Shopify,
    Slack,
    StandardWebhooks,
    Stripe,
)
from triggers.webhook import Webhook

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


# --------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("promise", CONTRACT)
def test_contract(promise: Promise):
    """What holds for every trigger holds for webhooks."""
    asyncio.run(promise(WebhookHarness()))


def test_name_is_stable():
    """The name follows from the path alone, and may be given."""
    assert Webhook("/a/b", verify="none").name == "webhook-a-b"
    assert Webhook("/a/b", verify="none", name="orders").name == "orders"
    assert isinstance(Webhook("/a", verify="none"), Trigger)


# --------------------------------------------------------------------------- answers


def test_p1_new_event_is_202_with_ids():
    """A new event is answered 202 with its ledger id and the sender's, and is in the ledger as
    sent.
    """

    async def check(hook: Hook) -> None:
        answer = await hook.post({"total": 5}, idempotency_key="k1")
        assert answer.status_code == 202 and answer.headers["content-type"] == "application/json"
        assert answer.json() == {"id": "0000000000001", "event_id": "k1", "duplicate": False}
        event = hook.event
        assert (event.id, event.source, event.type, event.data) == (
            "k1",
            "/hooks/orders",
            "webhook.received",
            {"total": 5},
        )
        assert event.datacontenttype == "application/json" and event.extensions == {}

    over_http(check)


def test_known_event_is_200_with_the_first_ids():
    """The same id and body again is answered 200 with the first one's ids, and recorded once."""

    async def check(hook: Hook) -> None:
        first = (await hook.post({"total": 5}, idempotency_key="k1")).json()
        again = await hook.post({"total": 5}, idempotency_key="k1")
        assert again.status_code == 200
        assert again.json() == {**first, "duplicate": True}
        assert len(hook.recorded) == 1

    over_http(check)


def test_known_id_with_another_body_is_409():
    """The same id with another body is answered 409; the first one is kept."""

    async def check(hook: Hook) -> None:
        await hook.post({"total": 5}, idempotency_key="k1")
        answer = await hook.post({"total": 6}, idempotency_key="k1")
        assert (
            answer.status_code == 409
            and answer.json()["error"] == "conflict"
            and "k1" in answer.json()["detail"]
        )
        assert hook.event.data == {"total": 5}

    over_http(check)


def test_conflict_logs_both_digests():
    """A conflict is logged with the digests of both contents."""
    with structlog.testing.capture_logs() as lines:

        async def check(hook: Hook) -> None:
            await hook.post({"total": 5}, idempotency_key="k1")
            await hook.post({"total": 6}, idempotency_key="k1")

        over_http(check)
    (line,) = [line for line in lines if line["event"] == "webhook.refused"]
    assert (
        line["event_id"] == "k1"
        and line["status"] == 409
        and line["first_digest"] != line["this_digest"]
        and line["log_level"] == "warning"
    )


def test_concurrent_deliveries_are_one_event():
    """The same delivery three times at once starts one event, and all answers are 2xx with the same
    ids.
    """

    async def check(hook: Hook) -> None:
        answers = await asyncio.gather(
            *(hook.post({"total": 5}, webhook_id="w1") for _ in range(3))
        )
        assert sorted(answer.status_code for answer in answers) == [200, 200, 202]
        assert {answer.json()["id"] for answer in answers} == {"0000000000001"}
        assert len(hook.recorded) == 1

    over_http(check)


def test_success_status_is_the_apps():
    """`success_status` is the status of the response to a new event, for senders that need 200."""

    async def check(hook: Hook) -> None:
        assert (await hook.post({})).status_code == 200

    over_http(check, success_status=200)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
def test_other_methods_are_405(method: str):
    """Any other method is answered 405, with what is allowed."""

    async def check(hook: Hook) -> None:
        answer = await hook.client.request(method, "/hooks/orders")
        assert answer.status_code == 405 and answer.headers["allow"] == "POST"
        assert method == "HEAD" or answer.json()["error"] == "method_not_allowed"

    over_http(check)


@pytest.mark.parametrize("when", ["before", "after"])
def test_p10_not_listening_is_503(when: str):
    """Before the trigger listens and after its stop the answer is 503 with Retry-After, and the
    connection closes.
    """

    async def main() -> None:
        trigger, ledger = Webhook("/orders", verify="none"), ContractLedger()
        async with serving(trigger.routes) as port:
            if when == "after":
                async with listening(trigger, ledger):
                    pass
            status, headers, body = await raw(
                port, post("/hooks/orders", b"{}", ("Content-Type", "application/json"))
            )
            assert (
                status == 503
                and headers["connection"] == "close"
                and 1 <= int(headers["retry-after"]) <= 30
            )
            assert json.loads(body)["error"] == "unavailable"
            assert ledger.offered == []

    asyncio.run(main())


def test_p10_store_failure_is_503():
    """A failed store is answered 503: the outcome is unknown, the sender tries again with the same
    id.
    """

    async def check(hook: Hook) -> None:
        hook.ledger.error = StoreFailed("disk I/O error")
        answer = await hook.post({})
        assert answer.status_code == 503 and "retry-after" in answer.headers
        assert "I/O" not in answer.text

    over_http(check)


@pytest.mark.parametrize(
    ("disk", "status", "error"), [(False, 503, "overloaded"), (True, 507, "disk_full")]
)
def test_p8_full_ledger_is_waited_for_then_refused(disk: bool, status: int, error: str):
    """A ledger that stays full is waited for 2 s; then the answer is 503 (507 for the disk) with
    the ledger's Retry-After.
    """

    async def check(hook: Hook) -> None:
        hook.ledger.error = StoreFull("full", 6.2, disk=disk)
        started = asyncio.get_running_loop().time()
        answer = await hook.post({})
        assert asyncio.get_running_loop().time() - started >= 2.0
        assert (
            answer.status_code == status
            and answer.headers["retry-after"] == "7"
            and answer.json()["error"] == error
        )

    over_http(check)


def test_p8_room_within_the_wait_is_taken():
    """When the ledger has room within 2 s, the waiting request is recorded and answered 202."""

    async def check(hook: Hook) -> None:
        hook.ledger.error = StoreFull("full", 5)
        waiting = asyncio.create_task(hook.post({}))
        await eventually(lambda: hook.ledger.refused_calls >= 2, "the request has tried twice")
        hook.ledger.error = None
        assert (await waiting).status_code == 202

    over_http(check)


def test_p8_a_drain_ends_the_wait():
    """A request that waits for a full ledger is answered 503 at once when the server drains."""

    async def check(hook: Hook) -> None:
        hook.ledger.error = StoreFull("full", 5)
        waiting = asyncio.create_task(hook.post({}))
        await eventually(lambda: hook.ledger.refused_calls >= 2, "the request has tried twice")
        hook.ledger.error = StoreFull("the server is stopping", 5, closing=True)
        response = await waiting
        assert response.status_code == 503 and response.json()["error"] == "unavailable"
        assert int(response.headers["retry-after"]) >= 1 and hook.ledger.recorded == {}

    over_http(check)


def test_unknown_path_is_404():
    """Unknown paths are 404, and one with a slash too many is not redirected."""

    async def check(hook: Hook) -> None:
        for path in ("/hooks/other", "/hooks/orders/", "/orders"):
            assert (await hook.client.post(path, content=b"{}")).status_code == 404

    over_http(check)


def test_mounted_elsewhere():
    """The same routes under another app's prefix serve the same events with the same source."""

    async def main() -> None:
        trigger, ledger = Webhook("/orders", verify="none"), ContractLedger()
        mounted = [Mount("/inner", app=Starlette(routes=trigger.routes))]
        async with serving(mounted) as port, listening(trigger, ledger):  # type: ignore[arg-type]
            assert (await raw(port, post("/inner/hooks/orders", b"{}")))[0] == 202
        ((source, _),) = ledger.recorded
        assert source == "/hooks/orders"

    asyncio.run(main())


# --------------------------------------------------------------------------- ids, types, extensions


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"webhook-id": "w", "ce-id": "c", "x-github-delivery": "g", "idempotency-key": "i"}, "w"),
        ({"ce-id": "c", "x-github-delivery": "g", "idempotency-key": "i"}, "c"),
        ({"X-GitHub-Delivery": "g", "idempotency-key": "i"}, "g"),
        ({"Idempotency-Key": "i"}, "i"),
    ],
)
def test_ids_in_their_order(headers: dict[str, str], expected: str):
    """The id is the first of webhook-id, ce-id, X-GitHub-Delivery and Idempotency-Key."""

    async def check(hook: Hook) -> None:
        assert (await hook.post({}, **headers)).json()["event_id"] == expected

    over_http(check)


def test_without_an_id_each_post_is_an_event():
    """Identical bodies without any id are different events."""

    async def check(hook: Hook) -> None:
        answers = [await hook.post({"total": 5}) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [202] * 3
        assert len({answer.json()["event_id"] for answer in answers}) == 3

    over_http(check)


@pytest.mark.parametrize(
    ("ident", "expected"),
    [
        ("order.id", "o-7"),
        ("number", "12"),
        (lambda headers, body: headers["x-tenant"] + str(len(body)), "t38"),
        (lambda headers, body: None, "fallback"),
    ],
)
def test_id_from_the_app(ident: Any, expected: str):
    """`id=` takes a path into the body or a function of headers and raw body; None falls back to
    the headers.
    """

    async def check(hook: Hook) -> None:
        body = b'{"order": {"id": "o-7"}, "number": 12}'
        assert len(body) == 38
        assert (await hook.post(body, x_tenant="t", idempotency_key="fallback")).json()[
            "event_id"
        ] == expected

    over_http(check, id=ident)


def raises(headers: Any, body: bytes) -> str:
    raise KeyError("order_id")


@pytest.mark.parametrize(
    "ident",
    [
        raises,
        lambda headers, body: "\ud800",
        lambda headers, body: "x" * 1025,
        lambda headers, body: body[:5],  # without an error, each repetition would be a new event
        lambda headers, body: True,
    ],
)
def test_p9_a_failing_id_function_is_a_dead_letter(ident: Any):
    """What the app's `id=` cannot read is kept as a dead letter and answered 400, not 500."""

    async def check(hook: Hook) -> None:
        answer = await hook.post(b'{"total": 5}')
        assert answer.status_code == 400 and answer.json()["detail"].startswith("id: ")
        (item,) = hook.recorded
        assert isinstance(item, Undecodable) and item.body == b'{"total": 5}'

    over_http(check, id=ident)


@given(st.lists(st.tuples(st.sampled_from([b"a", b"A", b"b-c"]), st.binary(max_size=3))))
def test_the_first_header_of_a_name_counts(raw_headers: list[tuple[bytes, bytes]]):
    """Headers are by lower-case name, the first one of each; names that are repeated are known."""
    headers, repeated = read_headers(raw_headers)
    names = [name.decode("latin-1").lower() for name, _ in raw_headers]
    assert list(headers) == list(dict.fromkeys(names))
    assert all(
        headers[name].encode("latin-1") == raw_headers[names.index(name)][1] for name in names
    )
    assert repeated == {name for name in names if names.count(name) > 1}


def test_repeated_id_headers_are_refused():
    """Two ids in one request could be read differently: 400, and kept."""

    async def check(hook: Hook) -> None:
        request = post("/hooks/orders", b"{}", ("Idempotency-Key", "a"), ("Idempotency-Key", "b"))
        assert (await raw(hook.port, request))[0] == 400

    over_http(check)


def test_type_source_and_kept_headers():
    """`type=`, `source=` and `keep=` shape the event; kept headers become lower-case alphanumeric
    extensions.
    """

    async def check(hook: Hook) -> None:
        await hook.post({}, X_Tenant_Id="t1", cookie="session=1")
        event = hook.event
        assert (event.type, event.source) == ("order.placed", "urn:shop")
        assert event.extensions == {"xtenantid": "t1"}

    over_http(check, type="order.placed", source="urn:shop", keep=["X-Tenant-Id"])


@pytest.mark.parametrize("header", ["Authorization", "Cookie", "X-Sign", "---"])
def test_credentials_cannot_be_kept(header: str):
    """Headers that prove who the sender is are refused in `keep=`."""
    with pytest.raises(UsageError, match="without credentials"):
        Webhook("/orders", verify=HMAC("secret", header="X-Sign"), keep=[header])


@pytest.mark.parametrize("path", ["orders", "", "/", "/a/", "/{id}", "/a b", "/ä", "//", "/a?b"])
def test_paths_are_plain(path: str):
    """A path is one that cannot be mistaken for another one."""
    with pytest.raises(UsageError, match="expected a path"):
        Webhook(path, verify="none")


def test_verify_is_written_out():
    """There is no unverified webhook by omission, by None, or by a typo."""
    with pytest.raises(UsageError, match="verify="):
        Webhook("/orders")  # type: ignore[call-arg]
    for wrong in (None, "None", "", "secret"):
        with pytest.raises(UsageError, match="written out"):
            Webhook("/orders", verify=wrong)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- vendors


def standard(body: bytes, ident: str = "msg_1", family: str = "webhook") -> dict[str, str]:
    stamp = str(now())
    signed = digest(bytes(range(32)), f"{ident}.{stamp}.".encode(), body)
    return {
        f"{family}-id": ident,
        f"{family}-timestamp": stamp,
        f"{family}-signature": "v1," + base64.b64encode(signed).decode(),
    }


def slack(body: bytes) -> dict[str, str]:
    stamp = str(now())
    signature = "v0=" + digest(b"s3cret", f"v0:{stamp}:".encode(), body).hex()
    return {"x-slack-signature": signature, "x-slack-request-timestamp": stamp}


def stripe(body: bytes) -> dict[str, str]:
    stamp = str(now())
    signature = digest(b"s3cret", stamp.encode(), b".", body)
    return {"stripe-signature": f"t={stamp},v1={signature.hex()},v0=00"}


def mlflow(body: bytes) -> dict[str, str]:
    stamp = str(now())
    signature = base64.b64encode(digest(b"s3cret", f"d1.{stamp}.".encode(), body)).decode()
    return {
        "x-mlflow-signature": f"v1,{signature}",
        "x-mlflow-delivery-id": "d1",
        "x-mlflow-timestamp": stamp,
    }


def github(body: bytes) -> dict[str, str]:
    signature = "sha256=" + digest(b"s3cret", body).hex()
    return {"x-hub-signature-256": signature, "x-github-event": "push", "x-github-delivery": "g1"}


def shopify(body: bytes) -> dict[str, str]:
    signature = base64.b64encode(digest(b"s3cret", body)).decode()
    return {
        "x-shopify-hmac-sha256": signature,
        "x-shopify-topic": "orders/create",
        "x-shopify-event-id": "s1",
    }


@pytest.mark.parametrize(
    ("verify", "sign", "body", "ident", "kind"),
    [
        (
            StandardWebhooks(SECRET),
            standard,
            {"type": "invoice.paid", "data": {}},
            "msg_1",
            "invoice.paid",
        ),
        (
            StandardWebhooks(SECRET),
            standard,
            {"type": "no type at all"},
            "msg_1",
            "webhook.received",
        ),
        (GitHub("s3cret"), github, {"ref": "main"}, "g1", "com.github.push"),
        (
            Stripe("s3cret"),
            stripe,
            {"id": "evt_1", "type": "invoice.paid"},
            "evt_1",
            "com.stripe.invoice.paid",
        ),
        (
            Slack("s3cret"),
            slack,
            {"event_id": "Ev1", "event": {"type": "message"}},
            "Ev1",
            "com.slack.message",
        ),
        (
            Shopify("s3cret"),
            shopify,
            {"total": 1},
            "s1/orders/create",
            "com.shopify.orders.create",
        ),
        (
            MLflow("s3cret"),
            mlflow,
            {"entity": "model_version", "action": "created"},
            "d1",
            "org.mlflow.model_version.created",
        ),
    ],
)
def test_vendors_over_http(verify: Any, sign: Any, body: dict[str, Any], ident: str, kind: str):
    """Each vendor's signed request becomes an event with the vendor's id and type; one flipped byte
    makes it a 401.
    """
    content = json.dumps(body).encode()

    async def check(hook: Hook) -> None:
        answer = await hook.post(content, **sign(content))
        assert answer.status_code == 202 and answer.json()["event_id"] == ident
        assert hook.event.type == kind and hook.event.data == body
        forged = await hook.post(content.replace(b"{", b"{ ", 1), **sign(content))
        assert forged.status_code == 401
        assert forged.json() == {
            "error": "unauthorized",
            "detail": "the request could not be verified",
        }
        assert len(hook.ledger.offered) == 1

    over_http(check, verify=verify)


def test_slack_challenge_is_answered():
    """Slack's url_verification, signed, is answered with its challenge and records nothing;
    unsigned it is a 401.
    """
    body = b'{"type": "url_verification", "challenge": "3eZbrw1aB"}'

    async def check(hook: Hook) -> None:
        answer = await hook.post(body, **slack(body))
        assert (answer.status_code, answer.text) == (200, "3eZbrw1aB")
        assert answer.headers["content-type"].startswith("text/plain")
        assert (await hook.post(body)).status_code == 401
        assert hook.ledger.offered == []

    over_http(check, verify=Slack("s3cret"))


def test_forged_id_of_another_family_changes_nothing():
    """A replayed svix delivery with an unsigned webhook-id added is still the same event."""
    body = b'{"type": "a"}'

    async def check(hook: Hook) -> None:
        headers = standard(body, family="svix")
        assert (await hook.post(body, **headers)).status_code == 202
        again = await hook.post(body, **headers, webhook_id="other")
        assert again.status_code == 200 and again.json()["event_id"] == "msg_1"

    over_http(check, verify=StandardWebhooks(SECRET))


def test_refusals_are_logged_with_the_reason_once_a_second():
    """The log has the reason of a rejection; a flood of forgeries is one line a second, with a
    count.
    """
    with structlog.testing.capture_logs() as lines:

        async def check(hook: Hook) -> None:
            for _ in range(20):
                assert (
                    await hook.post({}, authorization="Bearer wrong-token-value")
                ).status_code == 401

        over_http(check, verify=Bearer("right"))
    refused = [line for line in lines if line["event"] == "webhook.refused"]
    assert 1 <= len(refused) < 20 and refused[0]["reason"] == "wrong token"
    assert "wrong-token-value" not in str(lines) and "right" not in str(lines)


# --------------------------------------------------------------------------- CloudEvents


def test_cloudevents_binary():
    """A binary CloudEvent keeps its attributes, percent-decoded."""

    async def check(hook: Hook) -> None:
        headers = {
            "ce-specversion": "1.0",
            "ce-id": "1",
            "ce-source": "/s",
            "ce-type": "t",
            "ce-subject": "caf%C3%A9%20noir",
        }
        assert (await hook.post({"a": 1}, **headers)).status_code == 202
        event = hook.event
        assert (event.id, event.source, event.type, event.subject, event.data) == (
            "1",
            "/s",
            "t",
            "café noir",
            {"a": 1},
        )

    over_http(check)


def test_cloudevents_binary_without_id_is_400():
    """A missing ce-id is named, and the message is kept as a dead letter."""

    async def check(hook: Hook) -> None:
        answer = await hook.post(
            {"a": 1}, **{"ce-specversion": "1.0", "ce-source": "/s", "ce-type": "t"}
        )
        assert answer.status_code == 400 and answer.json()["detail"].startswith("id: ")
        assert isinstance(hook.recorded[0], Undecodable)

    over_http(check)


def test_cloudevents_batch_is_atomic():
    """A batch is recorded as a whole, or, with one invalid event in it, not at all."""
    events: list[dict[str, Any]] = [
        {"specversion": "1.0", "id": str(n), "source": "/s", "type": "t"} for n in range(3)
    ]

    async def check(hook: Hook) -> None:
        content_type = "application/cloudevents-batch+json"
        broken = json.dumps([*events[:2], {**events[2], "id": ""}]).encode()
        refused = await hook.post(broken, content_type=content_type)
        assert refused.status_code == 400 and refused.json()["detail"].startswith("[2].id")
        assert not [item for item in hook.recorded if isinstance(item, Event)]
        answer = await hook.post(json.dumps(events).encode(), content_type=content_type)
        assert answer.status_code == 202 and [row["event_id"] for row in answer.json()] == [
            "0",
            "1",
            "2",
        ]
        assert (await hook.post(b"[]", content_type=content_type)).json() == []
        again = await hook.post(json.dumps(events).encode(), content_type=content_type)
        assert again.status_code == 200 and all(row["duplicate"] for row in again.json())

    over_http(check)


def test_signed_id_goes_before_an_unsigned_ce_id():
    """A signed delivery replayed with another ce-id is still the same event."""
    body = b'{"a": 1}'

    async def check(hook: Hook) -> None:
        ce = {"ce-specversion": "1.0", "ce-source": "/s", "ce-type": "t"}
        headers = standard(body)
        assert (await hook.post(body, **ce, **headers, **{"ce-id": "1"})).json()[
            "event_id"
        ] == "msg_1"
        assert (await hook.post(body, **ce, **headers, **{"ce-id": "2"})).status_code == 200

    over_http(check, verify=StandardWebhooks(SECRET))


def test_vendor_requests_are_never_cloudevents():
    """A vendor's signature covers the body alone: unsigned ce-* headers on it change nothing."""

    async def check(hook: Hook) -> None:
        ce = {"ce-specversion": "1.0", "ce-id": "x", "ce-source": "/forged", "ce-type": "forged"}
        await hook.post(b"{}", **github(b"{}"), **ce)
        assert (hook.event.id, hook.event.source, hook.event.type) == (
            "g1",
            "/hooks/orders",
            "com.github.push",
        )

    over_http(check, verify=GitHub("s3cret"))
