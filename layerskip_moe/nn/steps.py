"""Steps of few rows, recorded the first time and repeated in one call after that: by `replay.py` on a CPU, as CUDA
graphs on a GPU.

A active rows, B batch, T positions, N = B * T states, D width, V vocabulary.
On a CPU the states stand one after the other, and each reads its own row up to itself (`few_rows.py`); a recording
serves any number of them up to the room it has. A CUDA graph is of one number of states, and reads a fixed number of
slots, those up to the next multiple of SLOTS, with a mask that it makes of the positions.

Knows nothing of what a step computes. Next: `decoder.py`, which calls this; `drafts.py`, where several steps are one
call; `replay.py` and `graphs.py`.
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
_ROOMS = (8, 16, 32, few_rows.MOST_ROWS)  # of recordings
_MOST_RECORDINGS = 256  # of a cache; each holds the states that its step computes

Step = Callable[[list[Tensor]], list[Tensor]]  # from inputs to outputs


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
    tables = angles(config, positions.device, cache.capacity)
    places = Places(*tables, cache.rows_of(positions), positions.flatten().contiguous(), few=True)
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
    shape, rows = positions.shape, cache.rows_of(positions)
    if few_rows.serves(start.device):
        inputs = [start.reshape(-1, *start.shape[2:]), rows, positions.reshape(-1)]
        outputs = recorded(model, by_rows(step, model.config, cache), inputs, cache, key)
    else:
        slots = slots_read(length, cache.capacity)

        def run(inputs: list[Tensor]) -> list[Tensor]:
            start, rows, positions = inputs
            return step(start, locate_within(positions, rows, model.config, slots, cache.capacity))

        outputs = recorded(model, run, [start, rows, positions], cache, (*shape, slots, *key))
    return [output.reshape(*shape, -1) for output in outputs]


def by_rows(step: Callable[[Tensor, Places], list[Tensor]], config: ModelConfig, cache: KVCache) -> Step:
    """A step on a cache of states [1, N, D] or token ids [1, N] as one of inputs by row: those, rows and positions."""

    def run(inputs: list[Tensor]) -> list[Tensor]:
        start, rows, positions = inputs
        tables = angles(config, positions.device, cache.capacity)
        outputs = step(start[None], Places(*tables, rows, positions, few=True))
        return [output.reshape(len(start), -1) for output in outputs]

    return run


def recorded(
    model: "MoEDecoder", run: Step, inputs: list[Tensor], cache: KVCache, key: tuple[Any, ...]
) -> list[Tensor]:
    """The outputs of a run, from a recording where it was made on this cache before."""
    recording, is_new = recording_of(model, run, inputs, cache, key)
    if is_new:
        return recording.take_first()
    inputs = [tensor.contiguous() for tensor in inputs]
    return recording(inputs) if recording.complete else run(inputs)


def recording_of(
    model: "MoEDecoder", run: Step, inputs: list[Tensor], cache: KVCache, key: tuple[Any, ...]
) -> tuple[Recording | Graph, bool]:
    """What is recorded of a run on this cache, and whether it was made now."""
    on_cpu = few_rows.serves(inputs[0].device)
    room = room_for(len(inputs[0])) if on_cpu else 0
    key = *weights_of(model), inputs[0].dtype, room, *key
    if key in cache.recordings:
        found = cache.recordings[key]
        assert isinstance(found, Recording | Graph), "rounds have keys of their own"
        return found, False
    # Made here if they are new, and not while a step is recorded.
    tables = angles(model.config, inputs[0].device, cache.capacity)
    inputs = [tensor.contiguous() for tensor in inputs]
    recording: Recording | Graph
    if on_cpu:
        recording = Recording(run, inputs, room=room)
    else:
        # The memory itself: a parameter that `model.to` moves would let go of it, and what comes next lie there.
        held = [tensor.data for tensor in (*model.parameters(), *model.buffers())], tables
        recording = Graph(run, inputs, pool=_pool(cache), held=held)
    keep_recording(cache, key, recording)
    return recording, True


def keep_recording(cache: KVCache, key: tuple[Any, ...], recording: Any) -> None:
    """Keep what was recorded on a cache, and forget the oldest where there is too much."""
    if len(cache.recordings) >= _MOST_RECORDINGS:
        del cache.recordings[next(iter(cache.recordings))]
    cache.recordings[key] = recording


def room_for(rows: int) -> int:
    """Rows that a recording has room for, of so many."""
    return next(room for room in _ROOMS if room >= rows)


def weights_of(model: "MoEDecoder") -> tuple[int, torch.dtype, int]:
    """What tells the weights from others. Where the embedding lies tells those that `model.to` moved: nothing else can
    lie there while it is held."""
    weight = model.embedding.weight
    return id(model), weight.dtype, weight.data_ptr()


def _pool(cache: KVCache) -> Any:
    """The memory that the cache's graphs share: one is launched at a time. None before the first."""
    graphs = (graph for graph in cache.recordings.values() if isinstance(graph, Graph) and graph.complete)
    return next((graph.pool for graph in graphs), None)
