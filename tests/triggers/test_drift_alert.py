"""Alerts of other monitors over real HTTP: one typed event each, repeats as duplicates, and what
cannot be read kept with why.

`drift_reports/` holds what evidently 0.7.23 and nannyml 0.13.1 really wrote:
`Report([DataDriftPreset()]).run(current, reference).json()` over 500 rows, with and without a shift
of one sigma in `amount` and other shares of `country`; and
`UnivariateDriftCalculator(...).calculate(...).to_df(multilevel=False).to_json(orient="records",
date_format="iso")`.
"""

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from eventflow import App, flow
from eventflow.core.errors import UsageError
from eventflow.events.event import Event, Undecodable
from eventflow.testing import drain, running
from eventflow.testing.trigger_contract import CONTRACT, Item, Promise
from tests.conftest import eventually
from tests.triggers.hooks import Hook, HttpHarness, posting, serving_hook
from tests.triggers.serving import digest, now, serving
from triggers import Drift, DriftAlert, MLflow, Token
from triggers._drift.schema import to_event
from triggers._drift.senders import parse_message
from triggers.drift import parse_alerts

REPORTS = Path(__file__).parent / "drift_reports"
TOPIC = "arn:aws:sns:eu-west-1:123456789012:drift"


def alert(
    status: str = "firing", *, starts: str = "2026-11-22T10:00:00Z", **labels: str
) -> dict[str, Any]:
    """One alert as Alertmanager 0.25 sends it."""
    named = {
        "alertname": "FeatureDrift",
        "model": "prices",
        "feature": "amount",
        "metric": "psi",
        "severity": "Critical",
    } | labels
    return {
        "status": status,
        "labels": named,
        "annotations": {"value": "0.31", "threshold": "0.2", "summary": "amount has drifted"},
        "startsAt": starts,
        "endsAt": "2026-11-22T11:00:00Z" if status == "resolved" else "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus:9090/graph?g0.expr=psi",
        "fingerprint": f"fp-{named['feature']}",
    }


def group(*alerts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "version": "4",
        "groupKey": '{}:{alertname="FeatureDrift"}',
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "eventflow",
        "groupLabels": {},
        "commonLabels": {},
        "commonAnnotations": {},
        "externalURL": "http://alertmanager:9093",
        "alerts": list(alerts),
    } | more


def drift_of(hook: Hook) -> Drift:
    """The data of the only event; there may be dead letters as well."""
    (event,) = hook.events
    return msgspec.convert(event.data, Drift)


def over_http(test: Callable[[Hook], Awaitable[None]], **options: Any) -> None:
    posting(DriftAlert("/drift", **{"verify": "none", **options}), test)


# --------------------------------------------------------------------------- the contract


class AlertHarness(HttpHarness):
    """Alertmanagers, whose alerts are known by their feature."""

    def trigger(self) -> DriftAlert:
        self.endpoint = alerts = DriftAlert("/drift", verify="none")
        return alerts

    def body(self, key: str) -> Any:
        return group(alert(feature=key))

    def key(self, item: Item) -> str:
        assert isinstance(item, Event)
        return item.data["feature"]


@pytest.mark.parametrize("promise", CONTRACT)
def test_contract(promise: Promise):
    """What holds for every trigger."""
    asyncio.run(promise(AlertHarness()))


# --------------------------------------------------------------------------- Alertmanager, Grafana


def test_each_alert_of_a_group_is_one_event():
    """A group with firing and resolved alerts becomes one typed event for each, by their
    fingerprints.
    """

    async def test(hook: Hook) -> None:
        answer = await hook.post(group(alert(), alert("resolved", feature="age", segment="eu")))
        assert answer.status_code == 202 and len(answer.json()) == 2
        first, second = hook.events
        assert (first.type, first.subject, second.type) == (
            "drift.detected",
            "prices/amount",
            "drift.resolved",
        )
        drift = msgspec.convert(first.data, Drift)
        assert (drift.model, drift.feature, drift.metric, drift.severity) == (
            "prices",
            "amount",
            "psi",
            "critical",
        )
        assert (drift.statistic, drift.threshold, drift.fingerprint) == (0.31, 0.2, "fp-amount")
        assert (
            drift.starts_at is not None
            and drift.ends_at is None
            and drift.labels["alertname"] == "FeatureDrift"
        )
        assert (second.data["segment"], second.data["ends_at"]) == ("eu", "2026-11-22T11:00:00Z")

    over_http(test)


