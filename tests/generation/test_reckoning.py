"""Seconds that rounds are reckoned to take, and promises that are kept or not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.generation.cost_model import CostModel
from layerskip_moe.generation.policies.policy import RoundReport
from layerskip_moe.generation.policies.reckoning import Reckoning
from layerskip_moe.nn.ragged import Staged

SECONDS = (1e-3, 5e-4, 3e-4, 1e-4, 2e-5, 3e-4, 4e-5, 5e-5, 1.2e-4)
COST = CostModel(6, (1, 3, 5), 4, 2, SECONDS)


def report(exit_layer, drafted, accepted, seconds, experts=None):
    return RoundReport(
        rows=[0],
        exit_layers=[exit_layer],
        drafted=[drafted],
        accepted=[accepted],
        confidences=[[]],
        seconds=seconds,
        tokens=torch.zeros(1, drafted + 1, dtype=torch.int64),
        experts=experts,
        made=[drafted],
    )


@pytest.mark.parametrize("int8", [False, True])
def test_whole_numbers_are_the_cost_model_s(int8):
    cost = CostModel(6, (1, 3, 5), 4, 2, SECONDS, int8)
    reckoning = Reckoning(cost, doubt=0.1)
    reckoning.proposing = 0  # what stages do is not known beforehand
    for exit_layer, drafts in [(1, 1), (3, 4), (6, 5)]:
        found = reckoning.seconds(exit_layer, drafts, drafts + 1, 1)
        assert found == pytest.approx(cost.round_seconds([exit_layer], [drafts]))
    between = reckoning.seconds(2, 1.5, 2.5, 1)
    assert reckoning.seconds(2, 1, 2, 1) < between < reckoning.seconds(2, 2, 3, 1)
    assert reckoning.seconds(2, 1, 2, 1, 1.5) > reckoning.seconds(2, 1, 2, 1)


INT8 = CostModel(8, (1, 3, 5), 4, 2, SECONDS, True)


def in_stages(exit_layer, made, staged):
    did = report(exit_layer, made, made, 1.0)
    did.staged = staged
    return did


def test_drafts_in_stages_take_what_they_took():
    """Of one row, by exits that have as many later layers; what was done for each draft is learnt."""
    reckoning = Reckoning(INT8, doubt=0.1)
    assert [reckoning.in_stages(exit_layer) for exit_layer in (1, 3, 4, 8)] == [False, False, True, True]
    assert not Reckoning(COST, doubt=0.1).in_stages(6), "drafts are not int8"
    for _ in range(60):
        reckoning.see_staged(in_stages(8, 8, Staged(2, 4, 2, 10, 6)))
        reckoning.see_staged(report(8, 3, 3, 1.0))
    expected = INT8.round_seconds([8], [8], None, [8], Staged(2, 4, 2, 10, 6))
    assert reckoning.seconds(8, 8, 9, 1) == pytest.approx(expected, rel=0.02)
    assert reckoning.seconds(8, 8, 10, 2) == pytest.approx(INT8.round_seconds([8, 8], [8, 0]), rel=0.02), "two rows"
    assert reckoning.seconds(3, 4, 5, 1) == pytest.approx(INT8.round_seconds([3], [4]))
    least = INT8.round_seconds([8], [1], None, [1], Staged(2, 1, 1, 1.25, 1))
    assert reckoning.seconds(8, 1, 2, 1) == pytest.approx(least), "neither stage runs less than once"


def test_long_rounds_in_stages_tell_more_than_short_ones():
    """A round of one draft, in which many places were run over in vain, says little of one of 31."""
    reckoning = Reckoning(INT8, doubt=0.1)
    for _ in range(40):
        reckoning.see_staged(in_stages(8, 1, Staged(2, 1, 1, 8, 1)))
        reckoning.see_staged(in_stages(8, 31, Staged(2, 6, 5, 36, 9)))
    did = Staged(2, 7 * 31 / 32, 6 * 31 / 32, 44 * 31 / 32, 10 * 31 / 32)
    assert reckoning.seconds(8, 31, 32, 1) == pytest.approx(INT8.round_seconds([8], [31], None, [31], did), rel=0.05)


def test_rounds_in_stages_are_judged_by_what_was_done():
    reckoning, did = Reckoning(INT8, doubt=0.1), Staged(2, 20, 15, 33, 30)
    slow = in_stages(8, 8, did)
    slow.seconds = INT8.round_seconds([8], [8], None, [8], did)
    for _ in range(20):
        reckoning.see_plain(1, INT8.round_seconds([0], [0]))
        reckoning.see_round(slow, 0.0)
    assert reckoning.offset == pytest.approx(0.0, abs=0.02), "as long as that takes"


def test_experts_that_are_shared_cost_less():
    reckoning = Reckoning(COST, doubt=0.0)
    before = reckoning.seconds(1, 3, 4, 1)
    for _ in range(40):
        reckoning.see_experts(report(1, 3, 3, 1.0, experts=[2, 2, 2]))
    saved = SECONDS[7] * COST.more_experts(1, 4)
    assert reckoning.seconds(1, 3, 4, 1) == pytest.approx(before - saved, rel=1e-3)


@given(share=st.floats(0.3, 1.5), slower=st.sampled_from([0.7, 1.0, 1.4]))
def test_promises_are_measured_in_plain_steps(share, slower):
    """What slows all steps alike breaks no promise, and what was never tried is taken at its word."""
    reckoning = Reckoning(COST, doubt=0.15)
    assert reckoning.trust(2) == 1.0
    seconds = COST.round_seconds([2], [3])
    promised = 4 / seconds / share
    for _ in range(150):
        for _ in range(3):
            reckoning.see_plain(1, slower * COST.round_seconds([0], [0]))
        reckoning.see_round(report(2, 3, 3, slower * seconds), promised)
    assert reckoning.trust(2) == pytest.approx((80 + 40) / (80 / share + 40), rel=0.1)
    assert reckoning.trust(3) == 1.0


def test_early_exits_are_trusted_less_where_all_layers_may_draft():
    """Until it is seen what they keep; not by a cost model that is taken as it is."""
    reckoning = Reckoning(INT8, doubt=0.1)
    assert reckoning.trust(2) == 0.9 and reckoning.trust(8) == 1.0
    seconds = INT8.round_seconds([2], [3])
    for _ in range(150):
        reckoning.see_plain(1, INT8.round_seconds([0], [0]))
        reckoning.see_round(report(2, 3, 3, seconds), 4 / seconds)
    assert 0.95 < reckoning.trust(2) < 1.0
    assert Reckoning(INT8, doubt=0.0).trust(2) == 1.0


def test_what_was_not_promised_does_not_count():
    reckoning = Reckoning(COST, doubt=0.1)
    for _ in range(10):
        reckoning.see_round(report(2, 3, 0, 1.0), 0.0)
    assert reckoning.trust(2) == 1.0


def test_what_is_looked_up_is_not_what_layers_cost():
    """A round that no layer drafted in says nothing of drafting, one that looked up in the end only of the rest."""
    reckoning = Reckoning(INT8, doubt=0.1)
    before = reckoning.seconds(8, 8, 9, 1, 8)
    all_looked_up = in_stages(8, 31, Staged(2, 0, 0, 0, 0, looked_up=31))
    all_looked_up.made = [0]
    reckoning.see_staged(all_looked_up)
    assert reckoning.seconds(8, 8, 9, 1, 8) == before
    some, others = Reckoning(INT8, doubt=0.1), Reckoning(INT8, doubt=0.1)
    with_some = in_stages(8, 20, Staged(2, 4, 2, 8, 6, looked_up=12))
    with_some.made = [8]
    some.see_staged(with_some)
    others.see_staged(in_stages(8, 8, Staged(2, 4, 2, 8, 6)))
    assert some.seconds(8, 8, 9, 1, 8) == others.seconds(8, 8, 9, 1, 8)
