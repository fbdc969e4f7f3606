"""How a network is trained: length, optimizer, and the LayerSkip recipe's dials.

Knows nothing of the network's sizes. Next: `losses.py` (what a step computes), `run.py` (the steps).
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from layerskip_moe.refusals import require_whole, shown
from layerskip_moe.training.exit_loss import Curriculum, WeightKind
from layerskip_moe.training.torchtune_parts import SCALES, Scale

Precision = Literal["auto", "float32", "bfloat16", "float16"]
OptimizerName = Literal["adamw", "adamw8bit"]
_LARGEST = 2**63 - 1  # of epochs, and of whole numbers but the seed, which may be past what a float holds


@dataclass(frozen=True)
class TrainConfig:
    """Length, optimizer, and the LayerSkip recipe's dials.

    The optimizer is AdamW, with warm-up, then a cosine down to a share of the peak. Layer dropout is LayerSkip's
    (arXiv 2404.16710, section 4.1). Raises ValueError, naming the field, for values that make no sense.

    Attributes:
        max_steps: optimizer steps; when set it wins over epochs
        epochs: passes over the training split, fractions allowed
        seq_len: T, tokens per sample
        batch_size: B, samples per forward pass, of all processes together where torchrun started several
        accumulation: forward passes per optimizer step

        optimizer: "adamw", or "adamw8bit", whose state takes a quarter of the memory (see `make_optimizer`)
        learning_rate: the peak. LayerSkip needs a higher one from scratch than plain training (paper, table 2)
        min_learning_rate_ratio: the share of the peak left at the last step
        warmup_steps: None: 5% of the run, at most 500
        weight_decay: on matrices; norms, biases and the embedding have none
        beta1: of AdamW, decay of the gradients' mean
        beta2: of AdamW, decay of the squared gradients' mean
        max_gradient_norm: gradients are scaled down to this norm; 0 leaves them

        layer_dropout_max: rate of the last layer at its highest, p_max; 0 turns it off
        layer_dropout_depth: shape over layers; "exp" is the paper's
        layer_dropout_time: shape over steps; "exp" is the paper's, "uniform" its fine-tuning
        layer_dropout_part: "block" drops whole layers, "experts" only the MLP or expert sublayer
        expert_dropout: probability that an expert sits out a step

        exit_weights: "paper", "equal" or "drafting" (see `exit_weights` in exit_loss.py)
        drafting_exit: the exit layer, 1 to L-1, that "drafting" concentrates on: it is supervised at every step,
            whatever the curriculum; None: a quarter of the layers, rounded up
        exit_loss_scale: e_scale
        exit_curriculum: "rotational", "gradual", "all" or "none" (only the last layer, so not with "drafting")
        exit_rotation: every how many layers one is supervised, under "rotational"
        exit_distillation: share of an early exit's target that is the last layer's own distribution

        moe_loss_weight: of the load-balance loss, mean over layers; set it to 0 for balancing by the bias alone
        router_z_loss_weight: of the router z-loss, mean over layers
        router_coherence_weight: of the loss that pulls neighbouring positions to the same experts, mean over layers
            (see `router_coherence_loss` in balance.py); 0: none
        bias_update_rate: step of the choice bias, where ModelConfig.bias_balancing is on

        precision: "auto": bfloat16 where the hardware has it, float16 on an older GPU, else float32; the type of the
            machine at hand, also of a run that began on another
        compile: train with compiled blocks, not with expert_parallel; None: on one GPU only; on a CPU it pays from
            some 500 steps on
        activation_checkpointing: keep only blocks' inputs for the backward pass, and compute the rest again: less
            memory for a third more arithmetic
        expert_parallel: processes, of those that torchrun started, that hold a layer's experts between them
        seed: of batches and dropout
        validate_every: steps between validations; None: ten times in the run; 0: only at the end
        validation_windows: samples of the validation split used each time
        keep_best: end with the weights of the best validation (last layer's perplexity)
        checkpoint_every: steps between checkpoints; None: ten times in the run; 0: none
        log_every: steps between lines of metrics.jsonl
        max_skipped_steps: a step whose loss or gradient is not finite is skipped; with so many in a row the run stops
    """

    # Length
    max_steps: int | None = None
    epochs: float = 1.0
    seq_len: int = 256
    batch_size: int = 16
    accumulation: int = 1

    # Optimizer
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-3
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_gradient_norm: float = 1.0

    # Layer and expert dropout
    layer_dropout_max: float = 0.1
    layer_dropout_depth: Scale = "exp"
    layer_dropout_time: Scale = "exp"
    layer_dropout_part: Literal["block", "experts"] = "block"
    expert_dropout: float = 0.0

    # Early-exit loss
    exit_weights: WeightKind = "equal"
    drafting_exit: int | None = None
    exit_loss_scale: float = 1.0
    exit_curriculum: Curriculum = "rotational"
    exit_rotation: int = 2
    exit_distillation: float = 0.0

    # Experts
    moe_loss_weight: float = 0.01
    router_z_loss_weight: float = 0.001
    router_coherence_weight: float = 0.0
    bias_update_rate: float = 0.001

    # Run
    precision: Precision = "auto"
    compile: bool | None = None
    activation_checkpointing: bool = False
    expert_parallel: int = 1
    seed: int = 0
    validate_every: int | None = None
    validation_windows: int = 64
    keep_best: bool = True
    checkpoint_every: int | None = None
    log_every: int = 10
    max_skipped_steps: int = 3

    def __post_init__(self) -> None:
        for name in (
            "seq_len",
            "batch_size",
            "accumulation",
            "exit_rotation",
            "validation_windows",
            "log_every",
            "expert_parallel",
            "max_skipped_steps",
        ):
            require_whole(name, getattr(self, name), 1)
        for name in ("max_steps", "drafting_exit", "warmup_steps", "validate_every", "checkpoint_every"):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name), 1 if name in ("max_steps", "drafting_exit") else 0)
        if self.drafting_exit is not None and self.exit_weights != "drafting":
            raise ValueError(
                f"drafting_exit={shown(self.drafting_exit)} is for exit_weights='drafting', not "
                f"{shown(self.exit_weights)}."
            )
        if self.exit_weights == "drafting" and self.exit_curriculum == "none":
            raise ValueError(
                "exit_weights='drafting' has nothing to supervise under exit_curriculum='none'; take another of them."
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed={shown(self.seed)} must be a whole number.")
        for name in ("keep_best", "activation_checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be True or False.")
        if not isinstance(self.compile, bool | None):
            raise ValueError(f"compile={shown(self.compile)} must be True, False or None.")
        for name in ("epochs", "learning_rate"):
            if not (_is_number(getattr(self, name)) and 0 < getattr(self, name) < math.inf):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be a finite number above 0.")
        for name in ("layer_dropout_max", "expert_dropout", "exit_distillation", "min_learning_rate_ratio"):
            if not (_is_number(getattr(self, name)) and 0 <= getattr(self, name) <= 1):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be a number between 0 and 1.")
        for name in ("beta1", "beta2"):
            if not (_is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be a number, at least 0 and below 1.")
        for name in (
            "weight_decay",
            "max_gradient_norm",
            "exit_loss_scale",
            "moe_loss_weight",
            "router_z_loss_weight",
            "router_coherence_weight",
            "bias_update_rate",
        ):
            if not (_is_number(getattr(self, name)) and 0 <= getattr(self, name) < math.inf):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be a finite number, 0 or more.")
        _one_of("layer_dropout_depth", self.layer_dropout_depth, SCALES)
        _one_of("layer_dropout_time", self.layer_dropout_time, SCALES)
        _one_of("layer_dropout_part", self.layer_dropout_part, ("block", "experts"))
        _one_of("exit_weights", self.exit_weights, get_args(WeightKind))
        _one_of("exit_curriculum", self.exit_curriculum, get_args(Curriculum))
        _one_of("optimizer", self.optimizer, get_args(OptimizerName))
        _one_of("precision", self.precision, get_args(Precision))
        for name, value in asdict(self).items():
            if (name == "epochs" or (isinstance(value, int) and name != "seed")) and value > _LARGEST:
                raise ValueError(f"{name}={shown(value)} is too large; it must be {_LARGEST} or less.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={shown(value)} is unknown; it is one of {', '.join(choices)}.")
