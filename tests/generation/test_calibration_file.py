"""EarlyExit from a calibration's file: whole settings are taken over, anything else is refused in one sentence."""

import json

import pytest

from layerskip_moe.generation import EarlyExit, generate

OWN = {"threshold": 0.75, "confidence": "state", "min_layer": 2, "decay": True, "cache": "exact", "tau": 3.0}
SETTINGS = {**OWN, "classifier": None}
CALIBRATED = EarlyExit(**OWN)


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
    path = file({"early_exit": SETTINGS, "model": "what else it holds is for people"})
    assert EarlyExit(path) == EarlyExit(str(path)) == CALIBRATED


def test_a_whole_number_is_a_threshold(file):
    assert EarlyExit(file({"early_exit": {**SETTINGS, "threshold": 1}})).threshold == 1


def test_decoding_is_that_of_the_same_settings(trained_model, file):
    model, prompts = trained_model(n_layers=5), [[3], [5, 1, 7, 2]]
    got = generate(model, prompts, EarlyExit(file({"early_exit": SETTINGS})), max_new_tokens=12)
    expected = generate(model, prompts, CALIBRATED, max_new_tokens=12)
    assert (got.tokens, got.layers_run) == (expected.tokens, expected.layers_run)
    assert len({layer for row in got.layers_run for layer in row}) > 1


def test_settings_that_agree_may_be_said_again(file):
    path = file({"early_exit": SETTINGS})
    assert EarlyExit(path, confidence="state", min_layer=2, decay=True, cache="exact", tau=3) == CALIBRATED


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
        EarlyExit(file({"early_exit": SETTINGS}), **own)


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
        EarlyExit(file({"early_exit": {**SETTINGS, name: other}}), **{name: own})


def without(name):
    return {key: value for key, value in SETTINGS.items() if key != name}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        (json.dumps({"early_exit": SETTINGS})[:-9], "is not JSON"),
        (b'{"early_exit": "\xff"}', "is not JSON"),
        ([], "is no calibration"),
        (0.5, "is no calibration"),
        ({}, "is no calibration"),
        (SETTINGS, "is no calibration"),
        ({"early_exit": 0.5}, "is no calibration"),
        ({"early_exit": {}}, "must state threshold, confidence, min_layer, decay, cache, tau"),
        *(({"early_exit": without(name)}, "is no calibration") for name in SETTINGS),
        ({"early_exit": {**SETTINGS, "temperature": 1.0}}, "is no calibration"),
        ({"early_exit": {**SETTINGS, "threshold": "0.5"}}, "threshold='0.5', which is not of the right kind"),
        ({"early_exit": {**SETTINGS, "threshold": True}}, "threshold=True, which is not of the right kind"),
        ({"early_exit": {**SETTINGS, "threshold": None}}, "threshold=None"),
        ({"early_exit": {**SETTINGS, "threshold": float("nan")}}, "threshold=nan must be between 0"),
        ({"early_exit": {**SETTINGS, "min_layer": 2.5}}, "min_layer=2.5"),
        ({"early_exit": {**SETTINGS, "min_layer": True}}, "min_layer=True"),
        ({"early_exit": {**SETTINGS, "decay": 1}}, "decay=1"),
        ({"early_exit": {**SETTINGS, "confidence": "entropy"}}, "confidence='entropy' is unknown"),
        ({"early_exit": {**SETTINGS, "cache": "none"}}, "cache='none' is unknown"),
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
    strategy = EarlyExit(file({"early_exit": {**SETTINGS, "min_layer": 4}}))
    with pytest.raises(ValueError, match="min_layer=4 must be between 1 and n_layers=3"):
        generate(tiny_model(), [[1]], strategy, max_new_tokens=4)
