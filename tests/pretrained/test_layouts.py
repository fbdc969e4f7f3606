"""Every tensor that transformers writes has its place, every parameter is filled once, and the network is the same."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained.families import FAMILIES, read_config
from layerskip_moe.pretrained.layouts import ignorable, tensor_places

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = dict(
    vocab_size=37, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
    intermediate_size=20, max_position_embeddings=64, num_experts_per_tok=2, initializer_range=0.2,
)  # fmt: skip
QWEN2_MOE = dict(num_experts=3, moe_intermediate_size=12, shared_expert_intermediate_size=10)
# name: (family, its fields)
CASES = {
    "mixtral": ("mixtral", dict(num_local_experts=3, head_dim=6)),
    "olmoe": ("olmoe", dict(num_experts=3)),
    "olmoe with biases": ("olmoe", dict(num_experts=3, attention_bias=True)),
    "qwen2_moe": ("qwen2_moe", QWEN2_MOE),
    "qwen2_moe without biases": ("qwen2_moe", QWEN2_MOE | dict(qkv_bias=False, decoder_sparse_step=2)),
    "qwen3_moe": ("qwen3_moe", dict(num_experts=3, moe_intermediate_size=12, head_dim=6)),
    "qwen3_moe, tied, some dense": (
        "qwen3_moe",
        dict(
            num_experts=3, moe_intermediate_size=12, tie_word_embeddings=True, mlp_only_layers=[0], attention_bias=True
        ),
    ),
    "llama": ("llama", {}),
    "llama, tied, with biases": ("llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "qwen3": ("qwen3", dict(head_dim=6)),
    "qwen3 with biases": ("qwen3", dict(head_dim=6, attention_bias=True, num_key_value_heads=4)),
}


def their_model(name):
    family, changes = CASES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **SIZES | changes))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def saved(model, folder, fused):
    model.save_pretrained(folder, save_original_format=not fused)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_tensors_of_transformers_make_the_same_network(tmp_path, name, fused):
    theirs = their_model(name)
    family, config = read_config(theirs.config.to_dict())
    tensors, places = saved(theirs, tmp_path, fused), tensor_places(config, family, fused=fused)
    assert tensors.keys() == places.keys()
    model = MoEDecoder(config, seed=1).eval()
    state = model.state_dict()
    for key, place in places.items():
        assert state[place.parameter][place.index].shape == tensors[key].shape, key
        state[place.parameter][place.index] = tensors[key]
    tokens = torch.tensor([[1, 5, 36, 0, 9], [7, 7, 2, 30, 4]])
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", CASES)
def test_only_the_experts_have_other_names_when_fused(name):
    family, changes = CASES[name]
    config = read_config({"model_type": family} | SIZES | changes)[1]
    apart, fused = (tensor_places(config, family, fused=fused) for fused in (False, True))
    assert {place.parameter for place in apart.values()} == {place.parameter for place in fused.values()}
    for key in apart.keys() & fused.keys():
        assert apart[key] == fused[key]
    in_experts = [".experts." in key or ".block_sparse_moe." in key for key in apart.keys() - fused.keys()]
    assert all(in_experts) and bool(in_experts) == any(config.is_moe(layer) for layer in range(config.n_layers))


@settings(deadline=None, max_examples=60)
@given(data=st.data(), fused=st.booleans())
def test_the_places_cover_every_parameter_once(data, fused):
    draw = data.draw
    experts = draw(st.integers(0, 3))
    n_kv_heads, shared, bias = draw(st.integers(1, 2)), draw(st.sampled_from([0, 3])), draw(st.booleans())
    config = ModelConfig(
        vocab_size=5,
        n_layers=draw(st.integers(1, 3)),
        d_model=8,
        n_heads=n_kv_heads * draw(st.integers(1, 2)),
        n_kv_heads=n_kv_heads,
        head_dim=draw(st.sampled_from([2, 4])),
        d_ff=draw(st.integers(1, 3)),
        dense_d_ff=draw(st.integers(1, 3)),
        num_experts=experts,
        top_k=1,
        moe_layers=draw(st.sampled_from(["all", "every other", (0,)])),
        shared_expert_d_ff=shared if experts else 0,
        shared_expert_gate=bool(shared and experts),
        qk_norm=draw(st.sampled_from(["head", "full", None])),
        qkv_bias=bias,
        output_bias=draw(st.booleans()),
        mlp_bias=not experts and draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in MoEDecoder(config).state_dict().items()}
    filled = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for place in tensor_places(config, draw(st.sampled_from(list(FAMILIES))), fused=fused).values():
        filled[place.parameter][place.index] += 1
    assert all((count == 1).all() for count in filled.values())


def test_what_may_be_left_out():
    tied = ModelConfig(vocab_size=5, tie_embeddings=True)
    for config in (tied, dataclasses.replace(tied, tie_embeddings=False)):
        assert ignorable("model.layers.3.self_attn.rotary_emb.inv_freq", config)
        assert ignorable("model.rotary_emb.inv_freq", config)
        assert ignorable("lm_head.weight", config) == config.tie_embeddings
        for name in ("lm_head.bias", "model.embed_tokens.weight", "model.layers.0.mlp.gate.e_score_correction_bias"):
            assert not ignorable(name, config)
