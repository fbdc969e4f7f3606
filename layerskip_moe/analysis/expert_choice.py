"""What each expert is chosen for: its most typical tokens, and how much the choice depends on the token alone.

E experts, K chosen, U different tokens in the text. For one layer, over N positions: n(t) positions hold token t,
c(t, e) of them go to expert e, and e gets c(e) of all N.
Knows nothing of how even the load is. Next: `expert_use.py`, which measures that.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from layerskip_moe.analysis.held_out import held_out_runs
from layerskip_moe.data import steps_per_epoch
from layerskip_moe.nn import MoEDecoder

_MIN_COUNT = 10  # positions that must hold a token before it can be typical of anything
_STANDARD_ERRORS = 3.0  # below the measured share: among thousands of tokens, two would be reached by chance


class Detokenizer(Protocol):
    """The one thing asked of a tokenizer."""

    def decode(self, ids: list[int], /) -> str:
        """Token ids to text."""


@dataclass(frozen=True)
class TypicalToken:
    """A token that an expert is chosen for more than for others.

    Attributes:
        text: the token decoded by itself; "<id>" where that gives nothing, as for special tokens
        share: P(expert chosen | token) = c(t, e) / n(t), 0 to 1
        lift: P(token | expert) / P(token) = share / (c(e) / N), above 1
        count: n(t), positions that hold the token
    """

    text: str
    share: float
    lift: float
    count: int


@dataclass(frozen=True)
class LayerChoice:
    """What one layer's router goes by.

    Attributes:
        token_dependence: share of the second half's (token, choice) pairs, 0 to 1, that are foreseen by the token id
            alone, from the first half; see `expert_choice`
        chance: the same, foreseen without even the token id
        experts: each expert's most typical tokens, best first; fewer than asked for, or none, where there are no more
    """

    token_dependence: float
    chance: float
    experts: list[list[TypicalToken]]


@dataclass(frozen=True)
class ExpertChoice:
    """Keyed by the index (0..L-1) of the layers that hold experts; empty for a dense model.

    Attributes:
        layers: layer index -> its LayerChoice
        tokens: how many tokens were routed
    """

    layers: dict[int, LayerChoice]
    tokens: int


def expert_choice(
    model: MoEDecoder,
    tokens: Tensor,
    tokenizer: Detokenizer,
    *,
    seq_len: int,
    batch_size: int,
    max_windows: int | None = None,
    top: int = 8,
    progress: bool = True,
) -> ExpertChoice:
    """What the routers choose experts for, on held-out text (1-D token ids), in evaluation mode.

    Typical tokens: the `top` tokens with the highest lower bound of their share,

        bound(p, n) = (p + z^2 / 2n - z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),
        p = c(t, e) / n(t), n = n(t), z = 3

    (Wilson's interval), among the tokens found at least 10 times whose bound is above c(e) / N, the expert's share
    of any token. Within an expert, ranking by lift is ranking by share, which a token seen twice can win by chance;
    the bound asks of a rare token what its few positions can prove.

    Token dependence: on the second half of the windows, the share of (token, choice) pairs that fall on the K
    experts that this token id went to most often in the first half; for a token unseen there, the layer's K most
    loaded experts of the first half, which also settle ties. `chance` takes those K for every token. Measured on
    other text than it was learnt from, so a small sample cannot inflate it. The idea is OpenMoE's
    context-independent specialisation (arXiv 2402.01739).

    The text is cut into windows as in `evaluate_exits`, with the same errors, and the model's training mode is put
    back; ValueError too for fewer than two windows and for top below 1. 8 U E bytes of counts are held per layer.
    """
    config = model.config
    if top < 1:
        raise ValueError(f"top={top} is a number of tokens per expert and must be at least 1.")
    n_windows = steps_per_epoch(tokens, seq_len, 1)
    if max_windows is not None:
        n_windows = min(n_windows, max_windows)
    if n_windows < 2:
        raise ValueError(
            "Token dependence is learnt on one half of the windows and tested on the other, but there are "
            f"{n_windows}: use at least two, by a longer text, a smaller seq_len or a larger max_windows."
        )
    # Counted by place among the ids that occur, which are few beside a large vocabulary.
    ids, seen = tokens[: n_windows * seq_len].cpu().long().unique(return_counts=True)
    layers = [layer for layer in range(config.n_layers) if config.is_moe(layer)]
    counts = {layer: torch.zeros(2, len(ids), config.num_experts, dtype=torch.int32) for layer in layers}
    window = 0
    with held_out_runs(
        model,
        tokens,
        seq_len=seq_len,
        batch_size=batch_size,
        max_windows=n_windows,
        progress=progress,
        description="what experts are chosen for",
    ) as batches:
        for inputs, _, out in batches:
            half = (torch.arange(window, window + len(inputs)) >= n_windows // 2).long()
            row = half[:, None] * len(ids) + torch.searchsorted(ids, inputs.cpu())
            for layer, routing in out.routing.items():
                place = (row.flatten()[:, None] * config.num_experts + routing.chosen.cpu()).flatten()
                counts[layer].view(-1).scatter_add_(0, place, torch.ones_like(place, dtype=torch.int32))
            window += len(inputs)
    texts = [tokenizer.decode([token]) or f"<{token}>" for token in ids.tolist()]
    described = {layer: _describe(halves, seen, texts, config.top_k, top) for layer, halves in counts.items()}
    return ExpertChoice(described, tokens=n_windows * seq_len)


def _describe(halves: Tensor, seen: Tensor, texts: list[str], top_k: int, top: int) -> LayerChoice:
    """halves [2, U, E]: choices in each half of the text; seen [U]: positions in both, texts: U decoded tokens."""
    token_dependence, chance = _foreseen(halves[0].double(), halves[1].double(), top_k)
    chosen, n = halves.sum(dim=0).double(), seen.double()[:, None]
    share, usual = chosen / n, chosen.sum(dim=0) / n.sum()
    bound = _lower_bound(share, n)
    typical = (n >= _MIN_COUNT) & (bound > usual) & (share > usual)  # rounding can lift a bound of 0 above 0
    experts = []
    for expert in range(halves.shape[-1]):
        places = typical[:, expert].nonzero()[:, 0]
        best = places[bound[places, expert].argsort(descending=True, stable=True)][:top].tolist()
        experts.append(
            [
                TypicalToken(
                    text=texts[token],
                    share=float(share[token, expert]),
                    lift=float(share[token, expert] / usual[expert]),
                    count=int(seen[token]),
                )
                for token in best
            ]
        )
    return LayerChoice(token_dependence, chance, experts)


def _foreseen(first: Tensor, second: Tensor, top_k: int) -> tuple[float, float]:
    """(token dependence, chance) of the choices second [U, E], foreseen from first [U, E]; both float64."""
    load = first.sum(dim=0)
    # Below 1, the load only decides between counts that are equal: also all zero, of a token not seen.
    foreseen = _best(first + load / (load.sum() + 1), top_k)
    total = second.sum()
    token_dependence = second.gather(1, foreseen).sum() / total
    chance = second[:, _best(load, top_k)].sum() / total
    return float(token_dependence), float(chance)


def _best(counts: Tensor, top_k: int) -> Tensor:
    """[..., E] -> [..., K] int64: the largest counts' places, the lower place first where they are equal."""
    return counts.argsort(dim=-1, descending=True, stable=True)[..., :top_k]


def _lower_bound(share: Tensor, n: Tensor) -> Tensor:
    """The lower end of Wilson's interval for shares [U, E] of n [U, 1] positions."""
    z2 = _STANDARD_ERRORS**2
    spread = (share * (1 - share) / n + z2 / (4 * n**2)).sqrt()
    return (share + z2 / (2 * n) - _STANDARD_ERRORS * spread) / (1 + z2 / n)
