"""What tells a model from every other: a file made with one is refused with another, and so are ranks that differ.

Knows nothing of files and ranks. Next: `generation/calibration.py`, `analysis/trace.py` and `training/run.py`, which
ask.
"""

import hashlib
import json
from dataclasses import asdict

import torch

from layerskip_moe.nn.decoder import MoEDecoder
from layerskip_moe.nn.products import as_floats, is_quantized

_UNUSED = ("max_seq_len", "dropout", "init_std")  # settings that change no text
_MOST = 2**16  # numbers of a tensor that are read


def model_fingerprint(model: MoEDecoder) -> str:
    """Tells a model from others, also from its own copy in another type or quantised: a digest of the settings and of
    all its tensors, the larger ones by 65,536 of their numbers, evenly spread. Wherever it is moved to, or saved and
    loaded, it stays the same."""
    settings = {name: value for name, value in asdict(model.config).items() if name not in _UNUSED}
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, weight in model.state_dict(keep_vars=True).items():  # (inference mode has no view of a quantised one)
        kind = [name, type(weight).__name__, str(weight.dtype), list(weight.shape)]
        digest.update(json.dumps(kind).encode())
        floats = (as_floats(weight, torch.float32) if is_quantized(weight) else weight.detach()).flatten()
        some = floats[:: -(-floats.numel() // _MOST)] if floats.numel() else floats
        digest.update(some.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
