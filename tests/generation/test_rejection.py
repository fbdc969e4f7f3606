"""coupling="rejection" keeps the full model's distribution.

Many rows with the same prompt are as many independent samples. Every statistical test has a fixed seed and would
fail a right implementation with probability ERROR_RATE, had its seed been drawn anew; that they fail a wrong one is
tested too.
"""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare

from layerskip_moe.generation import Autoregressive, Sampling, SelfSpeculative, Speculative, generate
from layerskip_moe.pretrained.quantize import quantize

ERROR_RATE = 1e-4
SAMPLES, VOCABULARY, NEW = 1500, 5, 5


@pytest.fixture(scope="module")
def network(tiny_model):
    """Small, and opinionated enough that its first layer and its last disagree."""
    model = tiny_model(seed=3, vocab_size=VOCABULARY, n_layers=2, d_model=8, n_heads=2, init_std=0.8)
    return model.requires_grad_(False)


def exact_joint(next_logits, prompt, count, sampling, probabilities):
    """p(x1, ..., x_count | prompt) [V, ..., V], every continuation enumerated; next_logits: texts [N, T] -> [N, V]."""
    joint = np.ones(())
    for length in range(count):
        texts = [[*prompt, *tail] for tail in itertools.product(range(VOCABULARY), repeat=length)]
        logits = next_logits(torch.tensor(texts)).numpy()
        following = np.stack([probabilities(row, sampling) for row in logits])
        joint = joint[..., None] * following.reshape(*joint.shape, VOCABULARY)
    return joint


def p_value(tokens, expected):
    """Chi-square of samples [N, n] against probabilities [V] * n; cells too rare for it are put together."""
    counts = np.zeros(expected.shape)
    np.add.at(counts, tuple(np.asarray(tokens).T), 1)
    assert not counts[expected == 0].any(), "a token came out that has probability 0"
    expected = expected * len(tokens)
    common = expected >= 5
    observed, predicted = counts[common], expected[common]
    if expected[~common].sum() >= 5:
        observed = np.append(observed, counts[~common].sum())
        predicted = np.append(predicted, expected[~common].sum())
    return chisquare(observed, predicted * observed.sum() / predicted.sum()).pvalue


def sample(model, prompt, strategy, sampling, count=NEW, rows=SAMPLES):
    return generate(
        model,
        [prompt] * rows,
        strategy,
        max_new_tokens=count,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        repetition_penalty=sampling.repetition_penalty,
    )


def check(out, joint):
    """The first two tokens, and the last two: there rows of one batch have unequal numbers of drafts left."""
    tokens = np.array(out.tokens)
    assert p_value(tokens[:, :2], joint.sum(axis=(2, 3, 4))) > ERROR_RATE
    assert p_value(tokens[:, -2:], joint.sum(axis=(0, 1, 2))) > ERROR_RATE


@pytest.mark.parametrize("draft_length", [1, 2, 3])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, seed=1),
        Sampling(0.6, seed=2),
        Sampling(1.0, top_p=0.7, seed=3),
        Sampling(1.4, top_k=4, top_p=0.9, seed=4),
    ],
    ids=str,
)
def test_the_next_tokens_follow_the_full_model(network, reference_probabilities, sampling, draft_length):
    prompt = [1, 4, 2]
    joint = exact_joint(lambda texts: network(texts)[:, -1], prompt, NEW, sampling, reference_probabilities)
    out = sample(network, prompt, SelfSpeculative(1, draft_length, coupling="rejection"), sampling)
    assert 0.1 < out.stats.acceptance_rate < 0.9
    check(out, joint)


@pytest.mark.parametrize("strategy", [Autoregressive(), SelfSpeculative(1, 2)], ids=str)
def test_so_do_those_of_the_other_strategies(network, reference_probabilities, strategy):
    sampling = Sampling(1.0, top_p=0.8, seed=5)
    joint = exact_joint(lambda texts: network(texts)[:, -1], [3], NEW, sampling, reference_probabilities)
    check(sample(network, [3], strategy, sampling), joint)


