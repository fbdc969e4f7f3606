"""How often exits agree: counts by hand, what a draft tells and what it does not, and certainty as a probability."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.generation.policies.acceptance import Acceptance

EXITS = (1, 2, 4)


def test_nothing_known_is_one_half():
    acceptance = Acceptance(EXITS, 3)
    assert acceptance.rates(0, 2) == [0.5] * 3
    assert all(acceptance.exponent(exit_layer) is None for exit_layer in EXITS)


def test_a_draft_tells_of_its_exit_and_of_places_up_to_the_first_wrong_one():
    acceptance = Acceptance(EXITS, 3)
    acceptance.see_draft(0, 2, 3, 1)  # right, wrong, unknown
    pooled = [(1 + 4 * 0.5) / 5]
    pooled.append((0 + 4 * pooled[0]) / 5)
    pooled.append(pooled[1])  # no try: what the place before it has
    own = [(1 + 8 * pooled[0]) / 9, (0 + 8 * ((0 + 4 * pooled[0]) / 5)) / 9]
    rates = acceptance.rates(0, 2)
    assert rates[0] == pytest.approx(own[0])
    assert rates[1] < own[0] and rates[1] == pytest.approx((0 + 8 * (0 + 4 * rates[0]) / 5) / 9)
    assert acceptance.rates(7, 2)[:2] == pytest.approx(pooled[:2]), "another row has what is known of all"
    assert acceptance.rates(0, 1) == [0.5] * 3


@given(st.integers(0, 8), st.integers(0, 8))
def test_more_accepted_is_never_less_likely(accepted, more):
    few, many = Acceptance(EXITS, 8), Acceptance(EXITS, 8)
    few.see_draft(0, 1, 8, min(accepted, more))
    many.see_draft(0, 1, 8, max(accepted, more))
    pairs = zip(few.rates(0, 1), many.rates(0, 1), strict=True)
    assert all(low <= high + 1e-12 for low, high in pairs)


@given(st.floats(0.05, 0.95), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_many_rounds_tell_the_rate(rate, seed):
    acceptance, draw = Acceptance(EXITS, 4), random.Random(seed)
    for _ in range(600):
        right = [draw.random() < rate for _ in range(4)]
        acceptance.see_draft(0, 4, 4, right.index(False) if False in right else 4)
    assert acceptance.rates(0, 4)[0] == pytest.approx(rate, abs=0.25)
    assert acceptance.rates(1, 4)[0] == pytest.approx(rate, abs=0.1)


def test_a_text_tells_of_every_start():
    """right, right, wrong, right: drafts begun at the four places are right for 2, 1, 0 and 1 tokens."""
    by_text, by_draft = Acceptance(EXITS, 5), Acceptance(EXITS, 5)
    by_text.see_text(0, 1, [True, True, False, True])
    for drafted, accepted in ((3, 2), (2, 1), (1, 0), (1, 1)):
        by_draft.see_draft(0, 1, drafted, accepted)
    assert by_text.rates(0, 1) == by_draft.rates(0, 1)


def test_another_text_begins_with_what_is_known_of_all():
    acceptance = Acceptance(EXITS, 2)
    for _ in range(40):
        acceptance.see_draft(3, 1, 2, 0)
    before = acceptance.rates(3, 1)
    acceptance.begin()
    assert before[0] < acceptance.rates(3, 1)[0] < 0.2
    assert acceptance.rates(3, 1) == acceptance.rates(4, 1)


@given(st.floats(0.1, 2.0), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_certainty_to_a_power_is_fitted(exponent, seed):
    acceptance, draw = Acceptance(EXITS, 2), random.Random(seed)
    for _ in range(300):
        certainty = draw.random()
        acceptance.see_certainties(2, [certainty], int(draw.random() < certainty**exponent))
    acceptance.fit_exponents()
    fitted = acceptance.exponent(2)
    assert fitted is not None and exponent / 2 < fitted < 2 * exponent
    assert acceptance.exponent(1) is None


def test_certainties_behind_the_first_wrong_draft_tell_nothing():
    one, other = Acceptance(EXITS, 8), Acceptance(EXITS, 8)
    for _ in range(30):
        one.see_certainties(1, [0.9, 0.4, 0.7, 0.8], 1)
        other.see_certainties(1, [0.9, 0.4, 0.1, 0.2], 1)
    one.fit_exponents()
    other.fit_exponents()
    assert one.exponent(1) == other.exponent(1)


def test_what_was_given_up_counts_as_likely_as_it_seemed():
    acceptance = Acceptance(EXITS, 3)
    acceptance.see_given_up(0, 1, 0, 0.5)
    assert acceptance.rates(0, 1) == [0.5] * 3, "nothing is known of certainties yet"
    for _ in range(40):
        acceptance.see_certainties(1, [0.3], 0)  # never right: the exponent is as large as it gets
    acceptance.fit_exponents()
    acceptance.see_given_up(0, 1, 1, 0.3)
    assert acceptance.rates(0, 1)[0] == 0.5 and acceptance.rates(0, 1)[1] < 0.5
