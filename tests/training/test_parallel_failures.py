"""A process that dies, or hangs, takes the others with it within the timeout; and what is saved goes on."""

import os
import runpy
import shutil
import signal
import time
from pathlib import Path

import pytest

parallel = runpy.run_path(str(Path(__file__).with_name("test_parallel.py")))
start, finish, alone, outcome, assert_same = (
    parallel[name] for name in ("start", "finish", "alone", "outcome", "assert_same")
)


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


@pytest.mark.slow
def test_a_checkpoint_may_take_longer_than_others_wait_for_an_answer(tmp_path):
    finish(start(2, {"run": dict(recipe=dict(max_steps=2, checkpoint_every=1), slow=20)}, tmp_path, TEST_TIMEOUT="10"))
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_stopped_on_two_processes_goes_on_on_one_and_on_three(tmp_path, how):
    """Killed, in one of them, somewhere after its second checkpoint; or told to stop, both, as torchrun has it."""
    long = dict(recipe=dict(max_steps=120, batch_size=6, validate_every=0, checkpoint_every=5))
    folder = tmp_path / "two"
    processes = start(2, {"run": long}, folder, TEST_TIMEOUT="60")
    try:
        deadline = time.monotonic() + 300
        while not (folder / "run" / "checkpoints" / "step-00000010").exists():
            assert time.monotonic() < deadline and processes[0].poll() is None
            time.sleep(0.005)
        for process in processes[1:] if how == signal.SIGKILL else processes:
            os.kill(process.pid, how)
        assert all(process.wait(timeout=120) != 0 for process in processes)
    finally:
        for process in processes:
            process.kill()
        said = [process.communicate()[1] for process in processes]
    steps = [int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step-*")]
    assert 10 <= max(steps) < 120
    if how == signal.SIGTERM:
        assert f"stopped after step {max(steps)} of 120, and saved in" in said[0] and "once more" in said[0]
        assert "once more" not in said[1]
    for name in ("three", "unbroken"):
        (tmp_path / name).mkdir()
    shutil.copytree(folder / "run", tmp_path / "three" / "run")
    alone(long | dict(resume=True), folder / "run")
    finish(start(3, {"run": long | dict(resume=True)}, tmp_path / "three"))
    alone(long, tmp_path / "unbroken" / "run")
    for stopped in (folder, tmp_path / "three"):
        assert_same(outcome(stopped / "run"), outcome(tmp_path / "unbroken" / "run"))
