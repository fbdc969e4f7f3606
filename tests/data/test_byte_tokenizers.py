"""Tokenizers lose nothing, keep to their size, and see the training split alone."""

import os

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import layerskip_moe.data.tokenizer as module
from layerskip_moe.data import load_corpus
from layerskip_moe.data.source import Document
from layerskip_moe.data.tokenizer import (
    SMALLEST_VOCABULARY,
    encode_documents,
    end_of_text_id,
    id_count,
    split_text,
    train_tokenizer,
)

TEXT = "def walk(river):\n    return [stone for stone in river if stone]\n\n\n" * 40
TOKENIZERS = {
    kind: train_tokenizer(kind, 300, [Document("train", TEXT)], progress=False) for kind in SMALLEST_VOCABULARY
}
ANY_TEXT = st.text(st.characters(codec="utf-8")) | st.text(" \t\r\n\0aéß漢🎉'.")


@pytest.mark.parametrize("kind", SMALLEST_VOCABULARY)
@settings(max_examples=50, deadline=None)
@given(text=ANY_TEXT)
def test_decoding_gives_the_text_back(kind, text):
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", SMALLEST_VOCABULARY)
@pytest.mark.parametrize("more", [0, 1, 20, 700])
def test_ids_fill_the_vocabulary_from_0_and_never_pass_it(kind, more):
    vocab_size = SMALLEST_VOCABULARY[kind] + more
    tokenizer = train_tokenizer(kind, vocab_size, [Document("train", TEXT)], progress=False)
    ids = sorted(tokenizer.get_vocab().values())
    assert ids == list(range(len(ids))) and 257 <= len(ids) <= vocab_size
    assert id_count(tokenizer) == len(ids)
    assert end_of_text_id(tokenizer) == tokenizer.token_to_id("<|endoftext|>")


def test_what_only_validation_holds_is_not_learnt():
    secret = Document("validation", "xylophone " * 500)
    tokenizer = train_tokenizer("bpe", 400, [Document("train", TEXT), secret], progress=False)
    assert tokenizer.get_vocab() == train_tokenizer("bpe", 400, [Document("train", TEXT)], progress=False).get_vocab()
    assert any("stone" in token for token in tokenizer.get_vocab())


def test_training_stops_at_its_share_of_a_large_text(monkeypatch):
    monkeypatch.setattr(module, "_TRAINING_CHARACTERS", 100)
    unread = iter([Document("train", TEXT), Document("train", "xylophone " * 500)])
    tokenizer = train_tokenizer("bpe", 400, unread, progress=False)
    assert tokenizer.get_vocab() == train_tokenizer("bpe", 400, [Document("train", TEXT)], progress=False).get_vocab()
    assert len(list(unread)) == 1


@settings(max_examples=50, deadline=None)
@given(text=ANY_TEXT, size=st.integers(1, 8))
def test_a_text_encoded_in_pieces_gives_the_tokens_of_the_whole(text, size):
    tokenizer = TOKENIZERS["bpe"]
    pieces = list(split_text(text, size))
    assert "".join(pieces) == text
    assert all(len(piece) >= size for piece in pieces[:-1])
    assert [i for piece in pieces for i in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids


def test_long_lines_are_really_cut():
    assert [len(piece) for piece in split_text("word " * 100, 50)] == [54] + [50] * 8 + [46]


def test_documents_end_with_the_separator_whatever_their_length(monkeypatch):
    tokenizer = TOKENIZERS["bpe"]
    texts = ["a", TEXT, "a <|endoftext|> b", "stone"]
    expected = [i for text in texts for i in [*tokenizer.encode(text).ids, 0]]
    assert expected.count(0) == 5  # a separator written in the text is one
    for size in (1, 1000, 10**6):  # a batch may end within a document, between two, or never
        monkeypatch.setattr(module, "_BATCH_CHARACTERS", size)
        stretches = list(encode_documents(tokenizer, [Document("train", text) for text in texts]))
        assert [i for _, ids, _ in stretches for i in ids] == expected
        assert sum(characters for _, _, characters in stretches) == sum(map(len, texts))


def test_a_given_tokenizer_is_used_without_its_truncation(tmp_path, prose):
    tokenizer = train_tokenizer("bpe", 300, [Document("train", TEXT)], progress=False)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(prose(200))
    corpus = load_corpus(tmp_path / "text.txt", tokenizer=tmp_path / "tokenizer.json", vocab_size=9, progress=False)
    text = corpus.tokenizer.decode(corpus.train.tolist() + corpus.validation.tolist())
    assert text == prose(200)
    assert corpus.vocab_size == id_count(tokenizer)


def test_a_loaded_tokenizer_serves_as_its_file_does(tmp_path):
    (tmp_path / "text.txt").write_text("one two three four five six\n" * 400)
    load_corpus(tmp_path / "text.txt", vocab_size=300, progress=False).tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    from_file = load_corpus(tmp_path / "text.txt", tokenizer=tmp_path / "tokenizer.json", progress=False)
    given = load_corpus(tmp_path / "text.txt", tokenizer=tokenizer, progress=False)
    assert given.train.tolist() == from_file.train.tolist() and given.vocab_size == from_file.vocab_size
    assert tokenizer.truncation is not None, "the given one is left as it is"


def test_a_tokenizer_without_a_separator_is_refused(tmp_path, prose):
    (tmp_path / "text.txt").write_text(prose(50))
    bare = tmp_path / "bare.json"
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(bare))
    with pytest.raises(ValueError, match="no token that separates documents"):
        load_corpus(tmp_path / "text.txt", tokenizer=bare, progress=False)
    bare.write_text("{")
    with pytest.raises(ValueError, match=r"bare\.json could not be read"):
        load_corpus(tmp_path / "text.txt", tokenizer=bare, progress=False)


def test_a_fork_after_loading_warns_of_nothing(tmp_path, prose, capfd):
    (tmp_path / "text.txt").write_text(prose(500))
    corpus = load_corpus(tmp_path / "text.txt", vocab_size=300, progress=False)
    child = os.fork()
    if child == 0:
        corpus.tokenizer.encode_batch(["the river"] * 20)
        os._exit(0)
    os.waitpid(child, 0)
    assert capfd.readouterr().err == ""
