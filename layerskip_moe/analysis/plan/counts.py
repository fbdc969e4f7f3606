"""Parameters and operations of a network, by arithmetic: no network is built.

D width, H query heads, G key-value heads, E experts, K chosen, F expert hidden width, L layers, V vocabulary.
Knows nothing of bytes. Next: `activations.py`, `training.py`, `decoding.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layerskip_moe.nn import ModelConfig
from layerskip_moe.training import TrainConfig
from layerskip_moe.training.layer_dropout import layer_dropout_rates
from layerskip_moe.training.losses import step_exit_weights

_MOST_STEPS = 256  # of a run are looked at: schedules are shapes over it, so that a longer one has the same mean


@dataclass(frozen=True)
class Parameters:
    """How many numbers a network learns, and where.

    Attributes:
        embedding: V D
        blocks: of each layer
        norm: of the one norm before the head
        head: V D, or 0 where it is the embedding
        idle: of all layers' experts, those that one token is not sent to
        products: of each layer, those of attention's, MLPs' and experts' matrices, which are what quantising and
            narrow numbers reach
        vectors: of each layer, all but its matrices: norms and biases
    """

    embedding: int
    blocks: tuple[int, ...]
    norm: int
    head: int
    idle: int
    products: tuple[int, ...]
    vectors: tuple[int, ...]

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + sum(self.blocks) + self.norm + self.head

    @property
    def active(self) -> int:
        """Those that one token uses."""
        return self.total - self.idle


def count_parameters(config: ModelConfig) -> Parameters:
    """The parameters of `MoEDecoder(config)`."""
    counted = [_count_block(config, layer) for layer in range(config.n_layers)]
    blocks, products, vectors = ([part[place] for part in counted] for place in range(3))
    moe_layers = sum(config.is_moe(layer) for layer in range(config.n_layers))
    return Parameters(
        embedding=config.vocab_size * config.d_model,
        blocks=tuple(blocks),
        norm=config.d_model,
        head=0 if config.tie_embeddings else config.vocab_size * config.d_model,
        idle=moe_layers * (config.num_experts - config.top_k) * 3 * config.d_model * config.expert_d_ff,
        products=tuple(products),
        vectors=tuple(vectors),
    )


def hidden_width(config: ModelConfig) -> int:
    """Hidden width of layers without experts."""
    return config.dense_d_ff or config.expert_d_ff


def _count_block(config: ModelConfig, layer: int) -> tuple[int, int, int]:
    """(all parameters, those of matrices that are multiplied in narrow numbers, those of norms and biases)."""
    width, heads, kv_heads = config.d_model, config.n_heads, config.kv_heads
    queries, keys = heads * config.head_width, kv_heads * config.head_width
    products = width * (queries + 2 * keys) + queries * width
    vectors = 2 * width
    vectors += (queries + 2 * keys) * config.qkv_bias + width * config.output_bias
    vectors += {"head": 2 * config.head_width, "full": queries + keys, None: 0}[config.qk_norm]
    wide = 0  # the router, which is always multiplied in float32
    if config.is_moe(layer):
        wide = config.num_experts * width
        products += 3 * width * (config.num_experts * config.expert_d_ff + config.shared_expert_d_ff)
        products += width * config.shared_expert_gate
    else:
        products += 3 * width * hidden_width(config)
        vectors += (2 * hidden_width(config) + width) * config.mlp_bias
    return products + vectors + wide, products, vectors


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one token, a product and its addition being two.

    Attributes:
        forward: the whole network, the last layer's head included
        training: a training step's, mean over the run: three times the forward pass, with the other exits' heads, less
            what layer dropout leaves out
        decoding: a new token's at the end of its text
    """

    forward: float
    training: float
    decoding: float


def count_operations(config: ModelConfig, train: TrainConfig, *, positions: int) -> Operations:
    """6 N per token of training and 2 N of decoding, N the parameters in a token's products (arXiv 2001.08361), and
    attention's 4 H head_dim for each position read.

    positions: of the text that is decoded. With activation checkpointing blocks are computed once more.
    Raises ValueError for exits that the network does not have.
    """
    parameters, layers = count_parameters(config), range(config.n_layers)
    head = config.vocab_size * config.d_model
    queries, keys = config.n_heads * config.head_width, config.kv_heads * config.head_width
    projections = 2 * config.d_model * (2 * queries + 2 * keys)
    mlps = [
        2 * (count - vectors) - projections - 2 * 3 * config.d_model * config.expert_d_ff * _idle_experts(config, layer)
        for layer, (count, vectors) in enumerate(zip(parameters.blocks, parameters.vectors, strict=True))
    ]

    def attention(read: Sequence[float]) -> list[float]:
        return [projections + 4 * queries * slots for slots in read]

    texts = attention([_mean_read(train.seq_len, _window(config, layer)) for layer in layers])
    last = attention([min(positions, _window(config, layer) or positions) for layer in layers])
    kept, exits = _mean_recipe(config, train)
    mixed = [1.0] * config.n_layers if train.layer_dropout_part == "experts" else kept
    ran = sum(mixed[layer] * texts[layer] + kept[layer] * mlps[layer] for layer in layers)
    return Operations(
        forward=sum(texts) + sum(mlps) + 2 * head,
        training=(4 if train.activation_checkpointing else 3) * ran + 3 * 2 * head * exits,
        decoding=sum(last) + sum(mlps) + 2 * head,
    )


def most_exits(config: ModelConfig, train: TrainConfig) -> int:
    """How many exits a step supervises at most; ValueError for exits that the network does not have."""
    return max(_exits(config, train))


def _idle_experts(config: ModelConfig, layer: int) -> int:
    return config.num_experts - config.top_k if config.is_moe(layer) else 0


def _window(config: ModelConfig, layer: int) -> int | None:
    return config.sliding_window if config.is_windowed(layer) else None


def _mean_read(length: int, window: int | None) -> float:
    """Positions that a position of a text reads, itself among them, mean over the text."""
    window = min(window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def _steps(train: TrainConfig) -> int:
    return min(train.max_steps or _MOST_STEPS, _MOST_STEPS)


def _exits(config: ModelConfig, train: TrainConfig) -> list[int]:
    """Exits supervised at each step."""
    steps = _steps(train)
    return [int((step_exit_weights(train, config.n_layers, step, steps) > 0).sum()) for step in range(steps)]


def _mean_recipe(config: ModelConfig, train: TrainConfig) -> tuple[list[float], float]:
    """Mean over the run: the share of samples that each layer runs for, and how many exits are supervised."""
    steps, exits = _steps(train), _exits(config, train)
    kept = torch.ones(config.n_layers, dtype=torch.float64)
    if train.layer_dropout_max > 0:
        shapes = {"depth": train.layer_dropout_depth, "time": train.layer_dropout_time}
        for step in range(steps):
            rates = layer_dropout_rates(step, steps, config.n_layers, p_max=train.layer_dropout_max, **shapes)
            kept -= rates / steps
    return kept.tolist(), sum(exits) / steps
