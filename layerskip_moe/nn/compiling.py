"""Compiled blocks: `torch.compile` of one block's forward pass, shared by all blocks of a kind.

The network is run block by block, in any range, so a block is what is compiled: a few graphs serve training and, on a
GPU, decoding at every exit layer. Sizes that vary (samples, positions, cache slots) are dynamic. Decoding on a CPU
compiles nothing here: it has kernels and recordings instead, which the same switch turns on, as it does the CUDA graphs
that steps of compiled blocks are captured in.

Knows nothing of what a block computes. Next: `block.py`; `decoder.py`, which calls either form; `steps.py`.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from layerskip_moe.nn.decoder import MoEDecoder


def can_compile(device: torch.device) -> bool:
    """Whether decoding can be compiled there: on a CPU, whose runs are recorded, and on a GPU that Triton is for."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)
    return device.type == "cpu"


def is_watched(model: nn.Module) -> bool:
    """Whether somebody looks into the model's modules as they are called, by hooks or by another `forward`: then none
    of their calls may be left out."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )


@contextmanager
def compiling(model: "MoEDecoder", enabled: bool = True) -> Iterator[None]:
    """Let the model repeat recorded steps of few rows (`steps.py`), and take compiled blocks on a GPU and in training,
    for a while, or not; its own setting is back afterwards."""
    own = model.compiled
    try:
        model.compiled = enabled
        yield
    finally:
        model.compiled = own


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled, once per process; graphs are made as it meets new kinds of arguments."""
    return torch.compile(function, dynamic=True, fullgraph=True)
