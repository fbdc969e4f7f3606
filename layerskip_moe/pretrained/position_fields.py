"""The fields of config.json that say how positions are told apart and which are read: rotary angles, sliding windows.

They are the ones with a history: transformers 5 reads the older spellings too, and so does this, by the same order of
precedence. Knows nothing of the other fields. Next: `families.py`, which calls; `nn/rotary.py`, the arithmetic.
"""

from collections.abc import Mapping
from typing import Any, Literal

from layerskip_moe.nn import ModelConfig, RopeScaling
from layerskip_moe.nn.rotary import yarn_attention_factor
from layerskip_moe.refusals import require_whole, shown


def whole(values: Mapping[str, Any], field: str, at_least: int = 1) -> int:
    """A field that must be a whole number; ValueError, naming it, if it is not."""
    return require_whole(field, values[field], at_least)


def read_rope(values: Mapping[str, Any]) -> tuple[Any, RopeScaling | None]:
    """Theta and its scaling, from rope_parameters (transformers 5) or rope_scaling and rope_theta (before it).

    values: config.json over the family's defaults. Raises ValueError, naming the field, for kinds of scaling that are
    not computed here and for fields that a kind needs.
    """
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise ValueError(f"rope_parameters={shown(given)} must be one set of fields, the same for all layers.")
    theta = given.get("rope_theta", values["rope_theta"])
    rotated = given.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if rotated not in (None, 1):
        raise ValueError(f"partial_rotary_factor={shown(rotated)} is not computed here: whole heads are rotated.")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"rope_type={shown(kind)} is not computed here; 'default', 'linear', 'llama3' and 'yarn' are.")
    for field in ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",):
        if field not in given:
            raise ValueError(f"rope_type={shown(kind)} needs {field}, which rope_parameters or rope_scaling lack.")
    if kind == "linear":
        return theta, RopeScaling("linear", given["factor"])
    # The length outside of the rotary fields wins over the one inside, as in transformers.
    lengths = {"original_max_position_embeddings": values["max_position_embeddings"], **given}
    if "original_max_position_embeddings" in values:
        lengths["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    trained = whole(lengths, "original_max_position_embeddings")
    if kind == "llama3":
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        return theta, RopeScaling("llama3", given["factor"], trained, low_freq_factor=low, high_freq_factor=high)
    return theta, _read_yarn(given, trained, whole(values, "max_position_embeddings"))


def _read_yarn(given: Mapping[str, Any], trained: int, longest: int) -> RopeScaling:
    """Without a factor it is longest / trained; without an attention_factor it is mscale's share over
    mscale_all_dim's (DeepSeek) where both are given, else what RopeScaling computes."""
    factor = longest / trained if given["factor"] is None else given["factor"]
    size, above, below = given.get("attention_factor"), given.get("mscale"), given.get("mscale_all_dim")
    if size is None and above and below:
        for field, number in {"factor": factor, "mscale": above, "mscale_all_dim": below}.items():
            if not isinstance(number, int | float):
                raise ValueError(f"{field}={shown(number)} must be a number.")
        size = yarn_attention_factor(factor, above) / yarn_attention_factor(factor, below)
    return RopeScaling(
        "yarn",
        factor,
        trained,
        beta_fast=given.get("beta_fast") or 32.0,
        beta_slow=given.get("beta_slow") or 1.0,
        attention_factor=size,
        truncate=bool(given.get("truncate", True)),
    )


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """rope_parameters for transformers 5, and the same as rope_theta and rope_scaling for those who read these."""
    theta, scaling = float(config.rope_theta), config.rope_scaling
    if scaling is None:
        default = {"rope_type": "default", "rope_theta": theta}
        return {"rope_theta": theta, "rope_scaling": None, "rope_parameters": default}
    given: dict[str, Any] = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if scaling.kind != "linear":
        given["original_max_position_embeddings"] = scaling.trained_length
    if scaling.kind == "llama3":
        given |= {
            "low_freq_factor": float(scaling.low_freq_factor),
            "high_freq_factor": float(scaling.high_freq_factor),
        }
    if scaling.kind == "yarn":
        given |= {"beta_fast": float(scaling.beta_fast), "beta_slow": float(scaling.beta_slow)}
        given |= {"truncate": scaling.truncate}
        if scaling.attention_factor is not None:
            given |= {"attention_factor": float(scaling.attention_factor)}
    return {"rope_theta": theta, "rope_scaling": given, "rope_parameters": {**given, "rope_theta": theta}}


def read_window(
    values: Mapping[str, Any], known: Mapping[str, Any], family: str
) -> tuple[int | None, Literal["all"] | tuple[int, ...]]:
    """sliding_window and sliding_layers.

    Mixtral and Qwen3-MoE have a window in every layer or in none; Qwen2-MoE and Qwen3 in the layers that layer_types
    names, by default the even ones below max_window_layers (Qwen2-MoE) or those from max_window_layers on (Qwen3);
    Llama and OLMoE have none. Raises ValueError, naming the field, for what disagrees with that.

    values: config.json over the family's defaults; known: these defaults, whose keys are the fields it has
    """
    n_layers, window, kinds = (
        whole(values, "num_hidden_layers"),
        values.get("sliding_window"),
        values.get("layer_types"),
    )
    if "use_sliding_window" in known:
        if not isinstance(values["use_sliding_window"], bool):
            raise ValueError(f"use_sliding_window={shown(values['use_sliding_window'])} must be true or false.")
        window = window if values["use_sliding_window"] else None
    if window is not None and "sliding_window" not in known:
        # Its masks would not have the window, but its cache would forget what is outside.
        raise ValueError(f"sliding_window={shown(window)} is not a field of {family}; set it to null.")
    windowed = list(range(n_layers)) if window is not None else []
    if "max_window_layers" in known and windowed:
        edge = whole(values, "max_window_layers", at_least=0)
        windowed = [i for i in windowed if (i % 2 == 0 and i < edge if family == "qwen2_moe" else i >= edge)]
    if kinds is not None:
        words = ("full_attention", "attention", "sliding_attention")  # the second is an older word for the first
        if not isinstance(kinds, list) or len(kinds) != n_layers or not all(kind in words for kind in kinds):
            raise ValueError(
                f"layer_types={shown(kinds)} must name {n_layers} layers full_attention or sliding_attention."
            )
        named = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
        if named and window is None:
            raise ValueError("layer_types names sliding_attention, but there is no sliding_window, or it is not used.")
        if named != windowed and "layer_types" not in known:
            raise ValueError(
                f"layer_types={shown(kinds)} is not a field of {family}, and sliding_window says otherwise."
            )
        windowed = named
    if not windowed:
        return None, "all"
    return window, "all" if len(windowed) == n_layers else tuple(windowed)


def write_window(config: ModelConfig, known: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say in which layers there is a window, of those `known` to the family."""
    windowed = [layer for layer in range(config.n_layers) if config.is_windowed(layer)]
    contents: dict[str, Any] = {}
    if "sliding_window" in known:
        contents["sliding_window"] = config.sliding_window if windowed else None
    if "use_sliding_window" in known:
        contents["use_sliding_window"] = bool(windowed)
    if "layer_types" in known:
        contents["layer_types"] = [
            "sliding_attention" if layer in windowed else "full_attention" for layer in range(config.n_layers)
        ]
    return contents
