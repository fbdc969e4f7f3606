"""GGUF files for llama.cpp: the network and its tokenizer in one file, where llama.cpp computes exactly this network.

    llama      no query/key norm; experts with normed weights in every layer (Mixtral), or none (Llama)
    qwen3moe   query/key norm per head, experts with normed weights in every layer: the native network
    qwen3      the same without experts
    olmoe      query/key norm over the full width, experts whose weights are not normed
    qwen2moe   no query/key norm, experts whose weights are not normed, and a gated shared expert

H query heads, D width, F hidden width, E experts. llama.cpp rotates neighbouring pairs in "llama" (rows of queries
and keys are permuted for that) and the two halves, as here, in the others. Knows nothing of other layouts. Next:
`gguf_tokenizer.py`; what llama.cpp does is in its src/models/<architecture>.cpp.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from layerskip_moe.files import replacing
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.nn.block import MoEMLP
from layerskip_moe.nn.config import RopeScaling
from layerskip_moe.nn.rotary import rotary_table, yarn_attention_factor
from layerskip_moe.pretrained.quantize import quantization_of
from layerskip_moe.refusals import shown

if TYPE_CHECKING:
    import gguf
    from tokenizers import Tokenizer

GGUFType = Literal["float32", "float16", "bfloat16", "q8_0"]

# What each architecture's code takes for granted of the settings that could be otherwise.
_FIXED: dict[str, dict[str, Any]] = {
    "llama": {"qk_norm": None, "normalize_top_k": True},
    "qwen3moe": {"qk_norm": "head", "normalize_top_k": True, "output_bias": False},
    "qwen3": {"qk_norm": "head", "output_bias": False, "mlp_bias": False},
    "olmoe": {"qk_norm": "full", "normalize_top_k": False, "output_bias": False},
    "qwen2moe": {"qk_norm": None, "normalize_top_k": False, "output_bias": False, "shared_expert_gate": True},
}
_NEEDS_HEAD = ("olmoe", "qwen2moe")  # a tied head must be written out for them
_Q8_BLOCK = 32


def export_gguf(model: MoEDecoder, tokenizer: "Tokenizer", path: str | Path, *, dtype: GGUFType = "float32") -> None:
    """Write the network and its tokenizer to a GGUF file, in place of an older one only when it is whole.

    dtype: of the matrices; norms, biases and routers are float32 always. "q8_0" is llama.cpp's 8 bits in blocks
        of 32; matrices whose rows 32 does not divide are float16 then

    Raises ValueError, naming the settings, for a network or a tokenizer that llama.cpp would not compute exactly,
    for quantised weights, and for weights beyond float16's range; ImportError without the package gguf. Warns where
    llama.cpp encodes some unusual text differently.
    """
    from layerskip_moe.pretrained.gguf_tokenizer import add_tokenizer

    path = Path(path)
    if dtype not in get_args(GGUFType):
        raise ValueError(f"dtype={shown(dtype)} is unknown; it is {', '.join(map(repr, get_args(GGUFType)))}.")
    check_gguf(model.config, path)
    if quantization_of(model) is not None:
        raise ValueError("the model is quantised; export the one that it was made from, with dtype='q8_0' for 8 bits.")
    gguf = import_gguf()

    architecture = _architecture(model.config)
    with replacing(path) as beside:
        writer = gguf.GGUFWriter(beside, architecture)
        try:
            _add_settings(writer, model.config, architecture, dtype)
            add_tokenizer(writer, tokenizer, model.config.vocab_size)
            count = 0
            for name, tensor in _tensors(model, architecture):
                kind, numbers = _stored_as(name, tensor, dtype), np.dtype(np.float32)
                block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
                size = tensor.numel() // block * block_bytes
                writer.add_tensor_info(name, tuple(tensor.shape), numbers, size, raw_dtype=kind)
                count += 1
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in tqdm(_tensors(model, architecture), desc=f"writing {path.name}", total=count, delay=2):
                writer.write_tensor_data(_packed(name, tensor, _stored_as(name, tensor, dtype)))
        finally:
            writer.close()


def check_gguf(config: ModelConfig, path: str | Path) -> None:
    """Raise, as `export_gguf` would, for a network that llama.cpp cannot compute, a path that is a folder, and where
    the package gguf is missing."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of the file to write, such as {path / 'model.gguf'}.")
    found = gguf_obstacles(config)
    if found:
        raise ValueError(f"llama.cpp cannot compute this network: {'; '.join(found)}.")
    import_gguf()


