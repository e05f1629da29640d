"""Checks: what passes, what fails, what a failure names, and where it is recorded."""

import json
import math
import random
import subprocess
import sys
from contextlib import suppress
from typing import Any

import numpy
import pytest

from eventflow import App, Permanent, UsageError, checks, flow, task
from eventflow.sdk.checks import CheckFailed
from eventflow.serialization.errors import decode_error, encode_error
from eventflow.testing import drain, events_of, running

pytestmark = pytest.mark.anyio

ROWS = [
    {"id": 1, "region": "north", "amount": 10.0, "note": None},
    {"id": 2, "region": "south", "amount": 20, "note": "x"},
    {"id": 3, "region": "north", "amount": 30.5, "note": None},
]
COLUMNS: dict[str, Any] = {name: [row[name] for row in ROWS] for name in ROWS[0]}


def bad(**changes: Any) -> list[dict[str, Any]]:
    """ROWS with the last row changed."""
    return [*ROWS[:2], {**ROWS[2], **changes}]


def failed(call: Any, *args: Any, **given: Any) -> checks.Result:
    with pytest.raises(CheckFailed) as caught:
        call(*args, **given)
    (result,) = caught.value.results
    assert not result.passed
    return result


# --------------------------------------------------------------------------- data

HOLD: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (checks.schema, ({"id": int, "amount": float, "note": str | None},), {}),
    (
        checks.schema,
        ({"id": int, "region": str, "amount": float | int, "note": str | None},),
        {"exact": True},
    ),
    (checks.not_null, ("id", "region"), {}),
    (checks.not_null, ("note",), {"at_most": 0.7}),
    (checks.within, ("amount",), {"at_least": 10, "at_most": 30.5}),
    (checks.within, ("amount",), {"at_most": 25, "outside": 0.34}),
    (checks.unique, ("id",), {}),
    (checks.unique, ("region", "id"), {}),
    (checks.categories, ("region", ["north", "south"]), {}),
    (checks.row_count, (), {"at_least": 3, "at_most": 3}),
    (checks.distribution, ("amount", [10, 20, 30.5]), {"bins": 3}),
]


