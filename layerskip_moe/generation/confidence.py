"""How sure an exit is of its next token: the measures by which dynamic early exit decides (CALM, arXiv
2207.07061, section 3.5).

N states, D width, V vocabulary. `hidden` is the state after some layer, `previous` the state one layer before,
`logits` the head's opinion of `hidden`, before temperature and repetition penalty. A confidence is at most 1, where
1 is sure.
Knows nothing of thresholds. Next: `early_exit.py`, which compares; `exit_classifier.py`, a measure that is trained;
`analysis/early_exit.py`, which measures.
"""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from layerskip_moe.generation.exit_classifier import ExitClassifier
from layerskip_moe.refusals import shown

# A name, trained probes, or a function of (hidden [N, D], previous [N, D], logits [N, V]) to confidences [N].
Confidence = Literal["softmax_diff", "state"] | ExitClassifier | Callable[[Tensor, Tensor, Tensor], Tensor]


def softmax_diff(logits: Tensor) -> Tensor:
    """[..., V] -> [...]: the most likely token's probability less the second's, 0 to 1."""
    first, second = logits.float().softmax(dim=-1).topk(2, dim=-1).values.unbind(-1)
    return first - second


def state_similarity(previous: Tensor, hidden: Tensor) -> Tensor:
    """[..., D] twice -> [...]: the cosine between the states before and after a layer, -1 to 1: a state that no
    longer moves is taken for the last one."""
    return F.cosine_similarity(previous.float(), hidden.float(), dim=-1)


def asks_head(kind: Confidence) -> bool:
    """Whether a confidence is made from logits."""
    return kind != "state" and not isinstance(kind, ExitClassifier)


def asks_previous(kind: Confidence) -> bool:
    """Whether a confidence is made from the state one layer before, too."""
    return kind != "softmax_diff" and not isinstance(kind, ExitClassifier)


def confidence_of(
    kind: Confidence, hidden: Tensor, previous: Tensor | None, logits: Tensor | None, *, layer: int
) -> Tensor:
    """Confidences [N] of states hidden [N, D] after the first `layer` layers; logits may be None unless `asks_head`,
    and previous unless `asks_previous`. Raises ValueError for a function that returns another shape."""
    if isinstance(kind, ExitClassifier):
        return kind.confidence(hidden, layer)
    if kind == "softmax_diff":
        assert logits is not None, "only the cosine and the probes do without the head"
        return softmax_diff(logits)
    assert previous is not None, "only the head's opinion and the probes do without it"
    if kind == "state":
        return state_similarity(previous, hidden)
    assert callable(kind) and logits is not None, "check_confidence refuses other names"
    found = kind(hidden, previous, logits)
    if found.shape != hidden.shape[:1]:
        raise ValueError(
            f"the confidence function returned shape {list(found.shape)} for {len(hidden)} states; "
            "it must return one number for each."
        )
    return found


def check_confidence(kind: Confidence) -> None:
    """Raise ValueError for a name that is not known."""
    if not callable(kind) and not isinstance(kind, ExitClassifier) and kind not in ("softmax_diff", "state"):
        raise ValueError(
            f"confidence={shown(kind)} is unknown; it is 'softmax_diff', 'state', or a function of "
            "(hidden, previous, logits), or what load_classifier(path) gives."
        )


def first_exit(kind: Confidence, min_layer: int) -> int:
    """The first exit layer that may be taken: min_layer, but not layer 1 by "state", which compares the outputs of
    two layers."""
    return max(min_layer, 2) if kind == "state" else min_layer
