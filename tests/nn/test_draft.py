"""`MoEDecoder.draft`: tokens one after another by some layers, in one recorded call or in several."""

import pytest
import torch

from layerskip_moe.nn import KVCache
from layerskip_moe.nn.compiling import compiling
from layerskip_moe.nn.kernels import has_kernels, using_kernels

LAYERS = range(2)


def drafted(model, rows, count, temperature, *, compiled, one_by_one=False):
    """Three drafts in a row of `rows` rows whose lengths differ: tokens, states, and what the cache then holds."""
    generator = torch.Generator().manual_seed(rows + count)
    cache = KVCache(model.config, rows, 40, dtype=model.dtype)
    cache.extend(torch.arange(rows) + 1)
    found = []
    with torch.no_grad(), compiling(model, compiled):
        for _ in range(3):
            newest = torch.randint(23, (rows, 1), generator=generator)
            noise = temperature * torch.randn(rows, count, 23, generator=generator).double() if temperature else None
            positions = cache.lengths[:, None] + torch.arange(count + 1)
            how = dict(positions=positions, cache=cache, noise=noise)
            draft = by_hand if one_by_one else type(model).draft
            made = draft(model, newest, LAYERS, **how)
            found += made if one_by_one else [made[0], *made[1]]
            cache.extend(torch.arange(rows) % 2 + 1)
    return [*found, cache.keys, cache.values], cache.recordings


def by_hand(model, newest, layers, *, positions, cache, noise):
    tokens, states = [newest], []
    for place in range(positions.shape[1]):
        hidden = model.embed(tokens[-1])
        hidden = model.run(hidden, layers, positions=positions[:, place : place + 1], cache=cache).hidden
        scores = model.unembed(hidden)[:, 0].double()
        if noise is not None and place < noise.shape[1]:
            scores = scores + noise[:, place]
        tokens.append(scores.argmax(dim=-1, keepdim=True))
        states.append(hidden)
    return torch.cat([newest[:, :0], *tokens[1:-1]], dim=1), torch.cat(states, dim=1)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("rows", "count"), [(1, 0), (1, 1), (1, 4), (3, 1), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_draft_is_a_token_after_another(tiny_model, dtype, rows, count, temperature):
    model = tiny_model(dtype)
    expected, _ = drafted(model, rows, count, temperature, compiled=False, one_by_one=True)
    for compiled in (False, True):
        found, recordings = drafted(model, rows, count, temperature, compiled=compiled)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        if has_kernels() and dtype != torch.float64:
            assert len(recordings) == (2 if count else 1) * compiled and all(
                recording.complete for recording in recordings.values()
            )


@pytest.mark.parametrize(
    ("layers", "top_k", "collect"), [((0, 2), None, (0,)), ((1, 2), 1, ()), ((0, 1, 2), 1, (2, 0))], ids=str
)
@pytest.mark.parametrize("compiled", [False, True])
def test_some_layers_with_fewer_experts(tiny_model, compiled, layers, top_k, collect):
    """Drafts of these layers; states of the newest token to the last draft, after them and after those asked for."""
    model = tiny_model(torch.float32)
    cache, newest = KVCache(model.config, 2, 12), torch.tensor([[3], [7]])
    positions = torch.arange(4).expand(2, 4)
    with torch.no_grad(), compiling(model, compiled):
        for _ in range(2):  # recorded, then repeated
            how = dict(positions=positions, cache=cache, top_k=top_k, collect=collect)
            drafts, states = model.draft(newest, layers, **how)
    text = torch.cat([newest, drafts], dim=1)
    with torch.no_grad():
        whole = model.run(model.embed(text), layers, positions=positions, top_k=top_k, collect=layers)
        for found, layer in zip(states, (layers[-1], *collect), strict=True):
            torch.testing.assert_close(found, whole.collected[layer])
        assert torch.equal(drafts, model.unembed(whole.hidden)[:, :-1].argmax(dim=-1))
    assert not cache.keys[[layer for layer in range(model.config.n_layers) if layer not in layers]].any()


def test_without_kernels(tiny_model):
    model = tiny_model(torch.float32)
    with using_kernels(False):
        found, _ = drafted(model, 2, 3, 0.7, compiled=True)
        expected, _ = drafted(model, 2, 3, 0.7, compiled=False, one_by_one=True)
    assert torch.equal(found[0], expected[0])


def test_what_is_refused(tiny_model):
    model = tiny_model(torch.float32)
    cache, newest = KVCache(model.config, 1, 10), torch.tensor([[3]])
    for compiled in (False, True):
        with compiling(model, compiled), torch.no_grad():
            with pytest.raises(ValueError, match="positions are too many"):
                model.draft(newest, LAYERS, positions=torch.arange(8, 12)[None], cache=cache)
            with pytest.raises(ValueError, match="must rise"):
                model.draft(newest, (1, 0), positions=torch.arange(4)[None], cache=cache)
            with pytest.raises(ValueError, match="top_k=9 must be between"):
                model.draft(newest, LAYERS, positions=torch.arange(4)[None], cache=cache, top_k=9)
