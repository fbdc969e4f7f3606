"""Checkpoint folders that were whole once: a model, or one sentence, however they were damaged, and nothing is run."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.data.tokenizer import train_tokenizer
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained import load_model, load_tokenizer, quantize, save_model, stop_tokens
from layerskip_moe.pretrained.checkpoint import read_recipe

SIZES = dict(n_layers=2, d_model=8, n_heads=2, num_experts=2, d_ff=8)
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("bpe", 270, [("train", TEXT)], progress=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A checkpoint of every kind: one file, shards, our own type, quantised; without the record, which guards all."""
    root = tmp_path_factory.mktemp("whole")
    model = MoEDecoder(ModelConfig(vocab_size=270, **SIZES))
    save_model(model, root / "one file", tokenizer=tokenizer)
    save_model(model, root / "shards", max_shard_bytes=4000)
    save_model(MoEDecoder(ModelConfig(vocab_size=270, bias_balancing=True, **SIZES)), root / "ours")
    save_model(quantize(model, "int8"), root / "quantised")
    for folder in root.iterdir():
        (folder / "README.md").unlink()
    return sorted(root.iterdir())


def files(folder):
    """Contents by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write(folder, contents):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in contents.items():
        (folder / name).write_bytes(data)


@st.composite
def damaged(draw, contents, damaged_json, damaged_bytes):
    """A folder's contents with one or two files changed or gone, mostly without the record that would tell."""
    contents = dict(contents)
    if draw(st.integers(0, 4)):
        contents.pop("layerskip_moe.json", None)
    for name in draw(st.lists(st.sampled_from(sorted(contents)), min_size=1, max_size=2, unique=True)):
        match draw(st.integers(0, 9)):
            case 0:
                del contents[name]
            case 1 | 2 | 3:
                contents[name] = draw(damaged_bytes(contents[name]))
            case _ if name.endswith(".json"):
                contents[name] = draw(damaged_json(json.loads(contents[name])))
            case _ if name.endswith(".safetensors"):
                contents[name] = draw(damaged_header(contents[name], damaged_json))
    return contents


@st.composite
def damaged_header(draw, data, damaged_json):
    """A safetensors file whose header says other things of the same tensors."""
    length = int.from_bytes(data[:8], "little")
    header = draw(damaged_json(json.loads(data[8 : 8 + length])))
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def test_models(cases, refused, folders, damaged_json, damaged_bytes, tmp_path, nothing_ran):
    @cases("checkpoint folders")
    @given(st.data())
    def check(data):
        contents = files(data.draw(st.sampled_from(folders)))
        write(tmp_path / "model", data.draw(damaged(contents, damaged_json, damaged_bytes)))
        refused(lambda: load_model(tmp_path / "model"))
        refused(lambda: read_recipe(tmp_path / "model"))

    check()


def test_tokenizers(cases, refused, folders, damaged_json, damaged_bytes, tmp_path, nothing_ran):
    whole = files(next(folder for folder in folders if folder.name == "one file"))
    whole = {name: data for name, data in whole.items() if not name.endswith(".safetensors")}
    added = {"content": "<new>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    beside = {
        "tokenizer_config.json": {
            "eos_token": "<|endoftext|>",
            "additional_special_tokens": ["<more>"],
            "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}, "270": added},
        },
        "special_tokens_map.json": {"eos_token": added, "additional_special_tokens": [added]},
        "added_tokens.json": {"<new>": 270},
        "generation_config.json": {"eos_token_id": [0, 1]},
    }
    whole |= {name: json.dumps(contents).encode() for name, contents in beside.items()}

    @cases("tokenizers")
    @given(st.data())
    def check(data):
        contents = data.draw(damaged(whole, damaged_json, damaged_bytes))
        if data.draw(st.booleans()):
            contents.pop("tokenizer_config.json", None)
        contents.pop("layerskip_moe.json", None)
        write(tmp_path / "model", contents)
        refused(lambda: load_tokenizer(tmp_path / "model"))
        refused(lambda: stop_tokens(Path(tmp_path / "model")))

    check()


def test_sentencepiece(cases, refused, damaged_bytes, tmp_path, nothing_ran):
    sentencepiece = pytest.importorskip("sentencepiece")
    with open(tmp_path / "whole.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.splitlines()), model_writer=file, model_type="bpe", vocab_size=60,
            hard_vocab_limit=False, minloglevel=2, num_threads=1,
        )  # fmt: skip
    whole = (tmp_path / "whole.model").read_bytes()

    @cases("sentencepiece")
    @given(damaged_bytes(whole), st.sampled_from([{}, {"add_bos_token": True, "bos_token": []}]))
    def check(data, settings):
        write(tmp_path / "model", {"tokenizer.model": data, "tokenizer_config.json": json.dumps(settings).encode()})
        refused(lambda: load_tokenizer(tmp_path / "model"))

    check()
