"""Random numbers that are a pure function of their keys.

Layer dropout keys its draws by (seed, step, layer, sample) and sampling keys its noise by (seed, row,
position), so a run does not depend on how its samples were batched, on the number of ranks, or on who
proposed a token. That rules out a stateful generator; this is SplitMix64 (Steele, Lea, Flood 2014) as a
counter-based hash, in int64 arithmetic, the same on every device.

Knows nothing of models. Next: `generation/sampling.py` and `training/layer_dropout.py` use it.
"""

import torch
from torch import Tensor

from layerskip_moe.nn import few_rows
from layerskip_moe.nn.kernels import has_kernels

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's `>>` on int64 copies the sign bit down."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _wrap(x: int) -> int:
    """Fold any Python int into signed 64 bits, as int64 tensors do by themselves."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix_int(x: int) -> int:
    """`_mix` for a Python int: a key that is the same for all costs no tensor operation."""
    x %= 1 << 64
    x = ((x ^ (x >> 30)) * _MIX_1) % (1 << 64)
    x = ((x ^ (x >> 27)) * _MIX_2) % (1 << 64)
    return _wrap(x ^ (x >> 31))


def hash_uniform(*keys: int | Tensor) -> Tensor:
    """Uniform numbers in the open interval (0, 1), one per combination of the broadcast keys.

    keys: Python ints or integer tensors that broadcast together (a 0-d tensor on the CPU goes with any
    device). Returns float64 of the broadcast shape. The order of the keys matters; equal keys give equal
    numbers on every device.
    """
    bits = _hash(*keys)
    return _uniform(bits if isinstance(bits, Tensor) else torch.tensor(bits))


def hash_uniform_up_to(count: int, *keys: int | Tensor) -> Tensor:
    """`hash_uniform` of these keys, one of them a tensor at least, and of 0 to count - 1 -> [..., count]: on a CPU in
    one pass, where the kernels are."""
    hashes = _hash(*keys)
    assert isinstance(hashes, Tensor)
    if few_rows.serves(hashes.device) and has_kernels():
        return torch.ops.layerskip_moe_few_rows.uniforms.default(hashes.contiguous(), count)
    return _uniform(_mix((hashes[..., None] ^ torch.arange(count, device=hashes.device)) + _GOLDEN))


def _hash(*keys: int | Tensor) -> int | Tensor:
    """What the keys come to, as an int64."""
    state: int | Tensor = 0
    for key in keys:
        if isinstance(key, Tensor):
            state = _mix((key.to(torch.int64) ^ state) + _GOLDEN)
        elif isinstance(state, Tensor):
            state = _mix((state ^ _wrap(key)) + _GOLDEN)
        else:
            state = _mix_int((state ^ _wrap(key)) + _GOLDEN)
    return state


def _uniform(bits: Tensor) -> Tensor:
    # 52 random bits, centred in their cells, so that neither 0 nor 1 can come out (log needs that); with 53
    # the half would not fit into a float64, and the last cell would round to 1.
    return (_shift_right(bits, 12).to(torch.float64) + 0.5) * 2.0**-52
