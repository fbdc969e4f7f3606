"""Bytes of a training step: what is always there, what the forward pass keeps, and when in the step most is there.

    peak = weights (float32) + optimizer's state + the best weights so far + the most of
        exit loss:  activations of all layers + logits, and the head's gradient before and after its scaling
        backward:   at layer l, activations of layers 0..l + gradients of layers l+1..L-1 + what l computes with
        optimizer:  all gradients
    over N processors (FSDP, arXiv 2304.11277, which is ZeRO's third stage, 1910.02054), each with its share of a batch:
        weights, gradients, optimizer and best weights are divided by N, and `sharded.py` has what is whole meanwhile.

D width, L layers, V vocabulary.
Knows nothing of what a processor has. Next: `activations.py`; `plan.py`, which decides what fits.
"""

import inspect
from dataclasses import dataclass

from layerskip_moe.analysis.plan.activations import WIDE, Numbers, layer_activations
from layerskip_moe.analysis.plan.counts import Parameters, count_parameters, most_exits
from layerskip_moe.analysis.plan.sharded import Sharded
from layerskip_moe.nn import ModelConfig
from layerskip_moe.nn.rotary import table_length
from layerskip_moe.training import TrainConfig
from layerskip_moe.training.exit_loss import exit_loss
from layerskip_moe.training.sharding import check_sharing