def gguf_obstacles(config: ModelConfig) -> list[str]:
    """The settings that llama.cpp's closest architecture does not compute, a phrase each; none: it is exact."""
    name = _architecture(config)
    fixed = {"bias_balancing": False, "router_average": 0.0, "router_hold": 1, "clip_qkv": None, **_FIXED[name]}
    if config.num_experts == 0:
        fixed.pop("normalize_top_k", None)
    found = [
        f"{setting}={getattr(config, setting)!r} (its {name} has {value!r})"
        for setting, value in fixed.items()
        if getattr(config, setting) != value
    ]
    if config.num_experts and not all(config.is_moe(layer) for layer in range(config.n_layers)):
        found.append(f"moe_layers={config.moe_layers!r} (its {name} has experts in every layer)")
    window = config.sliding_window
    if window is not None and window < config.max_seq_len and any(map(config.is_windowed, range(config.n_layers))):
        found.append(f"sliding_window={window} (its {name} reads all earlier positions)")
    if name in ("olmoe", "qwen2moe") and config.n_heads * config.head_width != config.d_model:
        found.append(f"head_dim={config.head_dim} (its {name} has d_model / n_heads)")
    if name == "olmoe" and config.kv_heads != config.n_heads:
        found.append(f"n_kv_heads={config.n_kv_heads} (its olmoe has as many as n_heads)")
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "llama3" and name != "llama":
        found.append(f"rope_scaling of kind 'llama3' (its {name} has linear and yarn)")
    if scaling is not None and scaling.kind == "yarn":
        for setting in ("beta_fast", "beta_slow", "truncate"):
            default = getattr(RopeScaling, setting)
            if getattr(scaling, setting) != default:
                found.append(f"rope_scaling's {setting}={getattr(scaling, setting)} (its {name} has {default})")
    return found


def import_gguf() -> Any:
    """The package gguf, or an ImportError that says how to get it."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"GGUF files are written by the package gguf ({error}); pip install 'gguf>=0.10'.") from error
    return gguf


def _architecture(config: ModelConfig) -> str:
    """llama.cpp's name for the closest of its architectures."""
    if config.num_experts == 0:
        return "llama" if config.qk_norm is None else "qwen3"
    if config.shared_expert_d_ff:
        return "qwen2moe"
    return {"head": "qwen3moe", "full": "olmoe", None: "llama"}[config.qk_norm]


def _add_settings(writer: "gguf.GGUFWriter", config: ModelConfig, architecture: str, dtype: GGUFType) -> None:
    gguf = import_gguf()
    kinds = gguf.LlamaFileType
    file_types = dict(
        float32=kinds.ALL_F32, float16=kinds.MOSTLY_F16, bfloat16=kinds.MOSTLY_BF16, q8_0=kinds.MOSTLY_Q8_0
    )
    writer.add_file_type(file_types[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)
    if config.num_experts:
        writer.add_feed_forward_length(config.expert_d_ff)
        writer.add_expert_feed_forward_length(config.expert_d_ff)
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.top_k)
    else:
        assert config.dense_d_ff is not None, "ModelConfig fills it in"
        writer.add_feed_forward_length(config.dense_d_ff)
    if config.shared_expert_d_ff:
        writer.add_expert_shared_feed_forward_length(config.shared_expert_d_ff)
    if config.rope_scaling is not None and config.rope_scaling.kind != "llama3":  # which is in the tensor rope_freqs
        _add_rope_scaling(writer, config.rope_scaling)


def _add_rope_scaling(writer: "gguf.GGUFWriter", scaling: RopeScaling) -> None:
    types = import_gguf().RopeScalingType
    writer.add_rope_scaling_type(types.YARN if scaling.kind == "yarn" else types.LINEAR)
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.trained_length)
        if scaling.attention_factor is not None:  # llama.cpp multiplies its own factor by this
            writer.add_rope_scaling_attn_factors(scaling.attention_factor / yarn_attention_factor(scaling.factor))


