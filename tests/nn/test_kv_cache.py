"""The cache never shows: however a text is cut into steps, rows and take-backs, the logits are those without it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.nn import KVCache, ModelConfig
from layerskip_moe.nn.attention import locate, read, write
from layerskip_moe.nn.compiling import compiling

# In float64 a dense network agrees to the last digits. The router computes in float32 always, so with experts
# the rounding of another number of rows shows.
DENSE, EXPERTS = ({"num_experts": 0}, 1e-10), ({}, 2e-5)
LOOKING_BACK = dict(router_average=0.6, router_hold=3), 2e-5


def random_tokens(*shape, seed=0):
    return torch.randint(23, shape, generator=torch.Generator().manual_seed(seed))


def step(model, cache, tokens, starts):
    """Logits [B, T, V] of tokens [B, T] standing at starts [B] and after."""
    positions = starts[:, None] + torch.arange(tokens.shape[1])
    hidden = model.run(model.embed(tokens), range(model.config.n_layers), positions=positions, cache=cache).hidden
    return model.unembed(hidden)


def new_cache(model, rows, capacity=40):
    return KVCache(model.config, rows, capacity, dtype=model.dtype)


@given(
    counts=st.integers(1, 3).flatmap(
        lambda rows: st.lists(st.lists(st.integers(0, 4), min_size=rows, max_size=rows), min_size=1, max_size=6)
    ),
    seed=st.integers(0, 3),
    case=st.sampled_from([DENSE, EXPERTS, LOOKING_BACK]),
)
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_ragged_steps_equal_the_whole_text_at_once(tiny_model, counts, seed, case):
    """Each step brings counts[step][row] tokens of each row, and junk behind them that later steps overwrite."""
    switches, tolerance = case
    model = tiny_model(seed=seed, **switches)
    rows = len(counts[0])
    text = random_tokens(rows, 24, seed=seed)
    expected = model(text)
    cache, starts = new_cache(model, rows), torch.zeros(rows, dtype=torch.int64)
    for new in torch.tensor(counts):
        tokens = random_tokens(rows, max(1, int(new.max())), seed=seed + 7)
        for row, count in enumerate(new.tolist()):
            tokens[row, :count] = text[row, starts[row] : starts[row] + count]
        logits = step(model, cache, tokens, starts)
        for row, count in enumerate(new.tolist()):
            torch.testing.assert_close(
                logits[row, :count], expected[row, starts[row] : starts[row] + count], atol=tolerance, rtol=tolerance
            )
        starts = starts + new


@pytest.mark.parametrize(
    "switches",
    [
        dict(qk_norm="full"),
        dict(qk_norm=None, qkv_bias=True),
        dict(n_kv_heads=1),
        dict(n_kv_heads=4),
        dict(num_experts=0),
        dict(moe_layers="every other", shared_expert_d_ff=6),
    ],
    ids=str,
)
@torch.no_grad()
def test_prefill_then_token_by_token_in_float32(tiny_model, switches):
    model = tiny_model(torch.float32, **switches)
    text = random_tokens(2, 15)
    cache, starts = new_cache(model, 2), torch.zeros(2, dtype=torch.int64)
    parts = [step(model, cache, text[:, :9], starts)]
    parts += [step(model, cache, text[:, t : t + 1], starts + t) for t in range(9, 15)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(text), atol=1e-5, rtol=1e-5)


@given(kept=st.lists(st.integers(0, 9), min_size=2, max_size=2), seed=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_crop_then_rewrite_equals_never_having_written(tiny_model, kept, seed):
    model, kept = tiny_model(seed=seed, num_experts=0), torch.tensor(kept)
    written, text = random_tokens(2, 9, seed=seed), random_tokens(2, 14, seed=seed + 9)
    for row in range(2):
        text[row, : kept[row]] = written[row, : kept[row]]
    cache = new_cache(model, 2)
    step(model, cache, written, torch.zeros(2, dtype=torch.int64))
    cache.extend(torch.tensor([9, 9]))
    cache.crop(kept)
    assert cache.lengths.tolist() == kept.tolist()
    rest = torch.stack([text[row, kept[row] : kept[row] + 5] for row in range(2)])
    logits, expected = step(model, cache, rest, cache.lengths), model(text)
    for row in range(2):
        torch.testing.assert_close(logits[row], expected[row, kept[row] : kept[row] + 5], atol=1e-10, rtol=1e-10)


def test_crop_cannot_lengthen_a_row(tiny_model):
    cache = new_cache(tiny_model(), 2)
    cache.extend(torch.tensor([3, 5]))
    with pytest.raises(AssertionError, match="lengthen"):
        cache.crop(torch.tensor([4, 5]))


@torch.no_grad()
def test_selected_rows_go_on_as_if_they_had_been_alone(tiny_model):
    model = tiny_model(num_experts=0)
    text, starts = random_tokens(4, 12), torch.full((4,), 7)
    cache = new_cache(model, 4)
    step(model, cache, text[:, :7], torch.zeros(4, dtype=torch.int64))
    cache.extend(torch.tensor([7, 6, 5, 4]))
    rows = torch.tensor([3, 1])
    cache.select(rows)
    assert cache.lengths.tolist() == [4, 6]
    logits = step(model, cache, text[rows, 7:], starts[rows])
    torch.testing.assert_close(logits, model(text[rows])[:, 7:], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_subset_s_rows_go_on_in_the_buffers_of_the_whole(tiny_model):
    """Some rows run the late layers, in another order than theirs; afterwards the whole cache is as if each row had
    been alone, and the rows left out are untouched."""
    model = tiny_model(num_experts=0)
    text = random_tokens(4, 12)
    cache = new_cache(model, 4)
    step(model, cache, text[:, :7], torch.zeros(4, dtype=torch.int64))
    cache.extend(torch.tensor([7, 6, 5, 4]))
    untouched = cache.keys[:, [0, 2]].clone()
    rows = torch.tensor([3, 1])
    part = cache.subset(rows)
    assert part.lengths.tolist() == [4, 6] and part.capacity == cache.capacity
    logits = step(model, part, text[rows, 7:10], torch.full((2,), 7))
    torch.testing.assert_close(logits, model(text[rows, :10])[:, 7:], atol=1e-10, rtol=1e-10)
    assert torch.equal(cache.keys[:, [0, 2]], untouched)
    # A subset of the subset, then all rows: what was written there is read here.
    last = part.subset(torch.tensor([1]))
    assert last.lengths.tolist() == [6]
    logits = step(model, last, text[1:2, 10:11], torch.tensor([10]))
    torch.testing.assert_close(logits, model(text[1:2, :11])[:, 10:], atol=1e-10, rtol=1e-10)
    tokens = torch.stack([text[row, at] for row, at in enumerate([7, 11, 7, 10])])[:, None]
    logits = step(model, cache, tokens, torch.tensor([7, 11, 7, 10]))
    for row, at in enumerate([7, 11, 7, 10]):
        torch.testing.assert_close(logits[row], model(text[row : row + 1, : at + 1])[0, at:], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_fill_through_a_subset_writes_its_rows_alone(tiny_model):
    model = tiny_model()
    states = torch.randn(3, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1], [4, 5], [2, 3]])
    whole, parts = new_cache(model, 3), new_cache(model, 3)
    model.fill(states, [0, 2], positions=positions, cache=whole)
    rows = torch.tensor([2, 0])
    model.fill(states[rows], [0, 2], positions=positions[rows], cache=parts.subset(rows))
    torch.testing.assert_close(parts.keys[:, rows], whole.keys[:, rows], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(parts.values[:, rows], whole.values[:, rows], atol=1e-12, rtol=1e-12)
    assert whole.keys[2, 1].any() and not parts.keys[:, 1].any() and not parts.values[:, 1].any()


def test_a_subset_keeps_count_for_itself(tiny_model):
    cache = new_cache(tiny_model(), 3)
    cache.extend(torch.tensor([3, 4, 5]))
    part = cache.subset(torch.tensor([2, 0]))
    part.extend(torch.tensor([1, 1]))
    assert part.lengths.tolist() == [6, 4] and cache.lengths.tolist() == [3, 4, 5]
    part.select(torch.tensor([1]))
    assert part.rows.tolist() == [0] and cache.rows.tolist() == [0, 1, 2]


@torch.no_grad()
def test_a_copied_cache_is_its_own(tiny_model):
    model = tiny_model(torch.float32, router_hold=2)
    cache = KVCache(model.config, 1, 10)
    places = torch.tensor([[0]])
    with compiling(model):
        model.decode(places, range(4), positions=places, cache=cache)
        other, before, routed = copy.deepcopy(cache), cache.keys.clone(), cache.router_logits.clone()
        model.decode(places + 1, range(4), positions=places, cache=other)
    assert torch.equal(cache.keys, before) and not torch.equal(other.keys, before)
    assert torch.equal(cache.router_logits, routed) and not torch.equal(other.router_logits, routed)


@torch.no_grad()
def test_a_cleared_cache_is_as_new(tiny_model):
    model = tiny_model(router_hold=2)
    cache, new = new_cache(model, 3), new_cache(model, 3)
    step(model, cache, random_tokens(3, 9), torch.zeros(3, dtype=torch.int64))
    cache.extend(torch.tensor([9, 8, 7]))
    cache.select(torch.tensor([2, 1]))
    cache.clear()
    for name in ("keys", "values", "router_logits", "rows", "lengths"):
        assert torch.equal(getattr(cache, name), getattr(new, name)), name


@pytest.mark.parametrize("qk_norm", ["head", "full", None])
@torch.no_grad()
def test_fill_writes_what_run_would_write_from_the_same_state(tiny_model, qk_norm):
    model = tiny_model(qk_norm=qk_norm, qkv_bias=True)
    exit_state = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[4, 5, 6], [9, 10, 11]])
    filled = new_cache(model, 2)
    model.fill(exit_state, [1, 3], positions=positions, cache=filled)
    for layer in (1, 3):
        ran = new_cache(model, 2)
        model.run(exit_state, [layer], positions=positions, cache=ran)
        torch.testing.assert_close(filled.keys[layer], ran.keys[layer], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(filled.values[layer], ran.values[layer], atol=1e-12, rtol=1e-12)
        assert filled.keys[layer, 0, :, 4:7].abs().min() > 0
    assert not filled.keys[[0, 2]].any() and not filled.values[[0, 2]].any()


def test_write_then_read():
    config = ModelConfig(vocab_size=5, n_layers=2, d_model=8, n_heads=2, n_kv_heads=1)
    cache = KVCache(config, 3, 6)
    assert cache.keys.shape == cache.values.shape == (2, 3, 1, 6, 4) and cache.capacity == 6
    positions = torch.tensor([[0, 1], [3, 4], [4, 5]])
    keys, values = torch.randn(2, 3, 2, 1, 4)
    places = locate(positions, config, cache, length=6)
    write(cache.memory(1), places, keys, values)
    read_keys, read_values = read(cache.memory(1), places)
    assert read_keys.shape == read_values.shape == (3, 1, 6, 4)
    assert read(cache.memory(1), locate(positions, config, cache, length=4))[0].shape == (3, 1, 4, 4)
    for row in range(3):
        assert torch.equal(read_keys[row, 0, positions[row]], keys[row, :, 0])
        assert torch.equal(read_values[row, 0, positions[row]], values[row, :, 0])
    assert read_keys.count_nonzero() == keys.numel() and not cache.keys[0].any()


def test_write_converts_to_the_cache_s_type():
    config = ModelConfig(vocab_size=5, n_layers=1, d_model=8, n_heads=2)
    cache = KVCache(config, 1, 2, dtype=torch.bfloat16)
    keys = torch.randn(1, 2, 2, 4)
    places = locate(torch.tensor([[0, 1]]), config, cache, length=2)
    write(cache.memory(0), places, keys, keys)
    assert torch.equal(read(cache.memory(0), places)[0], keys.bfloat16().transpose(1, 2))


def test_a_subset_s_rows_are_those_of_the_whole():
    cache = KVCache(ModelConfig(vocab_size=5, n_layers=1, d_model=8, n_heads=2), 4, 6)
    positions = torch.tensor([[0, 1, 2], [3, 4, 5]])
    assert cache.subset(torch.tensor([3, 1])).rows_of(positions).tolist() == [3, 3, 3, 1, 1, 1]
    assert cache.subset(torch.tensor([3, 1])).subset(torch.tensor([1])).rows_of(positions[:1]).tolist() == [1, 1, 1]


@pytest.mark.parametrize("method", ["run", "fill"])
@pytest.mark.parametrize(("capacity", "last"), [(6, 6), (100, 64)], ids=["the cache is full", "past max_seq_len"])
@torch.no_grad()
def test_positions_past_the_end_are_refused(tiny_model, method, capacity, last):
    model = tiny_model(torch.float32)
    cache = new_cache(model, 2, capacity)
    hidden, positions = torch.randn(2, 1, 16), torch.tensor([[last], [0]])
    act = getattr(model, method)
    with pytest.raises(ValueError, match=f"{last + 1} positions are too many.*max_seq_len is 64.*{capacity} slots"):
        act(hidden, [0], positions=positions, cache=cache)
    assert not cache.keys.any()
    act(hidden, [0], positions=positions - torch.tensor([[1], [0]]), cache=cache)
    assert cache.keys.any()
