"""Quantised weights as tensors: `F.linear` takes them, and rows or experts are picked from them, unpacked only then.

int8 is torchao's own tensor. torchao's packed int4 tensors need kernels of CUDA or XPU, and the one that runs anywhere
keeps every value in a whole byte, so int4's are packed here. Values and scales are those of `nn/rounding.py`.

K inputs, S scales per row, each of K / S inputs.
Imports torchao, and is therefore imported late itself. Knows nothing of models. Next: `quantize.py`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.quantization import Int8Tensor
from torchao.utils import TorchAOBaseTensor

from layerskip_moe.nn.rounding import nearest

# What is picked is made by hand in `__getitem__`: a view of such a tensor, as torchao's Int8Tensor would give, is
# refused in inference mode (torch: "Cannot set version_counter for inference tensor").


class Int8Weight(Int8Tensor):
    """torchao's tensor for weights [..., K], each of them a whole number from -128 to 127 times its row's scale.

    qdata: [..., K] int8; scale: [..., 1] of the weights' float type
    """

    @classmethod
    def from_floats(cls, weight: Tensor) -> "Int8Weight":
        """The nearest to weight [..., K]."""
        return cls.from_parts(*nearest(weight, weight.shape[-1], bits=8))

    @classmethod
    def from_parts(cls, qdata: Tensor, scale: Tensor) -> "Int8Weight":
        """The weight that has these."""
        block = [1] * (qdata.dim() - 1) + [qdata.shape[-1]]
        return cls(qdata, scale, block, scale.dtype)

    def __getitem__(self, which: int | slice) -> "Int8Weight":
        """An expert, or some rows."""
        return self.from_parts(self.qdata[which], self.scale[which])

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """As floats [..., K] (default: of the scales' type); torchao's own takes longer."""
        scale = self.scale if output_dtype is None else self.scale.to(output_dtype)
        return self.qdata.to(scale.dtype).mul_(scale)


class PackedInt4Weight(TorchAOBaseTensor):
    """Weights [..., K] of which each is a whole number from -8 to 7 times its group's scale.

    qdata: [..., K / 2] uint8: weight 2 i, plus 8, in the low half of byte i, weight 2 i + 1, plus 8, in the high half
    scale: [..., S] of the weights' float type
    """

    tensor_data_names = ["qdata", "scale"]  # noqa: RUF012 (by these torchao copies a tensor and moves it)
    tensor_attribute_names: list[str] = []  # noqa: RUF012

    def __new__(cls, qdata: Tensor, scale: Tensor) -> "PackedInt4Weight":
        shape = (*qdata.shape[:-1], 2 * qdata.shape[-1])
        return Tensor._make_wrapper_subclass(cls, shape, dtype=scale.dtype, device=qdata.device)

    def __init__(self, qdata: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.qdata, self.scale = qdata, scale

    @classmethod
    def from_floats(cls, weight: Tensor) -> "PackedInt4Weight":
        """The nearest to weight [..., K], in groups of 32 inputs, or 16 or 8 where 32 do not divide K."""
        values, scale = nearest(weight, math.gcd(weight.shape[-1], 32), bits=4)
        low, high = (values + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        return cls(low | high << 4, scale)

    @classmethod
    def from_parts(cls, qdata: Tensor, scale: Tensor) -> "PackedInt4Weight":
        """The weight that has these."""
        return cls(qdata, scale)

    def __getitem__(self, which: int | slice) -> "PackedInt4Weight":
        """An expert, or some rows."""
        return self.from_parts(self.qdata[which], self.scale[which])

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """As floats [..., K] (default: of the scales' type)."""
        scale = self.scale if output_dtype is None else self.scale.to(output_dtype)
        values = torch.stack([self.qdata & 15, self.qdata >> 4], dim=-1).flatten(-2).to(scale.dtype).sub_(8)
        return values.unflatten(-1, (scale.shape[-1], -1)).mul_(scale[..., None]).flatten(-2)


@Int8Weight.implements_torch_function(F.linear)
@PackedInt4Weight.implements_torch_function(F.linear)
def _linear(func: Callable[..., Tensor], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The dequantised weight's product. (torchao's own for int8 scales afterwards: whole numbers up to 128 times the
    states are beyond float16's range where a state is in the hundreds, as some are in every large model.)"""
    x, weight, *bias = args
    return func(x, weight.dequantize(x.dtype), *bias, **kwargs)
