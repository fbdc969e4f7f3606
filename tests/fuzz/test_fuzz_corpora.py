"""Texts of any bytes: a corpus, or one sentence that names the file."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.analysis.metrics_file import read_metrics
from layerskip_moe.data import load_corpus

LINES = ["The river walks under the stone.", "¡Olé! — naïve café", "中文 🙂", "\ufeff", "a" * 3000, "", "\0\x1b[2J"]


@pytest.fixture(scope="module")
def parquet():
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    data = io.BytesIO()
    pq.write_table(pa.table({"text": LINES * 5, "n": list(range(len(LINES) * 5))}), data)
    return data.getvalue()


def texts():
    """Lines in one encoding, or in several, as files grow that nobody looked at; or any bytes."""
    encodings = st.sampled_from(["utf-8", "latin-1", "utf-16", "cp1252", "shift-jis"])
    lines = st.tuples(st.sampled_from(LINES), encodings).map(lambda pair: pair[0].encode(pair[1], "replace"))
    ends = st.sampled_from([b"\n", b"\r\n", b"\r", b"\0"])
    return st.binary(max_size=300) | st.tuples(st.lists(lines, max_size=12), ends).map(
        lambda pair: pair[1].join(pair[0])
    )


def test_corpora(cases, refused, damaged_json, damaged_bytes, parquet, tmp_path, nothing_ran):
    jsonl = b"".join(json.dumps({"text": line}).encode() + b"\n" for line in LINES)
    one_record = damaged_json({"text": LINES[0], "more": [1, {"a": None}]})

    @cases("corpora")
    @given(st.data())
    def check(data):
        suffix = data.draw(st.sampled_from([".txt", ".py", ".md", ".jsonl", ".jsonl", ".parquet", ".json", ""]))
        contents = {".jsonl": one_record | st.tuples(one_record, st.just(jsonl)).map(b"\n".join) | damaged_bytes(jsonl)}
        contents[".parquet"] = damaged_bytes(parquet)
        path = tmp_path / f"text{suffix}"
        path.write_bytes(data.draw(contents.get(suffix, texts()) | texts()))
        kind = data.draw(st.sampled_from(["bpe", "bpe", "unigram"]))
        refused(lambda: load_corpus(path, tokenizer=kind, vocab_size=300, cache_dir=tmp_path / "cache", progress=False))

    check()


def test_logs(cases, refused, damaged_json, tmp_path):
    record = {"step": 3, "split": "train", "loss": 2.5, "exits": [1.0, None]}

    @cases("logs")
    @given(st.lists(damaged_json(record), max_size=3), st.booleans())
    def check(lines, ends):
        (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n" * ends)
        refused(lambda: read_metrics(tmp_path / "metrics.jsonl"))

    check()
