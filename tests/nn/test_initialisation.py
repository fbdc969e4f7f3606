"""Weights start as MoEDecoder's docstring says, from the seed and from nothing else."""

import pytest
import torch

from layerskip_moe.nn import ModelConfig, MoEDecoder

EVERYTHING = dict(
    vocab_size=64, n_layers=3, d_model=32, n_heads=4, num_experts=4, moe_layers=(0, 2), shared_expert_d_ff=24,
    shared_expert_gate=True, qkv_bias=True, bias_balancing=True, init_std=0.05,
)  # fmt: skip


@pytest.mark.parametrize("init_std", [0.05, 0.02])
def test_standard_deviations(init_std):
    model = MoEDecoder(ModelConfig(**{**EVERYTHING, "init_std": init_std}), seed=3)
    into_stream = 0
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            writes = ".down" in name or "attention.output" in name
            into_stream += writes
            std = init_std / 6**0.5 if writes else init_std
            # std of n draws is within sigma (1 +- 5 / sqrt(2n)), the mean within 5 sigma / sqrt(n): 5 standard errors.
            n = parameter.numel()
            measured = parameter.pow(2).mean().sqrt().item()
            assert abs(measured / std - 1) < 5 / (2 * n) ** 0.5, name
            assert abs(parameter.mean().item()) < 5 * std / n**0.5, name
    assert into_stream == 3 + 2 + 2 + 1  # attention outputs; two layers' experts and shared experts; a dense layer
    assert not model.blocks[0].mlp.router.balance_bias.any()


def test_no_two_tensors_share_their_draws():
    drawn = [p.flatten()[:24] for p in MoEDecoder(ModelConfig(**EVERYTHING)).parameters() if p.std() > 0]
    similarity = torch.nn.functional.normalize(torch.stack(drawn)).corrcoef()
    assert similarity.fill_diagonal_(0).abs().max() < 0.95


def test_the_seed_alone_decides():
    config = ModelConfig(**EVERYTHING)
    torch.manual_seed(1)
    first = MoEDecoder(config, seed=5).state_dict()
    torch.manual_seed(2)
    torch.rand(7)
    state = torch.get_rng_state()
    second = MoEDecoder(config, seed=5).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = MoEDecoder(config, seed=6).state_dict()
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])
    # The layers' own constructors draw before `initialize` overwrites them, which moves the global state only.
    model = MoEDecoder(config, seed=6)
    torch.set_rng_state(state)
    model.initialize(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], value) for name, value in model.state_dict().items())


def test_a_tied_head_is_the_embedding():
    model = MoEDecoder(ModelConfig(**EVERYTHING, tie_embeddings=True))
    assert model.head_weight is model.embedding.weight
    assert not [name for name in model.state_dict() if "head" in name]
    untied = MoEDecoder(ModelConfig(**EVERYTHING))
    assert not torch.equal(untied.head_weight, untied.embedding.weight)
