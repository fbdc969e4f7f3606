"""Routing with memory: the formula, whole texts, texts in pieces, and what a cache keeps of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.nn import KVCache, few_rows
from layerskip_moe.nn.kernels import using_kernels
from layerskip_moe.nn.router_memory import WINDOW, recall_text, window_weights

BACK = dict(router_average=0.6, router_hold=3)
averages = st.sampled_from([0.0, 0.25, 0.5, 0.7, 0.95])


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_tokens(*shape, seed=0):
    return torch.randint(23, shape, generator=torch.Generator().manual_seed(seed))


def by_definition(logits, average, hold):
    """m [T, E] of one text's r [T, E], position by position."""
    means = []
    for position in range(len(logits)):
        latest, total, weight = hold * (position // hold), 0.0, 0.0
        for back in range(min(latest + 1, WINDOW)):
            total = total + average**back * logits[latest - back].double()
            weight += average**back
        means.append(total / weight)
    return torch.stack(means)


@given(st.integers(1, 3), st.integers(1, 30), st.integers(1, 9), averages, st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_whole_texts(rows, length, n_experts, average, hold, seed):
    logits = drawn(seed, rows, length, n_experts)
    found = recall_text(logits, window_weights(average), hold)
    expected = torch.stack([by_definition(row, average, hold) for row in logits])
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)


@given(st.integers(1, 30), averages, st.integers(1, 12), st.integers(0, 99), st.booleans())
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_a_cache_gives_bit_for_bit_what_a_whole_text_does(length, average, hold, seed, kernels):
    """In pieces, some of them taken back; by the kernels, and by PyTorch as where rows are many."""
    weights, logits, memory = window_weights(average), drawn(seed, 1, length, 5), torch.full((1, length, 5), torch.nan)
    expected = recall_text(logits, weights, hold)[0]
    generator, first = torch.Generator().manual_seed(seed), 0
    while first < length:
        end = min(length, first + int(torch.randint(1, 7, (), generator=generator)))
        positions = torch.arange(first, end)
        how = dict(rows=torch.zeros_like(positions), positions=positions, weights=weights, hold=hold)
        with using_kernels(kernels):
            few_rows.remember(drawn(seed + first, len(positions), 5), memory, **how)
            found = few_rows.remember(logits[0, first:end], memory, **how)
        assert torch.equal(found, expected[first:end])
        first = end
    assert torch.equal(memory, logits)


def test_gradients_reach_the_positions_that_were_looked_at():
    logits = drawn(0, 1, 30, 4).requires_grad_()
    (found,) = torch.autograd.grad(recall_text(logits, window_weights(0.5), 4)[0, 23].sum(), logits)
    weights = torch.tensor([0.5**back for back in range(WINDOW)])
    expected = torch.zeros(30, 4)
    for back in range(WINDOW):  # from position 20 = 4 floor(23 / 4) on
        expected[20 - back] = weights[back] / weights.sum()
    torch.testing.assert_close(found[0], expected)


def test_what_the_network_is_routed_by(tiny_model):
    """In training, samples dropped here and there; the logits that balance losses get are these, too."""
    model = tiny_model(torch.float32, **BACK)
    hidden, positions = drawn(1, 3, 11, 16), torch.arange(11).expand(3, 11)
    keep, keep_experts = torch.tensor([[True, False, True]]), torch.tensor([[False, True, True]])
    for how, rows in (({}, [0, 1, 2]), ({"keep": keep}, [0, 2]), ({"keep": keep, "keep_experts": keep_experts}, [2])):
        seen = []
        handle = model.blocks[1].mlp_norm.register_forward_hook(lambda *given, seen=seen: seen.append(given[-1]))
        routing = model.run(hidden, [1], positions=positions, **how).routing[1]
        handle.remove()
        raw = seen[0] @ model.blocks[1].mlp.router.weight.T
        assert len(raw) == len(rows)
        expected = torch.stack([by_definition(row, 0.6, 3) for row in raw]).flatten(0, 1)
        torch.testing.assert_close(routing.logits.double(), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(routing.chosen, routing.logits.topk(2, dim=-1).indices)


def test_experts_are_held(tiny_model):
    model = tiny_model(torch.float32, router_hold=4)
    tokens = random_tokens(2, 19)
    output = model.run(model.embed(tokens), range(4), positions=torch.arange(19).expand(2, 19))
    for routing in output.routing.values():
        chosen = routing.chosen.view(2, 19, 2)
        assert torch.equal(chosen, chosen[:, 4 * (torch.arange(19) // 4)])
        assert len(chosen[:, ::4].flatten(0, 1).unique(dim=0)) > 1


@torch.no_grad()
def test_nothing_later_is_looked_at(tiny_model):
    model = tiny_model(**BACK)
    tokens = random_tokens(2, 21)
    whole = model(tokens)
    for length in (1, 2, 3, 4, 10, 20):
        torch.testing.assert_close(model(tokens[:, :length]), whole[:, :length], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("switches", [BACK, dict(router_average=0.9), dict(router_hold=5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_a_long_prompt_then_token_by_token(tiny_model, switches, dtype):
    """Many rows, and then few: the logits that were kept are those of the whole text, and so is what comes out."""
    model = tiny_model(dtype, **switches)
    text = random_tokens(3, 40)
    cache, parts = KVCache(model.config, 3, 40), []
    for first, end in [(0, 30), (30, 31), (31, 37), (37, 40)]:
        positions = torch.arange(first, end).expand(3, -1)
        hidden = model.run(model.embed(text[:, first:end]), range(4), positions=positions, cache=cache).hidden
        parts.append(model.unembed(hidden))
    torch.testing.assert_close(torch.cat(parts, dim=1), model(text), atol=3e-5, rtol=3e-5)
    whole = KVCache(model.config, 3, 40)
    model.run(model.embed(text), range(4), positions=torch.arange(40).expand(3, 40), cache=whole)
    torch.testing.assert_close(cache.router_logits, whole.router_logits, atol=3e-5, rtol=3e-5)


@torch.no_grad()
def test_experts_that_sit_out_are_left_out_after_the_mean(tiny_model):
    model, mask = tiny_model(torch.float32, **BACK), torch.tensor([True, False, True, True, False])
    hidden, positions = drawn(2, 2, 9, 16), torch.arange(9).expand(2, 9)
    for cache in (None, KVCache(model.config, 2, 9)):
        how = dict(positions=positions, cache=cache)
        masked = model.run(hidden, [0], expert_mask=mask, **how).routing[0]
        plain = model.run(hidden, [0], **how).routing[0]
        torch.testing.assert_close(masked.logits[:, mask], plain.logits[:, mask], atol=1e-5, rtol=1e-5)
        assert masked.logits[:, ~mask].isneginf().all() and mask[masked.chosen].all()


@torch.no_grad()
def test_fill_keeps_the_logits_of_the_state_that_it_is_given(tiny_model):
    model = tiny_model(**BACK, moe_layers=(1, 2))
    state, positions = drawn(3, 3, 2, 16).double(), torch.tensor([[0, 1], [4, 5], [2, 3]])
    cache, rows = KVCache(model.config, 3, 8, dtype=model.dtype), torch.tensor([2, 0])
    model.fill(state[rows], [0, 2, 3], positions=positions[rows], cache=cache.subset(rows))
    block = model.blocks[2]
    expected = block.mlp.router.score(block.mlp_norm(state).flatten(0, 1)).view(3, 2, 5)
    assert cache.router_logits.shape == (2, 3, 8, 5)  # of the layers with experts
    for row in (0, 2):
        torch.testing.assert_close(cache.router_memory(2)[row, positions[row]], expected[row])
    assert cache.router_logits.count_nonzero() == 2 * 2 * 5 and cache.router_memory(3) is None


@torch.no_grad()
def test_without_it_nothing_is_kept_and_nothing_is_asked(tiny_model, monkeypatch):
    monkeypatch.setattr(few_rows, "remember", lambda *_, **__: 1 / 0)
    model = tiny_model(torch.float32)
    cache, positions = KVCache(model.config, 2, 9), torch.arange(3).expand(2, 3)
    assert cache.router_logits is None and cache.router_memory(0) is None
    assert cache.nbytes == cache.keys.nbytes + cache.values.nbytes
    model.run(drawn(0, 2, 3, 16), range(4), positions=positions, cache=cache)
    looking = tiny_model(torch.float32, **BACK)
    assert model.state_dict().keys() == looking.state_dict().keys()
    assert KVCache(looking.config, 2, 9).nbytes == cache.nbytes + 4 * 2 * 9 * 5 * 4
    with pytest.raises(ZeroDivisionError):
        looking.run(drawn(0, 2, 3, 16), [0], positions=positions, cache=KVCache(looking.config, 2, 9))


def test_what_would_leave_holes_is_refused(tiny_model):
    model, hidden, positions = tiny_model(**BACK), drawn(0, 2, 3, 16).double(), torch.arange(3).expand(2, 3)
    kept = dict(positions=positions, cache=KVCache(model.config, 2, 9, dtype=model.dtype))
    with pytest.raises(ValueError, match="keep_experts is for runs without a cache where routers look back"):
        model.run(hidden, [0], keep_experts=torch.ones(1, 2, dtype=torch.bool), **kept)
    other = KVCache(tiny_model().config, 2, 9, dtype=model.dtype)
    with pytest.raises(ValueError, match="the cache keeps no router logits"):
        model.run(hidden, [0], positions=positions, cache=other)
