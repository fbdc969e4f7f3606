"""Keeping experts busy: the losses on routers' logits, the loss-free bias step, and the metrics of balance.

Everything is for one MoE layer; callers average over layers. (Pooling layers first would let the imbalance of
one cancel that of another.) N counts the tokens the layer saw, which layer dropout can make zero.

Where a batch is split over R processes, each divides what its own tokens add by the mean number that a process has,
over all of them, and not by its own N: the mean of their losses, and of the gradients, is then that of the whole batch.

Knows nothing of how tokens were routed. Next: `nn/router.py` produces the logits, choices and loads.
"""

import math

import torch
from torch import Tensor


def load_balance_loss(logits: Tensor, chosen: Tensor, load: Tensor | None = None) -> Tensor:
    """The Switch Transformer's balance loss (arXiv 2101.03961, section 2.2): E sum_i f_i P_i, a scalar.

    logits [N, E]: the router's, before its softmax. chosen [N, K]: the experts that each token went to.
    f_i = count_i / (N K) is the share of choices that expert i got and carries no gradient; P_i, its mean
    softmax probability, carries all of it. Exactly 1 when choices or probabilities are even, up to E / K when
    the router collapses; the weight is the caller's. Experts whose logits are -inf (expert dropout) take no
    part: E is then the number of active ones, so that even use of those is 1 again. Without tokens, 0.
    load [E]: count_i as the mean over processes; None: in chosen.
    """
    n_tokens, n_experts = logits.shape
    if n_tokens == 0:
        return logits.sum()  # 0, still attached to the graph
    if load is None:
        choices = chosen.flatten()
        load = torch.zeros(n_experts, dtype=torch.int64, device=logits.device)
        load.scatter_add_(0, choices, torch.ones_like(choices))
    load = load.to(logits.dtype)
    share = load / load.sum()
    probability = logits.softmax(dim=-1).sum(dim=0) * (chosen.shape[1] / load.sum())
    n_active = (logits > -torch.inf).any(dim=0).sum()
    return n_active * (share * probability).sum()


def router_z_loss(logits: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Keeps router logits small (ST-MoE, arXiv 2202.08906): mean over tokens of logsumexp^2.

    logits [N, E], of which some columns may be -inf (expert dropout). A scalar; without tokens, 0.
    tokens: N as the mean over processes; None: that of logits.
    """
    if logits.shape[0] == 0:
        return logits.sum()
    return logits.logsumexp(dim=-1).square().sum() / (logits.shape[0] if tokens is None else tokens)


def router_coherence_loss(logits: Tensor, counted: Tensor, pairs: Tensor | None = None) -> Tensor:
    """How much router probability moves to other experts from one position to the next: a scalar, 0 to 1.

    With p_{b,t} the softmax of sample b's logits at position t, the total variation distance of neighbours,
        mean over b and t of 1/2 sum_e |p_{b,t,e} - p_{b,t-1,e}|,
    0 where a sample's probabilities stay what they are. A verification reads the union of its rows' experts, which
    are neighbours in a text; being a sum of absolute values, it lets a few jumps stand and levels the rest, where
    squares would shrink all alike.
    logits [B * T, E]: the router's, sample after sample, of which some columns may be -inf (expert dropout).
    counted [B, T], bool: False at padding; a pair counts where both positions do. Without pairs, 0.
    pairs: how many count, as the mean over processes; None: in counted.
    """
    if counted.numel() == 0:
        return logits.sum()  # 0, still attached to the graph
    probability = logits.softmax(dim=-1).view(*counted.shape, -1)
    moved = 0.5 * (probability[:, 1:] - probability[:, :-1]).abs().sum(dim=-1)
    together = counted_pairs(counted)
    pairs = together.sum().clamp(min=1) if pairs is None else pairs
    return moved.masked_fill(~together, 0.0).sum() / pairs


def counted_pairs(counted: Tensor) -> Tensor:
    """Which neighbours [B, T - 1] both count, of positions [B, T] that do or do not."""
    return counted[:, 1:] & counted[:, :-1]


def bias_update(load: Tensor, active: Tensor | None = None) -> Tensor:
    """The direction in which to move the router's choice bias: sign(mean(load) - load), float32 [E].

    Balancing without an auxiliary loss (arXiv 2408.15664, used by DeepSeek-V3): after each step add
    u * bias_update(load) to a bias that only the choice of experts sees, u about 1e-3.
    load [E]: how many choices each expert got in this step. active [E], bool: the step's expert dropout mask;
    an inactive expert says nothing about balance, so the mean is over the active and the others get 0.
    """
    load = load.to(torch.float64)  # exact for counts, so that an even load gives exactly 0
    if active is None:
        active = torch.ones_like(load, dtype=torch.bool)
    mean = (load * active).sum() / active.sum()
    return ((mean - load).sign() * active).to(torch.float32)


def balance_metrics(load: Tensor) -> dict[str, float]:
    """How evenly `load` [E], the choices each expert got, is spread. With c the loads:

    max_violation: MaxVio = max(c) / mean(c) - 1, from 0 (even) to E - 1 (one expert does everything).
    normalized_entropy: H / ln E, from 1 (even) to 0; exp(H) is the effective number of experts.
    coefficient_of_variation: population standard deviation / mean, from 0 to sqrt(E - 1).
    dead_experts: the share of experts without a single choice.
    A lone expert is even. A layer without any choice has no balance: every value is nan.
    Raises ValueError for an empty or negative load.
    """
    counts = load.detach().to("cpu", torch.float64)
    if counts.ndim != 1 or len(counts) == 0 or bool((counts < 0).any()):
        raise ValueError(f"load must be one count >= 0 per expert, got {load.tolist()}")
    if counts.sum() == 0:
        names = ("max_violation", "normalized_entropy", "coefficient_of_variation", "dead_experts")
        return dict.fromkeys(names, math.nan)
    mean = counts.mean()
    entropy = torch.special.entr(counts / counts.sum()).sum().item()
    return {
        "max_violation": (counts.max() / mean - 1).item(),
        "normalized_entropy": min(entropy / math.log(len(counts)), 1.0) if len(counts) > 1 else 1.0,
        "coefficient_of_variation": (counts.std(correction=0) / mean).item(),
        "dead_experts": (counts == 0).double().mean().item(),
    }
