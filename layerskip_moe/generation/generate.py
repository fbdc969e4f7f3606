"""generate: prompts in, new tokens out, under any strategy.

Knows nothing of what a strategy does in a round. Next: `session.py`, then the strategies.
"""

import operator
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from layerskip_moe.generation.autoregressive import Autoregressive
from layerskip_moe.generation.sampling import Sampling
from layerskip_moe.generation.session import Session
from layerskip_moe.generation.statistics import GenerationStats
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.nn.modes import evaluating

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# How the usual families spell the token that ends a text; the first one a tokenizer knows is taken.
# (The same list as in data/tokenizer.py, which this room does not know; a test compares them.)
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>", "<|im_end|>")


class Strategy(Protocol):
    """What `generate` asks of a strategy: a check before, and one round at a time."""

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError where the model cannot be decoded this way."""

    def step(self, session: Session) -> None:
        """One round: run layers, choose tokens, `session.append` them."""


@dataclass
class Generation:
    """What came out.

    tokens:    new token ids of each prompt, the stop token not included
    text:      the same decoded, when a tokenizer was given
    stats:     the whole batch's counts and times; row_stats: each prompt's
    """

    tokens: list[list[int]]
    text: list[str] | None
    stats: GenerationStats
    row_stats: list[GenerationStats]


def generate(
    model: MoEDecoder,
    prompts: Sequence[Sequence[int]] | Sequence[str],
    strategy: Strategy | None = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_tokens: Collection[int] | None = None,
    tokenizer: "Tokenizer | None" = None,
    batch_size: int | None = None,
) -> Generation:
    """Continue each prompt by up to max_new_tokens tokens.

    prompts:     lists of token ids of any lengths, at least one each; strings too when tokenizer is given
    strategy:    how to decode; None: Autoregressive()
    temperature, top_k, top_p, seed: see `Sampling`; temperature 0 (the default) is greedy
    stop_tokens: ids that end a row; None: the tokenizer's end of text when a tokenizer is given, else none
    batch_size:  prompts decoded together; None: all. The text does not depend on it: the noise of prompt r
                 is that of row r, however the prompts are grouped.

    The model is run in eval mode, and left in the mode it was in. Raises ValueError for prompts that are
    empty, outside the vocabulary, or too long for max_seq_len together with max_new_tokens.
    """
    strategy = Autoregressive() if strategy is None else strategy
    sampling = Sampling(temperature, top_k, top_p, seed)
    strategy.check(model.config)
    encoded = _encode(prompts, tokenizer)
    check_prompts(encoded, model.config, max_new_tokens)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more.")
    if stop_tokens is None:
        stop_tokens = [] if tokenizer is None else _end_of_text(tokenizer)

    tokens: list[list[int]] = []
    row_stats: list[GenerationStats] = []
    total = GenerationStats()
    size = batch_size or len(encoded)
    with evaluating(model):
        for first in range(0, len(encoded), size):
            start = _now(model)
            session = Session(
                model,
                encoded[first : first + size],
                sampling,
                max_new_tokens=max_new_tokens,
                stop_tokens=stop_tokens,
                first_row=first,
            )
            filled = _now(model)
            while not session.finished:
                strategy.step(session)
            done = _now(model)
            for stats in session.stats:
                stats.prefill_seconds, stats.decode_seconds = filled - start, done - filled
                total.add_counts(stats)
            total.prefill_seconds += filled - start
            total.decode_seconds += done - filled
            tokens += session.outputs
            row_stats += session.stats
    text = None if tokenizer is None else tokenizer.decode_batch(tokens)
    return Generation(tokens, text, total, row_stats)


def _encode(prompts: Sequence[Sequence[int] | str], tokenizer: "Tokenizer | None") -> list[list[int]]:
    if isinstance(prompts, str):
        raise ValueError("prompts is one string; give a list of prompts, such as [prompt].")
    encoded: list[list[int]] = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, int):
            raise ValueError(f"prompt {index} is the number {prompt}; give a list of prompts, such as [[1, 2, 3]].")
        if not isinstance(prompt, str):
            encoded.append([operator.index(token) for token in prompt])
        elif tokenizer is None:
            raise ValueError(f"prompt {index} is a string; give tokenizer= as well, or token ids.")
        else:
            encoded.append(tokenizer.encode(prompt, add_special_tokens=False).ids)
    return encoded


def check_prompts(prompts: Sequence[Sequence[int]], config: ModelConfig, max_new_tokens: int) -> None:
    """Raise ValueError where `generate` would: no prompts, an empty one, one with ids outside the vocabulary, or
    one too long for max_seq_len together with max_new_tokens."""
    if not prompts:
        raise ValueError("there are no prompts; give at least one.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more.")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; give at least one token, such as the end of text.")
        outside = [token for token in prompt if not 0 <= token < config.vocab_size]
        if outside:
            raise ValueError(
                f"prompt {index} holds token id {outside[0]}, but the vocabulary has ids 0 to {config.vocab_size - 1}."
            )
        if len(prompt) + max_new_tokens > config.max_seq_len:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, which with max_new_tokens={max_new_tokens} is past "
                f"max_seq_len={config.max_seq_len}; shorten either, or build the model with a larger max_seq_len."
            )


def _end_of_text(tokenizer: "Tokenizer") -> list[int]:
    ids = (tokenizer.token_to_id(name) for name in END_OF_TEXT_NAMES)
    return [token for token in ids if token is not None][:1]


def _now(model: MoEDecoder) -> float:
    """Seconds, after the device has finished what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
