"""What a network takes of memory and work, to be trained and to be decoded, before anything is built.

    layerskip-moe plan --config config.json --gpus 8 --batch-size 64 --seq-len 2048
    layerskip-moe plan --checkpoint allenai/OLMoE-1B-7B-0924 --memory-gib 80 --optimizer adamw8bit
    layerskip-moe plan --checkpoint runs/main/model --gpus 0 --check

Bytes are those that PyTorch allocates, on each GPU, at the moment of a step when most is there. --gpus 0 plans for this
machine's processor. --check trains a few steps, and decodes, with random weights, and says what was allocated.
"""

# Next: `analysis/plan/plan.py`, which counts; `bench/plan.py`, which measures.

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from tyro.conf import arg

from layerskip_moe.analysis.plan import Decoding, MemoryPlan, memory_plan
from layerskip_moe.analysis.plan.plan import USABLE, Remedy
from layerskip_moe.bench.alone import in_fresh_process
from layerskip_moe.bench.machine import describe_machine
from layerskip_moe.bench.plan import few_steps, measured_peaks
from layerskip_moe.bench.tables import aligned
from layerskip_moe.cli.flags import fields_of, parse
from layerskip_moe.cli.options import json_line
from layerskip_moe.constants import pick_device
from layerskip_moe.files import expanded
from layerskip_moe.nn import ModelConfig
from layerskip_moe.pretrained.config_file import CONFIG, read_config_file, read_network
from layerskip_moe.pretrained.hub import local_folder
from layerskip_moe.pretrained.record import RECORD
from layerskip_moe.training import TrainConfig

# Of TrainConfig, what neither memory nor work depends on.
_IRRELEVANT = (
    *("epochs", "learning_rate", "min_learning_rate_ratio", "warmup_steps", "weight_decay", "beta1", "beta2"),
    *("max_gradient_norm", "moe_loss_weight", "router_z_loss_weight", "router_coherence_weight", "bias_update_rate"),
    *("expert_dropout", "compile", "seed", "validation_windows", "checkpoint_every", "log_every", "exit_loss_scale"),
)
_GIB = 2**30


@dataclass(frozen=True)
class Options:
    """Of what, and for what.

    Attributes:
        config: a config.json: ours, or of a family that is loaded here
        checkpoint: instead, a folder, or owner/name on the Hugging Face hub, of which config.json alone is read
        gpus: that share the training; one of them decodes. 0: this machine's processor
        memory_gib: of each GPU; None: that of the GPU that is here
        check: train a few steps and decode here, and say what was allocated
        json: print the plan as one line of JSON
    """

    config: str | None = None
    checkpoint: str | None = None
    gpus: int = 1
    memory_gib: float | None = None
    check: bool = False
    json: bool = False


