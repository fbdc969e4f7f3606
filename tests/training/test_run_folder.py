"""One run at a time in a folder, and none that loses another."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch

from layerskip_moe.interrupts import Interrupted
from layerskip_moe.training import check_new_run, finish_run, has_checkpoint, train
from layerskip_moe.training import run as run_module
from layerskip_moe.training.run_folder import run_folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def stopped(decoder, text, recipe, tmp_path, monkeypatch):
    """A folder with a run that stopped after 2 of its 5 steps."""

    def stopping(*arguments, step, **others):
        if step == 2:
            raise RuntimeError("no more")
        return training_losses(*arguments, step=step, **others)

    training_losses = run_module.training_losses
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no more"):
        patch.setattr(run_module, "training_losses", stopping)
        train(decoder(), text(), recipe(max_steps=5, checkpoint_every=1), tmp_path / "run", progress=False)
    return tmp_path / "run"


def test_a_stopped_run_is_not_lost_to_a_new_one(decoder, text, recipe, stopped, tmp_path):
    before = contents(stopped)
    sentence = (
        f"{re.escape(str(stopped))} holds a run that stopped after step 2 of 5; .*resume.*or give another out_dir"
    )
    for resumable in (recipe(max_steps=5), recipe(max_steps=9)):
        with pytest.raises(ValueError, match=sentence):
            train(decoder(), text(), resumable, stopped, progress=False)
    with pytest.raises(ValueError, match=sentence):
        check_new_run(stopped)
    assert contents(stopped) == before
    train(decoder(), text(), recipe(max_steps=5, checkpoint_every=1), stopped, resume=True, progress=False)
    check_new_run(stopped)  # a finished one may be replaced
    check_new_run(tmp_path / "nothing")


def test_a_checkpoint_that_a_killed_run_had_moved_away_is_not_lost(decoder, text, recipe, stopped):
    """By saving the same step again: as it is between the two renames of `files.replacing_folder`."""
    root = stopped / "checkpoints"
    newest = root / "step-00000002"
    for path in root.iterdir():
        if path != newest:
            shutil.rmtree(path)
    before = contents(newest)
    newest.rename(root / ".step-00000002.77.old")
    shutil.copytree(root / ".step-00000002.77.old", root / ".step-00000002.77.tmp")
    assert has_checkpoint(stopped)
    with pytest.raises(ValueError, match="holds a run that stopped after step 2 of 5; go on"):
        check_new_run(stopped)
    told = "step-00000002 was being written anew when its run was killed; it is back as it was"
    with pytest.warns(UserWarning, match=told), run_folder(stopped, resume=True) as checkpoint:
        assert checkpoint.path == newest
    assert list(root.iterdir()) == [newest] and contents(newest) == before
    train(decoder(), text(), recipe(max_steps=5, checkpoint_every=1), stopped, resume=True, progress=False)


def test_a_stopped_run_that_cannot_be_read_is_not_lost_either(decoder, text, recipe, stopped):
    for path in (stopped / "checkpoints").glob("*/state.json"):
        path.write_text("")
    with pytest.raises(ValueError, match="holds a run that stopped after step 2; go on"):
        train(decoder(), text(), recipe(max_steps=5), stopped, progress=False)


def test_a_run_stopped_in_its_last_step_is_not_a_finished_one(decoder, text, recipe, tmp_path, monkeypatch):
    """It said that the same again goes on: so the next run, without resume, is to leave it."""

    def interrupted(*arguments, step, **others):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return training_losses(*arguments, step=step, **others)

    training_losses = run_module.training_losses
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=r"stopped after step 3 of 3.*resume=True"):
        patch.setattr(run_module, "training_losses", interrupted)
        train(decoder(), text(), recipe(checkpoint_every=1), tmp_path, progress=False)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds a run that stopped after step 3 of 3; go on with resume=True"):
        train(decoder(), text(), recipe(checkpoint_every=1), tmp_path, progress=False)
    assert contents(tmp_path) == before
    train(decoder(), text(), recipe(checkpoint_every=1), tmp_path, resume=True, progress=False)
    check_new_run(tmp_path)


def test_a_run_is_finished_when_whoever_saves_its_model_says_so(decoder, text, recipe, tmp_path):
    for resume in (False, True):
        train(decoder(), text(), recipe(), tmp_path, resume=resume, finish=False, progress=False)
        with pytest.raises(ValueError, match="holds a run that stopped after step 3 of 3"):
            check_new_run(tmp_path)
    finish_run(tmp_path)
    check_new_run(tmp_path)
    finish_run(tmp_path / "nothing")  # nor does it make a folder for one without checkpoints
    assert not (tmp_path / "nothing").exists()


def test_a_finished_run_that_goes_on_from_an_older_checkpoint_is_no_longer_finished(
    decoder, text, recipe, tmp_path, monkeypatch
):
    config = recipe(max_steps=4, checkpoint_every=1)
    train(decoder(), text(), config, tmp_path, progress=False)
    (tmp_path / "checkpoints" / "step-00000004" / "state.json").write_text("")

    def interrupted(*arguments, **others):
        os.kill(os.getpid(), signal.SIGINT)
        return training_losses(*arguments, **others)

    training_losses = run_module.training_losses
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(Interrupted), monkeypatch.context() as patch:
        patch.setattr(run_module, "training_losses", interrupted)
        train(decoder(), text(), config, tmp_path, resume=True, progress=False)
    with pytest.raises(ValueError, match="holds a run that stopped after step 4 of 4"):
        check_new_run(tmp_path)


def test_a_finished_runs_checkpoints_are_gone_when_a_new_one_begins(decoder, text, recipe, tmp_path, monkeypatch):
    """Else the new one, killed before its first checkpoint, would be resumed to the end of the other."""
    train(decoder(), text(), recipe(), tmp_path, progress=False)
    assert has_checkpoint(tmp_path)

    def stop(*arguments, **others):
        assert not has_checkpoint(tmp_path)
        raise RuntimeError("no more")

    monkeypatch.setattr(run_module, "training_losses", stop)
    with pytest.raises(RuntimeError, match="no more"):
        train(decoder(), text(), recipe(), tmp_path, progress=False)


HOLD = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire(timeout=0)
print("held", flush=True)
input()
"""


