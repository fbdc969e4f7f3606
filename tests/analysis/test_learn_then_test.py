"""The Hoeffding-Bentkus p-value against scipy, and by simulation: the promise is kept, and would not be by the mistakes
that are made with it.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr
from scipy.stats import binom

from layerskip_moe.analysis.learn_then_test import Trial, certified, p_value, sequences_needed, walk

shares = st.floats(0.005, 0.995)


def reference(losses, tolerance):
    n, total = len(losses), math.fsum(losses)
    mean = min(total / n, tolerance)
    h = rel_entr(mean, tolerance) + rel_entr(1 - mean, 1 - tolerance)
    return min(1, np.exp(-n * h), np.e * binom.cdf(math.ceil(total), n, tolerance))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=80), shares)
def test_p_value_equals_scipy_s(losses, tolerance):
    found = p_value(torch.tensor(losses, dtype=torch.float64), tolerance)
    assert found == pytest.approx(reference(losses, tolerance), rel=1e-9)
    assert found <= math.exp(-2 * len(losses) * max(0, tolerance - math.fsum(losses) / len(losses)) ** 2) * (1 + 1e-12)


@pytest.mark.parametrize("n", [59, 1000, 20000])
def test_p_value_of_many_sequences(n):
    losses = torch.zeros(n)
    losses[: n // 40] = 1
    assert p_value(losses, 0.05) == pytest.approx(reference(losses.tolist(), 0.05), rel=1e-8)


@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("n", [20, 120, 700])
def test_p_value_is_valid(n, tolerance):
    """Where the expected loss is the tolerance, p <= x has a probability of at most x: exact, over all coin counts."""
    values = np.array([p_value((torch.arange(n) < k).double(), tolerance) for k in range(n + 1)])
    chances = binom.pmf(np.arange(n + 1), n, tolerance)
    for x in (0.01, 0.05, 0.1, 0.5, 0.9):
        assert chances[values <= x].sum() <= x


def test_59_sequences_are_needed_at_five_percent():
    assert sequences_needed(0.05, 0.05) == 59
    assert p_value(torch.zeros(59), 0.05) <= 0.05 < p_value(torch.zeros(58), 0.05)


@given(st.floats(0.001, 0.99), st.floats(1e-6, 0.99))
@settings(deadline=None, derandomize=True)
def test_no_fewer_sequences_certify_anything(tolerance, risk):
    n = sequences_needed(tolerance, risk)
    assert p_value(torch.zeros(n), tolerance) <= risk
    assert n == 1 or p_value(torch.zeros(n - 1), tolerance) > risk


def walk_over(passes):
    """A walk over scales of which these pass, without any loss, and the others fail; and what it asked for."""
    asked, scales = [], [1 - (i + 1) / 10 for i in range(len(passes))]

    def losses_at(scale):
        asked.append(scale)
        return torch.zeros(10) if passes[len(asked) - 1] else torch.ones(10)

    return walk(losses_at, scales, tolerance=0.5, risk=0.1), asked, scales


@pytest.mark.parametrize("passing", range(5))
def test_the_walk_stops_at_the_first_failure_and_gives_the_one_before(passing):
    tests, asked, scales = walk_over([True] * passing + [False] + [True] * 3)
    assert asked == scales[: passing + 1] == [test.scale for test in tests]
    found = certified(tests, risk=0.1)
    assert found is None if passing == 0 else found.scale == scales[passing - 1]


def test_a_walk_may_certify_its_last_scale():
    tests, _, scales = walk_over([True] * 4)
    assert certified(tests, risk=0.1) == Trial(scales[-1], 0.0, pytest.approx(0.5**10))


SCALES = [1 - (step / 12) ** 2 for step in range(1, 13)]
N, TOLERANCE, RISK, CALIBRATIONS = 600, 0.05, 0.05, 300
# Two sources of sequences: all places differ or none (the worst for any bound), or a random share of them. A sequence
# that is easy at one scale is easy at the next. expected(scale) is known, and crosses the tolerance between scales.
POPULATIONS = {
    "all or nothing": (lambda u, v: torch.ones_like(v), lambda depth: 0.3 * depth),
    "shares": (lambda u, v: v, lambda depth: 0.6 * depth),
    "one step too far": (lambda u, v: torch.ones_like(v), lambda depth: 0.0501 * (depth > 0)),
}


def calibrations(name, rule):
    """The expected loss at the scale that each of 300 calibrations chose."""
    (size, chance), expected = POPULATIONS[name], []
    generator = torch.Generator().manual_seed(11)
    for _ in range(CALIBRATIONS):
        u, v = torch.rand(2, N, generator=generator, dtype=torch.float64)
        tests = walk(lambda s, u=u, v=v: (u < chance(1 - s)) * size(u, v), SCALES, tolerance=TOLERANCE, risk=RISK)
        scale = rule(tests)
        mean_size = 0.5 if name == "shares" else 1.0
        expected.append(chance(1 - scale) * mean_size)
    return np.array(expected)


def one_before_the_failure(tests):
    found = certified(tests, risk=RISK)
    return 1.0 if found is None else found.scale


@pytest.mark.parametrize("name", POPULATIONS)
def test_of_300_calibrations_at_most_24_break_the_bound(name):
    """Their number is at most Binomial(300, 0.05), of which 24 is the 99% quantile."""
    assert binom.ppf(0.99, CALIBRATIONS, RISK) == 24
    expected = calibrations(name, one_before_the_failure)
    assert (expected > TOLERANCE).sum() <= 24
    assert name == "one step too far" or np.median(expected) > TOLERANCE / 3, "and it certifies what can be used"


@pytest.mark.parametrize("name", POPULATIONS)
def test_giving_back_the_scale_that_failed_would_break_it(name):
    """As a public copy of CALM does."""
    assert (calibrations(name, lambda tests: tests[-1].scale) > TOLERANCE).sum() > 24


def test_trusting_the_mean_loss_would_break_it():
    generator = torch.Generator().manual_seed(12)
    means = (torch.rand(CALIBRATIONS, N, generator=generator) < 0.052).double().mean(dim=1)
    assert int((means <= TOLERANCE).sum()) > 24


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan])
@pytest.mark.parametrize("name", ["tolerance", "risk"])
def test_promises_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be above 0 and below 1"):
        sequences_needed(**{"tolerance": 0.05, "risk": 0.05, name: value})


@pytest.mark.parametrize("losses", [[], [0.5, 1.1], [-0.1], [math.nan]])
def test_losses_beyond_zero_and_one_are_refused(losses):
    with pytest.raises(ValueError, match="losses must be one or more numbers between 0 and 1"):
        p_value(torch.tensor(losses), 0.05)
