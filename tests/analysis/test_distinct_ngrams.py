"""distinct_ngrams by its definition, and what must hold for any text."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.analysis import distinct_ngrams

CONTINUATIONS = st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=5)


@pytest.mark.parametrize(
    ("continuations", "n", "share"),
    [
        ([[1, 2, 3, 4, 5]], 4, 1.0),
        ([[7] * 10], 4, 1 / 7),
        ([[1, 2, 1, 2, 1, 2, 1]], 4, 2 / 4),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 4, 1 / 2),  # counted over all continuations together
        ([[1, 2], [3, 4]], 2, 1.0),  # [2, 3] spans two continuations and is no bigram
        ([[1, 2], [3, 1], [2]], 1, 3 / 5),
    ],
)
def test_by_hand(continuations, n, share):
    assert distinct_ngrams(continuations, n) == pytest.approx(share)


def test_too_short_for_any_is_not_a_number():
    assert math.isnan(distinct_ngrams([[1, 2, 3], []], 4))


def test_n_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        distinct_ngrams([[1]], 0)


@given(CONTINUATIONS, st.integers(1, 4))
def test_saying_everything_twice_halves_the_share(continuations, n):
    once = distinct_ngrams(continuations, n)
    if math.isnan(once):
        assert all(len(tokens) < n for tokens in continuations)
    else:
        assert 0 < once <= 1
        assert distinct_ngrams(continuations * 2, n) == pytest.approx(once / 2)
        assert distinct_ngrams(continuations[::-1], n) == once
