"""What the training tests share: a tiny decoder, a text that repeats itself, a short recipe, no TensorBoard."""

import json
import logging
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.training import TrainConfig
from layerskip_moe.training import checkpoint as files
from layerskip_moe.training.checkpoint import newest_checkpoint, save_checkpoint
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


@pytest.fixture(scope="session")
def tensors_of():
    """tensors_of(step) -> tensors of every kind, by name."""

    def build(step):
        return {
            "a.x": torch.full((3, 5), float(step)),
            "a.none": torch.empty(0, 4),
            "b.count": torch.tensor(step),
            "b.on": torch.tensor([True, False]),
            "b.codes": torch.arange(256, dtype=torch.uint8),
            "b.half": torch.tensor([0.5, -torch.inf], dtype=torch.bfloat16),
            "b.wide": torch.tensor([torch.nan, 1 / 3], dtype=torch.float64),
        }

    return build


@pytest.fixture(scope="session")
def two(tmp_path_factory, tensors_of):
    """A folder with two checkpoints, of steps 4 and 8; tests copy it."""
    folder = tmp_path_factory.mktemp("run")
    for step in (4, 8):
        save_checkpoint(folder, {"step": step, "note": "é", "best": None}, tensors_of(step))
    return folder


@pytest.fixture
def copied(two, tmp_path):
    return shutil.copytree(two, tmp_path / "run")


@pytest.fixture
def sealed():
    """sealed(path, **changes): write changes to a state.json under a digest that fits, as an enemy would."""

    def write(path, **changes):
        values = json.loads(path.read_text())
        values.pop("sha256")
        values |= changes
        path.write_text(json.dumps(values | {"sha256": files._digest(values)}))

    return write
