"""Rotary tables equal those of transformers bit for bit, for every way of stretching them."""

import pytest
import torch

from layerskip_moe import ModelConfig
from layerskip_moe.generation import generate
from layerskip_moe.nn import KVCache, MoEDecoder, RopeScaling
from layerskip_moe.nn.rotary import rotary_table, table_length

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


@pytest.mark.parametrize("name", SCALINGS)
def test_a_longer_table_begins_with_the_shorter_one(name):
    """To the last bit: a text's prompt and its continuation may be turned by two of them."""
    device, longest = torch.device("cpu"), 9000
    whole = rotary_table(80, 10000.0, SCALINGS[name][1], longest, device)
    for length in (1, 7, 100, 4095, 4096, 8192):
        table = rotary_table(80, 10000.0, SCALINGS[name][1], length, device)
        assert all(torch.equal(part, all_of[:length]) for part, all_of in zip(table, whole, strict=True))


def test_a_table_is_as_long_as_texts_are_and_not_as_they_might_be():
    for length, most, expected in [
        *((1, 1024, 1024), (1024, 1024, 1024), (1, 2**31 - 1, 4096), (4096, 2**31 - 1, 4096)),
        *((4097, 2**31 - 1, 8192), (4097, 5000, 5000), (100_000, 131_072, 131_072)),
    ]:
        assert table_length(length, most) == expected


def test_a_model_that_takes_texts_without_end_decodes_as_one_that_does_not():
    """Whose table would take 128 GB for heads of 8."""
    sizes = dict(vocab_size=11, n_layers=2, d_model=16, n_heads=2, num_experts=2, d_ff=8)
    short, endless = (MoEDecoder(ModelConfig(max_seq_len=most, **sizes)).eval() for most in (64, 2**31 - 1))
    endless.load_state_dict(short.state_dict())
    tokens = torch.arange(33).view(3, 11) % 11
    assert torch.equal(endless(tokens), short(tokens))
    for compile in (True, False):
        texts = [
            generate(model, tokens.tolist(), max_new_tokens=9, compile=compile).tokens for model in (endless, short)
        ]
        assert texts[0] == texts[1]


@torch.no_grad()
def test_a_cache_of_many_positions_is_written_by_a_table_that_has_them_all():
    config = ModelConfig(
        11, n_layers=2, d_model=8, n_heads=1, num_experts=0, d_ff=8, max_seq_len=2**20, sliding_window=9
    )
    model, length = MoEDecoder(config).eval(), 4099
    tokens = torch.arange(length)[None] % 11
    cache = KVCache(config, 1, length)
    for start, end in ((0, 4000), (4000, 4096), (4096, 4098), (4098, length)):
        positions = torch.arange(start, end)[None]
        hidden = model.run(model.embed(tokens[:, start:end]), range(2), positions=positions, cache=cache).hidden
    torch.testing.assert_close(model.unembed(hidden)[:, -1], model(tokens)[:, -1])


def test_a_config_takes_a_scaling_as_json_has_it():
    fields = {"kind": "yarn", "factor": 2.0, "original_max_seq_len": 32}
    assert ModelConfig(vocab_size=8, rope_scaling=fields).rope_scaling == RopeScaling("yarn", 2.0, 32)
