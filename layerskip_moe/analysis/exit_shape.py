"""The shape of per-layer thresholds: how far below 1 each layer's threshold lies, against the others'.

An exit layer that is right wherever it is halfway confident may be trusted sooner than one that is often wrong. One
number certified by `learn_then_test.py` scales them all: threshold_n = 1 - shape_n (1 - scale). At scale 1 nobody
leaves; a shape of 1 at every layer is CALM's one threshold for all, the scale itself.

C layers at which a token may stop (the allowed exits, then L), N positions.
Knows nothing of models and promises nothing: shapes are chosen on one set of sequences, and certified on another.
Next: `calibrate.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_TARGETS = 40  # error rates tried; the finest is a tenth of the tolerance


def spaced_exits(first: int, n_layers: int, count: int | None) -> list[int]:
    """At most `count` of the exit layers first..L-1, evenly spaced; None: all of them."""
    layers = list(range(first, n_layers))
    if count is None or count >= len(layers):
        return layers
    return [first - 1 + round((n_layers - first + 1) * place / (count + 1)) for place in range(1, count + 1)]


def thresholds_at(shape: Sequence[float], scale: float) -> tuple[float, ...]:
    """The thresholds of a shape (each 0 to 1) at a scale (0 to 1)."""
    return tuple(1 - depth * (1 - scale) for depth in shape)


def choose_shape(confidence: Tensor, harm: Tensor, tolerance: float) -> list[float]:
    """One number for each of C - 1 exits, 0 (never leave here) to 1.

    confidence [C - 1, N]; harm [C - 1, N]: the loss at a position if it is left there, less the full model's.

    For an error rate a, layer n's threshold is the least at which the mean harm of the positions that reach it is at
    most a. Of several rates the one is taken by which positions leave soonest (each at its first layer that reaches
    its threshold) while the mean harm of all N is within the tolerance. At scale 0 these are the thresholds.
    """
    exits, n = confidence.shape
    best, fewest = [0.0] * exits, float(exits)
    curves = [_curve(confidence[layer], harm[layer]) for layer in range(exits)]
    for rate in (tolerance * step / 10 for step in range(_TARGETS)):
        levels = torch.tensor([_least(levels, means, rate) for levels, means in curves]).clamp(min=0)
        stays = (confidence < levels[:, None]).long().cumprod(dim=0)  # [C - 1, N]: not left up to here
        taken = stays.sum(dim=0)  # [N], C - 1: at layer L
        suffered = torch.cat([harm, torch.zeros(1, n)]).gather(0, taken[None]).double().mean()
        if suffered <= tolerance and taken.double().mean() < fewest:
            best, fewest = (1 - levels.clamp(max=1)).tolist(), float(taken.double().mean())
    return best


def _curve(confidence: Tensor, harm: Tensor) -> tuple[Tensor, Tensor]:
    """Of confidences and harms [N]: the different confidences, falling, and the mean harm of all at each or above."""
    levels, which = confidence.double().unique(return_inverse=True)  # rising
    counts = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, which, torch.ones(len(which)).double())
    sums = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, which, harm.double())
    levels, counts, sums = levels.flip(0), counts.flip(0), sums.flip(0)
    return levels, sums.cumsum(0) / counts.cumsum(0)


def _least(levels: Tensor, means: Tensor, rate: float) -> float:
    """The least level with a mean harm of at most `rate`; 1 where there is none."""
    within = (means <= rate).nonzero()
    return float(levels[within[-1, 0]]) if len(within) else 1.0
