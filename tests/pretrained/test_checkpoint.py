"""A checkpoint of ours comes back bit for bit, and a save that is cut off never leaves a mix of two."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained import checkpoint, load_model, load_tokenizer, read_recipe, save_model
from layerskip_moe.pretrained.families import family_of

FILES = ["README.md", "config.json", "layerskip_moe.json", "model.safetensors"]
SIZES = dict(vocab_size=11, n_layers=2, d_model=8, n_heads=2, num_experts=3, d_ff=8)
EVERYTHING = dict(
    n_kv_heads=1, head_dim=6, dense_d_ff=12, top_k=1, moe_layers=(1,), shared_expert_d_ff=4, shared_expert_gate=True,
    normalize_top_k=False, bias_balancing=True, qk_norm="full", qkv_bias=True, rope_theta=500.0, norm_eps=1e-5,
    max_seq_len=32, dropout=0.1, init_std=0.5, router_average=0.5, router_hold=2,
)  # fmt: skip


def make_model(seed=0, **switches):
    return MoEDecoder(ModelConfig(**SIZES, **switches), seed=seed)


def make_tokenizer(word="a"):
    return Tokenizer(BPE(vocab={word: 0, "b": 1}, merges=[]))


def assert_same(model, other):
    assert model.config == other.config
    state, loaded = model.state_dict(), other.state_dict()
    assert list(state) == list(loaded)
    for name, tensor in state.items():
        assert tensor.dtype == loaded[name].dtype and torch.equal(tensor, loaded[name]), name


# Our own type, and then families of transformers.
SWITCHES = {
    "everything": EVERYTHING,
    "native": {},
    "native, dense": {"num_experts": 0},
    "like main.py": {"n_kv_heads": 1, "dense_d_ff": 16, "moe_layers": "every other", "dropout": 0.1},
    "mixtral": {"qk_norm": None, "sliding_window": 3, "init_std": 0.3},
    "yarn": {"rope_scaling": {"kind": "yarn", "factor": 2.0, "original_max_seq_len": 512}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SWITCHES)
def test_a_round_trip_is_exact(tmp_path, dtype, name):
    switches = SWITCHES[name]
    model = MoEDecoder(ModelConfig(**{**SIZES, **switches}), seed=4)
    assert (family_of(model.config) is None) == (name == "everything")
    if switches.get("bias_balancing"):
        model.blocks[1].mlp.router.balance_bias += torch.tensor([0.1, -0.2, 1e-5])
    model.to(dtype).save_pretrained(tmp_path / "new" / "model")
    loaded = MoEDecoder.from_pretrained(tmp_path / "new" / "model")
    assert_same(model, loaded)
    tokens = torch.tensor([[1, 2, 3, 10]])
    assert torch.equal(model.eval()(tokens), loaded(tokens))
    assert sorted(os.listdir(tmp_path / "new" / "model")) == FILES


def test_parameters_of_several_types_come_back_as_they_were(tmp_path):
    model = make_model(tie_embeddings=True).bfloat16()
    for block in model.blocks:
        block.mlp.router.float()
        block.attention_norm.double()
    save_model(model, tmp_path)
    assert_same(model, load_model(tmp_path))


def test_what_config_json_does_not_say_comes_back_too(tmp_path):
    """The fields no family has, and those that a network has no use for."""
    switches = {"num_experts": 0, "top_k": 2, "d_ff": 24, "dense_d_ff": 8, "dropout": 0.25, "init_std": 0.011}
    model = MoEDecoder(ModelConfig(**{**SIZES, **switches}))
    save_model(model, tmp_path)
    record = json.loads((tmp_path / "layerskip_moe.json").read_text())
    assert {"dropout": 0.25, "d_ff": 24}.items() <= record["config"].items()
    assert load_model(tmp_path).config == model.config
    (tmp_path / "layerskip_moe.json").unlink()
    without = load_model(tmp_path)
    assert without.config.dropout == 0 and all(map(torch.equal, model.parameters(), without.parameters()))


def test_a_loaded_model_can_be_trained_on(tmp_path):
    save_model(make_model(), tmp_path)
    loaded = load_model(tmp_path)
    assert not loaded.training and all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    before = (tmp_path / "model.safetensors").read_bytes()
    loaded(torch.tensor([[1, 2, 3]])).sum().backward()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_loaded_model_outlives_its_file(tmp_path):
    model = make_model()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    with open(tmp_path / "model.safetensors", "r+b") as file:  # in place, as a copy over it would
        file.write(b"\0" * size)
    assert_same(model, loaded)


def test_a_tied_head_is_stored_once(tmp_path):
    model = make_model(tie_embeddings=True)
    save_model(model, tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "head" in name]
    loaded = load_model(tmp_path)
    assert loaded.head_weight is loaded.embedding.weight
    assert_same(model, loaded)


def test_loading_into_another_type(tmp_path):
    model = make_model(bias_balancing=True)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).bfloat16())
    assert loaded.blocks[0].mlp.router.balance_bias.dtype == torch.float32
    assert loaded(torch.tensor([[1, 2]])).dtype == torch.bfloat16


def test_what_config_json_says_of_our_own_type(tmp_path):
    model = make_model(**EVERYTHING).bfloat16()
    save_model(model, tmp_path)
    contents = json.loads((tmp_path / "config.json").read_text())
    assert contents == {
        "model_type": "layerskip_moe",
        "architectures": ["MoEDecoder"],
        "dtype": "bfloat16",
        "config": json.loads(json.dumps(dataclasses.asdict(model.config))),
    }
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())


def test_the_type_of_the_weights_is_told_to_old_and_new_readers(tmp_path, caplog, monkeypatch, recwarn):
    transformers = pytest.importorskip("transformers")
    make_model().bfloat16().save_pretrained(tmp_path)
    contents = json.loads((tmp_path / "config.json").read_text())
    assert contents["dtype"] == contents["torch_dtype"] == "bfloat16"
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
    with caplog.at_level("WARNING", logger="transformers"):
        assert transformers.AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
        assert caplog.messages == [] and list(recwarn) == []
        transformers.logging.get_logger("transformers.configuration_utils").warning("heard")
    assert "heard" in caplog.messages


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        save_model(make_model(seed=3), tmp_path / name, tokenizer=make_tokenizer())
    for file in os.listdir(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_recipe_comes_back(tmp_path):
    recipe = {"steps": 3, "train_config": {"exit_weights": "equal", "warmup_steps": None, "beta": [0.9, 0.95]}}
    make_model().save_pretrained(tmp_path, recipe=recipe)
    assert read_recipe(tmp_path) == recipe
    save_model(make_model(), tmp_path)
    assert read_recipe(tmp_path) is None
    (tmp_path / "layerskip_moe.json").unlink()
    assert read_recipe(tmp_path) is None


@pytest.mark.parametrize("value", [torch.ones(1), float("nan"), (1, 2), Path("x")], ids=str)
def test_a_recipe_that_json_cannot_keep_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="recipe must be a dict of plain JSON values"):
        save_model(make_model(), tmp_path, recipe={"steps": value})
    assert not any(tmp_path.iterdir())


# The tokenizer


def test_the_tokenizer_comes_back(tmp_path):
    make_model().save_pretrained(tmp_path, tokenizer=make_tokenizer("x"))
    assert load_tokenizer(tmp_path).to_str() == make_tokenizer("x").to_str()


def test_a_tokenizer_of_another_save_is_not_this_model_s(tmp_path):
    save_model(make_model(), tmp_path, tokenizer=make_tokenizer())
    save_model(make_model(seed=1), tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    save_model(make_model(), tmp_path, tokenizer=make_tokenizer())
    make_tokenizer("z").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the file that layerskip_moe\.json was written with"):
        load_tokenizer(tmp_path)
    assert_same(make_model(), load_model(tmp_path))  # which reads no tokenizer


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    vocab = {str(token): token for token in range(12)}
    with pytest.raises(ValueError, match="12 tokens but the model's vocab_size is 11"):
        save_model(make_model(), tmp_path, tokenizer=Tokenizer(BPE(vocab=vocab, merges=[])))
    assert not any(tmp_path.iterdir())


# Interruptions


@pytest.mark.parametrize("writer", ["weights.save_file", "record.sha256", "checkpoint.model_card"])
def test_an_error_while_writing_leaves_the_older_checkpoint(tmp_path, monkeypatch, writer):
    older = make_model()
    save_model(older, tmp_path, tokenizer=make_tokenizer("x"))
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setattr(f"layerskip_moe.pretrained.{writer}", fail_having_written)
        with pytest.raises(OSError, match="disk full"):
            save_model(make_model(seed=1), tmp_path, tokenizer=make_tokenizer("y"))
    assert_same(older, load_model(tmp_path))
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def fail_having_written(first, path=None, *args, **kwargs):
    if path is not None:
        path.write_bytes(b"half")
    raise OSError("disk full")


def test_a_disk_that_fills_up_is_an_oserror(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("layerskip_moe.pretrained.weights.save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors could not be written \(I/O error: No space left"):
        save_model(make_model(), tmp_path / "new" / "model")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model-00002-of-00005.safetensors", "config.json", "tokenizer.json"])
def test_a_folder_in_a_file_s_way_is_found_before_the_older_checkpoint_is_touched(tmp_path, name):
    older, newer = make_model(), make_model(seed=1)
    save_model(older, tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=f"has folders called {name}, where files are to be"):
        save_model(newer, tmp_path, tokenizer=make_tokenizer(), max_shard_bytes=2000)
    assert sorted(os.listdir(tmp_path)) == before
    if name == "config.json":
        return
    assert_same(older, load_model(tmp_path))
    if name.startswith("model"):  # in nobody's way where there are no shards
        save_model(newer, tmp_path)
        assert_same(newer, load_model(tmp_path))


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), KeyboardInterrupt()], ids=repr)
def test_what_could_not_be_put_in_place_is_kept(tmp_path, monkeypatch, error):
    newer = make_model(seed=1)
    save_model(make_model(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", fails_at("model.safetensors", error))
        with pytest.raises(type(error) if isinstance(error, KeyboardInterrupt) else OSError) as caught:
            save_model(newer, tmp_path)
    if isinstance(error, PermissionError):
        assert str(caught.value).endswith(f"find what is not in place yet in {tmp_path / '.saving'}")
    with pytest.raises(ValueError, match="a save or a copy was interrupted"):
        load_model(tmp_path)
    assert sorted(os.listdir(tmp_path / ".saving")) == [name for name in FILES if name != "README.md"]
    for path in (tmp_path / ".saving").iterdir():
        path.replace(tmp_path / path.name)
    assert_same(newer, load_model(tmp_path))


def fails_at(name, error):
    def replace(source, target, real=os.replace):
        if Path(target).name == name:
            raise error
        real(source, target)

    return replace


@pytest.mark.parametrize("recorded", [True, False], ids=["", "older without layerskip_moe.json"])
def test_a_save_cut_off_between_two_files_is_never_a_mix(tmp_path, monkeypatch, recorded):
    """Killed at any step of exchanging files: the older model, the newer one, or an error; never a mix."""
    older, newer = make_model(), make_model(seed=1)
    outcomes = []
    while not outcomes or outcomes[-1] != "done":
        folder = tmp_path / str(len(outcomes))
        save_model(older, folder, tokenizer=make_tokenizer("x"), max_shard_bytes=2000)
        if not recorded:
            (folder / "layerskip_moe.json").unlink()
        with monkeypatch.context() as patch:
            die_at_step(patch, len(outcomes), folder)
            try:
                save_model(newer, folder, tokenizer=make_tokenizer("y"))
                outcomes.append("done")
            except KeyboardInterrupt:
                outcomes.append("killed")
        try:
            loaded = load_model(folder)
            model, word = (older, "x") if len(outcomes) == 1 else (newer, "y")
            assert_same(model, loaded)
            assert load_tokenizer(folder).to_str() == make_tokenizer(word).to_str()
            outcomes[-1] = outcomes[-1].replace("killed", "whole")
        except ValueError as error:
            assert "a save or a copy was interrupted" in str(error)
        save_model(newer, folder, tokenizer=make_tokenizer("y"))  # and the next save mends it
        assert_same(newer, load_model(folder))
        assert sorted(os.listdir(folder)) == sorted([*FILES, "tokenizer.json", "tokenizer_config.json"])
    first, *between, last, done = outcomes
    assert (first, done, set(between)) == ("whole", "done", {"killed"}) and len(between) > 8
    assert last == ("killed" if recorded else "whole")  # all is there but for the record


def die_at_step(patch, stopped_at, folder):
    """Stop the exchange of the folder's own files before its step of that number."""
    steps = 0

    def or_die(real):
        def step(*paths, **kwargs):
            nonlocal steps
            if Path(paths[-1]).parent == folder:
                if steps == stopped_at:
                    raise KeyboardInterrupt
                steps += 1
            return real(*paths, **kwargs)

        return step

    patch.setattr(checkpoint.os, "replace", or_die(os.replace))
    patch.setattr(Path, "unlink", or_die(Path.unlink))


def test_what_a_killed_save_left_is_cleared_away(tmp_path):
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / "tokenizer.json").write_text("left behind")
    (tmp_path / "notes.txt").write_text("the user's own")
    save_model(make_model(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [*FILES, "notes.txt"]


def test_who_may_read_one_file_may_read_all(tmp_path):
    before = os.umask(0o022)
    try:
        make_model().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


def test_a_device_that_is_not_there_is_one_sentence(tmp_path):
    make_model().save_pretrained(tmp_path)
    for device in ("abacus", "meta", torch.device("meta")):
        with pytest.raises(ValueError, match=f"device='{device}'"):
            MoEDecoder.from_pretrained(tmp_path, device=device)
