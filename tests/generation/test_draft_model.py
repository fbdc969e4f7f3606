"""The early layers of another model draft: what comes out is plain decoding's text, and nothing that the draft
computed is used again unless its layers are the model's own."""

import copy
import dataclasses
import itertools
import random
from dataclasses import asdict

import pytest
import torch

from layerskip_moe.generation import Autoregressive, Sampling, SelfSpeculative, Speculative, generate
from layerskip_moe.nn import KVCache, MoEDecoder
from layerskip_moe.pretrained.quantize import quantize

MODELS = {
    "every layer": dict(d_ff=16),
    "every other layer, shared expert": dict(d_ff=16, moe_layers="every other", shared_expert_d_ff=8),
    "dense, tied": dict(d_ff=16, num_experts=0, tie_embeddings=True),
}
SAMPLINGS = [Sampling(), Sampling(0.8, seed=2), Sampling(0.9, top_k=4, seed=4), Sampling(0.7, top_p=0.9, seed=6)]
KINDS = ("int8", "int4")
# Every exit layer and draft length, with a quantisation and a sampling each; all of them together in the slow test.
CASES = list(itertools.product((1, 2, 3), range(1, 7)))


@pytest.fixture(scope="module")
def drafts(trained_model):
    """drafts(name, kind) -> the model of that name, quantised; the same object for the same words."""
    made = {}

    def draft(name, kind):
        if (name, kind) not in made:
            made[name, kind] = quantize(trained_model(**MODELS[name]), kind)
        return made[name, kind]

    return draft


def ragged_prompts(number):
    """1 to 4 prompts of 1 to 8 tokens. (What the models learn stands still at 26.)"""
    draw = random.Random(number)
    return [[draw.randrange(26) for _ in range(draw.randint(1, 8))] for _ in range(number % 4 + 1)]


def check_cases(model, draft, cases, assert_same_text):
    """cases: (exit layer, draft length), sampling. Returns the counts of all."""
    drafted = accepted = 0
    for number, ((exit_layer, length), sampling) in enumerate(cases):
        prompts = ragged_prompts(number)
        settings = dict(max_new_tokens=model.config.max_seq_len - max(map(len, prompts)), **asdict(sampling))
        plain = generate(model, prompts, Autoregressive(), **settings)
        out = generate(model, prompts, SelfSpeculative(exit_layer, length, draft_model=draft), **settings)
        assert_same_text(model, prompts, plain.tokens, out.tokens, sampling)
        drafted, accepted = drafted + out.stats.drafted, accepted + out.stats.accepted
    return drafted, accepted


@pytest.mark.parametrize("number", range(6))
def test_the_text_is_plain_decoding_s(trained_model, drafts, assert_same_text, number):
    name, kind = list(itertools.product(MODELS, KINDS))[number]
    cases = [(case, SAMPLINGS[place % 4]) for place, case in enumerate(CASES)][number % 3 :: 3]
    drafted, accepted = check_cases(trained_model(**MODELS[name]), drafts(name, kind), cases, assert_same_text)
    assert 0.05 * drafted < accepted < drafted


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_plain_decoding_s_in_every_case(trained_model, drafts, assert_same_text, name, kind):
    cases = list(itertools.product(CASES, SAMPLINGS))
    check_cases(trained_model(**MODELS[name]), drafts(name, kind), cases, assert_same_text)


@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_a_draft_model_of_another_depth(trained_model, tiny_model, assert_same_text, n_layers):
    model, draft = trained_model(**MODELS["every layer"]), tiny_model(seed=7, n_layers=n_layers, d_model=8, n_heads=2)
    cases = [((exit_layer, 3), SAMPLINGS[exit_layer % 2]) for exit_layer in {1, n_layers}]
    check_cases(model, quantize(draft, "int8"), cases, assert_same_text)


def test_all_layers_in_eight_bits_are_seldom_refused(trained_model, drafts):
    model, draft = trained_model(**MODELS["every layer"]), drafts("every layer", "int8")
    out = generate(model, ragged_prompts(3), SelfSpeculative(3, 4, draft_model=draft), max_new_tokens=12)
    assert out.stats.acceptance_rate > 0.8


