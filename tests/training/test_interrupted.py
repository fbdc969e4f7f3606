"""Ctrl-C and SIGTERM in training: the step at hand is finished, saved, and how to go on is said."""

import os
import signal
import threading

import pytest
import torch

from layerskip_moe.interrupts import Interrupted, interrupts_wait
from layerskip_moe.training import loop, tensor_files, train
from layerskip_moe.training import run as run_module

HANDLED = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers():
    """Every test leaves them as they were."""
    before = [signal.getsignal(number) for number in HANDLED]
    yield
    assert [signal.getsignal(number) for number in HANDLED] == before


def signalling(patch, number, step, times=1):
    """The signal comes in the middle of this step, so many times."""

    def losses(*arguments, **others):
        if others["step"] == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return training_losses(*arguments, **others)

    training_losses = run_module.training_losses
    patch.setattr(run_module, "training_losses", losses)


def assert_same_weights(model, other):
    one, other = model.state_dict(), other.state_dict()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_step_at_hand_is_finished_and_saved(
    decoder, text, recipe, saved, tmp_path, monkeypatch, capfd, number, status
):
    config = recipe(max_steps=7, checkpoint_every=5, validate_every=2)
    unbroken, model = decoder(), decoder()
    expected = train(unbroken, text(), config, tmp_path / "unbroken", progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stopped:
        signalling(patch, number, step=3)
        train(model, text(), config, tmp_path / "run", progress=False)
    assert isinstance(stopped.value, Interrupted) and stopped.value.exit_status == status
    assert str(stopped.value).startswith(f"stopped after step 4 of 7, and saved in {tmp_path / 'run'}: ")
    assert "resume=True" in str(stopped.value) and "--resume" in str(stopped.value)
    assert "once more stops at once" in capfd.readouterr().err
    facts, tensors = saved(tmp_path / "run")
    assert facts["step"] == 4
    assert all(torch.equal(tensors[f"model.{name}"], tensor) for name, tensor in model.state_dict().items())
    result = train(model, text(), config, tmp_path / "run", resume=True, progress=False)
    assert_same_weights(model, unbroken)
    assert [(r["split"], r["step"]) for r in result.metrics] == [(r["split"], r["step"]) for r in expected.metrics]


def test_a_second_one_does_not_wait(decoder, text, recipe, saved, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=r"^interrupted$"):
        signalling(patch, signal.SIGINT, step=3, times=2)
        train(decoder(), text(), recipe(max_steps=7, checkpoint_every=2), tmp_path, progress=False)
    assert saved(tmp_path)[0]["step"] == 2


def test_in_the_last_step_and_while_it_is_saved(decoder, text, recipe, saved, tmp_path, monkeypatch):
    for moment in ("step", "saving"):
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match="stopped after step 3 of 3"):
            if moment == "step":
                signalling(patch, signal.SIGINT, step=2)
            else:
                real = loop.save_checkpoint

                def save(folder, facts, tensors, real=real):
                    if facts["step"] == 3:
                        os.kill(os.getpid(), signal.SIGINT)
                    return real(folder, facts, tensors)

                patch.setattr(loop, "save_checkpoint", save)
            train(decoder(), text(), recipe(checkpoint_every=1), tmp_path / moment, progress=False)
        assert saved(tmp_path / moment)[0]["step"] == 3


def test_a_run_without_checkpoints_says_that_nothing_is_saved(decoder, text, recipe, tmp_path, monkeypatch):
    with pytest.raises(Interrupted, match="after step 2 of 3; nothing was saved, as checkpoint_every=0 asks"):
        signalling(monkeypatch, signal.SIGINT, step=1)
        train(decoder(), text(), recipe(checkpoint_every=0), tmp_path, progress=False)
    assert not (tmp_path / "checkpoints").exists()


def test_a_second_one_in_the_middle_of_saving_leaves_the_checkpoint_before(
    decoder, text, recipe, saved, tmp_path, monkeypatch
):
    def opened(path, mode):
        file = open(path, mode)  # noqa: SIM115
        if "step-00000004" in str(path):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return file

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=r"^interrupted$"):
        patch.setattr(tensor_files, "open", opened, raising=False)
        train(decoder(), text(), recipe(max_steps=7, checkpoint_every=2), tmp_path, progress=False)
    assert saved(tmp_path)[0]["step"] == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_only_the_main_thread_has_handlers(decoder, text, recipe, tmp_path):
    told = []

    def work():
        with interrupts_wait() as interruption:
            told.append((interruption.received, [signal.getsignal(number) for number in HANDLED]))
        train(decoder(), text(), recipe(), tmp_path, progress=False)
        told.append("trained")

    before = [signal.getsignal(number) for number in HANDLED]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert told == [(None, before), "trained"]


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `nohup` and a shell's background have it
    try:
        with interrupts_wait() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert interruption.received is None
    finally:
        signal.signal(signal.SIGINT, before)
