"""Running blocks one after the other: for which samples, by which experts, compiled or not, and what is kept of it.

B batch, T positions, D width, E experts, K chosen, L layers.
Knows nothing of tokens or of recorded steps. Next: `block.py`; `decoder.py`, which calls this.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerskip_moe.nn import few_rows
from layerskip_moe.nn.attention import Places
from layerskip_moe.nn.block import Block
from layerskip_moe.nn.cache import KVCache
from layerskip_moe.nn.compiling import compiled, is_compiled
from layerskip_moe.nn.products import is_quantized
from layerskip_moe.nn.router import Routing

if TYPE_CHECKING:
    from layerskip_moe.nn.decoder import MoEDecoder


@dataclass
class RunOutput:
    """What a range of layers gave.

    hidden:    [B, T, D], after the last layer that ran
    collected: layer index -> its output [B, T, D], for the layers asked for
    routing:   layer index -> that MoE layer's Routing, for the tokens that reached it; empty where a recorded run was
               repeated (`compiled`, few rows)
    chosen:    layer index -> the experts that each of those N tokens was sent to, [N, K] int64; of a recorded run too
               where `run` was asked for `choices`
    """

    hidden: Tensor
    collected: dict[int, Tensor] = field(default_factory=dict)
    routing: dict[int, Routing] = field(default_factory=dict)
    chosen: dict[int, Tensor] = field(default_factory=dict)


def run_blocks(
    model: "MoEDecoder",
    hidden: Tensor,
    layers: list[int],
    places: Places,
    cache: KVCache | None,
    keep: Tensor | None = None,
    keep_experts: Tensor | None = None,
    expert_mask: Tensor | None = None,
    top_k: int | None = None,
    collect: Sequence[int] = (),
) -> RunOutput:
    """`MoEDecoder.run` of states whose places are known; it says what the arguments are."""
    output = RunOutput(hidden)
    for index, layer in enumerate(layers):
        rows = _rows(keep, index, hidden.device)  # the samples that stay; None: all of them
        # Also where none stays: its weights then have a gradient, which is 0, as they have when others stay elsewhere.
        output.hidden, routing = _run_block(
            model,
            layer,
            output.hidden,
            places,
            rows=rows,
            memory=None if cache is None else cache.memory(layer),
            router_memory=None if cache is None else cache.router_memory(layer),
            expert_rows=_rows(keep_experts, index, hidden.device, among=rows),
            expert_mask=expert_mask if expert_mask is None or expert_mask.dim() == 1 else expert_mask[index],
            top_k=top_k,
        )
        if routing is not None and len(routing.chosen):
            output.routing[layer], output.chosen[layer] = routing, routing.chosen
        if layer in collect:
            output.collected[layer] = output.hidden
    return output


def recordable(
    model: "MoEDecoder",
    layers: list[int],
    cache: KVCache,
    top_k: int | None,
    collect: Sequence[int],
    *,
    choices: bool = False,
    heads: bool = False,
) -> tuple[Callable[[Tensor, Places], list[Tensor]], tuple[Any, ...]]:
    """A step that `steps.py` can record: from token ids or states and their places to the logits (heads), the states
    after the layers and after each of `collect`, and what routers chose (choices). And what tells it from others on the
    same cache, but for what it starts from."""

    def step(start: Tensor, places: Places) -> list[Tensor]:
        if not start.is_floating_point():  # on a CPU by an operator that can be recorded
            few = places.few
            start = few_rows.embed(start[0], model.embedding.weight)[None] if few else model.embed(start)
        output = run_blocks(model, start, layers, places, cache, top_k=top_k, collect=collect)
        chosen = output.chosen.values() if choices else ()
        logits = [model.unembed(output.hidden)] if heads else []
        return [*logits, output.hidden, *(output.collected[layer] for layer in collect), *chosen]

    return step, (tuple(layers), top_k, tuple(collect), choices, heads)


def block_of(model: "MoEDecoder", layer: int) -> Block:
    """The model's block of that layer (0..L-1)."""
    block = model.blocks[layer]
    assert isinstance(block, Block)
    return block


def _run_block(
    model: "MoEDecoder", layer: int, hidden: Tensor, places: Places, *, rows: Tensor | None, **how: Any
) -> tuple[Tensor, Routing | None]:
    block = block_of(model, layer)
    # Quantised weights are unpacked in a way that cannot be traced; a CPU's decoding has kernels and recordings.
    compiles = is_compiled(model) and (
        how["memory"] is None or (hidden.is_cuda and not is_quantized(block.attention.qkv.weight))
    )
    forward = compiled(Block.forward) if compiles else Block.__call__
    if rows is None:
        return forward(block, hidden, places, **how)
    # There is no cache where samples are dropped, and the window's mask is the same for all rows.
    part = places._replace(cos=places.cos[rows], sin=places.sin[rows])
    ran, routing = forward(block, hidden[rows], part, **how)
    return hidden.index_copy(0, rows, ran), routing


def _rows(keep: Tensor | None, index: int, device: torch.device, among: Tensor | None = None) -> Tensor | None:
    """Samples that keep[index] lets stay, counted within `among`; None when all do (nothing is gathered then)."""
    if keep is None:
        return None
    mask = keep[index] if among is None else keep[index][among.cpu()]
    return None if bool(mask.all()) else mask.nonzero()[:, 0].to(device)