def test_rejection_with_a_quantised_draft_is_as_speculative_s(trained_model, drafts):
    """The same arithmetic as where the early layers are a model of their own."""
    model, draft = trained_model(**MODELS["every layer"]), drafts("every layer", "int4")
    short = copy.deepcopy(draft)
    short.config = dataclasses.replace(draft.config, n_layers=2)
    settings = dict(max_new_tokens=12, temperature=1.0, seed=3)
    whole = generate(model, ragged_prompts(2), Speculative(short, 3, "rejection"), **settings)
    early = generate(
        model, ragged_prompts(2), SelfSpeculative(2, 3, coupling="rejection", draft_model=draft), **settings
    )
    assert early.tokens == whole.tokens
    assert early.stats.accepted_by_position == whole.stats.accepted_by_position


def record_runs(monkeypatch):
    """A list that gets (model, first layer, end layer, T) of every run of any decoder from now on."""
    runs, run = [], MoEDecoder.run

    def recorded(self, hidden, layers, **how):
        runs.append((self, layers[0], layers[-1] + 1, hidden.shape[1]))
        return run(self, hidden, layers, **how)

    monkeypatch.setattr(MoEDecoder, "run", recorded)
    return runs


def test_a_quantised_draft_runs_its_early_layers_alone_and_every_layer_verifies(trained_model, drafts, monkeypatch):
    model, draft = trained_model(**MODELS["every layer"]), drafts("every layer", "int8")
    runs = record_runs(monkeypatch)
    generate(model, [[1, 2, 3]], SelfSpeculative(2, 2, draft_model=draft), max_new_tokens=3, compile=False)
    assert runs[:5] == [(draft, 0, 2, 2), (model, 0, 3, 2), (draft, 0, 2, 2), (draft, 0, 2, 1), (model, 0, 3, 3)]
    assert all(end == (2 if which is draft else 3) and first == 0 for which, first, end, _ in runs)


def test_layers_that_are_the_model_s_own_are_not_run_again(trained_model, monkeypatch):
    """The model as its own draft, and one that shares all but the head."""
    model = trained_model(**MODELS["every layer"])
    other_head = copy.copy(model)
    other_head._modules = dict(model._modules)
    other_head.head = copy.deepcopy(model.head)
    torch.nn.init.zeros_(other_head.head.weight)  # every draft is token 0
    plain = generate(model, [[1, 2, 3]], max_new_tokens=5, compile=False)
    runs = record_runs(monkeypatch)
    own = generate(model, [[1, 2, 3]], SelfSpeculative(2, 2), max_new_tokens=5, compile=False)
    expected = list(runs)
    runs.clear()
    same = generate(model, [[1, 2, 3]], SelfSpeculative(2, 2, draft_model=model), max_new_tokens=5, compile=False)
    assert runs == expected and (2, 3) in {(first, end) for _, first, end, _ in runs}
    runs.clear()
    zeros = generate(model, [[1, 2, 3]], SelfSpeculative(2, 2, draft_model=other_head), max_new_tokens=5, compile=False)
    assert {(which, first, end) for which, first, end, _ in runs} == {(model, 0, 3), (model, 0, 2), (model, 2, 3)}
    assert own.tokens == same.tokens == zeros.tokens == plain.tokens
    assert own.stats.accepted_by_position == same.stats.accepted_by_position
    assert zeros.stats.accepted == sum(token == 0 for token in plain.tokens[0][:-1])


@pytest.mark.parametrize("difference", ["a copy", "one layer", "the embedding", "the angles"])
def test_layers_that_differ_in_anything_are_run_again(trained_model, monkeypatch, difference):
    model = trained_model(**MODELS["every layer"])
    draft = copy.copy(model)
    draft._modules = dict(model._modules)
    match difference:
        case "a copy":
            draft = copy.deepcopy(model)
        case "one layer":
            draft.blocks = torch.nn.ModuleList([model.blocks[0], copy.deepcopy(model.blocks[1]), model.blocks[2]])
        case "the embedding":
            draft.embedding = copy.deepcopy(model.embedding)
        case "the angles":
            draft.config = dataclasses.replace(model.config, rope_theta=100.0)
    runs = record_runs(monkeypatch)
    generate(model, [[1, 2, 3]], SelfSpeculative(2, 2, draft_model=draft), max_new_tokens=5, compile=False)
    assert {(first, end) for which, first, end, _ in runs if which is model} == {(0, 3)}
    if difference == "one layer":  # which an exit before it does not see
        runs.clear()
        generate(model, [[1, 2, 3]], SelfSpeculative(1, 2, draft_model=draft), max_new_tokens=5, compile=False)
        assert all(which is model for which, *_ in runs)


