"""How often exits agree: one step by hand, what a draft tells and what it does not, and rates that are found again."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.generation.policies.acceptance import Acceptance, _course
from layerskip_moe.nn.ragged import MarginRule, likely_right

EXITS = (1, 2, 4)


def drawn(draw, half, mean, count):
    """Drafts of exponentially distributed margins, right with probability 1 - 2^-sqrt(m / half)."""
    margins = [draw.expovariate(1 / mean) for _ in range(count)]
    return [(margin, draw.random() < 1 - 2 ** -math.sqrt(margin / half)) for margin in margins]


def test_nothing_known_is_the_same_for_all():
    acceptance = Acceptance(EXITS)
    assert acceptance.seen == 0
    assert {acceptance.half(row, exit_layer) for row in (0, 3) for exit_layer in EXITS} == {math.exp(-2.5)}


def test_a_step_along_the_gradient():
    """Of the logarithm of P(right), or of P(wrong), by -log h: the exit by 0.5 / 1.15 of it, the row by 0.12; of one
    that was wrong in spite of its margin no more than by 1."""
    for margin, right in ((0.1, True), (0.1, False), (3.0, False)):
        acceptance, step = Acceptance(EXITS), 1e-6

        def log_likelihood(minus_log_half, margin=margin, right=right):
            wrong = 2 ** -math.sqrt(margin * math.exp(minus_log_half))
            return math.log(1 - wrong if right else wrong)

        gradient = (log_likelihood(2.5 + step) - log_likelihood(2.5 - step)) / (2 * step)
        assert (gradient > 0) == right and (gradient < -1) == (margin == 3.0)
        gradient = max(gradient, -1.0)
        acceptance.see(5, 2, [(margin, right)])
        known = 2.5 + 0.5 / 1.15 * gradient
        assert acceptance.half(5, 2) == pytest.approx(math.exp(-known - 0.12 * gradient))
        assert acceptance.half(6, 2) == pytest.approx(math.exp(-known)), "another row"
        assert acceptance.half(5, 4) == pytest.approx(math.exp(-2.5 - 0.12 * gradient)), "the row's other exits"
        assert acceptance.seen == 0, "of the others nothing"


@given(st.floats(0.02, 2.0), st.floats(1e-3, 50.0))
def test_steps_have_no_bent(half, margin):
    """What a draft that is as likely right as it is taken to be is expected to tell is nothing, weighted or not."""
    right = likely_right(margin, half)
    told = []
    for was in (True, False):
        acceptance = Acceptance((1,))
        acceptance._exits[1][0] = -math.log(half)
        acceptance.see(0, 1, [(margin, was)])
        told.append(-math.log(half) - acceptance._exits[1][0])
    assert right * told[0] + (1 - right) * told[1] == pytest.approx(0, abs=1e-9)


def test_places_of_which_several_exits_are_told_tell_of_the_row_once():
    one, other = Acceptance(EXITS), Acceptance(EXITS)
    one.see(0, 1, [(0.1, True)])
    for exit_layer in EXITS:
        other.see(0, exit_layer, [(0.1, True)], exits_told=3)
    assert other.half(0, 1) == pytest.approx(one.half(0, 1), rel=0.05)


@given(st.floats(0.02, 2.0), st.floats(0.2, 3.0), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_many_drafts_tell_half_and_rate(half, mean, seed):
    acceptance, draw = Acceptance(EXITS), random.Random(seed)
    halves, rates = [], []
    for _ in range(900):
        acceptance.see(0, 4, drawn(draw, half, mean, 3))
        halves.append(math.log(acceptance.half(0, 4)))
        rates.append(acceptance.rate(0, 4))
    assert sum(halves[300:]) / 600 == pytest.approx(math.log(half), abs=0.4)
    right = [right for _, right in drawn(random.Random(0), half, mean, 4000)]
    assert sum(rates[300:]) / 600 == pytest.approx(sum(right) / 4000, abs=0.06)


@given(st.floats(0.05, 0.95), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_rates_are_found_where_margins_are_not_known(rate, seed):
    acceptance, draw = Acceptance(EXITS), random.Random(seed)
    found = []
    for _ in range(900):
        acceptance.see(0, 4, [(math.nan, draw.random() < rate) for _ in range(2)])
        found.append(acceptance.rate(0, 4))
    assert sum(found[300:]) / 600 == pytest.approx(rate, abs=0.1)


def test_another_text_begins_with_what_is_known_of_all():
    acceptance = Acceptance(EXITS)
    for _ in range(40):
        acceptance.see(3, 1, [(1.0, False)])
    before = acceptance.half(3, 1)
    acceptance.begin()
    assert before > acceptance.half(3, 1) > 0.5
    assert acceptance.half(3, 1) == acceptance.half(4, 1)


@given(
    st.lists(st.tuples(st.floats(0.0) | st.just(math.nan), st.booleans()), min_size=1),
    st.integers(1, 200),
    st.floats(0, 1),
)
@settings(max_examples=40, deadline=None)
def test_all_stay_probabilities(judged, times, least):
    acceptance = Acceptance(EXITS)
    for _ in range(times):
        acceptance.see(0, 1, judged[:8])
    for row in (0, 1):
        for exit_layer in EXITS:
            assert 0 < acceptance.half(row, exit_layer) < math.inf and 0 < acceptance.rate(row, exit_layer) < 1
            course = acceptance.course(row, exit_layer, least, 5)
            assert len(course) == 5 and all(0 <= kept <= 1 and 0 < right <= 1 for kept, right in course)
            assert [kept for kept, _ in course] == sorted([kept for kept, _ in course], reverse=True)


@pytest.mark.parametrize("least", [0, 10, 20, 28])
@pytest.mark.parametrize("quarters", [2, 5, 9])
def test_a_course_is_what_comes_of_the_rule(quarters, least):
    """Beside 4000 rounds of drafts drawn as it takes them to be. (How likely those that are kept are right is taken to
    be the same in all rounds, which is off by up to 0.12 where many in a row are kept.)"""
    course, half, draw = _course(quarters, least, 4), math.exp(-quarters / 4), random.Random(0)
    rounds = [drawn(draw, half, 1.0, 4) for _ in range(4000)]
    margins = torch.tensor([[margin for margin, _ in drafts] for drafts in rounds])
    counts = MarginRule([half] * len(rounds), least / 32).kept(margins, [4] * len(rounds))
    for place, (kept, right) in enumerate(course):
        pairs = zip(rounds, counts, strict=True)
        there = [all(was for _, was in drafts[: place + 1]) for drafts, count in pairs if count > place]
        assert kept == pytest.approx(len(there) / len(rounds), abs=0.12 if least == 10 and place >= 2 else 0.06)
        assert len(there) < 200 or right == pytest.approx(sum(there) / len(there), abs=0.08)


@pytest.mark.parametrize(("least", "length"), [(0.0, 1), (0.3, 5), (0.9, 31)])
def test_totals_are_those_of_a_course(least, length):
    """A draft is made where the one before it was kept, the first in any case."""
    acceptance = Acceptance((2,))
    acceptance.see(0, 2, [(0.3, True), (0.1, False), (2.0, True)])
    course = acceptance.course(0, 2, least, length)
    kept, right, made = acceptance.totals(0, 2, least, length)
    assert kept == pytest.approx(sum(share for share, _ in course))
    assert right == pytest.approx(sum(share * of_them for share, of_them in course))
    assert made == pytest.approx(1 + sum(share for share, _ in course[:-1]))


def test_courses_of_many_drafts_that_are_hardly_ever_right():
    assert len(_course(-24, 0, 200)) == 200 and _course(-24, 1, 200)[-1][0] == 0.0
