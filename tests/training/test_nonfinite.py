"""Steps whose loss or gradient is not finite: skipped without a trace, counted, and where it began."""

import json
import math
import re

import pytest
import torch

from layerskip_moe.training import run as run_module
from layerskip_moe.training import train
from layerskip_moe.training.nonfinite import where_it_began
from layerskip_moe.training.parallel import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def weights_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def of(result, split):
    return [record for record in result.metrics if record["split"] == split]


def poison(patch, steps, broken="loss"):
    """In these steps the loss is infinite, or it is as ever and its gradient is nan."""

    def poisoned(model, *arguments, step, **others):
        losses = training_losses(model, *arguments, step=step, **others)
        if step not in steps:
            return losses
        weight = model.embedding.weight
        zero_with_nan_gradient = (weight - weight.detach()).abs().sum().sqrt()
        return losses._replace(total=losses.total + (math.inf if broken == "loss" else zero_with_nan_gradient))

    training_losses = run_module.training_losses
    patch.setattr(run_module, "training_losses", poisoned)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(decoder, text, recipe, saved, tmp_path, monkeypatch, broken):
    seen = {}
    real = run_module.Run.step

    def step(run, number, text):
        before = {name: tensor.clone() for name, tensor in run.tensors().items()}
        result = real(run, number, text)
        seen[number] = before, {name: tensor.clone() for name, tensor in run.tensors().items()}
        return result

    monkeypatch.setattr(run_module.Run, "step", step)
    poison(monkeypatch, {2, 3, 5}, broken)
    model = decoder(bias_balancing=True)
    config = recipe(max_steps=7, accumulation=2, checkpoint_every=1, log_every=1)
    result = train(model, text(validation=0), config, tmp_path, progress=False)
    assert result.skipped_steps == 3 and result.steps == 7
    for number, (before, after) in seen.items():
        changed = before.keys() != after.keys() or any(not torch.equal(before[n], after[n]) for n in before)
        assert changed == (number not in {2, 3, 5})
    assert any("balance_bias" in name for name in seen[2][0]) and any("exp_avg" in name for name in seen[2][0])
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert [record["step"] for record in of(result, "train")] == [0, 1, 4, 6]
    skipped = of(result, "skipped")
    assert [(record["step"], record["skipped_steps"]) for record in skipped] == [(2, 1), (3, 2), (5, 3)]
    assert all(record["gradient_norm"] is None for record in skipped if broken == "gradient")
    assert all((record["loss"] is None) == (broken == "loss") for record in skipped)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert saved(tmp_path)[0]["skips"] == {"count": 3, "in_a_row": 0, "first": "the loss is inf"} or broken != "loss"


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_many_in_a_row_end_the_run_at_the_last_good_checkpoint(
    decoder, text, recipe, saved, tmp_path, monkeypatch, broken
):
    poison(monkeypatch, {1, 4, 5, 6, 7}, broken)
    model = decoder().eval()
    config = recipe(max_steps=9, log_every=100, checkpoint_every=1, max_skipped_steps=3)
    sentence = rf"the {broken}.* is (inf|nan) at step 4, and 2 more in a row; it began in .*lower learning_rate"
    with pytest.raises(FloatingPointError, match=sentence):
        train(model, text(), config, tmp_path, progress=False)
    facts, tensors = saved(tmp_path)
    assert facts["step"] == 4 and facts["skips"]["count"] == 1
    assert_same_weights(weights_of(model), {n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert re.search('"step": 6', (tmp_path / "metrics.jsonl").read_text().splitlines()[-1])


def test_skipping_goes_on_after_a_resume(decoder, text, recipe, tmp_path, monkeypatch):
    """Stopped between two of three such steps: the third still is the third."""
    poison(monkeypatch, {3, 4, 5})
    config = recipe(max_steps=8, checkpoint_every=2, max_skipped_steps=4)
    unbroken, model = decoder(), decoder()
    expected = train(unbroken, text(), config, tmp_path / "unbroken", progress=False)
    real = run_module.Run.step

    def step(run, number, text):
        if number == 5:
            raise KeyboardInterrupt
        return real(run, number, text)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module.Run, "step", step)
        train(model, text(), config, tmp_path / "broken", progress=False)
    result = train(model, text(), config, tmp_path / "broken", resume=True, progress=False)
    assert_same_weights(weights_of(model), weights_of(unbroken))
    assert result.skipped_steps == expected.skipped_steps == 3
    assert [r["step"] for r in of(result, "skipped")] == [r["step"] for r in of(expected, "skipped")] == [3, 4, 5]


@pytest.mark.parametrize(
    ("module", "direction", "told"),
    [
        ("embedding", "forward", "the output of embedding"),
        ("blocks.2.attention", "forward", "the output of layer 2 (blocks.2.attention"),
        ("blocks.1.mlp.experts", "forward", "the output of layer 1 (blocks.1.mlp.experts)"),
        ("blocks.3.mlp", "backward", "the gradient of layer 3 (blocks.3.mlp"),
        ("blocks.0.attention", "backward", "the gradient of layer 0 (blocks.0.attention"),
        ("norm", "backward", "the gradient of norm"),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_where_it_began_is_found(decoder, text, recipe, tmp_path, module, direction, told, checkpointing):
    """From its third step on, one part of the network gives nan, or hands nan back."""

    def breaks(module, arguments, output):
        first = output[0] if isinstance(output, tuple) else output
        if len(steps) < 3:
            return None
        if direction == "forward":
            broken = first * torch.nan
        else:
            broken = first.clone()
            broken.register_hook(lambda gradient: gradient * torch.nan)
        return (broken, *output[1:]) if isinstance(output, tuple) else broken

    steps = []
    model = decoder()
    model.embedding.register_forward_pre_hook(lambda *_: steps.append(1))
    model.get_submodule(module).register_forward_hook(breaks)
    config = recipe(max_steps=9, max_skipped_steps=2, activation_checkpointing=checkpointing)
    with pytest.raises(FloatingPointError, match=r"at step 2, and 1 more") as stopped:
        train(model, text(validation=0), config, tmp_path, progress=False)
    assert told in str(stopped.value)


def test_a_weight_that_overflows_is_named(decoder, text, recipe, tmp_path):
    model = decoder()
    with torch.no_grad():
        model.blocks[2].mlp.experts.down.fill_(3e38)
    with pytest.raises(FloatingPointError, match=r"at step 0; it began in the output of layer 2 \(blocks.2.mlp"):
        train(model, text(), recipe(max_skipped_steps=1), tmp_path, progress=False)


def test_what_is_finite_when_looked_at_again_is_said_so(decoder):
    model = decoder()
    losses = (model(torch.arange(4)[None]).square().mean() for _ in range(2))
    assert where_it_began(model, losses, ALONE).startswith("a place unknown")
    loss = model(torch.arange(4)[None]).sum()
    assert where_it_began(model, iter([loss * torch.inf]), ALONE) == "the loss, after outputs that are all finite"
    assert not any(module._forward_hooks for module in model.modules())


def test_float16_overflow_is_the_scalers_matter_until_its_scale_is_used_up(
    decoder, text, recipe, saved, tmp_path, monkeypatch
):
    """Gradients out of range in every step: the scale is halved 17 times, and only then the steps count."""
    poison(monkeypatch, range(100), "gradient")
    model = decoder(n_layers=1)
    config = recipe(max_steps=40, precision="float16", checkpoint_every=1, max_skipped_steps=2)
    with pytest.raises(FloatingPointError, match="the gradient norm is nan at step 17, and 1 more"):
        train(model, text(validation=0), config, tmp_path, progress=False)
    facts, _ = saved(tmp_path)
    assert (facts["step"], facts["skips"]["count"], facts["scaler"]["scale"]) == (17, 0, 0.5)
