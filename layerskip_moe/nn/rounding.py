"""The nearest whole numbers of a few bits to a weight, by a scale for each of its rows, or for each part of a row.

Values and scales are chosen as torchao does for float32 weights, whatever the weights' type: in the others it rounds on
the way, and no scale goes below their eps.

K inputs, S scales per row. Knows nothing of models. Next: `int8_copies.py`; `pretrained/quantized_weights.py`.
"""

import torch
from torch import Tensor


def nearest(weight: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers [..., K] of so many bits, as int8, and scales [..., S] of the weights' type, S = K / group."""
    groups, end = weight.float().unflatten(-1, (-1, group)), 2 ** (bits - 1)
    largest = groups.abs().amax(-1, keepdim=True)
    scale = (largest / (end - 0.5)).clamp(min=torch.finfo(torch.float32).eps).to(weight.dtype)
    # By the scale as it is stored, lest every weight be off by what was rounded. (Times 1 / scale, as torchao.)
    values = (groups * (1 / scale.float())).round_().clamp_(-end, end - 1)
    return values.to(torch.int8).flatten(-2), scale.squeeze(-1)
