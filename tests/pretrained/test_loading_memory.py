"""Loading takes the model's own memory and little more: files are mapped, and copied tensor by tensor."""

import os
import subprocess
import sys

import pytest

from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained import save_model

LOAD = """
import sys, threading, time
import torch
from layerskip_moe.nn import MoEDecoder

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)

MoEDecoder.from_pretrained(sys.argv[1])  # what is imported and made once
threading.Thread(target=watch, daemon=True).start()
for dtype in (None, torch.bfloat16):
    before = peak = anonymous()
    model = MoEDecoder.from_pretrained(sys.argv[2], dtype=dtype)
    peak = max(peak, anonymous())
    print((peak - before) / sum(parameter.nbytes for parameter in model.parameters()))
    del model
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measured through /proc, which is not here")
def test_loading_takes_little_more_memory_than_the_model(tmp_path):
    config = ModelConfig(vocab_size=500, n_layers=2, d_model=256, n_heads=4, num_experts=8, d_ff=1536)
    model = MoEDecoder(config).requires_grad_(False)
    assert 70e6 < sum(parameter.nbytes for parameter in model.parameters()) < 90e6
    save_model(model, tmp_path / "large", max_shard_bytes=40 * 10**6)
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 1
    save_model(MoEDecoder(ModelConfig(vocab_size=9, n_layers=1, d_model=16)), tmp_path / "small")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    taken = [float(line) for line in done.stdout.split()]
    assert len(taken) == 2 and all(0.9 < share < 1.2 for share in taken), taken
