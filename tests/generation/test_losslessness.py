"""In float32, speculative text equals plain decoding's, token for token, greedy and sampled, whoever drafts.

Every text here ends exactly where max_seq_len does. Next: `test_reference_decoding.py`, which checks plain
decoding itself.
"""

import dataclasses
import itertools
import random
from dataclasses import asdict

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from layerskip_moe.generation import (
    Autoregressive,
    LookupSpeculative,
    PromptLookup,
    Sampling,
    SelfSpeculative,
    SparseSpeculative,
    Speculative,
    generate,
)
from layerskip_moe.generation.policies import DEL, Adaptive, Cascade, DraftVerify, Heuristic
from layerskip_moe.generation.policies.reckoning import Reckoning

MODELS = {
    "every layer": {},
    "every other layer, tied": dict(moe_layers="every other", tie_embeddings=True),
    "shared expert": dict(shared_expert_d_ff=8, shared_expert_gate=True),
    "OLMoE's switches": dict(qk_norm="full", normalize_top_k=False, n_kv_heads=4),
    "routers that look back": dict(router_average=0.6, router_hold=3, moe_layers=(0, 2)),
    "dense": dict(num_experts=0),
    "dense, tied": dict(num_experts=0, tie_embeddings=True),
}
SAMPLINGS = [
    Sampling(),
    Sampling(0.5, seed=1),
    Sampling(0.8, seed=2),
    Sampling(1.5, seed=3),
    Sampling(0.9, top_k=4, seed=4),
    Sampling(1.0, top_p=0.7, seed=5),
    Sampling(0.7, top_k=9, top_p=0.9, seed=6),
    Sampling(repetition_penalty=1.5),
    Sampling(0.9, top_p=0.9, seed=7, repetition_penalty=1.2),
]
CASES = list(enumerate(itertools.product(SAMPLINGS, (1, 2, 3), range(1, 9))))  # exit layers, draft lengths


def ragged_prompts(number):
    """1 to 5 prompts of 1 to 8 tokens; one of them of a single token. (What the models learn stands still at 26.)"""
    draw = random.Random(number)
    prompts = [[draw.randrange(26) for _ in range(draw.randint(1, 8))] for _ in range(number % 5 + 1)]
    index = draw.randrange(len(prompts))
    prompts[index] = prompts[index][:1]
    return prompts


def check_grid(model, cases, assert_same_text, strategy=SelfSpeculative):
    """Also that the grid is worth something: texts that do not loop, drafts accepted and drafts rejected."""
    drafted = accepted = 0
    varied = []
    for number, (sampling, exit_layer, length) in cases:
        prompts = ragged_prompts(number)
        arguments = dict(max_new_tokens=model.config.max_seq_len - max(map(len, prompts)), **asdict(sampling))
        plain = generate(model, prompts, Autoregressive(), **arguments)
        drafting = generate(model, prompts, strategy(exit_layer, length), **arguments)
        assert_same_text(model, prompts, plain.tokens, drafting.tokens, sampling)
        assert all(len(row) == arguments["max_new_tokens"] for row in drafting.tokens)
        varied += [len(set(row)) >= 6 for row in plain.tokens]
        if exit_layer < model.config.n_layers:
            drafted += drafting.stats.drafted
            accepted += drafting.stats.accepted
    assert 0.05 * drafted < accepted < 0.95 * drafted
    assert sum(varied) > 0.8 * len(varied)


@pytest.mark.parametrize("start", range(len(MODELS)), ids=list(MODELS))
def test_self_speculation_equals_plain_decoding(trained_model, assert_same_text, start):
    # Of 216 cases each model gets 8 others, of as many samplings; every sampling, exit and length is among them all.
    check_grid(trained_model(**list(MODELS.values())[start]), CASES[start::27], assert_same_text)


class Eager(Adaptive):
    """Takes verification to be free at first, so that it drafts."""

    def prepare(self, model, rows, one_call):
        super().prepare(model, rows, one_call)
        self.cost_model = dataclasses.replace(self.cost_model, seconds=(1e-3, 0, 0, 1e-4, 0, 1e-3, 0, 0, 0))
        self._reckoning = Reckoning(self.cost_model, doubt=0.0)


@pytest.fixture(scope="module")
def policies(random_policy):
    """By name, a strategy of a new policy that begins with an exit layer and a draft length."""
    made = {
        "heuristic": lambda layer, length: Heuristic(layer, length=length, threshold=0.2),
        "draft & verify": lambda layer, length: DraftVerify(layer, length=length, threshold=0.3),
        "DEL": lambda layer, length: DEL(length=length),
        "cascade": lambda layer, length: Cascade(layer, start=length, trial=1, trials=3, rounds=2),
        "adaptive": lambda layer, length: Eager(length=length, int8_drafts=False),
        "adaptive, int8": lambda layer, length: Eager(length=length),
        "at random": lambda layer, length: random_policy(seed=10 * layer + length, longest=length),
    }
    return {name: lambda *pair, make=make: SelfSpeculative(policy=make(*pair)) for name, make in made.items()}


POLICIES = ["heuristic", "draft & verify", "DEL", "cascade", "adaptive", "adaptive, int8", "at random"]


@pytest.mark.parametrize("start", range(len(POLICIES)), ids=POLICIES)
def test_under_every_policy(trained_model, assert_same_text, policies, start):
    model = trained_model(**list(MODELS.values())[start])
    check_grid(model, CASES[start + 6 :: 36], assert_same_text, policies[POLICIES[start]])


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_under_every_policy_in_every_case(trained_model, assert_same_text, policies, name, policy):
    check_grid(trained_model(**MODELS[name]), CASES, assert_same_text, policies[policy])


