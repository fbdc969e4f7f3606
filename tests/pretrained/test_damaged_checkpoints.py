"""What is not a whole checkpoint of ours is refused, in one sentence that says what was found."""

import dataclasses
import hashlib
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained import load_model, load_tokenizer, save_model

SIZES = dict(vocab_size=11, n_layers=2, d_model=8, n_heads=2, num_experts=3, d_ff=8)


def make_model():
    return MoEDecoder(ModelConfig(**SIZES))


def edit_config(folder, **changes):
    contents = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(contents | changes))


def replace_weights(folder, state):
    """Weights by another hand, with a config that owns them."""
    save_file(state, folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    edit_config(folder, sha256={"model.safetensors": digest})


def refused(tmp_path, *words, call=load_model):
    with pytest.raises(ValueError) as caught:
        call(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and message.endswith("."), message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("call", [load_model, load_tokenizer])
def test_a_place_without_a_checkpoint(tmp_path, call):
    refused(tmp_path / "nowhere", "nowhere does not exist", "save_pretrained", call=call)
    refused(tmp_path, "no config.json", "save_pretrained", call=call)
    (tmp_path / "model.pt").write_text("x")
    refused(tmp_path / "model.pt", "model.pt is a file", "folder", call=call)


def test_pickles_are_not_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    for name in ("pytorch_model.bin", "model.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, "pickles (model.pt, pytorch_model.bin)", "can run code")
    save_model(make_model(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "no model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, "model.safetensors is not the file")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "layerskip_moe",}', "\xff\xfe"])
def test_a_config_that_is_not_json(tmp_path, text):
    save_model(make_model(), tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, "config.json is not JSON", "copy it again")


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ([1], ["model_type none", "'layerskip_moe'"]),
        ({}, ["model_type None", "'layerskip_moe'"]),
        ({"model_type": "mixtral"}, ["model_type 'mixtral'", "'layerskip_moe'"]),
        ({"model_type": "layerskip_moe"}, ["format_version None", "reads 1"]),
        ({"model_type": "layerskip_moe", "format_version": 2}, ["format_version 2", "reads 1"]),
        ({"model_type": "layerskip_moe", "format_version": 1}, ["lacks 'config'"]),
        ({"model_type": "layerskip_moe", "format_version": 1, "config": {}}, ["lacks 'sha256'"]),
    ],
    ids=str,
)
def test_a_config_of_something_else(tmp_path, contents, words):
    save_model(make_model(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(contents))
    refused(tmp_path, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_layer": 2, "colour": "red"}, ["does not know (colour, n_layer)"]),
        ({"n_heads": "2"}, ["describes no network", "n_heads='2'"]),
        ({"top_k": 7}, ["describes no network", "top_k=7"]),
        ({"dropout": "0.1"}, ["describes no network", "dropout='0.1'"]),
    ],
    ids=str,
)
def test_a_config_that_describes_no_network(tmp_path, change, words):
    save_model(make_model(), tmp_path)
    edit_config(tmp_path, config=dataclasses.asdict(make_model().config) | change)
    refused(tmp_path, *words)


def test_a_config_without_a_size_it_needs(tmp_path):
    save_model(make_model(), tmp_path)
    edit_config(tmp_path, config={"n_layers": 2})
    refused(tmp_path, "lacks the network's vocab_size")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights(tmp_path, kept):
    save_model(make_model(), tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()[:kept]
    (tmp_path / "model.safetensors").write_bytes(weights)
    refused(tmp_path, "model.safetensors is not the file that config.json was written with", "copy")
    edit_config(tmp_path, sha256={"model.safetensors": hashlib.sha256(weights).hexdigest()})
    refused(tmp_path, "not a whole safetensors file")


def test_one_flipped_bit(tmp_path):
    save_model(make_model(), tmp_path)
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    refused(tmp_path, "sha256 differs")


def test_wrong_tensors_are_listed_in_one_error(tmp_path):
    model = make_model()
    save_model(model, tmp_path)
    state = model.state_dict()
    del state["norm.weight"], state["blocks.1.mlp.experts.down"]
    state["lm_head.weight"] = torch.zeros(2)
    state["embedding.weight"] = torch.zeros(11, 4)
    replace_weights(tmp_path, state)
    refused(
        tmp_path,
        "missing: ",
        "norm.weight",
        "blocks.1.mlp.experts.down",
        "not known: lm_head.weight",
        "of another shape: embedding.weight is [11, 4] instead of [11, 8]",
    )


def test_a_long_list_is_cut_short(tmp_path):
    save_model(make_model(), tmp_path)
    replace_weights(tmp_path, {"other": torch.zeros(1)})
    count = len(make_model().state_dict())
    refused(tmp_path, "missing: embedding.weight, ", f"and {count - 10} more", "not known: other")


def test_config_and_weights_of_different_sizes(tmp_path):
    save_model(make_model(), tmp_path)
    edit_config(tmp_path, config=dataclasses.asdict(ModelConfig(**{**SIZES, "n_layers": 1})))
    refused(tmp_path, "not known: blocks.1.")


def test_saving_into_a_file_or_a_changed_model_is_refused(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match="taken is a file; give a folder"):
        save_model(make_model(), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
    changed = make_model()
    changed.head = torch.nn.Linear(8, 12, bias=True)
    with pytest.raises(ValueError, match=r"not known: head.bias; of another shape: head.weight is \[12, 8\]"):
        save_model(changed, tmp_path / "model")
    assert not (tmp_path / "model").exists()