@pytest.mark.parametrize("form", ["rows", "columns"])
@pytest.mark.parametrize(
    ("check", "args", "given"), HOLD, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_passed_check_returns_its_result(form: str, check: Any, args: Any, given: Any):
    """A check that passes returns its result, for rows and for columns alike."""
    result = check(ROWS if form == "rows" else COLUMNS, *args, **given)
    assert result.passed and result.check == check.__name__ and not result.rows


FAIL: list[tuple[Any, Any, tuple[Any, ...], dict[str, Any], str, list[Any]]] = [
    (checks.schema, bad(amount="7"), ({"amount": float},), {}, "amount", [(2, "7")]),
    (checks.schema, bad(id=True), ({"id": int},), {}, "id", [(2, True)]),
    (checks.schema, bad(id=None), ({"id": int},), {}, "id", [(2, None)]),
    (checks.schema, ROWS, ({"id": int, "price": float},), {}, "price", []),
    (
        checks.schema,
        ROWS,
        ({"id": int, "region": str, "amount": float},),
        {"exact": True},
        "note",
        [],
    ),
    (checks.not_null, bad(amount=math.nan), ("amount",), {}, "amount", [(2, "nan")]),
    (checks.not_null, ROWS, ("note",), {"at_most": 0.5}, "note", [(0, None), (2, None)]),
    (checks.within, bad(amount=-1), ("amount",), {"at_least": 0}, "amount", [(2, -1)]),
    (checks.within, bad(amount=math.inf), ("amount",), {"at_most": 1e9}, "amount", [(2, "inf")]),
    (checks.unique, bad(id=1), ("id",), {}, "id", [(2, 1)]),
    (checks.unique, bad(id=1), ("region", "id"), {}, "region+id", [(2, ["north", 1])]),
    (
        checks.categories,
        bad(region="west"),
        ("region", ["north", "south"]),
        {},
        "region",
        [(2, "west")],
    ),
    (checks.distribution, ROWS, ("amount", [1000.0, 2000.0]), {}, "amount", []),
    (checks.within, bad(amount="30"), ("amount",), {"at_least": 0}, "amount", [(2, "30")]),
    (
        checks.categories,
        bad(region=["north"]),
        ("region", ["north", "south"]),
        {},
        "region",
        [(2, ["north"])],
    ),
    (checks.unique, [{"x": {"a": 1}}, {"x": {"a": 1}}], ("x",), {}, "x", [(1, "{'a': 1}")]),
]


@pytest.mark.parametrize(("check", "data", "args", "given", "column", "rows"), FAIL)
def test_a_failure_names_column_and_rows(
    check: Any, data: Any, args: Any, given: Any, column: str, rows: Any
):
    """A failure is Permanent, and names check, column, the offending rows and their number."""
    result = failed(check, data, *args, **given)
    assert (result.check, result.column, result.rows) == (
        check.__name__,
        column,
        [list(row) for row in rows],
    )
    assert result.offending == len(rows)
    assert issubclass(CheckFailed, Permanent)


def test_rows_are_counted_and_the_first_listed():
    """Of many offending rows the message has the first five and the number of all."""
    with pytest.raises(CheckFailed) as caught:
        checks.within([{"x": -n} for n in range(100)], "x", at_least=0)
    assert str(caught.value) == (
        "within of 'x': expected at least 0, found -1, -2, -3 in 99 of 100 rows"
        " (row 1: -1, row 2: -2, row 3: -3, row 4: -4, row 5: -5, …)"
    )


def test_no_rows_fail_the_count_only():
    """Empty data pass every schema and range, and fail the row count and a distribution."""
    checks.schema([], {"a": int})
    checks.within([], "a", at_least=0)
    assert failed(checks.row_count, []).found == "0"
    assert failed(checks.distribution, {"a": []}, "a", [1, 2, 3]).found == "inf"


def test_wrong_uses_raise_usage_errors():
    """A misspelt column, no bounds, or data of another kind are errors of the program, not of the
    data.
    """
    with pytest.raises(
        UsageError, match="expected a column 'amont', found id, region, amount, note"
    ):
        checks.within(ROWS, "amont", at_least=0)
    with pytest.raises(UsageError, match="expected at_least= or at_most="):
        checks.within(ROWS, "amount")
    with pytest.raises(UsageError, match="expected at_least= or at_most="):
        checks.gate("auc", 0.5)
    with pytest.raises(
        UsageError, match="expected a list of dicts, a dict of lists or a frame, found generator"
    ):
        checks.row_count(row for row in ROWS)
    with pytest.raises(UsageError, match="found list of int"):
        checks.row_count([1, 2])
    with pytest.raises(UsageError, match="one column or several"):
        checks.not_null(ROWS)


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
def test_frames_are_recognised_by_their_methods(library: str):
    """Frames of pandas, polars and pyarrow are checked like rows, their nulls included."""
    module = pytest.importorskip(library, reason="no dependency; this runs where it is installed")
    frame = (
        module.table(COLUMNS)
        if library == "pyarrow"
        else module.DataFrame({**COLUMNS, "amount": [10.0, 20.0, 30.5]})
    )
    assert checks.row_count(frame, at_least=3, at_most=3).passed
    checks.schema(
        frame, {"id": int, "region": str, "amount": float, "note": str | None}, exact=True
    )
    checks.unique(frame, "region", "id")
    checks.distribution(frame, "region", ["north", "north", "south"])
    assert failed(checks.not_null, frame, "note").offending == 2
    assert failed(checks.within, frame, "amount", at_most=20).rows == [[2, 30.5]]


def test_numpy_columns_are_columns():
    """A dict of arrays, such as the columns of a feature matrix, is data."""
    data = {"x": numpy.array([1.0, numpy.nan, 3.0]), "n": numpy.array([1, 2, 3])}
    assert failed(checks.not_null, data, "x").offending == 1
    checks.schema(data, {"x": float | None, "n": int})
    scalars = [{"x": numpy.float32(1), "n": numpy.int8(1), "t": ["a"], "b": True, "any": None}]
    checks.schema(scalars, {"x": float, "n": int, "t": list[str], "b": bool, "any": Any})
    assert (
        failed(checks.schema, [{"x": numpy.float32("nan")}], {"x": float}).found
        == "null in 1 of 1 rows"
    )
    checks.distribution(scalars, "x", [1.0], bins=2)


# --------------------------------------------------------------------------- distributions


def test_psi_follows_its_formula():
    """PSI of known shares is Σ (p - q) · ln(p / q); nulls and unknown values are bins."""
    reference = checks.profile(["a"] * 50 + ["b"] * 50)
    found = failed(checks.distribution, {"x": ["a"] * 80 + ["b"] * 20}, "x", reference)
    expected = (0.8 - 0.5) * math.log(0.8 / 0.5) + (0.2 - 0.5) * math.log(0.2 / 0.5)
    assert float(found.found) == pytest.approx(expected, abs=1e-4)
    rare = (0.5 - 0.4) * math.log(0.5 / 0.4) + 2 * ((0.1 - 1e-4) * math.log(0.1 / 1e-4))
    with_new = {"x": ["a"] * 50 + ["b"] * 40 + ["c"] * 5 + [None] * 5}
    assert float(failed(checks.distribution, with_new, "x", reference, at_most=0.01).found) < rare


def test_the_same_distribution_is_stable_and_a_shifted_one_is_not():
    """2,000 values of the reference's distribution stay under 0.1, for 50 seeds; half a sigma of
    shift is over it each time.
    """
    draw = random.Random(7)
    reference = checks.profile([draw.gauss(0, 1) for _ in range(5000)])
    for _ in range(50):
        checks.distribution(
            {"x": [draw.gauss(0, 1) for _ in range(2000)]}, "x", reference, at_most=0.1
        )
        failed(
            checks.distribution,
            {"x": [draw.gauss(0.5, 1) for _ in range(2000)]},
            "x",
            reference,
            at_most=0.1,
        )


def test_a_profile_is_json():
    """A reference's profile can be stored as JSON and gives the same results."""
    for values in ([1.0, 2.0, 2.0, 5.0], ["a", "b", None]):
        known = checks.profile(values, bins=4)
        again = checks.Profile(
            **json.loads(
                json.dumps({name: getattr(known, name) for name in known.__struct_fields__})
            )
        )
        assert checks.distribution({"x": values}, "x", again, at_most=0.0).found == "0"


# --------------------------------------------------------------------------- losses and metrics


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        [1.0, math.inf],
        numpy.array([[1, 2], [numpy.nan, 4.0]]),
        numpy.float32("inf"),
        [[-math.inf]],
    ],
)
def test_non_finite_numbers_are_found(value: Any):
    """NaN and infinities are found in numbers, lists, arrays and scalars; the failure names the
    value and its index.
    """
    result = failed(checks.finite, loss=0.5, gradient=value)
    assert result.column == "gradient" and result.offending == 1


