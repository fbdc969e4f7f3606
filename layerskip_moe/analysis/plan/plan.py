"""memory_plan: what a network takes of memory and work, to be trained and to be decoded, and what would make it fit.

Knows nothing of files. Next: `training.py` and `decoding.py`, which count bytes; `cli/plan.py`, which prints them.
"""

from dataclasses import dataclass, replace
from typing import Any

from layerskip_moe.analysis.plan.activations import numbers_of
from layerskip_moe.analysis.plan.counts import Operations, Parameters, count_operations, count_parameters
from layerskip_moe.analysis.plan.decoding import Decoding, DecodingMemory, decoding_memory
from layerskip_moe.analysis.plan.training import TrainingMemory, training_memory
from layerskip_moe.nn import ModelConfig
from layerskip_moe.refusals import shown
from layerskip_moe.training import TrainConfig
from layerskip_moe.training.sharding import check_sharing

USABLE = 0.9  # of a processor's memory: the rest is for the driver, and for holes between tensors
_MOST_GPUS = 1024


@dataclass(frozen=True)
class Remedy:
    """A change of the plan.

    Attributes:
        words: what to change, in the shell's words
        peak: bytes on each processor then
        fits: whether that is little enough
    """

    words: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class MemoryPlan:
    """What is needed; see `memory_plan`.

    Attributes:
        parameters: how many, and where
        operations: of a token
        training: bytes on each processor
        decoding: bytes on one
        available: bytes that each has; None: not known
        remedies: what would make training fit; none where it fits, or where it is not known whether it does
        decoding_remedies: the same of decoding
    """

    parameters: Parameters
    operations: Operations
    training: TrainingMemory
    decoding: DecodingMemory
    available: int | None
    remedies: tuple[Remedy, ...]
    decoding_remedies: tuple[Remedy, ...]

    @property
    def training_fits(self) -> bool | None:
        """Whether training does, in USABLE of what there is; None: not known."""
        return None if self.available is None else _fits(self.training.peak, self.available)

    @property
    def decoding_fits(self) -> bool | None:
        """The same of decoding."""
        return None if self.available is None else _fits(self.decoding.peak, self.available)


def memory_plan(
    config: ModelConfig,
    train: TrainConfig | None = None,
    decoding: Decoding | None = None,
    *,
    gpus: int = 1,
    available: int | None = None,
) -> MemoryPlan:
    """Plan for `gpus` GPUs that share a training run (0: for this machine's CPU), and one of them that decodes.

    train, decoding: None: their defaults, as far as the network is long enough; available: bytes of each GPU
    Raises ValueError for less than no GPUs or bytes, for samples, texts and exits that the network does not have, and
    for batches and experts that so many GPUs cannot share.
    """
    if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 0:
        raise ValueError(f"gpus={shown(gpus)} must be a whole number: 0 for the CPU, or how many GPUs there are.")
    if available is not None and not _is_size(available):
        raise ValueError(f"available={shown(available)} must be a number of bytes, above 0 and below 2**63, or None.")
    train = TrainConfig(seq_len=min(TrainConfig.seq_len, config.max_seq_len)) if train is None else train
    if decoding is None:
        half = max(config.max_seq_len // 2, 1)
        decoding = Decoding(prompt_tokens=min(Decoding.prompt_tokens, half), new_tokens=min(Decoding.new_tokens, half))
    if train.seq_len > config.max_seq_len:
        raise ValueError(f"seq_len={train.seq_len} is longer than the model's max_seq_len={config.max_seq_len}.")
    how = numbers_of(train, gpu=gpus > 0)
    taken = training_memory(config, train, how, gpus=max(gpus, 1))
    decoded = decoding_memory(config, decoding, gpu=gpus > 0)
    positions = decoding.prompt_tokens + decoding.new_tokens
    return MemoryPlan(
        parameters=count_parameters(config),
        operations=count_operations(config, train, positions=positions),
        training=taken,
        decoding=decoded,
        available=available,
        remedies=() if _fits(taken.peak, available) else _training_remedies(config, train, gpus, available or 0),
        decoding_remedies=()
        if _fits(decoded.peak, available)
        else _decoding_remedies(config, decoding, gpus, available or 0),
    )


def _is_size(available: object) -> bool:
    return isinstance(available, int | float) and not isinstance(available, bool) and 0 < available < 2**63


def _fits(peak: int, available: int | None) -> bool:
    return available is None or peak <= USABLE * available


def _training_remedies(config: ModelConfig, train: TrainConfig, gpus: int, available: int) -> tuple[Remedy, ...]:
    """Each change alone, all of them, and as many GPUs as are needed, without and with those that cost no batch."""
    how = numbers_of(train, gpu=gpus > 0)

    def remedy(words: str, changed: TrainConfig, number: int = max(gpus, 1)) -> Remedy:
        peak = training_memory(config, changed, how, gpus=number).peak
        return Remedy(words, peak, _fits(peak, available))

    changes: dict[str, dict[str, Any]] = {}
    if train.optimizer == "adamw" and gpus:  # on a CPU it is slow
        changes["--optimizer adamw8bit"] = {"optimizer": "adamw8bit"}
    if train.keep_best:
        changes["--no-keep-best"] = {"keep_best": False}
    if not train.activation_checkpointing:
        changes["--activation-checkpointing"] = {"activation_checkpointing": True}
    words, lighter, found = list(changes), train, []
    for change, fields in changes.items():
        lighter = replace(lighter, **fields)
        found.append(remedy(change, replace(train, **fields)))
    together, smallest = " ".join(words), max(gpus, 1)
    if train.batch_size > smallest:
        times = train.accumulation * (train.batch_size // smallest)
        smaller = f"--batch-size {smallest} --accumulation {times}"
        found.append(remedy(smaller, replace(train, batch_size=smallest, accumulation=times)))
        least = replace(lighter, batch_size=smallest, accumulation=times)
        found.append(remedy(f"{together} {smaller}".strip(), least))
    elif words:
        found.append(remedy(together, lighter))
    for changed, beside in ((train, ""), (lighter, f" {together}")):
        number = 2 * gpus  # what divides the GPUs there are divides those too
        while gpus and number <= _MOST_GPUS and _can_share(config, train, number):
            sharded = remedy(f"--gpus {number}{beside}", changed, number)
            if sharded.fits:
                found.append(sharded)
                break
            number *= 2
    return tuple(dict.fromkeys(found))


def _can_share(config: ModelConfig, train: TrainConfig, gpus: int) -> bool:
    """Whether so many can share a batch and, with expert parallelism, the experts."""
    try:
        check_sharing(config, train, gpus)
    except ValueError:
        return False
    return True


def _decoding_remedies(config: ModelConfig, decoding: Decoding, gpus: int, available: int) -> tuple[Remedy, ...]:
    """Narrower weights, and as many texts at a time as there is room for."""

    def remedy(words: str, changed: Decoding) -> Remedy:
        peak = decoding_memory(config, changed, gpu=gpus > 0).peak
        return Remedy(words, peak, _fits(peak, available))

    found = []
    if decoding.dtype == "float32":
        found.append(remedy("--dtype bfloat16", replace(decoding, dtype="bfloat16")))
    if decoding.quantize is None:
        found.append(remedy("--quantize int8", replace(decoding, quantize="int8")))
        found.append(remedy("--quantize int4", replace(decoding, quantize="int4")))
    rows, fewer = decoding.rows, None
    while rows > 1 and not (fewer and fewer.fits):
        rows //= 2
        fewer = remedy(f"--rows {rows}", replace(decoding, rows=rows))
    return tuple(found) if fewer is None else (*found, fewer)
