"""Bytes of decoding: weights, the cache by its length, and what a prompt and a recorded step are computed with.

    peak = weights + cache + rotary angles + the larger of
        the prompts, run at once, with the layer that takes most
        the recorded steps (`nn/steps.py`), which keep all their states, and the noise that tokens are drawn with

B rows, V vocabulary, D width. Knows nothing of training. Next: `plan.py`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from layerskip_moe.analysis.plan.counts import count_parameters, hidden_width
from layerskip_moe.generation.kept_caches import ROUNDING
from layerskip_moe.generation.session import MOST_AHEAD, MOST_NOISE
from layerskip_moe.nn import ModelConfig
from layerskip_moe.nn.config import require_whole
from layerskip_moe.nn.few_rows import MOST_ROWS
from layerskip_moe.nn.steps import room_for
from layerskip_moe.pretrained.quantize import Quantization

DecodingType = Literal["float32", "bfloat16", "float16"]
_WIDE, _INDEX = 4, 8
_NOISE_COPIES = 4  # float64 and int64, while it is hashed


@dataclass(frozen=True)
class Decoding:
    """What is decoded.

    Attributes:
        rows: B, texts at a time
        prompt_tokens: of each
        new_tokens: of each
        dtype: the weights' and the cache's; of quantised weights, that of the rest
        quantize: int8 or int4; None: not
        draft_length: of self-speculation; 0: plain decoding
        sampled: whether tokens are drawn (temperature above 0)
    """

    rows: int = 1
    prompt_tokens: int = 512
    new_tokens: int = 128
    dtype: DecodingType = "bfloat16"
    quantize: Quantization | None = None
    draft_length: int = 0
    sampled: bool = False

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("prompt_tokens", 1), ("new_tokens", 1), ("draft_length", 0)):
            require_whole(name, getattr(self, name), at_least=least)
        if self.dtype not in get_args(DecodingType):
            raise ValueError(f"dtype={self.dtype!r} is unknown; it is one of {', '.join(get_args(DecodingType))}.")
        if self.quantize is not None and self.quantize not in get_args(Quantization):
            raise ValueError(f"quantize={self.quantize!r} is unknown; it is 'int8' or 'int4', or None.")
        if not isinstance(self.sampled, bool):
            raise ValueError(f"sampled={self.sampled!r} must be True or False.")


@dataclass(frozen=True)
class DecodingMemory:
    """Bytes on the one processor that decodes.

    Attributes:
        weights: all of them, quantised or not
        cache: keys and values of every layer and position, and routers' logits where they look back
        working: prompts or recorded steps, whichever are larger, and rotary angles
    """

    weights: int
    cache: int
    working: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.working


def decoding_memory(config: ModelConfig, decoding: Decoding, *, gpu: bool = True) -> DecodingMemory:
    """What a processor needs to decode so many rows. Raises ValueError for texts longer than the network takes."""
    positions = decoding.prompt_tokens + decoding.new_tokens
    if positions > config.max_seq_len:
        raise ValueError(
            f"prompt_tokens={decoding.prompt_tokens} with new_tokens={decoding.new_tokens} is past "
            f"max_seq_len={config.max_seq_len}; plan for shorter texts."
        )
    number = getattr(torch, decoding.dtype).itemsize
    capacity = min(-(-positions // ROUNDING) * ROUNDING, config.max_seq_len)
    angles = 2 * config.max_seq_len * config.head_width * _WIDE
    steps = _recorded_bytes(config, decoding, number, gpu) + _noise_bytes(config, decoding)
    return DecodingMemory(
        weights=_weight_bytes(config, number, decoding.quantize),
        cache=cache_bytes(config, decoding.rows, capacity, number),
        working=angles + max(_prompt_bytes(config, decoding, number), steps),
    )


def cache_bytes(config: ModelConfig, rows: int, capacity: int, number: int) -> int:
    """Of a `KVCache` whose rows have room for so many positions, in numbers of so many bytes."""
    kept = 2 * config.n_layers * rows * capacity * config.kv_heads * config.head_width * number
    if config.router_remembers:
        moe_layers = sum(config.is_moe(layer) for layer in range(config.n_layers))
        kept += moe_layers * rows * capacity * config.num_experts * _WIDE
    return kept


def _weight_bytes(config: ModelConfig, number: int, quantize: Quantization | None) -> int:
    counted = count_parameters(config)
    if quantize is None:
        return counted.total * number
    packed = sum(counted.products) + counted.head
    return (
        (counted.total - packed) * number
        + round(packed * {"int8": 1.0, "int4": 0.5}[quantize])
        + (number * (_rows_out(config) if quantize == "int8" else packed // 32))
    )


def _rows_out(config: ModelConfig) -> int:
    """Output rows of all quantised matrices, each of which has a scale."""
    width, heads = config.d_model, config.n_heads + 2 * config.kv_heads
    rows = 0 if config.tie_embeddings else config.vocab_size
    for layer in range(config.n_layers):
        rows += heads * config.head_width + width
        if config.is_moe(layer):
            rows += config.num_experts * (2 * config.expert_d_ff + width)
            rows += (2 * config.shared_expert_d_ff + width) if config.shared_expert_d_ff else 0
        else:
            rows += 2 * hidden_width(config) + width
    return rows


def _prompt_bytes(config: ModelConfig, decoding: Decoding, number: int) -> int:
    """All prompts but their last tokens, in one pass: the stream before, within and after a sublayer, and either what
    attention or what the widest MLP makes of it."""
    width, pairs = config.d_model, config.top_k
    queries, keys = config.n_heads * config.head_width, config.kv_heads * config.head_width
    widest = [5 * queries + 6 * keys]
    for layer in range(config.n_layers):
        if config.is_moe(layer):
            hidden = pairs * config.expert_d_ff
            widest.append(max(4 * hidden, 2 * hidden + 2 * pairs * width + width) + 3 * pairs * _INDEX // number)
        else:
            widest.append(4 * hidden_width(config))
    tokens = decoding.rows * (decoding.prompt_tokens - 1)
    return tokens * (number * (4 * width + max(widest)) + 2 * config.head_width * _WIDE)


def _recorded_bytes(config: ModelConfig, decoding: Decoding, number: int, gpu: bool) -> int:
    """Of the states that recorded steps of few rows keep; steps of many rows keep none, and take less than a prompt.

    With drafts there are three more recordings: of drafting, of a draft's choice and of verification.
    """
    places = decoding.draft_length + 1
    total = 0
    for rows in [decoding.rows] + ([decoding.rows * places] if decoding.draft_length else []):
        if rows <= MOST_ROWS:
            total += (rows if gpu else room_for(rows)) * _row_bytes(config, number)
    return total


def _row_bytes(config: ModelConfig, number: int) -> int:
    """Of one state's way through all layers and the head, everything kept."""
    width = config.d_model
    queries, keys = config.n_heads * config.head_width, config.kv_heads * config.head_width
    total = 2 * config.vocab_size + 4 * width
    for layer in range(config.n_layers):
        total += 6 * width + (queries + 2 * keys) + (queries + keys) * (1 + (config.qk_norm is not None)) + queries
        if config.is_moe(layer):
            total += width + config.num_experts * _WIDE // number
            if config.shared_expert_d_ff:
                total += 3 * config.shared_expert_d_ff + 2 * width
        else:
            total += 3 * hidden_width(config)
    return total * number


def _noise_bytes(config: ModelConfig, decoding: Decoding) -> int:
    if not decoding.sampled:
        return 0
    at_once = decoding.rows * config.vocab_size
    numbers = at_once * max(decoding.draft_length + 1, min(MOST_AHEAD, MOST_NOISE // at_once))
    return numbers * 8 * _NOISE_COPIES
