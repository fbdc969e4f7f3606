"""How training calls a block: compiled, or keeping only its input for the backward pass (activation checkpointing).

Both replace the block's `forward`, so that whatever gathers its parameters before and after a call still does.
Knows nothing of what a block computes. Next: `nn/block.py`; `run.py`, which asks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.block import Block
from layerskip_moe.nn.compiling import compiled


@contextmanager
def calling_blocks(model: MoEDecoder, *, compile: bool, checkpointing: bool) -> Iterator[None]:
    """For a while, blocks compiled (`compiling.py`), or computed once more in the backward pass instead of kept (arXiv
    1604.06174): a third more arithmetic, and of a block's states only its input in memory."""
    if not compile and not checkpointing:
        yield
        return
    blocks = list(model.blocks)
    own = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            assert isinstance(block, Block)
            forward: Callable[..., Any] = partial(_compiled, block) if compile else block.forward
            block.forward = partial(checkpoint, forward, use_reentrant=False) if checkpointing else forward  # type: ignore[method-assign]
        yield
    finally:
        for block, forward_before in zip(blocks, own, strict=True):
            del block.forward
            if forward_before is not None:
                block.forward = forward_before


def _compiled(block: Block, hidden: Tensor, *arguments: Any, **others: Any) -> Any:
    """No samples at all, where layer dropout drops them, would be a graph of their own. Of a block that is gathered
    for the call, dynamic=True would take its own sizes for variables too."""
    dynamic = None if isinstance(block, FSDPModule) else True
    forward = compiled(Block.forward, dynamic=dynamic) if len(hidden) else Block.forward
    return forward(block, hidden, *arguments, **others)
