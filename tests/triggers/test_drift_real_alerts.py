"""Alerts and reports as their senders write them: composite alarms, alerts about the sender's own
rules, large groups, statistics of NaN; and rows as spreadsheets write them.
"""

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from eventflow.core.errors import UsageError
from eventflow.events.event import Event, Undecodable
from eventflow.testing.trigger_contract import ContractLedger, listening
from tests.conftest import eventually
from tests.triggers.hooks import Hook, posting
from triggers._drift.bins import to_column
from triggers._drift.config import stored_value
from triggers._drift.features import feature_specs
from triggers._drift.row_files import read_rows
from triggers._drift.values import PaddedNumber
from triggers._files.events import Disposition, LandedFile, to_event
from triggers.drift import DriftAlert
from triggers.drift_monitor import Categorical, DriftMonitor, Numeric, file_rows
from triggers.files import Directory


def over_http(test: Callable[[Hook], Awaitable[None]], **options: Any) -> None:
    posting(DriftAlert("/drift", **{"verify": "none", **options}), test)


# --------------------------------------------------------------------------- CloudWatch

ALARM = {
    "AlarmName": "drift",
    "AlarmDescription": None,
    "AWSAccountId": "123456789012",
    "NewStateValue": "ALARM",
    "NewStateReason": "arn:aws:cloudwatch:eu-west-1:123456789012:alarm:a transitioned to ALARM",
    "StateChangeTime": "2026-11-22T10:00:00.123+0000",
    "Region": "EU (Ireland)",
    "AlarmArn": "arn:aws:cloudwatch:eu-west-1:123456789012:alarm:drift",
    "OldStateValue": "OK",
}
COMPOSITE = {
    **ALARM,
    "AlarmRule": "ALARM(a) OR ALARM(b)",
    "TriggeringChildren": [{"Arn": "arn:a", "State": {"Value": "ALARM"}}],
}
METRIC = {
    "MetricName": "feature_baseline_drift_age",
    "Namespace": "aws/sagemaker/Endpoints/data-metrics",
    "Dimensions": [{"name": "Endpoint", "value": "prices"}],
    "Threshold": 0.2,
}
EXPRESSION = {
    **ALARM,
    "Trigger": {
        "Metrics": [
            {"Id": "e1", "Expression": "m1 / m2", "ReturnData": True},
            {"Id": "m1", "MetricStat": {"Metric": METRIC, "Period": 300, "Stat": "Average"}},
        ],
        "ThresholdMetricId": "ad1",
    },
}
MISSING = (
    "Threshold Crossed: no datapoints were received for 3 periods and 3 missing datapoints "
    "were treated as [Breaching]."
)


def via_sns(alarm: dict[str, Any]) -> bytes:
    return json.dumps(
        {
            "Type": "Notification",
            "MessageId": "m-1",
            "TopicArn": "arn:aws:sns:eu-west-1:123456789012:drift",
            "Message": json.dumps(alarm),
        }
    ).encode()


ALARMS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    # an alarm; its status; its feature
    "composite": (COMPOSITE, "detected", None),
    "composite ok": ({**COMPOSITE, "NewStateValue": "OK"}, "resolved", None),
    "composite without data": ({**COMPOSITE, "NewStateValue": "INSUFFICIENT_DATA"}, "nodata", None),
    "one metric": ({**ALARM, "Trigger": METRIC}, "detected", "age"),
    "an expression": (EXPRESSION, "detected", "age"),
    "no trigger": ({**ALARM, "Trigger": None}, "detected", None),
    "an odd trigger": ({**ALARM, "Trigger": {"Dimensions": "none"}}, "detected", None),
    "missing data breaches": (
        {**ALARM, "Trigger": METRIC, "NewStateReason": MISSING},
        "nodata",
        "age",
    ),
}


