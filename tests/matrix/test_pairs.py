"""The rows of the matrix are what they are said to be: otherwise it would prove less than it seems to."""

import itertools

import pytest
from pairs import all_pairs, pairs_of


def test_every_possible_pair_is_in_a_row_and_no_impossible_one():
    factors = {"a": "123", "b": "12345", "c": "12", "d": "1234", "e": "12"}
    impossible = {frozenset({("a", "1"), ("b", "2")}), frozenset({("c", "2"), ("d", "3")})}
    rows = all_pairs(factors, impossible)
    found = set().union(*map(pairs_of, rows))
    for (a, values), (b, others) in itertools.combinations(factors.items(), 2):
        for value, other in itertools.product(values, others):
            pair = frozenset({(a, value), (b, other)})
            assert (pair in found) != (pair in impossible)
    assert 20 <= len(rows) <= 26  # 5 x 4 is the least possible
    assert rows == all_pairs(factors, impossible)


def test_pair_that_fits_nowhere_is_named():
    blocked = {frozenset({("a", "1"), ("c", value)}) for value in "12"}
    with pytest.raises(ValueError, match=r"fit into no row: .*\('a', '1'\)"):
        all_pairs({"a": "12", "b": "12", "c": "12"}, blocked)