def penalized(network, texts, penalty):
    """The network's logits [N, V] after texts [N, T], those of each text's own tokens made less likely."""
    logits = network(texts)[:, -1]
    for scores, text in zip(logits, texts.tolist(), strict=True):
        for token in set(text):
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    return logits


DRAFTERS = ["its own layers", "a policy at random", "a draft model", "a quantised copy's early layers"]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(
    "sampling", [Sampling(0.8, seed=10), Sampling(1.0, top_p=0.9, seed=11, repetition_penalty=2.0)], ids=str
)
def test_so_they_do_under_a_penalty_and_whoever_drafts(
    network, tiny_model, random_policy, reference_probabilities, sampling, drafter
):
    draft = tiny_model(seed=4, vocab_size=VOCABULARY, n_layers=1, d_model=8, n_heads=2, init_std=0.6)
    strategy = {
        "its own layers": SelfSpeculative(1, 2, coupling="rejection"),
        "a policy at random": SelfSpeculative(policy=random_policy(seed=3, longest=2), coupling="rejection"),
        "a draft model": Speculative(draft, 2, "rejection"),
        "a quantised copy's early layers": SelfSpeculative(
            1, 2, coupling="rejection", draft_model=quantize(network, "int8")
        ),
    }[drafter]
    prompt, penalty = [1, 4], sampling.repetition_penalty
    joint = exact_joint(
        lambda texts: penalized(network, texts, penalty), prompt, NEW, sampling, reference_probabilities
    )
    out = sample(network, prompt, strategy, sampling)
    assert 0.1 < out.stats.acceptance_rate < 0.9
    check(out, joint)
    if penalty != 1:
        plain = exact_joint(lambda texts: network(texts)[:, -1], prompt, 2, sampling, reference_probabilities)
        assert p_value(np.array(out.tokens)[:, :2], np.maximum(plain, 1e-12)) < 1e-9, "the penalty was to show"


def test_a_draft_that_is_the_whole_model_is_always_accepted(network, reference_probabilities):
    sampling = Sampling(1.0, seed=6)
    joint = exact_joint(lambda texts: network(texts)[:, -1], [3], NEW, sampling, reference_probabilities)
    out = sample(network, [3], SelfSpeculative(2, 3, coupling="rejection"), sampling)
    assert out.stats.acceptance_rate == 1.0
    check(out, joint)


def test_the_test_would_notice_the_draft_s_own_distribution(network, reference_probabilities):
    """The draft's tokens, the full model's after them, or the right tokens independently: all are told apart."""
    sampling = Sampling(1.0, seed=1)

    def early(texts):
        positions = torch.arange(texts.shape[1]).expand(texts.shape)
        return network.unembed(network.run(network.embed(texts), [0], positions=positions).hidden)[:, -1]

    prompt = [1, 4, 2]
    p = exact_joint(lambda texts: network(texts)[:, -1], prompt, 2, sampling, reference_probabilities)
    q = exact_joint(early, prompt, 2, sampling, reference_probabilities)
    draft_first = q.sum(1, keepdims=True) * (p / p.sum(1, keepdims=True))
    tokens = np.array(sample(network, prompt, SelfSpeculative(1, 2, coupling="rejection"), sampling).tokens)[:, :2]
    for wrong in (q, draft_first, p.sum(1, keepdims=True) * p.sum(0, keepdims=True)):
        assert p_value(tokens, wrong) < 1e-9
    assert p_value(tokens, p) > ERROR_RATE


