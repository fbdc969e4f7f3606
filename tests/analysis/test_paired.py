"""Paired differences: by hand, and against scipy."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from layerskip_moe.analysis.paired import paired_difference


def test_by_hand():
    # Differences 1, 2, 3: mean 2, s = 1, t of two degrees of freedom is 4.303.
    found = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert (found.mean, found.pairs) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.303 / 3**0.5) == found.mean - found.low
    shares = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0], relative=True)
    assert (shares.mean, shares.low, shares.high) == pytest.approx((0.1, 0.1, 0.1))


def test_one_pair_has_no_interval():
    found = paired_difference([3.0], [4.0])
    assert (found.mean, found.low, found.high, found.pairs) == (-1.0, None, None, 1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=2, max_size=31))
def test_the_interval_is_students(pairs):
    values, baseline = zip(*pairs, strict=True)
    found = paired_difference(values, baseline)
    differences = [value - base for value, base in pairs]
    reach = stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(differences)
    assert (found.low, found.high) == pytest.approx((found.mean - reach, found.mean + reach), rel=1e-3, abs=1e-2)
    assert found.high - found.low == pytest.approx(2 * reach, rel=1e-3)


def test_past_thirty_degrees_of_freedom_it_is_a_little_wide():
    values = [float(i % 7) for i in range(60)]
    found, exact = paired_difference(values, [0.0] * 60), stats.t.interval(0.95, 59, scale=stats.sem(values))
    assert 1 < (found.high - found.low) / (exact[1] - exact[0]) < 1.03


@pytest.mark.parametrize(("values", "baseline"), [([], []), ([1.0], [1.0, 2.0])])
def test_what_makes_no_pairs_is_refused(values, baseline):
    with pytest.raises(ValueError, match="make no pairs"):
        paired_difference(values, baseline)
