"""Files, folders and the standard library: what is read, how it is split, and what is refused."""

import json
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layerskip_moe.data import load_corpus
from layerskip_moe.data.local import path_source, read_documents, stdlib_source


def read(path, fraction=1.0, seed=0):
    """{"train": [texts], "validation": [texts]} of a path."""
    found = {"train": [], "validation": []}
    for split, text in path_source(path, fraction, seed).read():
        found[split].append(text)
    return found


def test_a_text_file_keeps_its_last_twentieth_for_validation(tmp_path):
    path = tmp_path / "a.txt"
    text = "".join(f"line {i}\r\n" for i in range(500))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = read(path)
    assert found["train"][0] + found["validation"][0] == text  # CRLF kept, the byte order mark dropped
    assert len(found["validation"][0]) == pytest.approx(0.05 * len(text), abs=1)


def test_rows_are_documents_and_the_last_twentieth_is_validation(tmp_path):
    texts = [f"row {i} \u2028 é" for i in range(100)]
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    pq.write_table(pa.table({"text": [*texts, None, " \n"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert read(tmp_path / name) == {"train": texts[:95], "validation": texts[95:]}


def test_documents_of_a_file_or_a_folder_are_read_whole(tmp_path):
    lines = ["".join(f"{word} {i}" for word in ("a", "row")) for i in range(3)]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in lines))
    (tmp_path / "a.md").write_text("one text")
    (tmp_path / "c.csv").write_text("x,y")
    assert read_documents(tmp_path / "b.jsonl") == lines
    assert read_documents(tmp_path / "c.csv") == ["x,y"]  # named itself, it is one text whatever its suffix
    assert read_documents(tmp_path) == ["one text", *lines]
    (tmp_path / "empty").mkdir()
    (tmp_path / "white.txt").write_text(" \n")
    for name in ("empty", "white.txt"):
        with pytest.raises(ValueError, match=f"{name} holds no text: name a file, or a folder of .txt"):
            read_documents(tmp_path / name)


def test_a_folder_is_split_by_name_alone(tmp_path):
    for i in range(200):
        path = tmp_path / "one" / f"{i % 7}" / f"{i}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text {i}")
    (tmp_path / "one" / "skipped.csv").write_text("a,b")
    (tmp_path / "one" / ".hidden.md").write_text("hidden")
    (tmp_path / "one" / ".git").mkdir()
    (tmp_path / "one" / ".git" / "in.md").write_text("hidden")
    (tmp_path / "one" / "empty.txt").write_text("")
    found = read(tmp_path / "one")
    assert sorted(found["train"] + found["validation"]) == sorted(f"text {i}" for i in range(200))
    assert 2 <= len(found["validation"]) <= 25  # 10 expected, 3.1 the standard deviation
    for path in (tmp_path / "one").rglob("[0-9]*.md"):
        path.write_text(path.read_text() + " changed")
    (tmp_path / "one").rename(tmp_path / "two")
    assert read(tmp_path / "two")["validation"] == [text + " changed" for text in found["validation"]]


@pytest.mark.parametrize("n_files", [1, 2, 3, 5])
def test_neither_split_of_a_small_folder_is_empty(tmp_path, n_files):
    for name in range(8):  # different names, so different hashes
        folder = tmp_path / f"{name}"
        folder.mkdir()
        for i in range(n_files):
            (folder / f"{name}-{i}.txt").write_text("some words to cut in two, if there is no other way")
        found = read(folder)
        assert found["train"] and found["validation"]


def test_a_sample_has_the_size_asked_for_and_leaves_validation_whole(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"{i} " * 50)
    whole, some = read(tmp_path), read(tmp_path, 0.3)
    assert sum(map(len, some["train"])) == pytest.approx(0.3 * sum(map(len, whole["train"])), abs=1)
    assert some["validation"] == whole["validation"]
    assert all(any(full.startswith(text) for full in whole["train"]) for text in some["train"])
    assert read(tmp_path, 0.3) == some != read(tmp_path, 0.3, seed=1)


def test_a_sample_of_one_document_is_cut_from_it(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 20)
    [train] = read(tmp_path / "a.txt", 0.1)["train"]
    assert train == ("0123456789" * 20)[:19]  # a tenth of the 190 characters that are not validation


def test_the_standard_library_is_source_without_tests_packages_and_tables():
    source = stdlib_source(1.0, 0)
    documents = list(source.read())
    texts = {text for _, text in documents}
    library = Path(sysconfig.get_paths()["stdlib"])
    for kept in ("argparse.py", "json/decoder.py", "asyncio/tasks.py"):
        assert (library / kept).read_bytes().decode() in texts
    left_out = [
        library / "encodings/cp1252.py",
        library / "pydoc_data/topics.py",
        library / "html/entities.py",
    ]
    left_out += [library / "unittest/test/test_case.py", library / "test/test_dict.py"]
    assert not any(path.read_bytes().decode() in texts for path in left_out if path.exists())
    assert 7e6 < source.characters < 12e6
    share = sum(len(text) for split, text in documents if split == "validation") / source.characters
    assert 0.02 < share < 0.1
    assert all(text.strip() for text in texts)


def test_the_standard_library_is_refused_where_it_has_no_source(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"no \.py files"):
        load_corpus("python-stdlib")


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("a.txt", b"", "is empty"),
        ("a.md", b" \n\t", "is empty"),
        ("a.txt", b"x", "too little text to fill the train split"),
        ("a.py", b"good \xe9 bad", r"a\.py is not UTF-8 \(byte 0xe9 at offset 5\)"),
        ("a.csv", b"a,b", r"ends in '\.csv'.*\.jsonl or \.parquet"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}', r'line 2 has no string field "text"'),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 3}', r'line 3 has no string field "text"'),
        ("a.jsonl", b'["text"]', r'line 1 has no string field "text"'),
        ("a.jsonl", b'{"text": ', r"line 1 is not JSON \(Expecting value at column 10\)"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 escapes half of a surrogate pair"),
        ("a.jsonl", b'{"text": "\xff"}', "byte 0xff at offset 10"),
        ("a.parquet", b"not parquet at all", "cannot be read as parquet"),
    ],
)
def test_a_bad_file_gets_one_sentence(tmp_path, name, data, complaint):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=complaint) as caught:
        load_corpus(path, vocab_size=300, progress=False)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_parquet_file_of_repeated_text_is_read(tmp_path):
    """As texts go: many rows alike, some empty, some of other alphabets, in several row groups, however it is laid."""
    texts = ["The same again. " * 20, "", None, "¡Olé! — 中文 🙂", " \n"] * 3000
    for number, kind in enumerate((pa.string(), pa.large_string())):
        for dictionary in (True, False):
            path = tmp_path / f"{number}{dictionary}.parquet"
            table = pa.table({"text": pa.array(texts, kind)})
            pq.write_table(table, path, row_group_size=4000, use_dictionary=dictionary)
            assert read_documents(path) == [text for text in texts if text and text.strip()]


