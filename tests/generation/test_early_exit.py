"""Dynamic early exit against slow references, in float64, where no two thresholds or tokens tie by rounding.

cache="exact" promises what the full model would have stored: its reference has no cache at all. "propagate" promises
CALM's copies: its reference walks down one layer at a time, on a cache of one row that it fills at once.
Next: `test_early_exit_work.py`, what all this saves.
"""

import math
from dataclasses import replace
from itertools import zip_longest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.generation import Autoregressive, EarlyExit, Sampling, generate
from layerskip_moe.generation.sampling import gumbel_noise, log_probabilities
from layerskip_moe.nn import KVCache

MODELS = {
    "dense": dict(num_experts=0),
    "experts in every other layer": dict(moe_layers="every other"),
    "routers that look back": dict(router_average=0.6, router_hold=3),
}
LAYERS = 5
PROMPTS = [[3], [5, 1, 7, 2], [8, 8, 1, 0, 2, 3], [1, 2]]


def logits_gap(hidden, previous, logits):
    """A measure of one's own: how far the best logit is ahead, squeezed into 0..1."""
    best = logits.topk(2, dim=-1).values
    return 1 - torch.exp(best[:, 1] - best[:, 0])


def confidence(kind, hidden, previous, logits):
    """Of one state, from formulas: hidden, previous [D], logits [V]."""
    if kind == "state":
        return float(hidden @ previous / math.sqrt((hidden @ hidden) * (previous @ previous)))
    weights = np.sort(np.exp(logits.numpy() - logits.numpy().max()))[::-1]
    return float((weights[0] - weights[1]) / (weights.sum() if kind == "softmax_diff" else weights[0]))


def leaves(strategy, layer, hidden, previous, logits, t, count):
    """Whether the t-th of `count` new tokens is taken after `layer` layers; states [D], logits [V]."""
    threshold = strategy.threshold[layer - 1] if isinstance(strategy.threshold, tuple) else strategy.threshold
    if threshold >= 1 or layer < strategy.min_layer or (layer == 1 and strategy.confidence == "state"):
        return False
    if threshold <= 0:
        return True
    if strategy.decay:
        threshold = min(max(0.9 * threshold + 0.1 * math.exp(-strategy.tau * t / count), 0), 1)
    return confidence(strategy.confidence, hidden, previous, logits) >= threshold


def chosen(logits, sampling, row, position):
    if sampling.greedy:
        return int(logits.argmax())
    noise = gumbel_noise(sampling.seed, torch.tensor([row]), torch.tensor([[position]]), len(logits))[0, 0]
    return int((log_probabilities(logits, sampling) + noise).argmax())


def exact_text(model, prompt, row, strategy, sampling, count):
    """(tokens, exit layers): the full model over the whole text, anew for each token."""
    text, exits = list(prompt), []
    for t in range(count):
        positions = torch.arange(len(text))[None]
        embedded = model.embed(torch.tensor([text]))
        collected = model.run(embedded, range(LAYERS), positions=positions, collect=range(LAYERS)).collected
        states = [embedded[0, -1], *(collected[layer][0, -1] for layer in range(LAYERS))]
        logits = [model.unembed(state) for state in states]
        early = (n for n in range(1, LAYERS) if leaves(strategy, n, states[n], states[n - 1], logits[n], t, count))
        exits.append(next(early, LAYERS))
        text.append(chosen(logits[exits[-1]], sampling, row, len(text)))
    return text[len(prompt) :], exits


def propagated_text(model, prompt, row, strategy, sampling, count):
    """(tokens, exit layers): layer by layer, and the layers left out are filled before the next token."""
    text, exits = list(prompt), []
    cache = KVCache(model.config, 1, len(prompt) + count, dtype=model.dtype)
    if len(prompt) > 1:
        positions = torch.arange(len(prompt) - 1)[None]
        model.run(model.embed(torch.tensor([prompt[:-1]])), range(LAYERS), positions=positions, cache=cache)
    for t in range(count):
        position = torch.tensor([[len(text) - 1]])
        hidden = model.embed(torch.tensor([text[-1:]]))
        for layer in range(LAYERS):
            previous, hidden = hidden, model.run(hidden, [layer], positions=position, cache=cache).hidden
            logits = model.unembed(hidden)[0, 0]
            if layer + 1 == LAYERS or leaves(strategy, layer + 1, hidden[0, 0], previous[0, 0], logits, t, count):
                model.fill(hidden, range(layer + 1, LAYERS), positions=position, cache=cache)
                break
        exits.append(layer + 1)
        text.append(chosen(logits, sampling, row, len(text)))
    return text[len(prompt) :], exits


@torch.no_grad()
def check(model, prompts, strategy, sampling, count, stop_tokens=()):
    """Every row's tokens and exit layers equal the reference's; gives those back."""
    reference = {"exact": exact_text, "propagate": propagated_text}[strategy.cache]
    out = generate(
        model,
        prompts,
        strategy,
        max_new_tokens=count,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop_tokens=stop_tokens,
    )
    for row, prompt in enumerate(prompts):
        tokens, exits = reference(model, prompt, row, strategy, sampling, count)
        end = next((place for place, token in enumerate(tokens) if token in stop_tokens), count)
        assert out.tokens[row] == tokens[:end]
        assert out.layers_run[row] == exits[:end]
    assert out.stats.layers_run == sum(map(sum, out.layers_run))
    return out


