"""What is not a whole checkpoint is refused, in one sentence that says what was found."""

import dataclasses
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained import load_model, load_tokenizer, save_model

SIZES = dict(vocab_size=11, n_layers=2, d_model=8, n_heads=2, num_experts=3, d_ff=8)
OURS = dict(bias_balancing=True)  # no family has it


def make_model(**switches):
    return MoEDecoder(ModelConfig(**SIZES, **switches))


def edit(folder, name="config.json", **changes):
    contents = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(contents | changes))


def replace_weights(folder, state):
    """Weights by another hand, in a folder without the record of a save."""
    save_file(state, folder / "model.safetensors")
    (folder / "layerskip_moe.json").unlink(missing_ok=True)


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
    (tmp_path / "model.pt").write_text("x")
    refused(tmp_path / "model.pt", "model.pt is a file", "folder", call=call)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json" if call is load_model else "no tokenizer", call=call)


def test_the_folder_beside_the_one_that_was_meant(tmp_path):
    save_model(make_model(), tmp_path / "model")
    refused(tmp_path, "no config.json", f"such as {tmp_path / 'model'}")


def test_pickles_are_not_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    names = "consolidated.00.pth, model.pt, pytorch_model.bin"
    refused(tmp_path, f"only pickles ({names})", "can run code")
    save_model(make_model(), tmp_path)
    for name in ("model.safetensors", "layerskip_moe.json"):
        (tmp_path / name).unlink()
    refused(tmp_path, f"only as pickles ({names})", "weights_only=True", "safetensors.torch.save_file", "transformers")
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, "model.safetensors is not a whole safetensors file")
    assert not (tmp_path / "exploded").exists()


def test_pickles_are_converted_as_the_sentence_says(tmp_path):
    model = make_model()
    save_model(model, tmp_path)
    (tmp_path / "layerskip_moe.json").unlink()
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    save_file(torch.load(tmp_path / "pytorch_model.bin", weights_only=True), tmp_path / "model.safetensors")
    for ours, again in zip(model.parameters(), load_model(tmp_path).parameters(), strict=True):
        assert torch.equal(ours, again)


# config.json and layerskip_moe.json


@pytest.mark.parametrize("name", ["config.json", "layerskip_moe.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "text",
    ["", "{", '{"model_type": "layerskip_moe",}', "\xff\xfe", "[1]", '{"config": ' + "[" * 10**5],
    ids=["empty", "cut off", "a comma too many", "no text", "no object", "nested without end"],
)
def test_a_file_that_is_not_json(tmp_path, name, text):
    save_model(make_model(), tmp_path, max_shard_bytes=2000)
    if name == "model.safetensors.index.json":
        (tmp_path / "layerskip_moe.json").unlink()
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    refused(tmp_path, f"{name} is not JSON" if text != "[1]" else f"{name} holds no JSON object", "copy it again")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 1}, ["format_version 1", "reads 2", "install the version that wrote it"]),
        ({"format_version": 3}, ["format_version 3", "reads 2"]),
        ({"sha256": None}, ["lacks 'sha256'"]),
        ({"config": [1]}, ["lacks 'config'"]),
        ({"config": {"colour": "red"}}, ["layerskip_moe.json has fields", "does not know (colour)"]),
        ({"config": {"dropout": 7}}, ["layerskip_moe.json describes no network", "dropout=7"]),
    ],
    ids=str,
)
def test_a_record_of_something_else(tmp_path, changes, words):
    save_model(make_model(), tmp_path)
    edit(tmp_path, "layerskip_moe.json", **changes)
    refused(tmp_path, *words)


@pytest.mark.parametrize("changes", [{"model_type": None}, {"model_type": "gpt2"}, {"vocab_size": "11"}], ids=str)
def test_a_config_of_something_else(tmp_path, changes):
    save_model(make_model(), tmp_path)
    edit(tmp_path, **changes)
    refused(tmp_path, f"{tmp_path / 'config.json'}: ", f"{next(iter(changes))}={next(iter(changes.values()))!r}")


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
def test_a_config_of_ours_that_describes_no_network(tmp_path, change, words):
    save_model(make_model(**OURS), tmp_path)
    edit(tmp_path, config=dataclasses.asdict(make_model(**OURS).config) | change)
    refused(tmp_path, *words)


@pytest.mark.parametrize("config", [None, [1], {"n_layers": 2}], ids=str)
def test_a_config_of_ours_without_what_it_needs(tmp_path, config):
    save_model(make_model(**OURS), tmp_path)
    edit(tmp_path, config=config)
    refused(tmp_path, "lacks the network's vocab_size" if isinstance(config, dict) else "lacks 'config'")


