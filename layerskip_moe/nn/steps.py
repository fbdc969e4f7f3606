"""Steps of few rows, recorded the first time and repeated in one call after that: by `replay.py` on a CPU, as CUDA
graphs on a GPU.

B batch, T positions, N = B * T states, D width.
On a CPU the states stand one after the other, and each reads its own row up to itself (`few_rows.py`). A CUDA graph
reads a fixed number of slots, those up to the next multiple of SLOTS, with a mask that it makes of the positions.

Knows nothing of what a step computes. Next: `decoder.py`, which calls this; `replay.py` and `graphs.py`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerskip_moe.nn import few_rows
from layerskip_moe.nn.attention import Places, angles, locate, locate_within
from layerskip_moe.nn.cache import KVCache
from layerskip_moe.nn.config import ModelConfig
from layerskip_moe.nn.graphs import Graph
from layerskip_moe.nn.replay import Recording

if TYPE_CHECKING:
    from layerskip_moe.nn.decoder import MoEDecoder

SLOTS = 256  # a graph for each so many positions of a text; what is read in vain is small beside the weights


def can_repeat(count: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a step of so many states can be recorded as things stand: few, without gradients or autocast, and on a
    CPU with the kernels, which are compiled at the first call."""
    if count > few_rows.MOST_ROWS or not few_rows.are_computed(dtype, device.type):
        return False
    return device.type == "cuda" or (few_rows.serves(device) and few_rows.has_kernels())


def lay(
    hidden: Tensor, positions: Tensor, config: ModelConfig, cache: KVCache, *, length: int
) -> tuple[Tensor, Places]:
    """States [B, T, D] at positions [B, T], each below `length`, as they are run, and their places: few of them on a
    CPU as [1, N, D], others as they are."""
    if not few_rows.are_few(hidden):
        return hidden, locate(positions, config, cache, length=length)
    places = Places(
        *angles(config, positions.device), cache.rows_of(positions), positions.flatten().contiguous(), few=True
    )
    return hidden.reshape(1, -1, hidden.shape[-1]), places


def slots_read(length: int, capacity: int) -> int:
    """How many slots of a cache a graph reads for positions below `length`."""
    return min(-(-length // SLOTS) * SLOTS, capacity)


def repeat(
    model: "MoEDecoder",
    step: Callable[[Tensor, Places], list[Tensor]],
    start: Tensor,
    positions: Tensor,
    cache: KVCache,
    *,
    length: int,
    key: tuple[Any, ...],
) -> list[Tensor]:
    """A step, from a recording where the same one was made on this cache before.

    step: from states or token ids and their places to outputs, by the model and on this cache, without a choice that
        depends on what the positions are
    start: [B, T] or [B, T, D], which the step is given as [1, N] or [1, N, D] on a CPU; positions: [B, T] int64, each
        below `length`; key: what else the step depends on
    -> the outputs, [B, T, .] each
    """
    shape, slots, tables = positions.shape, 0, angles(model.config, start.device)
    in_a_row, rows = few_rows.serves(start.device), cache.rows_of(positions)
    if in_a_row:
        start, positions = start.reshape(1, -1, *start.shape[2:]), positions.flatten()
    else:
        slots = slots_read(length, cache.capacity)

    def run(inputs: list[Tensor]) -> list[Tensor]:
        start, rows, positions = inputs
        if in_a_row:
            return step(start, Places(*tables, rows, positions, few=True))
        return step(start, locate_within(positions, rows, model.config, slots))

    inputs = [start.contiguous(), rows, positions.contiguous()]
    # Where the embedding lies tells weights that `model.to` moved: nothing else can lie there while it is held.
    weight = model.embedding.weight.data
    key = id(model), model.dtype, weight.data_ptr(), start.dtype, *start.shape[:2], slots, *key
    recording = cache.recordings.get(key)
    if recording is None:
        held = model, weight, tables
        recording = Recording(run, inputs) if in_a_row else Graph(run, inputs, pool=_pool(cache), held=held)
        cache.recordings[key] = recording
        outputs = recording.take_first()
    else:
        outputs = recording(inputs) if recording.complete else run(inputs)
    return [output.view(*shape, -1) for output in outputs]


def _pool(cache: KVCache) -> Any:
    """The memory that the cache's graphs share: one is launched at a time. None before the first."""
    graphs = (graph for graph in cache.recordings.values() if isinstance(graph, Graph) and graph.complete)
    return next((graph.pool for graph in graphs), None)
