"""Where each tensor of a transformers checkpoint lies in MoEDecoder's state dict.

D width, E experts, F hidden width of an MLP or expert. A checkpoint has one tensor per projection and expert; here
query, key and value are rows of one matrix, gate and up are another's, and the experts are stacked.
Knows nothing of files or values. Next: `weights.py`, which copies.
"""

from collections.abc import Iterator
from typing import NamedTuple

from layerskip_moe.nn import ModelConfig


class Place(NamedTuple):
    """A parameter, or the part of one that `parameter[index]` is; index () is the whole."""

    parameter: str
    index: tuple[int | slice, ...] = ()  # type: ignore[assignment]  # tuple's method of that name is not needed


def tensor_places(config: ModelConfig, family: str, *, fused: bool = False) -> dict[str, Place]:
    """Name in the checkpoint -> place in the state dict, for every tensor that the family has of this network.

    The places are apart and leave out no part of any parameter. family must be one that expresses config.

    fused: the experts' names as transformers 5 holds them in memory, mlp.experts.gate_up_proj [E, 2F, D] and
        down_proj [E, D, F], instead of those it writes to disk, one per expert and projection
    """
    places = {"model.embed_tokens.weight": Place("embedding.weight"), "model.norm.weight": Place("norm.weight")}
    if not config.tie_embeddings:
        places["lm_head.weight"] = Place("head.weight")
    for layer in range(config.n_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        places[f"{theirs}.input_layernorm.weight"] = Place(f"{ours}.attention_norm.weight")
        places[f"{theirs}.post_attention_layernorm.weight"] = Place(f"{ours}.mlp_norm.weight")
        places.update(_attention(config, f"{theirs}.self_attn", f"{ours}.attention"))
        if not config.is_moe(layer):
            assert config.dense_d_ff is not None, "ModelConfig fills it in"
            places.update(_mlp(f"{theirs}.mlp", f"{ours}.mlp", config.dense_d_ff, bias=config.mlp_bias))
        else:
            places.update(_experts(config, family, f"{theirs}.mlp", f"{ours}.mlp", fused))
    return places


def ignorable(name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint may hold this tensor although the network has none of its own for it: rotary frequencies,
    which old releases wrote, and the head where it is the embedding.

    Such a head may be left out only if it equals the embedding, which whoever reads the values has to see to:
    transformers unties two that differ.
    """
    return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")


def _attention(config: ModelConfig, theirs: str, ours: str) -> Iterator[tuple[str, Place]]:
    queries, keys = config.n_heads * config.head_width, config.kv_heads * config.head_width
    starts = {"q": 0, "k": queries, "v": queries + keys}
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        for projection, start in starts.items():
            rows = slice(start, start + (queries if projection == "q" else keys))
            yield f"{theirs}.{projection}_proj.{kind}", Place(f"{ours}.qkv.{kind}", (rows,))
    for kind in ("weight", "bias") if config.output_bias else ("weight",):
        yield f"{theirs}.o_proj.{kind}", Place(f"{ours}.output.{kind}")
    if config.qk_norm is not None:
        yield f"{theirs}.q_norm.weight", Place(f"{ours}.query_norm.weight")
        yield f"{theirs}.k_norm.weight", Place(f"{ours}.key_norm.weight")


def _mlp(theirs: str, ours: str, hidden: int, *, bias: bool = False) -> Iterator[tuple[str, Place]]:
    for kind in ("weight", "bias") if bias else ("weight",):
        yield f"{theirs}.gate_proj.{kind}", Place(f"{ours}.gate_up.{kind}", (slice(0, hidden),))
        yield f"{theirs}.up_proj.{kind}", Place(f"{ours}.gate_up.{kind}", (slice(hidden, 2 * hidden),))
        yield f"{theirs}.down_proj.{kind}", Place(f"{ours}.down.{kind}")


def _experts(config: ModelConfig, family: str, theirs: str, ours: str, fused: bool) -> Iterator[tuple[str, Place]]:
    hidden = config.expert_d_ff
    gate, up, down = "gate_proj", "up_proj", "down_proj"
    if family == "mixtral" and not fused:
        theirs = theirs.removesuffix("mlp") + "block_sparse_moe"
        gate, up, down = "w1", "w3", "w2"
    yield f"{theirs}.gate.weight", Place(f"{ours}.router.weight")
    if fused:
        yield f"{theirs}.experts.gate_up_proj", Place(f"{ours}.experts.gate_up")
        yield f"{theirs}.experts.down_proj", Place(f"{ours}.experts.down")
    else:
        for expert in range(config.num_experts):
            one, stack = f"{theirs}.experts.{expert}", f"{ours}.experts"
            yield f"{one}.{gate}.weight", Place(f"{stack}.gate_up", (expert, slice(0, hidden)))
            yield f"{one}.{up}.weight", Place(f"{stack}.gate_up", (expert, slice(hidden, 2 * hidden)))
            yield f"{one}.{down}.weight", Place(f"{stack}.down", (expert,))
    if config.shared_expert_d_ff:
        yield from _mlp(f"{theirs}.shared_expert", f"{ours}.shared", config.shared_expert_d_ff)
    if config.shared_expert_gate:
        yield f"{theirs}.shared_expert_gate.weight", Place(f"{ours}.shared_gate.weight")
