"""Time per part of a training step, on a clock that only moves when a test says so."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layerskip_moe.training import loop, losses, step_timer, train
from layerskip_moe.training import run as run_module
from layerskip_moe.training.step_timer import PARTS, StepTimer


@pytest.fixture
def clock(monkeypatch):
    """clock.now, in seconds, is what the timer reads; clock.taking(seconds, function) is that function, slowed
    down by so many."""

    def taking(seconds, function):
        def slowed(*arguments, **others):
            clock.now += seconds
            return function(*arguments, **others)

        return slowed

    clock = SimpleNamespace(now=0.0, taking=taking)
    monkeypatch.setattr(step_timer, "perf_counter", lambda: clock.now)
    return clock


@pytest.fixture
def nothing_ahead(monkeypatch):
    """Batches are fetched when a step asks for them, not before by another thread."""
    monkeypatch.setattr(loop, "ahead", lambda text: text)


def seconds_of(result):
    return [record["seconds"] for record in result.metrics if record["split"] == "train"]


def test_what_slows_a_part_down_is_told_of_that_part(
    decoder, text, recipe, tmp_path, monkeypatch, clock, nothing_ahead
):
    def slower_and_slower(*arguments, **others):
        for index, batch in enumerate(batches(*arguments, **others)):
            clock.now += index  # 0 and 1 in the first step, 2 and 3 in the second, ...
            yield batch

    def slow_backward(*arguments, **others):
        one = training_losses(*arguments, **others)
        one.total.register_hook(clock.taking(8, lambda gradient: None))
        return one

    batches, training_losses = run_module.batches, run_module.training_losses
    model = decoder()
    model.embedding.register_forward_pre_hook(clock.taking(2, lambda *_: None))
    monkeypatch.setattr(run_module, "batches", slower_and_slower)
    monkeypatch.setattr(losses, "exit_loss", clock.taking(4, losses.exit_loss))
    monkeypatch.setattr(run_module, "training_losses", slow_backward)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clock.taking(16, torch.nn.utils.clip_grad_norm_))
    for name in ("save_checkpoint", "train_record"):  # in no part of a step
        monkeypatch.setattr(loop, name, clock.taking(1000, getattr(loop, name)))
    config = recipe(max_steps=5, accumulation=2, log_every=2, checkpoint_every=1)
    result = train(model, text(validation=0), config, tmp_path, progress=False)
    fixed = {"forward": 2 * 2, "exit loss": 2 * 4, "backward": 2 * 8, "optimizer": 16}
    assert seconds_of(result) == [
        {"batches": ((0 + 1) + (2 + 3)) / 2, **fixed},
        {"batches": ((4 + 5) + (6 + 7)) / 2, **fixed},
        {"batches": 8 + 9, **fixed},  # the last record is of one step
    ]


def test_the_parts_are_the_whole_step(decoder, text, recipe, tmp_path, monkeypatch, clock, nothing_ahead):
    class Ticking(TorchDispatchMode):
        """Every tensor operation takes a second."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            clock.now += 1
            return function(*args, **(kwargs or {}))

    def timed(*arguments):
        started = clock.now
        with Ticking():
            result = step(*arguments)
        whole.append(clock.now - started)
        return result

    whole, step = [], run_module.Run.step
    monkeypatch.setattr(run_module.Run, "step", timed)
    config = recipe(accumulation=2, layer_dropout_max=0.2, expert_dropout=0.2, exit_distillation=0.5)
    result = train(decoder(bias_balancing=True), text(), config, tmp_path, progress=False)
    parts = seconds_of(result)
    assert [tuple(seconds) for seconds in parts] == [PARTS] * 3
    assert [sum(seconds.values()) for seconds in parts] == whole
    assert all(value > 0 for seconds in parts for value in seconds.values())


def test_a_gpu_is_asked_for_its_times_only_when_they_are_wanted(monkeypatch, clock):
    """On CUDA, stood in for here: events in the queue of the model's device, which runs ten seconds late."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.passed = False

        def record(self, stream):
            assert stream == "queue of cuda:1"
            self.time = clock.now + 10

        def synchronize(self):
            self.passed = True
            waits.append(self)

        def elapsed_time(self, end):
            assert end.passed
            return 1000 * (end.time - self.time)

    waits = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"queue of {device}")
    timer = StepTimer(torch.device("cuda:1"))
    for seconds in (1, 2):
        with timer.part("forward"):
            clock.now += seconds
        with timer.part("backward"):
            clock.now += 10 * seconds
        clock.now += 100
    assert waits == []
    nothing = dict.fromkeys(PARTS, 0.0)
    assert timer.mean_seconds(2) == nothing | {"forward": 1.5, "backward": 15.0}
    assert len(waits) == 4
    assert timer.mean_seconds(1) == nothing
