"""Rows that draft each in its own way: which layers run over what, on a stub that counts on, and what a policy is told.

In row r (prompt token 40 r) the token at position p is 40 r + p; a wrong draft says 39.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.generation import Autoregressive, SelfSpeculative, generate
from layerskip_moe.generation.policies import Fixed
from layerskip_moe.generation.policies.judging import judged_shadow
from layerskip_moe.nn import decoder
from layerskip_moe.nn.ragged import MarginRule

ROWS, EVERY = 3, frozenset(range(64))


@pytest.fixture(scope="module")
def counting_model(table_model):
    """counting_model(agreed): agreed[r] holds the positions at which row r's draft is right."""

    def build(agreed):
        right_at = torch.tensor([[position in row for position in range(64)] for row in agreed])

        def full(tokens, positions):
            return 9.0 * F.one_hot(tokens // 40 * 40 + positions + 1, ROWS * 40).float()

        def draft(tokens, positions):
            rows = tokens // 40
            guess = torch.where(right_at[rows, positions + 1], positions + 1, 39)
            return 9.0 * F.one_hot(rows * 40 + guess, ROWS * 40).float()

        return table_model(ROWS * 40, full, draft, n_layers=4)

    return build


class Planned:
    """Plans what the test says, round by round, and then nothing more; keeps the reports."""

    shadow, should_stop = False, None

    def __init__(self, *plans, **attributes):
        self._plans, self.reports = list(plans), []
        self.__dict__ |= attributes

    def plan(self, session):
        return self._plans.pop(0) if self._plans else [(0, 0)] * len(session.row_numbers)

    def observe(self, round):
        self.reports.append(round)


def decode(model, policy, count, rows=2):
    """The calls of the rounds, without the prompts', which are of a token each and run nothing."""
    out = generate(model, [[40 * row] for row in range(rows)], SelfSpeculative(policy=policy), max_new_tokens=count)
    assert out.tokens == [[40 * row + 1 + place for place in range(count)] for row in range(rows)]
    return model.calls


@pytest.mark.parametrize(
    ("plan", "calls"),
    [
        # Alike: as one [rows, places].
        ([(2, 2), (2, 2)], [(0, 2, 2, 1)] * 3 + [(2, 4, 2, 3)]),
        # Each alone; then the last places from layer 0 on, joined by row 0's drafts at layer 1, by row 1's at 3.
        ([(1, 2), (3, 2)], [(0, 1, 1, 1), (0, 3, 1, 1)] * 2 + [(0, 1, 2, 1), (1, 3, 4, 1), (3, 4, 6, 1)]),
        # Row 1 has one draft, or none: the rows are drafted for together, and no more than there is is verified.
        ([(2, 2), (2, 1)], [(0, 2, 2, 1)] * 3 + [(2, 4, 5, 1)]),
        ([(2, 2), (4, 0)], [(0, 2, 2, 1)] * 3 + [(2, 4, 4, 1)]),
        # The whole model drafts for row 0; nothing is left to run.
        ([(4, 1), (1, 0)], [(0, 4, 2, 1)] * 2),
        # Plain decoding.
        ([(1, 0), (3, 0)], [(0, 4, 2, 1)]),
    ],
    ids=str,
)
def test_every_layer_runs_once_over_every_place(counting_model, plan, calls):
    model = counting_model([EVERY] * 2)
    assert decode(model, Planned(plan), 5)[: len(calls)] == calls


def test_rounds_of_length_0_are_plain_decoding_s_steps(counting_model):
    plain, none = counting_model([()] * 2), counting_model([()] * 2)
    generate(plain, [[0], [40]], Autoregressive(), max_new_tokens=5)
    assert decode(none, Fixed(2, 0), 5) == plain.calls


def test_rows_near_their_end_draft_no_more_than_they_have_use_for(counting_model):
    policy = Planned([(2, 7), (2, 7)], [(2, 7)])
    model = counting_model([(), EVERY])
    decode(model, policy, 4)
    assert [report.drafted for report in policy.reports] == [[3, 3], [2], [0], [0]]
    assert [report.rows for report in policy.reports] == [[0, 1], [0], [0], [0]]
    assert [report.exit_layers for report in policy.reports] == [[2, 2], [2], [0], [0]]


def test_a_row_that_stops_costs_nothing_more(counting_model):
    """Row 1 stops after its first draft, and both after their second."""
    asked = []

    def should_stop(confidence, position):
        asked.append((confidence.tolist(), position))
        return torch.tensor([False, True]) if position == 0 else True

    policy = Planned([(2, 4), (2, 4)], should_stop=should_stop)
    calls = decode(counting_model([EVERY] * 2), policy, 6)
    assert calls[:4] == [(0, 2, 2, 1), (0, 2, 1, 1), (0, 2, 2, 1), (2, 4, 5, 1)]
    sure = float(torch.tensor([9.0, *[0.0] * (ROWS * 40 - 1)]).softmax(0)[0])
    assert [(len(confidence), position) for confidence, position in asked[:2]] == [(2, 0), (1, 1)]
    assert asked[0][0] == pytest.approx([sure] * 2)
    first = policy.reports[0]
    assert (first.drafted, first.accepted) == ([2, 1], [2, 1])
    assert [len(confidences) for confidences in first.confidences] == [2, 1]


def test_the_probability_of_a_sampled_draft_is_that_of_its_draw(counting_model):
    policy = Planned([(2, 3)], should_stop=lambda confidence, position: False)
    strategy = SelfSpeculative(policy=policy)
    generate(counting_model([EVERY]), [[0]], strategy, max_new_tokens=5, temperature=2.0, top_k=2, seed=1)
    expected = torch.tensor([9.0, 0.0]).div(2).softmax(0).tolist()  # the right token, and one other
    assert all(min(abs(told - one) for one in expected) < 1e-6 for told in policy.reports[0].confidences[0])


def test_what_shadows_say(counting_model):
    """Row 0 drafts by layer 2 and is right once, row 1 by layer 1, row 2 nothing. Only the last layer is ever right in
    row 1, and -1 stands where there is no place."""
    policy = Planned([(2, 2), (1, 1), (1, 0)], shadow=True)
    decode(counting_model([{1}, (), EVERY]), policy, 6, rows=3)
    first = policy.reports[0]
    assert first.accepted == [1, 0, 0]
    assert first.tokens[0, :2].tolist() == [1, 2] and first.tokens[1:, 0].tolist() == [41, 81]
    early = [[1, 39, 39], [79, 79, -1], [81, -1, -1]]
    assert first.shadow[:, :3].tolist() == [[row] * 3 for row in early]
    # After a wrong draft the full model speaks of the position, as the stub does.
    assert first.shadow[:, 3].tolist() == [[1, 2, 3], [41, 42, -1], [81, -1, -1]]


@given(seed=st.integers(0, 10**6), agreed=st.lists(st.sets(st.integers(1, 12)), min_size=1, max_size=ROWS))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_nothing_runs_twice_whatever_is_planned(counting_model, random_policy, seed, agreed):
    model, policy = counting_model(agreed), random_policy(seed, by_margin=False)
    calls = decode(model, policy, 12, rows=len(agreed))
    for layer in range(4):
        ran = sum(rows * places for first, end, rows, places in calls if first <= layer < end)
        needed = sum(sum(report.drafted) + len(report.rows) for report in policy.rounds)
        # Rows that draft by the same layers are drafted for as long as one of them drafts.
        assert ran == needed if len(agreed) == 1 else ran >= needed
    for report in policy.rounds:
        assert all(0 <= accepted <= drafted for accepted, drafted in zip(report.accepted, report.drafted, strict=True))
        assert report.seconds > 0


def test_the_same_rounds_in_a_batch_and_alone(trained_model):
    """Rows with plans of their own draft, are accepted and say what they would alone."""
    model, prompts = trained_model(), [[3, 9, 21], [5], [1, 2, 3]]
    plan = [(1, 3), (2, 2), (2, 4)]

    class ByRow(Planned):
        def plan(self, session):
            return [plan[row] for row in session.row_numbers]

    together = ByRow(shadow=True)
    out = generate(model, prompts, SelfSpeculative(policy=together), max_new_tokens=10)
    for row, prompt in enumerate(prompts):
        alone = Planned(*[[plan[row]]] * 10, shadow=True)
        assert generate(model, [prompt], SelfSpeculative(policy=alone), max_new_tokens=10).tokens == [out.tokens[row]]
        reports = [report for report in together.reports if row in report.rows]
        for one, many in zip(alone.reports, reports, strict=True):
            at = many.rows.index(row)
            assert (one.drafted, one.accepted) == ([many.drafted[at]], [many.accepted[at]])
            places = one.drafted[0] + 1
            assert torch.equal(one.shadow[0], many.shadow[at, :, :places])


@pytest.mark.parametrize("sampling", [{}, dict(temperature=0.9, seed=3, repetition_penalty=1.2)], ids=str)
def test_shadows_are_what_drafts_would_be(trained_model, sampling):
    """At place 0 policies that draft by different layers are told the same; a layer's own drafts are its shadows."""
    model = trained_model()
    first, second = (Planned([(layer, 2)], shadow=True, should_stop=None) for layer in (1, 2))
    for policy in (first, second):
        generate(model, [[3, 9, 21]], SelfSpeculative(policy=policy), max_new_tokens=8, **sampling)
    assert first.reports[0].shadow[0, :, 0].tolist() == second.reports[0].shadow[0, :, 0].tolist()
    for policy, layer in ((first, 1), (second, 2)):
        report = policy.reports[0]
        right = (report.shadow[0, layer - 1] == report.tokens[0])[:2].tolist()
        assert report.accepted[0] == [*right, False].index(False)


@pytest.mark.parametrize("places", [0, -1])
def test_shadows_of_no_places_are_refused(trained_model, places):
    policy = Planned([(2, 4)], shadow=True, shadow_places=places)
    with pytest.raises(ValueError, match=f"shadow_places={places} must be 1 or more, or None for all"):
        generate(trained_model(), [[3]], SelfSpeculative(policy=policy), max_new_tokens=8)


@pytest.mark.parametrize("by_row", [False, True], ids=["together", "by row"])
@pytest.mark.parametrize("places", [1, 2, 9])
def test_shadows_of_the_first_places_alone(trained_model, places, by_row):
    """Are those of all, as far as they go; what the full model says is told everywhere."""
    how = dict(shadow=True) | ({} if by_row else dict(should_stop=None))
    whole, some = (Planned([(2, 4), (2, 3)], **how, **more) for more in ({}, {"shadow_places": places}))
    for policy in (whole, some):
        strategy = SelfSpeculative(policy=policy)
        generate(trained_model(), [[3, 9, 21], [5]], strategy, max_new_tokens=8, temperature=0.7)
    one, other = whole.reports[0], some.reports[0]
    assert torch.equal(one.shadow[:, -1], other.shadow[:, -1])
    pairs = (other.shadow, one.shadow, -1), (other.shadow_margins, one.shadow_margins, math.nan)
    for told, expected, nothing in pairs:
        left = torch.full_like(expected[:, :-1, places:], nothing)
        torch.testing.assert_close(told[:, :-1, places:], left, rtol=0, atol=0, equal_nan=True)
        first = told[..., :places], expected[..., :places]
        torch.testing.assert_close(*first, rtol=0, atol=0, equal_nan=True)
    for row, exit_layer, judged in judged_shadow(other, [1]):
        assert exit_layer == 1 and len(judged) == min(places, other.accepted[row] + 1)


@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "not compiled"])
@pytest.mark.parametrize("shadow", [False, True])
def test_experts_read_in_verification(trained_model, monkeypatch, compile, shadow):
    """Recorded runs tell as many as the routers of runs called one by one. Experts are in layers 1 and 3."""
    model = trained_model(n_layers=4, moe_layers="every other")
    plans = [[(1, 3), (2, 1), (1, 0)], [(2, 2)] * 3, [(1, 0)] * 3]
    policy = Planned(*plans, experts=True, shadow=shadow)
    seen, run = [], decoder.run_blocks

    def noted(*arguments, **others):
        output = run(*arguments, **others)
        seen.append({layer: set(chosen.flatten().tolist()) for layer, chosen in output.chosen.items()})
        return output

    strategy = SelfSpeculative(policy=policy)
    generate(model, [[3, 9], [5], [1]], strategy, max_new_tokens=12, compile=compile)
    monkeypatch.setattr(decoder, "run_blocks", noted)
    again = Planned(*plans, experts=True, shadow=shadow)
    generate(model, [[3, 9], [5], [1]], SelfSpeculative(policy=again), max_new_tokens=12, compile=False)
    assert [report.experts for report in policy.reports] == [report.experts for report in again.reports]
    assert all(len(experts) == 2 and min(experts) >= 2 for experts in (report.experts for report in policy.reports))
    # The last round is one plain step: its routers' choices are the last that were seen.
    assert policy.reports[-1].experts == [len(seen[-1][layer]) for layer in (1, 3)]


