"""Expert parallelism: a layer's experts held by several ranks, each token's states sent to those that hold its own.

R ranks of a row of the mesh, each with E / R experts, and the tokens of its own samples. P (token, choice) pairs, D
width, F expert hidden size. A layer sends four times in a step, P D numbers each: states to the experts and outputs
back, and their gradients the other way; and E counts before, so that each rank knows how much will come (GShard, arXiv
2006.16668; Switch Transformer, arXiv 2101.03961; but without a capacity: no token is dropped).

Knows nothing of routers, nor of how other weights are divided. Next: `nn/experts.py` (the arithmetic), `sharding.py`.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.tensor import DTensor

from layerskip_moe.nn.experts import Experts, autocast, expert_by_expert, run_experts_sorted
from layerskip_moe.nn.router import Routing


def run_experts_across(experts: Experts, group: dist.ProcessGroup, x: Tensor, routing: Routing) -> Tensor:
    """`Experts.forward` where this rank holds E / R of the experts, as DTensors: x [N, D] and its routing -> [N, D].

    Every rank of the group must call it, also one without tokens.
    """
    assert isinstance(experts.gate_up, DTensor) and isinstance(experts.down, DTensor)
    x, gate_up, down = autocast(x, experts.gate_up.to_local(), experts.down.to_local())

    def run(rows: Tensor, load: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return _run_by_owners(rows, load, gate_up, down, group)

    return run_experts_sorted(x, routing, gate_up, down, run)


def _run_by_owners(rows: Tensor, load: Tensor, gate_up: Tensor, down: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows [P, D] that stand expert after expert, load [E] for each, run by the ranks that hold them -> [P, D]."""
    ranks = group.size()
    come = all_to_all_single(load, None, None, group).view(
        ranks, -1
    )  # [R, E / R]: rows from each rank for each expert here
    there, here = load.view(ranks, -1).sum(1).tolist(), come.sum(1).tolist()
    rows = _sent(rows, here, there, group)  # rank after rank, and of each rank expert after expert
    expert = torch.arange(come.shape[1], device=come.device).repeat(ranks).repeat_interleave(come.flatten())
    order = expert.argsort(stable=True)
    outputs = expert_by_expert(rows[order], come.sum(0), gate_up, down)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return _sent(outputs[back], there, here, group)


def _sent(rows: Tensor, come: list[int], go: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows [P, D] sent to the group's ranks, `go` to each, and those that come from each. Gradients go back the way
    that the rows came."""
    return all_to_all_single_autograd(rows.contiguous(), come, go, group)
