"""Adaptive: when it drafts, rests and looks, by how long steps take and how often drafts are right."""

import pytest
import torch

from layerskip_moe.generation import Sampling
from layerskip_moe.generation.cost_model import CostModel
from layerskip_moe.generation.policies import Adaptive
from layerskip_moe.generation.policies.policy import RoundReport
from layerskip_moe.nn import ModelConfig, MoEDecoder

N_LAYERS = 4


def one_round(policy, session, *, right, plain=1.0, drafting=1.0):
    """A round as planned, in which drafts are right or wrong, the same in all rows, and which lasts so many times as
    long as reckoned -> drafts of a row."""
    (exit_layer, length), *others = policy.plan(session)
    assert all(pair == (exit_layer, length) for pair in others)
    length = length if right else min(length, 1)
    rows, accepted = session.row_numbers, length * right
    exits, lengths = [exit_layer if length else 0] * len(rows), [length] * len(rows)
    seconds = (drafting if length else plain) * policy.cost_model.round_seconds(exits, lengths)
    tokens = torch.arange(length + 1).repeat(len(rows), 1)
    said = tokens if right else torch.full_like(tokens, 20)
    asked = said[:, None].repeat(1, N_LAYERS, 1)
    shadow = dict(shadow=asked, shadow_margins=torch.ones(asked.shape).double()) if policy.shadow else {}
    judged = [[(1.0, right)] * length for _ in rows]
    counts = [accepted] * len(rows), [[] for _ in rows]
    policy.observe(RoundReport(rows, exits, lengths, *counts, seconds, tokens, made=lengths, judged=judged, **shadow))
    return length


def told(policy, session, *, plain, drafting, steps=400):
    """Rounds in which all drafts are right, and plain steps, that last so many times as long as reckoned -> the share
    of rounds."""
    drafted = 0
    for _ in range(steps):
        if policy.rests(session):
            policy.rested(1, plain * policy.cost_model.round_seconds([0], [0]))
        else:
            drafted += one_round(policy, session, right=True, plain=plain, drafting=drafting) > 0
    return drafted / steps


@pytest.fixture
def fitted(monkeypatch, one_text):
    """fitted(row): an Adaptive for which a cost model was fitted, whose further rows take so many layers' time, and a
    session of its model."""

    def build(row=0.0):
        cost = CostModel(N_LAYERS, (), 0, 0, tuple(1e-6 * one for one in (0.1, 0.0, 0.1, 1.0, row, 1.0, row, 0.1, 0.0)))
        monkeypatch.setattr("layerskip_moe.generation.policies.adaptive.fit_cost_model", lambda *_, **__: cost)
        model, policy = (
            MoEDecoder(ModelConfig(23, n_layers=4, d_model=16, n_heads=2, num_experts=0, d_ff=8)),
            Adaptive(),
        )
        policy.prepare(model, 1)
        return policy, one_text(model)

    return build


@pytest.mark.parametrize("both", [0.7, 1.0, 1.5])
def test_a_machine_that_is_slower_than_when_it_was_timed_changes_no_plan(fitted, both):
    policy, session = fitted(row=0.2)
    assert told(policy, session, plain=both, drafting=both) > 0.9
    assert abs(policy._reckoning.offset) < 0.1


def test_drafts_that_cost_more_than_reckoned_are_left(fitted):
    policy, session = fitted(row=0.7)
    assert told(policy, session, plain=1.0, drafting=1.0) > 0.9
    policy, session = fitted(row=0.7)
    assert told(policy, session, plain=1.0, drafting=2.5, steps=1500) < 0.5
    assert policy._reckoning.offset > 0.1


def test_what_was_given_is_taken_as_it_is(fitted):
    policy, session = fitted(row=0.2)
    policy = Adaptive(cost_model=policy.cost_model)
    policy.prepare(session.model, 1)
    told(policy, session, plain=1.0, drafting=2.0)
    assert policy._reckoning.offset == 0.0


def rests_of_a_text(policy, session, count):
    """How many plain steps lie before each of so many looks, where no exit is ever right."""
    rests = []
    while len(rests) < count:
        rests.append(0)
        while steps := policy.rests(session):
            rests[-1] += steps
            rows = len(session.row_numbers)
            policy.rested(rows, steps * policy.cost_model.round_seconds([0] * rows, [0] * rows))
        one_round(policy, session, right=False)
    return rests


def test_a_text_begins_with_a_quarter_of_what_the_last_one_s_next_rest_would_have_been(fitted, one_text):
    policy, session = fitted(row=0.5)
    first = rests_of_a_text(policy, session, 40)
    assert first[0] == 0 and first[-1] == 256, "nothing is known at first, and in the end nothing pays"
    assert [rest for rest in first if rest][:5] == [16, 32, 64, 128, 256]
    assert rests_of_a_text(policy, one_text(session.model), 3) == [64, 128, 256], (
        "after 256, and more than that is none"
    )
    assert rests_of_a_text(policy, one_text(session.model), 2) == [64, 128]
    assert rests_of_a_text(policy, one_text(session.model), 1) == [64], "in a rest of 128, whose next were 256"
    sampled = one_text(session.model, Sampling(temperature=0.8))
    assert rests_of_a_text(policy, sampled, 12)[0] == 0, "another kind of text"
    assert rests_of_a_text(policy, one_text(session.model), 2) == [16, 32], "of which the last text was not"
    assert rests_of_a_text(policy, one_text(session.model), 1) == [32], "in a rest of 64, whose next were 128"


def test_a_batch_s_rest_is_no_single_prompt_s(fitted, one_text):
    policy, session = fitted(row=0.5)
    rests_of_a_text(policy, session, 40)
    batch = one_text(session.model, row_numbers=[*range(8)])
    assert max(rests_of_a_text(policy, batch, 12)) == 256
    assert rests_of_a_text(policy, one_text(session.model), 1) == [16]


def looks(policy, session, rounds):
    """How many of so many rounds, in which all drafts are right, ask what other exits would have said."""
    found = 0
    for _ in range(rounds):
        assert not policy.rests(session), "drafting pays"
        one_round(policy, session, right=True)
        found += policy.shadow
    return found


def test_looks_become_seldom_and_are_as_seldom_as_there_are_rows(fitted, one_text):
    policy, session = fitted()
    assert looks(policy, session, 100) >= 3
    assert 2 <= looks(policy, session, 384) <= 12, "at most 96 rounds apart"
    batch = one_text(session.model, row_numbers=[*range(8)])
    looks(policy, batch, 768)
    assert 1 <= looks(policy, batch, 1536) <= 2
    assert looks(policy, one_text(session.model), 96) >= 1, "a batch's next look may be much later"