# By name, a strategy that drafts `length` tokens by about `layer` layers, in a model of 3.
WAYS = {
    "lookup": lambda layer, length: PromptLookup(length, layer, 1),
    "lookup after": lambda layer, length: LookupSpeculative(layer, length, 9 - length, "after", min_ngram=1),
    "lookup instead": lambda layer, length: LookupSpeculative(layer, length, length, min_ngram=1),
    "given layers": lambda layer, length: SparseSpeculative([(0, 2), (1, 2), (0, 1)][layer - 1], draft_length=length),
    "fewer experts": lambda layer, length: SparseSpeculative(draft_top_k=1, draft_length=length),
    "both": lambda layer, length: SparseSpeculative([(0, 2), (0,), (0, 1)][layer - 1], 1, length),
    "random layers": lambda layer, length: SparseSpeculative("random", draft_length=length, layer_seed=layer),
    "swift": lambda layer, length: SparseSpeculative("swift", draft_length=length),
    "clasp": lambda layer, length: SparseSpeculative("clasp", draft_length=length),
}
WITH_EXPERTS = [name for name in MODELS if "dense" not in name]


def models_for(way):
    return WITH_EXPERTS if way in ("fewer experts", "both") else list(MODELS)


@pytest.fixture
def short_window(monkeypatch):
    """So that a search for layers begins before these texts are at their end."""
    monkeypatch.setattr("layerskip_moe.generation.layer_sets.WINDOW", 3)


@pytest.mark.parametrize("start", range(len(WAYS)), ids=WAYS)
def test_every_way_to_draft(trained_model, assert_same_text, short_window, start):
    way = list(WAYS)[start]
    models = models_for(way)
    check_grid(
        trained_model(**MODELS[models[start % len(models)]]), CASES[start + 3 :: 36], assert_same_text, WAYS[way]
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_every_way_to_draft_in_every_case(trained_model, assert_same_text, short_window, name, way):
    if name in models_for(way):
        check_grid(trained_model(**MODELS[name]), CASES, assert_same_text, WAYS[way])


@pytest.fixture(scope="module")
def drafting(trained_model, tiny_model):
    """drafting(number, length): a draft model trained on the same, of as many layers; or, for 3, one of other sizes
    that knows nothing."""
    small = dict(d_model=8, n_heads=2, n_kv_heads=1, d_ff=8, num_experts=4, top_k=1, n_layers=2)

    def strategy(number, length):
        draft = tiny_model(seed=5, **small, max_seq_len=50) if number == 3 else trained_model(n_layers=number)
        return Speculative(draft, length)

    return strategy


@pytest.mark.parametrize(("name", "start"), [("every layer", 10), ("dense, tied", 2)])
def test_a_draft_model_s_speculation_equals_plain_decoding(trained_model, assert_same_text, drafting, name, start):
    check_grid(trained_model(**MODELS[name]), CASES[start::51], assert_same_text, drafting)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_self_speculation_equals_plain_decoding_in_every_case(trained_model, assert_same_text, name):
    check_grid(trained_model(**MODELS[name]), CASES, assert_same_text)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_draft_model_s_speculation_in_every_case(trained_model, assert_same_text, drafting, name):
    check_grid(trained_model(**MODELS[name]), CASES, assert_same_text, drafting)


@given(
    prompts=st.lists(st.lists(st.integers(0, 28), min_size=1, max_size=10), min_size=1, max_size=5),
    max_new_tokens=st.integers(1, 10),
    exit_layer=st.integers(1, 3),
    draft_length=st.integers(1, 8),
    sampling=st.sampled_from(SAMPLINGS),
    name=st.sampled_from(sorted(MODELS)),
    draft_name=st.none() | st.just("at random") | st.sampled_from(sorted(MODELS) + list(WAYS)),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_random_weights_and_short_texts(
    tiny_model,
    assert_same_text,
    policies,
    prompts,
    max_new_tokens,
    exit_layer,
    draft_length,
    sampling,
    name,
    draft_name,
):
    """Fewer tokens than a draft is long, prompts longer than what follows, and so on."""
    model = tiny_model(**MODELS[name])
    arguments = dict(max_new_tokens=max_new_tokens, **asdict(sampling))
    plain = generate(model, prompts, Autoregressive(), **arguments)
    strategy = SelfSpeculative(exit_layer, draft_length)
    if draft_name == "at random":
        strategy = policies[draft_name](exit_layer, draft_length)
    elif draft_name in WAYS:
        assume(name in models_for(draft_name))
        strategy = WAYS[draft_name](exit_layer, draft_length)
    elif draft_name is not None:
        draft = tiny_model(seed=exit_layer, **{**MODELS[draft_name], "n_layers": exit_layer})
        strategy = Speculative(draft, draft_length)
    drafting = generate(model, prompts, strategy, **arguments)
    assert_same_text(model, prompts, plain.tokens, drafting.tokens, sampling)


@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[2], SAMPLINGS[-1]], ids=str)
def test_drafting_with_the_whole_model_is_always_accepted(exact_model, sampling):
    model = exact_model()
    whole = SparseSpeculative(range(3), draft_length=4), SparseSpeculative(draft_top_k=2, draft_length=3)
    for strategy in (SelfSpeculative(3, 4), Speculative(model, 4), Speculative(model, 1), *whole):
        out = generate(model, ragged_prompts(4), strategy, max_new_tokens=12, **asdict(sampling))
        assert out.stats.acceptance_rate == 1.0
        assert [stats.acceptance_rate for stats in out.row_stats] == [1.0] * 5
