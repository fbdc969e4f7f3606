"""The few-row operators against their plain twins and the formulas; rows that do not depend on their neighbours."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.nn import ModelConfig, few_rows
from layerskip_moe.nn.kernels import has_kernels, using_kernels
from layerskip_moe.nn.rotary import rotary_table
from layerskip_moe.nn.rounding import nearest
from layerskip_moe.nn.router import Router

pytestmark = pytest.mark.skipif(not has_kernels(), reason="there is no C++ compiler")

TYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the result's size: what sums in another order, and results rounded at other places, may differ by.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}

sizes = st.integers(1, 70)
rows = st.integers(1, 64)
seeds = st.integers(0, 1000)
dtypes = st.sampled_from(TYPES)
settings.register_profile("few rows", max_examples=40, deadline=None, derandomize=True)
few_examples = settings(settings.get_profile("few rows"))


def drawn(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(one, other, dtype=None, times=1.0):
    """Equal up to rounding, measured by the largest of the other's numbers."""
    assert one.shape == other.shape
    allowed = times * ROUNDING[dtype or one.dtype] * max(1.0, float(other.abs().max()))
    torch.testing.assert_close(one.double(), other.double(), atol=allowed, rtol=0)


@torch.no_grad()
def both_ways(function, *arguments, **keywords):
    """What the kernels give, and what their twin gives."""
    fast = function(*arguments, **keywords)
    with using_kernels(False):
        return fast, function(*arguments, **keywords)


def quantized(kind, weight):
    """A weight as `quantize` makes it; None: as it is."""
    if kind is None:
        return weight
    from layerskip_moe.pretrained.quantized_weights import Int8Weight, PackedInt4Weight

    return {"int8": Int8Weight, "int4": PackedInt4Weight}[kind].from_floats(weight)


@given(rows, sizes, sizes, dtypes, st.sampled_from([None, "int8", "int4"]), st.booleans(), st.booleans(), seeds)
@few_examples
def test_linear(n, inputs, outputs, dtype, kind, with_bias, wide, seed):
    inputs = 8 * inputs if kind == "int4" else inputs
    x = drawn(seed, n, inputs, dtype=dtype)
    weight = drawn(seed + 1, outputs, inputs, dtype=dtype) / inputs**0.5
    bias = drawn(seed + 2, outputs, dtype=dtype) if with_bias and not wide else None
    weight = quantized(kind, weight)
    fast, plain = both_ways(few_rows.linear, x, weight, bias, wide=wide)
    assert fast.dtype == plain.dtype == (torch.float32 if wide else dtype)
    rounded = dtype if kind else fast.dtype  # the twin dequantises in the states' type
    assert_near(fast, plain, rounded)
    values = weight if kind is None else weight.dequantize(torch.float32)
    exact = F.linear(x.double(), values.double(), None if bias is None else bias.double())
    assert_near(fast, exact, rounded)


@given(rows, st.integers(1, 9), st.integers(1, 9), sizes, sizes, dtypes, st.sampled_from([None, "int8"]), seeds)
@few_examples
def test_experts(n, n_experts, top_k, width, hidden, dtype, kind, seed):
    top_k = min(top_k, n_experts)
    x, logits = drawn(seed, n, width, dtype=dtype), drawn(seed + 1, n, n_experts)
    weights, chosen = logits.softmax(-1).topk(top_k)
    gate_up = quantized(kind, drawn(seed + 2, n_experts, 2 * hidden, width, dtype=dtype) / width**0.5)
    down = quantized(kind, drawn(seed + 3, n_experts, width, hidden, dtype=dtype) / hidden**0.5)
    fast, plain = both_ways(few_rows.experts, x, chosen, weights, gate_up, down)
    assert fast.dtype == dtype
    assert_near(fast, plain, times=2)


def test_int4_experts_are_dequantised():
    x, chosen, weights = drawn(0, 5, 16), torch.tensor([[0, 2], [1, 2], [0, 1], [2, 1], [1, 0]]), torch.rand(5, 2)
    gate_up = quantized("int4", drawn(1, 3, 48, 16))
    down = quantized("int4", drawn(2, 3, 16, 24))
    with torch.no_grad():
        packed = few_rows.experts(x, chosen, weights, gate_up, down)
        floats = few_rows.experts(x, chosen, weights, gate_up.dequantize(), down.dequantize())
    assert_near(packed, floats)