@pytest.mark.parametrize("name", ALARMS)
@pytest.mark.parametrize("wrap", [via_sns, lambda alarm: json.dumps(alarm).encode()])
def test_any_alarm_of_cloudwatch_is_an_event(name: str, wrap: Callable[[dict[str, Any]], bytes]):
    """An alarm needs a name, a state and a time; a metric is optional."""
    alarm, status, feature = ALARMS[name]

    async def test(hook: Hook) -> None:
        answer = await hook.post(wrap(alarm), content_type="text/plain; charset=UTF-8")
        assert answer.status_code == 202, answer.text
        data = hook.event.data
        assert (data["status"], data["feature"], data["name"]) == (status, feature, "drift")

    over_http(test)


# --------------------------------------------------------------------------- Grafana, Alertmanager


def alert(name: str = "FeatureDrift", status: str = "firing", **more: Any) -> dict[str, Any]:
    return {
        "status": status,
        "labels": {"alertname": name, "rulename": "age drifts", "model": "prices"},
        "annotations": {},
        "startsAt": "2026-11-22T10:00:00.123456789Z",
        "endsAt": "2026-11-22T11:00:00Z" if status == "resolved" else "0001-01-01T00:00:00Z",
        "fingerprint": f"fp-{name}",
        "values": None,
        **more,
    }


def group(*alerts: Any, **more: Any) -> dict[str, Any]:
    return {"version": "1", "groupKey": "k", "receiver": "r", "alerts": [*alerts], **more}


@pytest.mark.parametrize(
    "special",
    [
        {"name": "DatasourceError"},
        {"name": "DatasourceNoData"},
        {"name": "FeatureDrift", "annotations": {"grafana_state_reason": "NoData"}},
        {"name": "FeatureDrift", "annotations": {"grafana_state_reason": "Error"}},
    ],
)
def test_a_sender_that_cannot_judge_is_no_drift(special: dict[str, Any]):
    """Grafana's alerts about its own rules are no data while they fire, and resolved at their end;
    no training starts.
    """

    async def test(hook: Hook) -> None:
        for status in ("firing", "firing", "resolved"):
            body = group(alert(status=status, **special), orgId=1)
            assert (await hook.post(body)).is_success
        assert [event.type for event in hook.events] == ["drift.nodata", "drift.resolved"]

    over_http(test)


@pytest.mark.parametrize(
    "special",
    [
        {"labels": {"alertname": "DatasourceNoData", "datasource_uid": "u", "rulename": "age"}},
        {"labels": {"alertname": "DatasourceError", "grafana_folder": "ml", "rulename": "age"}},
        {"annotations": {"grafana_state_reason": "Error"}},
    ],
)
def test_grafana_through_an_alertmanager(special: dict[str, Any]):
    """What Grafana cannot judge is no drift either when an external Alertmanager forwards it."""

    async def test(hook: Hook) -> None:
        for status in ("firing", "resolved"):
            await hook.post(group(alert(status=status) | special, version="4"))
        assert [event.type for event in hook.events] == ["drift.nodata", "drift.resolved"]

    over_http(test)


@pytest.mark.parametrize("version", [{"version": 4}, {"version": None}, {}])
def test_a_group_needs_no_version(version: dict[str, Any]):
    """Senders of Alertmanager's shape that leave its version out, or write it as a number, are
    read like it.
    """

    async def test(hook: Hook) -> None:
        body = group(alert())
        del body["version"]
        assert (await hook.post(body | version)).status_code == 202
        assert hook.event.data["sender"] == "alertmanager"

    over_http(test)


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (group(alert() | {"labels": {"model": None, "severity": None}}, version="4"), {}),
        ({"model": "prices", "severity": None, "labels": {"a": None}}, {}),
        ({"f": "age", "m": None}, {"fields": {"feature": "/f", "model": "/m?"}}),
    ],
    ids=["labels", "own schema", "pointers"],
)
def test_null_is_absent(body: dict[str, Any], options: dict[str, Any]):
    """A field that is null is left out; it is never the text "None"."""

    async def test(hook: Hook) -> None:
        assert (await hook.post(body)).status_code == 202
        assert "none" not in json.dumps(hook.event.data).lower()
        assert hook.event.data["severity"] == "warning"

    over_http(test, **options)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({**ALARM, "StateChangeTime": None}, "the time of the state's change"),
        (group(alert() | {"startsAt": "0001-01-01T00:00:00Z"}, version="4"), "startsAt"),
    ],
)
def test_an_alert_without_its_start_is_a_dead_letter(body: dict[str, Any], reason: str):
    """Without a start every later alert would count as a repetition of the first one."""

    async def test(hook: Hook) -> None:
        await hook.post(body)
        assert not hook.events and reason in hook.dead_letters[0].error

    over_http(test)


