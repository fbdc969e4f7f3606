"""Rotary angles and windows are those that transformers makes of the same fields, in every spelling."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.nn.rotary import rotary_table
from layerskip_moe.pretrained.families import FAMILIES, read_config, write_config

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

CONTENTS = dict(
    vocab_size=37, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4, head_dim=4,
    intermediate_size=20, max_position_embeddings=64,
)  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(family, **changes):
    return read_config({"model_type": family} | CONTENTS | changes)[1]


def theirs(family, **changes):
    return transformers.AutoConfig.for_model(family, **CONTENTS | changes)


def windows(config):
    return [config.sliding_window if config.is_windowed(layer) else None for layer in range(config.n_layers)]


@settings(deadline=None, max_examples=60)
@given(
    family=st.sampled_from(["mixtral", "qwen2_moe", "qwen3_moe", "qwen3"]),
    used=st.booleans(),
    window=st.none() | st.integers(1, 9),
    edge=st.integers(0, 6),
    kinds=st.none()
    | st.lists(st.sampled_from(["full_attention", "attention", "sliding_attention"]), min_size=4, max_size=4),
)
def test_the_layers_with_a_window_are_those_of_transformers(family, used, window, edge, kinds):
    changes = dict(use_sliding_window=used, sliding_window=window, max_window_layers=edge)
    if kinds is not None and family in ("qwen2_moe", "qwen3"):
        changes["layer_types"] = kinds
    their = theirs(family, **changes)
    if family in ("mixtral", "qwen3_moe"):
        expected = [their.sliding_window] * 4
    else:
        expected = [their.sliding_window if kind == "sliding_attention" else None for kind in their.layer_types]
        if any(kind == "sliding_attention" for kind in their.layer_types) and not their.sliding_window:
            if kinds is not None:  # transformers fails only when the model runs
                with pytest.raises(ValueError, match="layer_types names sliding_attention, but there is no"):
                    read(family, **changes)
                return
            expected = [None] * 4
    assert windows(read(family, **changes)) == expected


ROPES = {
    "none": {},
    "theta before transformers 5": {"rope_theta": 123.0},
    "theta since": {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
    "theta in both": {"rope_theta": 321.0, "rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
    "linear, type": {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 99.0},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3, "rope_theta": 99.0}},
    "rope_scaling wins": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    },
    "a null rope_scaling does not": {"rope_scaling": None, "rope_parameters": {"type": "linear", "factor": 3.0}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 16, **LLAMA3}},
    "llama3, length outside": {
        "rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 8, **LLAMA3},
        "original_max_position_embeddings": 32,
    },
    "llama3, no length": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 50.0, **LLAMA3}},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "yarn, no length": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, no factor": {
        "rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}
    },
    "yarn, betas": {
        "rope_theta": 50.0,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 3.0,
            "beta_slow": 0.5, "truncate": False, "attention_factor": 1.7,
        },
    },
    "yarn, null betas": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": None, "beta_slow": 0}},
    "yarn, mscale": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.5}},
    "yarn, mscale alone": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}},
    "yarn, mscale overruled": {
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.5, "attention_factor": 1.1,
        }
    },
    "yarn, shorter": {"rope_scaling": {"rope_type": "yarn", "factor": 0.5, "mscale": 2.0, "mscale_all_dim": 1.0}},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ROPES)
def test_the_angles_are_those_of_transformers(family, name):
    config = read(family, **json.loads(json.dumps(ROPES[name])))
    their = theirs(family, **json.loads(json.dumps(ROPES[name])))  # a copy: they change it
    with torch.device("meta"):
        module = type(transformers.AutoModelForCausalLM.from_config(their).model.rotary_emb)
    cos, sin = module(their)(torch.zeros(1, 1), torch.arange(64)[None])
    table = rotary_table(config.head_width, config.rope_theta, config.rope_scaling, 64, torch.device("cpu"))
    torch.testing.assert_close(table[0], cos[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(table[1], sin[0], rtol=0, atol=1e-6)
    written = read_config(write_config(config, family))[1]
    assert (written.rope_theta, written.rope_scaling) == (config.rope_theta, config.rope_scaling)


REFUSED = {
    "part of a head": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "part of a head, inside": (
        "llama", {"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25",
    ),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    "longrope": ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type='longrope'"),
    "no factor": ("llama", {"rope_scaling": {"type": "linear"}}, "needs factor"),
    "no low_freq_factor": ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs low_freq_factor"),
    "factor of words": ("llama", {"rope_scaling": {"type": "linear", "factor": "two"}}, "factor='two'"),
    "factor below 0": ("llama", {"rope_scaling": {"type": "yarn", "factor": -1.0}}, "factor=-1.0"),
    "mscale of words": (
        "llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": "a", "mscale_all_dim": 1}}, "mscale='a'",
    ),
    "length": (
        "llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": None},
        "original_max_position_embeddings=None",
    ),
    "rope by layer": ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
    "rope of words": ("llama", {"rope_scaling": "linear"}, "rope_parameters='linear'"),
    "window in Llama": ("llama", {"sliding_window": 8}, "sliding_window=8 is not a field of llama"),
    "window in OLMoE": ("olmoe", {"sliding_window": 8}, "sliding_window=8 is not a field of olmoe"),
    "window of nothing": ("mixtral", {"sliding_window": 0}, "sliding_window=0"),
    "switch": ("qwen3", {"use_sliding_window": "no"}, "use_sliding_window='no'"),
    "layers not as many": ("qwen3", {"layer_types": ["full_attention"]}, "layer_types.*4 layers"),
    "layers of another kind": ("qwen3", {"layer_types": ["conv"] * 4}, "layer_types"),
    "layers nobody reads": ("mixtral", {"sliding_window": 4, "layer_types": ["full_attention"] * 4}, "layer_types"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_exactly_is_refused_by_name(name):
    family, changes, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as caught:
        read(family, **changes)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
