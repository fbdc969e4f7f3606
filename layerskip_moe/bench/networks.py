"""The networks that are timed: two of fixed sizes with random weights, or a saved one; and what a token reads of them.

Speed does not depend on the weights' values; how many drafts are accepted does, so speculation is meaningful with a
trained model alone. Knows nothing of clocks or peers. Next: `ours.py`, `peers.py`.
"""

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained.quantize import quantization_of, quantize, quantized_state

NetworkName = Literal["mixtral", "qwen3"]
Precision = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True)
class Network:
    """What is timed: a reference network with random weights, or a saved model.

    Attributes:
        network: mixtral (experts in every layer, no query/key norm) or qwen3 (experts in every other layer, query/key
            norm per head, dense layers as wide as the chosen experts together)
        model: folder of a checkpoint, or owner/name on the Hugging Face hub, to be timed instead; the sizes below then
            do not matter
        n_layers: L, layers
        d_model: D, width
        n_heads: H, query heads
        n_kv_heads: G, key-value heads
        num_experts: E
        top_k: K, experts chosen per token
        d_ff: F, hidden width of an expert
        vocab_size: V
        max_seq_len: positions the network may be run at
        seed: of the weights and the prompts
    """

    network: NetworkName = "mixtral"
    model: str | None = None
    n_layers: int = 12
    d_model: int = 512
    n_heads: int = 8
    n_kv_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    d_ff: int = 1024
    vocab_size: int = 8192
    max_seq_len: int = 8192
    seed: int = 0


def reference_config(network: Network) -> ModelConfig:
    """The sizes of a reference network; ValueError as ModelConfig."""
    sizes = asdict(network)
    for name in ("network", "model", "seed"):
        del sizes[name]
    if network.network == "mixtral":
        return ModelConfig(**sizes, qk_norm=None)
    return ModelConfig(**sizes, qk_norm="head", moe_layers="every other", dense_d_ff=network.top_k * network.d_ff)


def load_network(network: Network, device: str) -> MoEDecoder:
    """The network in float32, in evaluation mode; ValueError for a checkpoint that cannot be loaded."""
    if network.model is not None:
        return MoEDecoder.from_pretrained(network.model, dtype=torch.float32, device=device)
    return MoEDecoder(reference_config(network), seed=network.seed).to(device).eval()


def at_precision(model: MoEDecoder, precision: Precision) -> MoEDecoder:
    """A float32 model at a precision: itself in float32, else a copy. int8 is `quantize` of the float32 weights, so
    what is not quantised, the cache among it, stays float32."""
    if precision == "int8":
        return quantize(model, "int8")
    return model if precision == "float32" else copy.deepcopy(model).to(getattr(torch, precision))


def with_experts(model: MoEDecoder, num_experts: int, *, seed: int) -> MoEDecoder:
    """A network of the same sizes with another number of experts and random weights, of the same type."""
    other = MoEDecoder(replace(model.config, num_experts=num_experts), seed=seed)
    return other.to(device=model.device, dtype=model.dtype).eval()


def random_tokens(count: int, vocab_size: int, *, seed: int) -> list[int]:
    """Token ids."""
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def weight_bytes(model: MoEDecoder) -> tuple[int, int]:
    """(bytes of all weights, bytes of those that one token reads: K of the E experts in each layer, and of the
    embedding its row alone)."""
    state = model.state_dict() if quantization_of(model) is None else quantized_state(model)[0]
    experts = sum(tensor.nbytes for name, tensor in state.items() if ".experts." in name)
    total = sum(tensor.nbytes for tensor in state.values())
    idle = experts - experts * model.config.top_k // max(model.config.num_experts, 1)
    embedding = 0 if model.config.tie_embeddings else model.embedding.weight.nbytes
    return total, total - idle - embedding


def cache_bytes(model: MoEDecoder, positions: float) -> int:
    """Bytes of the keys and values of so many positions of one row, in all layers."""
    config = model.config
    return round(2 * config.n_layers * positions * config.kv_heads * config.head_width * model.dtype.itemsize)


def describe_network(network: Network, model: MoEDecoder) -> dict[str, Any]:
    """Plain values, ready for JSON; active: parameters that one token uses, the embedding not counted."""
    total, active = model.parameter_counts()
    embedding = 0 if model.config.tie_embeddings else model.embedding.weight.numel()
    name = network.network if network.model is None else network.model
    return {
        "name": name,
        "weights": f"random, seed {network.seed}" if network.model is None else "of the checkpoint",
        "config": asdict(model.config),
        "parameters": total,
        "active": active - embedding,
    }
