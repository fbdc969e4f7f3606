"""generate: prompts in, new tokens out, under any strategy.

Knows nothing of what a strategy does in a round. Next: `session.py`, then the strategies.
"""

import operator
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from layerskip_moe.generation.autoregressive import Autoregressive
from layerskip_moe.generation.sampling import Sampling
from layerskip_moe.generation.session import Session
from layerskip_moe.generation.statistics import GenerationStats
from layerskip_moe.generation.text import TextStream, unshown_token
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.nn.compiling import can_compile, compiling, is_watched
from layerskip_moe.nn.kernels import using_kernels
from layerskip_moe.nn.modes import evaluating
from layerskip_moe.refusals import require_index, shown
from layerskip_moe.special_tokens import end_of_text_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Strategy(Protocol):
    """What `generate` asks of a strategy: a check before, the prompts, and then one round at a time. What it keeps
    from round to round is the session's (`session.state`), so one object serves several generations at once.

    It may also have a method `prepare` of (model, rows, sampling), called before a batch of so many rows and before
    anything is timed, and a `draft_model`.
    """

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError where the model cannot be decoded this way."""

    def start(self, session: Session) -> None:
        """Run the prompts, in most cases by `session.prefill()`."""

    def step(self, session: Session) -> None:
        """One round: run layers, choose tokens, `session.append` them."""


@dataclass
class Generation:
    """What came out.

    Attributes:
        tokens: new token ids of each prompt, the stop token not included; where a stop string ended a row, up to
            the token that completed it
        text: the same decoded, when a tokenizer was given; where a stop string ended a row, all before it
        layers_run: for each new token, how many layers ran to choose it: its exit layer under early exit, and
            n_layers wherever the full model chose
        stats: the whole batch's counts and times
        row_stats: each prompt's
    """

    tokens: list[list[int]]
    text: list[str] | None
    layers_run: list[list[int]]
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
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_tokens: Collection[int] | None = None,
    stop_strings: Sequence[str] = (),
    tokenizer: "Tokenizer | None" = None,
    batch_size: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
    compile: bool = True,
) -> Generation:
    """Continue each prompt by up to max_new_tokens tokens.

    prompts:     lists of token ids of any lengths, at least one each; strings too when tokenizer is given, with the
                 special tokens that it puts around a text, such as Llama's begin of text
    strategy:    how to decode; None: Autoregressive()
    temperature, top_k, top_p, repetition_penalty, seed: see `Sampling`; temperature 0 (the default) is greedy
    stop_tokens: ids that end a row; None: the tokenizer's end of text when a tokenizer is given, else none
    stop_strings: texts that end a row, found also across the borders of tokens; they need a tokenizer
    batch_size:  prompts decoded together; None: all. The text does not depend on it: the noise of prompt r
                 is that of row r, however the prompts are grouped.
    on_token:    called as on_token(row, token) for every token of `Generation.tokens`, as soon as it is settled:
                 in order within a row, the rows of a batch in turn
    compile:     make decoding fast first: on a CPU compile kernels, seconds once per machine, and record steps; on a
                 GPU, where Triton is, compile blocks, once per process and kind of step, and capture steps as CUDA
                 graphs. What is recorded serves later calls: a model keeps its last cache, where that is at most a
                 quarter of its weights' size, or 64 MiB. False decodes at once, and several times slower;
                 it adds in another order, so that where two tokens tie the text may differ from the other's. A model
                 with hooks on its modules, or modules whose `forward` was replaced, is run step by step in any case, so
                 that they are called.

    The model is run in eval mode, and left in the mode it was in, whatever is raised meanwhile. Several threads may
    decode with one model, and one strategy, at once, each getting what it would get alone; train it meanwhile they may
    not. Raises ValueError for prompts that are empty, outside the vocabulary, or too long for max_seq_len together with
    max_new_tokens.
    """
    strategy = Autoregressive() if strategy is None else strategy
    if isinstance(strategy, str | type):
        raise ValueError(f"strategy={shown(strategy)} is not a strategy; give an object, such as Autoregressive().")
    sampling = Sampling(temperature, top_k, top_p, seed, repetition_penalty)
    strategy.check(model.config)
    encoded = _encode(prompts, tokenizer)
    check_prompts(encoded, model.config, max_new_tokens)
    if batch_size is not None:
        require_index("batch_size", batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be 1 or more.")
    if stop_tokens is None:
        stop_tokens = [] if tokenizer is None else end_of_text_ids(tokenizer)
    if isinstance(stop_tokens, int):
        raise ValueError(f"stop_tokens={stop_tokens} is one id; give a list, such as [{stop_tokens}].")
    if not isinstance(stop_tokens, Iterable) or not all(hasattr(token, "__index__") for token in stop_tokens):
        raise ValueError(f"stop_tokens={shown(stop_tokens)} is no list of token ids.")
    streams = _text_streams(stop_strings, tokenizer, len(encoded))

    result = Generation([], None, [], GenerationStats(), [])
    size = batch_size or len(encoded)
    # A draft model is one more to run in eval mode and to leave as it was.
    draft = getattr(strategy, "draft_model", None) or model
    prepare = getattr(strategy, "prepare", None)  # what is found out about a model once is no part of decoding
    compiles = compile and can_compile(model.device) and not (is_watched(model) or is_watched(draft))
    with evaluating(model), evaluating(draft), using_kernels(compile):
        for first in range(0, len(encoded), size):
            if prepare is not None:
                with compiling(model, compiles):
                    prepare(model, len(encoded[first : first + size]), sampling)
            start = now(model.device)
            session = Session(
                model,
                encoded[first : first + size],
                sampling,
                max_new_tokens=max_new_tokens,
                stop_tokens=stop_tokens,
                texts=streams[first : first + size] if streams else None,
                on_token=on_token,
                first_row=first,
            )
            strategy.start(session)
            filled = now(model.device)
            with compiling(model, compiles), compiling(draft, compiles):
                while not session.finished:
                    strategy.step(session)
            done = now(model.device)
            session.close()
            for stats in session.stats:
                stats.prefill_seconds, stats.decode_seconds = filled - start, done - filled
                result.stats.add_counts(stats)
            result.stats.prefill_seconds += filled - start
            result.stats.decode_seconds += done - filled
            result.tokens += session.outputs
            result.layers_run += session.layers_run
            result.row_stats += session.stats
    if tokenizer is not None:
        result.text = tokenizer.decode_batch(result.tokens)
        for row, stream in enumerate(streams):
            if stream.stopped:
                result.text[row] = stream.text
    return result


def _text_streams(stop_strings: Sequence[str], tokenizer: "Tokenizer | None", n_prompts: int) -> list[TextStream]:
    """A stream for each prompt where there are stop strings to look for."""
    if isinstance(stop_strings, str):
        raise ValueError(f"stop_strings is one string; give a list, such as [{shown(stop_strings)}].")
    if not isinstance(stop_strings, Iterable):
        raise ValueError(f"stop_strings={shown(stop_strings)} is no list of texts.")
    stop_strings = tuple(stop_strings)
    if not stop_strings:
        return []
    if tokenizer is None:
        raise ValueError("stop_strings are looked for in the text; give tokenizer= as well.")
    if not all(isinstance(stop, str) and stop for stop in stop_strings):
        raise ValueError("stop_strings holds something other than a text of at least one character; leave it out.")
    for stop in stop_strings:
        token = unshown_token(tokenizer, stop)
        if token is not None:
            raise ValueError(f"{stop!r} is a special token, which no text shows; give its id, {token}, in stop_tokens.")
    return [TextStream(tokenizer, stop_strings) for _ in range(n_prompts)]


def _encode(prompts: Sequence[Sequence[int] | str], tokenizer: "Tokenizer | None") -> list[list[int]]:
    if isinstance(prompts, str):
        raise ValueError("prompts is one string; give a list of prompts, such as [prompt].")
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts={shown(prompts)} is no list of prompts, such as [[1, 2, 3]].")
    encoded: list[list[int]] = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, int):
            raise ValueError(f"prompt {index} is the number {prompt}; give a list of prompts, such as [[1, 2, 3]].")
        if not isinstance(prompt, str):
            if not isinstance(prompt, Iterable):
                raise ValueError(f"prompt {index} is {shown(prompt)}; give token ids, such as [1, 2, 3].")
            try:
                encoded.append([operator.index(token) for token in prompt])
            except TypeError as error:
                raise ValueError(f"prompt {index} holds something other than token ids ({error}).") from None
        elif tokenizer is None:
            raise ValueError(f"prompt {index} is a string; give tokenizer= as well, or token ids.")
        else:
            encoded.append(tokenizer.encode(prompt).ids)
    return encoded


def check_prompts(prompts: Sequence[Sequence[int]], config: ModelConfig, max_new_tokens: int) -> None:
    """Raise ValueError where `generate` would: no prompts, an empty one, one with ids outside the vocabulary, or
    one too long for max_seq_len together with max_new_tokens."""
    if not prompts:
        raise ValueError("there are no prompts; give at least one.")
    require_index("max_new_tokens", max_new_tokens)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more.")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; give at least one token, such as the end of text.")
        outside = [token for token in prompt if not 0 <= token < config.vocab_size]
        if outside:
            raise ValueError(
                f"prompt {index} holds token id {shown(outside[0])}, but the vocabulary has ids 0 to "
                f"{config.vocab_size - 1}."
            )
        if len(prompt) + max_new_tokens > config.max_seq_len:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, which with max_new_tokens={max_new_tokens} is past "
                f"max_seq_len={config.max_seq_len}; shorten either, or build the model with a larger max_seq_len."
            )


def now(device: torch.device) -> float:
    """Seconds, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
