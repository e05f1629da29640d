"""Plain data comes back equal, to the last type, or is refused with its path."""

import datetime as dt
import enum
import math
import pathlib
import threading
import uuid
from collections import OrderedDict, namedtuple
from decimal import Decimal

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventflow.core.errors import NotStorable
from eventflow.serialization.tagged_json import decode_tagged, deep_equal, encode_plain, is_plain

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
EXTRA = (
    st.binary(max_size=8)
    | st.decimals()
    | st.datetimes()
    | st.datetimes(timezones=st.just(dt.UTC))
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.uuids()
)
HASHABLE = TEXT | st.integers() | st.booleans() | st.dates() | st.tuples(st.integers(), TEXT)
VALUES = st.recursive(
    LEAVES | EXTRA,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(TEXT | st.sampled_from(["$tuple", "$", "$dict"]), inner, max_size=3)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.sets(HASHABLE, max_size=3)
        | st.frozensets(HASHABLE, max_size=3)
    ),
    max_leaves=20,
)


def back(value):
    codec, data = encode_plain(value, "value")
    return orjson.loads(data) if codec == "json" else decode_tagged(data)


@given(VALUES)
def test_what_is_accepted_decodes_to_the_same(value):
    """NaN, big integers, tuples, sets, dates and keys that look like tags survive encoding, nested
    in any way.
    """
    assert deep_equal(back(value), value)


@given(
    st.recursive(
        LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4)
    )
)
def test_what_json_represents_exactly_is_json(value):
    """Data of JSON's own types is stored as plain JSON, unless a number in it is one that JSON
    lacks.
    """
    codec, data = encode_plain(value, "value")
    assert is_plain(value)
    if codec == "json":
        assert deep_equal(orjson.loads(data), value)
    else:
        assert b'"$float"' in data or b'"$int"' in data


Pair = namedtuple("Pair", "left right")


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


class Text(str):
    pass


@pytest.mark.parametrize(
    ("value", "path", "found"),
    [
        (object(), "v", "object"),
        ({"a": [1, 2, 3, threading.Lock()]}, "v['a'][3]", "_thread.lock"),
        (Text("x"), "v", "serialization.test_tagged_json.Text"),
        (OrderedDict(a=1), "v", "collections.OrderedDict"),
        ({object}, "v{}", "type"),
        ("\ud800", "v", "str with a lone surrogate"),
        ({"a": ["\udfff"]}, "v['a'][0]", "str with a lone surrogate"),
        ({"\ud800": 1}, "v key", "str with a lone surrogate"),
        (pathlib.Path("/tmp/\udcff"), "v", "str with a lone surrogate"),
    ],
)
def test_what_cannot_come_back_is_refused_by_name(value, path, found):
    """A value without a lossless form raises NotStorable with the path and type of the part (fault
    37).
    """
    with pytest.raises(NotStorable) as raised:
        encode_plain(value, "v")
    assert (raised.value.path, raised.value.found.removeprefix("tests.")) == (path, found)


def test_depth_and_cycles_are_refused():
    """Nesting that no reader would follow is refused, not a crash."""
    circle: list[object] = []
    circle.append(circle)
    deep: list[object] = []
    for _ in range(500):
        deep = [deep]
    for value in (circle, deep):
        with pytest.raises(NotStorable, match="nested too deep"):
            encode_plain(value, "v")


def test_paths_and_ids_come_back_as_what_they_were():
    """Paths and UUIDs, the usual results of file and upload tasks, need no annotation."""
    value = {"file": pathlib.Path("/data/in.csv"), "id": uuid.UUID(int=7), "price": Decimal("1.10")}
    assert deep_equal(back(value), value)


def test_deep_equal_compares_types():
    """`deep_equal`: NaN equals NaN, and 1, 1.0 and True are different."""
    assert deep_equal({"a": [math.nan]}, {"a": [math.nan]})
    assert not deep_equal(1, True)
    assert not deep_equal(1, 1.0)
    assert not deep_equal([1], (1,))
    assert not deep_equal(Decimal("1.0"), Decimal("1.00"))