def test_a_repeat_is_a_duplicate_even_with_another_value():
    """What Alertmanager sends again is answered 200 and recorded once; a new start is a new alert,
    its end another event.
    """

    async def test(hook: Hook) -> None:
        assert (await hook.post(group(alert()))).status_code == 202
        again = await hook.post(
            group(alert() | {"annotations": {"value": "0.35", "threshold": "0.2"}})
        )
        assert again.status_code == 200 and again.json()[0]["duplicate"] is True
        assert (await hook.post(group(alert("resolved")))).status_code == 202
        assert (await hook.post(group(alert(starts="2026-11-22T12:00:00Z")))).status_code == 202
        assert [event.type for event in hook.events] == [
            "drift.detected",
            "drift.resolved",
            "drift.detected",
        ]

    over_http(test)


def test_one_broken_alert_takes_no_other_with_it():
    """The readable alerts of a group are events; an unreadable one is a dead letter that names what
    is missing.
    """

    async def test(hook: Hook) -> None:
        broken = alert(feature="age")
        del broken["startsAt"]
        assert (await hook.post(group(alert(), broken))).status_code == 202
        assert drift_of(hook).feature == "amount"
        (dead,) = hook.dead_letters
        assert "alerts/1/startsAt" in dead.error and json.loads(dead.body) == broken

    over_http(test)


def test_grafana():
    """Grafana's alerts carry their values, and its alert for missing data is one of no data."""

    async def test(hook: Hook) -> None:
        shown = alert() | {
            "values": {"B": 0.27},
            "annotations": {},
            "valueString": "[ var='B' value=0.27 ]",
        }
        silent = alert(alertname="DatasourceNoData", feature="age")
        body = group(
            shown,
            silent,
            version="1",
            orgId=1,
            title="[FIRING:2]",
            state="alerting",
            message="drift",
        )
        assert (await hook.post(body)).status_code == 202
        first, second = (msgspec.convert(event.data, Drift) for event in hook.events)
        assert (first.sender, first.statistic, second.status) == ("grafana", 0.27, "nodata")
        assert hook.events[1].type == "drift.nodata"

    over_http(test)


def test_pointers_over_a_known_sender():
    """`fields=` reads from elsewhere in each alert, and leaves the other fields to the sender's
    parser.
    """

    async def test(hook: Hook) -> None:
        assert (await hook.post(group(alert(feature="amount", column="total")))).status_code == 202
        assert (drift_of(hook).feature, drift_of(hook).segment, drift_of(hook).model) == (
            "total",
            None,
            "prices",
        )

    over_http(test, fields={"feature": "/labels/column", "segment": "/labels/region?"})


# --------------------------------------------------------------------------- reports


def test_an_evidently_report():
    """A real report of DataDriftPreset is one event: the worst column on top, each drifted one in
    the findings.
    """

    async def test(hook: Hook) -> None:
        body = {"model": "prices"} | json.loads((REPORTS / "evidently_drifted.json").read_text())
        assert (await hook.post(body)).status_code == 202
        drift = drift_of(hook)
        assert (drift.status, drift.sender, drift.model, drift.feature) == (
            "detected",
            "evidently",
            "prices",
            "country",
        )
        assert (drift.metric, drift.threshold, drift.share) == (
            "chi-square p_value",
            0.05,
            0.666667,
        )
        assert drift.p_value == pytest.approx(1.2558247997667371e-64)
        assert [(each.feature, each.metric) for each in drift.findings] == [
            ("country", "chi-square p_value"),
            ("amount", "K-S p_value"),
        ]
        assert (await hook.post(body)).status_code == 200
        stable = (REPORTS / "evidently_stable.json").read_bytes()
        assert (await hook.post(stable)).status_code == 202
        assert [event.type for event in hook.events] == ["drift.detected", "drift.resolved"]

    over_http(test)


