"""ExitClassifier: the probes' formula, early exit by them, and the files they are kept in."""

import json

import numpy as np
import pytest
import torch

from layerskip_moe.generation import EarlyExit, generate
from layerskip_moe.generation.calibration import Certified, write_calibration
from layerskip_moe.generation.exit_classifier import ExitClassifier, load_classifier
from layerskip_moe.nn.fingerprint import model_fingerprint

PROMPTS = [[3], [5, 1, 7, 2], [8, 8, 1, 0, 2, 3]]
SETTINGS = {"threshold": [0.5, 0.6, 1.0, 0.0], "min_layer": 1, "decay": True, "cache": "exact", "tau": 3.0}


def probes(*, n_layers=5, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ExitClassifier(torch.randn(n_layers - 1, width, generator=generator), torch.linspace(-1, 1, n_layers - 1))


@pytest.fixture
def saved(tmp_path, exact_model):
    """The path of a calibration with probes, and those."""
    path, classifier = tmp_path / "early.json", probes()
    certified = Certified(model_fingerprint(exact_model(n_layers=5)), 8)
    write_calibration(path, {**SETTINGS, "confidence": classifier}, certified, {"promise": "none"})
    return path, classifier


def test_confidence_is_softmax_of_two_classes():
    classifier, hidden = probes(), 7 * torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    for layer in range(1, 5):
        states = hidden.double().numpy()
        states = states / np.sqrt((states**2).mean(-1, keepdims=True))
        logits = states @ classifier.weight[layer - 1].double().numpy() + float(classifier.bias[layer - 1])
        expected = np.exp(logits) / (np.exp(0) + np.exp(logits))
        np.testing.assert_allclose(classifier.confidence(hidden, layer).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("cache", ["exact", "propagate"])
def test_equal_probes_decode_as_the_same_function_would(exact_model, cache):
    """A function is not told the layer; the head it is given the logits of is asked no less, and says the same."""
    row = probes(seed=3).weight[:1]
    classifier = ExitClassifier(row.expand(4, -1), torch.zeros(4))

    def function(hidden, previous, logits):
        return classifier.confidence(hidden, 1)

    model = exact_model(n_layers=5)
    by_probes = generate(model, PROMPTS, EarlyExit(0.6, classifier, cache=cache), max_new_tokens=12)
    by_function = generate(model, PROMPTS, EarlyExit(0.6, function, cache=cache), max_new_tokens=12)
    assert (by_probes.tokens, by_probes.layers_run) == (by_function.tokens, by_function.layers_run)
    assert len({layer for row in by_probes.layers_run for layer in row}) > 2


def test_each_layer_has_its_own_probe(exact_model):
    sure = torch.tensor([-9.0, -9.0, 9.0, 9.0])
    out = generate(
        exact_model(n_layers=5), PROMPTS, EarlyExit(0.5, ExitClassifier(torch.zeros(4, 16), sure)), max_new_tokens=3
    )
    assert out.layers_run == [[3] * 3] * 3


def test_the_head_is_asked_only_where_a_token_leaves(exact_model):
    model, asked = exact_model(n_layers=5), []
    model.norm.register_forward_hook(lambda _, inputs, output: asked.append(len(output)))
    try:
        generate(model, [[3, 4]], EarlyExit(0.9, probes(), cache="exact"), max_new_tokens=8)
    finally:
        model.norm._forward_hooks.clear()
    assert len(asked) == 8


def test_settings_and_probes_come_from_the_files(exact_model, saved):
    path, classifier = saved
    strategy = EarlyExit(path)
    assert isinstance(strategy.confidence, ExitClassifier)
    assert torch.equal(strategy.confidence.weight, classifier.weight)
    assert torch.equal(strategy.confidence.bias, classifier.bias)
    assert (strategy.threshold, strategy.tau) == ((0.5, 0.6, 1.0, 0.0), 3.0)
    assert json.loads(path.read_text())["calibration"] == {"promise": "none"}
    own = EarlyExit(**{**SETTINGS, "confidence": classifier})
    got = generate(exact_model(n_layers=5), PROMPTS, strategy, max_new_tokens=8)
    assert got.layers_run == generate(exact_model(n_layers=5), PROMPTS, own, max_new_tokens=8).layers_run


def test_other_confidences_than_the_file_s_are_refused(saved):
    for other in ("state", probes(seed=9)):
        with pytest.raises(ValueError, match=r"was calibrated with confidence=.* leave confidence out"):
            EarlyExit(saved[0], confidence=other)


def test_probes_that_were_exchanged_or_lost_are_refused(saved):
    path, _ = saved
    file = path.with_suffix(".safetensors")
    probes(seed=7).save(file)
    with pytest.raises(ValueError, match=r"is not the classifier that .* was calibrated with; calibrate again"):
        EarlyExit(path)
    file.unlink()
    with pytest.raises(ValueError, match=r"needs the classifier .*which is not there"):
        EarlyExit(path)


@pytest.mark.parametrize(
    ("confidence", "named", "message"),
    [
        ("classifier", None, "must name a classifier's file if, and only if"),
        ("state", {"file": "early.safetensors", "sha256": "0"}, "must name a classifier's file if, and only if"),
        ("classifier", {"file": "early.safetensors"}, "it must state its file and sha256"),
        ("classifier", {"file": 1, "sha256": "0"}, "it must state its file and sha256"),
        ("classifier", "early.safetensors", "classifier='early.safetensors', which is not of the right kind"),
    ],
    ids=str,
)
def test_damaged_names_are_refused(saved, confidence, named, message):
    path, _ = saved
    contents = json.loads(path.read_text()) | {
        "early_exit": {**SETTINGS, "confidence": confidence, "classifier": named}
    }
    path.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=message):
        EarlyExit(path)


def test_a_function_fits_in_no_file(tmp_path):
    with pytest.raises(ValueError, match="is a function, which no file can hold"):
        write_calibration(
            tmp_path / "x.json", {**SETTINGS, "confidence": lambda h, p, z: h[:, 0]}, Certified("", 8), {}
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sizes", [dict(n_layers=4), dict(width=8)])
def test_probes_of_another_network_are_refused(exact_model, sizes):
    with pytest.raises(ValueError, match=r"was trained for .* and the model has 5 of width 16; train one"):
        generate(exact_model(n_layers=5), PROMPTS, EarlyExit(0.5, probes(**sizes)), max_new_tokens=2)


def test_files_that_hold_no_probes_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="cannot be read"):
        load_classifier(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        load_classifier(path)
    save_file({"other": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds other, no classifier's weight and bias"):
        load_classifier(path)
    with pytest.raises(ValueError, match=r"must be \[L - 1, D\] and \[L - 1\]"):
        ExitClassifier(torch.zeros(3, 4), torch.zeros(2))
