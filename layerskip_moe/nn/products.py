"""Matrix products of many rows (training, prefill): with one weight, or with a weight for each group of rows.

N rows, D inputs, O outputs, G groups.
On a CPU without instructions for products of bfloat16 or float16, PyTorch's take seven times as long as float32's.
There weights are turned into float32 on the way, one group's at a time, and so are quantised weights everywhere.

Knows nothing of layers. Next: `attention.py`, `block.py` and `experts.py`, which multiply.
"""

import functools
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.compiler.assume_constant_result  # the compiler cannot ask the processor
def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The type to multiply in: float32 for the 16-bit floats an x86 CPU has no products of, else the type itself."""
    return _cpu_product_dtype(dtype) if device_type == "cpu" else dtype


@functools.cache
def _cpu_product_dtype(dtype: torch.dtype) -> torch.dtype:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return dtype
    if dtype == torch.bfloat16:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return dtype if native else torch.float32
    if dtype == torch.float16:
        return dtype if torch.ops.mkldnn._is_mkldnn_fp16_supported() else torch.float32
    return dtype


def is_quantized(weight: Tensor) -> bool:
    """Whether this is a tensor of packed whole numbers (`pretrained/quantized_weights.py`)."""
    return type(weight) not in (Tensor, nn.Parameter)


def int8_parts(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Whole numbers [..., O, D] and scales [..., O, 1] of a weight that torchao made of int8; None for any other."""
    values = getattr(weight, "qdata", None)
    return (values, weight.scale) if values is not None and values.dtype == torch.int8 else None  # type: ignore[attr-defined]


def as_floats(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight, quantised or not, as plain floats of the type."""
    return weight.dequantize(dtype) if is_quantized(weight) else weight.to(dtype)  # type: ignore[call-arg]


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, the two halves of gate_up [..., 2F] -> [..., F] (arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def many_row_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear for many rows: x [..., D], weight [O, D], which may be quantised, bias [O] -> [..., O] in x's type.

    Under autocast it is F.linear's own, in autocast's type.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    dtype = product_dtype(x.dtype, x.device.type)
    if x.dtype == weight.dtype == dtype and not is_quantized(weight):
        return F.linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        out = F.linear(x.to(dtype), as_floats(weight, dtype), None if bias is None else bias.to(dtype))
    return out.to(x.dtype)


@torch.library.custom_op("layerskip_moe::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [N, D], group after group, times its group's weight of weight [G, O, D] -> [N, O].

    ends: [G] int32, where in N each group ends; the last is N. A group may be empty.
    One operation to the compiler, which cannot know the groups' sizes, and traces F.grouped_mm in bfloat16 only.
    """
    if can_group(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return _group_by_group(x, weight, ends)


def _group_by_group(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_product` by one product for each group that is not empty; a GPU is waited for.

    Weights that are not of product_dtype are turned into it, each in its turn and all in one place: new memory for
    each would take longer than the turning.
    """
    dtype = product_dtype(x.dtype, x.device.type)
    rows, out = x.to(dtype), torch.empty(len(x), weight.shape[1], dtype=dtype, device=x.device)
    plain = weight.dtype == dtype and not is_quantized(weight)
    place = None if plain else torch.empty(weight.shape[1:], dtype=dtype, device=x.device)
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            part = weight[group] if place is None else _turned(weight[group], place)
            torch.mm(rows[start:end], part.t(), out=out[start:end])
        start = end
    assert start == len(x)
    return out.to(x.dtype)


def _turned(weight: Tensor, place: Tensor) -> Tensor:
    """A weight as floats, written into a place of its size."""
    int8 = int8_parts(weight)
    return place.copy_(as_floats(weight, place.dtype)) if int8 is None else torch.mul(*int8, out=place)


def quantized_grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same for quantised weights, which are unpacked one group at a time; the compiler cannot trace it."""
    if torch.is_grad_enabled():  # gradients pass through to what lies before
        groups = enumerate(x.tensor_split(ends.tolist()[:-1]))
        return torch.cat([many_row_linear(rows, weight[group]) for group, rows in groups if len(rows)])
    return _group_by_group(x, weight, ends)


@torch.library.custom_op("layerskip_moe::grouped_outer", mutates_args=())
def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left [N, O] and right [N, D], group after group -> left^T right of each [G, O, D]: the weights' gradient."""
    if can_group(left, right):
        return F.grouped_mm(left.t(), right, offs=ends)
    out, dtype = left.new_empty(len(ends), left.shape[1], right.shape[1]), product_dtype(left.dtype, left.device.type)
    start = 0
    for group, end in enumerate(ends.tolist()):
        part = left[start:end].t(), right[start:end]
        if dtype == out.dtype:
            torch.mm(*part, out=out[group])
        else:
            out[group] = part[0].to(dtype) @ part[1].to(dtype)
        start = end
    return out


def can_group(left: Tensor, right: Tensor) -> bool:
    """Whether F.grouped_mm has a kernel for these, not a loop that waits for the device: bfloat16, CUDA SM90 and SM100,
    rows of whole 16 bytes."""
    if left.device.type != "cuda" or not left.dtype == right.dtype == torch.bfloat16:
        return False
    widths = left.shape[1], *right.shape[1:]
    return all(width % 8 == 0 for width in widths) and _capability(left.device)[0] in (9, 10)


@torch.compiler.assume_constant_result  # the compiler would ask again in every graph, and cannot
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# (`len` would fix the number of rows in the graph: a new one for every count.)
@grouped_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    for_x, for_weight, _ = ctx.needs_input_grad
    grad = grad.contiguous()
    return (
        grouped_product(grad, weight.transpose(1, 2), ends) if for_x else None,
        grouped_outer(grad, x, ends) if for_weight else None,
        None,
    )


grouped_product.register_autograd(_gradients, setup_context=_save)