def test_own_alerts_with_numbers_as_text():
    """Numbers that a sender writes as text are numbers, and labels of any type are texts."""

    async def test(hook: Hook) -> None:
        body = {"model": "prices", "statistic": "0.31", "labels": {"chunk": 7}}
        assert (await hook.post(body)).status_code == 202
        assert (hook.event.data["statistic"], hook.event.data["labels"]) == (0.31, {"chunk": "7"})

    over_http(test)


def test_names_of_one_sender_mean_nothing_from_another():
    """A rule of Prometheus may have any name: only Grafana's own alerts are special."""

    async def test(hook: Hook) -> None:
        await hook.post(group(alert("DatasourceError"), version="4"))
        assert hook.event.type == "drift.detected"

    over_http(test)


@pytest.mark.parametrize(
    "odd",
    [
        {"labels": {"severity": "page"}},
        {"annotations": None},
        {"annotations": ["text"]},
        {"endsAt": "never"},
        {"values": [1]},
        {"generatorURL": None},
        {"fingerprint": ""},
        {"labels": {}},
    ],
)
@pytest.mark.parametrize("status", ["firing", "resolved"])
def test_an_alert_needs_what_its_identity_needs(odd: dict[str, Any], status: str):
    """Whatever else is missing or odd, an alert with labels or a fingerprint, a status and a start
    is an event.
    """

    async def test(hook: Hook) -> None:
        await hook.post(group(alert(status=status) | odd, version="4"))
        assert hook.event.data["status"] == {"firing": "detected"}.get(status, status)

    over_http(test)


def usual_alert(number: int) -> dict[str, Any]:
    """An alert of Prometheus with its labels and annotations, about 450 bytes."""
    labels = {
        "alertname": "FeatureDrift",
        "cluster": "eu-1",
        "feature": f"feature_{number}",
        "instance": "10.0.0.17:9090",
        "job": "drift",
        "model": "prices",
        "namespace": "ml",
        "severity": "warning",
    }
    annotations = {"summary": f"feature_{number} drifts", "value": "0.31", "runbook": "https://r/x"}
    return {
        **alert(),
        "labels": labels,
        "annotations": annotations,
        "generatorURL": "http://prometheus:9090/graph?g0.expr=psi",
        "fingerprint": f"{number:016x}",
    }


@pytest.mark.parametrize("count", [500, 10_000])
def test_a_large_group_is_recorded(count: int):
    """As many alerts as `max_alerts` promises fit through every other bound; of a group, what can
    be read is recorded.
    """

    async def test(hook: Hook) -> None:
        alerts = [usual_alert(number) for number in range(count - 1)]
        answer = await hook.post(group(*alerts, {"status": "firing"}, version="4"))
        assert answer.status_code == 202, answer.text[:200]
        assert (len(hook.events), len(hook.dead_letters)) == (count - 1, 1)

    over_http(test)


def test_bounds_can_be_set():
    """`max_alerts` and `max_keys` bound one body; over them it is a dead letter that names them."""

    async def test(hook: Hook) -> None:
        many = await hook.post(group(*[usual_alert(number) for number in range(4)], version="4"))
        wide = await hook.post({f"key{number}": 1 for number in range(40)})
        assert (many.status_code, wide.status_code) == (400, 400)
        assert "max_alerts" in many.text and "30 keys" in wide.text
        assert len(hook.dead_letters) == 2

    over_http(test, max_alerts=3, max_keys=30)


