"""What `MoEDecoder.run` refuses, each with a sentence that says what would be right.

Knows nothing of the network's arithmetic. Next: `decoder.py`.
"""

from collections.abc import Sequence

from torch import Tensor

from layerskip_moe.nn.cache import KVCache
from layerskip_moe.nn.config import ModelConfig


def check_positions(positions: Tensor, config: ModelConfig, cache: KVCache | None) -> int:
    """How many positions of a row are in play: one past the last. With a GPU's cache this waits for it, once."""
    limit = config.max_seq_len
    length = positions.shape[1] if cache is None else int(positions.max()) + 1
    if length > limit or (cache is not None and length > cache.capacity):
        room = "" if cache is None else f" and the cache has {cache.capacity} slots"
        raise ValueError(
            f"{length} positions are too many: max_seq_len is {limit}{room}; "
            "use less text or ask for fewer tokens, or build the model with a larger max_seq_len."
        )
    return length


def check_run(
    layers: list[int],
    config: ModelConfig,
    batch_size: int,
    cache: KVCache | None,
    keep: Tensor | None = None,
    keep_experts: Tensor | None = None,
    expert_mask: Tensor | None = None,
    top_k: int | None = None,
    collect: Sequence[int] = (),
) -> None:
    """Raise ValueError for what `MoEDecoder.run` refuses, positions apart."""
    if layers != sorted(set(layers)) or (layers and not 0 <= layers[0] <= layers[-1] < config.n_layers):
        raise ValueError(f"layers={layers} must rise and lie within 0 to {config.n_layers - 1}.")
    if not set(collect) <= set(layers):
        raise ValueError(f"collect={list(collect)} names layers that do not run; layers={layers} do.")
    for name, mask in (("keep", keep), ("keep_experts", keep_experts)):
        if mask is not None and mask.shape != (len(layers), batch_size):
            raise ValueError(
                f"{name} is {list(mask.shape)} but {len(layers)} layers run {batch_size} samples; "
                "give a row for each layer and a column for each sample."
            )
    wanted = ((config.num_experts,), (len(layers), config.num_experts))
    if expert_mask is not None and expert_mask.shape not in wanted:
        raise ValueError(f"expert_mask is {list(expert_mask.shape)} but must be {' or '.join(map(str, wanted))}.")
    if keep is not None and cache is not None:
        raise ValueError("keep is for training without a cache: a skipped sample would leave holes in it.")
    if config.router_remembers and cache is not None:
        if keep_experts is not None:
            raise ValueError(
                "keep_experts is for runs without a cache where routers look back: a skipped sample would leave holes."
            )
        if cache.router_logits is None:
            raise ValueError(
                "the cache keeps no router logits, which this network looks back at; make it of its config."
            )
    if top_k is not None and not 1 <= top_k <= config.num_experts:
        raise ValueError(f"top_k={top_k} must be between 1 and num_experts={config.num_experts}.")
    if expert_mask is not None and int(expert_mask.sum(-1).min()) < (top_k or config.top_k):
        raise ValueError(f"expert_mask leaves fewer experts active than the top {top_k or config.top_k} to choose.")
