"""quantize: a model's weights in 8 or 4 bits, read back into floats as each is used (weight-only).

Every projection of attention, dense MLPs, experts and shared experts, and a head of its own, becomes one of torchao's
tensors, the fused expert weights [E, 2F, D] and [E, D, F] included: an expert that is chosen is picked out and
dequantised, the others are not. Embedding (and a head tied to it), routers, the shared expert's gate, norms and biases
stay as they are.

    int8   torchao's Int8Tensor: a byte per weight, a scale per output row
    int4   half a byte per weight, a scale for every 32 inputs

K inputs. Imports torchao, which takes seconds, inside its functions only. Knows nothing of files. Next:
`quantized_weights.py` (the tensors); `checkpoint.py`, which saves and loads what is made here.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.experts import Experts
from layerskip_moe.quiet_import import quiet_import
from layerskip_moe.refusals import shown

Quantization = Literal["int8", "int4"]

_PROJECTIONS = ("attention.qkv", "attention.output", "gate_up", "down", "head")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@torch.inference_mode(False)  # what is made within can be neither copied nor saved outside, and is refused in training
def quantize(model: MoEDecoder, quantization: Quantization) -> MoEDecoder:
    """A copy of the model with quantised weights; the model stays as it is.

    Memory is saved: from float32, int8 leaves a little over 1/4 of a weight's bytes and int4 5/32. Decoding int8 on a
    CPU is faster for it, reading whole numbers; int4's floats are made before every product.

    quantization: with w the weights that share a scale s, and q whole numbers, w becomes q s:
        "int8": an output row; s = max |w| / 127.5, q = w / s rounded, -128 to 127
        "int4": 32 inputs of a row (16 or 8 where 32 do not divide them); s = max |w| / 7.5, q = w / s rounded, -8 to 7
    s is 2^-23 or more, and rounded to the weights' type before q is chosen.

    Raises ValueError for another word, for a model that is quantised already, weights that are not float32, bfloat16
    or float16, and, with "int4", for a width that 8 does not divide.
    """
    if quantization not in get_args(Quantization):
        raise ValueError(f"quantization={shown(quantization)} is unknown; it is 'int8' or 'int4'.")
    if quantization_of(model) is not None:
        raise ValueError("the model is quantised already; give the one that it was made from.")
    weights = {name: getattr(module, attribute) for name, module, attribute in _weights(model)}
    for name, weight in weights.items():
        _check_weight(name, weight, quantization)
    shared = {id(weight): weight for weight in weights.values()}  # not worth a copy: they are replaced
    quantized = copy.deepcopy(model, shared)
    kind = _tensor_kinds()[quantization]
    for _, module, attribute in tqdm(list(_weights(quantized)), desc=f"quantising to {quantization}", delay=2):
        weight = kind.from_floats(getattr(module, attribute).detach())
        setattr(module, attribute, nn.Parameter(weight, requires_grad=False))
    return quantized


def quantization_of(model: MoEDecoder) -> Quantization | None:
    """How a model is quantised; None where it is not. Raises ValueError for parameters that `quantize` never makes."""
    kinds = {type(parameter) for parameter in model.parameters()} - {nn.Parameter}
    if not kinds:
        return None
    names = {kind: name for name, kind in _tensor_kinds().items()}
    found = {names.get(kind) for kind in kinds}
    if len(found) > 1 or None in found:
        told = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            f"the model has parameters of {told}, which one call of quantize does not make; give the model that it was "
            "made from."
        )
    return found.pop()


def quantized_state(model: MoEDecoder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A quantised model's state as plain tensors by name, and what else `load_quantized` must know, fit for JSON.

    A quantised weight `name` is `name.qdata` and `name.scale`; all others are as in the model's state dict.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if _is_quantized(tensor):
            state[f"{name}.qdata"], state[f"{name}.scale"] = tensor.qdata, tensor.scale
        else:
            state[name] = tensor
    return state, {"quantization": quantization_of(model)}


def load_quantized(model: MoEDecoder, get: Callable[[str], Tensor], facts: Mapping[str, Any]) -> MoEDecoder:
    """The quantised model, in evaluation mode, from what `quantized_state` gave.

    model: the unquantised network, which may be on the meta device; get: a tensor of that state by its name, of the
    shape that `quantized_state(quantize(model, ...))` has there. The tensors become the model's own, uncopied.
    """
    quantization: Any = facts.get("quantization")
    quantized, kind = quantize(model, quantization), _tensor_kinds()[quantization]
    state = {
        name: kind.from_parts(get(f"{name}.qdata"), get(f"{name}.scale")) if _is_quantized(tensor) else get(name)
        for name, tensor in quantized.state_dict().items()
    }
    quantized.load_state_dict(state, assign=True)
    return quantized.eval()


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, module and attribute of every weight that is quantised."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield f"{name}.gate_up", module, "gate_up"
            yield f"{name}.down", module, "down"
        elif isinstance(module, nn.Linear) and name.endswith(_PROJECTIONS):
            yield f"{name}.weight", module, "weight"


def _check_weight(name: str, weight: Tensor, quantization: str) -> None:
    if weight.dtype not in _FLOATS:
        kind = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is {kind}; quantize takes float32, bfloat16 or float16, so convert the model first.")
    if quantization == "int4" and weight.shape[-1] % 8:
        raise ValueError(f"{name} has {weight.shape[-1]} inputs, which 8 does not divide as int4 needs; take int8.")


def _is_quantized(tensor: Tensor) -> bool:
    return type(tensor) in _tensor_kinds().values()


def _tensor_kinds() -> dict[Quantization, Any]:
    """The tensor classes, by what they are called here."""
    try:
        with quiet_import():
            from layerskip_moe.pretrained.quantized_weights import Int8Weight, PackedInt4Weight
    except ImportError as error:
        raise ImportError(
            f"quantised weights are torchao's, which could not be imported ({error}); "
            "`pip install 'torchao>=0.15,<0.18'` gives a version that has them"
        ) from error
    return {"int8": Int8Weight, "int4": PackedInt4Weight}
