"""Adaptive: what it plans where acceptance and costs are known, and that the text never depends on it."""

import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.generation import Autoregressive, Sampling, SelfSpeculative, Session, generate
from layerskip_moe.generation.cost_model import CostModel
from layerskip_moe.generation.policies import DEL, Adaptive
from layerskip_moe.generation.policies.acceptance import Acceptance
from layerskip_moe.generation.policies.exits import candidate_exits
from layerskip_moe.generation.policies.plans import best_by_margin
from layerskip_moe.generation.policies.reckoning import Reckoning
from layerskip_moe.generation.sampling import gumbel_noise
from layerskip_moe.nn import ModelConfig, MoEDecoder

N_LAYERS = 4


def cost_model(*, layer=1.0, row=0.0, head=0.1, overhead=0.1, config=None):
    """Seconds of a model's rounds, a dense one's by default, in units that no test waits for."""
    seconds = tuple(1e-6 * value for value in (overhead, 0.0, head, layer, row, layer, row, 0.1 * layer, 0.0))
    if config is None:
        return CostModel(N_LAYERS, (), 0, 0, seconds)
    return CostModel(config.n_layers, tuple(range(config.n_layers)), config.num_experts, config.top_k, seconds)


class Noted(Adaptive):
    """Notes its rounds, whose drafts are all made by layers: the texts here repeat themselves."""

    def __init__(self, **how):
        super().__init__(lookup=False, **how)
        self.rounds = []

    def observe(self, round):
        self.rounds.append(round)
        super().observe(round)


