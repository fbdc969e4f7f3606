"""How often exits agree: one step by hand, what a draft tells and what it does not, and rates that are found again."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.generation.policies.acceptance import Acceptance

EXITS = (1, 2, 4)


def sigmoid(logit):
    return 1 / (1 + math.exp(-logit))


def test_nothing_known_is_the_same_for_all():
    acceptance = Acceptance(EXITS)
    assert acceptance.seen == 0
    assert {acceptance.rates(row, exit_layer) for row in (0, 3) for exit_layer in EXITS} == {(sigmoid(0.8),) * 2}


def test_a_step_along_the_gradient():
    """One draft, right: the exit by 2 / 1.15 of what was missing, the row by a quarter of it."""
    acceptance = Acceptance(EXITS)
    missing = 1 - sigmoid(0.8)
    acceptance.see_draft(5, 2, 1, 1)
    known = 0.8 + 2 / 1.15 * missing
    assert acceptance.rates(5, 2) == pytest.approx((sigmoid(known + 0.15 * missing),) * 2)
    assert acceptance.rates(6, 2) == pytest.approx((sigmoid(known),) * 2), "another row"
    assert acceptance.rates(5, 4) == pytest.approx((sigmoid(0.8 + 0.15 * missing),) * 2), "the row's other exits"
    assert acceptance.seen == 0, "of the others nothing"


def test_behind_right_drafts_it_may_be_another_rate():
    acceptance = Acceptance(EXITS)
    for _ in range(60):
        acceptance.see_text(0, 1, [True, True, False])  # first always right, later half the time
    first, later = acceptance.rates(1, 1)
    assert first > 0.8 > 0.65 > later
    other = acceptance.rates(1, 4)
    assert other[1] < other[0], "all exits have that in common"


def test_what_stands_behind_the_first_wrong_draft_tells_nothing():
    one, other = Acceptance(EXITS), Acceptance(EXITS)
    one.see_draft(0, 1, 5, 1)
    other.see_draft(0, 1, 2, 1)
    assert one.rates(0, 1) == other.rates(0, 1)


@given(st.integers(0, 8), st.integers(0, 8))
def test_more_accepted_is_never_less_likely(accepted, more):
    few, many = Acceptance(EXITS), Acceptance(EXITS)
    few.see_draft(0, 1, 8, min(accepted, more))
    many.see_draft(0, 1, 8, max(accepted, more))
    pairs = zip(few.rates(0, 1), many.rates(0, 1), strict=True)
    assert all(low <= high + 1e-12 for low, high in pairs)


@given(st.floats(0.05, 0.95), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_many_rounds_tell_the_rate(rate, seed):
    acceptance, draw = Acceptance(EXITS), random.Random(seed)
    found = []
    for _ in range(900):
        right = [draw.random() < rate for _ in range(4)]
        acceptance.see_draft(0, 4, 4, right.index(False) if False in right else 4)
        found.append(acceptance.rates(0, 4)[0])
    assert sum(found[300:]) / 600 == pytest.approx(rate, abs=0.1)


def test_another_text_begins_with_what_is_known_of_all():
    acceptance = Acceptance(EXITS)
    for _ in range(40):
        acceptance.see_draft(3, 1, 2, 0)
    before = acceptance.rates(3, 1)
    acceptance.begin()
    assert before[0] < acceptance.rates(3, 1)[0] < 0.4
    assert acceptance.rates(3, 1) == acceptance.rates(4, 1)


@given(st.lists(st.booleans(), min_size=1), st.integers(1, 400))
@settings(max_examples=30, deadline=None)
def test_rates_stay_probabilities(right, times):
    acceptance = Acceptance(EXITS)
    for _ in range(times):
        acceptance.see_text(0, 1, right[:8])
        acceptance.see_draft(0, 1, 3, 3 * right[0])
    assert all(0 < rate < 1 for row in (0, 1) for exit_layer in EXITS for rate in acceptance.rates(row, exit_layer))
