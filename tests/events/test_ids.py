"""The text of ids: what people copy, and what sorts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventflow.events.event import ALPHABET, format_id
from eventflow.runs.run import parse_id

IDS = st.integers(0, (1 << 63) - 1)


@given(IDS)
def test_the_text_is_read_as_the_id(ident: int):
    """Thirteen letters, five bits each, from which `parse_id` makes the same id."""
    text = format_id(ident)
    assert text == "".join(ALPHABET[ident >> shift & 31] for shift in range(60, -1, -5))
    assert parse_id(text) == ident


@given(IDS, IDS)
def test_texts_sort_as_ids_do(one: int, other: int):
    """The texts of two ids are in the order of the ids."""
    assert (format_id(one) < format_id(other)) == (one < other)


@pytest.mark.parametrize("text", ["", "0" * 12, "u" * 13, "z" * 13])
def test_other_texts_are_no_ids(text: str):
    """A text of another length, with another letter or above 63 bits is no id."""
    assert parse_id(text) is None
