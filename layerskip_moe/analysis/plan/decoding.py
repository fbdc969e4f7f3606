"""Bytes of decoding: weights, the cache by its length, and what a prompt and a recorded step are computed with.

    peak = weights + cache + rotary angles + the larger of
        the prompts, run at once, with the layer that takes most
        the steps: few rows' are recorded (`nn/steps.py`) and keep all their states, many rows' have logits; and the
            noise that tokens are drawn with

16-bit weights on a CPU without products of theirs, and packed ones, are turned into floats as they are multiplied.

B rows, V vocabulary, D width. Knows nothing of training. Next: `plan.py`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from layerskip_moe.analysis.plan.counts import count_parameters, hidden_width
from layerskip_moe.generation.kept_caches import ROUNDING
from layerskip_moe.generation.session import MOST_AHEAD, MOST_NOISE
from layerskip_moe.nn import ModelConfig
from layerskip_moe.nn.few_rows import MOST_ROWS
from layerskip_moe.nn.products import product_dtype
from layerskip_moe.nn.rotary import table_length
from layerskip_moe.nn.steps import room_for
from layerskip_moe.pretrained.quantize import Quantization
from layerskip_moe.refusals import require_whole, shown

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
            raise ValueError(f"dtype={shown(self.dtype)} is unknown; it is one of {', '.join(get_args(DecodingType))}.")
        if self.quantize is not None and self.quantize not in get_args(Quantization):
            raise ValueError(f"quantize={shown(self.quantize)} is unknown; it is 'int8' or 'int4', or None.")
        if not isinstance(self.sampled, bool):
            raise ValueError(f"sampled={shown(self.sampled)} must be True or False.")


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
    angles = 2 * table_length(capacity, config.max_seq_len) * config.head_width * _WIDE
    multiply = _products(decoding, gpu)
    return DecodingMemory(
        weights=_weight_bytes(config, number, decoding.quantize),
        cache=cache_bytes(config, decoding.rows, capacity, number),
        working=angles + max(_prompt_bytes(config, decoding, multiply), _step_bytes(config, decoding, multiply, gpu)),
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


@dataclass(frozen=True)
class _Products:
    """Bytes that products of many rows take beside their input, as `nn/products.py` makes them.

    number: bytes of a state's numbers; wide: of those that are multiplied; packed: how weights are
    """

    number: int
    wide: int
    packed: Quantization | None

    @property
    def copy(self) -> int:
        """Bytes of a number of states that are turned into wider ones, or 0."""
        return self.wide if self.wide != self.number else 0

    def as_floats(self, weights: int) -> int:
        """Of weights that are turned into the numbers they are multiplied in; 0 for those that are multiplied as they
        are. Packed ones are whole bytes on the way."""
        if self.packed is None:
            return self.copy * weights
        return (self.wide + (self.packed == "int4")) * weights

    def linear(self, rows: int, width: int, out: int) -> int:
        """Of rows [., width] by a matrix [out, width]."""
        made = rows * (self.copy * width + self.wide * out) + self.as_floats(out * width)
        return max(made, rows * out * (self.copy + self.number))

    def grouped(self, rows: int, width: int, out: int) -> int:
        """Of rows [., width] by a matrix [out, width] for each group, one group's being turned at a time."""
        place = self.wide * out * width if self.packed or self.copy else 0
        place += (self.wide + 1) * out * width if self.packed == "int4" else 0
        return rows * (out * self.number + (width + out) * self.copy) + place


def _products(decoding: Decoding, gpu: bool) -> _Products:
    dtype = getattr(torch, decoding.dtype)
    return _Products(dtype.itemsize, (dtype if gpu else product_dtype(dtype, "cpu")).itemsize, decoding.quantize)


def _layers_bytes(config: ModelConfig, tokens: int, multiply: _Products) -> int:
    """Of many states at once in the layer that takes most: the stream before, within and after a sublayer, and either
    what attention or what the widest MLP makes of it."""
    width, number = config.d_model, multiply.number
    queries, keys = config.n_heads * config.head_width, config.kv_heads * config.head_width
    widest = [
        tokens * number * (4 * width + 5 * queries + 6 * keys),
        tokens * number * 2 * width + multiply.linear(tokens, width, queries + 2 * keys),
        tokens * number * (2 * width + 3 * queries + 3 * keys) + multiply.linear(tokens, queries, width),
    ]
    for layer in range(config.n_layers):
        if config.is_moe(layer):
            pairs, hidden = tokens * config.top_k, config.expert_d_ff
            kept = tokens * number * 4 * width + pairs * (number * width + 3 * _INDEX)  # what goes into experts
            widest += [
                kept + pairs * number * 4 * hidden,
                kept + multiply.grouped(pairs, width, 2 * hidden),
                kept + pairs * number * hidden + multiply.grouped(pairs, hidden, width),
                kept + pairs * number * width + tokens * number * width,
            ]
        else:
            hidden = hidden_width(config)
            widest += [
                tokens * number * (4 * width + 4 * hidden),
                tokens * number * 3 * width + multiply.linear(tokens, width, 2 * hidden),
                tokens * number * (3 * width + 3 * hidden) + multiply.linear(tokens, hidden, width),
            ]
    return max(widest) + tokens * 2 * config.head_width * _WIDE