levels = st.floats(0, 1) | st.sampled_from([0.0, 1.0])
samplings = st.just(Sampling()) | st.builds(
    Sampling, st.floats(0.3, 1.5), st.none(), st.none() | st.just(0.8), st.integers(0, 9)
)


@pytest.mark.parametrize("cache", ["exact", "propagate"])
@given(
    name=st.sampled_from(sorted(MODELS)),
    prompts=st.lists(st.lists(st.integers(0, 28), min_size=1, max_size=7), min_size=1, max_size=4),
    count=st.integers(1, 12),
    threshold=levels | st.lists(levels, min_size=LAYERS - 1, max_size=LAYERS - 1),
    kind=st.sampled_from(["softmax_diff", "state", logits_gap]),
    min_layer=st.integers(1, LAYERS),
    decay=st.booleans(),
    tau=st.sampled_from([0.0, 1.5, 4.0]),
    sampling=samplings,
    stop_tokens=st.sets(st.integers(0, 28), max_size=5),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_batch(
    exact_model, cache, name, prompts, count, threshold, kind, min_layer, decay, tau, sampling, stop_tokens
):
    if kind == "state" and not isinstance(threshold, list) and 0 < threshold < 1:
        threshold = 1 - threshold / 4  # neighbouring states are seldom further apart
    strategy = EarlyExit(threshold, kind, min_layer, decay, cache, tau)
    check(exact_model(n_layers=LAYERS, **MODELS[name]), prompts, strategy, sampling, count, stop_tokens)


@pytest.mark.parametrize(
    "strategy",
    [
        EarlyExit(0.8),
        EarlyExit(0.95, "state", decay=True),
        EarlyExit(0.9, logits_gap, min_layer=2),
        EarlyExit([0.9, 1.0, 0.7, 0.5], decay=True, tau=1.0),
    ],
    ids=["softmax_diff", "state, decaying", "a function", "by layer, one never"],
)
@pytest.mark.parametrize("cache", ["exact", "propagate"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_leave_at_their_own_depth(exact_model, name, cache, strategy):
    """Ragged prompts, some rows stopped early; nearly every depth is met, and the rows are not in step."""
    strategy = replace(strategy, cache=cache)
    model = exact_model(n_layers=LAYERS, **MODELS[name])
    for stop in (9, 14, 20, 26):  # what the model learned differs from machine to machine; it may stop at once by one
        exits = check(model, PROMPTS, strategy, Sampling(0.7, seed=1), 14, stop_tokens=(stop,)).layers_run
        depths_met = len({layer for row in exits for layer in row})
        differing = any(len({*depths} - {None}) > 1 for depths in zip_longest(*exits))
        if depths_met >= 3 and differing and min(map(len, exits)) < max(map(len, exits)):
            return
    raise AssertionError("the rows were in step every time")


@pytest.mark.parametrize("kind", ["softmax_diff", "state"])
@pytest.mark.parametrize("cache", ["exact", "propagate"])
@pytest.mark.parametrize("threshold", [1, 1.0])
def test_from_one_on_it_never_exits(trained_model, assert_same_text, threshold, cache, kind):
    model, sampling = trained_model(n_layers=LAYERS), Sampling(0.8, seed=2)
    arguments = dict(max_new_tokens=12, temperature=0.8, seed=2)
    expected = generate(model, PROMPTS, Autoregressive(), **arguments).tokens
    for decay in (False, True):
        out = generate(model, PROMPTS, EarlyExit(threshold, kind, decay=decay, cache=cache), **arguments)
        assert_same_text(model, PROMPTS, expected, out.tokens, sampling)
        assert out.layers_run == [[LAYERS] * 12] * 4 and out.stats.mean_layers == LAYERS


def never_sure(hidden, previous, logits):
    return torch.full_like(hidden[:, 0], -1.0)


@pytest.mark.parametrize("cache", ["exact", "propagate"])
@pytest.mark.parametrize("threshold", [0, 0.0])
@pytest.mark.parametrize(
    ("kind", "min_layer", "exit_layer"),
    [("softmax_diff", 1, 1), ("softmax_diff", 3, 3), ("state", 1, 2), ("state", 4, 4), (never_sure, 2, 2)],
)
def test_from_zero_down_it_exits_at_the_first_layer_allowed(exact_model, threshold, cache, kind, min_layer, exit_layer):
    """Every layer up to that one then has the keys and values of all the text: the text is that layer's own."""
    model = exact_model(n_layers=LAYERS)
    arguments = dict(max_new_tokens=12, temperature=0.8, seed=2)
    out = generate(model, PROMPTS, EarlyExit(threshold, kind, min_layer, cache=cache, decay=True), **arguments)
    assert out.tokens == generate(model, PROMPTS, Autoregressive(exit_layer), **arguments).tokens
    assert out.layers_run == [[exit_layer] * 12] * 4


def test_min_layer_of_all_layers_is_the_full_model(exact_model):
    model = exact_model(n_layers=LAYERS)
    expected = generate(model, PROMPTS, max_new_tokens=12).tokens
    assert generate(model, PROMPTS, EarlyExit(0.0, min_layer=LAYERS), max_new_tokens=12).tokens == expected


@pytest.mark.parametrize("surety", [1.0, 0.5, math.nan])
def test_an_exit_is_taken_at_the_threshold_itself_and_never_at_one(exact_model, surety):
    def always(hidden, previous, logits):
        return torch.full_like(hidden[:, 0], surety)

    def depths(threshold):
        strategy = EarlyExit(threshold, confidence=always, min_layer=2)
        out = generate(exact_model(n_layers=LAYERS), [[3], [1, 2]], strategy, max_new_tokens=3)
        return {layer for row in out.layers_run for layer in row}

    assert depths(0.5) == {LAYERS if math.isnan(surety) else 2}
    assert depths(0.75) == {2 if surety == 1.0 else LAYERS}
    assert depths(1.0) == {LAYERS}


def test_the_threshold_decays_along_the_text(exact_model):
    """0.72 + 0.1 exp(-4 t / 10) falls to 0.75 or below at t = 4: exp(-1.2) = 0.301, exp(-1.6) = 0.202."""

    def always(hidden, previous, logits):
        return torch.full_like(hidden[:, 0], 0.75)

    strategy = EarlyExit(0.8, confidence=always, decay=True)
    out = generate(exact_model(n_layers=LAYERS), [[3], [5, 1, 7]], strategy, max_new_tokens=10)
    assert out.layers_run == [[LAYERS] * 4 + [1] * 6] * 2
    plain = generate(exact_model(n_layers=LAYERS), [[3], [5, 1, 7]], EarlyExit(0.8, always), max_new_tokens=10)
    assert plain.layers_run == [[LAYERS] * 10] * 2


def test_a_function_is_given_what_the_built_in_measures_see(exact_model):
    model = exact_model(n_layers=LAYERS)
    expected = generate(model, PROMPTS, EarlyExit(0.9, "state", 2), max_new_tokens=12)
    asked = []

    def cosine(hidden, previous, logits):
        torch.testing.assert_close(logits, model.unembed(hidden))
        asked.append(len(hidden))
        return (hidden * previous).sum(-1) / hidden.norm(dim=-1) / previous.norm(dim=-1)

    out = generate(model, PROMPTS, EarlyExit(0.9, cosine, 2), max_new_tokens=12)
    assert (out.tokens, out.layers_run) == (expected.tokens, expected.layers_run)
    # Each exit from layer 2 to the last but one is asked only about the rows that have not left.
    assert sum(asked) == sum(min(layer, LAYERS - 1) - 1 for row in out.layers_run for layer in row)


def test_where_exact_text_is_taken_up_again_it_goes_on_as_it_would_have(exact_model):
    """An earlier exit leaves no trace but its token. (Of propagated copies that is not so.)"""
    model, strategy = exact_model(n_layers=LAYERS), EarlyExit(0.8, cache="exact")
    whole = generate(model, PROMPTS, strategy, max_new_tokens=12, temperature=1.0)
    longer = [prompt + text[:5] for prompt, text in zip(PROMPTS, whole.tokens, strict=True)]
    rest = generate(model, longer, strategy, max_new_tokens=7, temperature=1.0)
    assert rest.tokens == [text[5:] for text in whole.tokens]
    assert rest.layers_run == [exits[5:] for exits in whole.layers_run]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(threshold=True), "threshold=True must be a number between 0 and 1, or a calibration file"),
        (dict(threshold=None), "threshold=None must be a number"),
        (dict(threshold=math.nan), "threshold=nan must be between 0"),
        (dict(threshold=1.01), "threshold=1.01 must be between 0"),
        (dict(threshold=-0.1), "threshold=-0.1 must be between 0"),
        (dict(confidence="entropy"), r"confidence='entropy' is unknown; it is 'softmax_diff', 'state', or a function"),
        (dict(threshold=[0.5, 1.5]), "threshold=1.5 must be between 0"),
        (dict(threshold=[0.5, "a"]), "threshold='a' must be a number between 0 and 1"),
        (dict(tau=-1.0), "tau=-1.0 must be a number of 0 or more"),
        (dict(tau=math.nan), "tau=nan must be a number of 0 or more"),
        (dict(cache="none"), "cache='none' is unknown; it is 'propagate' or 'exact'"),
    ],
    ids=str,
)
def test_early_exit_refuses(arguments, message):
    with pytest.raises(ValueError, match=message) as refused:
        EarlyExit(**{"threshold": 0.5, **arguments})
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize("given", [[], [0.5] * LAYERS])
def test_there_is_a_threshold_for_every_exit_before_the_last(exact_model, given):
    with pytest.raises(ValueError, match=rf"threshold has {len(given)} numbers, but the model has 4 exit layers"):
        generate(exact_model(n_layers=LAYERS), PROMPTS, EarlyExit(given), max_new_tokens=2)
