"""What PyTorch allocates for a few steps of training and for decoding: the measure of `analysis/plan`.

On a CPU the allocator tells PyTorch's profiler of every block that it gives and takes back, which is what
`torch.cuda.max_memory_allocated` counts on a GPU. Weights that were there before are added by their size. What
libraries take for themselves, and holes between blocks, are not in it; `memory.py` measures a process whole. That other
threads (gloo's) took a block back is seen only when its place is given away again: of several processes, which have
equally much to hold, the least is nearest.
Next: `analysis/plan/plan.py`.
"""

import contextlib
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from layerskip_moe.analysis.plan import Decoding
from layerskip_moe.bench.processes import in_processes
from layerskip_moe.generation import Autoregressive, SelfSpeculative, generate
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.nn.kernels import has_kernels
from layerskip_moe.nn.rotary import rotary_table
from layerskip_moe.pretrained.quantize import quantize
from layerskip_moe.training import TrainConfig, train
from layerskip_moe.training.parallel import join
from layerskip_moe.training.run import Run
from layerskip_moe.training.sharding import local_part

_STEPS = 3  # the optimizer's state is there from the first step's end on, the best weights from the first validation on


@dataclass
class _RandomText:
    train: Tensor
    validation: Tensor


def few_steps(recipe: TrainConfig) -> TrainConfig:
    """The recipe as it is measured: three steps, each validated where the best weights are kept, and no checkpoint."""
    validated = 1 if recipe.keep_best and recipe.validate_every != 0 else 0
    return replace(recipe, max_steps=_STEPS, validate_every=validated, validation_windows=1, checkpoint_every=0)


def training_peak(config: ModelConfig, recipe: TrainConfig, device: torch.device) -> int:
    """The most bytes allocated while a network with random weights is trained by `few_steps(recipe)`."""
    recipe = few_steps(recipe)
    text = _random_text(config, recipe)
    model = MoEDecoder(config).to(device)
    before = _weight_bytes(model)
    rotary_table.cache_clear()
    with tempfile.TemporaryDirectory() as folder, allocated(device) as peak:
        train(model, text, recipe, folder, progress=False)
    return before + peak()


def shared_training_peaks(cases: Sequence[tuple[ModelConfig, TrainConfig]], processes: int) -> list[int]:
    """The same of so many processes of the CPU that train each network together, for one of them, without the whole
    model that each begins and ends with."""
    return [min(peaks) for peaks in zip(*in_processes(processes, _shared_peaks, list(cases)), strict=True)]


def _shared_peaks(cases: list[tuple[ModelConfig, TrainConfig]]) -> list[int]:
    """In a process."""
    return [_shared_peak(config, few_steps(recipe)) for config, recipe in cases]


def _shared_peak(config: ModelConfig, recipe: TrainConfig) -> int:
    ranks, text = join("cpu"), _random_text(config, recipe)
    run = Run(MoEDecoder(config), recipe, _STEPS, text, ranks)
    before = sum(local_part(parameter).nbytes for parameter in run.model.parameters())
    rotary_table.cache_clear()
    with contextlib.closing(run.text_from(0)) as batches, allocated(ranks.device) as peak:  # type: ignore[type-var]
        for step in range(_STEPS):
            run.step(step, batches)
            if recipe.validate_every:
                with run.autocast():
                    run.validate(text.validation, step + 1)
    return before + peak()


def _random_text(config: ModelConfig, recipe: TrainConfig) -> _RandomText:
    """As much as `few_steps` need."""
    generator = torch.Generator().manual_seed(0)

    def drawn(windows: int) -> Tensor:
        return torch.randint(config.vocab_size, (windows * recipe.seq_len + 1,), generator=generator)

    samples = _STEPS * recipe.batch_size * recipe.accumulation
    return _RandomText(drawn(samples), drawn(2) if recipe.validate_every else drawn(0)[:0])


def decoding_peak(config: ModelConfig, decoding: Decoding, device: torch.device) -> int:
    """The most bytes allocated while random prompts are continued by a network with random weights; drafts are by the
    first half of the layers."""
    model = MoEDecoder(config).to(device, getattr(torch, decoding.dtype)).eval()
    if decoding.quantize is not None:
        model = quantize(model, decoding.quantize)
    generator = torch.Generator().manual_seed(0)
    shape = decoding.rows, decoding.prompt_tokens
    prompts = torch.randint(config.vocab_size, shape, generator=generator).tolist()
    drafts = decoding.draft_length
    strategy = SelfSpeculative(max(config.n_layers // 2, 1), drafts) if drafts else Autoregressive()
    has_kernels()  # made, not counted
    before = _weight_bytes(model)
    rotary_table.cache_clear()  # counted, though an earlier network may have had the same
    with allocated(device) as peak:
        temperature = 0.8 if decoding.sampled else 0.0
        generate(model, prompts, strategy, max_new_tokens=decoding.new_tokens, temperature=temperature)
    return before + peak()


def measured_peaks(
    *, config: dict[str, Any], train: dict[str, Any], decoding: dict[str, Any], device: str
) -> list[int]:
    """Both, of fields as JSON has them, for a process of its own (`alone.py`)."""
    network, where = ModelConfig(**config), torch.device(device)
    return [
        training_peak(network, TrainConfig(**train), where),
        decoding_peak(network, Decoding(**decoding), where),
    ]


@contextlib.contextmanager
def allocated(device: torch.device) -> Iterator[Callable[[], int]]:
    """The most bytes allocated within, above what was there before, to be asked when the block has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield lambda: _most_allocated(recorded)


def _most_allocated(recorded: profile) -> int:
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    changes = []
    events = list(recorded.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            block: Any = event.extra_fields
            changes.append((event.start_time_ns, block.ptr, block.alloc_size))
    sizes: dict[int, int] = {}  # of blocks that are there, by their addresses, which are in order in `places`
    places: list[int] = []
    now = most = 0
    for _, place, change in sorted(changes, key=lambda entry: entry[0]):
        now += change
        if change > 0:
            first, last = bisect_right(places, place), bisect_left(places, place + change)
            first -= first > 0 and places[first - 1] + sizes[places[first - 1]] > place
            now -= sum(sizes.pop(gone) for gone in places[first:last])  # whose end was not seen
            places[first:last], sizes[place] = [place], change
        elif place in sizes:
            places.remove(place)
            del sizes[place]
        most = max(most, now)
    return most


def _weight_bytes(model: MoEDecoder) -> int:
    """Of parameters and buffers; of quantised ones what they are packed into."""
    return sum(_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))


def _bytes(tensor: Tensor) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_bytes(getattr(tensor, name)) for name in names)
