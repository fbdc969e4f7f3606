"""A training run to be killed: everything random is on, checkpoints are frequent, and each step that is taken is noted.

Not a test: `test_survival.py` runs it in processes of its own, by `runpy.run_path` with a global `given`: text,
out_dir, max_steps, checkpoint_every, steps of this process (after which it waits to be killed; None: no end).
"""

import os
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.training import TrainConfig, has_checkpoint, train
from layerskip_moe.training.run import Run

text, out_dir, max_steps, checkpoint_every, most_steps = globals()["given"]
taken = 0

torch.set_num_threads(1)
warnings.filterwarnings("error", message=".*damaged")  # a kill never leaves a checkpoint that is
folder = Path(out_dir)
folder.mkdir(parents=True, exist_ok=True)
tokens = torch.tensor(list(Path(text).read_bytes()), dtype=torch.uint8)
corpus = SimpleNamespace(train=tokens[:-400], validation=tokens[-400:])
config = ModelConfig(
    vocab_size=256, n_layers=3, d_model=16, n_heads=2, d_ff=16, num_experts=4, top_k=2, max_seq_len=32, dropout=0.1,
    bias_balancing=True, moe_layers=(1, 2),
)  # fmt: skip
recipe = TrainConfig(
    max_steps=max_steps, seq_len=16, batch_size=4, accumulation=2, layer_dropout_max=0.5, expert_dropout=0.2,
    learning_rate=0.01, precision="float32", validate_every=3, validation_windows=4, log_every=2,
    checkpoint_every=checkpoint_every,
)  # fmt: skip


def noted(run, step, batches, real=Run.step):
    global taken
    while taken == most_steps:
        signal.pause()
    taken += 1
    with open(folder / "steps", "a") as file:
        file.write(f"{os.getpid()} {step}\n")
    return real(run, step, batches)


Run.step = noted  # type: ignore[method-assign]
model = MoEDecoder(config, seed=os.getpid() if has_checkpoint(out_dir) else 0)  # on a resume, not what counts
train(model, corpus, recipe, out_dir, resume=has_checkpoint(out_dir), progress=False)
save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "end.safetensors")
