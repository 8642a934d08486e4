"""Columns of numbers: compact in memory, exact as text, rounded where they were measured."""

from __future__ import annotations

import copy
import math
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.values.column import CompactColumn, decode, encode, rounded

ENTRIES = st.lists(st.none() | st.floats())
HARD = (1.0, None, math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1.7e308)


def as_bits(column):
    return [None if n is None else struct.pack("<d", n) for n in column]


@given(ENTRIES)
def test_what_was_written_comes_back_to_the_last_bit(entries):
    assert as_bits(decode(encode(tuple(entries)))) == as_bits(entries)
    assert as_bits(decode(encode(CompactColumn(entries)))) == as_bits(entries)


@given(st.lists(st.floats()))
def test_rounding_takes_less_than_2e_9_and_leaves_five_bytes(numbers):
    found = rounded(numbers)
    for was, now in zip(numbers, found, strict=True):
        if math.isnan(was) or math.isinf(was) or was == 0:
            assert as_bits([now]) == as_bits([was])
        elif abs(was) >= 2.3e-308 and not math.isinf(now):
            assert now == pytest.approx(was, rel=2**-29, abs=0)
    if all(map(math.isfinite, found)) and all(map(math.isfinite, numbers)):
        assert len(encode(tuple(found))) == -(-5 * len(found) // 3) * 4
    assert rounded(found) == found or any(map(math.isnan, found))


@pytest.mark.parametrize(
    "bits", [0x7FFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0001, 0x7FF8_0000_0000_0000]
)
def test_a_nan_stays_one_whatever_its_bits(bits):
    (nan,) = struct.unpack("<d", struct.pack("<Q", bits))
    found = rounded([1.0, nan, 1e308, math.inf])
    assert found[0] == 1.0
    assert math.isnan(found[1])
    assert found[3] == math.inf


def test_half_of_what_a_number_has_in_json():
    numbers = tuple(rounded(np.random.default_rng(0).lognormal(size=1000).tolist()))
    assert len(encode(numbers)) < 7 * 1000


@given(ENTRIES)
def test_a_compact_column_is_the_sequence_of_its_entries(entries):
    column = CompactColumn(entries)
    assert as_bits(column) == as_bits(entries) == as_bits(column[k] for k in range(len(entries)))
    assert len(column) == len(entries)
    assert (None in column) == (None in entries)
    assert as_bits(column[1:]) == as_bits(entries[1:])
    array = np.asarray(column)
    assert as_bits(array) == as_bits(math.nan if n is None else n for n in entries) or None in entries
    assert [math.isnan(n) for n in array] == [n is None or math.isnan(n) for n in entries]


def test_it_equals_a_tuple_cannot_be_changed_and_goes_through_pickle_and_copy():
    entries = tuple(n for n in HARD if n is None or n == n)  # noqa: PLR0124
    column = CompactColumn(entries)
    assert column == entries
    assert column == list(entries)
    assert column == CompactColumn(entries)
    assert column != entries[1:]
    assert column != "no column"
    assert hash(column) == hash(entries)
    assert repr(column) == repr(entries)
    assert pickle.loads(pickle.dumps(column)) == copy.deepcopy(column) == entries
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(column)[0] = 2.0
    assert np.array(CompactColumn([0.5]), dtype=np.float32).dtype == np.float32


@pytest.mark.parametrize("text", ["AAA", "=AAAA", "no base64!", "AAAA"])
def test_a_text_that_is_no_column_is_refused(text):
    with pytest.raises(ValueError, match=r"padding|bytes|characters|multiple"):
        decode(text)
