"""Products of few rows with many weights, as decoding, drafting and verification need them.

A row's result is bit for bit the same, however many rows are computed beside it: drafts, verification and plain
decoding agree because they compute the same numbers. On a CPU the work is that of `cpp/`, which reads every weight once
for all rows, at the speed of memory. Where that cannot be compiled, rows are computed one at a time by PyTorch's own
operations, which gives equally fixed results, slowly.

N rows, K inputs, O outputs, D width, E experts, F expert hidden size, H query heads, G key-value heads, C cache slots.
Knows nothing of the network. Next: `kernels.py`, `cpp/few_rows.cpp`; `linear.py`, `experts.py` and `attention.py` call
this.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip_moe.nn import products
from layerskip_moe.nn.kernels import has_kernels

MOST_ROWS = 64  # beyond, matrix products that read weights more than once are faster

_TYPES = (torch.float32, torch.bfloat16, torch.float16)

_PANEL = 32  # outputs; as in cpp/packed.h

# By the id of a weight what is read instead of it: packed int8 and scales.
_instead: ContextVar[Mapping[int, tuple[Tensor, Tensor]]] = ContextVar("read_instead", default=MappingProxyType({}))


@contextmanager
def reading(instead: Mapping[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """For a while, in this thread, let products of few rows read int8 copies instead of weights, by the weights' ids:
    `packed` ones, and the scale of each output [..., O] in float32. Rows are rounded, too, to int16. Needs the
    kernels."""
    token = _instead.set(instead)
    try:
        yield
    finally:
        _instead.reset(token)


def packed(values: Tensor) -> Tensor:
    """int8 [..., O, K] as panels of 32 outputs [..., O / 32, K / 2, 64], rounded up: a panel's outputs side by side, in
    pairs of inputs, zeros where there are no more."""
    padded = F.pad(values, (0, values.shape[-1] % 2, 0, -values.shape[-2] % _PANEL))
    pairs = padded.unflatten(-1, (-1, 2)).unflatten(-3, (-1, _PANEL))  # [..., O / 32, 32, K / 2, 2]
    return pairs.transpose(-3, -2).flatten(-2)


def packed_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """That of `packed` values of this shape."""
    *matrices, outputs, inputs = shape
    return *matrices, -(-outputs // _PANEL), -(-inputs // 2), 2 * _PANEL


def are_few(x: Tensor) -> bool:
    """Whether the rows of x [..., K] are computed by this file's functions: at most MOST_ROWS, on a CPU, with neither
    gradients nor autocast."""
    return serves(x.device) and are_computed(x.dtype, x.device.type) and x.numel() <= MOST_ROWS * x.shape[-1]


def serves(device: torch.device) -> bool:
    """Whether few rows there are computed by this file's functions: on a CPU."""
    return device.type == "cpu"


def are_computed(dtype: torch.dtype, device_type: str) -> bool:
    """Whether few rows of this type are decoding's as things stand: without gradients or autocast."""
    if torch.compiler.is_compiling():  # training's graphs; the kernels are not for tracing
        return False
    return can_compute(dtype) and not torch.is_grad_enabled() and not torch.is_autocast_enabled(device_type)


def can_compute(dtype: torch.dtype) -> bool:
    """Whether few rows of this type ever are."""
    return dtype in _TYPES


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, wide: bool = False) -> Tensor:
    """x [N, K] times weight [O, K] transposed, plus bias [O] -> [N, O] of x's type, or in float32 (wide); sums are
    float32. The weight may be int8 with a scale for each output row; one quantised in another way is dequantised."""
    if id(weight) in (instead := _instead.get()):
        return torch.ops.layerskip_moe_few_rows.linear_packed.default(x, *instead[id(weight)], bias, wide)
    values, scale = _parts(weight)
    if has_kernels():
        return torch.ops.layerskip_moe_few_rows.linear.default(x, values.contiguous(), scale, bias, wide)
    weight = values if scale is None else values.to(x.dtype) * scale.to(x.dtype)
    if wide:
        x, weight = x.float(), weight.float()
    # A copy starts where memory is aligned, as a row of x may not, and on that PyTorch's order of summation depends.
    return torch.cat([F.linear(row.clone(), weight, bias) for row in x.split(1)])