def test_a_report_of_evidently_before_0_7():
    """The older form, with `drift_by_columns`, gives the same drift."""
    column = {
        "column_name": "age",
        "stattest_name": "Wasserstein distance (normed)",
        "stattest_threshold": 0.1,
    }
    columns = {
        "age": column | {"drift_score": 0.4, "drift_detected": True},
        "country": column
        | {"stattest_name": "chi-square p_value", "drift_score": 0.4, "drift_detected": False},
    }
    result = {
        "drift_share": 0.5,
        "share_of_drifted_columns": 0.5,
        "dataset_drift": True,
        "drift_by_columns": columns,
    }
    (drift,) = parse_alerts(
        json.dumps({"metrics": [{"metric": "DataDriftTable", "result": result}]}).encode()
    )
    assert (drift.status, drift.feature, drift.statistic, drift.features) == (
        "detected",
        "age",
        0.4,
        ["age"],
    )


def test_nannyml_chunks():
    """Real rows of NannyML are one event per chunk of the analysis; posting them all again starts
    nothing.
    """

    async def test(hook: Hook) -> None:
        rows = json.loads((REPORTS / "nannyml_chunks.json").read_text())
        assert (await hook.post({"model": "prices", "chunks": rows})).status_code == 202
        drifts = [msgspec.convert(event.data, Drift) for event in hook.events]
        assert [drift.segment for drift in drifts] == [row["chunk_key"] for row in rows]
        last = drifts[-1]
        assert (last.status, last.model, last.feature, last.features) == (
            "detected",
            "prices",
            "amount",
            ["amount", "country"],
        )
        assert (
            last.current is not None
            and last.current.start is not None
            and last.current.start.isoformat()[:10] == "2026-07-02"
        )
        assert (await hook.post({"model": "prices", "chunks": rows})).status_code == 200
        assert len(hook.events) == len(rows) == 4

    over_http(test)


# --------------------------------------------------------------------------- CloudWatch


def cloudwatch(state: str = "ALARM") -> dict[str, Any]:
    return {
        "AlarmName": "prices-amount-drift",
        "AlarmArn": "arn:aws:cloudwatch:eu-west-1:123456789012:alarm:prices-amount-drift",
        "NewStateValue": state,
        "OldStateValue": "OK",
        "StateChangeTime": "2026-11-22T10:00:00.000+0000",
        "NewStateReason": "Threshold Crossed: 1 datapoint [0.31 (22/11/26 09:59:00)] was greater "
        "than the threshold (0.2).",
        "Trigger": {
            "MetricName": "feature_baseline_drift_amount",
            "Namespace": "aws/sagemaker/Endpoints/data-metrics",
            "Dimensions": [
                {"name": "Endpoint", "value": "prices"},
                {"name": "MonitoringSchedule", "value": "daily"},
            ],
            "Threshold": 0.2,
        },
    }


def sns(kind: str, message: str, **more: str) -> dict[str, Any]:
    return {
        "Type": kind,
        "MessageId": "m-1",
        "TopicArn": TOPIC,
        "Message": message,
        "Timestamp": "2026-11-22T10:00:01Z",
    } | more


def test_sagemaker_through_sns():
    """Model Monitor's alarm inside a notification of SNS, which calls its JSON plain text, is the
    drift of one feature.
    """

    async def test(hook: Hook) -> None:
        notification = sns("Notification", json.dumps(cloudwatch()))
        assert (
            await hook.post(notification, content_type="text/plain; charset=UTF-8")
        ).status_code == 202
        assert (drift_of(hook).sender, drift_of(hook).model, drift_of(hook).feature) == (
            "sagemaker",
            "prices",
            "amount",
        )
        assert (drift_of(hook).statistic, drift_of(hook).threshold) == (0.31, 0.2)
        assert (await hook.post(notification | {"MessageId": "m-2"})).status_code == 200
        assert (
            await hook.post(sns("Notification", json.dumps(cloudwatch("INSUFFICIENT_DATA"))))
        ).status_code == 202
        assert hook.events[1].type == "drift.nodata"

    over_http(test)


def test_sagemaker_through_eventbridge():
    """The same alarm as EventBridge sends it, with the value that crossed the threshold."""
    metric = {
        "metric": {
            "namespace": "aws/sagemaker",
            "name": "feature_baseline_drift_amount",
            "dimensions": {"Endpoint": "prices"},
        }
    }
    state = {
        "value": "ALARM",
        "timestamp": "2026-11-22T10:00:00.000+0000",
        "reason": "Threshold Crossed",
        "reasonData": json.dumps({"recentDatapoints": [0.1, 0.31], "threshold": 0.2}),
    }
    body = {
        "version": "0",
        "id": "e-1",
        "detail-type": "CloudWatch Alarm State Change",
        "source": "aws.cloudwatch",
        "time": "2026-11-22T10:00:00Z",
        "resources": ["arn:aws:cloudwatch:eu-west-1:123456789012:alarm:prices"],
        "detail": {
            "alarmName": "prices",
            "state": state,
            "configuration": {"metrics": [{"id": "a", "metricStat": metric}]},
        },
    }
    (drift,) = parse_alerts(json.dumps(body).encode())
    assert (drift.status, drift.sender, drift.model, drift.feature) == (
        "detected",
        "sagemaker",
        "prices",
        "amount",
    )
    assert (drift.statistic, drift.threshold) == (0.31, 0.2)


