"""Routing with memory: experts chosen by the router's logits of the last few positions, not of one alone.

Neighbouring tokens then go to more of the same experts, of which a verification reads the union. With r_p the logits
of position p of a text, a = `router_average` and h = `router_hold`, what p is routed by is

    m_s = sum_j a^j r_(s-j) / sum_j a^j,    s = h floor(p / h),    j = 0 .. min(s, WINDOW - 1)

which is r_p where a = 0 and h = 1. A window, and not a running average without end: it is the same numbers, summed in
the same order, however many positions are computed at once and wherever a text is taken up again. What lies behind it
weighed a^WINDOW of all at most: 0.4% at a = 0.5, 6% at 0.7, 43% at 0.9.

B batch, T positions, N tokens, E experts. Knows nothing of routers. Next: `router.py`; `cache.py`, which keeps r;
`few_rows.py`, which has the formula for positions in a cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 8


def window_weights(average: float) -> list[float]:
    """a^j of the positions j = 0, 1, ... back that count; without an average, only of a position itself."""
    return [average**back for back in range(WINDOW if average else 1)]


def recall_text(logits: Tensor, weights: list[float], hold: int) -> Tensor:
    """r [B, T, E] of whole texts, from their first position on -> m [B, T, E]. Gradients pass."""
    length = logits.shape[1]
    positions = torch.arange(length, device=logits.device)[:, None]
    total, share = torch.zeros_like(logits), logits.new_zeros(length, 1)
    for back, weight in enumerate(weights):
        total = total + weight * F.pad(logits, (0, 0, back, 0))[:, :length]
        share = share + (positions >= back).to(logits.dtype) * weight
    mean = total / share
    return mean[:, ::hold, None].expand(-1, -1, hold, -1).flatten(1, 2)[:, :length]
