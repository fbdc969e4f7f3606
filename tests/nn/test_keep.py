"""Dropped samples pass a layer by: unchanged, without gradient, and without costing anything."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.nn import KVCache

keeps = st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=4, max_size=4).map(torch.tensor)


def states_of(model, rows=3, length=5):
    hidden = torch.randn(rows, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return hidden, torch.arange(length).expand(rows, length)


def run_sample_alone(model, hidden, keep, keep_experts=None):
    """One sample [1, T, D] through the layers it stays in, by calls without any dropping."""
    positions = torch.arange(hidden.shape[1])[None]
    for layer in range(4):
        if keep[layer]:
            if keep_experts is None or keep_experts[layer]:
                hidden = model.run(hidden, [layer], positions=positions).hidden
            else:
                hidden = attention_sublayer(model, layer, hidden)
    return hidden


def attention_sublayer(model, layer, hidden):
    """The layer's output when its MLP adds nothing."""
    down = [p for n, p in model.blocks[layer].mlp.named_parameters() if "down" in n]
    kept = [p.detach().clone() for p in down]
    with torch.no_grad():
        for p in down:
            p.zero_()
        out = model.run(hidden, [layer], positions=torch.arange(hidden.shape[1])[None]).hidden
        for p, before in zip(down, kept, strict=True):
            p.copy_(before)
    return out


@given(keep=keeps)
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_each_sample_runs_exactly_the_layers_it_keeps(tiny_model, keep):
    model = tiny_model(moe_layers="every other")
    hidden, positions = states_of(model)
    output = model.run(hidden, range(4), positions=positions, keep=keep, collect=range(4))
    for row in range(3):
        expected = run_sample_alone(model, hidden[row : row + 1], keep[:, row])
        torch.testing.assert_close(output.hidden[row], expected[0], atol=2e-5, rtol=2e-5)
    before = hidden
    for layer in range(4):  # what a dropped sample had it still has, to the bit
        dropped = ~keep[layer]
        assert torch.equal(output.collected[layer][dropped], before[dropped])
        before = output.collected[layer]


@given(keep=keeps, keep_experts=keeps)
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_keep_experts_drops_the_second_sublayer_alone(tiny_model, keep, keep_experts):
    model = tiny_model(moe_layers="every other")
    hidden, positions = states_of(model)
    output = model.run(hidden, range(4), positions=positions, keep=keep, keep_experts=keep_experts)
    for row in range(3):
        expected = run_sample_alone(model, hidden[row : row + 1], keep[:, row], keep_experts[:, row])
        torch.testing.assert_close(output.hidden[row], expected[0], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_keeping_all_is_dropping_none(tiny_model):
    model = tiny_model()
    hidden, positions = states_of(model)
    everyone = torch.ones(4, 3, dtype=torch.bool)
    kept = model.run(hidden, range(4), positions=positions, keep=everyone, keep_experts=everyone)
    assert torch.equal(kept.hidden, model.run(hidden, range(4), positions=positions).hidden)


@torch.no_grad()
def test_keep_follows_the_order_of_layers_and_not_their_index(tiny_model):
    model = tiny_model()
    hidden, positions = states_of(model)
    keep = torch.tensor([[True, True, True], [False, False, False]])
    output = model.run(hidden, [1, 3], positions=positions, keep=keep)
    assert torch.equal(output.hidden, model.run(hidden, [1], positions=positions).hidden)


def test_all_samples_dropped(tiny_model):
    model = tiny_model()
    hidden, positions = states_of(model)
    nobody = torch.zeros(4, 3, dtype=torch.bool)
    output = model.run(hidden, range(4), positions=positions, keep=nobody, collect=[1])
    assert torch.equal(output.hidden, hidden) and torch.equal(output.collected[1], hidden)
    assert output.routing == {}


@torch.no_grad()
def test_routing_counts_kept_tokens_only(tiny_model):
    model = tiny_model()
    hidden, positions = states_of(model)
    keep = torch.tensor([[True, False, True], [True, True, True], [False, False, False], [False, True, False]])
    keep_experts = torch.tensor([[True, True, False], [True, True, False], [True] * 3, [False] * 3])
    output = model.run(hidden, range(4), positions=positions, keep=keep, keep_experts=keep_experts)
    assert {layer: len(routing.chosen) for layer, routing in output.routing.items()} == {0: 5, 1: 10}
    for routing in output.routing.values():
        assert routing.logits.shape[0] == routing.weights.shape[0] == len(routing.chosen)
        assert int(routing.load.sum()) == 2 * len(routing.chosen)


def test_gradients_flow_to_kept_samples_and_layers_only(tiny_model):
    model = tiny_model()
    hidden, positions = states_of(model)
    hidden.requires_grad_()
    keep = torch.tensor([[True, False, True], [False] * 3, [True] * 3, [False, False, True]])
    outputs = model.run(hidden, range(4), positions=positions, keep=keep).hidden
    assert all(p.grad is None for p in model.blocks.parameters())
    outputs[1].sum().backward()  # the sample that kept layer 2 alone
    assert hidden.grad[1].abs().min() > 0 and not hidden.grad[[0, 2]].any()
    touched = {
        layer
        for layer, block in enumerate(model.blocks)
        for p in block.parameters()
        if p.grad is not None and p.grad.any()
    }
    assert touched == {2}


@torch.no_grad()
def test_dropped_samples_cost_nothing(tiny_model):
    model = tiny_model()
    hidden, positions = states_of(model)
    attended, transformed = [0] * 4, [0] * 4

    def count(seen, layer):
        def hook(_, inputs):
            seen[layer] += inputs[0].shape[:-1].numel()

        return hook

    for layer, block in enumerate(model.blocks):
        block.attention.qkv.register_forward_pre_hook(count(attended, layer))
        block.mlp.experts.register_forward_pre_hook(count(transformed, layer))
    keep = torch.tensor([[True, False, True], [True, True, True], [False, False, False], [False, True, False]])
    keep_experts = torch.tensor([[True, True, False], [True, False, False], [True] * 3, [False] * 3])
    model.run(hidden, range(4), positions=positions, keep=keep, keep_experts=keep_experts)
    assert attended == [10, 15, 0, 5]
    assert transformed == [5, 5, 0, 0]


def test_keep_with_a_cache_is_refused(tiny_model):
    model = tiny_model()
    hidden, positions = states_of(model)
    with pytest.raises(ValueError, match="keep is for training without a cache"):
        model.run(
            hidden, [0], positions=positions, keep=torch.ones(1, 3, dtype=torch.bool), cache=KVCache(model.config, 3, 8)
        )
