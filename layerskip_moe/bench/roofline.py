"""What the machine can do at best: bytes read and products added per second, measured beside what is judged by them.

Knows nothing of networks. Next: `decode.py`, which states speeds as shares of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from layerskip_moe.bench.interleave import seconds_of, summary

_READ_BYTES = 256 * 2**20  # beyond the last cache of most machines
_WIDTH = 2048  # of the square matrices: large enough that reading them costs nothing beside multiplying
_PATIENCE = 0.5  # seconds of a product: a processor that emulates bfloat16 would take minutes for that width
READ = "read bandwidth"


def roofline_runs(
    device: torch.device, dtype: torch.dtype | None = None, *, read_bytes: int = _READ_BYTES, width: int = _WIDTH
) -> dict[str, Callable[[], float]]:
    """Runs for `interleave`: "read bandwidth" in bytes per second and, with a dtype, "matrix peak" in FLOP per second
    (2 a product and its addition) of square matrices of that type."""
    buffer = torch.zeros(read_bytes // 4, device=device)
    runs: dict[str, Callable[[], float]] = {READ: lambda: _read_bandwidth(buffer)}
    if dtype is not None:
        matrix = _matrix(width, dtype, device)
        runs["matrix peak"] = lambda: 2 * len(matrix) ** 3 / seconds_of(partial(torch.mm, matrix, matrix), device)
    return runs


def _matrix(width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A square matrix of at most that width, the largest whose product with itself should be within _PATIENCE."""
    size = min(width, 128)
    while True:
        matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        seconds = min(seconds_of(partial(torch.mm, matrix, matrix), device) for _ in range(2))
        if size == width or 8 * seconds > _PATIENCE:  # twice the width, eight times the work
            return matrix
        size = min(2 * size, width)


def describe_roofline(results: dict[str, list[float]]) -> dict[str, Any]:
    """The roofline's part of what `interleave` gave: name -> summary, and the best sample as "peak"."""
    names = [name for name in (READ, "matrix peak") if name in results]
    return {name: summary(results[name]) | {"peak": max(results[name])} for name in names}


def _read_bandwidth(buffer: torch.Tensor) -> float:
    """Bytes per second of a sum, with the number of threads that serves it best: all, or half, where two share a
    core."""
    if buffer.device.type != "cpu":
        return buffer.nbytes / seconds_of(buffer.sum, buffer.device)
    threads = torch.get_num_threads()
    try:
        rates = []
        for count in {threads, max(threads // 2, 1)}:
            torch.set_num_threads(count)
            rates.append(buffer.nbytes / min(seconds_of(buffer.sum, buffer.device) for _ in range(2)))
    finally:
        torch.set_num_threads(threads)
    return max(rates)