def test_finite_numbers_pass():
    """Finite numbers of any kind pass together."""
    assert checks.finite(loss=0.5, n=3, weights=numpy.ones((3, 3)), lists=[[1, 2.0], (3,)]).passed


def test_gates():
    """A metric at its bound passes; NaN never does."""
    assert checks.gate("auc", 0.8, at_least=0.8).passed
    assert failed(checks.gate, "auc", 0.79, at_least=0.8).found == "0.79"
    assert failed(checks.gate, "mae", 3, at_most=2.5).column == "mae"
    failed(checks.gate, "auc", math.nan, at_least=0.0)
    failed(checks.gate, "mae", math.nan, at_most=1.0)


def test_a_challenger_must_be_better():
    """An equal challenger fails; margins are absolute or a share; without a champion any finite one
    passes.
    """
    assert checks.better("auc", 0.9, 0.8).passed
    failed(checks.better, "auc", 0.8, 0.8)
    failed(checks.better, "auc", 0.805, 0.8, by=0.01)
    assert checks.better("mae", 0.98, 1.0, by_share=0.01, lower=True).passed
    failed(checks.better, "mae", 0.995, 1.0, by_share=0.01, lower=True)
    failed(checks.better, "auc", math.nan, 0.8)
    assert checks.better("auc", 0.1, None).passed
    failed(checks.better, "auc", math.nan, None)


# --------------------------------------------------------------------------- several at once


