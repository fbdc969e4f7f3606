"""Caches kept from one `generate` to the next, with the steps recorded on them, each of which took as long as many
repeats of it.

A model keeps one, of at most a quarter of its weights' size, or 64 MiB. It serves as many rows again that are no
longer, while every module, parameter, buffer and setting of the model is what it was.

Knows nothing of what is recorded. Next: `nn/cache.py`, `nn/steps.py`; `session.py`, which asks.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from layerskip_moe.nn import KVCache, MoEDecoder

ROUNDING = 256  # capacities are multiples of it, so that texts of about the same length find one that fits
_LARGEST, _SMALL = 0.25, 2**26  # of the weights' bytes; bytes that any machine can spare


@dataclass(eq=False)
class _Parts:
    """What recordings depend on. The model itself is not held: its kept cache would keep it.

    Attributes:
        objects: the modules below the model, their classes, all parameters and buffers, and the settings
        values: of every module its plain attributes; where weights lie
    """

    objects: list[Any]
    values: list[Any]

    @classmethod
    def of(cls, model: MoEDecoder) -> "_Parts":
        modules, tensors = list(model.modules())[1:], [*model.parameters(), *model.buffers()]
        attributes = [value for module in modules for name, value in vars(module).items() if name != "training"]
        return cls(
            [*modules, *map(type, modules), *tensors, model.config],
            [value for value in attributes if value is None or isinstance(value, bool | int | float | str)]
            + [tensor.data_ptr() for tensor in tensors if type(tensor.data) is Tensor],
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Parts) or len(self.objects) != len(other.objects) or self.values != other.values:
            return False
        return all(one is another for one, another in zip(self.objects, other.objects, strict=True))


_kept: "WeakKeyDictionary[MoEDecoder, tuple[KVCache, _Parts]]" = WeakKeyDictionary()


def take_cache(model: MoEDecoder, batch_size: int, capacity: int, *, n_layers: int | None = None) -> KVCache:
    """An empty cache that fits the first `n_layers` layers of `model`, by default all, and `capacity` positions."""
    n_layers = n_layers or model.config.n_layers
    cache, parts = _kept.pop(model, (None, None))  # one user at a time
    if cache is not None and parts == _Parts.of(model):
        found = *cache.keys.shape[:2], cache.keys.dtype, cache.keys.device
        # Outside inference mode nothing may be written to what was made within.
        may_write = torch.is_inference_mode_enabled() or not cache.keys.is_inference()
        fits = found == (n_layers, batch_size, model.dtype, model.device) and cache.capacity >= capacity
        if fits and may_write:
            cache.clear()
            return cache
    del cache, parts  # before there is another
    capacity = min(-(-capacity // ROUNDING) * ROUNDING, model.config.max_seq_len)
    return KVCache(model.config, batch_size, capacity, n_layers=n_layers, dtype=model.dtype, device=model.device)


def keep_cache(model: MoEDecoder, cache: KVCache) -> None:
    """Keep a cache that nobody uses any more, with what is recorded on it."""
    most = max(_LARGEST * sum(parameter.nbytes for parameter in model.parameters()), _SMALL)
    if cache.recordings and cache.nbytes <= most:
        _kept[model] = cache, _Parts.of(model)
