"""Tokenizers come from other people's files, and go into files, without one id changing."""

import json
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from layerskip_moe.data.source import Document
from layerskip_moe.data.tokenizer import train_tokenizer
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained import tokenizer as tokenizer_module
from layerskip_moe.pretrained.families import FAMILIES
from layerskip_moe.pretrained.tokenizer import (
    load_tokenizer,
    special_roles,
    stop_tokens,
    write_tokenizer_files,
)

LINES = [
    "def area(width, height):\n    return width * height  # in metres\n",
    "The old house by the river had been empty for years, and nobody knew why.\n",
    "for i in range(10):\n    print(i, i ** 2)\n\n",
    "She said: 'we're here, they'll come, it's 12345 steps.' Then nothing.\n",
] * 8
TEXTS = [
    "The river  had been", "  two spaces", "a\nb\n\n\tc ", "émigré 🙂🙂 中文 naïve", "if x:\n        return 12345", "",
    " ", "it's, WE'LL", "<|endoftext|>The<|endoftext|> end", "<s>The</s> end", "<unk>", "e\u0301 ﬁ",
]  # fmt: skip
# As Llama 2 and Mixtral were made: nothing is normalised, unknown characters become bytes.
LLAMA = dict(byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True)
LLAMA_CONFIG = {
    "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False,
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
}  # fmt: skip


def train_sentencepiece(folder, kind, **how):
    """Write tokenizer.model into folder; SentencePiece's own processor of it."""
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=file, model_type=kind, vocab_size=340 if how else 80,
            hard_vocab_limit=False, minloglevel=2, num_threads=1, **how,
        )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def write_json(folder, **files):
    for name, contents in files.items():
        (folder / f"{name}.json").write_text(json.dumps(contents))


def byte_level(kind="bpe"):
    return train_tokenizer(kind, 320, [Document("train", line) for line in LINES], False)


def assert_encodes_alike(ours, theirs, texts=TEXTS):
    for text in texts:
        ids = ours.encode(text).ids
        assert ids == theirs(text).input_ids, text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def llama_like(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_json(folder, tokenizer_config={"legacy": True})
    return folder, train_sentencepiece(folder, request.param, **LLAMA)


@settings(deadline=None, max_examples=60)
@given(text=st.text(alphabet=st.sampled_from("aehiorstw .,'\n\t  1259▁中é🙂(=)")))
def test_sentencepiece_files_give_sentencepieces_own_ids(llama_like, text):
    folder, theirs = llama_like
    ours = load_tokenizer(folder)
    ids = ours.encode(text).ids
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "how",
    [{}, {"normalization_rule_name": "nmt_nfkc_cf"}, {"add_dummy_prefix": False, "byte_fallback": True}],
    ids=["default", "caseless", "no prefix"],
)
def test_sentencepieces_normalisation_is_followed(tmp_path, kind, how):
    theirs, ours = train_sentencepiece(tmp_path, kind, **how), load_tokenizer(tmp_path)
    for text in [*LINES[:4], "  two  spaces ", "\uff21 ﬁ ½ é\u0301", "🙂🙂 中 x", "\t\n", "   "]:
        assert ours.encode(text).ids == theirs.encode(text), text


def test_user_defined_symbols_are_never_cut(tmp_path):
    theirs = train_sentencepiece(tmp_path, "bpe", user_defined_symbols=["<sep>", "iver"], **LLAMA)
    write_json(tmp_path, tokenizer_config={"legacy": False})  # no further space after each symbol, as SentencePiece
    ours = load_tokenizer(tmp_path)
    for text in ("the river<sep>a river", "x<sep><sep>iver, iver"):
        assert ours.encode(text).ids == theirs.encode(text), text


@pytest.mark.parametrize(
    "changes",
    [{}, {"add_bos_token": False}, {"add_eos_token": True}, {"add_bos_token": None}, {"legacy": None}],
    ids=str,
)
def test_a_llama_tokenizer_without_tokenizer_json_is_read_as_by_transformers(tmp_path, changes):
    train_sentencepiece(tmp_path, "bpe", **LLAMA)
    config = {name: value for name, value in {**LLAMA_CONFIG, **changes}.items() if value is not None}
    write_json(tmp_path, tokenizer_config=config, config={"model_type": "llama"})
    assert_encodes_alike(load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path))