def test_collected_checks_are_raised_together():
    """In a `collect` block all checks run; failures are raised at its end; another error of the
    block takes precedence.
    """
    with pytest.raises(CheckFailed) as caught, checks.collect() as results:
        checks.row_count(ROWS, at_least=10)
        checks.unique(ROWS, "id")
        checks.within(ROWS, "amount", at_most=0)
    assert [result.check for result in caught.value.results] == ["row_count", "within"]
    assert [result.passed for result in results] == [False, True, False]
    with checks.collect(raises=False) as patient:
        checks.row_count(ROWS, at_least=10)
    assert [result.check for result in patient.failed] == ["row_count"]
    with pytest.raises(ZeroDivisionError), checks.collect():
        checks.row_count(ROWS, at_least=10)
        raise ZeroDivisionError
    failed(checks.row_count, ROWS, at_least=10)  # outside the block they raise again


def test_a_failure_is_rebuilt_from_the_journal():
    """The error that the flow catches has the results, after a restart too."""
    with pytest.raises(CheckFailed) as caught:
        checks.within(bad(amount=object()), "id", at_most=2)
    again = decode_error(encode_error(caught.value))
    assert (
        type(again) is CheckFailed
        and again.results == caught.value.results
        and str(again) == str(caught.value)
    )


async def test_a_failed_check_is_an_event_recorded_with_the_failure():
    """In a run, `check.failed` is published with the task's failure, which is final at once, and
    again after a manual retry.
    """
    calls: list[int] = []

    @task(retries=5)
    def validate() -> None:
        calls.append(1)
        checks.row_count(ROWS)
        with checks.collect():
            checks.within(ROWS, "amount", at_most=25)
            checks.unique(ROWS, "region")

    @flow
    async def load() -> None:
        await validate()

    @flow
    async def alarm(check: str, column: str) -> str:
        return f"{check} {column}"

    app = App("load")
    app.add(load)
    app.on("check.failed", alarm)
    async with running(app):
        run = await app.start(load)
        await drain(app)
        assert len(calls) == 1
        row = await run.row()
        assert row["state"] == "failed" and b"CheckFailed" in row["error"]
        events = await events_of(app, run.id)
        assert [(event.type, event.subject) for event in events] == [
            ("check.failed", "amount"),
            ("check.failed", "region"),
        ]
        assert (
            events[0].data["rows"] == [[2, 30.5]]
            and events[0].data["found"] == "30.5 in 1 of 3 rows"
        )
        await app.store.retry(row["id"])
        await drain(app)
        results = [
            json.loads((await app.store.run(each["id"]))["result"])
            for each in await app.store.runs(flow="alarm")
        ]
        assert sorted(results) == [
            "unique region",
            "unique region",
            "within amount",
            "within amount",
        ]


async def test_without_raising_events_are_published_with_the_success():
    """With `raises=False` the task succeeds and its failures are events; with `emit_passed` the
    passed ones too.
    """

    @task
    async def validate() -> int:
        with checks.collect(raises=False, emit_passed=True) as results:
            checks.row_count(ROWS)
            checks.within(ROWS, "amount", at_most=25)
        return len(results.failed)

    @task
    async def forgiving() -> None:
        with suppress(CheckFailed):
            checks.row_count([])

    @flow
    async def load() -> int:
        await forgiving()
        return await validate()

    app = App("load")
    app.add(load)
    async with running(app):
        run = await app.start(load)
        await drain(app)
        assert await run.result() == 1
        assert sorted(event.type for event in await events_of(app, run.id)) == [
            "check.failed",
            "check.passed",
        ]


async def test_outside_a_run_a_check_only_raises(caplog: pytest.LogCaptureFixture):
    """In plain code, and in a task called as its function, checks raise and log, and need nothing
    else.
    """

    @task
    def validate() -> None:
        checks.row_count([])

    caplog.set_level("INFO")
    with pytest.raises(CheckFailed):
        await validate()
    assert "check.failed" in caplog.text
    checks.row_count(ROWS)
    assert "check.passed" in caplog.text


def test_checks_need_no_library():
    """Importing eventflow with its checks imports neither numpy nor a frame library."""
    names = "('numpy', 'pandas', 'torch')"
    code = (
        "import sys, eventflow.sdk.checks; "
        f"print(*[name for name in {names} if name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == ""
    )