def test_experts_of_a_row_alone(trained_model):
    """Its layers before the exit run over one place in verification."""
    model = trained_model(n_layers=4)
    asked, silent = Planned([(2, 3)], experts=True), Planned([(2, 3)])
    for policy in (asked, silent):
        generate(model, [[3, 9]], SelfSpeculative(policy=policy), max_new_tokens=6)
    read = asked.reports[0].experts
    assert len(read) == 4 and read[:2] == [2, 2] and all(2 <= count <= 5 for count in read[2:])
    assert silent.reports[0].experts is None


def test_dense_models_read_no_experts(trained_model):
    policy = Planned([(1, 2)], experts=True)
    generate(trained_model(num_experts=0), [[3]], SelfSpeculative(policy=policy), max_new_tokens=4)
    assert policy.reports[0].experts is None


def test_a_policy_without_should_stop_pays_for_no_confidence(counting_model, monkeypatch):
    monkeypatch.setattr(
        "layerskip_moe.generation.verification.choose_with_confidence", lambda *_: pytest.fail("it was asked")
    )
    policy = Planned([(1, 2), (2, 1)])
    decode(counting_model([EVERY] * 2), policy, 5)
    assert policy.reports[0].confidences == [[], []]


def test_rows_are_numbered_over_all_prompts(counting_model):
    policy = Planned()
    strategy = SelfSpeculative(policy=policy)
    generate(counting_model([EVERY] * 3), [[0], [40], [80]], strategy, max_new_tokens=1, batch_size=2)
    assert [report.rows for report in policy.reports] == [[0, 1], [2]]