@pytest.fixture(scope="module")
def counting(table_model):
    """counting(right): a stub of 4 layers that counts on; its exits are right where right(position, row) says so."""

    def build(right):
        def full(tokens, positions):
            return 9.0 * F.one_hot((tokens + 1) % 40 + tokens // 40 * 0, 40).float()

        def draft(tokens, positions):
            wrong = torch.full_like(tokens, 39)
            return 9.0 * F.one_hot(torch.where(right(positions), (tokens + 1) % 39, wrong), 40).float()

        return table_model(40, full, draft)

    return build


def decode(model, policy, count=60, rows=1):
    prompts = [[row, row + 1, row + 2] for row in range(rows)]
    plain = generate(model, prompts, Autoregressive(), max_new_tokens=count)
    out = generate(model, prompts, SelfSpeculative(policy=policy), max_new_tokens=count)
    assert out.tokens == plain.tokens
    return out


def test_free_verification_of_what_is_always_right_drafts_much_and_early(counting):
    policy = Noted(cost_model=cost_model())
    out = decode(counting(lambda positions: positions >= 0), policy)
    # A draft costs one layer of four: with all accepted, more is better, by the first layer.
    assert {round.exit_layers[0] for round in policy.rounds if round.drafted[0]} == {1}
    assert max(round.drafted[0] for round in policy.rounds) >= 5
    assert out.stats.rounds < 15


def test_what_is_never_right_is_soon_not_drafted(counting):
    policy = Noted(cost_model=cost_model(row=0.5))
    out = decode(counting(lambda positions: positions < 0), policy)
    assert sum(round.drafted[0] for round in policy.rounds) <= 8
    assert len(policy.rounds) <= 8, "the other steps are plain decoding's, which nothing is told of"
    assert out.stats.generated == 60


def test_what_costs_as_much_as_decoding_is_not_drafted(counting):
    """Rows of verification that cost what a step does: right drafts save nothing."""
    policy = Noted(cost_model=cost_model(layer=0.0, row=1.0, overhead=4.0, head=4.0))
    decode(counting(lambda positions: positions >= 0), policy)
    assert sum(round.drafted[0] for round in policy.rounds) == 0


def test_a_change_in_the_text_is_noticed(counting):
    """Right at first, never after that."""
    policy = Noted(cost_model=cost_model(row=0.3))
    decode(counting(lambda positions: positions < 14), policy)
    first = [round.drafted[0] for round in policy.rounds[:4]]
    assert max(first) > 0 and sum(round.drafted[0] for round in policy.rounds[-2:]) == 0


def test_a_round_is_learnt_from_as_it_was_though_another_text_came_between(counting):
    """By a callback, or another thread, with the same strategy, before the round is told of: its plan is another."""
    model, policy, inner = counting(lambda positions: positions < 30), Noted(cost_model=cost_model(row=0.3)), []
    strategy = SelfSpeculative(policy=policy)

    def decode_where_no_draft_is_right(row, token):
        if len(inner) < 20:
            inner.append(generate(model, [[0] * 32], strategy, max_new_tokens=20).tokens)

    out = generate(model, [[0, 1, 2]], strategy, max_new_tokens=25, on_token=decode_where_no_draft_is_right)
    assert out.tokens == generate(model, [[0, 1, 2]], max_new_tokens=25).tokens
    assert inner == [generate(model, [[0] * 32], max_new_tokens=20).tokens] * 20
    assert any(sum(round.drafted) for round in policy.rounds if round.tokens[0, 0] < 20)


@given(
    st.integers(0, 10**6),
    st.lists(st.floats(0.0, 3.0), min_size=4, max_size=4),
    st.sampled_from([0.0, 0.8]),
    st.integers(1, 3),
)
@settings(max_examples=15, deadline=None)
def test_the_text_does_not_depend_on_it(trained_model, seed, costs, temperature, rows):
    model, names = trained_model(n_layers=4), ("layer", "row", "head", "overhead")
    prompts = [[3, 9, 21], [5], [1, 2, 3, 4]][:rows]
    how = dict(max_new_tokens=14, temperature=temperature, seed=seed)
    costs = dict(zip(names, [cost + 0.01 for cost in costs], strict=True))
    policy = Noted(cost_model=cost_model(**costs, config=model.config))
    expected = generate(model, prompts, Autoregressive(), **how).tokens
    for _ in range(2):  # it goes on learning
        assert generate(model, prompts, SelfSpeculative(policy=policy), **how).tokens == expected


def test_the_default_is_adaptive_and_times_the_model_by_itself(trained_model):
    model, strategy = trained_model(), SelfSpeculative()
    assert isinstance(strategy.policy, Adaptive) and strategy.policy.cost_model is None
    out = generate(model, [[3, 9, 21], [5]], strategy, max_new_tokens=14, temperature=0.7)
    assert out.tokens == generate(model, [[3, 9, 21], [5]], max_new_tokens=14, temperature=0.7).tokens
    assert strategy.policy.cost_model is not None and strategy.policy.cost_model.n_layers == model.config.n_layers
    assert isinstance(SelfSpeculative().policy, Adaptive) and SelfSpeculative().policy is not strategy.policy


def test_rows_of_a_batch_draft_each_as_much_as_pays(one_text):
    """Row 0 is right where row 1, as sure, is wrong."""
    model = MoEDecoder(ModelConfig(23, n_layers=4, d_model=16, n_heads=2, num_experts=0, d_ff=8))
    policy, session = Adaptive(cost_model=cost_model(row=0.05)), one_text(model, row_numbers=[0, 1])
    policy.prepare(model, 2)
    policy.plan(session)
    for _ in range(40):
        for row in (0, 1):
            policy._acceptance.see(row, 1, [(0.3, row == 0)])
    policy._plan, (pair, other) = replace(policy._plan, exit_layer=0), policy.plan(session)
    assert pair == other and pair[1] > 0
    first, second = policy.margin_rule.kept(torch.ones(2, 7), [7, 7])
    assert first >= 3 and first > second


def test_several_rows_draft_no_longer_than_pays_for_all(one_text):
    """They wait for the one that drafts most, at a layer's time a step, which a row alone would gladly take."""
    model = MoEDecoder(ModelConfig(23, n_layers=4, d_model=16, n_heads=2, num_experts=0, d_ff=8))

    def planned(sure, unsure, **costs):
        rows = list(range(sure + unsure))
        policy, session = Adaptive(cost_model=cost_model(**costs)), one_text(model, row_numbers=rows)
        policy.prepare(model, len(rows))
        policy.plan(session)
        for row in rows:
            policy._acceptance.see(row, 1, [(1.0, row < sure)] * 30)
        policy._plan = replace(policy._plan, exit_layer=0)
        return policy.plan(session)[0]

    assert planned(1, 0) == (1, 7) == planned(4, 0)
    exit_layer, length = planned(2, 2)
    assert exit_layer and 0 < length < 7


def test_the_others_draft_on_by_the_same_layers_as_a_row_ends(one_text):
    """Unless others are better by 2%: what they draft by is recorded."""
    model = MoEDecoder(ModelConfig(23, n_layers=4, d_model=16, n_heads=2, num_experts=0, d_ff=8))
    policy, session = Adaptive(cost_model=cost_model()), one_text(model, row_numbers=[0, 1, 2])
    policy.prepare(model, 3)
    policy.plan(session)
    for row in range(3):
        for exit_layer in (1, 2):
            policy._acceptance.see(row, exit_layer, [(1.0, True)] * 60)
    policy._plan, policy._rows = replace(policy._plan, exit_layer=0), []
    best = policy.plan(session)[0][0]
    other = 3 - best
    worth = {}
    for rows in ([0, 1, 2], [0, 1]):
        for exit_layer in (best, other):
            worth[len(rows), exit_layer] = best_by_margin(
                policy._acceptance, policy._reckoning, exit_layer, rows, 7, worth=1e6, int8=False
            ).worth
    assert worth[2, best] > 1.02 * worth[2, other], "what follows would tell nothing"
    for factor, expected in ((1.0, best), (worth[2, other] / worth[2, best] * 1.01, other)):
        policy._plan = replace(policy._plan, exit_layer=other)
        policy._rows, session.row_numbers = [0, 1, 2], [0, 1]
        policy._reckoning._promises[best] = [1e6 * factor, 1e6]  # so far its promises are to be trusted
        assert policy.plan(session)[0][0] == expected


@pytest.mark.parametrize("int8", [False, True])
def test_what_a_draft_must_be_worth_is_what_others_of_the_plan_are(int8):
    """Whatever was known to be possible before, as long as that was less."""
    acceptance = Acceptance((1, 2), sure=[4])
    for _ in range(40):
        acceptance.see(0, 4, [(0.5, True)] * 9)
    reckoning = Reckoning(CostModel(4, (), 0, 0, (1e-3, 1e-4, 1e-5, 3e-5, 1e-5, 3e-5, 1e-5, 0, 0), int8), doubt=0.0)
    plain = 1 / reckoning.seconds(0, 0, 1, 1)
    plan, again = (
        best_by_margin(acceptance, reckoning, 4, [0], 31, worth=worth, int8=int8) for worth in (plain, 1.5 * plain)
    )
    assert plan == again and plan.worth > 1.5 * plain and plan.least > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_the_prompt_tells(trained_model, temperature):
    """Each exit against the full model at the prompt's last positions, with the noise of those positions."""
    model, sampling = trained_model(n_layers=4), Sampling(temperature, seed=3)
    prompts, exits = [[3, 9, 21, 4, 4, 7], [5, 1]], (1, 2)
    with torch.no_grad():
        session = Session(model, prompts, sampling, max_new_tokens=4)
        session.prefill(collect=[0, 1])
        found = session.prompt_agreement(exits)
        for row, prompt in enumerate(prompts):
            tokens = torch.tensor([prompt[:-1]])
            positions = torch.arange(len(prompt) - 1)[None]
            run = model.run(model.embed(tokens), range(N_LAYERS), positions=positions, collect=[0, 1])
            scores = [model.unembed(state) for state in (run.collected[0], run.collected[1], run.hidden)]
            if temperature:
                noise = gumbel_noise(3, torch.tensor([row]), positions + 1, model.config.vocab_size)
                scores = [score.double() + temperature * noise for score in scores]
            said = [score.argmax(dim=-1)[0] for score in scores]
            for exit_layer in exits:
                largest = scores[exit_layer - 1][0].topk(2).values
                margins, right = zip(*found[row][exit_layer], strict=True)
                assert [*right] == (said[exit_layer - 1] == said[-1]).tolist()
                assert [*margins] == pytest.approx((largest[:, 0] - largest[:, 1]).tolist(), abs=1e-4)


def test_prompts_of_one_token_tell_nothing(trained_model):
    model = trained_model()
    with torch.inference_mode():
        session = Session(model, [[3], [5]], Sampling(), max_new_tokens=4)
        session.prefill(collect=[0])
        assert session.prompt_agreement((1,)) == []


def test_candidate_exits():
    assert candidate_exits(1) == () and candidate_exits(2) == (1,) and candidate_exits(4) == (1, 2)
    assert candidate_exits(12) == (1, 2, 3, 4, 6) and candidate_exits(32) == (1, 2, 3, 4, 6, 8, 12, 16)
    assert candidate_exits(12, deep=True) == (1, 2, 3, 4, 6, 8) and candidate_exits(1, deep=True) == ()


def test_another_depth_is_learnt_anew(trained_model):
    strategy, prompts = SelfSpeculative(), [[3, 9, 21], [5]]
    for layers in (4, 3, 2, 4):
        model = trained_model(n_layers=layers)
        expected = generate(model, prompts, max_new_tokens=12).tokens
        assert generate(model, prompts, strategy, max_new_tokens=12).tokens == expected
        assert strategy.policy.exits == candidate_exits(layers, deep=True)


def test_a_cost_model_of_another_network_is_refused(trained_model):
    policy = Adaptive(cost_model=cost_model())  # of a dense model
    with pytest.raises(ValueError, match="of another network"):
        generate(trained_model(n_layers=4), [[3]], SelfSpeculative(policy=policy), max_new_tokens=3)


def test_behind_a_strategy_that_knows_nothing_of_it(trained_model):
    """As one that notes tokens as they come: the model is timed when the first text begins."""
    model, inner = trained_model(n_layers=4), SelfSpeculative()

    class Outer:
        check, start, step = inner.check, inner.start, inner.step

    out = generate(model, [[3, 9, 21]], Outer(), max_new_tokens=12)
    assert out.tokens == generate(model, [[3, 9, 21]], max_new_tokens=12).tokens
    assert inner.policy.cost_model is not None


def test_greedy_and_sampled_text_are_learnt_apart(trained_model):
    model, strategy = trained_model(n_layers=4), SelfSpeculative()
    generate(model, [[3, 9, 21]], strategy, max_new_tokens=12)
    greedy = strategy.policy._acceptance
    generate(model, [[3, 9, 21]], strategy, max_new_tokens=12, temperature=0.8)
    assert strategy.policy._acceptance is not greedy
    generate(model, [[5]], strategy, max_new_tokens=12)
    assert strategy.policy._acceptance is greedy


@pytest.mark.parametrize("rows", [8, 30, 70])
def test_no_more_places_than_are_computed_alike(table_model, rows):
    def full(tokens, positions):
        return 9.0 * F.one_hot((tokens + 1) % 40, 40).float()

    policy = Noted(cost_model=cost_model())
    generate(table_model(40, full, full), [[1, 2, 3]] * rows, SelfSpeculative(policy=policy), max_new_tokens=20)
    assert all(sum(round.drafted) + len(round.rows) <= max(64, rows) or rows > 64 for round in policy.rounds)
    assert rows > 64 or any(sum(round.drafted) for round in policy.rounds)


@torch.no_grad()
def test_states_of_long_prompts_are_kept_at_their_end_and_nothing_else_is_different(table_model):
    config = ModelConfig(23, n_layers=2, d_model=16, n_heads=2, num_experts=4, d_ff=16, max_seq_len=700)
    model, prompts = MoEDecoder(config).to(torch.bfloat16), [[token % 23 for token in range(600)], [1, 2, 3]]
    sessions = [Session(model, prompts, Sampling(), max_new_tokens=4) for _ in range(2)]
    sessions[0].prefill()
    sessions[1].prefill(collect=[0])
    assert torch.equal(sessions[0].cache.keys, sessions[1].cache.keys)
    first, output = sessions[1].prompt
    assert first == 599 - 64 and output.hidden.shape == output.collected[0].shape == (2, 64, 16)
    long, short = sessions[1].prompt_agreement((1,))
    assert len(long[1]) == 16 and short[1] == []


@pytest.mark.parametrize("length", [3, 4, 5, 8])
def test_models_with_room_for_little_text(length):
    sizes = dict(n_layers=4, d_model=16, n_heads=2, num_experts=4, top_k=2, d_ff=16)
    model = MoEDecoder(ModelConfig(23, max_seq_len=length, **sizes))
    how = dict(max_new_tokens=length - 2)
    expected = generate(model, [[1]], **how).tokens
    assert generate(model, [[1]], SelfSpeculative(), **how).tokens == expected


def test_a_model_of_one_layer_has_nothing_to_draft_with(trained_model):
    model = trained_model(n_layers=1)
    expected = generate(model, [[1, 2]], max_new_tokens=6)
    assert generate(model, [[1, 2]], SelfSpeculative(), max_new_tokens=6).tokens == expected.tokens


@pytest.mark.parametrize("policy", [Adaptive, DEL])
@pytest.mark.parametrize(("outer", "inner"), [(8, 4), (4, 8)])
def test_texts_of_two_models_at_once(trained_model, policy, outer, inner):
    """One within a callback of the other, and then one after the other."""
    models = {layers: trained_model(n_layers=layers) for layers in (outer, inner)}
    expected = {layers: generate(model, [[3, 9, 21]], max_new_tokens=12).tokens for layers, model in models.items()}
    strategy, within = SelfSpeculative(policy=policy()), []

    def on_token(row, token):
        within.append(generate(models[inner], [[3, 9, 21]], strategy, max_new_tokens=12).tokens)

    out = generate(models[outer], [[3, 9, 21]], strategy, max_new_tokens=12, on_token=on_token)
    assert out.tokens == expected[outer]
    assert len(within) == 12 and all(tokens == expected[inner] for tokens in within)
    for layers in (outer, inner, outer):
        assert generate(models[layers], [[3, 9, 21]], strategy, max_new_tokens=12).tokens == expected[layers]


def test_the_time_in_which_a_user_is_told_of_tokens_is_not_a_round_s(trained_model):
    policy = Noted(cost_model=cost_model(config=trained_model(n_layers=4).config, row=0.1))
    arguments = dict(max_new_tokens=8, on_token=lambda row, token: time.sleep(0.2))
    generate(trained_model(n_layers=4), [[3, 9, 21]], SelfSpeculative(policy=policy), **arguments)
    assert policy.rounds and all(round.seconds < 0.2 for round in policy.rounds)


@pytest.mark.parametrize(
    ("strategy", "sampling"),
    [
        ({"coupling": "rejection"}, {"temperature": 0.9}),
        ({}, {"temperature": 0.9, "top_k": 9}),
        ({}, {"compile": False}),
    ],
    ids=["rejection", "filters", "not compiled"],
)
def test_where_rounds_tell_no_margins_lengths_are_chosen(trained_model, strategy, sampling):
    """After one round, if that, none is drafted that is not verified, and the policy says how many are worth it."""
    model = trained_model(n_layers=4, max_seq_len=64)
    policy = Noted(cost_model=cost_model(config=model.config, row=0.2))
    generate(model, [[3, 9, 21]], SelfSpeculative(policy=policy, **strategy), max_new_tokens=50, **sampling)
    assert all(round.judged is None or not max(round.exit_layers) for round in policy.rounds)
    assert policy.margin_rule is None and not policy._knows_margins
    assert sum(round.drafted[0] == 7 for round in policy.rounds) <= 1 + sum(
        round.accepted[0] >= 4 for round in policy.rounds
    )


def test_so_many_rows_that_none_may_draft_are_decoded_plainly(trained_model):
    policy = Noted(cost_model=cost_model(config=trained_model(n_layers=4).config))
    prompts = [[row % 29] for row in range(40)]
    out = generate(trained_model(n_layers=4), prompts, SelfSpeculative(policy=policy), max_new_tokens=8)
    assert out.tokens == generate(trained_model(n_layers=4), prompts, max_new_tokens=8).tokens
    assert not policy.rounds, "nor are there looks"
