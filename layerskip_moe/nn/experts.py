"""The experts' arithmetic: SwiGLU on the tokens each expert was chosen for.

N tokens, D width, E experts, K chosen, F expert hidden size.
Many tokens (training, prefill, verification) are sorted by expert and go through one grouped product per
projection; a single token (plain decoding, drafting) reads its K experts one by one; a plain loop is the
reference for both, and the way on hardware without grouped products (a T4 is one).
Knows nothing of how the experts were chosen. Next: `router.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerskip_moe.nn import few_rows
from layerskip_moe.nn.config import ModelConfig
from layerskip_moe.nn.router import Routing


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, the two halves of gate_up [..., 2F] -> [..., F] (arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def run_experts_loop(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """x [N, D] -> [N, D], expert after expert, each needed one read once; for any dtype and device.

    A GPU is waited for once, to learn the load.
    """
    out = torch.zeros_like(x)
    order = routing.chosen.flatten().argsort(stable=True)  # (token, choice) pairs, by expert
    weights = routing.weights.flatten().to(x.dtype)
    for expert, pairs in enumerate(order.split(routing.load.tolist())):
        if len(pairs):
            rows = pairs // routing.chosen.shape[1]
            result = F.linear(swiglu(F.linear(x[rows], gate_up[expert])), down[expert])
            out = out.index_add(0, rows, result * weights[pairs, None])
    return out


def run_experts_one_token(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """The loop for x [1, D], where there is nothing to pick out and nothing to put back."""
    parts = [F.linear(swiglu(F.linear(x, gate_up[e])), down[e]) for e in routing.chosen[0].tolist()]
    return routing.weights.to(x.dtype) @ torch.cat(parts)


def run_experts_grouped(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same by `torch.nn.functional.grouped_mm` over tokens sorted by expert; x, gate_up, down of one dtype."""
    tokens, top_k = routing.chosen.shape
    order = routing.chosen.flatten().argsort(stable=True)  # (token, choice) pairs, by expert
    ends = routing.load.cumsum(0).to(torch.int32)
    hidden = F.grouped_mm(x[order // top_k], gate_up.transpose(1, 2), offs=ends)
    pairs = F.grouped_mm(swiglu(hidden), down.transpose(1, 2), offs=ends)
    pairs = pairs * routing.weights.flatten()[order, None].to(pairs.dtype)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return pairs[back].view(tokens, top_k, -1).sum(dim=1)


def can_group(x: Tensor, gate_up: Tensor) -> bool:
    """Whether grouped_mm takes these: bf16/fp16/fp32, rows of whole 16-byte units, CPU or CUDA SM80 and up; not
    quantised weights, which are dequantised expert by expert."""
    if type(gate_up) not in (Tensor, nn.Parameter):
        return False
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    widths = gate_up.shape[2], gate_up.shape[1] // 2
    if any(width * x.element_size() % 16 for width in widths):
        return False
    if x.device.type == "cuda":
        return torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.device.type == "cpu"


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
        if torch.is_autocast_enabled(x.device.type):  # grouped_mm is not on autocast's list
            dtype = torch.get_autocast_dtype(x.device.type)
            x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
        grouped = can_group(x, gate_up)
        # Where a GPU can group, the choice stays there: reading it back waits for the device at every layer.
        if len(x) == 1 and not (grouped and x.device.type == "cuda"):
            return run_experts_one_token(x, routing, gate_up, down)
        if grouped:
            return run_experts_grouped(x, routing, gate_up, down)
        return run_experts_loop(x, routing, gate_up, down)