def test_a_parquet_file_without_text_names_its_columns(tmp_path):
    for columns in ({"body": ["a"]}, {"text": [1]}):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=rf'needs a column "text" of strings.*{next(iter(columns))} \('):
            load_corpus(tmp_path / "a.parquet", progress=False)


def test_a_bad_file_in_a_folder_is_named(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "good.txt").write_text("good")
    (tmp_path / "texts" / "bad.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8 \(byte 0xe9 at offset 3\)"):
        load_corpus(tmp_path / "texts", progress=False)


@pytest.mark.parametrize(
    ("dataset", "complaint"),
    [
        ("wikitext2", r"no dataset, file or folder 'wikitext2': use 'python-stdlib', 'wikitext-2'"),
        ("", "no dataset, file or folder ''"),
        ("not a name but a text " * 1000, "no dataset, file or folder 'not a name"),
        ("missing/text.txt", r"no file or folder /.*missing/text\.txt"),
        ("/missing/folder", "no file or folder /missing/folder"),
        (Path("missing/folder"), "no file or folder /.*missing/folder"),
    ],
)
def test_an_unknown_name_says_what_would_work(dataset, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_corpus(dataset)


@pytest.mark.parametrize("tokenizer", ["bpe", "unigram"])
def test_a_split_without_text_is_named_whatever_the_tokenizer(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="too little text to fill the train split"):
        load_corpus(tmp_path / "a.txt", vocab_size=300, tokenizer=tokenizer, progress=False)


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "texts").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.txt, \.md"):
        load_corpus(tmp_path / "texts")
    (tmp_path / "texts" / "a.txt").write_text("")
    with pytest.raises(ValueError, match="texts is empty"):
        load_corpus(tmp_path / "texts")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (dict(sample_fraction=0.0), "sample_fraction=0.0 must be above 0"),
        (dict(sample_fraction=1.5), "sample_fraction=1.5"),
        (dict(sample_fraction=float("nan")), "sample_fraction=nan"),
        (dict(vocab_size=256), "vocab_size=256 is too small.*257"),
        (dict(vocab_size=257, tokenizer="unigram"), "vocab_size=257 is too small.*258"),
        (dict(tokenizer="bpee"), "no tokenizer 'bpee'"),
        (dict(config="x"), "config='x' is for hub datasets"),
    ],
)
def test_settings_out_of_range_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_corpus("python-stdlib", **settings)