def test_sns_asks_and_is_answered_for_known_topics_only():
    """The handshake visits SubscribeURL for a topic the app names, at SNS's own address alone;
    anything else is refused, and kept as one dead letter however often SNS asks.
    """
    visited: list[str] = []

    async def confirmed(request: Request) -> Response:
        visited.append(request.url.query)
        return Response("<ConfirmSubscriptionResponse/>")

    async def main() -> None:
        async with serving([Route("/", confirmed)]) as port:
            aws = f"http://127.0.0.1:{port}"
            async with serving_hook(
                DriftAlert("/drift", verify="none", topics=[TOPIC], sns=aws)
            ) as hook:
                asked = sns(
                    "SubscriptionConfirmation",
                    "…",
                    SubscribeURL=f"{aws}/?Action=ConfirmSubscription&Token=t",
                )
                assert (await hook.post(asked)).status_code == 200
                assert visited == ["Action=ConfirmSubscription&Token=t"]
                for _ in range(3):
                    assert (await hook.post(asked | {"TopicArn": TOPIC + "2"})).status_code == 403
                (letter,) = hook.ledger.recorded.values()
                assert isinstance(letter, Undecodable)
                assert "is not among topics=" in letter.error
                assert json.loads(letter.body)["TopicArn"] == TOPIC + "2"
                assert (
                    await hook.post(asked | {"SubscribeURL": f"http://localhost:{port}/?Token=t"})
                ).status_code == 403
            async with serving_hook(
                DriftAlert("/drift", verify="none", topics=[TOPIC])
            ) as hook:  # at Amazon: nothing else will do
                refused_urls = (
                    aws,
                    "https://sns.eu-west-1.amazonaws.com.evil.example/",
                    "https://sns.x@evil.example/",
                    "http://sns.eu-west-1.amazonaws.com/",
                    "https://sns.eu-west-1.amazonaws.com:8080/",
                )
                for url in refused_urls:
                    refused = await hook.post(
                        sns("SubscriptionConfirmation", "…", SubscribeURL=url)
                    )
                    assert refused.status_code == 403
                assert len(hook.ledger.recorded) == len(refused_urls)
        assert len(visited) == 1

    asyncio.run(main())


def test_sns_is_asked_for_its_password():
    """SNS sends the user and password of the endpoint's URL only when a 401 asks for them."""
    password = base64.b64encode(b"sns:s3cret").decode()

    async def test(hook: Hook) -> None:
        notification = sns("Notification", json.dumps(cloudwatch()))
        refused = await hook.post(notification)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (
            401,
            'Basic realm="hooks"',
        )
        assert (await hook.post(notification, authorization=f"Basic {password}")).status_code == 202

    over_http(test, verify=Token(password, header="authorization", prefix="Basic "))


# --------------------------------------------------------------------------- MLflow, everybody else


def test_mlflow_tags():
    """The tag `drift` on a model version, in a signed delivery, is a drift; what else the registry
    tells is set aside.
    """
    secret = "s3cret"

    async def test(hook: Hook) -> None:
        async def send(ident: str, kind: str, action: str, **data: str) -> int:
            body = json.dumps(
                {
                    "entity": kind,
                    "action": action,
                    "timestamp": "2026-11-22T10:00:00Z",
                    "data": data,
                }
            ).encode()
            stamp = str(now())
            mac = base64.b64encode(
                digest(secret.encode(), f"{ident}.{stamp}.".encode(), body)
            ).decode()
            signed = {
                "x_mlflow_signature": f"v1,{mac}",
                "x_mlflow_delivery_id": ident,
                "x_mlflow_timestamp": stamp,
            }
            return (await hook.post(body, **signed)).status_code

        tag = {"name": "prices", "version": "7", "key": "drift", "value": "0.31"}
        assert await send("d1", "model_version_tag", "set", **tag) == 202
        assert await send("d1", "model_version_tag", "set", **tag) == 200
        assert await send("d2", "model_version_tag", "set", **tag | {"key": "owner"}) == 200
        assert await send("d3", "model_version", "created", name="prices", version="8") == 200
        assert await send("d4", "model_version_tag", "deleted", **tag) == 202
        first, second = (msgspec.convert(event.data, Drift) for event in hook.events)
        assert (first.model, first.statistic, first.labels) == ("prices", 0.31, {"version": "7"})
        assert second.status == "resolved" and hook.dead_letters == []

    over_http(test, verify=MLflow(secret))