@given(rows, st.integers(1, 4), sizes, dtypes, st.sampled_from([1e-6, 1e-5, 1e-1]), st.floats(1e-4, 1e3), seeds)
@few_examples
def test_norm(n, heads, width, dtype, epsilon, size, seed):
    x = (size * drawn(seed, n, heads, width)).to(dtype)
    weight = (1 + 0.3 * drawn(seed + 1, width)).to(dtype)
    fast, plain = both_ways(few_rows.norm, x, weight, epsilon)
    assert fast.dtype == dtype
    assert_near(fast, plain)
    wide = x.double()
    assert_near(fast, wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double())


@given(rows, sizes, dtypes, seeds)
@few_examples
def test_add_and_gate(n, width, dtype, seed):
    x, y = drawn(seed, n, width, dtype=dtype), drawn(seed + 1, n, width, dtype=dtype)
    fast, plain = both_ways(few_rows.add, x, y)
    assert torch.equal(fast, plain)
    logits = 5 * drawn(seed + 2, n, 1, dtype=dtype)
    fast, plain = both_ways(few_rows.gate, x, logits)
    assert_near(fast, plain)


@given(rows, sizes, dtypes, st.sampled_from([0.1, 1.0, 30.0, 1e4]), seeds)
@few_examples
def test_swiglu(n, hidden, dtype, size, seed):
    gate_up = (size * drawn(seed, n, 2 * hidden)).to(dtype)
    gate_up[:, hidden:] /= size
    fast, plain = both_ways(few_rows.swiglu, gate_up)
    assert_near(fast, plain)


def test_silu_is_accurate_everywhere():
    """e^x to within units in the last place wherever float32 has it, and the right limits beyond."""
    gates = torch.cat([torch.linspace(-87, 87, 20001), torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4, 1e30])])
    with torch.no_grad():
        silu = few_rows.swiglu(torch.cat([gates, torch.ones_like(gates)])[None])[0]
    exact = gates.double() * gates.double().sigmoid()
    assert silu.isfinite().all()
    torch.testing.assert_close(silu.double(), exact, rtol=6e-7, atol=1e-32)


@given(
    rows,
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
    st.sampled_from([1.0, 5.0]),
    seeds,
)
@few_examples
def test_route(n, n_experts, top_k, normalize, balanced, masked, size, seed):
    """`Router` with the kernels and without, some experts masked; experts that tie do not occur."""
    masked = min(masked, n_experts - 1)
    top_k = min(top_k, n_experts - masked)
    config = ModelConfig(
        vocab_size=2,
        d_model=8,
        n_heads=1,
        num_experts=n_experts,
        top_k=top_k,
        normalize_top_k=normalize,
        bias_balancing=balanced,
    )
    router = Router(config)
    with torch.no_grad():
        router.weight.copy_(size * drawn(seed, n_experts, 8))
        if balanced:
            router.balance_bias.copy_(0.3 * drawn(seed + 1, n_experts))
    mask = torch.arange(n_experts) >= masked
    fast, plain = both_ways(router, drawn(seed + 2, n, 8), expert_mask=mask if masked else None)
    assert_near(fast.logits[:, masked:], plain.logits[:, masked:])
    assert fast.chosen.dtype == torch.int64 and torch.equal(fast.chosen, plain.chosen)
    assert_near(fast.weights, plain.weights, times=20 * size)
    assert (fast.chosen >= masked).all()


