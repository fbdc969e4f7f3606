"""What the training tests share: a tiny decoder, a text that repeats itself, a short recipe, no TensorBoard."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.training import TrainConfig
from layerskip_moe.training.checkpoint import newest_checkpoint
from layerskip_moe.training.tensor_files import read_tensors


@pytest.fixture(autouse=True)
def without_tensorboard(monkeypatch):
    """Training goes on without it; a test that wants it takes this entry out again."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


@pytest.fixture(autouse=True, scope="session")
def quiet_checkpoints():
    """torch.distributed.checkpoint logs every tensor, and pytest would keep all that."""
    logging.getLogger("c10d-NullHandler-dcp_logger").propagate = False


@pytest.fixture
def decoder():
    """decoder(dtype=float32, seed=0, **ModelConfig fields) -> a new tiny MoEDecoder."""

    def build(*, dtype=torch.float32, seed=0, **fields):
        sizes = dict(
            vocab_size=16, n_layers=4, d_model=8, n_heads=2, n_kv_heads=1, d_ff=8, num_experts=4, top_k=2,
            max_seq_len=32, init_std=0.2,
        )  # fmt: skip
        return MoEDecoder(ModelConfig(**{**sizes, **fields}), seed=seed).to(dtype)

    return build


@pytest.fixture
def text():
    """text(train=400, validation=100) -> the two splits, so many tokens each: 0, 1, ..., 10 over and over."""

    def build(train=400, validation=100):
        return SimpleNamespace(train=torch.arange(train) % 11, validation=torch.arange(validation) % 11)

    return build


@pytest.fixture
def recipe():
    """recipe(**TrainConfig fields) -> three short steps in float32, without layer dropout (torchtune is slow
    to import), each of them logged."""

    def build(**fields):
        short = dict(
            max_steps=3, seq_len=8, batch_size=4, layer_dropout_max=0.0, precision="float32", log_every=1,
            validation_windows=4,
        )  # fmt: skip
        return TrainConfig(**{**short, **fields})

    return build


@pytest.fixture
def saved():
    """saved(out_dir) -> what its newest whole checkpoint holds: (facts, tensors by name)."""

    def read(folder):
        checkpoint = newest_checkpoint(folder)
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors.items()}
        read_tensors(checkpoint.path, tensors)
        return checkpoint.facts, tensors

    return read
