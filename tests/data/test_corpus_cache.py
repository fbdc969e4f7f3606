"""Corpora on disk: equal when found again, apart for different content, rebuilt if damaged, safe to share."""

import multiprocessing
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

import layerskip_moe.data.cache as cache
from layerskip_moe.data import Corpus, load_corpus

SMALL = dict(vocab_size=300, progress=False)


@pytest.fixture
def text(tmp_path, prose):
    path = tmp_path / "text.txt"
    path.write_text(prose(2000))
    return path


@pytest.fixture
def builds(monkeypatch):
    """A list that grows by one with each corpus that is built rather than found."""
    done = []
    build = cache._build
    monkeypatch.setattr(cache, "_build", lambda *args: done.append(1) or build(*args))
    return done


def same(a, b):
    return (
        torch.equal(a.train, b.train)
        and torch.equal(a.validation, b.validation)
        and a.tokenizer.to_str() == b.tokenizer.to_str()
    )


def entries(folder):
    return sorted(path for path in (folder / "corpora").iterdir() if path.is_dir())


def test_tokens_are_the_documents_and_their_separators(text):
    corpus = load_corpus(text, **SMALL)
    assert corpus.train.dtype == corpus.validation.dtype == torch.int32 and corpus.train.dim() == 1
    assert corpus.end_of_text == corpus.train[-1] == corpus.validation[-1]
    decoded = corpus.tokenizer.decode(torch.cat([corpus.train[:-1], corpus.validation[:-1]]).tolist())
    assert decoded == text.read_text()
    assert corpus.name == "text.txt"
    assert corpus.train.max() < corpus.vocab_size <= 300


@pytest.mark.parametrize("tokenizer", ["bpe", "unigram"])
def test_a_second_load_is_found_and_equal(text, builds, tokenizer):
    first = load_corpus(text, tokenizer=tokenizer, **SMALL)
    assert same(first, load_corpus(text, tokenizer=tokenizer, **SMALL)) and len(builds) == 1


def test_the_key_is_the_content_not_the_path(text, builds, tmp_path):
    first = load_corpus(text, **SMALL)
    moved = load_corpus(shutil.move(text, tmp_path / "moved.txt"), **SMALL)
    assert same(first, moved) and moved.name == "moved.txt" and len(builds) == 1
    (tmp_path / "moved.txt").write_text((tmp_path / "moved.txt").read_text() + "river")
    assert not same(first, load_corpus(tmp_path / "moved.txt", **SMALL)) and len(builds) == 2


def test_every_setting_that_shapes_the_tokens_has_its_own_entry(text, builds, own_cache):
    first = load_corpus(text, **SMALL)
    (text.parent / "tokenizer.json").write_text(first.tokenizer.to_str())
    load_corpus(text, vocab_size=280, progress=False)
    load_corpus(text, tokenizer="unigram", **SMALL)
    load_corpus(text, sample_fraction=0.5, **SMALL)
    load_corpus(text, tokenizer=text.parent / "tokenizer.json", vocab_size=300, progress=False)
    assert len(builds) == len(entries(own_cache)) == 5
    load_corpus(text, tokenizer=text.parent / "tokenizer.json", vocab_size=999, progress=False)
    load_corpus(text, seed=1, **SMALL)  # the whole text is the same whatever the seed
    assert len(builds) == 5


