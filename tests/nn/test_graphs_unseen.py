"""The step that is captured, over tensors that claim to be a GPU's and hold no numbers.

PyTorch refuses what mixes devices among them, and every size that depends on numbers, for which a GPU would be waited.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from layerskip_moe.nn import KVCache, decoder, experts, products, run_blocks, steps
from layerskip_moe.nn.compiling import compiling
from layerskip_moe.nn.rotary import rotary_table

aten = torch.ops.aten
FAMILIES = {
    "OLMoE, balanced by a bias": dict(qk_norm="full", clip_qkv=0.7, n_kv_heads=4, bias_balancing=True),
    "Qwen2-MoE": dict(qk_norm=None, qkv_bias=True, shared_expert_d_ff=8, shared_expert_gate=True),
    "sliding window, some layers dense": dict(sliding_window=4, sliding_layers=(0, 2), moe_layers="every other"),
    "routers that look back": dict(router_average=0.6, router_hold=3),
}


class Indexing(TorchFunctionMode):
    """Indexing by operators: written as brackets it asks for the GPU, which such tensors have none of."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (Tensor.__getitem__, Tensor.__setitem__):
            return func(*args, **(kwargs or {}))
        x, which, *new = args
        which, dim, picks = which if isinstance(which, tuple) else (which,), 0, []
        if which[0] is Ellipsis:  # [..., None]
            which = (*[slice(None)] * x.dim(), None)
        for one in which:
            if isinstance(one, int):
                x = aten.select.int(x, dim, one)
                continue
            if one is None:
                x = aten.unsqueeze.default(x, dim)
            elif isinstance(one, slice):
                x = aten.slice.Tensor(x, dim, one.start or 0, sys.maxsize if one.stop is None else one.stop)
            assert one is None or isinstance(one, slice) or (isinstance(one, Tensor) and one.dtype == torch.int64)
            picks.append(one if isinstance(one, Tensor) else None)
            dim += 1
        if new:
            return aten.index_put_.default(x, picks, *new)
        return x if all(pick is None for pick in picks) else aten.index.Tensor(x, picks)


class Once:
    """A graph of which only the making counts."""

    complete, pool = True, (0, 1)

    def __init__(self, run, inputs, *, pool, held):
        self._outputs = run([tensor.clone() for tensor in inputs])

    def take_first(self):
        return self._outputs


@pytest.fixture
def unseen_gpu(monkeypatch):
    """unseen_gpu(capability): as in compiled decoding on such a GPU, but nothing is compiled, captured or checked."""

    def there_is(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(steps, "Graph", Once)
        monkeypatch.setattr(run_blocks, "compiled", lambda forward: forward)
        monkeypatch.setattr(decoder, "check_positions", lambda *_: 9)
        compiling = SimpleNamespace(**{**vars(torch), "compiler": SimpleNamespace(is_compiling=lambda: True)})
        monkeypatch.setattr(experts, "torch", compiling)
        for module in (run_blocks, experts, products):
            monkeypatch.setattr(module, "is_quantized", lambda weight: False)

    rotary_table.cache_clear()
    yield there_is
    rotary_table.cache_clear()  # of tables without numbers


@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.float32, (8, 0)), (torch.bfloat16, (8, 0)), (torch.bfloat16, (9, 0))], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_waited_for_and_nothing_lies_elsewhere(tiny_model, unseen_gpu, family, capability, dtype):
    unseen_gpu(capability)
    model = tiny_model(torch.float32, **{"d_ff": 16, **FAMILIES[family]})
    with torch.no_grad(), compiling(model), FakeTensorMode(), Indexing():
        for module in model.modules():
            for name, own in module._parameters.items():
                module._parameters[name] = (
                    None if own is None else nn.Parameter(torch.empty(own.shape, dtype=dtype, device="cuda"))
                )
            for name, own in module._buffers.items():
                module._buffers[name] = None if own is None else torch.empty(own.shape, device="cuda")
        cache = KVCache(model.config, 2, 20, dtype=dtype, device="cuda")
        for rows, count in ((1, 1), (2, 3)):
            part = cache if rows == 2 else cache.subset(torch.zeros(1, dtype=torch.int64, device="cuda"))
            tokens = torch.zeros(rows, count, dtype=torch.int64, device="cuda")
            output, logits = model.decode(tokens, range(4), positions=tokens, cache=part)
            collected = model.run(output.hidden, range(2, 4), positions=tokens, cache=part, collect=(2,)).collected[2]
            assert logits.is_cuda and logits.shape == (rows, count, 23) and collected.dtype == dtype
    assert len(cache.recordings) == 4
