"""recipe.json: what a run was asked to do, there from its first step on."""

import dataclasses
import json

import pytest

from layerskip_moe.training import TrainConfig, train
from layerskip_moe.training import run as run_module


def recipe_in(folder):
    return json.loads((folder / "recipe.json").read_text())


def test_the_recipe_is_the_whole_configuration(decoder, text, recipe, tmp_path):
    config = recipe(max_steps=None, epochs=2.0, exit_curriculum="gradual", seed=2**70)
    result = train(decoder(), text(), config, tmp_path, progress=False)
    assert recipe_in(tmp_path) == {
        "steps": result.steps,  # as counted from the epochs
        "n_layers": 4,
        "train_config": {field.name: getattr(config, field.name) for field in dataclasses.fields(config)},
    }
    assert result.steps > 1
    assert result.recipe == recipe_in(tmp_path) | {"tokens": result.tokens, "best_step": result.best_step}
    assert TrainConfig(**recipe_in(tmp_path)["train_config"]) == config


def test_it_is_there_before_the_first_step_and_the_same_after_a_resume(decoder, text, recipe, tmp_path, monkeypatch):
    def stop(*_, step, **others):
        assert recipe_in(tmp_path)["steps"] == 3
        if step == 1:
            raise KeyboardInterrupt
        return training_losses(*_, step=step, **others)

    training_losses, config = run_module.training_losses, recipe(checkpoint_every=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "training_losses", stop)
        train(decoder(), text(), config, tmp_path, progress=False)
    written = (tmp_path / "recipe.json").read_bytes()
    (tmp_path / "recipe.json").unlink()
    train(decoder(), text(), config, tmp_path, resume=True, progress=False)
    assert (tmp_path / "recipe.json").read_bytes() == written