def test_tokens_added_to_a_sentencepiece_model_have_their_ids(tmp_path):
    size = train_sentencepiece(tmp_path, "bpe", **LLAMA).vocab_size()
    write_json(
        tmp_path, config={"model_type": "llama"}, special_tokens_map={"pad_token": "<pad>"},
        tokenizer_config=LLAMA_CONFIG, added_tokens={"<tool>": size + 1, "<pad>": size},
    )  # fmt: skip
    ours = load_tokenizer(tmp_path)
    assert (ours.token_to_id("<pad>"), ours.token_to_id("<tool>")) == (size, size + 1)
    assert_encodes_alike(ours, AutoTokenizer.from_pretrained(tmp_path), ["a<tool> river<pad><pad>", "<tool>"])


@pytest.mark.parametrize("prefix", [False, True])
def test_the_space_before_a_text_returns_after_special_tokens_in_old_files(tmp_path, prefix):
    processor = train_sentencepiece(tmp_path, "bpe", **LLAMA)
    write_json(tmp_path, tokenizer_config={"legacy": prefix})
    river, bare = processor.encode("river"), load_tokenizer(tmp_path).encode("x<s>river").ids
    assert (bare[bare.index(1) + 1 :] == river) is prefix


def test_a_tokenizer_json_stands_as_it_is(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(b"not looked at")
    write_json(tmp_path, tokenizer_config={"add_bos_token": True, "bos_token": "<|endoftext|>"})
    loaded = load_tokenizer(tmp_path)
    assert loaded.truncation is None and loaded.padding is None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    assert loaded.to_str() == tokenizer.to_str()


@pytest.mark.parametrize("legacy", [False, True], ids=["tokenizer_config", "special_tokens_map"])
def test_special_tokens_listed_beside_a_tokenizer_json_are_added(tmp_path, legacy):
    tokenizer = byte_level()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    size, fields = tokenizer.get_vocab_size(), {"lstrip": True, "rstrip": False, "single_word": False}
    roles = {
        "eos_token": "<|im_end|>", "pad_token": {"content": "<pad>", "normalized": False, **fields},
        "additional_special_tokens": ["<|im_start|>"],
    }  # fmt: skip
    listed = {
        str(size): {"content": "<|im_end|>", "special": True, "normalized": False, **fields},
        str(size + 1): {"content": "<tool>", "special": False, "normalized": True, **fields},
    }
    if legacy:
        write_json(tmp_path, special_tokens_map=roles)
    else:
        roles["pad_token"]["__type"] = "AddedToken"
        write_json(tmp_path, tokenizer_config={**roles, "added_tokens_decoder": listed})
    write_json(tmp_path, config={"model_type": "mixtral"})
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.get_vocab() == theirs.get_vocab() and len(ours.get_vocab()) == size + (3 if legacy else 4)
    assert_encodes_alike(ours, theirs, ["x <|im_end|><|im_start|>user", "a  <pad> b", "a <tool>b"])


def test_the_hub_is_asked_with_revision_and_token(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        tokenizer_module, "local_folder", lambda source, **options: asked.append((source, options)) or tmp_path
    )
    byte_level().save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer("owner/name", revision="v1", token="t").to_str() == byte_level().to_str()
    [(source, options)] = asked
    assert source == "owner/name" and (options["revision"], options["token"]) == ("v1", "t")
    assert {"*.json", "tokenizer.model"} == set(options["patterns"])


def metaspace():
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0), ("▁", -3.0)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def spaced_byte_level():
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


