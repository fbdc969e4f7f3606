"""A checkpoint comes back bit for bit, and is never half of one save and half of another."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained import checkpoint, load_model, load_tokenizer, save_model

SIZES = dict(vocab_size=11, n_layers=2, d_model=8, n_heads=2, num_experts=3, d_ff=8)
EVERYTHING = dict(
    n_kv_heads=1, head_dim=6, dense_d_ff=12, top_k=1, moe_layers=(1,), shared_expert_d_ff=4, shared_expert_gate=True,
    normalize_top_k=False, bias_balancing=True, qk_norm="full", qkv_bias=True, rope_theta=500.0, norm_eps=1e-5,
    max_seq_len=32, dropout=0.1, init_std=0.5,
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("switches", [{}, EVERYTHING, {"num_experts": 0}], ids=["native", "everything", "dense"])
def test_a_round_trip_is_exact(tmp_path, dtype, switches):
    model = MoEDecoder(ModelConfig(**{**SIZES, **switches}), seed=4)
    if switches.get("bias_balancing"):
        model.blocks[1].mlp.router.balance_bias += torch.tensor([0.1, -0.2, 1e-5])
    model.to(dtype).save_pretrained(tmp_path / "new" / "model")
    loaded = MoEDecoder.from_pretrained(tmp_path / "new" / "model")
    assert_same(model, loaded)
    tokens = torch.tensor([[1, 2, 3, 10]])
    assert torch.equal(model.eval()(tokens), loaded(tokens))
    assert sorted(os.listdir(tmp_path / "new" / "model")) == ["config.json", "model.safetensors"]


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


def test_what_config_json_says(tmp_path):
    model = make_model(**EVERYTHING).bfloat16()
    save_model(model, tmp_path)
    contents = json.loads((tmp_path / "config.json").read_text())
    assert (contents["model_type"], contents["format_version"], contents["dtype"]) == ("layerskip_moe", 1, "bfloat16")
    assert contents["config"] == json.loads(json.dumps(dataclasses.asdict(model.config)))
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        save_model(make_model(seed=3), tmp_path / name, tokenizer=make_tokenizer())
    for file in os.listdir(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


# The tokenizer


def test_the_tokenizer_comes_back(tmp_path):
    make_model().save_pretrained(tmp_path, tokenizer=make_tokenizer("x"))
    assert load_tokenizer(tmp_path).to_str() == make_tokenizer("x").to_str()


def test_a_tokenizer_of_another_save_is_not_this_model_s(tmp_path):
    save_model(make_model(), tmp_path, tokenizer=make_tokenizer())
    save_model(make_model(seed=1), tmp_path)
    with pytest.raises(ValueError, match=r"saved without a tokenizer; save it with tokenizer="):
        load_tokenizer(tmp_path)
    save_model(make_model(), tmp_path, tokenizer=make_tokenizer())
    make_tokenizer("z").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the file that config\.json was written with"):
        load_tokenizer(tmp_path)
    load_model(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    vocab = {str(token): token for token in range(12)}
    with pytest.raises(ValueError, match="12 tokens but the model's vocab_size is 11"):
        save_model(make_model(), tmp_path, tokenizer=Tokenizer(BPE(vocab=vocab, merges=[])))
    assert not any(tmp_path.iterdir())


# Interruptions


@pytest.mark.parametrize("writer", ["save_file", "_sha256", "json.dumps"])
def test_an_error_while_writing_leaves_the_older_checkpoint(tmp_path, monkeypatch, writer):
    older = make_model()
    save_model(older, tmp_path, tokenizer=make_tokenizer("x"))
    with monkeypatch.context() as patch:
        patch.setattr(f"layerskip_moe.pretrained.checkpoint.{writer}", fail_having_written)
        with pytest.raises(OSError, match="disk full"):
            save_model(make_model(seed=1), tmp_path, tokenizer=make_tokenizer("y"))
    assert_same(older, load_model(tmp_path))
    assert load_tokenizer(tmp_path).to_str() == make_tokenizer("x").to_str()
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "tokenizer.json"]


def fail_having_written(first, path=None, *args, **kwargs):
    if path is not None:
        path.write_bytes(b"half")
    raise OSError("disk full")


@pytest.mark.parametrize("replaced", [0, 1, 2, 3])
def test_a_save_cut_off_between_two_files_is_never_a_mix(tmp_path, monkeypatch, replaced):
    """Killed after `replaced` of three files: the older model, the newer one, or an error; never a mix."""
    older, newer = make_model(), make_model(seed=1)
    save_model(older, tmp_path, tokenizer=make_tokenizer("x"))
    done = []

    def replace_then_die(source, target):
        if len(done) == replaced:
            raise KeyboardInterrupt
        done.append(target)
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", replace_then_die)
        if replaced < 3:
            with pytest.raises(KeyboardInterrupt):
                save_model(newer, tmp_path, tokenizer=make_tokenizer("y"))
        else:
            save_model(newer, tmp_path, tokenizer=make_tokenizer("y"))
    assert len(done) == replaced
    if replaced in (0, 3):
        assert_same(newer if replaced else older, load_model(tmp_path))
        assert load_tokenizer(tmp_path).to_str() == make_tokenizer("y" if replaced else "x").to_str()
    else:
        with pytest.raises(ValueError, match=r"model\.safetensors is not the file that config\.json was written with"):
            load_model(tmp_path)
    save_model(newer, tmp_path, tokenizer=make_tokenizer("y"))  # and the next save mends it
    assert_same(newer, load_model(tmp_path))


def test_what_a_killed_save_left_is_cleared_away(tmp_path):
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / "tokenizer.json").write_text("left behind")
    (tmp_path / "notes.txt").write_text("the user's own")
    save_model(make_model(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "notes.txt"]
