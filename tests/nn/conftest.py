"""A tiny model whose every part matters: weights wide enough that no sublayer drowns in the residual stream."""

import pytest
import torch

from layerskip_moe.nn import ModelConfig, MoEDecoder


def _tiny_model(dtype=torch.float64, seed=0, **overrides):
    sizes = dict(
        vocab_size=23, n_layers=4, d_model=16, n_heads=4, n_kv_heads=2, d_ff=12, num_experts=5, top_k=2, max_seq_len=64
    )
    model = MoEDecoder(ModelConfig(**{**sizes, "init_std": 0.3, **overrides}), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms start at 1 and biases at 0, where a swapped or missing one hides
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
            elif name.endswith("router.weight"):
                parameter.mul_(3)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def tiny_model():
    """tiny_model(dtype=float64, seed=0, **ModelConfig fields) -> a new model in evaluation mode."""
    return _tiny_model
