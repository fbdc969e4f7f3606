"""config.json of six families of transformers, read as a ModelConfig and written from one.

A file is computed exactly or refused: every field that changes the family's arithmetic in transformers 5 is either
honoured or named in a ValueError; those that only training uses, and those that transformers ignores, are passed by.
Knows nothing of files (`checkpoint.py`) or tensors. Next: `position_fields.py` (the fields of rotary positions and
windows, which have several spellings), `layouts.py` (where a family's tensors lie).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerskip_moe.nn import ModelConfig
from layerskip_moe.nn.config import MOST_LAYERS
from layerskip_moe.pretrained.position_fields import read_rope, read_window, whole, write_rope, write_window
from layerskip_moe.refusals import require_whole, shortened, shown


@dataclass(frozen=True)
class Family:
    """What the config.json of one model_type can say, and what the family settles by itself.

    Attributes:
        architecture: the class that `architectures` names
        defaults: transformers' values of the fields that may be left out; a field that is not among them does
            not exist in the family, but for head_dim, which every family looks for
        names: ModelConfig's name of a setting -> config.json's, where the two hold the same value
        fixed: ModelConfig's settings that no field of the family changes
    """

    architecture: str
    defaults: Mapping[str, Any]
    names: Mapping[str, str]
    fixed: Mapping[str, Any]


_NAMES = {
    "vocab_size": "vocab_size",
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
_EXPERTS = {"num_experts": "num_experts", "top_k": "num_experts_per_tok", "normalize_top_k": "norm_topk_prob"}
_BIASES = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
_QWEN_MOE = {"d_ff": "moe_intermediate_size", "dense_d_ff": "intermediate_size"}

_DEFAULTS = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

# In the order in which a network that several could express would be written.
FAMILIES: dict[str, Family] = {
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        defaults=_DEFAULTS
        | dict(vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768)
        | dict(num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=32768)
        | dict(num_experts=128, num_experts_per_tok=8, norm_topk_prob=False, attention_bias=False)
        | dict(decoder_sparse_step=1, mlp_only_layers=None, use_sliding_window=False, sliding_window=4096),
        names=_NAMES | _EXPERTS | _BIASES | _QWEN_MOE,
        fixed=dict(qk_norm="head", shared_expert_d_ff=0, clip_qkv=None, mlp_bias=False),
    ),
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        defaults=_DEFAULTS
        | dict(vocab_size=151936, hidden_size=2048, intermediate_size=5632, moe_intermediate_size=1408)
        | dict(num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=32768)
        | dict(num_experts=60, num_experts_per_tok=4, norm_topk_prob=False, shared_expert_intermediate_size=5632)
        | dict(decoder_sparse_step=1, mlp_only_layers=None, use_sliding_window=False, sliding_window=4096)
        | dict(max_window_layers=28, layer_types=None, qkv_bias=True),
        names=_NAMES
        | _EXPERTS
        | _QWEN_MOE
        | {"shared_expert_d_ff": "shared_expert_intermediate_size", "qkv_bias": "qkv_bias"},
        fixed=dict(qk_norm=None, shared_expert_gate=True, output_bias=False, clip_qkv=None, mlp_bias=False),
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        defaults=_DEFAULTS
        | dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
        | dict(num_attention_heads=32, num_key_value_heads=8, head_dim=None, max_position_embeddings=131072)
        | dict(num_local_experts=8, num_experts_per_tok=2, sliding_window=None, rms_norm_eps=1e-5, rope_theta=1e6),
        names=_NAMES
        | {"d_ff": "intermediate_size", "num_experts": "num_local_experts", "top_k": "num_experts_per_tok"},
        fixed=dict(qk_norm=None, normalize_top_k=True, moe_layers="all", shared_expert_d_ff=0)
        | dict(qkv_bias=False, output_bias=False, clip_qkv=None, mlp_bias=False),
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        defaults=_DEFAULTS
        | dict(vocab_size=50304, hidden_size=2048, intermediate_size=2048, num_hidden_layers=16)
        | dict(num_attention_heads=16, num_key_value_heads=None, max_position_embeddings=4096, rms_norm_eps=1e-5)
        | dict(num_experts=64, num_experts_per_tok=8, norm_topk_prob=False, attention_bias=False, clip_qkv=None),
        names=_NAMES | _EXPERTS | _BIASES | {"d_ff": "intermediate_size", "clip_qkv": "clip_qkv"},
        fixed=dict(qk_norm="full", moe_layers="all", shared_expert_d_ff=0, mlp_bias=False),
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults=_DEFAULTS
        | dict(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32)
        | dict(num_attention_heads=32, num_key_value_heads=32, head_dim=128, max_position_embeddings=32768)
        | dict(attention_bias=False, use_sliding_window=False, sliding_window=4096)
        | dict(max_window_layers=28, layer_types=None),
        names=_NAMES | _BIASES | {"dense_d_ff": "intermediate_size"},
        fixed=dict(num_experts=0, qk_norm="head", clip_qkv=None, mlp_bias=False),
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults=_DEFAULTS
        | dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
        | dict(num_attention_heads=32, num_key_value_heads=None, head_dim=None, max_position_embeddings=2048)
        | dict(attention_bias=False, mlp_bias=False),
        names=_NAMES | _BIASES | {"dense_d_ff": "intermediate_size", "mlp_bias": "mlp_bias"},
        fixed=dict(num_experts=0, qk_norm=None, clip_qkv=None),
    ),
}


def read_config(contents: Mapping[str, Any]) -> tuple[str, ModelConfig]:
    """The family and the network that a parsed config.json describes; absent fields have transformers' defaults.

    Raises ValueError, naming the field in the file's own words, for an architecture that is not among FAMILIES,
    for what cannot be computed exactly, and for sizes that do not fit together.
    """
    name = _family_named(contents)
    family = FAMILIES[name]
    values = {**family.defaults, **contents}
    _refuse_what_is_not_computed(values)
    settings = {ours: values[theirs] for ours, theirs in family.names.items()} | dict(family.fixed)
    if not isinstance(settings["init_std"], int | float) or not settings["init_std"] > 0:
        settings["init_std"] = None  # weights are read, not drawn: no reason to refuse a file
    for ours in ("d_ff", "dense_d_ff", "shared_expert_d_ff"):
        if ours in family.names:  # null would mean ModelConfig's default
            whole(values, family.names[ours])
    settings.setdefault("d_ff", settings.get("dense_d_ff"))
    n_layers = require_whole("num_hidden_layers", values["num_hidden_layers"], 1, MOST_LAYERS)
    d_model, n_heads = (whole(values, field) for field in ("hidden_size", "num_attention_heads"))
    head_dim = values.get("head_dim")
    settings["head_dim"] = d_model // n_heads if head_dim is None else head_dim
    if "num_experts" in family.names:
        settings["num_experts"] = _count_experts(values, contents, name)
    if "decoder_sparse_step" in family.defaults:
        settings["moe_layers"] = _read_moe_layers(values, n_layers)
    if settings["num_experts"] == 0:
        settings |= dict(shared_expert_d_ff=0, shared_expert_gate=False)
    try:
        settings["sliding_window"], settings["sliding_layers"] = read_window(values, family.defaults, name)
        settings["rope_theta"], settings["rope_scaling"] = read_rope(values)
        config = ModelConfig(**settings)
    except ValueError as error:
        raise ValueError(_in_their_words(str(error), family)) from None
    if config.qk_norm == "full" and config.n_heads * config.head_width != d_model:
        raise ValueError(
            f"head_dim={config.head_dim} does not fit {name}: {n_heads} heads must fill hidden_size={d_model}."
        )
    return name, config


def _family_named(contents: Mapping[str, Any]) -> str:
    """The model_type, checked against `architectures` where a file has that."""
    name = contents.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"model_type={shown(name)} cannot be loaded; the architectures that can are {', '.join(FAMILIES)}."
        )
    architectures, expected = contents.get("architectures"), FAMILIES[name].architecture
    if architectures and not (isinstance(architectures, list) and expected in architectures):
        raise ValueError(f"architectures={shown(architectures)} cannot be loaded; of {name}, only {expected} can.")
    return name


def _refuse_what_is_not_computed(values: Mapping[str, Any]) -> None:
    if values["hidden_act"] not in ("silu", "swish"):  # one function, two names
        raise ValueError(f"hidden_act={shown(values['hidden_act'])} is not computed here, only 'silu' is.")
    quantization = values.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ValueError(
            f"quantization_config says that the weights are packed ({shortened(str(method))}); give the checkpoint "
            "before quantisation."
        )
    # Fields of no family here that transformers looks for in all of them.
    for field in ("per_layer_config", "attention_chunk_size", "kv_sharing_modes", "transformers_weights"):
        if values.get(field) is not None:
            raise ValueError(f"{field}={shown(values[field])} is not supported here; only null is.")
    if values.get("is_causal", True) is not True:
        raise ValueError(
            f"is_causal={shown(values['is_causal'])} is not computed here: a position never reads later ones."
        )


def _count_experts(values: Mapping[str, Any], contents: Mapping[str, Any], name: str) -> int:
    """E: transformers reads it under either of two names, except in Qwen2-MoE."""
    field = FAMILIES[name].names["num_experts"]
    other = "num_experts" if field == "num_local_experts" else "num_local_experts"
    if name != "qwen2_moe" and other in contents:
        if field in contents and contents[field] != contents[other]:
            raise ValueError(f"{field}={shown(contents[field])} and {other}={shown(contents[other])} must be the same.")
        field = other
    # Layers without experts exist only where decoder_sparse_step does.
    return whole(values, field, at_least=0 if "decoder_sparse_step" in FAMILIES[name].defaults else 1)


def _read_moe_layers(values: Mapping[str, Any], n_layers: int) -> str | tuple[int, ...]:
    """Layer i holds experts if i + 1 is a multiple of decoder_sparse_step and i is not in mlp_only_layers."""
    step, dense = whole(values, "decoder_sparse_step"), values["mlp_only_layers"] or []
    if not isinstance(dense, list):
        raise ValueError(f"mlp_only_layers={shown(dense)} must be a list of layers.")
    if step <= 2 and not dense:
        return "all" if step == 1 else "every other"
    return tuple(i for i in range(n_layers) if (i + 1) % step == 0 and i not in dense)


def _in_their_words(message: str, family: Family) -> str:
    """A sentence of ModelConfig with config.json's names of its settings."""
    words = {**family.names, "original_max_seq_len": "original_max_position_embeddings"}
    return re.sub(r"\w+", lambda word: words.get(word[0], word[0]), message)


