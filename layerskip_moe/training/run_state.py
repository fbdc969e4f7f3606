"""What a run's checkpoint is made of: tensors by flat names, and facts that JSON can hold; and back.

    model.<name>                        the network's state dict
    best.<name>                         the same at the best validation, where one was kept
    optimizer.<parameter>.<slot>        AdamW's means; of the 8-bit AdamW's, .codes, .scale and .qmap

Learning rates are not in it: they are functions of the step.
Knows nothing of files. Next: `checkpoint.py`, which keeps them; `loop.py`, whose run this is.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from layerskip_moe.files import plain
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.quiet_import import quiet_import
from layerskip_moe.training.checkpoint import Checkpoint
from layerskip_moe.training.tensor_files import read_tensors

# These may change on resume: nothing computed depends on them.
_FREE = ("log_every", "checkpoint_every", "max_skipped_steps", "activation_checkpointing", "expert_parallel")
_QUANTIZED = ("codes", "scale", "qmap")  # the tensors that an 8-bit state of torchao's is made of


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
    for group in ("model", "best"):
        names = {name: shape for name, (shape, _) in stored.items() if name.startswith(f"{group}.")}
        if (names or group == "model") and names != {f"{group}.{n}": tuple(t.shape) for n, t in own.items()}:
            raise ValueError(f"{checkpoint.path} has other tensors than this version's training; start without resume.")
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
        room[name] = _room(shape, dtype, parameters[owner])
        slots[owner].setdefault(slot, {})[part] = room[name]
    read_tensors(checkpoint.path, room)

    def of(group: str) -> dict[str, Tensor]:
        return {name.partition(".")[2]: tensor for name, tensor in room.items() if name.startswith(f"{group}.")}

    model.load_state_dict(of("model"))
    names_of = {parameter: name for name, parameter in parameters.items()}
    order = [names_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {slot: _joined(slot, parts) for slot, parts in slots[name].items()}
        for index, name in enumerate(order)
        if slots[name]
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return of("best") or None


def check_same_run(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless a checkpoint's facts are of the same run as this one's: the same
    model_config, train_config (but for how often it logs and saves, and when it gives up), max_steps and text."""
    if not here.keys() <= saved.keys() or any(
        saved[part].keys() != here[part].keys() for part in ("model_config", "train_config")
    ):
        raise ValueError("the checkpoint to resume is not one of this version's training runs; start without resume.")
    for part in ("model_config", "train_config"):
        changed = [
            f"{name} was {value!r} and is now {here[part][name]!r}"
            for name, value in saved[part].items()
            if name not in _FREE and plain(here[part][name]) != value
        ]
        if changed:
            raise ValueError(f"the run to resume had other settings: {'; '.join(changed)}; put them back.")
    if (saved["max_steps"], saved["text"]) != (here["max_steps"], here["text"]):
        raise ValueError("the run to resume was on another text; give it the same corpus and tokenizer again.")


def fingerprint(train: Tensor, validation: Tensor) -> list[int]:
    """Tells one text, given as its two splits' token ids, from another: lengths, and a checksum of both ends
    of the training split."""
    ends = torch.cat([train[:4096], train[-4096:]]).to(torch.int64)
    return [len(train), len(validation), zlib.crc32(ends.numpy().tobytes())]


def weights_fingerprint(model: MoEDecoder) -> int:
    """Tells one model's weights from another's: a checksum of both ends of every tensor."""
    checksum = 0
    for tensor in model.state_dict().values():
        flat = tensor.detach().flatten()
        ends = torch.cat([flat[:1024], flat[-1024:]]).cpu()
        checksum = zlib.crc32(ends.view(torch.uint8).numpy().tobytes(), checksum)
    return checksum


def _parts(value: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, with the dot before it, and tensor) of all that a slot is made of."""
    if hasattr(value, "codes"):
        for part in _QUANTIZED:
            yield f".{part}", getattr(value, part)
    else:
        yield "", value


def _joined(slot: str, parts: Mapping[str, Tensor]) -> Tensor:
    if parts.keys() == {""}:
        return parts[""]
    with quiet_import():
        from torchao.optim.subclass_8bit import OptimState8bit
    # Means have a sign, means of squares have none. (The type is set by the optimizer, to the parameter's.)
    return OptimState8bit(*(parts[part] for part in _QUANTIZED), slot == "exp_avg")


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


def _room(shape: tuple[int, ...], dtype: torch.dtype, parameter: Tensor) -> Tensor:
    """Memory for a slot: laid out as the parameter, where it has its shape. Step counts are on the CPU until the
    optimizer takes them."""
    if shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device=parameter.device if shape else "cpu")
