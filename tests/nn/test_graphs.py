"""Steps as CUDA graphs: what can be told without a GPU, of the very step that is captured, and then on one.

Without one, a step runs on the CPU as it would on a GPU: PyTorch's own operations over a fixed number of slots.
"""

import copy
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layerskip_moe.nn import KVCache, decoder, experts, few_rows, graphs, steps
from layerskip_moe.nn.attention import locate, locate_within
from layerskip_moe.nn.block import Block
from layerskip_moe.nn.compiling import compiling
from layerskip_moe.nn.experts import run_experts_gathered, run_experts_sorted
from layerskip_moe.nn.products import can_group
from layerskip_moe.nn.router import Routing

FAMILIES = {
    "Mixtral": dict(qk_norm=None),
    "Qwen3-MoE": dict(qk_norm="head", moe_layers="every other", head_dim=6, d_ff=7),
    "OLMoE": dict(qk_norm="full", clip_qkv=0.7, normalize_top_k=False, n_kv_heads=4),
    "Qwen2-MoE": dict(qk_norm=None, qkv_bias=True, shared_expert_d_ff=9, shared_expert_gate=True),
    "sliding window": dict(sliding_window=4, sliding_layers=(0, 2)),
    "dense": dict(num_experts=0, tie_embeddings=True, output_bias=True, mlp_bias=True),
    "bias for balance": dict(bias_balancing=True, top_k=5),
}
WAITING = {"_local_scalar_dense", "nonzero", "item", "unique2", "_unique2", "masked_select", "equal", "is_nonzero"}


class NeverWaits(TorchDispatchMode):
    """Fails where a GPU would be waited for: a number is read, or a size depends on numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in WAITING, f"{func} waits"
        assert name != "index" or not any(i is not None and i.dtype == torch.bool for i in args[1]), "a size is waited for"
        return func(*args, **(kwargs or {}))


class Stand:
    """A graph without a GPU: repeated from the very inputs, and outputs, that the captured one would have."""

    made = 0

    def __init__(self, run, inputs, *, pool=None, held=()):
        type(self).made += 1
        self._run, self._inputs = run, [tensor.clone() for tensor in inputs]
        self.complete, self.pool = True, (0, 1)
        self._first = self._made()

    def _made(self):
        with NeverWaits():
            return self._run(self._inputs)

    def take_first(self):
        return self._first

    def __call__(self, inputs):
        for own, new in zip(self._inputs, inputs, strict=True):
            assert own.shape == new.shape and own.dtype == new.dtype
            own.copy_(new)
        return [output.clone() for output in self._made()]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """From now on, what is compiled takes the way of a GPU; a graph for every 8 slots."""
    stand = type("Counted", (Stand,), {})
    monkeypatch.setattr(steps, "Graph", stand)
    monkeypatch.setattr(steps, "SLOTS", 8)
    monkeypatch.setattr(few_rows, "serves", lambda device: False)
    monkeypatch.setattr(decoder, "can_repeat", lambda count, dtype, device: count <= few_rows.MOST_ROWS)
    monkeypatch.setattr(experts, "gathers", lambda x, gate_up: len(x) <= few_rows.MOST_ROWS)
    return stand


def runs(model, cache, compiled):
    """Prompts of two rows, then tokens in ones and threes by all layers, by two and by the rest: all states and logits."""
    generator, outputs = torch.Generator().manual_seed(0), []
    with torch.no_grad(), compiling(model, compiled):
        for count in (4, 1, 3, 1, 1, 3, 1, 3, 3):
            tokens = torch.randint(23, (2, count), generator=generator).to(model.device)
            positions = cache.lengths[:, None] + torch.arange(count, device=model.device)
            early, exit_logits = model.decode(tokens, range(2), positions=positions, cache=cache)
            late, logits = model.decode(early, range(2, 4), positions=positions, cache=cache)
            ran = model.run(model.embed(tokens), range(4), positions=positions, cache=cache, collect=(1,))
            outputs += [early, exit_logits, late, logits, ran.hidden, ran.collected[1]]
            cache.extend(torch.tensor([count, max(count - 1, 1)], device=model.device))
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fixed_number_of_slots_gives_what_the_text_s_own_does(tiny_model, as_on_a_gpu, family):
    model = tiny_model(torch.float64, **FAMILIES[family])
    expected, found = (runs(model, KVCache(model.config, 2, 29, dtype=model.dtype), on) for on in (False, True))
    torch.testing.assert_close(found, expected)
    # Three kinds of step, each of 1, 3 and 4 tokens: the 4 at the start, the others up to 8, 16 and 24 slots.
    assert as_on_a_gpu.made == 3 * (1 + 3 + 3)