_CHUNK_ROWS: int = inspect.signature(exit_loss).parameters["chunk_rows"].default
_STATE_8BIT = 2 * (1 + WIDE / 256)  # bytes of a parameter's two means: one each, and a scale for every 256


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on each processor, at the moment of a step when most is there.

    Attributes:
        weights: in float32, as they are trained
        gradients: those that there are at that moment
        all_gradients: those that there are at the end of the backward pass
        optimizer: AdamW's two means
        best: the weights of the best validation, where `keep_best` keeps them
        activations: what the forward pass left for the backward pass; on one processor copies of weights in 16 bits
            among it
        working: logits and what else is computed with, whole blocks where weights are sharded, rotary angles
        moment: "exit loss", "backward pass" or "optimizer's step"
    """

    weights: int
    gradients: int
    all_gradients: int
    optimizer: int
    best: int
    activations: int
    working: int
    moment: str

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.best + self.activations + self.working


def training_memory(config: ModelConfig, train: TrainConfig, how: Numbers, *, gpus: int = 1) -> TrainingMemory:
    """What each of `gpus` processors needs of memory to train, as without torch.compile, which keeps less.

    train: batch_size is of all processors together.
    Raises ValueError for a batch or experts that cannot be shared out, and exits that the network does not have.
    """
    check_sharing(config, train, gpus)
    batch_size, counted = train.batch_size // gpus, count_parameters(config)
    checkpointing = train.activation_checkpointing
    tokens, layers = batch_size * train.seq_len, range(config.n_layers)
    gradients = _Gradients(counted, gpus, all_along=train.accumulation > 1)
    of_layer = [layer_activations(config, layer, batch_size, train.seq_len, how) for layer in layers]
    # With checkpointing what a layer keeps is there while it is run again, and only then.
    between = [part.input + part.outside if checkpointing else part.kept for part in of_layer]
    again = [part.kept - part.input - part.outside if checkpointing else 0 for part in of_layer]
    sharded = Sharded(config, train, how, counted, gpus)
    copies = [0] * config.n_layers
    if how.mixed and gpus == 1:  # several processors have blocks in these numbers alone
        copies = [products * how.narrow for products in counted.products]
    copied_between = [0] * config.n_layers if checkpointing else copies

    exits = most_exits(config, train)
    stream = tokens * config.d_model * WIDE
    head = _HeadLoss(config, train, how, tokens, exits)
    angles = 2 * config.head_width * WIDE * (table_length(train.seq_len, config.max_seq_len) + tokens)

    kept, present = sum(between) + sum(copied_between) + head.kept, angles + sharded.in_exit_loss
    moments = [("exit loss", gradients.before, kept, present + head.forward)]
    moments.append(("exit loss", gradients.before, kept, present + head.backward))
    for layer in reversed(layers):
        kept = sum(between[: layer + 1]) + sum(copied_between[: layer + 1])
        rerun = again[layer] + (copies[layer] if checkpointing else 0)
        waiting = min(exits - 1, layer) * stream  # gradients of earlier exits
        present, there = angles + waiting, gradients.after(layer)
        own = of_layer[layer].working + gradients.in_layer(layer)
        moments.append(("backward pass", there, kept + rerun, present + own + sharded.in_layer(layer)))
        moments.append(("backward pass", there, kept, present + sharded.between_layers(layer)))
    unscattered = gradients.of_embedding if gpus == 1 and (counted.head == 0 or train.accumulation > 1) else 0
    moments.append(("backward pass", gradients.all, 0, angles + stream + unscattered + sharded.at_the_end))
    moments.append(("optimizer's step", gradients.all, 0, angles + sharded.in_optimizer))
    moment, there, activations, working = max(moments, key=lambda what: sum(what[1:]))
    best = train.keep_best and train.validate_every != 0
    return TrainingMemory(
        weights=_share(counted.total * WIDE, gpus),
        gradients=there,
        all_gradients=gradients.all,
        optimizer=_share(_optimizer_bytes(counted, train), gpus),
        best=_share(counted.total * WIDE, gpus) if best else 0,
        activations=activations,
        working=working,
        moment=moment,
    )


def _share(whole: float, gpus: int) -> int:
    return -(-round(whole) // gpus)


def _optimizer_bytes(counted: Parameters, train: TrainConfig) -> float:
    """Of 8-bit AdamW, small vectors stay in float32."""
    if train.optimizer == "adamw":
        return counted.total * 2 * WIDE
    vectors = sum(counted.vectors) + counted.norm
    return (counted.total - vectors) * _STATE_8BIT + vectors * 2 * WIDE


@dataclass(frozen=True)
class _Gradients:
    """Bytes of the weights' gradients as the backward pass makes them, the last layer's first."""

    counted: Parameters
    gpus: int
    all_along: bool  # those of an earlier batch of the same step are there from the beginning

    @property
    def all(self) -> int:
        return _share(self.counted.total * WIDE, self.gpus)

    @property
    def before(self) -> int:
        return self.all if self.all_along else 0

    @property
    def of_embedding(self) -> int:
        return self.counted.embedding * WIDE

    def after(self, layer: int) -> int:
        """When this layer's turn comes, without those that wait to be scattered."""
        made = sum(self.counted.blocks[layer + 1 :])
        if self.gpus == 1:
            made += self.counted.norm + (self.counted.head or self.counted.embedding)
        return self.all if self.all_along else _share(made * WIDE, self.gpus)

    def in_layer(self, layer: int) -> int:
        """Of those made in this layer's turn, what is there when most else is: half of them."""
        return self.counted.blocks[layer] * WIDE // 2 if self.gpus == 1 else 0


class _HeadLoss:
    """Bytes of the loss over a step's exits (`training/exit_loss.py`).

    kept: norms' activations; forward and backward: what is there beside in either pass
    """

    def __init__(self, config: ModelConfig, train: TrainConfig, how: Numbers, tokens: int, exits: int) -> None:
        head, states = config.vocab_size * config.d_model, exits * tokens * config.d_model
        rows = min(_CHUNK_ROWS, tokens)
        chunk = rows * config.vocab_size
        # Every exit's norm; the last one's input is no layer's.
        self.kept = exits * tokens * WIDE + tokens * config.d_model * WIDE + (0 if how.gpu else states * WIDE)
        logits = chunk * (how.narrow + WIDE) + rows * config.d_model * how.narrow
        if how.mixed and not how.gpu:
            logits += chunk * WIDE  # the softmax's own copy
        if train.exit_distillation > 0:
            logits += 2 * chunk * WIDE
        copies = head * how.narrow * (2 if how.mixed else 1)  # the head's, and a place for its gradient's parts
        self.forward = states * (WIDE + how.narrow) + head * WIDE + copies + logits
        self.backward = states * (WIDE + how.narrow) + 2 * head * WIDE