# --------------------------------------------------------------------------- reports


def evidently(*values: str, share: str = "0.5") -> bytes:
    """A report of DataDriftPreset with these statistics, as text: `json.dumps` writes NaN."""
    columns = [
        f'{{"metric_name": "ValueDrift(column={name})", "value": {value}, "config": {{"type": '
        f'"evidently:metric_v2:ValueDrift", "column": "{name}", "method": "psi", '
        '"threshold": 0.1}}'
        for name, value in zip("abcdef", values, strict=False)
    ]
    count = (
        f'{{"metric_name": "DriftedColumnsCount", "value": {{"count": 1, "share": {share}}}, '
        '"config": {"type": "evidently:metric_v2:DriftedColumnsCount", "drift_share": 0.5}}'
    )
    return f'{{"model": "prices", "metrics": [{", ".join([count, *columns])}]}}'.encode()


REPORTS: dict[str, tuple[bytes, str, list[str]]] = {
    # a report; its status; the drifted columns
    "NaN": (evidently("0.4", "NaN"), "detected", ["a"]),
    "Infinity": (evidently("0.4", "-Infinity", "0.3"), "detected", ["a", "c"]),
    "null": (evidently("0.4", "null"), "detected", ["a"]),
    "a share of NaN": (evidently("0.4", "0.3", "0.01", share="NaN"), "detected", ["a", "b"]),
    "many digits": (evidently("0.41234567890123456789"), "detected", ["a"]),
    "a large integer": (evidently("18446744073709551616"), "detected", ["a"]),
    "only NaN": (evidently("NaN", "NaN", share="NaN"), "nodata", []),
    "no drift": (evidently("0.01", "NaN", share="0.0"), "resolved", []),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_column_without_a_statistic_costs_itself_only(name: str):
    """A statistic of NaN or of many digits does not make a report unreadable; a report that
    compares nothing is no data.
    """
    body, status, features = REPORTS[name]

    async def test(hook: Hook) -> None:
        assert (await hook.post(body)).status_code == 202
        data = hook.event.data
        assert (data["status"], sorted(data["features"])) == (status, features)

    over_http(test)


ODD_METRICS = [None, "text", {"config": "text"}, {"metric": "M", "config": [1]}, 5]
FLAG = {"drift_score": 0.01, "stattest_threshold": 0.1, "drift_detected": "False"}


@pytest.mark.parametrize(
    ("metrics", "status"),
    [
        ([*ODD_METRICS, *json.loads(evidently("0.4"))["metrics"]], "detected"),
        ([{"result": None}, {"result": {"drift_by_columns": {"a": FLAG, "b": None}}}], "resolved"),
        (
            [{"result": {"drift_by_columns": {"a": {**FLAG, "drift_detected": "True"}}}}],
            "detected",
        ),
    ],
    ids=["odd metrics", "a false flag as text", "a true flag as text"],
)
def test_an_odd_metric_costs_itself_only(metrics: list[Any], status: str):
    """A metric of unknown form does not make the report unreadable, and numpy's booleans, which
    `json.dumps(…, default=str)` writes as text, mean what they say.
    """

    async def test(hook: Hook) -> None:
        assert (await hook.post({"metrics": metrics})).status_code == 202
        assert hook.event.data["status"] == status

    over_http(test)


def test_chunks_without_times_differ_by_their_content():
    """Without timestamps a chunk's key counts rows, and is the same in each report: another content
    is another event, the same one a repetition.
    """
    row = {"chunk_key": "[0:999]", "chunk_end_date": "NaT", "age_jensen_shannon_alert": "True"}

    async def test(hook: Hook) -> None:
        for value, status in ((0.4, 202), (0.4, 200), (0.5, 202)):
            rows = [{**row, "age_jensen_shannon_value": value}]
            assert (await hook.post({"chunks": rows})).status_code == status
        calm = {**row, "age_jensen_shannon_alert": "False", "age_jensen_shannon_value": 0.1}
        assert (await hook.post({"chunks": [calm]})).status_code == 202
        assert [event.data["status"] for event in hook.events] == [
            "detected",
            "detected",
            "resolved",
        ]

    over_http(test)


def test_tags_without_a_time_differ_by_their_content():
    """MLflow's tag without a time and a signed delivery is the same event if its body is."""

    async def test(hook: Hook) -> None:
        for version, status in (("1", 202), ("1", 200), ("2", 202)):
            data = {"name": "m", "version": "7", "key": "drift", "value": "0.3", "run": version}
            body = {"entity": "model_version_tag", "action": "set", "data": data}
            assert (await hook.post(body)).status_code == status

    over_http(test)


def test_chunks_are_read_one_by_one():
    """Of NannyML's chunks one that cannot be read is a dead letter; pandas writes times as
    milliseconds, and statistics of NaN as null or NaN.
    """
    rows = [
        {"chunk_key": "a", "chunk_end_date": 1780000000000, "age_jensen_shannon_alert": True,
         "age_jensen_shannon_value": 0.4, "sex_chi2_alert": False, "sex_chi2_value": None},
        {"chunk_key": "b", "chunk_end_date": "soon", "age_jensen_shannon_alert": True},
        "no row",
        {"chunk_key": "c", "chunk_end_date": "2026-11-22T10:00:00",
         "age_jensen_shannon_alert": False, "age_jensen_shannon_value": float("nan")},
    ]  # fmt: skip

    async def test(hook: Hook) -> None:
        assert (await hook.post(json.dumps(rows).encode())).status_code == 202
        assert [(event.data["segment"], event.data["status"]) for event in hook.events] == [
            ("a", "detected"),
            ("c", "nodata"),
        ]
        assert len(hook.dead_letters) == 2

    over_http(test)


# --------------------------------------------------------------------------- rows of files

SPREADSHEETS: dict[str, bytes] = {
    "plain": b"amount,country\n1.5,de\n2,\n",
    "excel": "\ufeffamount;country\r\n1,5;de\r\n2;\r\n".encode(),
    "excel with its own line": "\ufeffsep=;\r\namount;country\r\n1,5;de\r\n2;\r\n".encode(),
    "excel's unicode text": "amount\tcountry\r\n1.5\tde\r\n2\t\r\n".encode("utf-16"),
    "bars": b"amount|country\n1.5|de\n2|\n",
    "quoted": b'"amount";"country"\n"1,5";"de"\n2;\n',
}


RAGGED: dict[str, bytes] = {
    "blank lines first": b"\n\namount,country\n1.5,de\n2,\n",
    "rows that a spreadsheet adds": b"amount;country\r\n1,5;de\r\n2;\r\n;\r\n;\r\n",
    "commas at the end": b"amount,country,\n1.5,de,\n2,,\n",
    "a short row": b"amount,country\n1.5,de\n2\n",
    "blanks after commas": b'amount, country\n1.5, "de"\n2, \n',
    "a quoted line of excel": b'"sep=;"\r\namount;country\r\n1,5;de\r\n2;\r\n',
    "mixed line ends": b"amount,country\r\n1.5,de\r2,\n",
    "a column twice": b"amount,id,country,id\n1.5,1,de,2\n2,3,,4\n",
}
SPREADSHEETS |= RAGGED


@pytest.mark.parametrize("name", SPREADSHEETS)
def test_a_csv_is_read_as_its_writer_meant(name: str, tmp_path: Path):
    """Whatever mark, delimiter and decimal sign a spreadsheet writes, the rows are the same."""
    path = tmp_path / "a.csv"
    path.write_bytes(SPREADSHEETS[name])
    rows = [{name: row[name] for name in row if name} for row in read_rows(path)]
    assert rows == [{"amount": 1.5, "country": "de"}, {"amount": 2, "country": None}]


def test_rows_of_json_files(tmp_path: Path):
    """NaN is a missing value, a mark is no part of the first line, and long integers keep their
    digits.
    """
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": NaN, "b": 18446744073709551616}\n{"a": 1}\n'.encode())
    assert read_rows(path) == [{"a": None, "b": 18446744073709551616}, {"a": 1}]


def test_a_number_beyond_floats_costs_itself_only(tmp_path: Path):
    """In rows and reports a number that no float holds is a missing one, as NaN is."""
    path = tmp_path / "a.jsonl"
    lines = ("1e400", "-1E+999", "1" + "0" * 400, "9" * 5000, "1.5")
    path.write_text("".join(f'{{"a": {line}}}\n' for line in lines))
    assert [row["a"] for row in read_rows(path)] == [None, None, 10**400, None, 1.5]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"a": 1}\n{"a": 2}\n'),
        ("a.json", '[{"a": 1}, {"a": 2}]'),
        ("a.jsonl", '\n{"a": 1}\r\n\r\n{"a": 2}'),
    ],
)
def test_json_lines_by_either_suffix(tmp_path: Path, name: str, text: str):
    """Exports of databases write JSON Lines into files that they call `.json`."""
    (tmp_path / name).write_text(text, newline="")
    assert read_rows(tmp_path / name) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.csv", 'a,b\n"1,2\n' + "x,y\n" * 40_000, "expected CSV"),
        ("a.csv", "a,b\n1,2\n1,5,2\n", "row 2: expected 2 cells, found 3"),
        ("a.json", '{"a": 1}', "expected a list of objects, found dict"),
        ("a.jsonl", '{"a": 1}\n5\n', "row 2: expected an object, found int"),
        ("a.json", '{"a": 1}\n{"a": ', "unexpected content after document"),
    ],
)
def test_files_that_are_no_tables(tmp_path: Path, name: str, text: str, reason: str):
    """A file that is not what its suffix says is refused with what was found."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_rows(tmp_path / name)


def windows_judged(monitor: DriftMonitor) -> float:
    found = {gauge.name: gauge.value for gauge in monitor.gauges()}
    return found.get("drift_windows_judged", 0)


class Numbers(NamedTuple):
    """A column `amount` of 1,000 cells, and what becomes of its file."""

    cells: Callable[[int], str]
    reason: str = ""  # of a dead letter; else no drift


COLUMNS: dict[str, Numbers] = {
    "plain": Numbers(lambda n: f"{n % 50}.5"),
    "NA as R writes it": Numbers(lambda n: f"{n % 50}.5" if n % 100 else "NA"),
    "NULL as databases write it": Numbers(lambda n: f"{n % 50}.5" if n % 100 else "NULL"),
    "padded": Numbers(lambda n: f"0{n % 50}"),
    "grouped": Numbers(lambda n: f'"{n % 50},000.50"', "plain numbers in the column 'amount'"),
    "grouped in part": Numbers(lambda n: f"{n % 50}.5" if n % 9 else '"1,234.50"', "'1,234.50'"),
    "grouped with points": Numbers(lambda n: f'"1.{n % 50:03},50"', "plain numbers"),
    "with a currency": Numbers(lambda n: f"€ {n % 50}.50", "currency"),
    "percent": Numbers(lambda n: f"{n % 50} %", "percent"),
    "text": Numbers(lambda n: f"high{n}", "expected numbers in the column 'amount'"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_numbers_in_another_form_are_no_drift(name: str, tmp_path: Path):
    """A file whose numbers are formatted for people, or are none, is a dead letter that quotes one;
    words for a missing number are missing values.
    """
    cells, reason = COLUMNS[name]
    (inbox := tmp_path / "in").mkdir()
    reference = tmp_path / "reference.csv"
    reference.write_text("amount\n" + "".join(f"{n % 50}.5\n" for n in range(1000)))

    async def main() -> None:
        monitor = DriftMonitor(
            Directory(inbox, settle=0.05, rescan=0.2),
            features={"amount": Numeric()},
            reference=reference,
            window="batch",
            rows=file_rows,
            confirm=1,
        )
        ledger = ContractLedger()
        async with listening(monitor, ledger):
            text = "amount,n\n" + "".join(f"{cells(n)},{n}\n" for n in range(1000))
            (inbox / ".x").write_text(text)
            (inbox / ".x").rename(inbox / "a.csv")
            await eventually(lambda: windows_judged(monitor) or ledger.recorded, "the file is read")
        letters = [item for item in ledger.recorded.values() if isinstance(item, Undecodable)]
        assert len(ledger.recorded) == len(letters) == bool(reason)
        assert not letters or reason in letters[0].error

    asyncio.run(main())


def test_a_reference_of_formatted_numbers_is_refused(tmp_path: Path):
    """A reference whose numbers are formatted for people is a mistake that quotes one."""
    path = tmp_path / "reference.csv"
    path.write_text("amount;n\n" + "1.234,50;1\n" * 200)
    with pytest.raises(UsageError, match=re.escape("1.234,50")):
        DriftMonitor(Directory(tmp_path / "in"), features=["amount"], reference=path)


def test_an_error_of_rows_costs_its_event_only(tmp_path: Path):
    """Whatever the app's `rows=` raises, the event is a dead letter and the next one is counted."""
    (inbox := tmp_path / "in").mkdir()

    def rows(event: Event) -> list[dict[str, Any]]:
        assert event.data["name"] != "bad.csv", "no table"
        return [{"a": number % 7} for number in range(1000)]

    async def main() -> None:
        monitor = DriftMonitor(
            Directory(inbox, settle=0.05, rescan=0.2),
            features=["a"],
            reference={"a": [number % 7 for number in range(1000)]},
            window="batch",
            rows=rows,
        )
        ledger = ContractLedger()
        async with listening(monitor, ledger):
            (inbox / "bad.csv").write_text("x")
            await eventually(lambda: len(ledger.recorded) == 1, "it is a dead letter")
            (inbox / "good.csv").write_text("x")
            await eventually(lambda: windows_judged(monitor) == 1, "the rows are a window")
        (letter,) = ledger.recorded.values()
        assert isinstance(letter, Undecodable) and "AssertionError: no table" in letter.error

    asyncio.run(main())