@pytest.mark.parametrize("n_layers", [1, 2])
def test_the_draft_s_cache_has_only_the_layers_that_draft(tiny_model, n_layers):
    sizes = []

    class Watched(SelfSpeculative):
        def start(self, session):
            super().start(session)
            sizes.append(len(session.state.keys))

    model = tiny_model(d_ff=16)
    generate(model, [[1, 2], [3]], Watched(n_layers, 2, draft_model=quantize(model, "int8")), max_new_tokens=4)
    assert sizes == [n_layers]
    assert KVCache(model.config, 2, 9, n_layers=n_layers).values.shape == (n_layers, 2, 2, 9, 4)


def test_counts_by_hand(table_model):
    """The text counts on; drafts are right but at every third position, whatever the depth."""

    def full(tokens, positions):
        return torch.nn.functional.one_hot(positions + 1, 40).float()

    def draft(tokens, positions):
        return torch.nn.functional.one_hot(torch.where((positions + 1) % 3 == 0, 39, positions + 1), 40).float()

    model, other = table_model(40, full, draft, n_layers=4), table_model(40, draft, draft, n_layers=3)
    out = generate(model, [[0, 1]], SelfSpeculative(1, 2, draft_model=other), max_new_tokens=8)
    assert out.tokens == [[2, 3, 4, 5, 6, 7, 8, 9]]
    # Rounds propose 2 and 3 (2 right), 4 and 5 (both), 7 and 8 (both); each adds one token: 3, 6 and 9.
    assert (out.stats.rounds, out.stats.drafted_by_position, out.stats.accepted_by_position) == (3, [3, 3], [3, 2])
    assert out.layers_run == [[4] * 8]
    assert model.calls == [(0, 4, 1, 1), *[(0, 4, 1, 3)] * 3]
    assert other.calls == [(0, 1, 1, 1), *[(0, 1, 1, 2), (0, 1, 1, 1)] * 3]


@pytest.mark.parametrize(
    ("sizes", "exit_layer", "problem"),
    [
        (dict(vocab_size=31), 1, "the draft model has vocab_size=31 and the model 29; they must share one tokenizer"),
        (dict(n_layers=2), 3, "exit_layer=3 must be between 1 and n_layers=2"),
        (dict(n_layers=4), 0, "exit_layer=0 must be between 1 and n_layers=4"),
        (dict(max_seq_len=10), 1, "the draft model's max_seq_len=10 is less than prompt and new tokens, 12"),
        ({}, 1, "the draft model is on meta and the model on cpu; move one"),
    ],
)
def test_draft_models_that_are_refused(tiny_model, sizes, exit_layer, problem):
    draft = tiny_model(d_ff=16, **sizes)
    strategy = SelfSpeculative(exit_layer, 2, draft_model=quantize(draft if sizes else draft.to("meta"), "int8"))
    with pytest.raises(ValueError, match=problem):
        generate(tiny_model(d_ff=16), [[1, 2]], strategy, max_new_tokens=10)


def test_an_exit_layer_of_a_deeper_draft_model(tiny_model):
    """It counts the draft model's layers, and may be beyond the model's own."""
    model, draft = tiny_model(n_layers=2), tiny_model(n_layers=5)
    out = generate(model, [[1, 2]], SelfSpeculative(4, 2, draft_model=draft), max_new_tokens=6)
    assert out.tokens == generate(model, [[1, 2]], max_new_tokens=6).tokens


def test_a_folder_is_no_draft_model(tiny_model):
    with pytest.raises(ValueError, match=r"draft_model=.*runs.* is no model"):
        generate(tiny_model(), [[1]], SelfSpeculative(1, draft_model="runs/main"), max_new_tokens=2)


def test_the_draft_is_run_in_eval_mode_and_left_as_found(tiny_model):
    model = tiny_model(d_ff=16, dropout=0.5)
    draft = quantize(model, "int8").train()
    strategy = SelfSpeculative(2, 3, draft_model=draft)
    texts = [generate(model, [[1, 2], [3]], strategy, max_new_tokens=8) for _ in range(2)]
    assert texts[0].stats.accepted_by_position == texts[1].stats.accepted_by_position
    assert texts[0].tokens == generate(model, [[1, 2], [3]], max_new_tokens=8).tokens
    assert all(module.training for module in draft.modules()) and not model.training
