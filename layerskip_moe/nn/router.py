"""The router: which experts a token goes to, with what weights.

N tokens, D width, E experts, K chosen. No token is ever dropped: there is no capacity.
Knows nothing of the experts' arithmetic. Next: `experts.py` (what the chosen experts compute),
`training/balance.py` (the losses made from what is recorded here).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerskip_moe.nn import few_rows
from layerskip_moe.nn.config import ModelConfig


class Routing(NamedTuple):
    """What one MoE layer decided for N tokens (those that its layer dropout kept)."""

    logits: Tensor  # [N, E] float32, those that the choice was made by; experts dropped out at -inf
    chosen: Tensor  # [N, K] int64, expert indices, best first
    weights: Tensor  # [N, K] float32, what each chosen expert's output is multiplied by

    @property
    def load(self) -> Tensor:
        """[E] int64: how many (token, choice) pairs each expert got."""
        chosen = self.chosen.flatten()  # (`bincount` would make a GPU wait to learn its largest entry)
        load = torch.zeros(self.logits.shape[-1], dtype=torch.int64, device=chosen.device)
        return load.scatter_add_(0, chosen, torch.ones_like(chosen))


class Router(nn.Module):
    """Softmax over all experts, then the top K (Mixtral, arXiv 2401.04088; OLMoE; Qwen3-MoE).

    weight: [E, D]. balance_bias: [E], added to the probabilities for choosing only, moved by
    `training` and not by gradients (DeepSeek-V3, arXiv 2412.19437); absent unless bias_balancing.
    Always computed in float32: a rounded logit is a different expert.
    """

    balance_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.normalize = config.top_k, config.normalize_top_k
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.d_model))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.bias_balancing else None
        self.register_buffer("balance_bias", bias)

    def score(self, x: Tensor) -> Tensor:
        """x [N, D] -> the logits [N, E] of its tokens, each by itself."""
        with torch.autocast(x.device.type, enabled=False):
            if few_rows.are_few(x):
                return few_rows.linear(x, self.weight, wide=True)
            return F.linear(x.float(), self.weight.float())

    def forward(
        self,
        x: Tensor,
        *,
        expert_mask: Tensor | None = None,
        top_k: int | None = None,
        recall: Callable[[Tensor], Tensor] | None = None,
    ) -> Routing:
        """x [N, D] -> Routing.

        expert_mask: [E], True for active; the others are masked before the softmax, so the gate redistributes over
            the active ones
        top_k: choose fewer than the model was built with
        recall: what becomes of the logits [N, E] by those of earlier positions (`router_memory.py`); None: nothing
        """
        logits = self.score(x)
        if recall is not None:
            logits = recall(logits)
        if expert_mask is not None:
            logits = logits.masked_fill(~expert_mask, float("-inf"))
        top_k = top_k or self.top_k
        if few_rows.are_few(x) and few_rows.has_kernels():
            return Routing(logits, *few_rows.route(logits, self.balance_bias, top_k, self.normalize))
        probabilities = logits.softmax(dim=-1)
        scores = probabilities
        if self.balance_bias is not None:
            # An inactive expert has probability 0, and a bias must not bring it back.
            scores = (probabilities + self.balance_bias).masked_fill(logits.isneginf(), float("-inf"))
        chosen = scores.topk(top_k, dim=-1).indices
        weights = probabilities.gather(-1, chosen)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(logits, chosen, weights)
