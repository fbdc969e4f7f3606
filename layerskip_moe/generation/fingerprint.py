"""What tells a model from every other: a file made with one is refused with another.

Knows nothing of such files. Next: `calibration.py` and `analysis/trace.py`, which are two.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.products import as_floats, is_quantized

_UNUSED = ("max_seq_len", "dropout", "init_std")  # settings that change no text


_known: "WeakKeyDictionary[MoEDecoder, tuple[list[object], str]]" = WeakKeyDictionary()


def model_fingerprint(model: MoEDecoder) -> str:
    """Tells a model from others, also from its own copy in another type or quantised: a digest of the settings and of
    all its tensors. Wherever it is moved to, or saved and loaded, it stays the same.

    Every weight is read, which takes 0.3 s for 100 million in float32, and memory for one tensor at most; but only once
    while nothing is written to them (a change by way of `tensor.data` goes unseen).
    """
    settings = {name: value for name, value in asdict(model.config).items() if name not in _UNUSED}
    tensors = model.state_dict(keep_vars=True)  # (inference mode has no view of a quantised one)
    # Nobody counts what is written to these.
    if any(weight.is_inference() or is_quantized(weight) for weight in tensors.values()):
        return _digest(settings, tensors)
    now: list[object] = [settings, *((id(weight), weight._version, weight.dtype) for weight in tensors.values())]
    if model not in _known or _known[model][0] != now:
        _known[model] = now, _digest(settings, tensors)
    return _known[model][1]


def _digest(settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, weight in tensors.items():
        kind = [name, type(weight).__name__, str(weight.dtype), list(weight.shape)]
        digest.update(json.dumps(kind).encode())
        floats = as_floats(weight, torch.float32) if is_quantized(weight) else weight.detach()
        digest.update(floats.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