def test_what_was_changed_on_purpose_loads_without_the_record(tmp_path):
    save_model(make_model(), tmp_path)
    edit(tmp_path, rope_theta=500.0, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    refused(tmp_path, "config.json is not the file", "sha256 differs", "on purpose, delete layerskip_moe.json")
    (tmp_path / "layerskip_moe.json").unlink()
    assert load_model(tmp_path).config.rope_theta == 500.0


# Weights


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights(tmp_path, kept):
    save_model(make_model(), tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()[:kept]
    (tmp_path / "model.safetensors").write_bytes(weights)
    refused(tmp_path, "model.safetensors is not the file that layerskip_moe.json was written with", "copy")
    (tmp_path / "layerskip_moe.json").unlink()
    refused(tmp_path, "model.safetensors is not a whole safetensors file")


def test_one_flipped_bit(tmp_path):
    save_model(make_model(), tmp_path)
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    refused(tmp_path, "sha256 differs")


@pytest.fixture
def shards(tmp_path):
    """A checkpoint in shards, without a record, as other people's are; and its index."""
    save_model(make_model(), tmp_path, max_shard_bytes=2000)
    (tmp_path / "layerskip_moe.json").unlink()
    return json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]


def test_a_truncated_shard(tmp_path, shards):
    path = tmp_path / shards["model.norm.weight"]
    path.write_bytes(path.read_bytes()[:-1])
    refused(tmp_path, f"{path.name} is not a whole safetensors file", "copy it again")


def test_a_shard_that_is_not_there(tmp_path, shards):
    (tmp_path / shards["model.norm.weight"]).unlink()
    refused(tmp_path, f"index.json names {shards['model.norm.weight']}, which is not there", "copy the whole folder")


def test_shards_without_their_index(tmp_path, shards):
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, "model-00001-of-", "but no model.safetensors.index.json")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", "x.bin", ""]
)
def test_an_index_that_names_files_elsewhere(tmp_path, shards, name):
    save_file({"model.norm.weight": torch.ones(8)}, tmp_path.parent / "x.safetensors")
    index = {"weight_map": shards | {"model.norm.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, f"names the file {name!r}, which is not a safetensors file of this folder")


@pytest.mark.parametrize("weight_map", [None, [], {}, {"model.norm.weight": 3}], ids=str)
def test_an_index_without_a_map(tmp_path, shards, weight_map):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path, "has no weight_map of tensors to files")


def test_two_shards_with_the_same_tensor(tmp_path, shards):
    other = next(name for name in shards.values() if name != shards["model.norm.weight"])
    held = load_file(tmp_path / other)
    save_file(held | {"model.norm.weight": torch.ones(8)}, tmp_path / other)
    refused(tmp_path, "both hold model.norm.weight")


def test_wrong_tensors_are_listed_in_one_error(tmp_path):
    save_model(make_model(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.norm.weight"], state["model.layers.1.mlp.experts.2.down_proj.weight"]
    state["lm_head.bias"] = torch.zeros(2)
    state["model.embed_tokens.weight"] = torch.zeros(11, 4)
    replace_weights(tmp_path, state)
    refused(
        tmp_path,
        str(tmp_path),
        "missing: ",
        "model.norm.weight",
        "model.layers.1.mlp.experts.2.down_proj.weight",
        "not known: lm_head.bias",
        "of another shape: model.embed_tokens.weight is [11, 4] instead of [11, 8]",
    )


def test_a_shape_that_would_broadcast_is_refused_too(tmp_path):
    save_model(make_model(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.norm.weight"] = torch.zeros(1)
    replace_weights(tmp_path, state)
    refused(tmp_path, "model.norm.weight is [1] instead of [8]")


def test_a_long_list_is_cut_short(tmp_path):
    save_model(make_model(), tmp_path)
    count = len(load_file(tmp_path / "model.safetensors"))
    replace_weights(tmp_path, {"other": torch.zeros(1)})
    refused(tmp_path, "missing: model.embed_tokens.weight, ", f"and {count - 3} more", "not known: other")


def test_config_and_weights_of_different_sizes(tmp_path):
    save_model(make_model(), tmp_path)
    (tmp_path / "layerskip_moe.json").unlink()
    edit(tmp_path, num_hidden_layers=1)
    refused(tmp_path, "not known: model.layers.1.")


def test_saving_into_a_file_or_a_changed_model_is_refused(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match="taken is a file; give a folder"):
        save_model(make_model(), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
    changed = make_model()
    changed.head = torch.nn.Linear(8, 12, bias=True)
    with pytest.raises(ValueError, match=r"not known: head.bias; of another shape: head.weight is \[12, 8\]"):
        save_model(changed, tmp_path / "model")
    pytest.importorskip("torchao")
    theirs = make_model()  # as torchao's own quantize_ leaves a model
    theirs.head.weight = type("Theirs", (torch.nn.Parameter,), {})(theirs.head.weight.detach())
    refused(tmp_path / "model", "parameters of Theirs", call=theirs.save_pretrained)
    assert not (tmp_path / "model").exists()