def test_a_plan_is_asked_for_before_each_round_and_sees_what_is_left(counting_model):
    left = []
    policy = SimpleNamespace(shadow=False, should_stop=None, observe=lambda round: None)
    policy.plan = lambda session: left.append(session.remaining) or [(1, 2)] * len(session.row_numbers)
    decode(counting_model([EVERY, ()]), policy, 4)
    assert left == [[4, 4], [1, 3], [2], [1]]


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_stop_leave_the_others_their_texts(trained_model, random_policy, seed):
    prompts = [[3, 9, 21], [5], [1, 2, 3, 4, 5], [20, 11]]
    settings = dict(max_new_tokens=14, stop_tokens=[7, 17, 24], temperature=0.9, seed=seed)
    plain = generate(trained_model(), prompts, **settings).tokens
    assert len(set(map(len, plain))) > 1
    policy = random_policy(seed)
    assert generate(trained_model(), prompts, SelfSpeculative(policy=policy), **settings).tokens == plain


def test_what_a_margin_rule_lets_go_is_judged_and_not_verified(trained_model):
    """Beside the same rounds without it."""
    model, how = trained_model(n_layers=4), dict(max_new_tokens=12, temperature=0.9, seed=1)
    rule = MarginRule([0.5], 0.7)
    whole, ruled = Planned([(2, 4)], should_stop=None), Planned([(2, 4)], should_stop=None, margin_rule=rule)
    tokens = [generate(model, [[3, 9, 21]], SelfSpeculative(policy=policy), **how).tokens for policy in (whole, ruled)]
    assert tokens[0] == tokens[1]
    one, other = whole.reports[0], ruled.reports[0]
    kept = other.drafted[0]
    assert kept < one.drafted[0] == 4 and other.accepted[0] == min(one.accepted[0], kept)
    assert other.judged[0] == one.judged[0][: kept + 1]
    assert len(one.judged[0]) == min(one.accepted[0] + 1, 4)