def test_our_own_schema():
    """A body with a model, a feature or a fingerprint is a drift; the same again is a
    duplicate.
    """

    async def test(hook: Hook) -> None:
        body = {
            "model": "prices",
            "feature": "amount",
            "metric": "psi",
            "statistic": 0.31,
            "fingerprint": "prices-2026-07",
        }
        assert (await hook.post(body)).status_code == 202
        assert (await hook.post(body | {"statistic": 0.33})).status_code == 200
        drift = drift_of(hook)
        assert (drift.status, drift.name, drift.features) == (
            "detected",
            "prices/amount",
            ["amount"],
        )

    over_http(test)


ARIZE = {
    "event": {
        "kind": "drift",
        "model": {"id": "prices"},
        "dims": [{"feature": "amount"}],
        "psi": "0.31",
    },
    "state": "triggered",
}
POINTERS = {
    "status": "/state",
    "model": "/event/model/id",
    "feature": "/event/dims/0/feature",
    "statistic": "/event/psi",
    "segment": "/event/segment?",
}


def test_fields_that_an_alert_does_not_have_are_a_warning():
    """A body of the own schema with other names says once in the log what is dropped."""
    with structlog.testing.capture_logs() as lines:

        async def check(hook: Hook) -> None:
            for drift in (0.4, 0.5):
                body = {"model": "m1", "feature": "age", "drift": drift}
                assert (await hook.post(body)).status_code == 202

        posting(DriftAlert("/drift", verify="none"), check)
    (line,) = [line for line in lines if line["event"] == "alert.fields_unknown"]
    assert line["fields"] == "drift" and "DriftAlert(fields=" in line["hint"]


def test_d17_another_shape_by_pointers():
    """A sender of any shape is normalised by JSON pointers; an absent field makes a
    dead letter that names it.
    """

    async def test(hook: Hook) -> None:
        assert (await hook.post(ARIZE)).status_code == 202
        assert (drift_of(hook).model, drift_of(hook).feature, drift_of(hook).statistic) == (
            "prices",
            "amount",
            0.31,
        )
        answer = await hook.post(ARIZE | {"event": {"kind": "drift", "model": {}, "dims": []}})
        assert answer.status_code == 400
        (dead,) = hook.dead_letters
        assert "/event/model/id" in dead.error and "model" in dead.error
        assert json.loads(dead.body)["event"]["model"] == {}

    over_http(test, fields=POINTERS)


def test_several_in_one_body_by_pointers():
    """`alerts=` points to the list, `fields=` into each."""

    async def test(hook: Hook) -> None:
        assert (
            await hook.post({"found": {"items": [{"f": "a"}, {"f": "b"}, {}]}})
        ).status_code == 202
        assert [event.data["feature"] for event in hook.events] == ["a", "b"]
        assert "'/f'" in hook.dead_letters[0].error

    over_http(test, fields={"feature": "/f"}, alerts="/found/items")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b'{"text": "something drifted"}', "text"),
        (b'{"version": "3", "groupKey": "k", "alerts": []}', '"4"'),
        (b"[1, 2]", "alert/0"),
        (b'"drift"', "object"),
        (b"not json", "line 1 column 1"),
        (b'{"metrics": []}', "DataDriftPreset"),
        (
            b'{"entity": "model_version_tag", "action": "set", '
            b'"data": {"key": "drift", "name": "m", "value": "maybe"}}',
            "maybe",
        ),
        (b'{"AlarmName": "a", "NewStateValue": "ALARM"}', "/StateChangeTime"),
        (b'{"Type": "Notification", "TopicArn": "t", "Message": "hello"}', "hello"),
        (b'{"model": "prices", "status": "perhaps"}', "perhaps"),
        (b'{"model": "prices", "starts_at": "yesterday"}', "starts_at"),
    ],
)
def test_unknown_shapes_are_dead_letters(body: bytes, named: str):
    """An unknown shape is a dead letter whose reason names what is missing; the same
    again is the same one.
    """

    async def test(hook: Hook) -> None:
        for _ in range(2):
            assert (await hook.post(body)).status_code in (400, 202, 200)
        assert hook.events == [] and len(hook.dead_letters) in (1, 2)
        assert named in hook.dead_letters[0].error
        assert len(hook.ledger.recorded) == len(hook.dead_letters)

    over_http(test)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """A JSON pointer into a value."""
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(place for key, each in inside for place in places(each, (*path, key)))]


