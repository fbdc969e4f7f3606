"""A whole network's few rows: bit for bit the same states and caches, however the rows are gathered into runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.nn import KVCache
from layerskip_moe.nn.compiling import compiling
from layerskip_moe.nn.kernels import using_kernels
from layerskip_moe.pretrained.quantize import quantize

FAMILIES = {
    "Mixtral": dict(qk_norm=None),
    "Qwen3-MoE": dict(qk_norm="head", moe_layers="every other", head_dim=6, d_ff=7),
    "OLMoE": dict(qk_norm="full", clip_qkv=0.7, normalize_top_k=False, n_kv_heads=4),
    "Qwen2-MoE": dict(qk_norm=None, qkv_bias=True, shared_expert_d_ff=9, shared_expert_gate=True),
    "sliding window": dict(sliding_window=4, sliding_layers=(0, 2)),
    "dense": dict(num_experts=0, tie_embeddings=True, output_bias=True, mlp_bias=True),
    "bias for balance": dict(bias_balancing=True, top_k=5),
    "routers that look back": dict(router_average=0.6, router_hold=3, moe_layers=(0, 3)),
}


def model_of(tiny_model, family, kind):
    model = tiny_model(torch.float32 if kind == "int8" else kind, **FAMILIES[family])
    if FAMILIES[family].get("bias_balancing"):
        for block in model.blocks:
            block.mlp.router.balance_bias.copy_(torch.linspace(-0.1, 0.1, 5))
    return quantize(model, "int8") if kind == "int8" else model


def run(model, tokens, pieces):
    """States [B, T, D], the logits and the cache after tokens [B, T] have been run piece by piece: each some rows and
    some positions of these, [first, end)."""
    cache = KVCache(model.config, *tokens.shape, dtype=model.dtype)
    hidden = torch.zeros(*tokens.shape, model.config.d_model, dtype=model.dtype)
    logits = torch.zeros(*tokens.shape, model.config.vocab_size, dtype=model.dtype)
    for rows, first, end in pieces:
        positions = torch.arange(first, end).expand(len(rows), -1)
        part = cache if len(rows) == len(tokens) else cache.subset(torch.tensor(rows))
        states = model.embed(tokens[rows, first:end])
        states = model.run(states, range(model.config.n_layers), positions=positions, cache=part).hidden
        hidden[rows, first:end], logits[rows, first:end] = states, model.unembed(states)
    return hidden, logits, cache.keys, cache.values


def random_pieces(count, length, generator):
    """Rows in groups, each group's positions in runs of random lengths, the groups in turn."""
    pieces = []
    for rows in torch.randperm(count, generator=generator).split(
        int(torch.randint(1, count + 1, (), generator=generator))
    ):
        first = 0
        while first < length:
            end = min(length, first + int(torch.randint(1, 10, (), generator=generator)))
            pieces.append((rows.sort().values.tolist(), first, end))
            first = end
    return sorted(pieces, key=lambda piece: piece[1:])


def assert_any_pieces_give_the_same(model, seed, which=slice(None)):
    generator = torch.Generator().manual_seed(seed)
    rows, length = 4, 16  # 64 in all
    tokens = torch.randint(23, (rows, length), generator=generator)
    everyone = list(range(rows))
    whole = run(model, tokens, [(everyone, 0, length)])
    ways = [
        [(everyone, place, place + 1) for place in range(length)],
        [([row], place, place + 1) for row in everyone for place in range(length)],
        [([row], 0, length) for row in everyone],
        random_pieces(rows, length, generator),
        random_pieces(rows, length, generator),
    ]
    for number, way in list(enumerate(ways))[which]:
        for name, one, other in zip(
            ("states", "logits", "keys", "values"), run(model, tokens, way), whole, strict=True
        ):
            assert torch.equal(one, other), f"way {number}: {int((one != other).sum())} of the {name} differ"


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        *[(how, kind) for how in ("recorded", "kernels") for kind in (torch.float32, torch.bfloat16, "int8")],
        ("twin", torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_by_one_or_together(tiny_model, family, kind, how):
    model = model_of(tiny_model, family, kind)
    with compiling(model, how == "recorded"), using_kernels(how != "twin"):
        # (The twin takes long.)
        assert_any_pieces_give_the_same(model, seed=1, which=slice(0, 5, 3 if how == "twin" else 1))


@given(
    seed=st.integers(0, 1000), family=st.sampled_from(sorted(FAMILIES)), kind=st.sampled_from([torch.float16, "int8"])
)
@settings(max_examples=10, deadline=None, derandomize=True)
@torch.no_grad()
def test_any_text_and_any_pieces(tiny_model, seed, family, kind):
    model = model_of(tiny_model, family, kind)
    with compiling(model):
        assert_any_pieces_give_the_same(model, seed)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_few_rows_are_what_many_rows_are_up_to_rounding(tiny_model, family):
    """Kernels, their twins, and the path of many rows, without a cache."""
    model = model_of(tiny_model, family, torch.float32)
    tokens = torch.randint(23, (6, 16), generator=torch.Generator().manual_seed(0))
    many = model(tokens)
    assert tokens.numel() > 64
    few = run(model, tokens, [(list(range(6)), first, first + 8) for first in (0, 8)])[1]
    with using_kernels(False):
        plain = run(model, tokens, [(list(range(6)), first, first + 8) for first in (0, 8)])[1]
    torch.testing.assert_close(few, many, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(plain, many, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_a_run_of_few_rows_reports_its_routing(tiny_model):
    """Whoever counts experts sees, without recording, what was chosen for each of the few rows."""
    model = tiny_model(torch.float32)
    tokens = torch.randint(23, (2, 5), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5).expand(2, 5)
    cache = KVCache(model.config, 2, 5)
    few = model.run(model.embed(tokens), range(4), positions=positions, cache=cache).routing
    many = model.run(model.embed(tokens).double(), [], positions=positions).routing
    assert many == {} and list(few) == [0, 1, 2, 3]
    with torch.enable_grad():
        expected = model.run(model.embed(tokens), range(4), positions=positions).routing
    for layer, routing in few.items():
        assert torch.equal(routing.chosen, expected[layer].chosen)
        torch.testing.assert_close(routing.weights, expected[layer].weights.detach(), atol=1e-5, rtol=1e-5)
