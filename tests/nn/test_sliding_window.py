"""A window forgets what lies before it: with a cache and without, in the layers that have one."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from layerskip_moe.nn import KVCache


def run(model, tokens, start, cache):
    positions = torch.arange(start, start + tokens.shape[1]).expand(tokens.shape)
    return model.unembed(
        model.run(model.embed(tokens), range(model.config.n_layers), positions=positions, cache=cache).hidden
    )


@settings(max_examples=25, deadline=None)
@given(
    window=st.integers(1, 14),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    layers=st.sampled_from(["all", (1,), ()]),
)
@torch.no_grad()
def test_in_parts_over_a_cache_as_in_one_pass(tiny_model, window, cuts, layers):
    model = tiny_model(torch.float64, sliding_window=window, sliding_layers=layers)
    tokens = torch.randint(model.config.vocab_size, (2, sum(cuts)), generator=torch.Generator().manual_seed(window))
    cache, start, parts = KVCache(model.config, 2, 40, dtype=torch.float64), 0, []
    for cut in cuts:
        parts.append(run(model, tokens[:, start : start + cut], start, cache))
        start += cut
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_what_lies_before_the_window_is_not_read(tiny_model):
    """One layer, window 4: position 9 does not change with token 5, and does with token 6."""
    model = tiny_model(torch.float64, n_layers=1, sliding_window=4)
    tokens = torch.arange(10)[None]
    for place, read in ((5, False), (6, True)):
        changed = tokens.clone()
        changed[0, place] = 20
        assert torch.equal(model(changed)[0, 9], model(tokens)[0, 9]) is not read


@torch.no_grad()
def test_layers_without_a_window_read_all(tiny_model):
    """With the same weights, a window of none of the layers is no window."""
    windowed, free = (
        tiny_model(torch.float64, n_layers=2, sliding_window=window, sliding_layers=layers)
        for window, layers in ((2, ()), (None, "all"))
    )
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(windowed(tokens), free(tokens), atol=0, rtol=0)
