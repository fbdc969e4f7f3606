"""The experts' arithmetic: SwiGLU on the tokens each expert was chosen for.

N tokens, D width, E experts, K chosen, F expert hidden size.
Many tokens (training, prefill) are sorted by expert and go through one grouped product per projection; few on a CPU
(decoding, drafting, verification) are `few_rows.py`'s; few in compiled decoding on a GPU gather what they chose, or are
sorted where that needs no waiting; elsewhere a single token reads its K experts one by one.
Knows nothing of how the experts were chosen. Next: `router.py`, `products.py` (the grouped product).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerskip_moe.nn import few_rows
from layerskip_moe.nn.config import ModelConfig
from layerskip_moe.nn.products import can_group, grouped_product, is_quantized, quantized_grouped_product, swiglu
from layerskip_moe.nn.router import Routing


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the type that autocast has products in, where it is on: grouped_mm is not on its list."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def run_experts_one_token(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """The loop for x [1, D], where there is nothing to pick out and nothing to put back."""
    parts = [F.linear(swiglu(F.linear(x, gate_up[e])), down[e]) for e in routing.chosen[0].tolist()]
    return routing.weights.to(x.dtype) @ torch.cat(parts)


def expert_by_expert(rows: Tensor, load: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Rows [P, D] that stand expert after expert, load [E] for each -> [P, D]: one grouped product per projection."""
    multiply = quantized_grouped_product if is_quantized(gate_up) else grouped_product
    ends = load.cumsum(0).to(torch.int32)
    return multiply(swiglu(multiply(rows, gate_up, ends)), down, ends)


def run_experts_sorted(
    x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor, run: Callable[..., Tensor] = expert_by_expert
) -> Tensor:
    """x [N, D] -> [N, D]: the (token, choice) pairs sorted by expert, and each expert's run as `run` does."""
    tokens, top_k = routing.chosen.shape
    order = routing.chosen.flatten().argsort(stable=True)
    pairs = run(x[order // top_k], routing.load, gate_up, down)
    pairs = pairs * routing.weights.flatten()[order, None].to(pairs.dtype)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * top_k, device=order.device))
    return pairs[back].view(tokens, top_k, pairs.shape[-1]).sum(dim=1)


def run_experts_gathered(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """For few tokens x [N, D] -> [N, D], compiled: what is chosen is read where it lies, while it is multiplied, with
    sums in float32. An expert is read once per token that chose it. (Not compiled, it would be copied as often.)"""
    wide = torch.promote_types(x.dtype, torch.float32)

    def multiply(states: Tensor, weight: Tensor) -> Tensor:
        """States [N, K or 1, I], weight [E, O, I] -> [N, K, O]."""
        return (weight[routing.chosen].to(wide) * states[:, :, None].to(wide)).sum(-1).to(x.dtype)

    pairs = multiply(swiglu(multiply(x[:, None], gate_up)), down)
    return (pairs * routing.weights[..., None].to(x.dtype)).sum(dim=1)


def gathers(x: Tensor, gate_up: Tensor) -> bool:
    """Whether the experts of tokens x [N, D] are gathered: in compiled decoding on a GPU, which must not wait for what
    was chosen, a single token's, and few tokens' that have no grouped product."""
    if torch.is_grad_enabled() or not torch.compiler.is_compiling() or not x.is_cuda or is_quantized(gate_up):
        return False
    return len(x) == 1 or (len(x) <= few_rows.MOST_ROWS and not can_group(x, gate_up))


class Experts(nn.Module):
    """E SwiGLU experts with fused weights: gate_up [E, 2F, D] (gate first), down [E, D, F]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.num_experts, config.d_model, config.expert_d_ff
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x [N, D] and its routing -> the chosen experts' weighted sum [N, D]."""
        gate_up: Tensor = self.gate_up
        down: Tensor = self.down
        if few_rows.are_few(x):
            return few_rows.experts(x, routing.chosen, routing.weights, gate_up, down)
        x, gate_up, down = autocast(x, gate_up, down)
        if gathers(x, gate_up):
            return run_experts_gathered(x, routing, gate_up, down)
        # On a GPU the choice stays there: reading it back waits for the device at every layer.
        if len(x) == 1 and not (x.device.type == "cuda" and can_group(x, gate_up)):
            return run_experts_one_token(x, routing, gate_up, down)
        return run_experts_sorted(x, routing, gate_up, down)