@pytest.mark.parametrize("model_type", [*FAMILIES, "layerskip_moe"])
@pytest.mark.parametrize("make", [byte_level, lambda: byte_level("unigram"), metaspace, spaced_byte_level])
def test_what_is_written_is_read_by_transformers_as_it_is(tmp_path, make, model_type):
    tokenizer = make()
    write_json(tmp_path, config={"model_type": model_type})
    write_tokenizer_files(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert_encodes_alike(tokenizer, theirs)
    assert theirs.get_vocab() == tokenizer.get_vocab() == load_tokenizer(tmp_path).get_vocab()


def test_a_llama_tokenizer_is_written_with_its_special_tokens(tmp_path, llama_like):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(llama_like[0] / "tokenizer.model", source)
    write_json(source, tokenizer_config=LLAMA_CONFIG)
    tokenizer = load_tokenizer(source)
    write_json(tmp_path, config={"model_type": "llama"})
    write_tokenizer_files(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token, theirs.eos_token, theirs.unk_token, theirs.pad_token) == ("<s>", "</s>", "<unk>", None)
    assert_encodes_alike(tokenizer, theirs)
    assert tokenizer.encode("a").ids[0] == theirs.bos_token_id


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_an_oserror(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "replacing", lambda path: nullcontext(Path("/dev/full")))
    with pytest.raises(OSError, match="No space left on device"):
        write_tokenizer_files(byte_level(), tmp_path)


def test_only_tokens_that_are_special_are_declared(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "<pad>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert special_roles(tokenizer) == {}
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.add_tokens([AddedToken("</s>", special=False)])
    assert special_roles(tokenizer) == {"pad_token": "<pad>"}


def test_stop_tokens_are_the_most_particular_said(tmp_path):
    assert stop_tokens(tmp_path) == []
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|im_end|>"])
    write_tokenizer_files(tokenizer, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert stop_tokens(tmp_path) == [tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|im_end|>")]
    write_json(tmp_path, tokenizer_config={"eos_token": {"content": "<|im_end|>"}})
    assert stop_tokens(tmp_path) == [tokenizer.token_to_id("<|im_end|>")]
    write_json(tmp_path, config={"eos_token_id": 7})
    assert stop_tokens(tmp_path) == [7]
    write_json(tmp_path, generation_config={"eos_token_id": [5, 6]})
    assert stop_tokens(tmp_path) == [5, 6]
    write_json(tmp_path, generation_config={"eos_token_id": None}, config={"eos_token_id": "7"})
    with pytest.raises(ValueError, match="neither an id nor a list of ids"):
        stop_tokens(tmp_path)


def test_a_tokenizer_of_another_save_is_refused(tmp_path):
    tokenizer = byte_level()
    model = MoEDecoder(ModelConfig(vocab_size=320, n_layers=1, d_model=8, n_heads=2, num_experts=2, d_ff=8))
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    assert load_tokenizer(tmp_path).to_str() == tokenizer.to_str()
    byte_level("unigram").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the file that"):
        load_tokenizer(tmp_path)


def spoil(folder, name, contents):
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / name).write_bytes(contents)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("tokenizer.json", b'{"version": "1.0"', "not a whole tokenizer"),
        ("tokenizer_config.json", b"{", "not JSON"),
        ("tokenizer_config.json", b'{"eos_token": 3}', "does not list its tokens as transformers does"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "does not list its tokens as transformers does"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"9000": {"content": "<x>"}}}', "the id 9000, but the"),
        ("added_tokens.json", b'{"<x>": 9000}', "take the tokenizer's files from one place"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(tmp_path, name, contents, message):
    spoil(tmp_path, name, contents)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("contents", [b"", b"\x00garbage", b"IQ== 0\nIg== 1\n"], ids=["empty", "garbage", "tiktoken"])
def test_what_is_no_sentencepiece_model_is_refused(tmp_path, contents):
    (tmp_path / "tokenizer.model").write_bytes(contents)
    with pytest.raises(ValueError, match="not a whole SentencePiece model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        ("char", {}, "words or characters"),
        ("bpe", {"treat_whitespace_as_suffix": True}, "spaces after words"),
    ],
)
def test_sentencepiece_models_that_cannot_be_followed_are_refused(tmp_path, kind, how, message):
    train_sentencepiece(tmp_path, kind, **how)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_token_that_is_to_begin_each_text_must_exist(tmp_path):
    train_sentencepiece(tmp_path, "bpe", **LLAMA, bos_id=-1)
    write_json(tmp_path, tokenizer_config={"add_bos_token": True})
    with pytest.raises(ValueError, match=r"adds <s> to each text, but .* has no such token"):
        load_tokenizer(tmp_path)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    train_sentencepiece(tmp_path, "bpe", **LLAMA)
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(ImportError, match="pip install sentencepiece protobuf"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer .* save the model with tokenizer="):
        load_tokenizer(tmp_path)
