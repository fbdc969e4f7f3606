"""The 8-bit AdamW: close to AdamW, small in memory, resumed bit for bit. Its step is not compiled here."""

import itertools

import pytest
import torch

from layerskip_moe.training import TrainConfig, train
from layerskip_moe.training.optimizer import learning_rate_at, make_optimizer, set_learning_rate


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def model(decoder):
    """The embedding's 512 x 8 numbers are just enough to be held in 8 bits."""
    return lambda **fields: decoder(vocab_size=512, n_layers=1, **fields)


def test_large_parameters_have_a_state_of_two_bytes_each(model):
    network = model()
    optimizer = make_optimizer(network, TrainConfig(optimizer="adamw8bit", weight_decay=0.3))
    network(torch.arange(16)[None]).square().sum().backward()
    optimizer.step()
    for name, parameter in network.named_parameters():
        mean = optimizer.state[parameter]["exp_avg"]
        if parameter.numel() >= 4096:
            assert mean.codes.dtype == torch.uint8 and mean.codes.numel() == parameter.numel()
            assert mean.scale.numel() == parameter.numel() / 256
        else:
            assert type(mean) is torch.Tensor and mean.dtype == torch.float32, name
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_it_follows_adamw(model, text, recipe, tmp_path):
    weights, losses = {}, {}
    for name in ("adamw", "adamw8bit"):
        network = model()
        start = network.embedding.weight.detach().clone()
        result = train(network, text(), recipe(optimizer=name, max_steps=5), tmp_path / name, progress=False)
        weights[name] = network.embedding.weight.detach() - start
        losses[name] = [record["loss"] for record in result.metrics if record["split"] == "train"]
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], rel=0.01)
    moved = torch.nn.functional.cosine_similarity(*(w.flatten() for w in weights.values()), dim=0)
    assert moved > 0.95


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_learning_rate_reaches_every_group(model, name):
    config = TrainConfig(optimizer=name, learning_rate=0.01)
    optimizer = make_optimizer(model(), config)
    for step in (0, 7):
        rate = set_learning_rate(optimizer, step, 10, config)
        assert rate == learning_rate_at(step, 10, config)
        assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([rate, rate])


def test_a_resumed_run_ends_as_the_unbroken_one(model, text, recipe, saved, tmp_path):
    config = dict(optimizer="adamw8bit", max_steps=6, learning_rate=0.01)
    unbroken, broken, corpus = model(), model(), text(validation=0)
    train(unbroken, corpus, recipe(**config), tmp_path / "unbroken", progress=False)

    class Stopped(Exception):
        pass

    def stop_at_the_fifth(*_):
        if next(steps) == 4:
            raise Stopped

    steps = itertools.count()
    broken.embedding.register_forward_pre_hook(stop_at_the_fifth)
    with pytest.raises(Stopped):
        train(broken, corpus, recipe(**config, checkpoint_every=2), tmp_path / "broken", progress=False)
    _, tensors = saved(tmp_path / "broken")
    assert tensors["optimizer.embedding.weight.exp_avg.codes"].dtype == torch.uint8

    again = model(seed=1)
    train(again, corpus, recipe(**config), tmp_path / "broken", resume=True, progress=False)
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_optimizer_cannot_change_on_resume(model, text, recipe, tmp_path):
    train(model(), text(), recipe(optimizer="adamw8bit"), tmp_path, progress=False)
    with pytest.raises(ValueError, match="optimizer was 'adamw8bit' and is now 'adamw'"):
        train(model(), text(), recipe(), tmp_path, resume=True, progress=False)
