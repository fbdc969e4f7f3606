"""How well an exit tells by itself whether the last layer agrees: by its margin, and by its probability.

Of a place where they agree and one where they do not, drawn at random, the area under the ROC curve is how often the
first has the larger number; one half tells nothing.

L layers, T tokens of a text. Knows nothing of policies. Next: `trace.py`, where the numbers come from;
`nn/ragged.py`, where margins decide.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from layerskip_moe.analysis.trace import Array, TracedText


def told_by_margin(texts: Sequence[TracedText]) -> list[dict[str, Any]]:
    """By exit layer, over the places that the model wrote: `agreement`, the share at which it says what the last layer
    says, and the areas under the ROC curves `by_margin` and `by_probability`; None where all or no places agree."""
    own = [slice(text.prompt_length - 1, None) for text in texts]
    agreement, margin, confidence = (
        np.concatenate([getattr(text, name)[:, part] for text, part in zip(texts, own, strict=True)], axis=1)
        for name in ("agreement", "margin", "confidence")
    )
    return [
        {
            "exit_layer": layer + 1,
            "agreement": float(agreement[layer].mean()),
            "by_margin": area_under_roc(agreement[layer], margin[layer]),
            "by_probability": area_under_roc(agreement[layer], confidence[layer]),
        }
        for layer in range(len(agreement) - 1)
    ]


def area_under_roc(right: Array, score: Array) -> float | None:
    """Of bool [N] and numbers [N], by ranks (Mann and Whitney 1947); equal numbers count half. None of one kind."""
    n_right, n_wrong = int(right.sum()), int((~right).sum())
    if not n_right or not n_wrong:
        return None
    _, which, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return float((ranks[right].sum() - n_right * (n_right + 1) / 2) / (n_right * n_wrong))
