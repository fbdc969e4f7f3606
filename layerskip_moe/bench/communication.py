"""What the processes of a training step send each other, counted, beside what FSDP and expert parallelism need.

R processes, e of which (`expert_parallel`) hold a layer's experts between them; A passes per step (accumulation).
Counted is every collective that PyTorch dispatches, on all processes: calls, and bytes of the whole tensor that a call
puts together or takes apart. By ring or by halving, each process sends about (R - 1) / R of that, twice for an
all-reduce. On paper, dimensions that R does not divide being padded, and n being 4 bytes in float32, 2 in 16 bits:

    all-gather      every block's matrices twice per pass, for forward and backward, n bytes a number; embedding, head,
                    routers and norms once, 4 bytes
    reduce-scatter  the gradients of each of these once per pass, 4 bytes: added up whole, and sent once per step, they
                    would be all of them on every process
    all-to-all      of every MoE layer and pass: the counts, and K states of every token four times, n bytes
    all-reduce      per pass what each router's experts and the losses counted, per step the losses, the gradient's norm
                    and whether a process was asked to stop

Next: `training/sharding.py` and `training/expert_parallel.py`, which send; `processes.py`.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layerskip_moe.bench.processes import in_processes
from layerskip_moe.bench.tables import aligned
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.nn.block import MoEMLP
from layerskip_moe.training import TrainConfig, train
from layerskip_moe.training.sharding import check_sharing, wide_parts

KINDS = ("all-gather", "reduce-scatter", "all-to-all", "all-reduce")
# The names of PyTorch's operators, of torch.distributed and of its functional twin.
_OPERATORS = {
    "allgather": KINDS[0],
    "all_gather": KINDS[0],
    "reduce_scatter": KINDS[1],
    "alltoall": KINDS[2],
    "all_to_all": KINDS[2],
    "allreduce": KINDS[3],
    "all_reduce": KINDS[3],
}


@dataclass(frozen=True)
class CommunicationSettings:
    """The processes, and a step of theirs.

    Attributes:
        processes: R, 2 or more, started on this machine's CPU
        expert_parallel: e of them hold a layer's experts between them
        batch_size: B, samples per pass of all processes together
        seq_len: T, tokens of each
        accumulation: passes per step
        precision: float32, bfloat16 or float16, of matrix products
    """

    processes: int = 2
    expert_parallel: int = 1
    batch_size: int = 4
    seq_len: int = 32
    accumulation: int = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"


class Count(TorchDispatchMode):
    """Counts calls, and bytes, of collectives by kind while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1].strip("_")
            kind = next((kind for word, kind in _OPERATORS.items() if name.startswith(word)), None)
            if kind is not None:
                self.calls[kind] += 1
                self.bytes[kind] += _bytes(kind, func.namespace, args, result)
        return result


def communication(config: ModelConfig, settings: CommunicationSettings) -> dict[str, Any]:
    """Count a training step's communication in new processes: {"measured", "paper"}, each {kind: {"calls", "bytes"}},
    of all processes together. Raises ValueError for fewer than two processes, and as training does for numbers that do
    not divide."""
    if settings.processes < 2:
        raise ValueError(f"processes={settings.processes} must be 2 or more: one has nobody to send to.")
    check_sharing(config, _recipe(settings, 1), settings.processes)
    counted = in_processes(settings.processes, _count_a_step, config, settings)
    measured = {
        kind: {"calls": sum(calls[kind] for calls, _ in counted), "bytes": sum(sent[kind] for _, sent in counted)}
        for kind in KINDS
    }
    return {"measured": measured, "paper": on_paper(config, settings)}


def communication_text(result: dict[str, Any]) -> str:
    """The table of what `communication` returned."""
    rows = [["a step", "calls", "on paper", "kB", "on paper"]]
    for kind in KINDS:
        measured, paper = result["measured"][kind], result["paper"][kind]
        sizes = (f"{told['bytes'] / 1e3:,.1f}" for told in (measured, paper))
        rows.append([kind, str(measured["calls"]), str(paper["calls"]), *sizes])
    return aligned(rows)


