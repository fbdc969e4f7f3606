"""Threshold files that were whole once, with a classifier's probes beside them: early exit, or one sentence."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.generation import EarlyExit, generate
from layerskip_moe.generation.calibration import Certified, write_calibration
from layerskip_moe.generation.exit_classifier import ExitClassifier
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.nn.fingerprint import model_fingerprint

SIZES = dict(vocab_size=11, n_layers=3, d_model=8, n_heads=2, num_experts=2, top_k=1, d_ff=8, max_seq_len=16)


@pytest.fixture(scope="module")
def model():
    return MoEDecoder(ModelConfig(**SIZES)).eval()


@pytest.mark.parametrize(
    "confidence", ["state", ExitClassifier(torch.ones(2, 8), torch.zeros(2))], ids=["rule", "probes"]
)
def test_threshold_files(cases, refused, model, confidence, damaged_json, damaged_bytes, tmp_path, nothing_ran):
    path, probes = tmp_path / "calibration.json", tmp_path / "calibration.safetensors"
    settings = dict(threshold=[0.5, 0.7], min_layer=1, decay=False, cache="propagate", tau=4.0, confidence=confidence)
    write_calibration(path, settings, Certified(model_fingerprint(model), 3), {"of": 3})
    whole, whole_probes = path.read_bytes(), probes.read_bytes() if probes.exists() else b""

    @cases("threshold files" if confidence == "state" else "threshold files with probes")
    @given(damaged_json(json.loads(whole)) | damaged_bytes(whole), st.just(whole_probes) | damaged_bytes(whole_probes))
    def check(contents, beside):
        path.write_bytes(contents)
        probes.write_bytes(beside)
        refused(lambda: generate(model, [[1, 2]], EarlyExit(path), max_new_tokens=3, compile=False))

    check()