@pytest.mark.parametrize("name", [b"caf\xe9.csv", "café\n.csv".encode(), b"-a b.csv"])
def test_rows_of_a_file_of_any_name(tmp_path: Path, name: bytes):
    """`file_rows` reads the file of an event whatever bytes its name has."""
    path = tmp_path / os.fsdecode(name)
    path.write_text("a\n1\n")
    landed = LandedFile(name, None, 0, Disposition.CREATED, "1", os.fsencode(path))
    rows = asyncio.run(_rows_of(to_event(landed, "files", 0)))
    assert rows == [{"a": 1}]


async def _rows_of(event: Event) -> list[Any]:
    return list(await file_rows(event))


def test_numbers_of_libraries_are_numbers():
    """numpy's scalars and `Decimal`, as data frames and Parquet files give them, are numbers and
    categories like Python's own.
    """
    amount, country = feature_specs({"amount": Numeric(), "country": Categorical()}, {})
    for value in (np.float32(1.5), np.int64(2), Decimal("1.50"), 3, PaddedNumber("007")):
        assert stored_value(amount, value) == float(value)
        assert to_column(amount, [value]).values.tolist() == [float(value)]
    for missing in (Decimal("NaN"), np.float64("nan"), None, "N/A", " null "):
        assert stored_value(amount, missing) is None
        assert to_column(amount, [missing]).missing == 1
    assert to_column(amount, [10**400, "high"]).invalid == 2
    for value, label in ((np.int64(2), "2"), (np.bool_(True), "true"), (Decimal("2"), "2")):
        assert to_column(country, [stored_value(country, value)]).values == [label]