def test_a_folder_is_one_processs_until_that_is_dead(decoder, text, recipe, tmp_path):
    train(decoder(), text(), recipe(), tmp_path, progress=False)
    before = contents(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(ValueError, match=r"another run is at work in .*wait for its end, or give this one"):
                train(decoder(), text(), recipe(), tmp_path, resume=resume, progress=False)
        assert contents(tmp_path) == before
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdin.close(), other.stdout.close()
    train(decoder(), text(), recipe(), tmp_path, resume=True, progress=False)


def test_a_folder_is_one_threads(tmp_path):
    told = []

    def enter():
        try:
            with run_folder(tmp_path, resume=False):
                told.append("in")
        except ValueError as error:
            told.append(str(error))

    with run_folder(tmp_path, resume=False):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    enter()
    assert told[0].startswith("another run is at work") and told[1:] == ["in"]


def test_an_error_frees_the_folder(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError), run_folder(tmp_path, resume=False):
            raise RuntimeError


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_to_is_told(decoder, text, recipe, tmp_path, monkeypatch, code):
    def refuse(path, *arguments, **others):
        if str(path).endswith(".lock"):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *arguments, **others)

    real = os.open
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=r"this run cannot be written, for .*run is read-only for this user; take"):
        train(decoder(), text(), recipe(), tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_told(decoder, text, recipe, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="read-only for this user"):
        train(decoder(), text(), recipe(), tmp_path / "run", progress=False)
    tmp_path.chmod(0o700)


def test_a_full_disk_leaves_no_torn_line_of_metrics(decoder, text, recipe, tmp_path, monkeypatch):
    from layerskip_moe.training.metrics import MetricsWriter

    class Full:
        """Takes half of the third line."""

        def __init__(self, file):
            self.file, self.lines = file, 0

        def write(self, line):
            self.lines += 1
            return self.file.write(line if self.lines < 3 else line[: len(line) // 2])

        def __getattr__(self, name):
            return getattr(self.file, name)

    def enter(self, real=MetricsWriter.__enter__):
        self._file = Full(self._file)
        return real(self)

    unbroken, model, config = decoder(), decoder(), recipe(max_steps=5, checkpoint_every=1)
    train(unbroken, text(validation=0), config, tmp_path / "unbroken", progress=False)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"no room for metrics.jsonl in .*run"):
        patch.setattr(MetricsWriter, "__enter__", enter)
        train(model, text(validation=0), config, tmp_path / "run", progress=False)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert lines.endswith("}\n") and lines.count("\n") == 2
    train(model, text(validation=0), config, tmp_path / "run", resume=True, progress=False)
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
