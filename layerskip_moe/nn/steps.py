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
_MOST_RECORDINGS = 256  # of a cache; each holds the states that its step computes


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
    shape, slots = positions.shape, _fixed_slots(length, cache)
    if few_rows.serves(start.device):
        start, positions = start.reshape(1, -1, *start.shape[2:]), positions.reshape(1, -1)

    def run(inputs: list[Tensor]) -> list[Tensor]:
        start, rows, positions = inputs
        return step(start, _places(positions, rows, model.config, slots))

    rows = cache.rows_of(positions.view(shape))
    outputs = _recorded(model, run, [start, rows, positions], cache, (*start.shape[:2], slots, *key))
    return [output.view(*shape, -1) for output in outputs]


def repeat_draft(
    model: "MoEDecoder",
    first: Callable[[Tensor, Places], Tensor],
    rest: Callable[[Tensor, Places], Tensor],
    newest: Tensor,
    positions: Tensor,
    cache: KVCache,
    *,
    length: int,
    noise: Tensor | None,
    key: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """Tokens drafted one after another, as one step.

    first: from token ids and their places to states; rest: from those to the states that the head reads
    newest: [A, 1] int64; positions: [A, n + 1], its own and those of n drafts; noise: [A, n, V] float64, or None
    -> drafts [A, n], and the states [A, n + 1, D] that `first` gave
    """
    count, slots = positions.shape[1] - 1, _fixed_slots(length, cache)
    shape = (1, -1) if few_rows.serves(newest.device) else (-1, 1)

    def run(inputs: list[Tensor]) -> list[Tensor]:
        token, rows, *at = inputs
        drafts, states = [], []
        for place in range(count + 1):
            places = _places(at[place], rows, model.config, slots)
            states.append(first(token, places))
            if place < count:
                logits = model.unembed(rest(states[-1], places))
                drawn = at[count + 1 + place] if noise is not None else None
                token = few_rows.choose(logits.view(-1, logits.shape[-1]), drawn).view(shape)
                drafts.append(token)
        return [*drafts, *states]

    at = [positions[:, place].reshape(shape) for place in range(count + 1)]
    drawn = [] if noise is None else list(noise.unbind(1))
    key = len(newest), count, slots, noise is None, *key
    outputs = _recorded(model, run, [newest.reshape(shape), cache.rows, *at, *drawn], cache, key)
    drafts = torch.cat([newest[:, :0], *(draft.view(-1, 1) for draft in outputs[:count])], dim=1)
    return drafts, torch.stack([states.view(len(newest), -1) for states in outputs[count:]], dim=1)


def _places(positions: Tensor, rows: Tensor, config: ModelConfig, slots: int) -> Places:
    """Where the states of a recorded step stand, which are at positions [1, N] on a CPU and [B, T] on a GPU."""
    if few_rows.serves(positions.device):
        return Places(*angles(config, positions.device), rows, positions.view(-1), few=True)
    return locate_within(positions, rows, config, slots)


def _fixed_slots(length: int, cache: KVCache) -> int:
    """`slots_read`; 0 on a CPU, where each position reads its own."""
    return 0 if few_rows.serves(cache.keys.device) else slots_read(length, cache.capacity)


def _recorded(
    model: "MoEDecoder",
    run: Callable[[list[Tensor]], list[Tensor]],
    inputs: list[Tensor],
    cache: KVCache,
    key: tuple[Any, ...],
) -> list[Tensor]:
    """The outputs of a run, from a recording where it was made on this cache before."""
    inputs = [tensor.contiguous() for tensor in inputs]
    tables = angles(model.config, inputs[0].device)  # made here if they are new, and not while a step is recorded
    # Where the embedding lies tells weights that `model.to` moved: nothing else can lie there while it is held.
    weight = model.embedding.weight.data
    key = id(model), model.dtype, weight.data_ptr(), inputs[0].dtype, *key
    recording = cache.recordings.get(key)
    if recording is not None:
        return recording(inputs) if recording.complete else run(inputs)
    if few_rows.serves(weight.device):
        recording = Recording(run, inputs)
    else:
        # The memory itself: a parameter that `model.to` moves would let go of it, and what comes next lie there.
        held = [tensor.data for tensor in (*model.parameters(), *model.buffers())], tables
        recording = Graph(run, inputs, pool=_pool(cache), held=held)
    if len(cache.recordings) >= _MOST_RECORDINGS:
        del cache.recordings[next(iter(cache.recordings))]  # the oldest
    cache.recordings[key] = recording
    return recording.take_first()


def _pool(cache: KVCache) -> Any:
    """The memory that the cache's graphs share: one is launched at a time. None before the first."""
    graphs = (graph for graph in cache.recordings.values() if isinstance(graph, Graph) and graph.complete)
    return next((graph.pool for graph in graphs), None)