def _prompt_bytes(config: ModelConfig, decoding: Decoding, multiply: _Products) -> int:
    """All prompts but their last tokens, in one pass."""
    length = decoding.prompt_tokens - 1
    return _layers_bytes(config, decoding.rows * length, multiply) + _window_bytes(config, length, multiply.number)


def _window_bytes(config: ModelConfig, length: int, number: int) -> int:
    """Of the mask of layers with a sliding window, as whether and as numbers; 0 where the window is as long."""
    if config.sliding_window is None or config.sliding_window >= length:
        return 0
    return length * length * (1 + max(2, number))


def _step_bytes(config: ModelConfig, decoding: Decoding, multiply: _Products, gpu: bool) -> int:
    """Of decoding's steps: of few rows all states that recordings keep; of many what one such step takes, with its
    logits. Tokens' noise is there meanwhile.

    With drafts there are three more recordings: of drafting, of a draft's choice and of verification. Those that are
    made anew for fewer rows, as texts end, are left out.
    """
    places, number, packed = decoding.draft_length + 1, multiply.number, decoding.quantize == "int4" and not gpu
    kept = step = 0
    for rows in [decoding.rows] + ([decoding.rows * places] if decoding.draft_length else []):
        if rows > MOST_ROWS:
            step = max(step, _many_rows_bytes(config, decoding, rows, multiply))
        elif packed:  # cannot be recorded; what is made of weights is there until that is found out
            step = max(step, _row_bytes(config, number) * room_for(rows) + _unpacked_bytes(config, decoding))
        else:
            kept += (rows if gpu else room_for(rows)) * _row_bytes(config, number)
    drawn, hashed = _noise_bytes(config, decoding)
    return kept + max(hashed, drawn + step)


def _many_rows_bytes(config: ModelConfig, decoding: Decoding, rows: int, multiply: _Products) -> int:
    """Of one step of more rows than are recorded: of its layers, each of which reads a copy of its cache, or of the
    head. Where rows draft, those that are to draft less in the end have their logits put in order."""
    number, vocabulary = multiply.number, config.vocab_size
    slots = decoding.prompt_tokens + decoding.new_tokens
    read = 2 * rows * slots * config.kv_heads * config.head_width * number
    masks = rows * slots * (config.n_heads // config.kv_heads) * (1 + number)
    logits = rows * vocabulary * number
    chosen = rows * vocabulary * 8 * (2 if decoding.sampled else 0)
    ordered = 2 * logits if decoding.draft_length else 0  # (zeros, and what is put there, made anew)
    head = max(multiply.linear(rows, config.d_model, vocabulary), logits + ordered + chosen)
    return max(_layers_bytes(config, rows, multiply) + read + masks, head + 3 * rows * config.d_model * number)


def _unpacked_bytes(config: ModelConfig, decoding: Decoding) -> int:
    """Of int4 weights as floats: of all that a step of few rows reads, whose rows choose different experts."""
    counted, number = count_parameters(config), getattr(torch, decoding.dtype).itemsize
    unread = 0.0
    if config.num_experts:
        idle = (1 - config.top_k / config.num_experts) ** decoding.rows
        experts = 3 * config.d_model * config.expert_d_ff * config.num_experts
        unread = idle * experts * sum(config.is_moe(layer) for layer in range(config.n_layers))
    return round((sum(counted.products) + counted.head - unread) * number)


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


def _noise_bytes(config: ModelConfig, decoding: Decoding) -> tuple[int, int]:
    """Of noise when it is drawn, and while it is."""
    if not decoding.sampled:
        return 0, 0
    at_once = decoding.rows * config.vocab_size
    numbers = at_once * max(decoding.draft_length + 1, min(MOST_AHEAD, MOST_NOISE // at_once))
    return numbers * 8, numbers * 8 * _NOISE_COPIES
