"""Strict JSON against the standard library and exact arithmetic; times against RFC 3339."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eventflow.events.event import parse_rfc3339, parse_time
from eventflow.events.strict_json import decode_text, read_json, read_report

NUMBERS = st.one_of(
    st.integers().map(str),
    st.integers(-(2**70), 2**70).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.floats(allow_nan=False, allow_infinity=False).map("{:.25e}".format),
    st.from_regex(r"-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,3})?", fullmatch=True),
)


def is_exact(text: str) -> bool:
    """Whether a number of 64 bits is written with these digits."""
    if set(text) <= set("-0123456789"):
        return -(2**63) <= int(text) < 2**64
    number, exact = float(text), Decimal(text)
    if number in (float("inf"), float("-inf")):
        return False
    digits = len(str(abs(exact).normalize().as_tuple().digits)) if exact else 1
    shortest = Decimal(repr(number))
    return exact in (shortest, Decimal(f"{number:.{max(digits, 1)}e}")) or any(
        exact == Decimal(f"{number:.{places}e}") for places in range(60)
    )


@given(NUMBERS)
@example("1e-400")
@example("-0.0")
@example("0e999")
@example("9007199254740993.0")
def test_a_number_is_exact_or_refused(text: str):
    """A number is read with its digits, or refused: by itself, among others, and beside a string
    that looks like one.
    """
    wrapped = [text, f"[1, {text}]", f'{{"a": {text}, "b": "{text}", "é": 1.5}}']
    for body in wrapped:
        try:
            value: Any = read_json(body.encode())
        except ValueError:
            assert not is_exact(text), body
        else:
            assert is_exact(text) and value == json.loads(body), body


@given(st.text(max_size=30), NUMBERS)
def test_a_number_in_a_string_is_text(text: str, number: str):
    """Digits in strings and keys are never taken for numbers."""
    value = {text: [f"{text}{number}", number], number: text}
    assert read_json(json.dumps(value).encode()) == value
    assert read_json(orjson.dumps(value)) == value


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_marks(encoding: str):
    """A byte order mark says how a text is encoded, and is no part of it; it is not required."""
    assert decode_text("é".encode(encoding)) == "é"
    assert read_json(' {"é": "\ufeff"}'.encode(encoding)) == {"é": "\ufeff"}
    assert read_report('[NaN, "é"]'.encode(encoding)) == [None, "é"]


def test_a_report_is_strict_where_it_is_no_measurement():
    """NaN and long numbers are read; a repeated key and damage are refused as in other JSON."""
    assert read_report(b'{"a": [NaN, -Infinity, 1e2], "b": "NaN"}') == {
        "a": [None, None, 100.0],
        "b": "NaN",
    }
    assert read_report(b"[18446744073709551616, 0.12345678901234567890]") == [
        2**64,
        0.12345678901234568,
    ]
    for body in (
        b'{"a": NaN, "a": 1}',
        b"[NaN",
        b'{"a": 1, "a": 1}',
        b"[" * 65 + b"NaN" + b"]" * 65,
    ):
        with pytest.raises(ValueError):
            read_report(body)


def test_keys_are_counted_by_object():
    """The limit is of one object; as many objects as fit are read."""
    rows = [{f"k{n}": n for n in range(100)} for _ in range(200)]
    assert read_json(json.dumps(rows).encode(), max_keys=100) == rows
    with pytest.raises(ValueError, match="99 keys in one object, found 100"):
        read_json(json.dumps(rows).encode(), max_keys=99)


RFC_3339 = {
    "2026-01-01T00:00:00Z": datetime(2026, 1, 1, tzinfo=UTC),
    "2026-01-01t00:00:00z": datetime(2026, 1, 1, tzinfo=UTC),
    "2026-01-01 00:00:00+00:00": datetime(2026, 1, 1, tzinfo=UTC),
    "2026-01-01T01:30:00.5+01:30": datetime(2026, 1, 1, 0, 0, 0, 500_000, tzinfo=UTC),
    "2026-01-01T00:00:00.123456789Z": datetime(2026, 1, 1, 0, 0, 0, 123_456, tzinfo=UTC),
    "2026-01-01T00:00:00-00:00": datetime(2026, 1, 1, tzinfo=UTC),
    "2016-12-31T23:59:60Z": datetime(2017, 1, 1, tzinfo=UTC),
}
OTHER = [
    "20260101T000000Z",
    "2026-W01-1T00:00:00Z",
    "2026-01-01T00Z",
    "2026-01-01T00:00Z",
    "2026-01-01T00:00:00,5Z",
    "2026-01-01T00:00:00+0000",
    "2026-01-01T00:00:00",
    "2026-01-01",
    "2026-02-30T00:00:00Z",
    "2026-01-01T24:00:00Z",
    "9999-12-31T23:59:60Z",
    "2026-01-01T00:00:00+01:00:30",
    "",
]


def test_times_are_rfc_3339():
    """The time of a CloudEvent is RFC 3339, all of it; other forms of ISO 8601 are refused, and
    read only where people write them.
    """
    for text, moment in RFC_3339.items():
        assert parse_rfc3339(text) == parse_time(text) == moment
    for text in OTHER:
        with pytest.raises(ValueError, match=r"^time: expected"):
            parse_rfc3339(text)
    assert parse_time("2026-01-01T00:00Z") == RFC_3339["2026-01-01T00:00:00Z"]
