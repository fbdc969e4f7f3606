"""Checkpoints made by somebody who means harm, or nonsense: refused with a sentence, and nothing changed."""

import json
import os
import pickle
import re
import shutil
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerskip_moe.training import checkpoint as files
from layerskip_moe.training import train
from layerskip_moe.training.checkpoint import newest_checkpoint, save_checkpoint


class Harmful:
    """Unpickled, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    "other",
    [
        "pickle",
        "torch",
        "deep",
        "list",
        "huge",
        "outside",
        "format",
        "step",
        "no files",
        "header",
        "folder",
        "extra",
        "link",
        "pipe",
        "pipe as state",
    ],
)
def test_what_is_no_checkpoint_is_passed_over_and_not_executed(copied, sealed, monkeypatch, other):
    monkeypatch.chdir(copied)
    newest = copied / "checkpoints" / "step-00000008"
    state, shard = newest / "state.json", next(newest.glob("*.safetensors"))
    if other == "pickle":
        state.write_bytes(pickle.dumps(Harmful()))
    elif other == "torch":
        torch.save({"a": Harmful()}, shard)
        sealed(state, files={shard.name: {"bytes": shard.stat().st_size, "sha256": files.sha256(shard)}})
    elif other == "deep":
        state.write_text("[" * 100_000)
    elif other == "list":
        state.write_text("[1, 2]")
    elif other == "huge":
        with open(state, "rb+") as file:
            file.truncate(2**40)
    elif other == "outside":
        shard.rename(copied / shard.name)
        sealed(state, files={f"../../{shard.name}": json.loads(state.read_text())["files"][shard.name]})
    elif other == "format":
        sealed(state, format=2)
    elif other == "step":
        sealed(state, step=80)
    elif other == "no files":
        sealed(state, files=3)
    elif other == "header":  # of a terabyte
        shard.write_bytes((2**40).to_bytes(8, "little") + shard.read_bytes()[8:])
        sealed(state, files={shard.name: {"bytes": shard.stat().st_size, "sha256": files.sha256(shard)}})
    elif other == "link":
        shard.rename(copied / shard.name)
        shard.symlink_to(copied / shard.name)
    elif other == "pipe":
        shard.unlink()
        os.mkfifo(shard)
        sealed(state, files={shard.name: {"bytes": 0, "sha256": "0" * 64}})
    elif other == "pipe as state":
        state.unlink()
        os.mkfifo(state)
    elif other == "folder":
        shard.unlink()
        shard.mkdir()
    else:
        shutil.copy(shard, newest / "more.safetensors")
    with pytest.warns(UserWarning, match=re.escape(f"{newest} is damaged")):
        assert newest_checkpoint(copied).facts["step"] == 4
    assert not (copied / "harm").exists()


_FACTS = ("step", "max_steps", "train_config", "model_config", "scaler", "best", "skips", "text", "seconds", "files")
_NUMBERS = st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**400) | st.text(max_size=3)
_VALUES = st.recursive(
    _NUMBERS, lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(max_size=3), of), max_leaves=4
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    return tmp_path_factory.mktemp("stopped")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_facts_of_wrong_types_are_refused_before_anything_is_restored(
    decoder, text, recipe, sealed, stopped, tmp_path, data
):
    """One fact, or one value in a fact, is any JSON under a digest that fits."""
    whole, folder = stopped / "run", tmp_path / "run"
    config = recipe(checkpoint_every=3, precision="float16", validate_every=3)
    if not whole.exists():
        train(decoder(n_layers=1), text(), config, whole, progress=False)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    [state] = folder.glob("checkpoints/*/state.json")
    facts = json.loads(state.read_text())
    fact = data.draw(st.sampled_from(_FACTS))
    value = data.draw(_VALUES)
    inner = isinstance(facts[fact], dict) and data.draw(st.booleans())
    if inner:
        name = data.draw(st.sampled_from(sorted(facts[fact])))
        value = facts[fact] | {name: value}
    sealed(state, **{fact: value})
    model = decoder(n_layers=1, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damage
        try:
            train(model, text(), config, folder, resume=True, progress=False)
        except ValueError:
            assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        else:  # what was drawn may be as good as what was there
            assert fact in ("seconds", "scaler", "best", "skips", "train_config") or value == facts[fact]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"files": {"tensors-00000.safetensors": 3}}, "no checkpoint .* is whole"),
        ({"files": {"tensors-00000.safetensors": {}}}, "no checkpoint .* is whole"),
        ({"step": 3.0}, "no checkpoint .* is whole"),
        ({"model_config": []}, "not one of this version's"),
        ({"skips": 3}, "not one of this version's"),
        ({"skips": {"a": 1}}, "not one of this version's"),
        ({"best": 3}, "not one of this version's"),
        ({"best": {"loss": 1}}, "not one of this version's"),
        ({"best": None}, "other tensors"),
        ({"seconds": "x"}, "not one of this version's"),
        ({"seconds": float("inf")}, "not one of this version's"),
        ({"scaler": 3}, "not one of this version's"),
        ({"scaler": {"scale": 1.0}}, "not one of this version's"),
        ({"max_steps": "y"}, "not one of this version's"),
    ],
)
def test_each_of_them_has_a_sentence(decoder, text, recipe, sealed, tmp_path, changes, sentence):
    train(decoder(n_layers=1), text(), recipe(checkpoint_every=3), tmp_path, progress=False)
    [state] = tmp_path.glob("checkpoints/*/state.json")
    sealed(state, **changes)
    model = decoder(n_layers=1, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings(), pytest.raises(ValueError, match=sentence):
        warnings.simplefilter("ignore")
        train(model, text(), recipe(checkpoint_every=3), tmp_path, resume=True, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("lacking", ["optimizer.norm.weight.step", "optimizer.norm.weight.exp_avg"])
def test_an_optimizer_that_lacks_a_tensor_is_refused(decoder, text, recipe, saved, tmp_path, lacking):
    train(decoder(n_layers=1), text(), recipe(checkpoint_every=3), tmp_path, progress=False)
    facts, tensors = saved(tmp_path)
    del tensors[lacking]
    save_checkpoint(tmp_path, facts, tensors)
    model = decoder(n_layers=1, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="has other tensors than this version's training"):
        train(model, text(), recipe(checkpoint_every=3), tmp_path, resume=True, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