def test_codes_and_flags_of_a_csv_are_those_of_json(tmp_path: Path):
    """In a CSV `00501` is another code than `501`, and `True` is the flag `true` of JSON."""
    path = tmp_path / "a.csv"
    path.write_text("zip,member\n00501,True\n501,FALSE\n")
    zips, member = feature_specs({"zip": Categorical(), "member": Categorical()}, {})
    rows = read_rows(path)
    assert to_column(zips, [row["zip"] for row in rows]).values == ["00501", "501"]
    found = to_column(member, [row["member"] for row in rows]).values
    assert found == to_column(member, [True, False]).values


def rows_of(count: int, start: int = 0) -> str:
    return "".join(f"{(start + n) % 50},5;{'de' if n % 2 else 'at'}\r\n" for n in range(count))


def test_a_spreadsheet_is_no_drift(tmp_path: Path):
    """Files that Excel saved, with the reference's values, are windows without drift; a file that
    lacks a feature's column is a dead letter that names it.
    """
    (inbox := tmp_path / "in").mkdir()
    reference = tmp_path / "reference.csv"
    reference.write_text("amount,country\n" + rows_of(1000).replace(",", ".").replace(";", ","))

    async def main() -> None:
        monitor = DriftMonitor(
            Directory(inbox, settle=0.05, rescan=0.2),
            features={"amount": Numeric(), "country": Categorical()},
            reference=reference,
            window="batch",
            rows=file_rows,
            confirm=1,
        )
        ledger = ContractLedger()

        def judged() -> float:
            found = {gauge.name: gauge.value for gauge in monitor.gauges()}
            return found.get("drift_windows_judged", 0)

        async with listening(monitor, ledger):
            for number, text in enumerate(
                ("\ufeffamount;country\r\n", "sep=;\r\namount;country\r\n")
            ):
                part = inbox / f".{number}.part"
                part.write_text(text + rows_of(1000), encoding="utf-8", newline="")
                part.rename(inbox / f"{number}.csv")
                await eventually(lambda n=number: judged() == n + 1, "the file is evaluated")
            assert ledger.recorded == {}
            (inbox / ".x").write_text("betrag;country\r\n" + rows_of(1000), newline="")
            (inbox / ".x").rename(inbox / "renamed.csv")
            await eventually(lambda: len(ledger.recorded) == 1, "the file is a dead letter")
        (letter,) = ledger.recorded.values()
        assert isinstance(letter, Undecodable)
        assert "'amount'" in letter.error and "betrag" in letter.error
        assert judged() == 2

    asyncio.run(main())


