"""Checks of data, losses and metrics, for task bodies. A failed check raises `CheckFailed`.

    checks.schema(rows, {"region": str, "amount": float})
    checks.within(rows, "amount", at_least=0)
    checks.gate("auc", auc, at_least=0.8)

Each check returns its `Result` if it passes. Data are rows (a list of dicts), columns (a dict of
lists), or a frame of pandas, polars or pyarrow, none of which is required or imported (columns.py).
Every result is logged. A failed check is also an event `check.failed`, recorded with the failure of
its task. `CheckFailed` is Permanent, so the task is not retried. `collect()` runs several checks
and raises their failures together.
"""

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec

from eventflow.core.declarations import declaration
from eventflow.core.errors import UsageError
from eventflow.core.retry import Permanent
from eventflow.logs.log import get_logger
from eventflow.sdk.columns import (
    Data,
    Profile,
    column,
    columns_of,
    count_of,
    hashable,
    is_null,
    json_or_text,
    not_finite,
    profile,
    psi,
)
from eventflow.sdk.task import task_context

__all__ = [
    "CheckFailed",
    "CheckResults",
    "Profile",
    "Result",
    "better",
    "categories",
    "collect",
    "distribution",
    "finite",
    "gate",
    "not_null",
    "profile",
    "row_count",
    "schema",
    "unique",
    "within",
]

MAX_NAMED_ROWS = 5
"""Offending rows that a result lists; all are counted."""