def bent(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = bent(value[path[0]], path[1:], new)
    return changed


KNOWN: list[Any] = [
    group(alert(), alert("resolved")),
    group(alert() | {"values": {"B": 1}}, orgId=1),
    json.loads((REPORTS / "evidently_drifted.json").read_text()),
    {
        "metrics": [
            {
                "metric": "T",
                "result": {"drift_share": 0.5, "drift_by_columns": {"a": {"drift_score": 1}}},
            }
        ]
    },
    {"model": "m", "chunks": json.loads((REPORTS / "nannyml_chunks.json").read_text())[:1]},
    cloudwatch(),
    sns("Notification", json.dumps(cloudwatch())),
    {
        "detail-type": "t",
        "detail": {
            "alarmName": "a",
            "state": {"value": "OK", "reasonData": '{"recentDatapoints": [1]}'},
        },
        "resources": ["r"],
        "time": "2026-11-22T10:00:00Z",
    },
    {
        "entity": "model_version_tag",
        "action": "set",
        "data": {"key": "drift", "name": "m", "value": "0.3"},
    },
    {
        "model": "m",
        "labels": {"a": "b"},
        "findings": [{"feature": "f"}],
        "starts_at": "2026-11-22T10:00:00Z",
    },
]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.just([1]),
    st.just({"a": [None]}),
    st.just("0001-01-01T00:00:00+14:00"),
    st.just("9999-12-31T23:59:59-14:00"),
)


@settings(
    max_examples=600,
    deadline=None,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
)
@given(st.data())
def test_any_body_is_parsed_or_rejected_with_a_reason(data: st.DataObject):
    """A known body with anything in any place of it is drifts that can be recorded, or a
    ValueError: never another error.
    """
    body = data.draw(st.sampled_from(KNOWN))
    for _ in range(data.draw(st.integers(1, 3))):
        body = bent(body, data.draw(st.sampled_from(places(body))), data.draw(ODD))
    try:
        reading = parse_message(body, {})
    except ValueError:
        return
    for drift in reading.drifts:
        event = to_event(drift, "/hooks/drift")
        assert Event.from_json(event.to_json()).id == event.id


def test_options_that_do_not_fit():
    """A pointer for a field that Drift has not, and alerts= without fields=, are refused when the
    trigger is made.
    """
    with pytest.raises(UsageError, match="colour"):
        DriftAlert("/drift", verify="none", fields={"colour": "/c"})
    with pytest.raises(UsageError, match="fields="):
        DriftAlert("/drift", verify="none", alerts="/items")


# --------------------------------------------------------------------------- to a flow


def test_an_alert_that_fires_repeats_and_resolves_starts_one_run():
    """A flow without `types=` gets `drift.detected` only, and takes the drift whole."""

    @flow
    async def retrain(drift: Drift) -> str:
        return f"{drift.model}/{drift.feature}"

    @flow
    async def note(event: Event) -> str:
        return event.type

    alerts, app = DriftAlert("/drift", verify="none"), App("drift")
    app.on(alerts, retrain)
    app.on(alerts, note, types=["drift.*"])

    async def main() -> None:
        async with running(app), serving(alerts.routes) as port:
            async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                await eventually(lambda: alerts._intake, "the alerts are listened for")
                for body in (alert(), alert(), alert("resolved"), alert("resolved")):
                    assert (await client.post("/hooks/drift", json=group(body))).is_success
            await drain(app)
            assert len(await app.store.runs(flow="retrain")) == 1
            assert len(await app.store.runs(flow="note")) == 2

    asyncio.run(main())
