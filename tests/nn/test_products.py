"""Many-row products: each group of rows times its own weight, in every type, eager and compiled."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.nn import products
from layerskip_moe.nn.experts import run_experts_sorted
from layerskip_moe.nn.products import grouped_outer, grouped_product, many_row_linear, product_dtype
from layerskip_moe.nn.router import Routing


def random_groups(loads, inputs=5, outputs=7, dtype=torch.float64, seed=0):
    """x [N, D], weight [G, O, D] and where each group of rows ends."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(loads), inputs, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(len(loads), outputs, inputs, generator=generator, dtype=torch.float64).to(dtype)
    return x, weight, torch.tensor(loads).cumsum(0).to(torch.int32)


def row_by_row(x, weight, loads):
    """The definition: row n of group g is weight_g x_n."""
    group = torch.arange(len(loads)).repeat_interleave(torch.tensor(loads))
    return torch.einsum("nod,nd->no", weight[group], x)


@given(loads=st.lists(st.integers(0, 6), min_size=1, max_size=6), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_each_group_is_multiplied_by_its_own_weight_and_gradients_follow(loads, seed):
    x, weight, ends = random_groups(loads, seed=seed)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    got, expected = grouped_product(x, weight, ends), row_by_row(x, weight, loads)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(seed + 1))
    # A gradient that is a transposed view, as an upstream product may give.
    gradients = torch.autograd.grad(got, leaves, upstream.t().contiguous().t())
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves, upstream))


@pytest.mark.parametrize("loads", [[3, 0, 2], [0, 5, 0], [0, 0]])
def test_the_operations_keep_torch_s_rules_for_custom_operations(loads):
    """Shapes without data, gradients and tracing with sizes that vary, by torch's own checks."""
    x, weight, ends = random_groups(loads)
    torch.library.opcheck(grouped_product, (x.requires_grad_(), weight.requires_grad_(), ends))
    torch.library.opcheck(grouped_outer, (torch.randn(len(x), 3), torch.randn(len(x), 4), ends))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_floats_are_off_by_their_own_rounding_only(dtype):
    loads = [4, 0, 9]
    x, weight, ends = random_groups(loads, 64, 32, dtype)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    got, expected = grouped_product(x, weight, ends), row_by_row(*exact, loads)
    gradients = torch.autograd.grad(got.sum(), leaves)
    tolerance = dict(rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    for ours, right in zip([got, *gradients], [expected, *torch.autograd.grad(expected.sum(), exact)], strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), right, **tolerance)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_linear_of_many_rows_is_f_linear_whether_or_not_the_processor_has_products(monkeypatch, dtype, bias, native):
    if native:
        monkeypatch.setattr(products, "product_dtype", lambda dtype, device_type: dtype)
    generator = torch.Generator().manual_seed(0)
    x, weight, shift = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 3, 64), (8, 64), (8,)))
    out = many_row_linear(x, weight, shift if bias else None)
    assert out.dtype == dtype and out.shape == (2, 3, 8)
    exact = F.linear(x.double(), weight.double(), shift.double() if bias else None)
    error = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=error, atol=error * 8)


def test_a_linear_of_many_rows_follows_autocast_and_gives_gradients_in_the_weights_own_type():
    x, weight = torch.randn(4, 16), torch.randn(8, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = many_row_linear(x, weight)
        assert out.dtype == F.linear(x, weight).dtype == torch.bfloat16
    out.sum().backward()
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, x.sum(0).expand(8, 16), rtol=0.02, atol=0.02)


def test_what_a_processor_cannot_multiply_is_multiplied_in_float32(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    products._cpu_product_dtype.cache_clear()  # what it says of a machine is remembered
    rule = product_dtype
    assert rule(torch.bfloat16, "cpu") == torch.float32
    assert rule(torch.float64, "cpu") == torch.float64
    assert rule(torch.float32, "cpu") == torch.float32
    assert rule(torch.bfloat16, "cuda") == torch.bfloat16
    products._cpu_product_dtype.cache_clear()
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    assert rule(torch.bfloat16, "cpu") == torch.bfloat16
    products._cpu_product_dtype.cache_clear()


def routed(tokens, experts, top_k, favourite=None):
    """x [N, D] and a routing; a favourite is every token's first choice."""
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, experts, generator=generator)
    if favourite is not None:
        logits[:, favourite] = 9.0
    weights, chosen = logits.softmax(-1).topk(top_k)
    return torch.randn(tokens, 8, generator=generator), Routing(logits, chosen, weights)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_experts_are_the_eager_ones_and_one_graph_serves_all_loads(autocast):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def run(x, routing, gate_up, down):
        dtype = torch.bfloat16 if autocast else torch.float32
        return run_experts_sorted(x.to(dtype), routing, gate_up.to(dtype), down.to(dtype))

    compiled = torch.compile(run, backend=counter, dynamic=True, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(4, 24, 8, generator=generator), torch.randn(4, 8, 12, generator=generator)
    tolerance = dict(atol=0.05, rtol=0.05) if autocast else dict(atol=1e-5, rtol=1e-5)
    for tokens, favourite in ((6, None), (9, 1), (31, None), (64, 3), (2, 0)):
        x, routing = routed(tokens, 4, 2, favourite)
        results = []
        for way in (run, compiled):
            leaves = [leaf.clone().requires_grad_() for leaf in (x, routing.weights, gate_up, down)]
            out = way(leaves[0], routing._replace(weights=leaves[1]), *leaves[2:])
            results.append([out.detach(), *torch.autograd.grad(out.float().square().mean(), leaves)])
        torch.testing.assert_close(results[1], results[0], **tolerance)
    assert counter.frame_count == 1


def test_all_tokens_may_choose_one_expert():
    x, routing = routed(7, 3, 1, favourite=2)
    generator = torch.Generator().manual_seed(1)
    gate_up, down = torch.randn(3, 24, 8, generator=generator), torch.randn(3, 8, 12, generator=generator)
    gate, up = (x @ gate_up[2].t()).chunk(2, -1)
    expected = (F.silu(gate) * up) @ down[2].t() * routing.weights
    torch.testing.assert_close(run_experts_sorted(x, routing, gate_up, down), expected)