def attention_case(seed, n, groups, per_group, head_dim, capacity, window, dtype, cached=None, scale=1.0):
    """Arguments of `attend` for n different slots of a cache of three rows that is full of something."""
    cached = cached or dtype
    queries = (scale * drawn(seed, n, groups * per_group, head_dim)).to(dtype)
    new = drawn(seed + 1, 2, n, groups, head_dim, dtype=dtype)
    keys, values = drawn(seed + 2, 2, 3, groups, capacity, head_dim, dtype=cached)
    slots = torch.randperm(3 * capacity, generator=torch.Generator().manual_seed(seed))[:n]
    where = dict(rows=slots // capacity, positions=slots % capacity, window=window)
    return (queries, *new, keys, values), where


def attend(case, where):
    """`attend` on a copy of the cache: the mixed values, and the cache afterwards."""
    queries, new_keys, new_values, keys, values = case
    keys, values = keys.clone(), values.clone()
    mixed = few_rows.attend(queries, new_keys, new_values, keys, values, **where)
    return mixed, keys, values


def attention_by_definition(case, where):
    queries, new_keys, new_values, keys, values = (part.double() for part in case)
    keys[where["rows"], :, where["positions"]] = new_keys.to(case[3].dtype).double()
    values[where["rows"], :, where["positions"]] = new_values.to(case[4].dtype).double()
    mixed = []
    for query, row, position in zip(queries, where["rows"], where["positions"], strict=True):
        read = slice(max(0, int(position) + 1 - where["window"]) if where["window"] else 0, int(position) + 1)
        per_group = len(query) // keys.shape[1]
        k, v = (cached[row, :, read].repeat_interleave(per_group, dim=0) for cached in (keys, values))
        scores = torch.einsum("hd,hsd->hs", query, k) / math.sqrt(query.shape[-1])
        mixed.append(torch.einsum("hs,hsd->hd", scores.softmax(-1), v).flatten())
    return torch.stack(mixed)


@given(
    st.integers(1, 64),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(2, 64).map(lambda half: 2 * half),
    st.integers(22, 60),
    st.sampled_from([0, 0, 1, 5, 100]),
    dtypes,
    st.sampled_from([None, torch.bfloat16]),
    seeds,
)
@few_examples
def test_attend(n, groups, per_group, head_dim, capacity, window, dtype, cached, seed):
    case, where = attention_case(seed, n, groups, per_group, head_dim, capacity, window, dtype, cached)
    fast, plain = both_ways(attend, case, where)
    for one, other in zip(fast[1:], plain[1:], strict=True):
        assert torch.equal(one, other)
    assert fast[0].dtype == dtype and fast[0].shape == (n, groups * per_group * head_dim)
    assert_near(fast[0], plain[0], times=2)
    assert_near(fast[0], attention_by_definition(case, where), times=2)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_attend_where_scores_are_extreme(scale):
    """Up to thousands apart: one slot takes all, no weight is lost and nothing is not a number."""
    case, where = attention_case(0, 20, 2, 2, 16, 50, 0, torch.float32, scale=scale)
    with torch.no_grad():
        mixed = attend(case, where)[0]
    exact = attention_by_definition(case, where)
    assert_near(mixed, exact, times=10 * max(1.0, scale))


@given(rows, st.integers(1, 8), st.integers(2, 64).map(lambda half: 2 * half), dtypes, seeds)
@few_examples
def test_rotate(n, heads, head_dim, dtype, seed):
    x = drawn(seed, n, heads, head_dim, dtype=dtype)
    table = rotary_table(head_dim, 10_000.0, None, 100, torch.device("cpu"))
    positions = torch.randint(100, (n,), generator=torch.Generator().manual_seed(seed))
    fast, plain = both_ways(few_rows.rotate, x, *table, positions)
    assert_near(fast, plain)
    torch.testing.assert_close(fast.float().norm(dim=-1), x.float().norm(dim=-1), rtol=ROUNDING[dtype], atol=0)


def test_embed_picks_rows():
    table = drawn(0, 9, 7, dtype=torch.bfloat16)
    tokens = torch.tensor([3, 3, 0, 8])
    fast, plain = both_ways(few_rows.embed, tokens, table)
    assert torch.equal(fast, plain) and torch.equal(fast, table[tokens])


def routed_by(memory, row, position, weights, hold):
    """What `remember` gives a position whose row's logits are all written, in float64."""
    latest = hold * (position // hold)
    back = range(min(latest + 1, len(weights)))
    mean = sum(weights[j] * memory[row, latest - j].double() for j in back)
    return mean / sum(weights[j] for j in back)


@given(
    rows,
    st.integers(1, 20),
    st.lists(st.floats(0.01, 1), min_size=1, max_size=9),
    st.integers(1, 9),
    st.integers(22, 60),
    seeds,
)
@few_examples
def test_remember(n, n_experts, weights, hold, capacity, seed):
    """N different slots of three rows, full of something: bit for bit the twin's, and near what the formula says."""
    slots = torch.randperm(3 * capacity, generator=torch.Generator().manual_seed(seed))[:n]
    where = dict(rows=slots // capacity, positions=slots % capacity)
    logits, full = drawn(seed, n, n_experts), drawn(seed + 1, 3, capacity, n_experts)

    def remember():
        memory = full.clone()
        return few_rows.remember(logits, memory, **where, weights=weights, hold=hold), memory

    fast, plain = both_ways(remember)
    assert torch.equal(fast[0], plain[0]) and torch.equal(fast[1], plain[1])
    full[where["rows"], where["positions"]] = logits
    assert torch.equal(fast[1], full)
    at = zip(where["rows"].tolist(), where["positions"].tolist(), strict=True)
    assert_near(fast[0], torch.stack([routed_by(full, row, position, weights, hold) for row, position in at]))


@given(rows, sizes, dtypes, st.booleans(), seeds)
@few_examples
@torch.no_grad()
def test_choose(n, vocab_size, dtype, noisy, seed):
    logits = drawn(seed, n, vocab_size, dtype=dtype)
    noise = drawn(seed + 1, vocab_size, n).double().T if noisy else None
    chosen = few_rows.choose(logits, noise)
    scores = logits.double() + noise if noisy else logits.double()
    # Equal logits of 16 bits may tie: what is chosen is then one of the best.
    best = scores.amax(dim=-1)
    torch.testing.assert_close(scores.gather(1, chosen[:, None])[:, 0], best, atol=1e-9, rtol=1e-12)
    again, margins = few_rows.choose_by_margin(logits, noise)
    assert torch.equal(again, chosen)
    others = [[*row[:token], *row[token + 1 :]] for row, token in zip(scores.tolist(), chosen.tolist(), strict=True)]
    second = torch.tensor([max(row, default=float("-inf")) for row in others], dtype=torch.float64)
    torch.testing.assert_close(margins, best - second, atol=1e-9, rtol=1e-12)


@given(rows, st.integers(1, 40), dtypes, st.booleans(), seeds)
@few_examples
@torch.no_grad()
def test_a_copy_proposes_two_tokens_and_the_weight_decides(n, vocab_size, dtype, noisy, seed):
    """Where an int8 copy is read, and nowhere else."""
    x, weight = drawn(seed, n, 24, dtype=dtype), drawn(seed + 1, vocab_size, 24, dtype=dtype)
    noise = drawn(seed + 2, n, vocab_size).double() if noisy else None
    values, scale = nearest(weight, 24, bits=4)  # (in 8 bits, what is largest hardly ever changes)
    exact = few_rows.linear(x, weight)
    plain = few_rows.choose_by_margin(exact, noise, of=(x, weight))
    assert all(map(torch.equal, plain, few_rows.choose_by_margin(exact, noise)))
    with few_rows.reading({id(weight): (few_rows.packed(values), scale[:, 0].float())}):
        near = few_rows.linear(x, weight)
        tokens, margins = few_rows.choose_by_margin(near, noise, of=(x, weight))
    assert vocab_size < 9 or not torch.equal(near, exact)
    by_copy, by_weight = (logits.double() if noise is None else logits + noise for logits in (near, exact))
    for row in range(n):
        largest, weighed = by_copy[row].topk(min(3, vocab_size))
        if not largest.diff().all():  # of equal ones there may be another second
            continue
        scores = by_weight[row, weighed[:2]].sort(descending=True).values
        assert by_weight[row, tokens[row]] == scores[0]
        assert margins[row] == (math.inf if vocab_size == 1 else scores[0] - scores[1])


@torch.no_grad()
def operators(dtype, seed):
    """name -> a function from the indices of some of 64 rows to the operator's result for these."""
    x, wide = drawn(seed, 64, 37, dtype=dtype), drawn(seed + 1, 64, 46, dtype=dtype)
    weight, bias = drawn(seed + 2, 21, 37, dtype=dtype), drawn(seed + 3, 21, dtype=dtype)
    gate_up, down = drawn(seed + 4, 5, 46, 37, dtype=dtype), drawn(seed + 5, 5, 37, 23, dtype=dtype)
    logits = drawn(seed + 6, 64, 5)
    weights, chosen = logits.softmax(-1).topk(3)
    heads, gates = drawn(seed + 7, 64, 3, 12, dtype=dtype), drawn(seed + 8, 64, 1, dtype=dtype)
    positions = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
    table = rotary_table(12, 10_000.0, None, 64, torch.device("cpu"))
    noise, int8 = drawn(seed + 10, 64, 37).double(), quantized("int8", weight)
    experts8 = quantized("int8", gate_up), quantized("int8", down)
    (queries, *cache), where = attention_case(seed, 64, 2, 3, 20, 30, 7, dtype)
    new_keys, new_values, keys, values = cache
    keys[where["rows"], :, where["positions"]], values[where["rows"], :, where["positions"]] = new_keys, new_values
    router = Router(ModelConfig(vocab_size=2, d_model=37, n_heads=1, head_dim=2, num_experts=5, top_k=3))
    router.weight.copy_(drawn(seed + 9, 5, 37) / 6)

    def attend_some(some):
        places = dict(rows=where["rows"][some], positions=where["positions"][some])
        mixed = [
            few_rows.attend(queries[some], new_keys[some], new_values[some], keys, values, **places, window=window)
            for window in (0, 7)
        ]
        return torch.cat(mixed, dim=-1)

    kept = logits[torch.argsort(positions)][None].contiguous()

    def remember_some(some):
        places = dict(rows=torch.zeros_like(some), positions=positions[some])
        return few_rows.remember(logits[some], kept, **places, weights=[1.0, 0.6, 0.3], hold=3)

    return {
        "linear": lambda some: few_rows.linear(x[some], weight, bias),
        "linear, wide": lambda some: few_rows.linear(x[some], weight, wide=True),
        "linear, int8": lambda some: few_rows.linear(x[some], int8),
        "experts": lambda some: few_rows.experts(x[some], chosen[some], weights[some], gate_up, down),
        "experts, int8": lambda some: few_rows.experts(x[some], chosen[some], weights[some], *experts8),
        "norm": lambda some: few_rows.norm(x[some], weight[0], 1e-6),
        "norm of heads": lambda some: few_rows.norm(heads[some], weight[0, :12], 1e-6),
        "add": lambda some: few_rows.add(x[some], weight[:1].expand(64, -1)[some]),
        "swiglu": lambda some: few_rows.swiglu(wide[some]),
        "gate": lambda some: few_rows.gate(x[some], gates[some]),
        "rotate": lambda some: few_rows.rotate(heads[some], *table, positions[some]),
        "router": lambda some: torch.cat([part.double() for part in router(x[some])], dim=-1),
        "choose": lambda some: torch.stack(few_rows.choose_by_margin(x[some], noise[some]), dim=-1),
        "attend": attend_some,
        "remember": remember_some,
    }


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "twin"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", operators(torch.float32, 0))
@torch.no_grad()
def test_a_row_is_the_same_beside_any_others(name, dtype, kernels):
    """Bit for bit: 1 to 64 of the rows, in any order, are rows of the whole."""
    operator = operators(dtype, 3)[name]
    generator = torch.Generator().manual_seed(1)
    with using_kernels(kernels):
        whole = operator(torch.arange(64))
        for count in (1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 33, 63):
            some = torch.randperm(64, generator=generator)[:count]
            assert torch.equal(operator(some), whole[some]), f"{count} rows"


def refused_calls():
    """name -> (what the message says, a call that an operator refuses)."""
    case, where = attention_case(0, 4, 2, 1, 8, 10, 0, torch.float32)
    queries, new_keys, new_values, keys, values = case
    table = rotary_table(8, 10_000.0, None, 10, torch.device("cpu"))
    x, weight = drawn(0, 4, 6), drawn(1, 5, 6)
    at, row = where["positions"], where["rows"]

    def remember_with(memory=None, rows=row, positions=at):
        memory = torch.zeros(3, 10, 6) if memory is None else memory
        return few_rows.remember(x, memory, rows=rows, positions=positions, weights=[1.0], hold=1)

    def attend_with(keys=keys, values=values, rows=row, positions=at):
        return few_rows.attend(queries, new_keys, new_values, keys, values, rows=rows, positions=positions)

    return {
        "past the cache": ("outside the cache", lambda: attend_with(positions=torch.tensor([0, 1, 2, 10]))),
        "before the cache": ("outside the cache", lambda: attend_with(positions=torch.tensor([0, -1, 2, 3]))),
        "past the routers' memory": ("outside the cache", lambda: remember_with(positions=torch.tensor([0, 1, 2, 10]))),
        "no such row there": ("outside the cache", lambda: remember_with(rows=torch.tensor([0, 3, 1, 2]))),
        "of other experts": ("fit together", lambda: remember_with(torch.zeros(3, 10, 5))),
        "rounded": ("float32 logits", lambda: remember_with(torch.zeros(3, 10, 6, dtype=torch.bfloat16))),
        "no such row": ("outside the cache", lambda: attend_with(rows=torch.tensor([0, 3, 1, 2]))),
        "keys that lie apart": ("contiguous", lambda: attend_with(keys=keys.mT.contiguous().mT)),
        "positions that lie apart": ("contiguous", lambda: attend_with(positions=torch.zeros(8, dtype=int)[::2])),
        "no such angle": ("no angle", lambda: few_rows.rotate(queries, *table, torch.tensor([0, 1, 2, 10]))),
        "no such token": ("vocabulary", lambda: few_rows.embed(torch.tensor([0, 5]), weight)),
        "columns": ("lie together", lambda: few_rows.linear(x.T.contiguous().T, weight)),
        "float64": ("float32, bfloat16 and float16", lambda: few_rows.linear(x.double(), weight.double())),
    }


@pytest.mark.parametrize("name", refused_calls())
@torch.no_grad()
def test_what_cannot_be_computed_is_refused(name):
    message, call = refused_calls()[name]
    with pytest.raises(RuntimeError, match=message):
        call()


def test_rows_of_a_projection_may_lie_apart():
    whole = drawn(0, 6, 20)
    with torch.no_grad():
        assert torch.equal(few_rows.swiglu(whole[:, 3:15]), few_rows.swiglu(whole[:, 3:15].contiguous()))
        weight = drawn(1, 5, 8)
        assert torch.equal(
            few_rows.linear(whole[:, 4:12], weight), few_rows.linear(whole[:, 4:12].contiguous(), weight)
        )


def test_what_counts_as_few():
    x = drawn(0, 2, 32, 4)
    with torch.no_grad():
        assert few_rows.are_few(x) and few_rows.are_few(x.bfloat16())
        assert not few_rows.are_few(drawn(0, 65, 4)) and not few_rows.are_few(x.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not few_rows.are_few(x)
    assert not few_rows.are_few(x)


some = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, -math.inf])
many = st.integers(1, 40).flatmap(lambda count: st.lists(some, min_size=count, max_size=count))
strange = st.lists(st.tuples(st.integers(0, 39), st.sampled_from([math.inf, math.nan])), max_size=2)


@given(many, strange, st.booleans(), seeds)
@settings(max_examples=200, deadline=None)
@torch.no_grad()
def test_ties_and_what_is_not_finite_are_chosen_as_torch_chooses_them(values, strange, noisy, seed):
    for place, value in strange:
        values[place % len(values)] = value
    logits = torch.tensor([values, values[::-1]])
    noise = torch.randint(2, logits.shape, generator=torch.Generator().manual_seed(seed)).double() if noisy else None
    scores = logits.double() if noise is None else logits + noise
    tokens, margins = few_rows.choose_by_margin(logits, noise)
    assert tokens.tolist() == scores.argmax(dim=-1).tolist()
    largest = torch.cat([scores, torch.full((2, 1), -math.inf, dtype=torch.float64)], dim=1).topk(2, dim=-1).values
    torch.testing.assert_close(margins, largest[:, 0] - largest[:, 1], rtol=0, atol=0, equal_nan=True)
