"""A model divided over ranks by PyTorch's FSDP2 (`fully_shard`), and put together again.

Every rank keeps 1/R of each parameter, of its gradient and of the optimizer's moments. A block's parameters are
gathered when it runs, forward and backward, and let go of; its gradients are averaged over the ranks when it is done,
each rank getting the part that it keeps. Embedding, norm and head belong to no block, and stay gathered from the
beginning of a pass to its end. With `expert_parallel` a layer's experts are divided twice: so many to each rank of a
row of the mesh, and the numbers of these over the ranks of a column.

Knows nothing of losses. Next: `parallel.py` (the ranks), `expert_parallel.py` (how tokens find experts), `run.py`.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.nn.block import Block, MoEMLP
from layerskip_moe.training.expert_parallel import run_experts_across
from layerskip_moe.training.parallel import Ranks

Result = TypeVar("Result")


class Network(nn.Module):
    """A model, and all that is computed with it as calls of this one module: what FSDP gathers for a pass is there from
    its beginning to its end."""

    def __init__(self, model: MoEDecoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., Result], *arguments: Any, **others: Any) -> Result:
        """compute(model, *arguments, **others)."""
        return compute(self.model, *arguments, **others)

    def synchronize(self, wanted: bool) -> None:
        """Whether the next backward pass sums gradients over the ranks; without, they add up where they are."""
        if isinstance(self, FSDPModule):
            self.set_requires_gradient_sync(wanted)

    def release(self) -> None:
        """Let go of what a pass without a backward one leaves gathered."""
        if isinstance(self, FSDPModule):
            self.reshard()


def make_network(model: MoEDecoder, ranks: Ranks, *, expert_parallel: int) -> Network:
    """The model itself where there is one rank; else a copy on this rank's device, divided over all of them.

    Every rank is to have the same weights. Raises ValueError as `check_experts` does.
    """
    check_experts(model.config, ranks, expert_parallel)
    if ranks.size == 1:
        return Network(model)
    # Routers that look back give views of their logits; nobody writes into those.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    model = copy.deepcopy(model)
    world, mesh = ranks.meshes(expert_parallel)
    for block in model.blocks:
        assert isinstance(block, Block)
        if expert_parallel > 1 and isinstance(block.mlp, MoEMLP):
            experts = block.mlp.experts
            for name, weight in list(experts.named_parameters()):
                whole = distribute_tensor(weight.detach(), mesh["expert"], [Shard(0)], src_data_rank=None)
                experts.register_parameter(name, nn.Parameter(whole))
            experts.forward = partial(run_experts_across, experts, mesh["expert"].get_group())  # type: ignore[method-assign]
            divided: FSDPModule = fully_shard(experts, mesh=mesh["data"], shard_placement_fn=lambda _: Shard(1))
            divided.set_gradient_divide_factor(ranks.size)  # as the others' are: tokens come from all of them
            # Summed, and divided then: gloo has no sum that divides. (Alone in its column, a rank would divide twice.)
            divided.set_force_sum_reduction_for_comms(mesh["data"].size() > 1)
        fully_shard(block, mesh=world)
    network = Network(model)
    fully_shard(network, mesh=world)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(ranks.device)
    return network


def check_experts(config: ModelConfig, ranks: Ranks, expert_parallel: int) -> None:
    """Raise ValueError for an expert_parallel that does not divide the ranks or the experts, and for experts whose
    matrices the other ranks cannot share evenly."""
    if expert_parallel == 1:
        return
    if ranks.size % expert_parallel:
        raise ValueError(
            f"expert_parallel={expert_parallel} must divide the number of processes, which is {ranks.size}; start "
            "another number by torchrun, or lower it."
        )
    if config.num_experts == 0 or config.num_experts % expert_parallel:
        raise ValueError(f"expert_parallel={expert_parallel} must divide num_experts={config.num_experts}.")
    columns = ranks.size // expert_parallel
    for rows in (2 * config.expert_d_ff, config.d_model):
        if rows % columns:
            raise ValueError(
                f"an expert's matrix of {rows} rows cannot be shared evenly by {columns} processes; raise "
                "expert_parallel, or start another number of processes."
            )


def give_back(network: Network, model: MoEDecoder, ranks: Ranks) -> None:
    """Give the model, where the network is a divided copy of it, the copy's weights."""
    if ranks.size > 1:
        network.release()
        take_up(model.state_dict(), whole(network.model.state_dict()))


def whole(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Tensors, of which some may be divided, as whole ones, those on the CPU; without keep, for another rank that does,
    none. All ranks must ask for the same."""
    together = {}
    for name, tensor in tensors.items():
        full = _whole(tensor)
        if keep:
            together[name] = full.cpu() if full is not tensor else tensor
    return together


@torch.no_grad()
def take_up(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give tensors, of which some may be divided, the values of whole ones of the same names."""
    for name, tensor in tensors.items():
        value = values[name]
        if isinstance(tensor, DTensor) and not isinstance(value, DTensor):
            value = distribute_tensor(
                value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
            )
        tensor.copy_(value)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, ranks: Ranks) -> float:
    """`torch.nn.utils.clip_grad_norm_` of parameters that are divided over the ranks; the norm is that of all."""
    parameters = list(parameters)
    if ranks.size == 1:
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    parts = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    norm = ranks.total(torch.nn.utils.get_total_norm(parts).double().square()).sqrt()
    for part in parts:
        part.mul_((limit / (norm + 1e-6)).clamp(max=1.0).to(part.dtype))
    return float(norm)


def mesh_of(parameter: Tensor) -> Any:
    """What a parameter is divided over; None for one that is whole. Operations on several at once want the same."""
    return parameter.device_mesh if isinstance(parameter, DTensor) else None


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor that may be divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
