"""Is what was generated what the full model would say? Its perplexity, and its agreement with, any continuation.

N output tokens, D width, V vocabulary. A lossy way to decode needs this beside its speed: text that the full model
finds unlikely was not that model's. (Low perplexity alone praises loops: see `repetition.py`.)
Knows nothing of how the text was made. Next: `bench/decoding.py`, which times strategies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip_moe.analysis.held_out import chunks, judge, run_layers
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.nn.modes import evaluating


@dataclass(frozen=True)
class ContinuationScore:
    """How a set of outputs looks to the full model.

    Attributes:
        perplexity: exp of the mean cross entropy per output token, in nats, at temperature 1; nan without tokens
        agreement: share of output tokens, 0 to 1, that are the model's most likely one after the same text; nan
            without tokens
        tokens: how many output tokens these are means of
    """

    perplexity: float
    agreement: float
    tokens: int


def score_continuations(
    model: MoEDecoder,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
) -> ContinuationScore:
    """Score outputs[i], token ids that were generated after prompts[i], under all layers of the model.

    Prompts and outputs may have any lengths; an empty output counts for nothing. Every token weighs the same, so a
    long output weighs more than a short one. One pass over batch_size rows at a time, padded on the right, and only
    one chunk of logits is held. The model's training mode is put back.

    Greedy decoding agrees with itself in full, but for ties within the rounding between decoding with a cache and
    without. Raises ValueError for other than one output per prompt, an empty prompt, token ids outside the
    vocabulary, text beyond max_seq_len, and a batch_size below 1.
    """
    rows = _check_rows(model.config, prompts, outputs, batch_size)
    loss, agreed, n_tokens = 0.0, 0, 0
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            inputs, labels = (part.to(model.device) for part in _pad(rows[start : start + batch_size]))
            scored = labels >= 0
            hidden = run_layers(model, inputs).hidden[scored]
            for part, answers in chunks(model, hidden, labels[scored]):
                nats, choice = judge(model.unembed(part), answers)
                # Summed on the CPU, because not every accelerator has float64.
                loss += float(nats.cpu().double().sum())
                agreed += int((choice == answers).sum())
                n_tokens += len(answers)
    if not n_tokens:
        return ContinuationScore(math.nan, math.nan, 0)
    perplexity = float(torch.tensor(loss / n_tokens, dtype=torch.float64).exp())  # inf, where math.exp would raise
    return ContinuationScore(perplexity, agreed / n_tokens, n_tokens)


def _check_rows(
    config: ModelConfig, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], batch_size: int
) -> list[tuple[list[int], list[int]]]:
    """(prompt, output) of every row that has an output; ValueError as `score_continuations` says."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more.")
    if len(prompts) != len(outputs):
        raise ValueError(f"There are {len(prompts)} prompts and {len(outputs)} outputs; give one output per prompt.")
    rows = [(list(prompt), list(output)) for prompt, output in zip(prompts, outputs, strict=True)]
    for index, (prompt, output) in enumerate(rows):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; an output is scored after a prompt of at least one token.")
        outside = [token for token in prompt + output if not 0 <= token < config.vocab_size]
        if outside:
            raise ValueError(
                f"row {index} holds token id {outside[0]}, but the vocabulary has ids 0 to {config.vocab_size - 1}."
            )
    return [row for row in rows if row[1]]


def _pad(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Inputs [B, T] and labels [B, T], -1 where nothing is scored: within prompts and after the end.

    Attention is causal and experts have no capacity, so padding after a row's end changes nothing before it.
    """
    length = max(len(prompt) + len(output) for prompt, output in rows) - 1
    inputs = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full((len(rows), length), -1)
    for row, (prompt, output) in enumerate(rows):
        text = torch.tensor(prompt + output)
        inputs[row, : len(text) - 1] = text[:-1]
        labels[row, len(prompt) - 1 : len(text) - 1] = text[len(prompt) :]
    return inputs, labels