@pytest.mark.parametrize(
    ("strategy", "sampling"),
    [({"coupling": "rejection"}, {"temperature": 0.9}), ({}, {"temperature": 0.9, "top_k": 5})],
    ids=["rejection", "filters"],
)
def test_a_margin_rule_is_left_aside_where_margins_tell_nothing(trained_model, strategy, sampling):
    policy = Planned(*[[(2, 4)]] * 3, should_stop=None, margin_rule=MarginRule([1e9], 1.0))
    generate(
        trained_model(n_layers=4),
        [[3, 9, 21]],
        SelfSpeculative(policy=policy, **strategy),
        max_new_tokens=17,
        **sampling,
    )
    assert policy.reports[0].drafted == [4] and policy.reports[0].judged is None


def test_margin_rules_that_cannot_be(trained_model):
    policy = Planned([(2, 4)] * 2, should_stop=None, margin_rule=MarginRule([0.1], 0.5))
    with pytest.raises(ValueError, match="margin rule is for 1 rows, and 2 are active"):
        generate(trained_model(n_layers=4), [[3], [4]], SelfSpeculative(policy=policy), max_new_tokens=5)
    with pytest.raises(ValueError, match=r"margin_rule=0\.5 is no rule; give a MarginRule"):
        generate(
            trained_model(n_layers=4),
            [[3]],
            SelfSpeculative(policy=Planned([(2, 4)], should_stop=None, margin_rule=0.5)),
            max_new_tokens=5,
        )
    with pytest.raises(ValueError, match=r"halves=1\.0 must be a list"):
        MarginRule(1.0, 0.5)
    for halves, least in (([0.0], 0.5), ([float("nan")], 0.5), ([0.1], 1.5), ([0.1], float("nan"))):
        with pytest.raises(ValueError, match="must be above 0, and least"):
            MarginRule(halves, least)
