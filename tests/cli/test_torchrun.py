"""Both ways to train under torchrun: two processes leave what one does, and say it once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow  # each process imports everything
MAIN = Path(__file__).parents[2] / "main.py"
TINY = (
    "--vocab_size 300 --n_layers 3 --d_model 16 --n_heads 2 --num_experts 2 --seq_len 16 --batch_size 4 --max_steps 4"
)


def run(*line):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, *map(str, line)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def assert_same(one, other, atol=1e-5):
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=atol)


def torchrun(*line):
    return run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *line)


def test_the_train_command(text, tmp_path, cache_with_kernels):
    command = ["layerskip_moe", "train", "--dataset", text, *TINY.replace("_", "-").split(), "--top-k", 1]
    command += ["--precision", "float32", "--device", "cpu"]
    run("-m", *command, "--out-dir", tmp_path / "one")
    out, err = torchrun("-m", *command, "--out-dir", tmp_path / "two")
    assert out.count("the model is in") == 1 and "rror" not in err
    assert_same(tmp_path / "one", tmp_path / "two")


def test_main(text, tmp_path, cache_with_kernels):
    command = [MAIN, *TINY.split(), "--k", 1, "--dataset", text, "--device", "cpu", "--d_ff", 16]
    command += ["--num_prompts", 2, "--max_new_tokens", 4, "--compare", "--expert_parallel"]
    run(*command, 1, "--out_dir", tmp_path / "one")
    out, _ = torchrun(*command, 2, "--out_dir", tmp_path / "two")
    assert out.count("All of it, with pictures") == 1
    # In bfloat16 where the CPU multiplies it: weights whose gradient is hardly more than its rounding go either way.
    assert_same(tmp_path / "one", tmp_path / "two", atol=0.005)
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert two["exits"]["perplexity"] == pytest.approx(one["exits"]["perplexity"], rel=1e-3)
    assert len(two["comparison"]["runs"]) == 2
