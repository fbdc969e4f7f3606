"""A resumed run that nobody can tell from an unbroken one, and what is not resumed."""

import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from layerskip_moe.training import loop, train
from layerskip_moe.training import run as run_module
from layerskip_moe.training.checkpoint import save_checkpoint


class Stopped(Exception):
    pass


def run_until(monkeypatch, step, model, corpus, config, folder, resume=False):
    """Train, and stop in the middle of a step: at the second of its two batches of four."""

    def stopping(model, inputs, labels, sample_ids, config, **where):
        if where["step"] == step and sample_ids[0] == 8 * step + 4:
            raise Stopped
        return losses(model, inputs, labels, sample_ids, config, **where)

    losses = run_module.training_losses
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(run_module, "training_losses", stopping)
        train(model, corpus, config, folder, resume=resume, progress=False)


def assert_same(one, other, where="state"):
    """Equal to the last bit, all the way down."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    else:
        assert one == other, where


def timeless(checkpoint):
    """Of (facts, tensors), all but how long it took, and the digests of files that say so too."""
    facts, tensors = checkpoint
    assert facts["seconds"] > 0
    return {name: value for name, value in facts.items() if name not in ("seconds", "files")}, tensors


def untimed(records):
    timed = ("tokens_per_second", "seconds")
    return [{name: record[name] for name in record if name not in timed} for record in records]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stops", [[3], [4], [2, 2, 6], [3, 5]])
def test_a_stopped_and_resumed_run_ends_as_the_unbroken_one(decoder, text, recipe, saved, tmp_path, monkeypatch, stops):
    # Everything random and every kind of state at once; the validation text runs the other way, so that the best
    # weights are those of the first validation while training goes on.
    config = recipe(
        max_steps=7, accumulation=2, layer_dropout_max=0.5, expert_dropout=0.3, bias_update_rate=0.05,
        exit_rotation=3, validate_every=2, checkpoint_every=2, learning_rate=0.02,
    )  # fmt: skip
    corpus = SimpleNamespace(train=text().train, validation=text().validation.flip(0))
    network = dict(dropout=0.1, bias_balancing=True, moe_layers=(1, 2, 3))
    unbroken = decoder(**network)
    expected = train(unbroken, corpus, config, tmp_path / "unbroken", progress=False)
    assert expected.best_step == 2

    for turn, step in enumerate(stops):
        # What the weights and torch's generator were before the resume must not matter.
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(turn)
        model = decoder(**network, seed=turn)
        run_until(monkeypatch, step, model, corpus, config, tmp_path / "broken", resume=turn > 0)
    model = decoder(**network, seed=len(stops))
    result = train(model, corpus, config, tmp_path / "broken", resume=True, progress=False)

    assert_same(dict(model.state_dict()), dict(unbroken.state_dict()))
    assert_same(timeless(saved(tmp_path / "broken")), timeless(saved(tmp_path / "unbroken")))
    assert untimed(result.metrics) == untimed(expected.metrics)
    assert untimed(lines_of(tmp_path / "broken")) == untimed(lines_of(tmp_path / "unbroken"))
    assert (result.losses, result.validation, result.steps, result.tokens, result.best_step) == (
        expected.losses, expected.validation, expected.steps, expected.tokens, expected.best_step,
    )  # fmt: skip


def test_a_run_goes_on_where_auto_is_float16(decoder, text, recipe, saved, tmp_path, monkeypatch):
    """Begun in bfloat16, say, and resumed on an older GPU: there is no scale to take up."""
    config, types = recipe(max_steps=4, accumulation=2, precision="auto", checkpoint_every=2), [None, torch.float16]
    monkeypatch.setattr(run_module, "autocast_dtype", lambda *_: types.pop(0))
    run_until(monkeypatch, 3, decoder(n_layers=2), text(validation=0), config, tmp_path)
    train(decoder(n_layers=2), text(validation=0), config, tmp_path, resume=True, progress=False)
    assert saved(tmp_path)[0]["step"] == 4 and saved(tmp_path)[0]["scaler"]["scale"] == 2**16


def test_the_loss_scale_of_float16_is_resumed_too(decoder, text, recipe, saved, tmp_path, monkeypatch):
    config = recipe(max_steps=4, accumulation=2, precision="float16", checkpoint_every=2)
    unbroken, model = decoder(n_layers=2), decoder(n_layers=2)
    train(unbroken, text(validation=0), config, tmp_path / "unbroken", progress=False)
    run_until(monkeypatch, 3, model, text(validation=0), config, tmp_path / "broken")
    train(model, text(validation=0), config, tmp_path / "broken", resume=True, progress=False)
    end = saved(tmp_path / "unbroken")
    scaler = end[0]["scaler"]
    assert scaler["scale"] > 1 and scaler["_growth_tracker"] == 4  # steps since it last changed
    assert_same(timeless(saved(tmp_path / "broken")), timeless(end))
    assert_same(dict(model.state_dict()), dict(unbroken.state_dict()))


def test_an_unbroken_run_depends_on_its_seed_and_nothing_else(decoder, text, recipe, tmp_path):
    ends = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        model = decoder(dropout=0.2)
        train(model, text(), recipe(seed=seed), tmp_path / folder, progress=False)
        ends.append(dict(model.state_dict()))
    assert_same(ends[0], ends[1])
    assert any(not torch.equal(ends[0][name], ends[2][name]) for name in ends[0])


def test_residual_dropout_differs_from_step_to_step(decoder, text, recipe, tmp_path):
    model = decoder(dropout=0.5, n_layers=1)
    dropped = []
    model.blocks[0].dropout.register_forward_hook(lambda _, args, out: dropped.append(out == 0))
    train(model, text(validation=0), recipe(max_steps=2, accumulation=2), tmp_path, progress=False)
    assert len(dropped) == 2 * 2 * 2  # steps, batches, sublayers
    assert all(0.3 < mask.double().mean() < 0.7 for mask in dropped)
    assert all(not torch.equal(a, b) for i, a in enumerate(dropped) for b in dropped[:i])


def test_a_finished_run_resumes_to_what_it_was(decoder, text, recipe, tmp_path):
    corpus, config, model = text(), recipe(max_steps=4, validate_every=1), decoder()
    finished = train(model, corpus, config, tmp_path, progress=False)
    again = decoder(seed=1)
    result = train(again, corpus, config, tmp_path, resume=True, progress=False)
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    assert (result.metrics, result.losses, result.validation) == (
        finished.metrics, finished.losses, finished.validation,
    )  # fmt: skip
    (tmp_path / "metrics.jsonl").unlink()  # the weights do not depend on it
    result = train(again, corpus, config, tmp_path, resume=True, progress=False)
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    assert result.metrics == [] and result.losses == {} and result.validation == []


def test_a_stopped_steps_gradients_do_not_leak_into_the_next_run(decoder, text, recipe, tmp_path, monkeypatch):
    config = recipe(max_steps=5, accumulation=2, checkpoint_every=1)
    model, unbroken = decoder(), decoder()
    train(unbroken, text(), config, tmp_path / "unbroken", progress=False)
    run_until(monkeypatch, 3, model, text(), config, tmp_path / "broken")
    assert model.embedding.weight.grad is not None  # of the first of its two batches; the model is used again
    train(model, text(), config, tmp_path / "broken", resume=True, progress=False)
    assert_same(dict(model.state_dict()), dict(unbroken.state_dict()))


def test_how_often_is_logged_and_saved_may_change_on_resume(decoder, text, recipe, tmp_path, monkeypatch):
    corpus, model, unbroken = text(), decoder(), decoder()
    settings = dict(max_steps=5, accumulation=2)
    train(unbroken, corpus, recipe(**settings), tmp_path / "unbroken", progress=False)
    run_until(monkeypatch, 3, model, corpus, recipe(**settings, checkpoint_every=1), tmp_path / "broken")
    train(model, corpus, recipe(**{**settings, "log_every": 4}), tmp_path / "broken", resume=True, progress=False)
    assert_same(dict(model.state_dict()), dict(unbroken.state_dict()))


def test_a_new_run_does_not_take_up_a_finished_one(decoder, text, recipe, saved, tmp_path):
    train(decoder(), text(), recipe(max_steps=5), tmp_path, progress=False)
    model, fresh = decoder(), decoder()
    result = train(model, text(), recipe(max_steps=2), tmp_path, progress=False)
    train(fresh, text(), recipe(max_steps=2), tmp_path / "elsewhere", progress=False)
    assert_same(dict(model.state_dict()), dict(fresh.state_dict()))
    assert lines_of(tmp_path) == result.metrics and result.metrics[-1]["step"] == 1
    assert saved(tmp_path)[0]["step"] == 2


@pytest.mark.parametrize(
    "checkpoint_every, saved", [(None, [1, 2, 3, 4, 5]), (0, []), (2, [2, 4, 5]), (5, [5]), (100, [5])]
)
def test_when_checkpoints_are_written(decoder, text, recipe, tmp_path, monkeypatch, checkpoint_every, saved):
    steps = []
    monkeypatch.setattr(loop, "save_checkpoint", lambda folder, facts, tensors: steps.append(facts["step"]))
    train(decoder(), text(), recipe(max_steps=5, checkpoint_every=checkpoint_every), tmp_path, progress=False)
    assert steps == saved


@pytest.mark.parametrize(
    "network, settings, length, sentence",
    [
        ({}, dict(learning_rate=0.5), 400, "learning_rate was 0.001 and is now 0.5"),
        ({}, dict(max_steps=9), 400, "max_steps was 3 and is now 9"),
        ({}, dict(seed=1, exit_curriculum="all"), 400, "exit_curriculum was 'rotational'.*; seed was 0 and is now 1"),
        (dict(d_ff=16), {}, 400, "d_ff was 8 and is now 16"),
        (dict(moe_layers=(1, 3)), {}, 400, r"moe_layers was 'all' and is now \(1, 3\)"),
    ],
)
def test_a_run_with_other_settings_is_not_resumed(decoder, text, recipe, tmp_path, network, settings, length, sentence):
    train(decoder(), text(), recipe(), tmp_path, progress=False)
    files = contents(tmp_path)
    model = decoder(**network)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"the run to resume had other settings: .*{sentence}"):
        train(model, text(train=length), recipe(**settings), tmp_path, resume=True, progress=False)
    assert contents(tmp_path) == files
    assert_same(dict(model.state_dict()), before)


def test_a_run_on_another_text_is_not_resumed(decoder, text, recipe, tmp_path):
    for config in (recipe(max_steps=None, epochs=0.5), recipe(max_steps=3)):  # other steps, or as many
        train(decoder(), text(), config, tmp_path, progress=False)
        with pytest.raises(ValueError, match="the run to resume was on another text"):
            train(decoder(), text(train=200), config, tmp_path, resume=True, progress=False)


@pytest.mark.parametrize("lacking", ["facts", "setting", "tensors", "others"])
def test_a_checkpoint_of_something_else_is_not_resumed(decoder, text, recipe, saved, tmp_path, lacking):
    train(decoder(), text(), recipe(), tmp_path, progress=False)
    facts, tensors = saved(tmp_path)
    if lacking == "facts":
        facts = {"step": 3}
    elif lacking == "setting":
        del facts["train_config"]["beta1"]
    elif lacking == "tensors":
        del tensors["model.embedding.weight"]
    else:
        tensors["optimizer.nothing.exp_avg"] = torch.zeros(3)
    save_checkpoint(tmp_path, facts, tensors)
    model = decoder(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"(not one of|other tensors than) this version's training|tensor .* no run has"
    ):
        train(model, text(), recipe(), tmp_path, resume=True, progress=False)
    assert_same(dict(model.state_dict()), before)


def test_without_a_checkpoint_nothing_is_resumed(decoder, text, recipe, tmp_path):
    sentence = f"no checkpoint in {re.escape(str(tmp_path / 'run'))} .*without resume"
    with pytest.raises(ValueError, match=sentence):
        train(decoder(), text(), recipe(), tmp_path / "run", resume=True, progress=False)
    assert list(tmp_path.iterdir()) == []
