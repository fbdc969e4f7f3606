"""Drafting with fewer layers and fewer experts: which are found, what is reused, what is recorded."""

import copy
import random

import pytest
import torch

from layerskip_moe.generation import Sampling, Session, SparseSpeculative, generate, search_layers
from layerskip_moe.generation.autoregressive import Autoregressive
from layerskip_moe.generation.layer_sets import (
    LayerSearch,
    agreement,
    clasp_layers,
    count_skipped,
    every_other_layer,
    random_layers,
)
from layerskip_moe.generation.sampling import gumbel_noise
from layerskip_moe.generation.sparse_speculative import count_shared
from layerskip_moe.nn import KVCache
from layerskip_moe.nn.compiling import compiling
from layerskip_moe.nn.kernels import has_kernels


@pytest.fixture(params=[{}, {"router_average": 0.6, "router_hold": 3}], ids=["routers", "routers that look back"])
def written(trained_model, request):
    """A session of two rows that wrote 9 tokens each, at temperature 0.8, by a model of 5 layers."""
    model = trained_model(n_layers=5, max_seq_len=24, **request.param)
    with torch.inference_mode():
        session = Session(model, [[1, 5, 13], [2]], Sampling(0.8, seed=3), max_new_tokens=12)
        session.prefill()
        for _ in range(9):
            Autoregressive().step(session)
        yield session


@pytest.mark.parametrize("n_layers", [3, 4, 12])
def test_the_ends_always_run(n_layers):
    for skip in (0.1, 0.45, 0.9):
        skipped = count_skipped(skip, n_layers)
        for layers in (every_other_layer(n_layers, skipped), random_layers(n_layers, skipped, random.Random(0))):
            assert layers == sorted(set(layers)) and len(layers) == n_layers - skipped
            assert {0, n_layers - 1} <= set(layers)
    assert every_other_layer(12, count_skipped(0.45, 12)) == [0, 2, 4, 6, 8, 10, 11]


def test_agreement_is_of_the_noise_and_leaves_the_cache(written):
    cache = written.cache
    kept = copy.deepcopy(cache)
    assert agreement(written, range(5), 9) == 1.0
    fewer = agreement(written, [0, 4], 9)
    assert 0 <= fewer < 1
    assert torch.equal(cache.keys, kept.keys) and torch.equal(cache.values, kept.values)
    assert cache.router_logits is None or torch.equal(cache.router_logits, kept.router_logits)
    assert cache.recordings == {}, "what is tried once is not recorded"


def test_agreement_counts_tokens(written):
    """Against each row by itself, without a cache, from its first token on."""
    model, same = written.model, 0
    for row in range(2):
        length = int(written.cache.lengths[row])
        tokens = written.tokens[row : row + 1, : length + 1]
        # The full model's keys and values of what was there before the window, as drafting has them.
        cache = KVCache(model.config, 1, 24)
        positions = torch.arange(length)[None]
        model.run(model.embed(tokens[:, :length]), range(5), positions=positions, cache=cache)
        window = positions[:, -9:]
        hidden = model.run(model.embed(tokens.gather(1, window)), [0, 2, 4], positions=window, cache=cache).hidden
        for place, said in zip(window[0] + 1, model.unembed(hidden)[0], strict=True):
            noise = gumbel_noise(3, torch.tensor([row]), place[None, None], len(said))[0, 0]
            same += int((said.double() / 0.8 + noise).argmax()) == int(tokens[0, place])
    assert agreement(written, [0, 2, 4], 9) == pytest.approx(same / 18)


def test_a_search_keeps_the_best_of_what_it_tried(written, monkeypatch):
    monkeypatch.setattr("layerskip_moe.generation.layer_sets.WINDOW", 9)
    search = LayerSearch([0, 1, 4], random.Random(0))
    scores = []
    for _ in range(8):
        search.improve(written)
        scores.append(search.score)
    assert scores == sorted(scores) and search.score == max(
        agreement(written, [0, layer, 4], 9) for layer in (1, 2, 3)
    ), "three sets, eight tries"
    assert search.score == agreement(written, search.layers, 9)
    assert search.tries == 8 or search.score > 0.95


def test_a_search_waits_for_a_window_and_ends_with_enough(written):
    search = LayerSearch([0, 1, 4], random.Random(0))
    search.improve(written)  # nine tokens are no window
    assert search.score is None and search.tries == 0
    search.score = 0.96
    search.improve(written)
    assert search.tries == 0


def test_searching_beforehand(trained_model, monkeypatch):
    monkeypatch.setattr("layerskip_moe.generation.layer_sets.WINDOW", 8)
    model = trained_model(n_layers=5, max_seq_len=24)
    found = search_layers(model, [[1, 5], [2]], skip=0.4)
    assert len(found.layers) == 3 and found.score >= 0.5
    assert search_layers(model, [[1, 5], [2]], skip=0.4).layers == found.layers
    with pytest.raises(ValueError, match="past max_seq_len"):
        search_layers(model, [[1] * 20])


