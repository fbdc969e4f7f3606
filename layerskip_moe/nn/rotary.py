"""Rotary positions (RoPE, arXiv 2104.09864), and the ways of stretching them to longer texts.

The arithmetic is that of transformers, operation for operation, so that a checkpoint's angles come out bit for bit.
Knows nothing of attention. Next: `attention.py`, which turns queries and keys by these angles.
"""

import functools
import math

import torch
from torch import Tensor

from layerskip_moe.nn.config import RopeScaling

_SHORTEST = 4096  # positions of a table, where there are so many; of heads of 128 it takes 4 MiB


def table_length(length: int, max_seq_len: int) -> int:
    """Positions of the table for texts of up to `length`: a power of two, so that few tables are made, or all there
    can be. A model may take far longer texts than anyone gives it, whose table would take gigabytes."""
    return min(max(1 << (length - 1).bit_length(), _SHORTEST), max_seq_len)


@functools.lru_cache(maxsize=8)
def rotary_table(
    head_dim: int, theta: float, scaling: RopeScaling | None, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head_dim] of every position, in float32; those of a longer table begin with the same.

    The two halves of a head form the rotated pairs, as Hugging Face stores its weights. Not a buffer of the
    model, which `model.to(torch.bfloat16)` would round.
    """
    with torch.inference_mode(False):  # the table made by a first `generate` must serve training too
        frequencies = _frequencies(head_dim, theta, scaling)
        positions = torch.arange(length, dtype=torch.float32, device=device)
        angles = positions[:, None] * frequencies.to(device)
        angles = torch.cat([angles, angles], dim=-1)
        size = _attention_factor(scaling)
        return angles.cos() * size, angles.sin() * size


def _frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """[head_dim / 2] float32, in radians per position. Made on the CPU: devices round powers differently."""
    powers = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    frequencies = 1.0 / powers
    match scaling:
        case None:
            return frequencies
        case RopeScaling(kind="linear"):
            return frequencies / scaling.factor
        case RopeScaling(kind="llama3"):
            return _llama3(frequencies, scaling)
        case _:
            return _yarn(powers, theta, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow pairs are slowed further by `factor`, fast ones left, those between blended (Llama 3.1)."""
    trained = scaling.trained_length
    wavelengths = 2 * math.pi / frequencies
    longest, shortest = trained / scaling.low_freq_factor, trained / scaling.high_freq_factor
    stretched = torch.where(wavelengths > longest, frequencies / scaling.factor, frequencies)
    share = (trained / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - share) * stretched / scaling.factor + share * stretched
    between = ~(wavelengths < shortest) & ~(wavelengths > longest)
    return torch.where(between, blended, stretched)


def _yarn(powers: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Pairs that turn often within the trained length stay, those that turn seldom are slowed by `factor`, with a
    ramp between the two (YaRN, arXiv 2309.00071)."""
    pairs = len(powers)

    def pair_turning(rotations: float) -> float:
        """The (fractional) pair that turns so many times within the trained length."""
        return 2 * pairs * math.log(scaling.trained_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    if first == last:
        last += 0.001  # a ramp of no width has no slope
    ramp = ((torch.arange(pairs, dtype=torch.float32, device="cpu") - first) / (last - first)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _attention_factor(scaling: RopeScaling | None) -> float:
    """What cosines and sines are multiplied by: YaRN's, which sharpens attention over long texts; else 1."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return yarn_attention_factor(scaling.factor) if scaling.attention_factor is None else scaling.attention_factor


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """0.1 scale ln(factor) + 1: what YaRN multiplies queries and keys by for texts `factor` times as long (arXiv
    2309.00071, section 3.4; scale: DeepSeek's mscale); 1 where texts are not longer."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
