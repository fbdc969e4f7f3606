"""EarlyExit from a calibration's file: whole settings are taken over, anything else is refused in one sentence."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from layerskip_moe.generation import EarlyExit, generate
from layerskip_moe.generation.calibration import Certified
from layerskip_moe.nn.fingerprint import model_fingerprint
from layerskip_moe.pretrained import quantize

OWN = {"threshold": 0.75, "confidence": "state", "min_layer": 2, "decay": True, "cache": "exact", "tau": 3.0}
SETTINGS = {**OWN, "classifier": None}
CERTIFIED = {"weights": "00ff", "max_new_tokens": 12, "temperature": 0.0, "repetition_penalty": 1.0}
CALIBRATED = EarlyExit(**OWN)


def settings_of(strategy):
    return {name: getattr(strategy, name) for name in OWN}


@pytest.fixture
def file(tmp_path):
    """file(content) -> the path of a file that holds it: text as it is, bytes too, anything else as JSON."""

    def write(content):
        path = tmp_path / "calibration.json"
        content = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_settings_come_from_the_file(file):
    path = file({"certified": CERTIFIED, "early_exit": SETTINGS, "model": "what else it holds is for people"})
    assert EarlyExit(path) == EarlyExit(str(path)) and settings_of(EarlyExit(path)) == OWN
    assert EarlyExit(path).certified == Certified(**CERTIFIED) and CALIBRATED.certified is None


def test_a_whole_number_is_a_threshold(file):
    assert EarlyExit(file({"certified": CERTIFIED, "early_exit": {**SETTINGS, "threshold": 1}})).threshold == 1


def test_decoding_is_that_of_the_same_settings(trained_model, file):
    model, prompts = trained_model(n_layers=5), [[3], [5, 1, 7, 2]]
    certified = {**CERTIFIED, "weights": model_fingerprint(model)}
    got = generate(model, prompts, EarlyExit(file({"certified": certified, "early_exit": SETTINGS})), max_new_tokens=12)
    expected = generate(model, prompts, CALIBRATED, max_new_tokens=12)
    assert (got.tokens, got.layers_run) == (expected.tokens, expected.layers_run)
    assert len({layer for row in got.layers_run for layer in row}) > 1


def test_settings_that_agree_may_be_said_again(file):
    path = file({"certified": CERTIFIED, "early_exit": SETTINGS})
    said_again = EarlyExit(path, confidence="state", min_layer=2, decay=True, cache="exact", tau=3)
    assert settings_of(said_again) == OWN and said_again.certified == Certified(**CERTIFIED)


@pytest.mark.parametrize(
    ("decay", "asked", "message"),
    [
        (False, dict(max_new_tokens=13), "calibrated for 12 new tokens, not 13; ask for 12, or calibrate again."),
        (False, dict(max_new_tokens=5), None),
        (True, dict(max_new_tokens=5), "exactly 12 new tokens, with which its thresholds decay, not 5; ask for 12"),
        (False, dict(temperature=0.8), "calibrated at temperature=0.0, and promises nothing at 0.8"),
        (False, dict(repetition_penalty=1.2), "calibrated at repetition_penalty=1.0, and promises nothing at 1.2"),
        (True, dict(top_k=3, seed=1), None),
    ],
    ids=str,
)
def test_what_a_calibration_does_not_hold_for_is_refused(tiny_model, file, decay, asked, message):
    model = tiny_model()
    held = {**CERTIFIED, "weights": model_fingerprint(model)}
    strategy = EarlyExit(file({"certified": held, "early_exit": {**SETTINGS, "decay": decay}}))
    how = {"max_new_tokens": 12, **asked}
    unbound = replace(strategy, threshold=strategy.threshold)  # the same settings, and no promise
    expected = generate(model, [[1, 2]], unbound, **how).tokens
    if message is None:
        assert generate(model, [[1, 2]], strategy, **how).tokens == expected
        return
    with pytest.raises(ValueError, match=message):
        generate(model, [[1, 2]], strategy, **how)


def test_other_weights_are_refused(tiny_model, file):
    model = tiny_model()
    held = {**CERTIFIED, "weights": model_fingerprint(model)}
    strategy = EarlyExit(file({"certified": held, "early_exit": SETTINGS}))
    generate(model, [[1]], strategy, max_new_tokens=12)
    hardly_other = copy.deepcopy(model)
    with torch.no_grad():
        hardly_other.blocks[1].attention.output.weight[5, 7] += 1e-3
    for other in (hardly_other, tiny_model(seed=1), copy.deepcopy(model).bfloat16(), quantize(model, "int8")):
        with pytest.raises(ValueError, match="another model's weights, or for these in another type; calibrate again"):
            generate(other, [[1]], strategy, max_new_tokens=12)


@pytest.mark.parametrize(
    ("own", "name"),
    [
        (dict(confidence=lambda hidden, previous, logits: hidden[:, 0]), "confidence='state'"),
        (dict(min_layer=3), "min_layer=2, not 3; leave min_layer out"),
    ],
    ids=["a function", "another layer"],
)
def test_other_settings_than_the_file_s_are_refused(file, own, name):
    with pytest.raises(ValueError, match=f"was calibrated with {name}"):
        EarlyExit(file({"certified": CERTIFIED, "early_exit": SETTINGS}), **own)


@pytest.mark.parametrize(
    ("name", "other", "own"),
    [
        ("confidence", "softmax_diff", "state"),
        ("decay", False, True),
        ("cache", "propagate", "exact"),
        ("tau", 4.0, 5.0),
    ],
)
def test_each_setting_is_guarded(file, name, other, own):
    with pytest.raises(ValueError, match=rf"{name}={other!r}, not {own!r}; leave {name} out\."):
        EarlyExit(file({"certified": CERTIFIED, "early_exit": {**SETTINGS, name: other}}), **{name: own})


def without(name):
    return {key: value for key, value in SETTINGS.items() if key != name}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        (json.dumps({"certified": CERTIFIED, "early_exit": SETTINGS})[:-9], "is not JSON"),
        (b'{"early_exit": "\xff"}', "is not JSON"),
        ([], "is no calibration"),
        (0.5, "is no calibration"),
        ({}, "is no calibration"),
        (SETTINGS, "is no calibration"),
        ({"early_exit": 0.5}, "is no calibration"),
        ({"early_exit": {}}, "must state threshold, confidence, min_layer, decay, cache, tau"),
        *(({"certified": CERTIFIED, "early_exit": without(name)}, "is no calibration") for name in SETTINGS),
        ({"certified": CERTIFIED, "early_exit": {**SETTINGS, "temperature": 1.0}}, "is no calibration"),
        ({"early_exit": SETTINGS}, '"certified" must state weights, max_new_tokens, temperature, repetition_penalty'),
        ({"early_exit": SETTINGS, "certified": {**CERTIFIED, "weights": None}}, "weights=None, which is not"),
        ({"early_exit": SETTINGS, "certified": {**CERTIFIED, "max_new_tokens": 1.5}}, "max_new_tokens=1.5"),
        (
            {"certified": CERTIFIED, "early_exit": {**SETTINGS, "threshold": "0.5"}},
            "threshold='0.5', which is not of the right kind",
        ),
        (
            {"certified": CERTIFIED, "early_exit": {**SETTINGS, "threshold": True}},
            "threshold=True, which is not of the right kind",
        ),
        ({"certified": CERTIFIED, "early_exit": {**SETTINGS, "threshold": None}}, "threshold=None"),
        (
            {"certified": CERTIFIED, "early_exit": {**SETTINGS, "threshold": float("nan")}},
            "threshold=nan must be between 0",
        ),
        ({"certified": CERTIFIED, "early_exit": {**SETTINGS, "min_layer": 2.5}}, "min_layer=2.5"),
        ({"certified": CERTIFIED, "early_exit": {**SETTINGS, "min_layer": True}}, "min_layer=True"),
        ({"certified": CERTIFIED, "early_exit": {**SETTINGS, "decay": 1}}, "decay=1"),
        (
            {"certified": CERTIFIED, "early_exit": {**SETTINGS, "confidence": "entropy"}},
            "confidence='entropy' is unknown",
        ),
        ({"certified": CERTIFIED, "early_exit": {**SETTINGS, "cache": "none"}}, "cache='none' is unknown"),
    ],
    ids=str,
)
def test_damaged_files_are_refused(file, content, message):
    with pytest.raises(ValueError, match=message) as refused:
        EarlyExit(file(content))
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


def test_a_path_that_holds_no_file_is_refused(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path, "0.9"):
        with pytest.raises(ValueError, match=f"There is no calibration file '{path}'; give a number between 0 and 1"):
            EarlyExit(path)


def test_the_file_s_first_layer_must_be_the_model_s(tiny_model, file):
    strategy = EarlyExit(file({"certified": CERTIFIED, "early_exit": {**SETTINGS, "min_layer": 4}}))
    with pytest.raises(ValueError, match="min_layer=4 must be between 1 and n_layers=3"):
        generate(tiny_model(), [[1]], strategy, max_new_tokens=4)