def obstacles(config: ModelConfig, family: str) -> list[str]:
    """The settings that the family cannot express, a phrase each; none: it computes exactly this network.

    Dropout is not one: no family has it, and a network that is used, not trained, has none either.
    Raises ValueError for a family that is not among FAMILIES.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={shown(family)} is unknown; it is one of {', '.join(FAMILIES)}.")
    known, names, fixed = FAMILIES[family].defaults, FAMILIES[family].names, FAMILIES[family].fixed
    found = []
    if config.bias_balancing:
        found.append("bias_balancing=True (no family steers the choice of experts by a bias)")
    for name, without in (("router_average", 0.0), ("router_hold", 1)):
        if getattr(config, name) != without:
            found.append(f"{name}={getattr(config, name)} (no family chooses experts by earlier positions)")
    if config.num_experts == 0 and "num_experts" in names:
        found.append(f"num_experts=0 ({family} is for networks with experts)")
    elif config.num_experts and "num_experts" not in names:
        found.append(f"num_experts={config.num_experts} ({family} has none)")
    elif "moe_layers" in fixed and not all(config.is_moe(layer) for layer in range(config.n_layers)):
        found.append(f"moe_layers={config.moe_layers!r} ({family} has experts in every layer)")
    for name, value in fixed.items():
        if name not in ("num_experts", "moe_layers") and getattr(config, name) != value:
            found.append(f"{name}={getattr(config, name)!r} ({family} has {value!r})")
    if names.get("qkv_bias") == "attention_bias" and config.qkv_bias != config.output_bias:
        found.append(f"qkv_bias={config.qkv_bias} with output_bias={config.output_bias} ({family} has both or neither)")
    windowed = [config.is_windowed(layer) for layer in range(config.n_layers)]
    if any(windowed) and "sliding_window" not in known:
        found.append(f"sliding_window={config.sliding_window} ({family} has none)")
    elif any(windowed) and not all(windowed) and "layer_types" not in known:
        found.append(f"sliding_layers={config.sliding_layers!r} ({family} has a window in every layer or in none)")
    if family == "olmoe" and config.n_heads * config.head_width != config.d_model:
        found.append(f"head_dim={config.head_dim} (olmoe has d_model / n_heads)")
    if family == "llama" and config.d_model % config.n_heads:
        found.append(f"n_heads={config.n_heads} (llama's d_model is a multiple of it)")
    return found


def family_of(config: ModelConfig) -> str | None:
    """The family whose config.json says exactly this network, qwen3_moe where that is one; None: there is none."""
    return next((family for family in FAMILIES if not obstacles(config, family)), None)


def write_config(config: ModelConfig, family: str) -> dict[str, Any]:
    """Contents of config.json, plain JSON values, but for the weights' dtype.

    They are transformers 5's fields, and those under which older releases and other readers of its layout look for
    the same. Special tokens are null, lest the family's own be taken for this vocabulary's. dropout is not part of
    them. Raises ValueError with the obstacles, where there are any.
    """
    found = obstacles(config, family)
    if found:
        raise ValueError(f"{family} cannot express {', '.join(found)}.")
    facts = FAMILIES[family]
    contents: dict[str, Any] = {"architectures": [facts.architecture], "model_type": family, "hidden_act": "silu"}
    contents |= {theirs: getattr(config, ours) for ours, theirs in facts.names.items()}
    for name in ("rms_norm_eps", "initializer_range", "clip_qkv"):  # transformers refuses whole numbers there
        if contents.get(name) is not None:
            contents[name] = float(contents[name])
    if family == "llama":  # the one family that limits it; only training would notice
        contents["initializer_range"] = min(contents["initializer_range"], 1.0)
    if family != "olmoe":
        contents["head_dim"] = config.head_dim
    if "decoder_sparse_step" in facts.defaults:
        every_other = config.moe_layers == "every other"
        dense = [] if every_other else [layer for layer in range(config.n_layers) if not config.is_moe(layer)]
        contents |= {"decoder_sparse_step": 2 if every_other else 1, "mlp_only_layers": dense}
    contents |= write_window(config, facts.defaults) | write_rope(config)
    return contents | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
