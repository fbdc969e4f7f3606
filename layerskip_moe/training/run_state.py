"""The tensors of a run's checkpoint, by flat names; and back.

    model.<name>                        the network's state dict
    best.<name>                         the same at the best validation, where one was kept
    optimizer.<parameter>.<slot>        AdamW's means; of the 8-bit AdamW's, .codes, .scale and .qmap

What several ranks have of the 8-bit AdamW's means is kept as float32: other ranks have other parts, and round them in
other blocks. Learning rates are not in it: they are functions of the step.
Knows nothing of files. Next: `run_facts.py`, for what is no tensor; `checkpoint.py`, which keeps both; `run.py`, whose
they are.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from layerskip_moe.nn import MoEDecoder
from layerskip_moe.quiet_import import quiet_import
from layerskip_moe.training.checkpoint import Checkpoint
from layerskip_moe.training.sharding import local_part, take_up
from layerskip_moe.training.tensor_files import read_tensors

_QUANTIZED = ("codes", "scale", "qmap")  # the tensors that an 8-bit state of torchao's is made of
_SLOTS = {"step", "exp_avg", "exp_avg_sq"}  # what AdamW has for a parameter, once it took a step


def run_tensors(
    model: MoEDecoder, optimizer: torch.optim.Optimizer, best: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """All tensors of a run, by their names in its checkpoint; they are the live ones, not copies.

    best: the weights of the best validation, None where none were kept.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in (best or {}).items()}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            tensors |= {f"optimizer.{name}.{slot}{part}": tensor for part, tensor in _parts(value)}
    return tensors


def restore_tensors(
    checkpoint: Checkpoint, model: MoEDecoder, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor] | None:
    """Give model and optimizer what the checkpoint has for them; the weights of the best validation, if any.

    Nothing is changed before everything is read. Raises ValueError where the tensors are not those of such a run.
    """
    own, parameters = model.state_dict(), dict(model.named_parameters())
    stored = checkpoint.tensors
    others = ValueError(f"{checkpoint.path} has other tensors than this version's training; start without resume.")
    for group, wanted in (("model", True), ("best", checkpoint.facts["best"] is not None)):
        names = {name: shape for name, (shape, _) in stored.items() if name.startswith(f"{group}.")}
        if names != ({f"{group}.{n}": tuple(t.shape) for n, t in own.items()} if wanted else {}):
            raise others
    room: dict[str, Tensor] = {}
    slots: dict[str, dict[str, dict[str, Tensor]]] = {name: {} for name in parameters}  # of parameter, slot, part
    for name, (shape, dtype) in stored.items():
        group, _, rest = name.partition(".")
        if group in ("model", "best"):
            room[name] = torch.empty_like(own[rest], dtype=dtype)
            continue
        owner, slot, part = _split(rest, parameters)
        if group != "optimizer" or owner is None or not _fits(shape, parameters[owner]):
            raise ValueError(f"{checkpoint.path} has a tensor {name} that no run has; start without resume.")
        room[name] = _room(shape, dtype, parameters[owner], part)
        slots[owner].setdefault(slot, {})[part] = room[name]
    if any(found and (found.keys() != _SLOTS or not all(map(_is_slot, found.values()))) for found in slots.values()):
        raise others
    read_tensors(checkpoint.path, room)

    def of(group: str) -> dict[str, Tensor]:
        return {name.partition(".")[2]: tensor for name, tensor in room.items() if name.startswith(f"{group}.")}

    names_of = {parameter: name for name, parameter in parameters.items()}
    order = [names_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {slot: _joined(slot, parts, parameters[name], optimizer) for slot, parts in slots[name].items()}
        for index, name in enumerate(order)
        if slots[name]
    }
    model.load_state_dict(of("model"))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return of("best") or None


def _parts(value: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, with the dot before it, and tensor) of all that a slot is made of."""
    own = local_part(value)
    if not hasattr(own, "codes"):
        yield "", value
    elif isinstance(value, DTensor):
        lies: dict[str, Any] = {"shape": value.shape, "stride": value.stride(), "run_check": False}
        yield "", DTensor.from_local(own.dequantize(), value.device_mesh, value.placements, **lies)
    else:
        for part in _QUANTIZED:
            yield f".{part}", getattr(value, part)


def _joined(slot: str, parts: Mapping[str, Tensor], parameter: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """What the optimizer is to have in this slot of a parameter."""
    value, signed = parts.get("", parameter), slot == "exp_avg"  # means of squares have no sign
    if parts.keys() != {""}:
        with quiet_import():
            from torchao.optim.subclass_8bit import OptimState8bit
        # (The type is set by the optimizer, to the parameter's.)
        value = OptimState8bit(*(parts[part] for part in _QUANTIZED), signed)
        if not isinstance(parameter, DTensor):
            return value
        value = value.dequantize()
    if slot == "step" or not hasattr(optimizer, "_new_buffer"):
        return value
    rounded = optimizer._new_buffer(parameter, signed)  # torchao's, that is: 8 bits, where a part is large enough
    take_up({slot: rounded}, {slot: value})
    return rounded


def _is_slot(parts: Mapping[str, Any]) -> bool:
    return parts.keys() in ({""}, set(_QUANTIZED))


def _split(name: str, parameters: Mapping[str, Tensor]) -> tuple[str | None, str, str]:
    """<parameter>.<slot> or <parameter>.<slot>.<part> taken apart; None for a parameter that there is not."""
    rest, _, last = name.rpartition(".")
    part = last if last in _QUANTIZED else ""
    if part:
        rest, _, last = rest.rpartition(".")
    return (rest if rest in parameters else None), last, part


def _fits(shape: tuple[int, ...], parameter: Tensor) -> bool:
    """Whether a slot, or a part of one, may have this shape: the parameter's, a single number, or a list of scales."""
    return shape == tuple(parameter.shape) or (len(shape) <= 1 and sum(shape) <= max(parameter.numel(), 256))


def _room(shape: tuple[int, ...], dtype: torch.dtype, parameter: Tensor, part: str) -> Tensor:
    """Memory for a slot, or a part of one: laid out as the parameter, where it has its shape. On the CPU are step
    counts, until the optimizer takes them, and parts that are to be rounded anew."""
    if part and isinstance(parameter, DTensor):
        return torch.empty(shape, dtype=dtype)
    if shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device=parameter.device if shape else "cpu")
