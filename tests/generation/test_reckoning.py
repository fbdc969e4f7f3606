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
    for exit_layer, drafts in [(1, 1), (3, 4), (6, 5)]:
        found = reckoning.seconds(exit_layer, drafts, drafts + 1, 1)
        assert found == pytest.approx(cost.round_seconds([exit_layer], [drafts]))
    between = reckoning.seconds(2, 1.5, 2.5, 1)
    assert reckoning.seconds(2, 1, 2, 1) < between < reckoning.seconds(2, 2, 3, 1)
    assert reckoning.seconds(2, 1, 2, 1, 1.5) > reckoning.seconds(2, 1, 2, 1)


def test_drafts_in_stages_take_what_they_took():
    """Of one row, by exits that have as many later layers; what was done for each draft is learnt."""
    cost = CostModel(6, (1, 3, 5), 4, 2, SECONDS, True)
    reckoning = Reckoning(cost, doubt=0.1)
    alone = reckoning.seconds(6, 8, 9, 1)
    reckoning.proposing = 2
    for exit_layer, in_stages in ((1, False), (3, False), (4, True), (6, True)):
        assert reckoning.in_stages(exit_layer) == in_stages
    reckoning = Reckoning(cost, doubt=0.1)
    reckoning.proposing = 2
    for _ in range(80):
        did = report(6, 8, 8, 1.0)
        did.staged = Staged(2, 4, 2, 10)
        reckoning.see_staged(did)
    expected = cost.round_seconds([6], [8], None, [8], Staged(2, 4, 2, 10))
    assert reckoning.seconds(6, 8, 9, 1) == pytest.approx(expected, rel=0.02) and expected < alone
    assert reckoning.seconds(6, 8, 10, 2) == pytest.approx(cost.round_seconds([6, 6], [8, 0]), rel=0.02), "two rows"
    assert reckoning.seconds(3, 4, 5, 1) == pytest.approx(cost.round_seconds([3], [4]))
    did.seconds = expected
    before = reckoning.offset
    for _ in range(5):
        reckoning.see_round(did, 0.0)
    assert reckoning.offset == pytest.approx(before, abs=0.02), "as long as was reckoned"


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


def test_what_was_not_promised_does_not_count():
    reckoning = Reckoning(COST, doubt=0.1)
    for _ in range(10):
        reckoning.see_round(report(2, 3, 0, 1.0), 0.0)
    assert reckoning.trust(2) == 1.0
