"""A process that dies, or hangs, takes the others with it within the timeout."""

import os
import runpy
import signal
import time
from pathlib import Path

import pytest

start = runpy.run_path(str(Path(__file__).with_name("test_parallel.py")))["start"]


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_when_one_process_is_lost_the_others_end(tmp_path, how):
    endless = dict(recipe=dict(max_steps=10**6, validate_every=0, checkpoint_every=0))
    processes = start(2, {"endless": endless}, tmp_path, TEST_TIMEOUT="5")
    metrics = tmp_path / "endless" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 300
        while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 3:
            assert time.monotonic() < deadline and processes[0].poll() is None
            time.sleep(0.1)
        os.kill(processes[1].pid, how)
        lost = time.monotonic()
        assert processes[0].wait(timeout=120) != 0
        assert time.monotonic() - lost < 60  # 5 s of waiting for an answer; the rest is for a busy machine
    finally:
        for process in processes:
            process.kill()
            process.communicate()
