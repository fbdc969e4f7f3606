"""Rotary tables equal those of transformers bit for bit, for every way of stretching them."""

import pytest
import torch

from layerskip_moe import ModelConfig
from layerskip_moe.nn import RopeScaling
from layerskip_moe.nn.rotary import rotary_table

transformers = pytest.importorskip("transformers")

# name: (transformers' rope_parameters, ours)
SCALINGS = {
    "default": ({"rope_type": "default"}, None),
    "linear": ({"rope_type": "linear", "factor": 4.0}, RopeScaling("linear", 4.0)),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        RopeScaling("llama3", 8.0, 256),
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        RopeScaling("yarn", 4.0, 128),
    ),
    "yarn, all of it": (
        {
            "rope_type": "yarn",
            "factor": 6.0,
            "original_max_position_embeddings": 96,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "attention_factor": 1.7,
            "truncate": False,
        },
        RopeScaling("yarn", 6.0, 96, beta_fast=20.0, beta_slow=2.0, attention_factor=1.7, truncate=False),
    ),
    "yarn, a ramp of no width": (
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2},
        RopeScaling("yarn", 2.0, 2),
    ),
}


@pytest.mark.parametrize("head_dim", [6, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_table_equals_transformers(name, theta, head_dim):
    theirs, ours = SCALINGS[name]
    length = 600
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=length,
        rope_parameters={**theirs, "rope_theta": theta},
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1, 1, 1), torch.arange(length)[None])
    table = rotary_table(head_dim, theta, ours, length, torch.device("cpu"))
    assert torch.equal(table[0], cos[0]) and torch.equal(table[1], sin[0])


def test_a_config_takes_a_scaling_as_json_has_it():
    fields = {"kind": "yarn", "factor": 2.0, "original_max_seq_len": 32}
    assert ModelConfig(vocab_size=8, rope_scaling=fields).rope_scaling == RopeScaling("yarn", 2.0, 32)