log = get_logger("eventflow.checks")
LOG_EVENTS = {
    "check.failed": (
        "A check of data or of a metric failed; the line names the column and counts the rows."
    ),
    "check.passed": "A check of data or of a metric passed.",
}


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a check.

    `rows`: the first offending rows, each as [index from 0, value as JSON or text]; `offending`:
    how many there are; `total`: the number of rows checked.
    """

    check: str
    passed: bool
    expected: str
    found: str
    column: str | None = None
    offending: int = 0
    total: int | None = None
    rows: list[list[Any]] = []

    def __str__(self) -> str:
        what = f"{self.check} of {self.column!r}" if self.column is not None else self.check
        where = ", ".join(f"row {index}: {value!r}" for index, value in self.rows)
        more = ", …" if self.offending > len(self.rows) > 0 else ""
        rows = f" ({where}{more})" if where else ""
        return f"{what}: expected {self.expected}, found {self.found}{rows}"


class CheckFailed(Permanent):
    """One or more checks failed. `results` are those. Never retried."""

    def __init__(self, results: Sequence[Any]) -> None:
        self.results: list[Result] = [msgspec.convert(each, Result) for each in results]
        super().__init__(
            [msgspec.to_builtins(each) for each in self.results]
        )  # plain data: it is rebuilt in the flow

    def __str__(self) -> str:
        return "; ".join(map(str, self.results))


# --------------------------------------------------------------------------- data


@declaration
def schema(data: Data, types: Mapping[str, Any], *, exact: bool = False) -> Result:
    """Check that each column exists and has values of its type: `{"amount": float, "note": str}`.

    An int counts as a float, a bool as neither; null (None, NaN, NaT) needs `| None`. `exact`:
    there are no other columns.
    """
    names = columns_of(data)
    missing = [name for name in types if name not in names]
    extra = [name for name in names if name not in types] if exact else []
    if (missing or extra) and (names or count_of(data)):
        found = [f"no {name!r}" for name in missing] + [f"also {name!r}" for name in extra]
        return _report(
            _result("schema", False, _names(types), ", ".join(found), column=(missing + extra)[0])
        )
    for name, wanted in types.items():
        fits = _type_test(wanted)
        bad = [(index, value) for index, value in enumerate(column(data, name)) if not fits(value)]
        if bad:
            kinds = ", ".join(
                sorted({"null" if is_null(value) else type(value).__name__ for _, value in bad})
            )
            return _report(
                _rows_result("schema", name, _type_text(wanted), bad, count_of(data), kinds)
            )
    return _report(_result("schema", True, _names(types), "the same", total=count_of(data)))


@declaration
def not_null(data: Data, *names: str, at_most: float = 0.0) -> Result:
    """Check that at most a share `at_most` (0 to 1) of each column is null: None, NaN or NaT."""
    return _check_values(
        data,
        names,
        "not_null",
        f"at most {at_most:.4g} null",
        lambda values: map(is_null, values),
        at_most,
    )


@declaration
def within(
    data: Data, name: str, *, at_least: Any = None, at_most: Any = None, outside: float = 0.0
) -> Result:
    """Check that the values of a column are in [at_least, at_most], except a share `outside`.

    Nulls are not counted; see `not_null`.
    """
    if at_least is None and at_most is None:
        raise UsageError(f"checks.within({name!r}): expected at_least= or at_most=, found neither")

    def bad(value: Any) -> bool:
        if is_null(value):
            return False
        try:
            return (at_least is not None and not value >= at_least) or (
                at_most is not None and not value <= at_most
            )
        except TypeError:  # such as text where numbers were expected
            return True

    expected = _range(at_least, at_most)
    return _check_values(
        data, (name,), "within", expected, lambda values: map(bad, values), outside
    )


@declaration
def unique(data: Data, *names: str) -> Result:
    """Check that no two rows are equal in these columns. The second and later ones offend."""
    if not names:
        raise UsageError("checks.unique(): expected one column or several, found none")
    seen: set[Any] = set()
    bad: list[tuple[int, Any]] = []
    for index, values in enumerate(zip(*(column(data, name) for name in names), strict=True)):
        key = tuple(map(hashable, values))
        if key in seen:
            bad.append((index, values[0] if len(names) == 1 else list(values)))
        seen.add(key)
    return _report(
        _rows_result(
            "unique", "+".join(names), "no value twice", bad, count_of(data), f"{len(bad)} repeated"
        )
    )


@declaration
def categories(data: Data, name: str, allowed: Iterable[Any], *, outside: float = 0.0) -> Result:
    """Check that the values of a column are among `allowed`, except a share `outside`.

    Nulls are not counted; see `not_null`.
    """
    known = set(allowed)
    expected = (
        "one of " + ", ".join(sorted(map(repr, known))[:10]) + (", …" if len(known) > 10 else "")
    )

    def bad(values: Iterable[Any]) -> Iterable[bool]:
        return (not is_null(value) and hashable(value) not in known for value in values)

    return _check_values(data, (name,), "categories", expected, bad, outside)


@declaration
def row_count(data: Data, *, at_least: int = 1, at_most: int | None = None) -> Result:
    """Check that the number of rows is in [at_least, at_most]."""
    count = count_of(data)
    passed = count >= at_least and (at_most is None or count <= at_most)
    return _report(
        _result("row_count", passed, f"rows {_range(at_least, at_most)}", str(count), total=count)
    )


@declaration
def distribution(
    data: Data,
    name: str,
    reference: "Profile | Iterable[Any]",
    *,
    at_most: float = 0.2,
    bins: int = 10,
) -> Result:
    """Check that a column's population stability index (PSI) is at most `at_most`.

    `reference`: earlier values, or their `profile(values)`, which is small and can be stored as
    JSON with the model. Numbers are binned at the reference's quantiles, other values by value;
    nulls are a separate bin. PSI = Σ (p - q) · ln(p / q), where a share of zero counts as 1e-4.
    Below 0.1 is usually called stable, above 0.25 shifted. It needs a few hundred rows.
    """
    known = reference if isinstance(reference, Profile) else profile(reference, bins)
    value = psi(known, known.shares_of(column(data, name)))
    expected = f"PSI of at most {at_most:.4g}"
    return _report(
        _result(
            "distribution",
            value <= at_most,
            expected,
            f"{value:.4g}",
            column=name,
            total=count_of(data),
        )
    )


# --------------------------------------------------------------------------- losses and metrics


def finite(**values: Any) -> Result:
    """Check that all numbers are finite: `finite(loss=loss, gradient=grad)`.

    Includes the elements of lists, arrays and tensors.
    """
    for name, value in values.items():
        bad = not_finite(value)
        if bad:
            kinds = ", ".join(sorted({repr(float(number)) for _, number in bad[:1000]}))
            return _report(_rows_result("finite", name, "finite numbers", bad, None, kinds))
    return _report(_result("finite", True, "finite numbers", ", ".join(values)))


@declaration
def gate(
    metric: str, value: float, *, at_least: float | None = None, at_most: float | None = None
) -> Result:
    """Check that a metric is in [at_least, at_most]: `gate("auc", auc, at_least=0.8)`.

    NaN always fails.
    """
    if at_least is None and at_most is None:
        raise UsageError(f"checks.gate({metric!r}): expected at_least= or at_most=, found neither")
    passed = (
        (at_least is None or value >= at_least)
        and (at_most is None or value <= at_most)
        and not math.isnan(value)
    )
    return _report(
        _result("gate", passed, _range(at_least, at_most), f"{value:.6g}", column=metric)
    )


@declaration
def better(
    metric: str,
    challenger: float,
    champion: float | None,
    *,
    by: float = 0.0,
    by_share: float = 0.0,
    lower: bool = False,
) -> Result:
    """Check that the challenger's metric is better than the champion's.

    The difference must exceed `by` and the share `by_share` of the champion's value. `lower`: lower
    is better, as for an error. Without a champion (None or NaN), any finite challenger passes.
    """
    if champion is None or math.isnan(champion):
        return _report(
            _result(
                "better",
                math.isfinite(challenger),
                "a finite value",
                f"{challenger:.6g}",
                column=metric,
            )
        )
    margin = max(by, by_share * abs(champion))
    gain = champion - challenger if lower else challenger - champion
    bound = champion - margin if lower else champion + margin
    expected = f"{'less' if lower else 'more'} than {bound:.6g} (champion: {champion:.6g})"
    return _report(_result("better", gain > margin, expected, f"{challenger:.6g}", column=metric))


# --------------------------------------------------------------------------- several at once


class CheckResults(list[Result]):
    """The results of a `collect()` block, in order. `failed`: those that did not pass."""

    @property
    def failed(self) -> list[Result]:
        return [each for each in self if not each.passed]


_collected: ContextVar[CheckResults | None] = ContextVar("eventflow_checks", default=None)


@declaration
@contextmanager
def collect(*, raises: bool = True, emit_passed: bool = False) -> Generator[CheckResults]:
    """Run all checks of the block, then raise one CheckFailed for those that failed.

    With `raises=False` nothing is raised (see `results.failed`), and the events of failures are
    published with the task's success. With `emit_passed`, each passed check is an event
    `check.passed`.
    """
    results = CheckResults()
    token = _collected.set(results)
    try:
        yield results
    finally:
        _collected.reset(token)
    _emit_results(results, emit_passed, raises)
    if raises and results.failed:
        raise CheckFailed(results.failed)


def _report(result: Result) -> Result:
    """Log a result; then collect it, or emit and raise it if it failed."""
    fields = {
        "check": result.check,
        "column": result.column,
        "expected": result.expected,
        "found": result.found,
    }
    if result.passed:
        log.info("check.passed", **fields)
    else:
        log.warning("check.failed", **fields, offending=result.offending, rows=result.rows)
    if (collected := _collected.get()) is not None:
        collected.append(result)
        return result
    _emit_results([result], False, True)
    if not result.passed:
        raise CheckFailed([result])
    return result


def _emit_results(results: Iterable[Result], passed_too: bool, raised: bool) -> None:
    """Emit events of results, in a task of a run.

    `raised`: the failures are about to be raised, so their events belong to the task's failure.
    """
    body = task_context()
    if body is None or not body.run_id:
        return
    for result in results:
        data = msgspec.to_builtins(result)
        if not result.passed:
            body.emit(
                "check.failed",
                {"data": data, "subject": result.column, "extensions": {}},
                with_failure=raised,
            )
        elif passed_too:
            body.emit("check.passed", {"data": data, "subject": result.column, "extensions": {}})


# --------------------------------------------------------------------------- results


def _result(check: str, passed: bool, expected: str, found: str, **more: Any) -> Result:
    return Result(check=check, passed=passed, expected=expected, found=found, **more)


def _rows_result(
    check: str,
    name: str,
    expected: str,
    bad: Sequence[tuple[int, Any]],
    total: int | None,
    found: str,
) -> Result:
    first = [[index, json_or_text(value)] for index, value in bad[:MAX_NAMED_ROWS]]
    of = f" in {len(bad)} of {total} rows" if bad and total is not None else ""
    return _result(
        check,
        not bad,
        expected,
        (found + of) if bad else "the same",
        column=name,
        offending=len(bad),
        total=total,
        rows=first,
    )


def _check_values(
    data: Data,
    names: Sequence[str],
    check: str,
    expected: str,
    bad: Callable[[Iterable[Any]], Iterable[bool]],
    allowed: float,
) -> Result:
    """Check every value of some columns.

    Fails for the first column with too many offending ones.
    """
    if not names:
        raise UsageError(f"checks.{check}(): expected one column or several, found none")
    total = count_of(data)
    for name in names:
        values = column(data, name)
        found = [(index, values[index]) for index, wrong in enumerate(bad(values)) if wrong]
        if len(found) > allowed * total:
            kinds = Counter(repr(json_or_text(value)) for _, value in found)
            text = ", ".join(kind for kind, _ in kinds.most_common(3))
            return _report(_rows_result(check, name, expected, found, total, text))
    return _report(
        _result(
            check,
            True,
            expected,
            "the same",
            column=names[0] if len(names) == 1 else None,
            total=total,
        )
    )


def _range(at_least: Any, at_most: Any) -> str:
    if at_least is None:
        return f"at most {at_most}"
    return f"at least {at_least}" if at_most is None else f"{at_least} to {at_most}"


_KINDS: Mapping[Any, type] = {float: Real, int: Integral, None: type(None), Any: object}
"""The type to test for a type in a schema: an int is a float too, numpy numbers are numbers."""


def _type_test(wanted: Any) -> Callable[[Any], bool]:
    members: tuple[Any, ...] = (
        get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
    )
    kinds = tuple(_KINDS.get(member, get_origin(member) or member) for member in members)
    nullable = type(None) in kinds or object in kinds

    def fits(value: Any) -> bool:
        if is_null(value):
            return nullable
        if isinstance(value, bool):
            return bool in kinds or object in kinds
        return isinstance(value, kinds)

    return fits


def _type_text(wanted: Any) -> str:
    return wanted.__name__ if isinstance(wanted, type) else str(wanted)


def _names(types: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {_type_text(wanted)}" for name, wanted in types.items())
