"""What leaving early saves and costs: dynamic early exit (CALM, arXiv 2207.07061) on held-out text, for many
thresholds at once.

L layers, D width, V vocabulary, N positions, C layers at which a token may stop (the allowed exits, then L).
Knows nothing of decoding or clocks. Next: `generation/confidence.py`, how sure an exit is;
`generation/early_exit.py`, which decodes by it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from layerskip_moe.analysis.held_out import chunks, held_out_runs, judge
from layerskip_moe.generation.confidence import Confidence, check_confidence, confidence_of, first_exit
from layerskip_moe.generation.exit_classifier import ExitClassifier
from layerskip_moe.nn import MoEDecoder


@dataclass(frozen=True)
class EarlyExitEvaluation:
    """Results on the same text: entry i of the first four lists belongs to thresholds[i], entry n - 1 of the
    confidences to exit layer n.

    Attributes:
        thresholds: as they were asked for
        mean_layers: layers run per token, 1 to L
        perplexity: exp of the mean cross entropy per token, in nats, each token scored by the exit it took
        agreement: share of positions, 0 to 1, where the most likely token of the exit taken is the last layer's
        exits: how many tokens left after layer 1..L
        confidence_mean: mean over all positions, whether or not a token would have got that far; None where no exit
            is allowed: before the first one, and at layer L, where nothing is left to decide
        confidence_low: first quartile of the same
        confidence_high: third quartile of the same
        tokens: how many predictions these are means of
    """

    thresholds: list[float]
    mean_layers: list[float]
    perplexity: list[float]
    agreement: list[float]
    exits: list[list[int]]
    confidence_mean: list[float | None]
    confidence_low: list[float | None]
    confidence_high: list[float | None]
    tokens: int


@dataclass(frozen=True)
class _Opinions:
    """What each layer a token may stop at makes of N positions.

    Attributes:
        confidence: [C - 1, N], of the allowed exits; L needs none
        loss: [C, N] float32, cross entropy in nats
        choice: [C, N], the most likely token
    """

    confidence: Tensor
    loss: Tensor
    choice: Tensor


def evaluate_early_exit(
    model: MoEDecoder,
    tokens: Tensor,
    *,
    thresholds: Sequence[float],
    confidence: Confidence = "softmax_diff",
    min_layer: int = 1,
    seq_len: int,
    batch_size: int,
    max_windows: int | None = None,
    progress: bool = True,
) -> EarlyExitEvaluation:
    """Let each position of held-out text (1-D token ids) leave at the first layer that is confident enough.

    A position's exit is the first layer n, min_layer <= n < L, whose confidence is at least the threshold, else L.
    A threshold of 1 or more never exits; of 0 or less, at the first allowed layer whatever the confidence. By
    "state", layer 1 is not allowed: it compares the outputs of two layers. A function is given the embedding as
    layer 1's `previous`.

    The text before a position is the true one, and its hidden states went through all layers: what
    `EarlyExit(threshold, cache="exact")` decides while it decodes that text, up to rounding. (cache="propagate"
    attends to approximate states, and its decisions may differ.)

    One pass through the layers serves all thresholds, and only one chunk of one layer's logits is held at a time;
    for the quartiles, one float per position and allowed exit is kept. Windows, the model's mode and the errors are
    those of `evaluate_exits`; ValueError too for no threshold or one that is no number, an unknown confidence, and a
    min_layer outside 1..L.
    """
    n_layers = model.config.n_layers
    if not thresholds or any(math.isnan(threshold) for threshold in thresholds):
        raise ValueError(f"thresholds={list(thresholds)} must be one or more numbers, such as [0.5, 0.9, 1.0].")
    if not 1 <= min_layer <= n_layers:
        raise ValueError(f"min_layer={min_layer} must be between 1 and n_layers={n_layers}.")
    check_confidence(confidence)
    if isinstance(confidence, ExitClassifier):
        confidence.check(model.config)
    first = min(first_exit(confidence, min_layer), n_layers)
    loss = torch.zeros(len(thresholds), dtype=torch.float64)
    agreed = torch.zeros(len(thresholds), dtype=torch.int64)
    left = torch.zeros(len(thresholds), n_layers + 1 - first, dtype=torch.int64)  # by exit: first..L
    confidences = []
    with held_out_runs(
        model,
        tokens,
        seq_len=seq_len,
        batch_size=batch_size,
        max_windows=max_windows,
        progress=progress,
        description="evaluating early exit",
        collect=True,
    ) as batches:
        for inputs, labels, out in batches:
            states = [model.embed(inputs), *(out.collected[layer] for layer in range(n_layers))]
            asked = [state.flatten(0, 1) for state in states[first - 1 :]]
            for *hidden, answers in chunks(model, *asked, labels.flatten()):
                opinions = _ask_layers(model, hidden, answers, confidence, first)
                confidences.append(opinions.confidence.float().cpu())
                for index, threshold in enumerate(thresholds):
                    taken = _exits_taken(opinions.confidence, threshold)
                    # Summed on the CPU, because not every accelerator has float64.
                    loss[index] += opinions.loss.gather(0, taken[None]).cpu().double().sum()
                    agreed[index] += (opinions.choice.gather(0, taken[None])[0] == opinions.choice[-1]).sum().cpu()
                    left[index] += torch.bincount(taken.cpu(), minlength=left.shape[1])
    n_tokens = int(left[0].sum())
    layers = torch.arange(first, n_layers + 1, dtype=torch.float64)
    by_layer = torch.cat(confidences, dim=1).numpy()
    low, high = np.quantile(by_layer, [0.25, 0.75], axis=1).tolist()

    def over_all_layers(allowed: list[float]) -> list[float | None]:
        return [*[None] * (first - 1), *allowed, None]

    return EarlyExitEvaluation(
        thresholds=list(thresholds),
        mean_layers=((left.double() @ layers) / n_tokens).tolist(),
        perplexity=(loss / n_tokens).exp().tolist(),
        agreement=(agreed.double() / n_tokens).tolist(),
        exits=[[*[0] * (first - 1), *counts] for counts in left.tolist()],
        confidence_mean=over_all_layers(by_layer.mean(axis=1, dtype=np.float64).tolist()),
        confidence_low=over_all_layers(low),
        confidence_high=over_all_layers(high),
        tokens=n_tokens,
    )


def _ask_layers(
    model: MoEDecoder, hidden: list[Tensor], labels: Tensor, confidence: Confidence, first: int
) -> _Opinions:
    """hidden: C + 1 states [N, D], from before the first allowed exit to after layer L; labels [N]."""
    sure, opinions = [], []
    for place in range(1, len(hidden)):
        logits = model.unembed(hidden[place])
        if place < len(hidden) - 1:
            layer = first - 1 + place
            sure.append(confidence_of(confidence, hidden[place], hidden[place - 1], logits, layer=layer))
        opinions.append(judge(logits, labels))
    loss, choice = (torch.stack(part) for part in zip(*opinions, strict=True))
    return _Opinions(torch.stack(sure) if sure else loss[:0], loss, choice)


def _exits_taken(confidence: Tensor, threshold: float) -> Tensor:
    """confidence [C - 1, N] -> [N]: the first row that reaches the threshold, C - 1 where none does."""
    if threshold >= 1.0:
        leaves = torch.zeros_like(confidence, dtype=torch.bool)
    elif threshold <= 0.0:
        leaves = torch.ones_like(confidence, dtype=torch.bool)
    else:
        leaves = confidence >= threshold
    return (~leaves).long().cumprod(dim=0).sum(dim=0)  # how many layers were passed before one was left by
