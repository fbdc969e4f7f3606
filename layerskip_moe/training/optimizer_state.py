"""An optimizer's state by the names of parameters, so that a run can go on with its parameters grouped, or divided over
processes, in another way.

Knows nothing of files. Next: `loop.py`, whose checkpoints hold it; `sharding.py`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from layerskip_moe.nn import MoEDecoder


def optimizer_tensors(model: MoEDecoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """<parameter>.<slot> -> what AdamW keeps of that parameter: means, and its count of steps."""
    return {
        f"{name}.{slot}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: MoEDecoder, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give the optimizer what `optimizer_tensors` gave, as whole tensors, also of an optimizer that had its parameters
    divided in another way."""
    parameters = dict(model.named_parameters())
    slots: dict[Tensor, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        owner, _, slot = name.rpartition(".")
        slots.setdefault(parameters[owner], {})[slot] = _divided(value, parameters[owner])
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, Any] = {index: slots[parameter] for index, parameter in enumerate(order) if parameter in slots}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _divided(value: Tensor, parameter: Tensor) -> Tensor:
    """A value divided as its parameter is, where it has its shape."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
