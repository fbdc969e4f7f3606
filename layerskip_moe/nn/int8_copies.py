"""Int8 copies of a model's weights, which drafts may be made from: they read a quarter of float32's bytes.

A draft is only a proposal, which the model itself verifies, so it may be computed with less care than the answer. The
model stays as it is: the copies stand in for its weights while a draft's steps are recorded (`few_rows.reading`), but
that the head itself decides between the two tokens that say most by its copy (`drafts.choose_draft`).

O outputs, K inputs. Knows nothing of drafting. Next: `rounds.py`, which drafts by them;
`pretrained/quantize.py`, which makes whole models of such weights.
"""

import itertools
import math
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from layerskip_moe.nn import few_rows
from layerskip_moe.nn.decoder import MoEDecoder
from layerskip_moe.nn.experts import Experts
from layerskip_moe.nn.kernels import has_kernels
from layerskip_moe.nn.linear import Linear
from layerskip_moe.nn.products import is_quantized
from layerskip_moe.nn.rounding import nearest

MOST_BYTES = 2**30  # of copies that nobody asked for

_MOST_WRITTEN = 2**24  # numbers rounded at a time


class Int8Copies:
    """Of every projection of attention, dense MLPs, experts and shared experts, and of the head; not of routers, whose
    rounded logit is another expert, nor of what is looked up or added.

    Attributes:
        parts: by the id of a weight [..., O, K] its whole numbers, int8, `few_rows.packed`, and the scale of each
            output [..., O], float32
        number: tells them from all others
    """

    @torch.inference_mode(False)  # what is made within cannot be written to outside
    @torch.no_grad()
    def __init__(self, model: MoEDecoder) -> None:
        self.number = next(_numbers)
        self._from = [(module, name, getattr(module, name)) for module, name in _weights(model)]
        self._stamps = [_stamp(weight) for _, _, weight in self._from]
        self._kinds = [(weight.dtype, weight.device) for _, _, weight in self._from]
        self.parts: dict[int, tuple[Tensor, Tensor]] = {}
        for _, _, weight in self._from:
            panels = weight.new_empty(few_rows.packed_shape(weight.shape), dtype=torch.int8)
            scale = weight.new_empty(weight.shape[:-1], dtype=torch.float32)
            self.parts[id(weight)] = panels, scale
            _round_into(panels, scale, weight)

    def follow(self) -> bool:
        """Round again what was changed in place since; False where a weight was put in another's place, or is of
        another type or elsewhere by now. (What is written through `.data`, or to a weight that was made in inference
        mode, is not seen: drafts are then of weights of before, but for the head's last word.)"""
        for index, (module, name, weight) in enumerate(self._from):
            panels, scale = self.parts[id(weight)]
            if getattr(module, name) is not weight or (weight.dtype, weight.device) != self._kinds[index]:
                return False
            stamp = _stamp(weight)
            if stamp != self._stamps[index]:
                _round_into(panels, scale, weight)
                self._stamps[index] = stamp
        return True


_numbers = itertools.count()
_made: "WeakKeyDictionary[MoEDecoder, Int8Copies]" = WeakKeyDictionary()


def int8_copies(model: MoEDecoder) -> Int8Copies | None:
    """Those of a model, as its weights are now; they are kept with it. None where `why_no_int8` has something against
    them."""
    copies = _made.get(model)
    if copies is not None and copies.follow():
        return copies
    del copies
    _made.pop(model, None)  # before there are others
    if why_no_int8(model) is not None:
        return None
    return _made.setdefault(model, Int8Copies(model))


def kept_copies(model: MoEDecoder) -> Int8Copies | None:
    """Those of a model as they were when `int8_copies` was last asked, as it is where there are none: asking whether
    weights changed takes longer than a short round should."""
    return _made.get(model) or int8_copies(model)


def why_no_int8(model: MoEDecoder) -> str | None:
    """What stands against drafting by int8 copies: they are read by a CPU's kernels, in recorded rounds. None where
    nothing does."""
    if not few_rows.serves(model.device):
        return f"the model is on {model.device.type}, and they are read by a CPU's kernels"
    if any(is_quantized(parameter) for parameter in model.parameters()):
        return "the model's own weights are quantised"
    if not few_rows.can_compute(model.dtype):
        return f"the model's weights are {str(model.dtype).removeprefix('torch.')}"
    if model.config.clip_qkv is not None:
        return "a model with clip_qkv is not recorded"
    if not model.compiled:
        return "decoding is not compiled here"
    return None if has_kernels() else "there are no kernels here"


def are_made_unasked(model: MoEDecoder) -> bool:
    """Whether they are made where nobody asked for them: where the processor has instructions for their products (AVX2
    or AVX-512; elsewhere they may take longer than the weights do), and they take little."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    shapes = [few_rows.packed_shape(getattr(module, name).shape) for module, name in _weights(model)]
    return sum(map(math.prod, shapes)) <= MOST_BYTES


def _weights(model: MoEDecoder) -> Iterator[tuple[nn.Module, str]]:
    """Module and attribute of every weight that is copied."""
    for module in model.modules():
        if isinstance(module, Experts):
            yield module, "gate_up"
            yield module, "down"
        elif isinstance(module, Linear) and module.out_features > 1:  # (a shared expert's gate has one)
            yield module, "weight"
    if model.head is None:
        yield model.embedding, "weight"  # as the head; what is looked up is not a product


def _stamp(weight: Tensor) -> tuple[int, int]:
    """What changes as a weight is written to, or moved."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


@torch.no_grad()
def _round_into(panels: Tensor, scale: Tensor, weight: Tensor) -> None:
    outputs = panels.shape[-1] // 2  # of a panel
    some = max(_MOST_WRITTEN // (outputs * weight.shape[-1]), 1)  # panels at a time
    matrices = weight.detach().reshape(-1, *weight.shape[-2:])
    by_matrix = panels.view(-1, *panels.shape[-3:]), scale.view(-1, scale.shape[-1]), matrices
    for into, by, matrix in zip(*by_matrix, strict=True):
        parts = into.split(some), by.split(some * outputs), matrix.split(some * outputs)
        for some_panels, some_scales, rows in zip(*parts, strict=True):
            values, of_rows = nearest(rows, rows.shape[-1], bits=8)
            some_panels.copy_(few_rows.packed(values)), some_scales.copy_(of_rows[:, 0])