def _tensors(model: MoEDecoder, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by llama.cpp's name, as [..., rows, inputs]; permuted ones are copies, the others views."""
    config = model.config
    yield "token_embd.weight", model.embedding.weight.detach()
    yield "output_norm.weight", model.norm.weight.detach()
    if model.head is not None or architecture in _NEEDS_HEAD:
        yield "output.weight", model.head_weight.detach()
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        yield "rope_freqs.weight", _slowed_by(config)
    for layer, block in enumerate(model.blocks):
        own = {name: tensor.detach() for name, tensor in block.named_parameters()}
        for name, tensor in (*_attention(own, config, architecture), *_mlp(own, isinstance(block.mlp, MoEMLP))):
            yield f"blk.{layer}.{name}", tensor


def _slowed_by(config: ModelConfig) -> Tensor:
    """[head_dim / 2]: how many times slower each rotated pair turns than without scaling."""
    frequencies = []
    for scaling in (None, config.rope_scaling):
        cos, sin = rotary_table(config.head_width, config.rope_theta, scaling, 2, torch.device("cpu"))
        frequencies.append(torch.atan2(sin[1], cos[1])[: config.head_width // 2])  # at position 1, the angle itself
    return frequencies[0] / frequencies[1]


def _attention(own: dict[str, Tensor], config: ModelConfig, architecture: str) -> Iterator[tuple[str, Tensor]]:
    yield "attn_norm.weight", own["attention_norm.weight"]
    heads, width = (config.n_heads, config.kv_heads, config.kv_heads), config.head_width
    for kind in ("weight", "bias"):
        if f"attention.qkv.{kind}" not in own:
            continue
        rows = own[f"attention.qkv.{kind}"].split([count * width for count in heads])
        for name, part, count in zip("qkv", rows, heads, strict=True):
            permuted = architecture == "llama" and name != "v"
            yield f"attn_{name}.{kind}", _neighbouring_pairs(part, count) if permuted else part
    yield "attn_output.weight", own["attention.output.weight"]
    if "attention.output.bias" in own:
        yield "attn_output.bias", own["attention.output.bias"]
    if config.qk_norm is not None:
        yield "attn_q_norm.weight", own["attention.query_norm.weight"]
        yield "attn_k_norm.weight", own["attention.key_norm.weight"]


def _neighbouring_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * head_dim, ...] whose rotated pairs are halves of a head -> the same with pairs side by side."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def _mlp(own: dict[str, Tensor], has_experts: bool) -> Iterator[tuple[str, Tensor]]:
    yield "ffn_norm.weight", own["mlp_norm.weight"]
    if not has_experts:
        for kind in ("weight", "bias"):
            if f"mlp.down.{kind}" in own:
                yield from _gate_up_down(own[f"mlp.gate_up.{kind}"], own[f"mlp.down.{kind}"], f".{kind}")
        return
    yield "ffn_gate_inp.weight", own["mlp.router.weight"]
    yield from _gate_up_down(own["mlp.experts.gate_up"], own["mlp.experts.down"], "_exps.weight", rows=1)
    if "mlp.shared.down.weight" in own:
        yield "ffn_gate_inp_shexp.weight", own["mlp.shared_gate.weight"][0]
        yield from _gate_up_down(own["mlp.shared.gate_up.weight"], own["mlp.shared.down.weight"], "_shexp.weight")


def _gate_up_down(gate_up: Tensor, down: Tensor, suffix: str, rows: int = 0) -> Iterator[tuple[str, Tensor]]:
    gate, up = gate_up.chunk(2, dim=rows)
    yield f"ffn_gate{suffix}", gate
    yield f"ffn_up{suffix}", up
    yield f"ffn_down{suffix}", down


def _stored_as(name: str, tensor: Tensor, dtype: GGUFType) -> Any:
    """The GGML type that a tensor is written in."""
    kinds = import_gguf().GGMLQuantizationType
    if tensor.dim() == 1 or name.endswith("ffn_gate_inp.weight"):
        return kinds.F32
    if dtype == "q8_0" and tensor.shape[-1] % _Q8_BLOCK:
        return kinds.F16
    return dict(float32=kinds.F32, float16=kinds.F16, bfloat16=kinds.BF16, q8_0=kinds.Q8_0)[dtype]


def _packed(name: str, tensor: Tensor, kind: Any) -> Any:
    """The numbers of one tensor, as a NumPy array of what is written."""
    gguf = import_gguf()
    numbers = tensor.to("cpu", torch.float32).contiguous()
    if kind == gguf.GGMLQuantizationType.F16 and numbers.abs().max() > torch.finfo(torch.float16).max:
        raise ValueError(f"{name} holds weights beyond float16's range; give dtype='bfloat16' or 'float32'.")
    return gguf.quants.quantize(numbers.numpy(), kind)
