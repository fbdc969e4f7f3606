"""A model divided over ranks by PyTorch's FSDP2 (`fully_shard`), and put together again.

Every rank keeps 1/R of each parameter, of its gradient and of the optimizer's moments. A block's parameters are
gathered when it runs, forward and backward, and let go of; its gradients are averaged over the ranks when it is done,
each rank getting the part that it keeps. Embedding and head belong to no block, and stay gathered from the beginning
of a pass to its end; so do routers and norms, which are small. With `expert_parallel` a layer's experts are divided
twice: so many to each rank of a row of the mesh, and the numbers of these over the ranks of a column.

In 16 bits, blocks' matrices are gathered as autocast would round them, so that no rank has a block in both types;
what autocast leaves in float32 (embedding, routers, norms) or keeps for more than its product (the head) is gathered in
float32, and all gradients are averaged in float32.

Knows nothing of losses. Next: `parallel.py` (the ranks), `expert_parallel.py` (how tokens find experts), `run.py`.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.nn.block import Block, MoEMLP
from layerskip_moe.nn.norm import RMSNorm
from layerskip_moe.nn.router import Router
from layerskip_moe.training.config import TrainConfig
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

    def release(self) -> None:
        """Let go of what a pass without a backward one leaves gathered."""
        if isinstance(self, FSDPModule):
            self.reshard()


def make_network(model: MoEDecoder, ranks: Ranks, *, expert_parallel: int, dtype: torch.dtype | None) -> Network:
    """The model itself where there is one rank; else a copy on this rank's device, divided over all of them.

    Every rank is to have the same weights. dtype: autocast's, that blocks' matrices are gathered in; None: their own.
    They must be able to share it (`check_sharing`).
    """
    if ranks.size == 1:
        return Network(model)
    # Routers that look back give views of their logits; nobody writes into those.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    model = copy.deepcopy(model)
    world, mesh = ranks.meshes(expert_parallel)
    # Autocast stays on, and has nothing left to round; states come and go in the types that it gives them.
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    wide = wide_parts(model)
    elsewhere = {parameter for part in wide for parameter in part.parameters()}
    for block in model.blocks:
        assert isinstance(block, Block)
        if expert_parallel > 1 and isinstance(block.mlp, MoEMLP):
            experts = block.mlp.experts
            for name, weight in list(experts.named_parameters()):
                whole = distribute_tensor(weight.detach(), mesh["expert"], [Shard(0)], src_data_rank=None)
                experts.register_parameter(name, nn.Parameter(whole))
            experts.forward = partial(run_experts_across, experts, mesh["expert"].get_group())  # type: ignore[method-assign]
            divided: FSDPModule = fully_shard(
                experts, mesh=mesh["data"], shard_placement_fn=lambda _: Shard(1), mp_policy=narrow
            )
            divided.set_gradient_divide_factor(ranks.size)  # as the others' are: tokens come from all of them
            # Summed, and divided then: gloo has no sum that divides. (Alone in its column, a rank would divide twice.)
            divided.set_force_sum_reduction_for_comms(mesh["data"].size() > 1)
        fully_shard(block, mesh=world, mp_policy=narrow, ignored_params=elsewhere)
    network = Network(model)
    network.wide = nn.ModuleList(wide)  # where `fully_shard` finds them: it does not look into blocks again
    fully_shard(network, mesh=world)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(ranks.device)
    return network


def wide_parts(model: MoEDecoder) -> list[nn.Module]:
    """Routers and norms, which are computed in float32 also where products are not."""
    return [module for module in model.modules() if isinstance(module, Router | RMSNorm)]


def check_sharing(config: ModelConfig, train: TrainConfig, processes: int) -> None:
    """Raise ValueError for what so many processes cannot share: a batch that they do not divide, experts that
    `expert_parallel` does not, or whose matrices the other processes cannot share evenly; and for compiled blocks whose
    experts are elsewhere, as tokens are sent there from within them."""
    across = train.expert_parallel
    if train.batch_size % processes:
        raise ValueError(
            f"batch_size={train.batch_size} is shared by {processes} processes, which does not divide it; give "
            f"{max(train.batch_size // processes, 1) * processes}, or another multiple of {processes}."
        )
    if across == 1:
        return
    if processes % across:
        raise ValueError(
            f"expert_parallel={across} must divide the number of processes, which is {processes}; start another number "
            "by torchrun, or lower it."
        )
    if config.num_experts == 0 or config.num_experts % across:
        raise ValueError(f"expert_parallel={across} must divide num_experts={config.num_experts}.")
    for rows in (2 * config.expert_d_ff, config.d_model):
        if rows % (processes // across):
            raise ValueError(
                f"an expert's matrix of {rows} rows cannot be shared evenly by {processes // across} processes; raise "
                "expert_parallel, or start another number of processes."
            )
    if train.compile:
        raise ValueError(f"compile=True cannot compile blocks over expert_parallel={across}; leave one of them out.")


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