def tables(draft_support, full_support, seed=0):
    """Logits [V, V] of draft and full model after each token, -inf outside their supports."""
    logits = torch.randn(2, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    for table, support in zip(logits, (draft_support, full_support), strict=True):
        table[:, [token for token in range(VOCABULARY) if token not in support]] = -torch.inf
    return logits


def looked_up(table_model, draft, full):
    return table_model(VOCABULARY, lambda tokens, _: full[tokens], lambda tokens, _: draft[tokens], n_layers=3)


@pytest.mark.parametrize("draft_length", [1, 2, 3])
def test_a_draft_that_is_always_wrong(table_model, reference_probabilities, draft_length):
    draft, full = tables((0, 1), (2, 3, 4))
    sampling = Sampling(1.0, seed=7)
    strategy = SelfSpeculative(1, draft_length, coupling="rejection")
    out = sample(looked_up(table_model, draft, full), [2], strategy, sampling)
    assert out.stats.accepted == 0 and out.stats.rounds == SAMPLES * NEW
    check(out, exact_joint(lambda texts: full[texts[:, -1]], [2], NEW, sampling, reference_probabilities))


def test_a_draft_that_is_always_right(table_model, reference_probabilities):
    _, full = tables((), range(5))
    sampling = Sampling(0.8, top_p=0.9, seed=8)
    out = sample(looked_up(table_model, full, full), [2], SelfSpeculative(1, 4, coupling="rejection"), sampling)
    assert out.stats.accepted == out.stats.drafted == SAMPLES * 4 and out.stats.rounds == SAMPLES
    check(out, exact_joint(lambda texts: full[texts[:, -1]], [2], NEW, sampling, reference_probabilities))


@pytest.mark.parametrize("draft_length", [1, 2, 3])
def test_draft_coin_and_replacement_draw_independently(table_model, reference_probabilities, draft_length):
    """A draft that is often and much mistaken, and many samples: noise used twice, by a draft and its replacement or
    by the coins of two rounds, shifts the distribution only a little."""
    p, q = torch.tensor([[0.02, 0.5, 0.03, 0.35, 0.1], [0.45, 0.4, 0.05, 0.05, 0.05]]).log()
    full, draft = (torch.stack([table.roll(token) for token in range(VOCABULARY)]) for table in (p, q))
    sampling = Sampling(1.0, seed=draft_length)
    strategy = SelfSpeculative(1, draft_length, coupling="rejection")
    out = sample(looked_up(table_model, draft, full), [2], strategy, sampling, count=4, rows=10000)
    joint = exact_joint(lambda texts: full[texts[:, -1]], [2], 2, sampling, reference_probabilities)
    assert p_value(np.array(out.tokens)[:, :2], joint) > ERROR_RATE


def test_drafts_are_accepted_as_often_as_the_distributions_overlap(table_model, reference_probabilities):
    """sum_x min(p(x), q(x)) (arXiv 2211.17192, theorem 3.5), and more often than with shared noise."""
    draft, full = tables(range(4), range(1, 5), seed=1)
    sampling = Sampling(1.0, seed=9)
    model = looked_up(table_model, draft, full)
    out = sample(model, [2], SelfSpeculative(1, 1, coupling="rejection"), sampling, count=2)
    p, q = (reference_probabilities(table[2].numpy(), sampling) for table in (full, draft))
    assert out.stats.drafted == SAMPLES
    assert binomtest(out.stats.accepted, SAMPLES, float(np.minimum(p, q).sum())).pvalue > ERROR_RATE
    shared = sample(model, [2], SelfSpeculative(1, 1), sampling, count=2)
    assert 0 < shared.stats.accepted < out.stats.accepted


def test_rows_are_independent(network):
    """Tokens of neighbouring rows, as pairs, against the product of their frequencies."""
    tokens = np.array(sample(network, [3], SelfSpeculative(1, 2, coupling="rejection"), Sampling(1.0)).tokens)[:, 0]
    frequencies = np.bincount(tokens, minlength=VOCABULARY) / len(tokens)
    pairs = np.stack([tokens[:-1], tokens[1:]], axis=1)
    assert p_value(pairs, np.outer(frequencies, frequencies)) > ERROR_RATE


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_greedy_rejection_is_greedy(trained_model, assert_same_text, exit_layer):
    model, prompts = trained_model(), [[3], [5, 1, 7, 2], [8, 8, 1]]
    plain = generate(model, prompts, Autoregressive(), max_new_tokens=12).tokens
    for length in (1, 4):
        strategy = SelfSpeculative(exit_layer, length, coupling="rejection")
        assert_same_text(
            model, prompts, plain, generate(model, prompts, strategy, max_new_tokens=12).tokens, Sampling()
        )
