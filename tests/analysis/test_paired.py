"""Paired differences, alone and many together: by hand, and against scipy."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from layerskip_moe.analysis.paired import holm, paired_difference, student_p


def test_by_hand():
    # Differences 1, 2, 3: mean 2, s = 1, t of two degrees of freedom is 4.303.
    found = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert (found.mean, found.pairs) == (2.0, 3)
    assert found.p == pytest.approx(1 - (12 / 14) ** 0.5)  # t^2 = 12; of two degrees of freedom, 1 - t / sqrt(2 + t^2)
    assert found.high - found.mean == pytest.approx(4.303 / 3**0.5) == found.mean - found.low
    shares = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0], relative=True)
    assert (shares.mean, shares.low, shares.high) == pytest.approx((0.1, 0.1, 0.1))


def test_one_pair_has_no_interval():
    found = paired_difference([3.0], [4.0])
    assert (found.mean, found.low, found.high, found.p, found.pairs) == (-1.0, None, None, None, 1)


@given(st.integers(1, 60), st.floats(-1e6, 1e6))
def test_p_is_students(degrees, t):
    assert student_p(t, degrees) == pytest.approx(2 * stats.t.sf(abs(t), degrees), rel=1e-6, abs=1e-13)


def test_differences_that_do_not_vary():
    assert paired_difference([3.0, 3.0], [1.0, 1.0]).p == 0
    assert paired_difference([1.0, 1.0], [1.0, 1.0]).p == 1


def test_holm_by_hand():
    # The smallest four times, the next three times, ..., none less than the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_lies_between_none_and_bonferroni_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    assert all(p <= found <= min(len(p_values) * p, 1) for p, found in zip(p_values, adjusted, strict=True))
    places = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [adjusted[place] for place in places] == sorted(adjusted)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=2, max_size=31))
def test_the_interval_is_students(pairs):
    values, baseline = zip(*pairs, strict=True)
    found = paired_difference(values, baseline)
    differences = [value - base for value, base in pairs]
    reach = stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(differences)
    assert (found.low, found.high) == pytest.approx((found.mean - reach, found.mean + reach), rel=0, abs=1e-3 * reach)
    assert found.high - found.low == pytest.approx(2 * reach, rel=1e-3)


def test_past_thirty_degrees_of_freedom_it_is_a_little_wide():
    values = [float(i % 7) for i in range(60)]
    found, exact = paired_difference(values, [0.0] * 60), stats.t.interval(0.95, 59, scale=stats.sem(values))
    assert 1 < (found.high - found.low) / (exact[1] - exact[0]) < 1.03


@pytest.mark.parametrize(("values", "baseline"), [([], []), ([1.0], [1.0, 2.0])])
def test_what_makes_no_pairs_is_refused(values, baseline):
    with pytest.raises(ValueError, match="make no pairs"):
        paired_difference(values, baseline)