def test_a_column_of_no_values_is_drift_if_it_is_there(tmp_path: Path):
    """A column that every row has, empty, is a jump of missing values, and is reported."""
    (inbox := tmp_path / "in").mkdir()
    reference = tmp_path / "reference.csv"
    reference.write_text("amount;country\r\n" + rows_of(1000), newline="")

    async def main() -> None:
        monitor = DriftMonitor(
            Directory(inbox, settle=0.05, rescan=0.2),
            features=["amount"],
            reference=reference,
            window="batch",
            rows=file_rows,
            confirm=1,
        )
        ledger = ContractLedger()
        async with listening(monitor, ledger):
            (inbox / ".x").write_text("amount;country\r\n" + ";de\r\n" * 1000, newline="")
            (inbox / ".x").rename(inbox / "empty.csv")
            await eventually(lambda: len(ledger.recorded) == 1, "the drift is reported")
        (event,) = ledger.recorded.values()
        assert isinstance(event, Event) and event.type == "drift.detected"

    asyncio.run(main())


def test_categories_of_large_numbers_stay_apart(tmp_path: Path):
    """Codes of many digits are categories of their own, also beyond 64 bits."""
    path = tmp_path / "codes.csv"
    codes = ["12345671", "12345672", "18446744073709551616", "18446744073709551617"]
    path.write_text("code\n" + "".join(f"{code}\n" for code in codes * 100))
    monitor = DriftMonitor(
        Directory(tmp_path / "in"), features={"code": Categorical()}, reference=path
    )
    (baseline,) = monitor._config.baselines
    assert sorted(baseline.bins.labels[:4]) == sorted(codes)