def run(arguments: list[str]) -> None:
    """`layerskip-moe plan`."""
    groups = {
        "plan": Options,
        "training": fields_of(TrainConfig, without=_IRRELEVANT, seq_len=_length(TrainConfig.seq_len)),
        "decoding": fields_of(
            Decoding, prompt_tokens=_length(Decoding.prompt_tokens), new_tokens=_length(Decoding.new_tokens)
        ),
    }
    options, recipe, decoded = parse("layerskip-moe plan", __doc__, groups, arguments)
    config = _read(options)
    longest = config.max_seq_len
    _fill(recipe, seq_len=min(TrainConfig.seq_len, longest))
    _fill(decoded, prompt_tokens=min(Decoding.prompt_tokens, max(longest // 2, 1)))
    _fill(decoded, new_tokens=min(Decoding.new_tokens, max(longest - decoded.prompt_tokens, 1)))
    train, decoding = TrainConfig(**vars(recipe)), Decoding(**vars(decoded))
    plan = memory_plan(config, train, decoding, gpus=options.gpus, available=_available(options))
    measured = _measure(config, train, decoding, options) if options.check else None
    if options.json:
        print(json_line(asdict(plan) | {"measured": measured}))
        return
    print(plan_text(plan, train, decoding, options.gpus))
    if measured is not None:
        print(f"\n{_check_text(measured)}")


def _length(usual: int) -> tuple[Any, None]:
    """Type and default of a flag for tokens of each text."""
    return Annotated[int | None, arg(help=f"of each; None: {usual}, or less where the network is short")], None


def _fill(fields: Any, **values: int) -> None:
    """Give fields that are None their value."""
    for name, value in values.items():
        if getattr(fields, name) is None:
            setattr(fields, name, value)


def _read(options: Options) -> ModelConfig:
    if (options.config is None) == (options.checkpoint is None):
        raise ValueError("layerskip-moe plan needs one of --config (a file) and --checkpoint (a folder, or id).")
    if options.config is not None:
        return read_config_file(expanded(options.config))[1]
    return read_network(local_folder(options.checkpoint or "", patterns=(CONFIG, RECORD)))[1]


def _available(options: Options) -> int | None:
    """Bytes of memory of each GPU, or of this machine; None where that is not known."""
    if options.memory_gib is not None:
        if not 0 < options.memory_gib < float("inf"):
            raise ValueError(f"memory_gib={options.memory_gib} must be a number of GiB above 0.")
        return round(options.memory_gib * _GIB)
    if options.gpus:
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    told = describe_machine("cpu")["memory_gib"]
    return None if told is None else round(told * _GIB)


def plan_text(plan: MemoryPlan, train: TrainConfig, decoding: Decoding, gpus: int) -> str:
    """The plan as a table by kind, and the verdict."""
    counted, work = plan.parameters, plan.operations
    trained, decoded = plan.training, plan.decoding
    where = "on this machine's processor" if gpus == 0 else f"on each of {gpus} GPUs" if gpus > 1 else "on one GPU"
    rows = [["GiB", "training", "decoding"], ["weights", _gib(trained.weights), _gib(decoded.weights)]]
    rows += [[f"gradients by then, of {_gib(trained.all_gradients)}", _gib(trained.gradients), ""]]
    rows += [["optimizer's state", _gib(trained.optimizer), ""], ["weights kept as the best", _gib(trained.best), ""]]
    rows += [["activations", _gib(trained.activations), ""]]
    rows += [["cache", "", _gib(decoded.cache)], ["working memory", _gib(trained.working), _gib(decoded.working)]]
    rows += [["together", _gib(trained.peak), _gib(decoded.peak)]]
    precision = "bfloat16" if train.precision == "auto" and gpus else train.precision
    texts = "text" if decoding.rows == 1 else "texts"
    packed = "" if decoding.quantize is None else f" and {decoding.quantize}"
    return "\n".join(
        [
            f"{_count(counted.total)} parameters, {_count(counted.active)} of them used per token",
            f"{_count(work.training)} operations per token in training, {_count(work.decoding)} in decoding",
            f"training {train.batch_size} x {train.seq_len} tokens at a time, {precision}, {train.optimizer}, "
            f"{where}; most is there in the {trained.moment}",
            f"decoding {decoding.rows} {texts} of {decoding.prompt_tokens} + {decoding.new_tokens} tokens, "
            f"{decoding.dtype}{packed}",
            "",
            aligned(rows),
            "",
            _verdict("training", trained.peak, plan.available, plan.remedies),
            _verdict("decoding", decoded.peak, plan.available, plan.decoding_remedies),
        ]
    )


def _verdict(work: str, peak: int, available: int | None, remedies: Sequence[Remedy]) -> str:
    if available is None:
        return f"{work} takes {_gib(peak)} GiB; there is no GPU here to compare with: give --memory-gib."
    usable = f"{_gib(USABLE * available)} GiB, which is {USABLE:.0%} of {_gib(available)}"
    if peak <= USABLE * available:
        return f"{work} fits: {_gib(peak)} GiB of {usable}"
    lines = [f"{work} does not fit: it takes {_gib(peak)} GiB of {usable}"]
    for kind, chosen in (("it would with", True), ("not enough", False)):
        found = [f"{one.words} ({_gib(one.peak)})" for one in remedies if one.fits is chosen]
        lines += [f"  {kind}: {', '.join(found)}"] if found else []
    return "\n".join(lines)


def _measure(config: ModelConfig, train: TrainConfig, decoding: Decoding, options: Options) -> dict[str, Any]:
    """Bytes that were planned for, and bytes that were allocated, here."""
    if options.gpus > 1:
        raise ValueError("--check is of one process; give --gpus 1, or 0 for the CPU.")
    device = pick_device("cuda" if options.gpus else "cpu")
    fields = {"config": asdict(config), "train": asdict(train), "decoding": asdict(decoding), "device": device}
    allocated = in_fresh_process(measured_peaks, fields, {"KINETO_LOG_LEVEL": "99"})
    plan = memory_plan(config, few_steps(train), decoding, gpus=options.gpus)
    planned = [plan.training.peak, plan.decoding.peak]
    return {"planned": planned, "allocated": allocated, "machine": describe_machine(device)}


def _check_text(measured: dict[str, Any]) -> str:
    rows = [["MB", "planned", "allocated", "planned over allocated"]]
    for name, planned, allocated in zip(
        ("training", "decoding"), measured["planned"], measured["allocated"], strict=True
    ):
        rows.append([name, f"{planned / 1e6:.1f}", f"{allocated / 1e6:.1f}", f"{planned / allocated:.3f}"])
    machine = measured["machine"]
    return f"three steps, and one generation, on {machine['accelerator'] or machine['cpu']}\n{aligned(rows)}"


def _gib(size: float) -> str:
    """Bytes in GiB, to three digits or so."""
    gib = size / _GIB
    return f"{gib:.0f}" if gib >= 1000 else f"{gib:.1f}" if gib >= 10 else f"{gib:.2f}" if gib >= 1 else f"{gib:.3f}"


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
