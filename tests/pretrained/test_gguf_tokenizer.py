"""llama.cpp is given the tokenizer, exactly; what it would not follow is refused by name.

The tests marked slow run llama.cpp itself: it encodes text as we do.
"""

import json
import warnings

import gguf
import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from layerskip_moe.data.source import Document
from layerskip_moe.data.tokenizer import train_tokenizer
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained.gguf import export_gguf
from layerskip_moe.pretrained.sentencepiece_file import read_sentencepiece

LINES = [
    "def area(width, height):\n    return width * height  # in metres\n",
    "The old house by the river had been empty for years, and nobody knew why.\n",
    "for i in range(10):\n    print(i, i ** 2)\n\n",
    "She said: 'we're here, they'll come, it's 12345 steps.' Then nothing.\n",
] * 8


def make_model():
    return MoEDecoder(ModelConfig(vocab_size=352, n_layers=1, d_model=16, n_heads=2, num_experts=2, d_ff=16))


def byte_level(kind="bpe"):
    return train_tokenizer(kind, 340, [Document("train", line) for line in LINES], False)


def split_like(regex, *, ignore_merges=False, normalizer=None):
    """Byte-level BPE with another splitting rule, as Qwen2 and Llama 3 write it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.normalizer = normalizer
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<|endoftext|>", "<|im_start|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def llama_like(folder, **settings):
    """As Llama's of old: SentencePiece's BPE, bytes for unknown characters, <s> and a space before each text."""
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=file, model_type="bpe", vocab_size=350, num_threads=1,
            minloglevel=2, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        )  # fmt: skip
    return read_sentencepiece(folder / "tokenizer.model", {"add_bos_token": True, "legacy": True, **settings})


def tokenizer_fields(path):
    fields = gguf.GGUFReader(path).fields
    return {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}


def test_a_byte_level_tokenizer_is_written_whole(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_tokens(["<tool>"])
    export_gguf(make_model(), tokenizer, tmp_path / "model.gguf")
    told = tokenizer_fields(tmp_path / "model.gguf")
    size, merges = tokenizer.get_vocab_size(), json.loads(tokenizer.to_str())["model"]["merges"]
    assert (told["model"], told["pre"]) == ("gpt2", "gpt-2")
    assert told["tokens"][:size] == [tokenizer.id_to_token(i) for i in range(size)]
    assert len(told["tokens"]) == len(set(told["tokens"])) == len(told["token_type"]) == 352
    assert told["merges"] == [" ".join(merge) for merge in merges]
    types = gguf.TokenType
    assert told["token_type"][0] == types.CONTROL and told["token_type"][1] == types.NORMAL
    assert told["token_type"][size - 1] == types.USER_DEFINED and set(told["token_type"][size:]) == {types.UNUSED}
    assert told["eos_token_id"] == tokenizer.token_to_id("<|endoftext|>")
    assert told["add_bos_token"] is False and told["add_eos_token"] is False


def test_a_sentencepiece_tokenizer_is_written_with_its_scores(tmp_path):
    tokenizer = llama_like(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    export_gguf(make_model(), tokenizer, tmp_path / "model.gguf")
    told, types = tokenizer_fields(tmp_path / "model.gguf"), gguf.TokenType
    assert told["model"] == "llama" and told["add_space_prefix"] is True
    assert (told["bos_token_id"], told["eos_token_id"], told["unknown_token_id"], told["add_bos_token"]) == (
        1,
        2,
        0,
        True,
    )
    assert told["token_type"][:4] == [types.UNKNOWN, types.CONTROL, types.CONTROL, types.BYTE]
    normal = [i for i in range(350) if told["token_type"][i] == types.NORMAL and len(told["tokens"][i]) > 1]
    by_ours = sorted(normal, key=lambda i: -told["scores"][i])
    assert by_ours == sorted(normal, key=lambda i: -processor.get_score(i)) and len(by_ours) > 20


@pytest.mark.parametrize(
    ("make", "name"),
    [(lambda: split_like(QWEN2), "qwen2"), (lambda: split_like(LLAMA3, ignore_merges=True), "llama-bpe")],
    ids=["qwen2", "llama 3"],
)
def test_splitting_rules_are_known_by_their_text(tmp_path, make, name):
    export_gguf(make_model(), make(), tmp_path / "model.gguf")
    assert tokenizer_fields(tmp_path / "model.gguf")["pre"] == name


def test_parts_that_differ_on_unusual_text_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="does not compose characters"):
        export_gguf(make_model(), split_like(QWEN2, normalizer=normalizers.NFC()), tmp_path / "model.gguf")
    with pytest.warns(UserWarning, match="even if it begins with one"):
        export_gguf(make_model(), llama_like(tmp_path, legacy=False), tmp_path / "model.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_gguf(make_model(), llama_like(tmp_path), tmp_path / "model.gguf")


def changed(**parts):
    """The byte-level tokenizer with some of its parts exchanged."""
    tokenizer = byte_level()
    for part, value in parts.items():
        setattr(tokenizer, part, value)
    return tokenizer


def without_end():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    return tokenizer


def greedy_space():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


def joined_by_merges(merges, least_byte=0):
    """BPE with bytes for unknown characters, whose merges are not all, or not in order of what they make."""
    names = ["<unk>", "</s>", "a", "b", "c", "ab", "bc", "abc", *(f"<0x{byte:02X}>" for byte in range(least_byte, 256))]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


AB, ABC = [("a", "b"), ("b", "c")], [("a", "bc"), ("ab", "c")]
DOUBLE_END = processors.TemplateProcessing(
    single=["$A", "<|endoftext|>", "<|endoftext|>"], special_tokens=[("<|endoftext|>", 0)]
)


def test_merges_in_order_of_what_they_make_become_scores(tmp_path):
    export_gguf(make_model(), joined_by_merges([*AB, *ABC]), tmp_path / "model.gguf")
    told = tokenizer_fields(tmp_path / "model.gguf")
    score = dict(zip(told["tokens"], told["scores"], strict=True))
    assert score["ab"] > score["bc"] > score["abc"] > score["a"] == score["<0x00>"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: byte_level("unigram"), "kind Unigram cannot be written"),
        (lambda: changed(normalizer=normalizers.Lowercase()), "no normalizer, but this tokenizer's is .*Lowercase"),
        (lambda: changed(pre_tokenizer=pre_tokenizers.ByteLevel(True)), "how this tokenizer splits text"),
        (lambda: changed(pre_tokenizer=pre_tokenizers.Whitespace()), "how this tokenizer splits text"),
        (lambda: split_like(r"\w+|\W+"), "how this tokenizer splits text"),
        (lambda: split_like(LLAMA3), "ignore_merges=True, but this tokenizer's is False"),
        (lambda: changed(model=models.BPE(dropout=0.1)), "its dropout is 0.1"),
        (lambda: changed(post_processor=DOUBLE_END), "one token at the most to each end"),
        (without_end, "needs a token that ends a text"),
        (greedy_space, "'<mask>' in texts without regard to the spaces"),
        (lambda: joined_by_merges([*AB, *ABC], least_byte=1), "a token for each of the 256 bytes"),
        (lambda: joined_by_merges([*AB, *ABC[:1]]), "this tokenizer's merges are not such"),
        (lambda: joined_by_merges(AB), "this tokenizer's merges are not such"),
        (lambda: joined_by_merges([ABC[0], *AB, ABC[1]]), "this tokenizer's merges are not such"),
    ],
)
def test_other_tokenizers_are_refused_by_what_they_have(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        export_gguf(make_model(), make(), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda folder: byte_level(),
        lambda folder: split_like(QWEN2),
        lambda folder: split_like(LLAMA3, ignore_merges=True),
        llama_like,
        lambda folder: llama_like(folder, add_bos_token=False, add_eos_token=True),
    ],
    ids=["gpt-2", "qwen2", "llama 3", "sentencepiece", "sentencepiece, end added"],
)
def test_llama_cpp_encodes_text_as_we_do(tmp_path, make):
    reason = "llama-cpp-python is not installed (it compiles for minutes)"
    llama_cpp = pytest.importorskip("llama_cpp", reason=reason)
    tokenizer = make(tmp_path)
    export_gguf(make_model(), tokenizer, tmp_path / "model.gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    texts = [
        *LINES[:4], "  two  spaces ", "\n\n\t x", "émigré 🙂🙂 中文", "it's WE'LL 123 4567", " x", "   ", "",
        "a<|endoftext|>The<|im_start|> b", "</s>The<s> river", "if x:\n        return {'a': [1, 2]}\r\n",
    ]  # fmt: skip
    for text in texts:
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text).ids, text
    theirs.close()
