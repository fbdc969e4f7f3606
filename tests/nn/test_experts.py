"""Two ways through the experts, one answer: the sum that the routing describes, no token left out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.nn import ModelConfig, Routing
from layerskip_moe.nn.experts import Experts, run_experts_one_token, run_experts_sorted


def random_case(tokens, experts, top_k, width, hidden, dtype=torch.float32, seed=0, never=()):
    """x [N, D], a routing that chooses no expert of `never`, gate_up [E, 2F, D], down [E, D, F]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator)
    logits[:, list(never)] = float("-inf")
    weights, chosen = logits.softmax(-1).topk(top_k)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    gate_up = torch.randn(experts, 2 * hidden, width, generator=generator).to(dtype) / width**0.5
    down = torch.randn(experts, width, hidden, generator=generator).to(dtype) / hidden**0.5
    return x, Routing(logits, chosen, weights), gate_up, down


def by_definition(x, routing, gate_up, down):
    """sum_k weight_k * down_k (silu(gate_k x) * up_k x), every expert computed for every token."""
    gate, up = torch.einsum("efd,nd->nef", gate_up, x).chunk(2, dim=-1)
    outputs = torch.einsum("edf,nef->ned", down, gate * gate.sigmoid() * up)
    chosen = outputs.gather(1, routing.chosen[:, :, None].expand(-1, -1, x.shape[1]))
    return (chosen * routing.weights[:, :, None].to(x.dtype)).sum(1)


def with_gradients(function, x, routing, gate_up, down):
    """The output and its gradients with respect to x, the weights of the choice and the experts' weights."""
    leaves = [t.clone().requires_grad_() for t in (x, routing.weights, gate_up, down)]
    out = function(leaves[0], routing._replace(weights=leaves[1]), *leaves[2:])
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(99)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@given(
    tokens=st.integers(1, 12),
    experts=st.integers(1, 6),
    choice=st.integers(1, 6),
    width=st.sampled_from([4, 8, 20]),
    hidden=st.sampled_from([4, 12]),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_all_ways_agree_in_values_and_gradients(tokens, experts, choice, width, hidden, seed):
    case = random_case(tokens, experts, min(choice, experts), width, hidden, seed=seed)
    expected = with_gradients(by_definition, *case)
    ways = [run_experts_sorted] + [run_experts_one_token] * (tokens == 1)
    for way in ways:
        torch.testing.assert_close(with_gradients(way, *case), expected, atol=2e-5, rtol=2e-5)


def test_an_expert_without_tokens_gets_no_gradient_and_disturbs_nobody():
    case = random_case(9, 4, 2, 8, 8, never=(0, 2))
    expected = with_gradients(by_definition, *case)
    got = with_gradients(run_experts_sorted, *case)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not got[3][[0, 2]].any() and got[3][[1, 3]].abs().amax((1, 2)).min() > 0


def experts_module(gate_up, down, dtype):
    experts, width, hidden = down.shape
    module = Experts(
        ModelConfig(vocab_size=2, d_model=width, n_heads=1, head_dim=2, d_ff=hidden, num_experts=experts, top_k=1)
    )
    module.gate_up.data.copy_(gate_up)
    module.down.data.copy_(down)
    return module.to(dtype)


@pytest.mark.parametrize("tokens", [1, 2, 64])
@pytest.mark.parametrize(
    ("dtype", "width", "hidden", "tolerance"),
    [
        (torch.float32, 8, 12, 1e-5),
        (torch.float32, 6, 12, 1e-5),
        (torch.float32, 8, 10, 1e-5),
        (torch.float64, 8, 12, 1e-7),  # the weights of the choice are float32 for all
        (torch.bfloat16, 16, 24, 5e-2),
        (torch.bfloat16, 12, 24, 5e-2),
    ],
)
@torch.no_grad()
def test_any_shape_and_type_gives_the_definition_s_sum(tokens, dtype, width, hidden, tolerance):
    x, routing, gate_up, down = random_case(tokens, 4, 2, width, hidden, torch.float64)
    out = experts_module(gate_up, down, dtype)(x.to(dtype), routing)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), by_definition(x, routing, gate_up, down), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("tokens", [1, 8])
def test_bf16_autocast_stays_close_to_float32(tokens):
    x, routing, gate_up, down = random_case(tokens, 4, 2, 16, 24)
    module = experts_module(gate_up, down, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x, routing)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), by_definition(x, routing, gate_up, down), atol=5e-2, rtol=5e-2)
    out.sum().backward(torch.ones((), dtype=out.dtype))
    assert module.gate_up.grad.dtype == torch.float32 and module.gate_up.grad.isfinite().all()


@torch.no_grad()
def test_a_whole_model_under_bf16_autocast_stays_close_to_float32(tiny_model):
    """Routing must not flip: the router's experts are all chosen, so that only rounding differs."""
    model = tiny_model(torch.float32, init_std=0.1, top_k=5)
    tokens = torch.randint(23, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(tokens)
    exact = model(tokens)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_no_token_is_dropped_when_all_choose_one_expert(tiny_model, dtype):
    """A router that only ever chooses expert 3 makes the layer the dense network of expert 3's weights."""
    model = tiny_model(dtype, n_layers=1, top_k=1)
    dense = tiny_model(dtype, n_layers=1, num_experts=0)
    experts = model.blocks[0].mlp.experts
    shared = {n: p for n, p in model.state_dict().items() if ".mlp." not in n}
    dense.load_state_dict(
        shared | {"blocks.0.mlp.gate_up.weight": experts.gate_up[3], "blocks.0.mlp.down.weight": experts.down[3]}
    )
    tokens = torch.randint(23, (4, 50), generator=torch.Generator().manual_seed(0))
    only_3 = torch.tensor([False, False, False, True, False])
    positions = torch.arange(50).expand(4, 50)
    output = model.run(model.embed(tokens), [0], positions=positions, expert_mask=only_3)
    assert output.routing[0].load.tolist() == [0, 0, 0, 200, 0]
    torch.testing.assert_close(model.unembed(output.hidden), dense(tokens), atol=1e-5, rtol=1e-5)
