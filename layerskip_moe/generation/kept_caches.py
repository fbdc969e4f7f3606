"""Caches kept from one `generate` to the next, with the steps recorded on them, each of which took as long as many
repeats of it.

A model keeps one, where it is small beside its weights. It serves as many rows again that are no longer, while every
module and parameter of the model is the one it was.

Knows nothing of what is recorded. Next: `nn/cache.py`, `nn/steps.py`; `session.py`, which asks.
"""

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from layerskip_moe.nn import KVCache, MoEDecoder

_ROUNDING = 256  # capacities are multiples of it, so that texts of about the same length find one that fits
_kept: "WeakKeyDictionary[MoEDecoder, tuple[KVCache, list[Any]]]" = WeakKeyDictionary()


def new_cache(model: MoEDecoder, batch_size: int, capacity: int, *, n_layers: int | None = None) -> KVCache:
    """An empty cache that fits the first `n_layers` layers of `model`, by default all, and `capacity` positions."""
    n_layers = n_layers or model.config.n_layers
    cache, parts = _kept.pop(model, (None, []))  # one user at a time
    if cache is not None and _same(parts, _parts(model)):
        found = *cache.keys.shape[:2], cache.keys.dtype, cache.keys.device
        if found == (n_layers, batch_size, model.dtype, model.device) and cache.capacity >= capacity:
            cache.clear()
            return cache
    capacity = min(-(-capacity // _ROUNDING) * _ROUNDING, model.config.max_seq_len)
    return KVCache(model.config, batch_size, capacity, n_layers=n_layers, dtype=model.dtype, device=model.device)


def keep_cache(model: MoEDecoder, cache: KVCache) -> None:
    """Keep a cache that nobody uses any more, with what is recorded on it."""
    size = cache.keys.nbytes + cache.values.nbytes
    if cache.recordings and size <= sum(parameter.nbytes for parameter in model.parameters()):
        _kept[model] = cache, _parts(model)


def _parts(model: MoEDecoder) -> list[Any]:
    """What recordings depend on: the modules below the model (which would hold itself), its parameters, its settings,
    and where weights lie."""
    modules, parameters = list(model.modules())[1:], list(model.parameters())
    plain = [parameter for parameter in parameters if type(parameter.data) is Tensor]
    return [*modules, *parameters, model.config, *(parameter.data_ptr() for parameter in plain)]


def _same(parts: list[Any], others: list[Any]) -> bool:
    return len(parts) == len(others) and all(
        part == other if isinstance(part, int) else part is other for part, other in zip(parts, others, strict=True)
    )
