"""The reference networks, and the bytes that a token reads of them."""

import pytest
import torch

from layerskip_moe.bench.networks import (
    Network,
    at_precision,
    cache_bytes,
    describe_network,
    load_network,
    random_tokens,
    reference_config,
    weight_bytes,
    with_experts,
)
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.pretrained.families import family_of

TINY = dict(n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, num_experts=4, d_ff=24, vocab_size=40, max_seq_len=64)


def test_the_reference_networks_are_those_of_the_documentation():
    mixtral, qwen3 = (reference_config(Network(network=name)) for name in ("mixtral", "qwen3"))
    assert family_of(mixtral) == "mixtral" and family_of(qwen3) == "qwen3_moe"
    assert all(map(mixtral.is_moe, range(12))) and [qwen3.is_moe(i) for i in range(4)] == [False, True, False, True]
    assert qwen3.dense_d_ff == 2 * qwen3.expert_d_ff == 2048
    with torch.device("meta"):
        told = describe_network(Network(), MoEDecoder(mixtral))
    assert round(told["parameters"] / 1e6) == 169 and round(told["active"] / 1e6) == 51


def test_bytes_by_hand():
    model = load_network(Network(**TINY), "cpu")
    attention = 16 * (16 + 2 * 8) + 16 * 16
    fixed = 2 * (attention + 2 * 16 + 4 * 16) + 16 + 40 * 16  # norms, routers, last norm, head
    expert = 3 * 16 * 24
    assert weight_bytes(model) == (4 * (fixed + 2 * 4 * expert + 40 * 16), 4 * (fixed + 2 * 2 * expert))
    assert cache_bytes(model, 10.5) == 2 * 2 * 10.5 * 8 * 4
    half = at_precision(model, "bfloat16")
    assert [2 * size for size in weight_bytes(half)] == list(weight_bytes(model))
    assert 2 * cache_bytes(half, 10) == cache_bytes(model, 10)
    assert at_precision(model, "float32") is model and model.dtype == torch.float32


def test_bytes_of_int8():
    model = load_network(Network(**TINY), "cpu")
    whole, read = weight_bytes(at_precision(model, "int8"))
    matrices = 2 * (16 * (16 + 2 * 8) + 16 * 16) + 40 * 16
    scales = 2 * (16 + 16 + 16) + 40
    floats = 2 * (2 * 16 + 4 * 16) + 16
    expert, expert_scales = 3 * 16 * 24, 2 * 24 + 16
    assert read == matrices + 4 * scales + 4 * floats + 2 * 2 * (expert + 4 * expert_scales)
    assert whole == read + 2 * 2 * (expert + 4 * expert_scales) + 4 * 40 * 16


def test_other_experts_are_of_the_same_sizes():
    model = load_network(Network(**TINY), "cpu").to(torch.bfloat16)
    other = with_experts(model, 8, seed=1)
    assert other.blocks[0].mlp.experts.gate_up.shape == (8, 48, 16)
    assert other.dtype == torch.bfloat16 and not other.training
    assert weight_bytes(other)[1] - weight_bytes(model)[1] == 2 * 2 * 4 * 16  # the routers' rows


def test_a_saved_model_is_taken_instead(tmp_path):
    load_network(Network(**TINY, seed=5), "cpu").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    network = Network(model=str(tmp_path / "model"))
    model = load_network(network, "cpu")
    assert model.config.d_model == 16 and model.dtype == torch.float32
    assert describe_network(network, model)["weights"] == "of the checkpoint"


def test_random_tokens():
    assert random_tokens(50, 7, seed=1) == random_tokens(50, 7, seed=1) != random_tokens(50, 7, seed=2)
    assert set(random_tokens(200, 7, seed=1)) == set(range(7))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="top_k=9 experts cannot be chosen"):
        reference_config(Network(top_k=9))