def experts(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """For x [N, D] the sum of its chosen [N, K] experts' outputs, times their weights [N, K] -> [N, D]; gate_up
    [E, 2F, D], down [E, D, F]. An expert is read once, whatever the number of rows that chose it."""
    if id(gate_up) in (instead := _instead.get()):
        (up, up_scales), (back, back_scales) = instead[id(gate_up)], instead[id(down)]
        return torch.ops.layerskip_moe_few_rows.experts_packed.default(
            x, chosen.contiguous(), weights.float().contiguous(), up, back, up_scales, back_scales
        )
    if has_kernels() and _is_read(gate_up) and _is_read(down):
        (gate_up, gate_up_scale), (down, down_scale) = _parts(gate_up), _parts(down)
        return torch.ops.layerskip_moe_few_rows.experts.default(
            x,
            chosen.contiguous(),
            weights.float().contiguous(),
            gate_up.contiguous(),
            down.contiguous(),
            gate_up_scale,
            down_scale,
        )
    outputs = x.new_empty(*chosen.shape, x.shape[-1])
    for expert in chosen.unique().tolist():
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        outputs[rows, places] = linear(swiglu(linear(x[rows], gate_up[expert])), down[expert])
    return (outputs * weights[..., None].to(x.dtype)).sum(dim=1)


def embed(tokens: Tensor, table: Tensor) -> Tensor:
    """Rows tokens [N] of table [V, D] -> [N, D]."""
    return torch.ops.layerskip_moe_few_rows.embed.default(tokens, table) if has_kernels() else table[tokens]


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) by weight [D] of x [N, ..., D], over its last dimension; sums are float32."""
    if has_kernels():
        return torch.ops.layerskip_moe_few_rows.norm.default(x, weight, epsilon)
    return F.rms_norm(x, weight.shape, weight, epsilon)  # each vector by itself


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, both [N, D]."""
    return torch.ops.layerskip_moe_few_rows.add.default(x, y) if has_kernels() else x + y


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [N, 2F], the gate first -> [N, F]."""
    if has_kernels():
        return torch.ops.layerskip_moe_few_rows.swiglu.default(gate_up)
    return products.swiglu(gate_up)


def gate(x: Tensor, logits: Tensor) -> Tensor:
    """x [N, D] times the sigmoid of logits [N, 1]."""
    if has_kernels():
        return torch.ops.layerskip_moe_few_rows.gate.default(x, logits)
    return torch.cat([row.sigmoid() for row in logits.split(1)]) * x  # of many numbers, a vector's and the last differ


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """x [N, heads, head_dim] turned by the angles of positions [N] in the tables cos and sin [., head_dim]."""
    if has_kernels():
        return torch.ops.layerskip_moe_few_rows.rotate.default(x, cos, sin, positions)
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def route(logits: Tensor, bias: Tensor | None, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """What `Router` does with logits [N, E]: chosen and weights [N, K]. Needs the kernels."""
    return torch.ops.layerskip_moe_few_rows.route.default(logits, bias, top_k, normalize)


def remember(
    logits: Tensor, memory: Tensor, *, rows: Tensor, positions: Tensor, weights: Sequence[float], hold: int
) -> Tensor:
    """Write N positions' router logits into a cache, then give each what `router_memory.py` has it routed by.

    logits [N, E], memory [B, C, E], both float32; rows and positions [N] int64: the slot of each
    weights: of a slot itself, of the one before it, and so on; where a row has no earlier ones, the rest's are scaled
    hold: positions h i to h i + h - 1 are given what is position h i's
    -> [N, E], summed from the latest position to the earliest
    """
    if are_few(logits) and has_kernels():
        at = positions.contiguous()  # (rows may share theirs)
        return torch.ops.layerskip_moe_few_rows.remember.default(logits, memory, rows, at, list(weights), hold)
    memory[rows, positions] = logits
    latest = positions - positions % hold
    total, share = torch.zeros_like(logits), logits.new_zeros(len(logits), 1)
    for back, weight in enumerate(weights):
        counted = (latest >= back)[:, None].to(logits.dtype) * weight
        total = total + counted * memory[rows, (latest - back).clamp(min=0)]
        share = share + counted
    return total / share


def choose(logits: Tensor, noise: Tensor | None) -> Tensor:
    """Tokens [N] where logits [N, V], plus noise [N, V] in float64 if there is any, are largest."""
    if are_few(logits) and has_kernels():
        return choose_by_margin(logits, noise)[0]
    return (logits if noise is None else logits + noise).argmax(dim=-1)


def choose_by_margin(
    logits: Tensor, noise: Tensor | None, *, of: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The same, and by how much they are larger there than where they are second largest, [N] float64. of: x [N, K] and
    weight [V, K] whose `linear` the logits are: where that read an int8 copy, the weight itself decides between the two
    that are largest by it, which costs two products a row and lets fewer go wrong; margins are then between these two,
    by the weight."""
    if are_few(logits) and has_kernels():
        exactly = (of[0], of[1].contiguous()) if of is not None and id(of[1]) in _instead.get() else (None, None)
        noise = None if noise is None else noise.contiguous()
        return torch.ops.layerskip_moe_few_rows.choose.default(logits, noise, *exactly)
    scores = logits if noise is None else logits + noise
    largest = scores.topk(min(2, scores.shape[-1]), dim=-1).values.double()
    margins = largest[..., 0] - largest[..., 1] if scores.shape[-1] > 1 else torch.full_like(largest[..., 0], math.inf)
    return scores.argmax(dim=-1), margins


def attend(
    queries: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    rows: Tensor,
    positions: Tensor,
    window: int = 0,
) -> Tensor:
    """Write N positions' keys and values into a cache, then let each of them attend to its row up to itself.

    queries [N, H, head_dim], new_keys and new_values [N, G, head_dim]; the cache's keys and values [B, G, C, head_dim];
    rows and positions [N] int64: the cache slot of each; window: how many slots a query reads at most, 0 for all.
    -> [N, H * head_dim]. What is read is what stands up to a query's own position, however large the cache.
    """
    scale = 1.0 / math.sqrt(queries.shape[-1])
    if has_kernels():
        return torch.ops.layerskip_moe_few_rows.attend.default(
            queries, new_keys, new_values, keys, values, rows, positions, window, scale
        )
    keys[rows, :, positions], values[rows, :, positions] = new_keys.to(keys.dtype), new_values.to(values.dtype)
    mixed = []
    for query, row, position in zip(queries, rows.tolist(), positions.tolist(), strict=True):
        first = max(0, position + 1 - window) if window else 0
        k, v = (cached[row, :, first : position + 1].to(query.dtype) for cached in (keys, values))
        stacked = query.view(k.shape[0], -1, query.shape[-1])
        mixed.append(F.scaled_dot_product_attention(stacked, k, v, scale=scale).flatten())
    return torch.stack(mixed)


def _is_read(weight: Tensor) -> bool:
    """Whether the kernels read this weight as it is: plain, or torchao's int8."""
    return not products.is_quantized(weight) or products.int8_parts(weight) is not None


def _parts(weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """A weight as numbers and, of int8 ones, the scales of its output rows."""
    return products.int8_parts(weight) or (products.as_floats(weight, weight.dtype), None)
