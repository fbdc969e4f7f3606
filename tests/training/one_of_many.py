"""One of the processes that the parallel tests start, which find each other by what torchrun would tell them; or the
only one. `python one_of_many.py runs.json out_dir` trains each run of the file, and keeps what came of it in out_dir.

A run: {"network": ModelConfig's fields, "recipe": TrainConfig's, "stop_at": a step at which all stop, "resume",
"seeds": of each process's weights, "broken": a part of the network that gives nan in the last process,
"slow": seconds that writing a checkpoint takes longer}.
Blocks are traced where the recipe compiles them, and run as they are: a compiler would take a minute.
What such a run says in the end is kept too.
"""

import functools
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch

from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.training import TrainConfig, block_calls, loop, train
from layerskip_moe.training import run as run_module
from layerskip_moe.training.parallel import join

NETWORK = dict(
    vocab_size=16, n_layers=4, d_model=8, n_heads=2, n_kv_heads=1, d_ff=8, num_experts=4, top_k=2, max_seq_len=32,
    init_std=0.2,
)  # fmt: skip
RECIPE = dict(
    max_steps=6, seq_len=8, batch_size=4, learning_rate=3e-4, layer_dropout_max=0.7, layer_dropout_time="uniform",
    precision="float32", log_every=1, validation_windows=7, validate_every=3, keep_best=False, checkpoint_every=2,
)  # fmt: skip


class Stopped(Exception):
    pass


def text():
    """Random walks, which two splits have in common."""
    steps = torch.randint(0, 3, (1000,), generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(train=steps.cumsum(0)[:800] % 16, validation=steps.cumsum(0)[800:] % 16)


def breaks(module, arguments, output):
    return (output[0] * torch.nan, *output[1:]) if isinstance(output, tuple) else output * torch.nan


def run(out_dir, *, network=None, recipe=None, stop_at=None, resume=False, seeds=None, broken=None, slow=0):
    """Train, or go on training; every process keeps its weights, the first one metrics and the exported model."""
    rank, losses = int(os.environ.get("RANK", "0")), run_module.training_losses

    def stopping(*arguments, step, **others):
        if step == stop_at:
            raise Stopped
        return losses(*arguments, step=step, **others)

    model = MoEDecoder(ModelConfig(**NETWORK | (network or {})), seed=seeds[rank] if seeds else 0)
    if broken is not None and rank + 1 == int(os.environ.get("WORLD_SIZE", "1")):
        model.get_submodule(broken).register_forward_hook(breaks)

    def saving_slowly(*arguments):
        time.sleep(slow)
        return save(*arguments)

    run_module.training_losses, loop.save_checkpoint, save = stopping, saving_slowly, loop.save_checkpoint
    traced = functools.partial(torch.compile, fullgraph=True, backend="eager")
    block_calls.compiled = functools.cache(traced)
    config = TrainConfig(**RECIPE | (recipe or {}))
    alone = "WORLD_SIZE" not in os.environ  # where the 8-bit AdamW would compile itself, for half a minute
    try:
        with torch.compiler.set_stance("force_eager" if alone else "default"):
            result = train(model, text(), config, out_dir, resume=resume, progress=False)
    except Stopped:
        return
    except (ValueError, FloatingPointError) as error:
        if seeds is None and broken is None:
            raise
        Path(out_dir).mkdir(exist_ok=True)
        (Path(out_dir) / f"said-{rank}.txt").write_text(str(error))
        return
    finally:
        run_module.training_losses, loop.save_checkpoint = losses, save
    torch.save(model.state_dict(), Path(out_dir) / f"weights-{rank}.pt")
    if rank == 0:
        model.save_pretrained(Path(out_dir) / "model")
        (Path(out_dir) / "result.json").write_text(json.dumps([result.metrics, result.best_step]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    join("cpu", timeout=timedelta(seconds=float(os.environ.get("TEST_TIMEOUT", "300"))))
    for name, asked in json.loads(Path(sys.argv[1]).read_text()).items():
        run(Path(sys.argv[2]) / name, **asked)
