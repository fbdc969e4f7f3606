"""Compiled blocks: `torch.compile` of one block's forward pass, shared by all blocks of a kind.

The network is run block by block, in any range, so a block is what is compiled: a few graphs serve training and, on a
GPU, decoding at every exit layer. Sizes that vary (samples, positions, cache slots) are dynamic. Decoding on a CPU
compiles nothing here: it has kernels and recordings instead, which the same switch turns on, as it does the CUDA graphs
that steps of compiled blocks are captured in.

Knows nothing of what a block computes. Next: `block.py`; `decoder.py`, which calls either form; `steps.py`.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from layerskip_moe.nn.decoder import MoEDecoder


_models: ContextVar[frozenset[int]] = ContextVar("compiled_models", default=frozenset())


def can_compile(device: torch.device) -> bool:
    """Whether decoding can be compiled there: on a CPU, whose runs are recorded, and on a GPU that Triton is for."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)
    return device.type == "cpu"


def is_watched(model: nn.Module) -> bool:
    """Whether somebody looks into the model's modules as they are called, by hooks, another `forward` or classes of
    their own: then none of their calls may be left out."""
    return has_global_hooks() or any(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or not type(module).__module__.startswith(("layerskip_moe.", "torch."))
        for module in model.modules()
    )


def has_global_hooks() -> bool:
    """Whether hooks are registered for the calls of all modules there are."""
    return bool(torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks)


@contextmanager
def compiling(model: "MoEDecoder", enabled: bool = True) -> Iterator[None]:
    """Let the model repeat recorded steps of few rows (`steps.py`), and take compiled blocks on a GPU and in training,
    for a while, or not; its own setting is back afterwards."""
    others = _models.get() - {id(model)}
    token = _models.set(others | {id(model)} if enabled else others)
    try:
        yield
    finally:
        _models.reset(token)


def is_compiled(model: "MoEDecoder") -> bool:
    """Whether `compiling` is on for this model, in this thread."""
    return id(model) in _models.get()


@functools.cache
def compiled(function: Callable[..., Any], *, dynamic: bool | None = True) -> Callable[..., Any]:
    """The function compiled, once per process; graphs are made as it meets new kinds of arguments.

    dynamic: for any size from the start; None: for the first one, and for any when there is a second
    """
    print(
        "compiling, which takes some seconds for each new kind of step, once per process", file=sys.stderr, flush=True
    )
    return torch.compile(function, dynamic=dynamic, fullgraph=True)