def test_the_argument_wins_over_the_environment_and_that_over_the_default(text, own_cache, tmp_path, monkeypatch):
    load_corpus(text, cache_dir=tmp_path / "given", **SMALL)
    assert entries(tmp_path / "given") and not own_cache.exists()
    load_corpus(text, **SMALL)
    assert entries(own_cache)
    monkeypatch.delenv("LAYERSKIP_MOE_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "user" / name)
    load_corpus(text, **SMALL)
    assert entries(tmp_path / "user" / "layerskip_moe")


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "tokenizer.json", "checksums.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_a_damaged_entry_is_built_again_with_a_warning(text, own_cache, builds, name, harm):
    first = load_corpus(text, **SMALL)
    kept = Corpus(first.name, first.tokenizer, first.train.clone(), first.validation.clone())
    [entry] = entries(own_cache)
    data = bytearray((entry / name).read_bytes())
    (entry / name).unlink()
    if harm == "flip":
        data[len(data) // 2] ^= 1
    if harm == "truncate":
        data = data[:-4]
    if harm != "delete":
        (entry / name).write_bytes(data)
    with pytest.warns(UserWarning, match="is damaged .* built again"):
        again = load_corpus(text, **SMALL)
    assert same(kept, again) and len(builds) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_corpus(text, **SMALL)
    assert len(builds) == 2


def test_a_build_that_fails_leaves_no_entry(text, own_cache, monkeypatch):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_write_tokens", full_disk)
        with pytest.raises(OSError, match="No space left"):
            load_corpus(text, **SMALL)
    assert entries(own_cache) == []
    load_corpus(text, **SMALL)


def test_what_a_killed_build_left_behind_is_cleared(text, own_cache):
    load_corpus(text, **SMALL)
    [entry] = entries(own_cache)
    half = entry.rename(entry.with_suffix(".partial"))
    (half / "train.bin").write_bytes(b"half")
    (half / "more").mkdir()
    assert len(load_corpus(text, **SMALL).train) > 100
    assert entries(own_cache) == [entry]


def _load_in_child(path, start, results):
    start.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = load_corpus(path, **SMALL)
    results.put((os.getpid(), corpus.train.sum().item(), len(corpus.train)))


def test_processes_at_once_share_one_entry(text, own_cache):
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    children = [context.Process(target=_load_in_child, args=(text, start, results), daemon=True) for _ in range(3)]
    for child in children:
        child.start()
    start.set()
    found = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
    corpus = load_corpus(text, **SMALL)
    assert {(total, length) for _, total, length in found} == {(corpus.train.sum().item(), len(corpus.train))}
    assert len({pid for pid, _, _ in found}) == 3
    assert len(entries(own_cache)) == 1


def test_writing_to_the_tokens_changes_nothing_on_disk(text):
    corpus = load_corpus(text, **SMALL)
    before = corpus.train.clone()
    corpus.train.fill_(7)
    assert torch.equal(load_corpus(text, **SMALL).train, before)


def test_a_cache_that_cannot_be_written_is_named(text, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/corpora cannot be written .*LAYERSKIP_MOE_CACHE"):
        load_corpus(text, cache_dir=tmp_path / "file", **SMALL)


def test_a_found_corpus_needs_no_write_access(text, builds, own_cache, monkeypatch):
    load_corpus(text, **SMALL)
    monkeypatch.setattr("filelock.FileLock", lambda path: pytest.fail("locked a cache that had what was wanted"))
    load_corpus(text, **SMALL)


def numbered_corpus(lengths):
    """A corpus whose validation token j of document d (from 1) is 1000 d + j."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens(["<|endoftext|>"])
    ids = [i for d, n in enumerate(lengths, start=1) for i in [*range(1000 * d, 1000 * d + n), 0]]
    return Corpus("numbered", tokenizer, torch.zeros(1, dtype=torch.int32), torch.tensor(ids, dtype=torch.int32))


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    n=st.integers(1, 12),
    length=st.integers(1, 9),
    seed=st.integers(-2, 9),
)
def test_prompts_are_separate_stretches_of_as_many_documents_as_there_are(lengths, n, length, seed):
    corpus = numbered_corpus(lengths)
    if n > sum(tokens // length for tokens in lengths):
        with pytest.raises(ValueError, match=rf"holds \d+ separate prompts of {length} tokens, not {n}"):
            corpus.validation_prompts(n, length, seed)
        return
    prompts = corpus.validation_prompts(n, length, seed)
    assert [prompt for prompt in prompts if prompt != list(range(prompt[0], prompt[0] + length))] == []
    assert len({i for prompt in prompts for i in prompt}) == n * length
    long_enough = sum(tokens >= length for tokens in lengths)
    assert len({prompt[0] // 1000 for prompt in prompts}) == min(n, long_enough)
    assert corpus.validation_prompts(n, length, seed) == prompts
    stretches = corpus.validation_stretches(n, length, seed)
    assert stretches == [(prompt[0] // 1000 - 1, prompt) for prompt in prompts]


def test_prompts_depend_on_the_seed():
    corpus = numbered_corpus([100] * 20)
    assert corpus.validation_prompts(9, 10, 0) != corpus.validation_prompts(9, 10, 1)
    with pytest.raises(ValueError, match="n=0"):
        corpus.validation_prompts(0, 10)


def test_the_embedded_default_loads(tmp_path):
    corpus = load_corpus("python-stdlib", vocab_size=400, sample_fraction=0.02, progress=False)
    assert corpus.name == "python-stdlib" and corpus.vocab_size == 400
    assert len(corpus.validation_prompts(20, 64)) == 20


def test_a_path_object_is_a_file_even_where_a_short_name_is_known(tmp_path, prose, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tinystories").mkdir()
    (tmp_path / "tinystories" / "a.txt").write_text(prose(300))
    assert load_corpus(Path("tinystories"), **SMALL).name == "tinystories"
