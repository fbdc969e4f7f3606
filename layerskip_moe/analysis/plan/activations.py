"""What a layer's forward pass leaves for its backward pass, tensor by tensor as `nn/` computes it.

B batch, T positions, D width, H query heads, G key-value heads, E experts, K chosen, F hidden width.
A tensor is kept where autograd needs it: a product's input, a norm's input, both halves of SwiGLU. A tensor that
several need is kept once. Layer dropout is not counted: at the step that takes most, no sample is dropped.

Knows nothing of weights. Next: `training.py`, which adds it up over a step.
"""

from dataclasses import dataclass

import torch

from layerskip_moe.analysis.plan.counts import hidden_width
from layerskip_moe.nn import ModelConfig
from layerskip_moe.training import TrainConfig
from layerskip_moe.training.optimizer import autocast_dtype

WIDE = 4  # bytes of float32: the residual stream, norms, routers
INDEX = 8  # bytes of an index


@dataclass(frozen=True)
class Numbers:
    """In what numbers a step computes, and by which of PyTorch's kernels.

    Attributes:
        narrow: bytes of what matrix products take and give: 4 in float32, 2 under autocast
        gpu: norms keep their input alone there; on a CPU also what they have normalised
        flash: whether PyTorch has an attention that stores no probabilities even where heads share keys: on a CPU, and
            on a GPU in bfloat16, without a window
    """

    narrow: int = WIDE
    gpu: bool = False
    flash: bool = True

    @property
    def mixed(self) -> bool:
        """Whether products run in narrower numbers than weights are stored in."""
        return self.narrow < WIDE


def numbers_of(train: TrainConfig, *, gpu: bool) -> Numbers:
    """How a GPU, of Ampere's kind or later, or this CPU takes a step; "auto" is bfloat16 on that GPU."""
    if gpu:
        narrow = WIDE if train.precision == "float32" else 2
        return Numbers(narrow, gpu=True, flash=train.precision in ("auto", "bfloat16"))
    return Numbers(WIDE if autocast_dtype(train.precision, torch.device("cpu")) is None else 2)


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer and one batch.

    Attributes:
        kept: from the forward pass to the backward pass, the layer's input among it
        input: of that the layer's input, which is all that is kept with checkpointing
        outside: what losses keep of the router, with checkpointing too
        working: what the backward pass makes beside what is kept and the weights' gradients, at most
    """

    kept: int
    input: int
    outside: int
    working: int


def layer_activations(config: ModelConfig, layer: int, batch_size: int, seq_len: int, how: Numbers) -> LayerActivations:
    """What a layer (0..L-1) keeps of a batch."""
    tokens, width = batch_size * seq_len, config.d_model
    stream = tokens * width * WIDE
    attention, attention_working = _attention(config, layer, batch_size, seq_len, how)
    if config.is_moe(layer):
        mlp, mlp_working, outside = _experts(config, tokens, how)
    else:
        mlp, mlp_working = _swiglu(tokens, hidden_width(config), how)
        mlp, outside = mlp + tokens * width * how.narrow, 0  # (its input, the norm's output)
    dropped = 0
    if config.dropout:  # the two masks, as numbers on a CPU
        dropped = 2 * tokens * width * (1 if how.gpu else how.narrow)
    norms = 2 * _norm(tokens, width, how)  # the layer's input and, between its halves, the stream
    gradient = 2 * stream  # of the stream, before and after a sublayer's part is added
    # When attention's turn comes, what the MLP kept is gone.
    working = max(mlp_working, attention_working - mlp)
    return LayerActivations(
        kept=norms + attention + mlp + dropped + outside,
        input=stream,
        outside=outside,
        working=gradient + working,
    )


def _norm(vectors: int, width: int, how: Numbers) -> int:
    """An RMSNorm's input, the scale of each vector and, on a CPU, the normalised vectors, before the weight."""
    return vectors * (width * WIDE * (1 if how.gpu else 2) + WIDE)


def _attention(config: ModelConfig, layer: int, batch_size: int, seq_len: int, how: Numbers) -> tuple[int, int]:
    """(kept, working)."""
    tokens, narrow = batch_size * seq_len, how.narrow
    queries, keys = config.n_heads * config.head_width, config.kv_heads * config.head_width
    kept = tokens * config.d_model * narrow  # the projections' input, the norm's output
    kept += tokens * (queries + 2 * keys) * narrow  # their output: values are a part of it, which keeps the whole
    if config.clip_qkv is not None:
        kept += tokens * keys * narrow  # clamped values
    if config.qk_norm is not None:
        vectors = tokens * (config.n_heads + config.kv_heads if config.qk_norm == "head" else 2)
        copied = how.mixed or (config.qk_norm == "head" and config.clip_qkv is not None)
        kept += vectors * WIDE + tokens * (queries + keys) * WIDE * (copied + (not how.gpu))
        if config.qk_norm == "full" and config.clip_qkv is not None:
            kept += tokens * (queries + keys) * WIDE
    elif how.mixed:
        kept += 4 * tokens * config.head_width * narrow  # each layer's own copies of the angles
    kept += tokens * (queries + keys) * narrow  # rotated queries and keys
    kept += tokens * (queries * narrow + config.n_heads * WIDE)  # what was read, and each query's normaliser
    working = tokens * (3 * queries + 4 * keys) * WIDE
    cut = how.gpu and config.is_windowed(layer) and (config.sliding_window or 0) < seq_len  # by a mask
    if config.n_heads != config.kv_heads and (cut or not how.flash):
        scores = batch_size * config.n_heads * seq_len * seq_len * narrow
        kept += scores + tokens * (queries + 2 * queries) * narrow  # scaled queries, keys and values for every head
        working += 2 * scores
    return kept, working


def _swiglu(rows: int, hidden: int, how: Numbers) -> tuple[int, int]:
    """(kept, working) of rows through gate and up, silu, and what goes into the projection down."""
    return rows * 4 * hidden * how.narrow, rows * 2 * hidden * how.narrow


def _experts(config: ModelConfig, tokens: int, how: Numbers) -> tuple[int, int, int]:
    """(kept, working, what the losses keep)."""
    width, pairs = config.d_model, tokens * config.top_k
    kept, working = _swiglu(pairs, config.expert_d_ff, how)
    kept += tokens * width * WIDE  # the router's input, the norm's output
    kept += tokens * (config.num_experts + config.normalize_top_k) * WIDE  # its probabilities, their sum
    kept += pairs * (WIDE + how.narrow + 4 * INDEX)  # weights, before and after sorting, and four orders of pairs
    kept += 2 * pairs * width * how.narrow  # what goes into the experts and what comes out
    # Gradients of what comes out of the experts; then those within them, when what came out is gone.
    working = max(2 * pairs * width * how.narrow, working - pairs * width * how.narrow)
    if config.shared_expert_d_ff:
        shared, _ = _swiglu(tokens, config.shared_expert_d_ff, how)
        kept += shared + (tokens * width * how.narrow if how.mixed else 0)
        if config.shared_expert_gate:
            kept += tokens * (width + 1) * how.narrow  # what is gated, and by how much
    return kept, working, 3 * tokens * config.num_experts * WIDE  # logits, their softmax and exponentials
