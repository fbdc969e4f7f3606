"""Traces that were whole once: texts of the sizes that they state, or one sentence."""

import io
import json
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.analysis.record_trace import record_texts
from layerskip_moe.analysis.trace import Trace, load_trace, save_trace
from layerskip_moe.nn import ModelConfig, MoEDecoder

SIZES = dict(vocab_size=11, n_layers=3, d_model=8, n_heads=2, num_experts=2, top_k=1, d_ff=8, max_seq_len=16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    model = MoEDecoder(ModelConfig(**SIZES))
    texts = record_texts(model, [[1, 2, 3], [4]], max_new_tokens=4, temperatures=(0.0, 0.8), seed=0, progress=False)
    path = tmp_path_factory.mktemp("traces") / "whole.npz"
    save_trace(Trace(texts, model.config, {"checkpoint": "x", "machine": {}}), path)
    return path.read_bytes()


def packed(members):
    """An archive of these files."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, contents in members.items():
            archive.writestr(name, contents)
    return data.getvalue()


def array(contents):
    data = io.BytesIO()
    np.save(data, contents, allow_pickle=True)  # to see that such ones are not read
    return data.getvalue()


@st.composite
def damaged(draw, whole, damaged_json, damaged_bytes):
    if not draw(st.integers(0, 4)):
        return draw(damaged_bytes(whole))
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw(st.sampled_from([*members, *["header.npy"] * len(members)]))
    if name == "header.npy":
        header = json.loads(np.load(io.BytesIO(members[name])).tobytes())
        members[name] = array(np.frombuffer(draw(damaged_json(header)), dtype=np.uint8))
    else:
        others = [
            *(np.array([[1, 2]], dtype=object), np.zeros((3, 1)), np.zeros(0), np.full((2, 3), np.nan), np.array("x")),
        ]
        again = np.load(io.BytesIO(members[name]))
        kinds = [again.astype(kind) for kind in (float, complex, str, np.int64, bool)] + [again - 100, again + 100]
        members[name] = draw(
            st.sampled_from([array(contents) for contents in [*others, *kinds]]) | damaged_bytes(members[name])
        )
    return packed(members)


def test_traces(cases, refused, whole, damaged_json, damaged_bytes, tmp_path, nothing_ran):
    path = tmp_path / "trace.npz"

    @cases("traces")
    @given(damaged(whole, damaged_json, damaged_bytes))
    def check(contents):
        path.write_bytes(contents)
        refused(lambda: load_trace(path))

    check()