def on_paper(config: ModelConfig, settings: CommunicationSettings) -> dict[str, dict[str, int]]:
    """{kind: {"calls", "bytes"}} of a step, of all processes together, without layer dropout."""
    ranks, passes, narrow = settings.processes, settings.accumulation, 4 if settings.precision == "float32" else 2
    columns = ranks // settings.expert_parallel
    with torch.device("meta"):
        model = MoEDecoder(config)
    gathered, scattered = Counter[str](), Counter[str]()
    for weights, parts, in_blocks in _divided(model, ranks, columns, settings.expert_parallel):
        numbers = sum(-(-weight.shape[0] // parts) * parts * weight[0].numel() for weight in weights)
        calls = passes * (2 if in_blocks else 1)
        gathered.update(calls=calls, bytes=calls * numbers * (narrow if in_blocks else 4))
        scattered.update(calls=passes, bytes=passes * numbers * 4)
    layers = sum(config.is_moe(layer) for layer in range(config.n_layers))
    states = narrow * settings.batch_size * settings.seq_len * config.top_k * config.d_model
    exchanges = layers * passes if settings.expert_parallel > 1 else 0
    return {
        KINDS[0]: {name: ranks * count for name, count in gathered.items()},
        KINDS[1]: {name: ranks * count for name, count in scattered.items()},
        KINDS[2]: {"calls": 5 * ranks * exchanges, "bytes": exchanges * (4 * states + ranks * 8 * config.num_experts)},
        KINDS[3]: {
            "calls": ranks * (passes + 3),
            "bytes": ranks * (passes * 8 * layers * (config.num_experts + 1) + 4 * (3 + config.n_layers) + 8 + 8),
        },
    }


def _divided(
    model: MoEDecoder, ranks: int, columns: int, expert_parallel: int
) -> Iterator[tuple[list[nn.Parameter], int, bool]]:
    """Parameters that are gathered at once, by how many ranks they are divided, and whether they are a block's."""
    rest = {*model.embedding.parameters(), *(model.head.parameters() if model.head is not None else ())}
    rest |= {weight for part in wide_parts(model) for weight in part.parameters()}
    for block in model.blocks:
        weights = [weight for weight in block.parameters() if weight not in rest]
        if expert_parallel > 1 and isinstance(block.mlp, MoEMLP):
            experts = list(block.mlp.experts.parameters())
            weights = [weight for weight in weights if not any(weight is other for other in experts)]
            if columns > 1:  # a rank has 1 / e of them, and gathers no more
                yield [nn.Parameter(weight[: len(weight) // expert_parallel]) for weight in experts], 1, True
        yield weights, ranks, True
    yield list(rest), ranks, False


def _recipe(settings: CommunicationSettings, steps: int) -> TrainConfig:
    return TrainConfig(
        max_steps=steps,
        seq_len=settings.seq_len,
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        expert_parallel=settings.expert_parallel,
        exit_curriculum="all",
        layer_dropout_max=0.0,
        precision=settings.precision,
        checkpoint_every=0,
    )


def _count(config: ModelConfig, recipe: TrainConfig) -> tuple[Counter[str], Counter[str]]:
    """In a process: the collectives of a run, calls and bytes."""
    tokens = torch.arange(recipe.batch_size * recipe.seq_len + 1) % config.vocab_size
    text = SimpleNamespace(train=tokens, validation=tokens[:0])
    with TemporaryDirectory() as folder, Count() as count:
        train(MoEDecoder(config), text, recipe, folder, progress=False)
    return count.calls, count.bytes


def _count_a_step(config: ModelConfig, settings: CommunicationSettings) -> tuple[Counter[str], Counter[str]]:
    """In a process: the collectives of the second of two steps, being what a run of two has more than a run of one."""
    (calls, sent), (more_calls, more_sent) = (_count(config, _recipe(settings, steps)) for steps in (1, 2))
    return more_calls - calls, more_sent - sent


def _bytes(kind: str, namespace: str, args: Any, result: Any) -> int:
    """Of the whole tensor: what comes out of an all-gather, and what goes into the others."""
    functional = namespace == "_c10d_functional"
    if kind == KINDS[0]:
        tensor = result if functional else args[0]
    else:
        tensor = args[0] if functional or kind == KINDS[3] else args[1]
    return sum(part.numel() * part.element_size() for part in tree_leaves(tensor))