def by_recursion(model, text, skipped):
    """CLaSp's g(i, j) with the set that led there, each layer run on the text before it without a cache."""
    positions = torch.arange(len(text))[None]
    output = model.run(model.embed(torch.tensor([text])), range(5), positions=positions, collect=range(5))
    full = [model.embed(torch.tensor([text])), *(output.collected[layer] for layer in range(5))]

    def through(layer, state):
        """The layer on a last state, after the full model's others."""
        hidden = torch.cat([full[layer][:, :-1], state[None, None]], dim=1)
        return model.run(hidden, [layer], positions=positions).hidden[0, -1]

    def g(i, j):
        if i == 0:
            return full[0][0, -1], []
        ways = []
        if j <= i - 1:
            state, layers = g(i - 1, j)
            ways.append((through(i - 1, state), [*layers, i - 1]))
        if j > 0:
            ways.append(g(i - 1, j - 1))
        near = [torch.cosine_similarity(state, full[i][0, -1], dim=0) for state, _ in ways]
        return ways[int(torch.stack(near).argmax())]

    return g(5, skipped)[1]


@pytest.mark.parametrize("skipped", [0, 1, 2, 3])
def test_clasp_is_the_dynamic_programme(written, skipped):
    cached = written.cache.keys.clone()
    found = clasp_layers(written, skipped)
    text = written.tokens[0, : int(written.cache.lengths[0]) + 1].tolist()
    assert found == by_recursion(written.model, text, skipped)
    settled = slice(0, int(written.cache.lengths.min()))
    assert torch.equal(written.cache.keys[..., settled, :], cached[..., settled, :])


def test_clasp_with_fewer_experts_compares_with_all_of_them(written):
    layers = clasp_layers(written, 2, top_k=1)
    assert layers == sorted(set(layers)) and len(layers) == 3


def test_only_what_is_computed_alike_is_reused(tiny_model):
    config = tiny_model(n_layers=6, moe_layers="every other").config
    moe = [layer for layer in range(6) if config.is_moe(layer)]
    assert count_shared([0, 1, 2, 4], None, config) == 3
    assert count_shared([1, 2], None, config) == 0
    assert count_shared(range(6), None, config) == 6
    assert count_shared(range(6), config.top_k, config) == 6
    assert count_shared(range(6), 1, config) == moe[0]
    assert count_shared([0, 2], 1, tiny_model(n_layers=6).config) == 0


@pytest.mark.parametrize("strategy", [SparseSpeculative([0, 1, 4], draft_length=3), SparseSpeculative(None, 1, 3)])
def test_a_round_is_two_recorded_calls(trained_model, monkeypatch, strategy):
    """One drafts, one verifies; a second round repeats both."""
    if not has_kernels():
        pytest.skip("nothing is recorded without kernels")
    model, calls = trained_model(n_layers=5, max_seq_len=24), []
    session = Session(model, [[1, 5, 13]], Sampling(), max_new_tokens=12)
    with torch.inference_mode():
        strategy.start(session)
        for name in ("run", "decode", "draft"):
            monkeypatch.setattr(model, name, noting(calls, name, getattr(model, name)))
        with compiling(model):
            strategy.step(session)
            strategy.step(session)
    assert calls == ["draft", "decode"] * 2
    assert len(session.cache.recordings) == 3, "of a draft two: its states, and the choice of the next token"
    assert all(recording.complete for recording in session.cache.recordings.values())


def noting(calls, name, method):
    def call(*given, **how):
        calls.append(name)
        return method(*given, **how)

    return call


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SparseSpeculative(), "draft_layers or draft_top_k"),
        (lambda: SparseSpeculative(2), "is one index"),
        (lambda: SparseSpeculative("best"), "'random', 'swift' or 'clasp'"),
        (lambda: SparseSpeculative("swift", skip=1.0), "skip=1.0 must be above 0 and below 1"),
        (lambda: SparseSpeculative([0], draft_length=0), "draft_length=0"),
    ],
)
def test_what_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("strategy", "sizes", "says"),
    [
        (SparseSpeculative([0, 3]), {}, "names 3; layers are 0 to 2"),
        (SparseSpeculative([]), {}, "is empty"),
        (SparseSpeculative("clasp", skip=0.1), {}, "leaves out none"),
        (SparseSpeculative(draft_top_k=3), {}, "a token has 2"),
        (SparseSpeculative(draft_top_k=0), {}, "must be 1 or more"),
        (SparseSpeculative(draft_top_k=1), dict(num_experts=0), "this model has none"),
    ],
)
def test_what_a_model_lacks(tiny_model, strategy, sizes, says):
    with pytest.raises(ValueError, match=says):
        generate(tiny_model(**sizes), [[1]], strategy, max_new_tokens=2)
